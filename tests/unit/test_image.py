"""Images: built whole or not at all, and every kind of damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import tiny_gemma
import xxhash

from fdir.pages import PAGE_SIZE
from node.inference import builder, layout, probe
from node.inference import manifest as m
from node.inference.builder import build_image
from node.inference.image import image_info, verify_image
from node.inference.model import open_model
from node.inference.probe import mapped_addresses
from node.inference.slot_files import copy_image
from telemetry.errors import PenumbraError


@pytest.fixture
def image(tiny_image: Path, tmp_path: Path) -> Path:
    """An image of this test's own."""
    return Path(shutil.copytree(tiny_image, tmp_path / "a"))


def rewrite_manifest(image: Path, **changes: object) -> None:
    """Change fields of a manifest and seal it again."""
    manifest = m.load_manifest(image)
    (image / m.MANIFEST).write_bytes(m.encode_manifest(msgspec.structs.replace(manifest, **changes)))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_a_good_image_is_whole(tiny_image):
    assert verify_image(tiny_image) == m.load_manifest(tiny_image)
    assert {path.name for path in tiny_image.iterdir()} == set(m.FILES)


def test_every_tensor_has_pages_of_its_own(tiny_image):
    manifest = m.load_manifest(tiny_image)
    owned = [
        page
        for tensor in (*manifest.tensors, *manifest.originals)
        for page in range(tensor.first_page, tensor.first_page + tensor.page_count)
    ]
    assert sorted(owned) == list(range(manifest.weight_pages))
    assert all(tensor.offset == tensor.first_page * PAGE_SIZE for tensor in manifest.tensors)


@pytest.mark.parametrize("checked", [False, True])
def test_a_model_maps_what_the_manifest_says_and_nothing_else(image, checked):
    manifest = m.load_manifest(image)
    model = open_model(image, 1, checked=checked)
    found = mapped_addresses(image / m.WEIGHTS, (*manifest.tensors, *manifest.originals))
    assert {name for name, places in found.items() if places} == {
        tensor.name for tensor in manifest.mapped(checked)
    }
    assert max(map(len, found.values())) == 1
    assert model.checked == checked


def test_every_matrix_norm_and_table_is_in_the_manifest(tiny_image):
    found = {(tensor.role, tensor.layer) for tensor in m.load_manifest(tiny_image).tensors}
    roles = ("attn_qkv", "attn_output", "ffn_gate_up", "ffn_down", "norm")
    assert found >= {(role, layer) for role in roles for layer in range(tiny_gemma.LAYERS)}
    assert found >= {("head", None), ("embed", None), ("rope", None), ("norm", None)}
    assert "other" not in {role for role, _ in found}


def test_tables_are_read_by_row(tiny_image):
    manifest = m.load_manifest(tiny_image)
    rows = {tensor.name: tensor.rows for tensor in manifest.tensors if tensor.rows}
    rotary = {f"rope.{kind}.{part}" for kind in ("local", "global") for part in ("cos", "sin")}
    assert rows == dict.fromkeys(("token_embd.weight", "token_embd.scale"), manifest.shape.vocab) | (
        dict.fromkeys(rotary, manifest.shape.context)
    )


def test_both_slots_bear_one_image_id(tiny_images):
    ids = {m.image_id(verify_image(tiny_images / slot)) for slot in m.SLOTS}
    assert len(ids) == 1
    assert len(ids.pop()) == 16


def test_building_twice_gives_the_same_image(tiny_image, tiny_gguf, tmp_path):
    again = build_image(tiny_gguf, tmp_path)
    for name in m.FILES:
        assert (again / name).read_bytes() == (tiny_image / name).read_bytes(), name


def test_an_image_that_is_up_to_date_is_left_alone(tiny_gguf, tmp_path):
    stages: list[str] = []
    first = build_image(tiny_gguf, tmp_path)
    born = (first / m.MANIFEST).stat().st_mtime_ns
    build_image(tiny_gguf, tmp_path, progress=lambda stage, _: stages.append(stage))
    assert (first / m.MANIFEST).stat().st_mtime_ns == born
    assert stages[-1] == "up to date"
    build_image(tiny_gguf, tmp_path, force=True)
    assert (first / m.MANIFEST).stat().st_mtime_ns > born


@pytest.mark.parametrize(
    "change",
    [{"onnxruntime": "1.0"}, {"cpu": "x86_64:mmx"}, {"gguf_sha256": "0" * 64}, {"builder": 0}, {"format": 0}],
    ids=lambda change: next(iter(change)),
)
def test_an_image_of_anything_else_is_built_again(tiny_gguf, tmp_path, change):
    image = build_image(tiny_gguf, tmp_path)
    rewrite_manifest(image, **change)
    build_image(tiny_gguf, tmp_path)
    verify_image(image)


