"""The manifest of a model image: what was built, from what, for which machine, and where each tensor lies.

An image is a directory ``<images>/<slot>/``; slots are ``a`` and ``b``. Its files are listed in `FILES`.

``manifest.json`` is one JSON object ``{"xxh3": "<16 hex>", "body": {...}}``. The digest is xxh3_64 of the
body's bytes as they stand in the file, which are canonical (msgspec JSON, deterministic order): a flipped
bit in the manifest is noticed before any of its figures is used. The image id is the first 16 hexadecimal
digits of the SHA-256 of the same bytes; the body holds neither time nor place, so both slots built from
one model bear one id.

``digests.bin`` holds unsigned 64-bit little-endian xxh3_64 values, without a header, in this order:

1. one for each 4 KiB page of ``weights.bin`` (`Manifest.weight_pages` of them; the last page zero padded);
2. one for each page of ``parity.bin`` (`Manifest.parity_pages`);
3. for each tensor of `Manifest.tensors`, in that order, one for each block of up to 256 consecutive pages
   counted from the tensor's first page. A scan of all weights is then some 500 long hash calls, not 75,000
   short ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
import xxhash
from msgspec import Meta

from fdir.pages import PAGE_SIZE, MappedTensor, PageTable, WeightMemory
from fdir.rows import GROUP
from node.inference.arithmetic import SETTINGS, OperatorError, check_operators
from node.inference.packing import PackedMatrix
from node.inference.screen_bounds import ScreenBounds
from telemetry.errors import PenumbraError

FORMAT_VERSION = 3
"""Version of the image format; an image of another version is refused."""
SINCE_FORMAT = {
    3: "before it, runs of spaces became other tokens than the model was trained on, and operators were not "
    "measured"
}
"""Why images of an older format are refused."""
TRUNK, CHECKED_TRUNK, SCREEN = "trunk.onnx", "trunk_checked.onnx", "screen.onnx"
GRAPHS = (TRUNK, CHECKED_TRUNK, SCREEN)
"""Graphs, which all refer to one weights file. A tensor two trunks share belongs to the first."""
WEIGHTS, PARITY = "weights.bin", "parity.bin"
DIGESTS, TOKENIZER, MANIFEST = "digests.bin", "tokenizer.model", "manifest.json"
FILES = (*GRAPHS, WEIGHTS, PARITY, DIGESTS, TOKENIZER, MANIFEST)
"""Every file of an image."""
PACKED = ".packed"
"""End of the name of a tensor in the form ONNX Runtime computes on."""
TABLE, ROTATION = "output", "screen.rotation"
"""Names of what the loader maps itself: the table of an untied head, and the rotation of the screen."""
EMBEDDING = "token_embd"
"""Name of the embedding table, which is that of a tied head too."""
SLOTS = ("a", "b")
Slot: TypeAlias = Literal["a", "b"]

_REBUILD = "build the image again: `penumbra model build --force`"
_X86_FEATURES = (
    "avx avx2 fma f16c avx_vnni "
    "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_int8"
)
_ARM_FEATURES = "asimd asimddp i8mm sve bf16 fphp asimdhp"


class GemmaShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Dimensions of a Gemma 3 text model, as its metadata give them."""

    layers: int
    width: int
    """Length of a hidden state."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Length of the hidden layer of the feed-forward network."""
    vocab: int
    rms_eps: float
    context: int
    """Positions the model was trained for; in an image, those it can address: the length of the rotary
    tables."""
    window: int
    """Positions a sliding-window layer attends to, its own included."""
    global_every: int
    """Every N-th layer (N-1, 2N-1, ... counted from 0) attends to all positions, the others to the window."""
    rope_base_local: float
    rope_base_global: float
    rope_scale_global: float
    """Factor positions are divided by in global layers."""
    attention_scale: float

    def is_global(self, layer: int) -> bool:
        """Tell whether a layer, counted from 0, attends to all positions."""
        return (layer + 1) % self.global_every == 0


