"""The container of a GGUF file: its metadata and where each tensor lies.

Package ``gguf`` has a reader too, but it makes one numpy view for every array element: on a vocabulary
of 262,144 pieces that takes 12 s, where this parser takes well under one. Its tables of block sizes and its
dequantisers are used as they are (see ``gguf_source``).

Source of the layout: ggml-org/ggml ``docs/gguf.md``, version 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from telemetry.errors import PenumbraError
from telemetry.strict_toml import shown

Value: TypeAlias = "int | float | bool | str | bytes | list[bytes] | NDArray[np.generic]"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_RANK = 4
"""Dimensions of a tensor at most (`GGML_MAX_DIMS`)."""
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_REPLACE = (
    "replace the file with a complete copy (`penumbra model build` without --gguf uses the packaged one)"
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file.

    Parameters
    ----------
    name
        Name in the file, such as ``blk.0.attn_q.weight``.
    shape
        Row-major shape: ``(rows, columns)`` or ``(length,)``; the reverse of the order in the file.
    kind
        Storage type.
    offset
        First byte, from the start of the file.
    length
        Bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    length: int


class GgufFile:
    """A GGUF file, mapped read-only and parsed.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    PenumbraError
        The file is missing, is not a GGUF, is of another version, ends too early, or says of a tensor or a
        field what the format does not allow.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise PenumbraError(
                f"{path}: no such GGUF file", "give the path of a Gemma 3 GGUF to --gguf"
            ) from None
        except (OSError, ValueError) as error:
            raise PenumbraError(f"{path}: cannot be read as a GGUF file: {error}", _REPLACE) from None
        self._at = 0
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorEntry] = {}
        try:
            self._parse()
        except struct.error:
            raise self._truncated(self._at) from None

    def data(self, entry: TensorEntry) -> NDArray[np.uint8]:
        """Return the raw bytes of a tensor, shape ``(length,)``, read-only, without a copy."""
        return np.frombuffer(self._map, np.uint8, entry.length, entry.offset)

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file, 64 hexadecimal digits."""
        return hashlib.sha256(self._map).hexdigest()

    def _truncated(self, at: int) -> PenumbraError:
        return PenumbraError(
            f"{self.path}: truncated: {len(self._map)} bytes, but the contents need byte {at} and more",
            _REPLACE,
        )

    def _parse(self) -> None:
        if self._map[:4] != _MAGIC:
            raise PenumbraError(
                f"{self.path}: not a GGUF file: starts with {self._map[:4]!r}, a GGUF starts with {_MAGIC!r}",
                "give the path of a Gemma 3 GGUF to --gguf",
            )
        self._at = 4
        (version,) = self._unpack("<I")
        if version not in _VERSIONS:
            raise PenumbraError(
                f"{self.path}: GGUF version {version}; versions {_VERSIONS} little-endian are read", _REPLACE
            )
        tensor_count, field_count = self._unpack("<QQ")
        for _ in range(field_count):
            key = self._string().decode("utf-8", "replace")
            if key in self.metadata:
                raise self._malformed(f"metadata field {shown(key)} is there twice")
            (kind,) = self._unpack("<I")
            self.metadata[key] = self._value(kind)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise PenumbraError(
                f"{self.path}: general.alignment is {alignment!r}, not a positive integer", _REPLACE
            )
        headers = [self._tensor_header() for _ in range(tensor_count)]
        start = -(-self._at // alignment) * alignment
        for name, shape, kind_, offset in headers:
            block, block_bytes = GGML_QUANT_SIZES[kind_]
            if name in self.tensors:
                raise self._malformed(f"tensor {shown(name)} is there twice")
            if shape[-1] % block:
                raise self._malformed(
                    f"tensor {shown(name)}: rows of {shape[-1]} columns; {kind_.name} has blocks of {block}"
                )
            if offset % alignment:
                raise self._malformed(
                    f"tensor {shown(name)} begins at byte {offset} of the data, no multiple of {alignment}"
                )
            length = math.prod(shape) // block * block_bytes
            if start + offset + length > len(self._map):
                raise self._truncated(start + offset + length)
            self.tensors[name] = TensorEntry(name, shape, kind_, start + offset, length)
        for one, next_ in pairwise(sorted(self.tensors.values(), key=lambda entry: entry.offset)):
            if one.offset + one.length > next_.offset:
                raise self._malformed(f"tensors {shown(one.name)} and {shown(next_.name)} share bytes")

    def _malformed(self, what: str) -> PenumbraError:
        return PenumbraError(f"{self.path}: {what}", _REPLACE)

    def _tensor_header(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string().decode("utf-8", "replace")
        (rank,) = self._unpack("<I")
        if not 1 <= rank <= _MAX_RANK:
            raise self._malformed(f"tensor {shown(name)} has {rank} dimensions, 1 to {_MAX_RANK} are allowed")
        shape = self._unpack(f"<{rank}Q")[::-1]
        if 0 in shape:
            raise self._malformed(f"tensor {shown(name)} of shape {shape} holds nothing")
        kind, offset = self._unpack("<IQ")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise self._malformed(f"tensor {shown(name)} is of unknown type {kind}") from None

    def _unpack(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self._map, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> bytes:
        (length,) = self._unpack("<Q")
        return self._bytes(length)

    def _bytes(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._map):
            raise self._truncated(end)
        text = self._map[self._at : end]
        self._at = end
        return text

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string().decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array()
        scalar = np.frombuffer(self._bytes(self._dtype(kind).itemsize), self._dtype(kind))[0]
        if kind == _BOOL:
            return bool(scalar)
        return float(scalar) if scalar.dtype.kind == "f" else int(scalar)

    def _array(self) -> Value:
        kind, count = struct.unpack_from("<IQ", self._map, self._at)
        self._at += 12
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        dtype = self._dtype(kind)
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)

    def _dtype(self, kind: int) -> np.dtype[np.generic]:
        try:
            return _SCALARS[kind]
        except KeyError:
            raise PenumbraError(f"{self.path}: metadata value of unknown type {kind}", _REPLACE) from None