def test_progress_never_goes_back(tiny_gguf, tmp_path):
    fractions: list[float] = []
    build_image(tiny_gguf, tmp_path, progress=lambda _, fraction: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("step", ["lay_out", "sentencepiece_model", "calibrate", "_protect", "flush"])
def test_an_interrupted_build_leaves_nothing_half_made(tiny_gguf, tmp_path, monkeypatch, step):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_image(tiny_gguf, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_interrupted_build_leaves_the_old_image(tiny_gguf, tmp_path, monkeypatch):
    image = build_image(tiny_gguf, tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(builder, "lay_out", fail)
    with pytest.raises(PenumbraError, match="No space left on device"):
        build_image(tiny_gguf, tmp_path, force=True)
    verify_image(image)


def test_what_a_killed_build_left_is_cleared(tiny_gguf, tmp_path):
    (tmp_path / ".a.building" / "raw").mkdir(parents=True)
    verify_image(build_image(tiny_gguf, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a"]


def test_a_damaged_slot_is_not_copied(tiny_images, tmp_path):
    shutil.copytree(tiny_images / "a", tmp_path / "a")
    flip(tmp_path / "a" / m.WEIGHTS, 5000)
    with pytest.raises(PenumbraError, match=r"weights\.bin: page 1 "):
        copy_image(tmp_path, "a", "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", m.FILES)
def test_a_missing_file_is_named(image, name):
    (image / name).unlink()
    with pytest.raises(PenumbraError, match=f"{name}: no such file"):
        verify_image(image)


@pytest.mark.parametrize("name", [name for name in m.FILES if name != m.MANIFEST])
def test_a_truncated_file_is_named(image, name):
    size = (image / name).stat().st_size
    with (image / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(PenumbraError, match=f"{name}: {size - 1} bytes, {size} by the manifest"):
        verify_image(image)


@pytest.mark.parametrize("name", [*m.GRAPHS, m.TOKENIZER, m.DIGESTS])
def test_a_flipped_bit_in_a_small_file_is_noticed(image, name):
    flip(image / name, (image / name).stat().st_size // 2)
    with pytest.raises(PenumbraError, match=f"{name}: damaged"):
        verify_image(image)


def test_the_first_bad_page_is_named_with_its_tensor(image):
    manifest = m.load_manifest(image)
    first = next(tensor for tensor in manifest.tensors if tensor.role == "ffn_gate_up" and tensor.layer == 1)
    later = manifest.tensors[-1]
    flip(image / m.WEIGHTS, later.offset)
    flip(image / m.WEIGHTS, first.offset + PAGE_SIZE + 17)
    with pytest.raises(PenumbraError) as error:
        verify_image(image)
    page = first.first_page + 1
    assert f"weights.bin: page {page} (byte offset {page * PAGE_SIZE})" in error.value.what
    assert f"tensor {first.name} (role ffn_gate_up, layer 1) is damaged; 1 more pages" in error.value.what


def test_a_bad_original_and_a_bad_parity_page_are_noticed(image):
    original = m.load_manifest(image).originals[0]
    flip(image / m.WEIGHTS, original.offset)
    with pytest.raises(PenumbraError, match=f"tensor {original.name} "):
        verify_image(image)
    flip(image / m.WEIGHTS, original.offset)
    flip(image / m.PARITY, PAGE_SIZE)
    with pytest.raises(PenumbraError, match=r"parity\.bin: page 1 \(byte offset 4096\) is damaged"):
        verify_image(image)


def test_every_flipped_bit_of_a_manifest_is_noticed(image):
    """Every bit of one short manifest would take minutes: all bits of every 61st byte."""
    path = image / m.MANIFEST
    good = path.read_bytes()
    for at in range(0, len(good) - 1, 61):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            with pytest.raises(PenumbraError, match=r"manifest\.json: "):
                m.load_manifest(image)


def test_a_manifest_of_another_version_is_refused(image):
    rewrite_manifest(image, format=1)
    with pytest.raises(
        PenumbraError, match="image format 1; this version reads 3: before it, runs of spaces"
    ):
        verify_image(image)


def test_a_manifest_with_an_unknown_field_is_refused(image):
    body = msgspec.json.decode(m.canonical_body(m.load_manifest(image))) | {"extra": 1}
    raw = json.dumps(body).encode()
    sealed = {"xxh3": xxhash.xxh3_64_hexdigest(raw), "body": msgspec.Raw(raw)}
    (image / m.MANIFEST).write_bytes(msgspec.json.encode(sealed))
    with pytest.raises(PenumbraError, match="unknown field `extra`"):
        m.load_manifest(image)


@pytest.mark.parametrize(
    ("field", "value"), [("onnxruntime", "1.0"), ("cpu", "x86_64:mmx"), ("page_size", 16384)]
)
def test_an_image_for_another_machine_is_refused(image, field, value):
    rewrite_manifest(image, **{field: value})
    with pytest.raises(PenumbraError, match=f"built for {field} {value}, this machine has"):
        verify_image(image)


@pytest.mark.parametrize("graph", m.GRAPHS)
def test_a_graph_that_does_not_load_is_refused(image, graph):
    (image / graph).write_bytes(b"not a graph")
    with pytest.raises(PenumbraError, match=f"{graph}: ONNX Runtime cannot load it"):
        open_model(image, 1, checked=graph == m.CHECKED_TRUNK)


@pytest.fixture(scope="module")
def image_with_originals(tiny_gguf, tmp_path_factory):
    """As it is built where ONNX Runtime packs in a way we cannot undo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "can_hold", lambda *_: False)
        return build_image(tiny_gguf, tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("kind", ["weight", "scale"])
@pytest.mark.parametrize("offset", [2, 700, 1003])
def test_an_image_that_would_be_packed_anew_is_refused(image_with_originals, tmp_path, kind, offset):
    """ONNX Runtime loads it without a word, and computes on memory of its own."""
    image = Path(shutil.copytree(image_with_originals, tmp_path / "a"))
    manifest = m.load_manifest(image)
    (tensor,) = (
        tensor
        for tensor in (*manifest.originals, *manifest.tensors)
        if tensor.name == f"blk.1.ffn_gate_up.{kind}"
    )
    flip(image / m.WEIGHTS, tensor.offset + offset)
    with pytest.raises(
        PenumbraError, match=r"not the known answer|does not compute on the image's blk\.1\.ffn_gate_up"
    ):
        open_model(image, 1)


def test_an_image_that_computes_something_else_is_refused(image):
    norm = next(tensor for tensor in m.load_manifest(image).tensors if tensor.name == "blk.1.ffn_norm.weight")
    flip(image / m.WEIGHTS, norm.offset + 3)
    with pytest.raises(PenumbraError, match="not the known answer"):
        open_model(image, 1)


def test_where_the_kernel_hides_pages_the_known_answer_must_do(tiny_image, monkeypatch):
    monkeypatch.setattr(probe, "can_observe", lambda: False)
    open_model(tiny_image, 1)


@pytest.mark.parametrize("part", [0.001, 0.3, 0.7, 0.85, 0.95], ids=lambda part: f"{part:.0%}")
@pytest.mark.parametrize("name", ["blk.1.ffn_gate_up.weight.packed", "screen.high.weight.packed"])
def test_a_struck_packed_weight_does_not_load(image, name, part):
    """Codes, sums and scales: what is rebuilt from one part does not pack to the others."""
    packed = next(tensor for tensor in m.load_manifest(image).tensors if tensor.name == name)
    flip(image / m.WEIGHTS, packed.offset + int(part * packed.length))
    with pytest.raises(PenumbraError, match=r"ONNX Runtime cannot load it|not the known answer"):
        open_model(image, 1)


def test_dimensions_the_operators_cannot_take_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_gemma, "_Q5", tiny_gemma._F32)
    monkeypatch.setattr(tiny_gemma, "_Q8", tiny_gemma._F32)
    path = tiny_gemma.write_tiny_gguf(tmp_path / "odd.gguf", size=tiny_gemma.Size(ffn=48))
    with pytest.raises(PenumbraError, match="feed_forward_length is 48; it must be a multiple of 32"):
        build_image(path, tmp_path / "images")


@pytest.mark.parametrize("step", [0, -8, 12, 2048])
def test_a_manifest_with_no_step_for_windows_is_refused(image, step):
    rewrite_manifest(image, window_step=step)
    with pytest.raises(PenumbraError, match="window_step") as error:
        open_model(image, 1)
    assert "penumbra model build --force" in error.value.mend


def test_the_summary_adds_up(tiny_image):
    info = image_info(tiny_image)
    manifest = m.load_manifest(tiny_image)
    assert info.total_bytes == sum(path.stat().st_size for path in tiny_image.iterdir())
    assert info.mapped_bytes == sum(role.bytes for role in info.roles.values())
    assert info.live_bytes < info.mapped_bytes
    assert info.image_id == m.image_id(manifest)


def test_the_images_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PENUMBRA_IMAGES", "/x")
    assert m.default_images_dir() == Path("/x")
    monkeypatch.delenv("PENUMBRA_IMAGES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert m.default_images_dir() == tmp_path / "penumbra" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert m.default_images_dir() == Path("/home/someone/.cache/penumbra/images")


def test_the_cpu_fingerprint_keeps_what_packing_depends_on(monkeypatch):
    monkeypatch.setattr(m.platform, "machine", lambda: "x86_64")
    assert m.cpu_fingerprint("model: x\nflags\t: sse avx2 fma nx avx\n") == "x86_64:avx,avx2,fma"
    monkeypatch.setattr(m.platform, "machine", lambda: "aarch64")
    assert m.cpu_fingerprint("Features\t: fp asimd asimddp crc32\n") == "aarch64:asimd,asimddp"