class Checks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the residuals of a checked trunk are judged."""

    names: tuple[str, ...]
    """Matrix product of each column of ``residual``."""
    limits: tuple[float, ...]
    """Largest sound residual of each; more is a fault of computation."""
    false_positive: float
    """Bound, with 95 % confidence, on the chance that a sound position exceeds any limit: stated from
    `positions` sound ones the limits were not made from, of which `tripped` did."""
    positions: int
    tripped: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that is fixed when an image is built."""

    format: int
    builder: int
    """Version of the build steps: images of an older one are built again."""
    model: str
    """``general.name`` of the GGUF."""
    gguf_sha256: str
    onnxruntime: str
    cpu: str
    """Fingerprint of the CPU features the packed weights are laid out for, see `cpu_fingerprint`."""
    options: dict[str, str]
    """What decides how sessions compute; `SETTINGS` of `node.inference.arithmetic`."""
    operators: tuple[OperatorError, ...]
    """What the build measured of each matrix product, the first of each shape."""
    window_step: Annotated[int, Meta(ge=GROUP, le=1024, multiple_of=GROUP)]
    """Positions at whose multiples windows begin: results are then those of the full cache to the bit, as the
    build measured (`node.inference.attention`)."""
    page_size: int
    shape: GemmaShape
    bos: int
    eos: int
    sizes: dict[str, int]
    """Bytes of each file but the manifest."""
    sha256: dict[str, str]
    """SHA-256 of graphs, tokenizer and digests. Weights and parity are covered by the page digests."""
    weight_pages: int
    parity_pages: int
    parity_data: int
    """Data pages in a parity group."""
    parity_extra: int
    """Parity pages of a group: the number of bad pages it can restore."""
    known_answers: dict[str, str]
    """By file name of the trunk, xxh3_128 of what sound sessions of it and of the screen compute for a fixed
    input: `node.inference.probe.known_answer`."""
    screen: ScreenBounds
    """What the head needs to know of its screen."""
    checks: Checks
    tensors: tuple[MappedTensor, ...]
    """What a loaded model maps from the weights file, in file order; a model that is not checked does not map
    those of the checked trunk, see `mapped`."""
    originals: tuple[MappedTensor, ...]
    """What loading reads from the weights file and then drops, in file order: unpacked weights that could not
    be rebuilt from the packed ones. From a damaged original ONNX Runtime packs anew, into memory no digest
    covers; that is what the known answer guards against."""
    rebuilt: dict[str, tuple[PackedMatrix, ...]]
    """By file name of the graph, matrices whose unpacked form is rebuilt at loading."""

    def mapped(self, checked: bool) -> tuple[MappedTensor, ...]:
        """Return the tensors a loaded model maps, in file order."""
        return tuple(tensor for tensor in self.tensors if checked or tensor.mapped_by != CHECKED_TRUNK)


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    xxh3: str
    body: msgspec.Raw


def default_images_dir() -> Path:
    """Return ``$PENUMBRA_IMAGES``, or ``penumbra/images`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if images := os.environ.get("PENUMBRA_IMAGES"):
        return Path(images)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "penumbra" / "images"


def cpu_fingerprint(cpuinfo: str | None = None) -> str:
    """Name the CPU features that decide how ONNX Runtime packs weights, such as ``x86_64:avx,avx2,f16c,fma``.

    Parameters
    ----------
    cpuinfo
        Text in the form of ``/proc/cpuinfo``; None reads that of this machine.
    """
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if cpuinfo is None else cpuinfo
    machine = platform.machine()
    known = _ARM_FEATURES if machine in {"aarch64", "arm64"} else _X86_FEATURES
    flags: set[str] = set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            flags = set(value.split())
            break
    return f"{machine}:{','.join(sorted(flags & set(known.split())))}"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the contents of ``manifest.json``."""
    body = canonical_body(manifest)
    return msgspec.json.encode(_Envelope(xxh3=xxhash.xxh3_64_hexdigest(body), body=msgspec.Raw(body))) + b"\n"


def canonical_body(manifest: Manifest) -> bytes:
    """Return the bytes the digest and the image id are taken of."""
    return msgspec.json.encode(manifest, order="deterministic")


def image_id(manifest: Manifest) -> str:
    """Return the image id: 16 hexadecimal digits, the same for every slot built from one model."""
    return hashlib.sha256(canonical_body(manifest)).hexdigest()[:16]


def load_manifest(image_dir: Path) -> Manifest:
    """Read ``manifest.json`` and check that it is whole and of a version this code knows.

    Parameters
    ----------
    image_dir
        The directory of the slot.

    Raises
    ------
    PenumbraError
        The manifest is missing, damaged, or of another format version.
    """
    path = image_dir / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise PenumbraError(f"{path}: no such file: {image_dir} is not a model image", _REBUILD) from None
    return decode_manifest(raw, path)


def decode_manifest(raw: bytes, path: Path) -> Manifest:
    """Decode the contents of a ``manifest.json``; `path` is for the message.

    Raises
    ------
    PenumbraError
        They are damaged, or of another format version.
    """
    try:
        envelope = msgspec.json.decode(raw, type=_Envelope)
        found = xxhash.xxh3_64_hexdigest(bytes(envelope.body))
        if found != envelope.xxh3:
            raise PenumbraError(
                f"{path}: damaged: its body hashes to {found}, it says {envelope.xxh3}", _REBUILD
            )
        version = msgspec.json.decode(envelope.body, type=dict[str, msgspec.Raw]).get(
            "format", msgspec.Raw(b"?")
        )
        if bytes(version) != b"%d" % FORMAT_VERSION:
            raise PenumbraError(
                f"{path}: image format {bytes(version).decode()}; this version reads {FORMAT_VERSION}: "
                f"{SINCE_FORMAT[FORMAT_VERSION]}",
                _REBUILD,
            )
        return msgspec.json.decode(envelope.body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PenumbraError(f"{path}: damaged: {error}", _REBUILD) from None


def check_machine(manifest: Manifest, image_dir: Path, onnxruntime: str) -> None:
    """Check that an image fits this CPU and ONNX Runtime, and that its operators err as little as needed.

    Parameters
    ----------
    manifest
        The image's manifest.
    image_dir
        Its directory, for the message.
    onnxruntime
        Version of ONNX Runtime in use.

    Raises
    ------
    PenumbraError
        The image was built for another CPU, version or options, or an operator errs by too much.
    """
    for field, built, here in (
        ("onnxruntime", manifest.onnxruntime, onnxruntime),
        ("cpu", manifest.cpu, cpu_fingerprint()),
        ("options", str(manifest.options), str(SETTINGS)),
        ("page_size", str(manifest.page_size), str(PAGE_SIZE)),
    ):
        if built != here:
            raise PenumbraError(
                f"{image_dir / MANIFEST}: built for {field} {built}, this machine has {here}", _REBUILD
            )
    check_operators(manifest.operators, str(image_dir / MANIFEST))


def load_page_table(image_dir: Path, manifest: Manifest) -> PageTable:
    """Read ``digests.bin``.

    Raises
    ------
    PenumbraError
        The file is missing, of the wrong size, or does not hash to what the manifest says.
    """
    path = image_dir / DIGESTS
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise PenumbraError(f"{path}: no such file", _REBUILD) from None
    if hashlib.sha256(raw).hexdigest() != manifest.sha256[DIGESTS]:
        raise PenumbraError(f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}", _REBUILD)
    return PageTable.from_bytes(raw, manifest.weight_pages, manifest.parity_pages, manifest.tensors)


def attach_weights(image_dir: Path, manifest: Manifest, *, checked: bool = False) -> WeightMemory:
    """Find the weights that a model loaded by this process has mapped from an image.

    Parameters
    ----------
    image_dir
        Directory of the slot.
    manifest
        Its manifest.
    checked
        Whether the model is a checked one.

    Raises
    ------
    PenumbraError
        A tensor of the manifest is not mapped, or ``digests.bin`` is missing or damaged.
    """
    table = load_page_table(image_dir, manifest)
    blocks = dict(zip((tensor.name for tensor in manifest.tensors), table.blocks, strict=True))
    mapped = manifest.mapped(checked)
    mine = dataclasses.replace(table, blocks=tuple(blocks[tensor.name] for tensor in mapped))
    return WeightMemory.attach(image_dir / WEIGHTS, mapped, mine)
