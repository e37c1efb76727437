"""Lay the tensors of an optimised model out on pages of their own.

ONNX Runtime writes packed weights back to back, several tensors to a page. A page is what is hashed,
repaired and struck, so each must belong to one tensor: this rewrites the data file with every tensor at a
page boundary, and the references in the graph with it. Two kinds go into the file, in this order:

- what a session should map: packed weights, and tensors used as they are (norms, rotary tables, embedding
  rows);
- originals: unpacked weights that ONNX Runtime reads while loading, to recognise the packed ones as theirs
  by hash. It then drops them. An original that is changed makes it pack anew, into private memory, from the
  changed one.

Integer constants (shapes, an axis, an index: at most 32 bytes each) stay in the graph: shapes must be known
before external data are.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import onnx
from onnx import TensorProto

from fdir.pages import PAGE_SIZE, MappedTensor
from node.inference.manifest import PACKED

_PACKED_KEY: Final = "prepacked_"
_PACKING_OPERATOR: Final = "MatMulNBits"
_LAYER_NAME: Final = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER_ROLES: Final = frozenset(
    {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
)
_HEAD_TABLES: Final = frozenset({"output", "token_embd"})


class _Piece(NamedTuple):
    name: str
    content: memoryview | bytes
    place: Callable[[int], None]
    """Called with the piece's offset in the new file."""
    packed: bool
    original: bool


def lay_out(
    optimised: Path,
    image_graph: Path,
    image_weights: Path,
    progress: Callable[[float], object] = lambda _: None,
) -> list[MappedTensor]:
    """Rewrite an optimised model as the graph and the weights file of an image.

    Parameters
    ----------
    optimised
        The model ONNX Runtime wrote, ``*.onnx``; its data lie beside it in ``*.bin``.
    image_graph, image_weights
        Files to write; the second's name is what the graph refers to.
    progress
        Called with the part done, 0 to 1.

    Returns
    -------
    All tensors in file order; ``read`` is false for the originals.

    Raises
    ------
    OSError
        A file cannot be read or written.
    """
    model = onnx.load(str(optimised), load_external_data=False)
    with optimised.with_suffix(".bin").open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    as_is = {name for node in model.graph.node if node.op_type != _PACKING_OPERATOR for name in node.input}
    pieces = [piece for tensor in model.graph.initializer for piece in _pieces(tensor, data, as_is)]
    pieces.sort(key=lambda piece: piece.original)
    placed: list[MappedTensor] = []
    with image_weights.open("wb") as out:
        for number, piece in enumerate(pieces):
            offset = out.tell()
            piece.place(offset)
            out.write(piece.content)
            out.write(bytes(-len(piece.content) % PAGE_SIZE))
            placed.append(_placed(piece, offset))
            progress((number + 1) / len(pieces))
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            _entry(tensor, "location").value = image_weights.name
    onnx.save(model, str(image_graph))
    return placed


def role_of(name: str, packed: bool) -> tuple[str, int | None]:
    """Return the role and the layer of a tensor.

    Parameters
    ----------
    name
        Its name in the graph.
    packed
        Whether this is the packed form of a matrix.
    """
    layer: int | None = None
    stem, _, kind = name.rpartition(".")
    if match := _LAYER_NAME.fullmatch(stem):
        layer, stem = int(match[1]), match[2]
    if stem.startswith("rope"):
        return "rope", layer
    if stem.endswith("norm"):
        return "norm", layer
    if stem in _HEAD_TABLES and packed:
        return "head", layer
    if stem == "token_embd":
        return "embed", layer
    if kind == "scale":
        return "scale", layer
    return (stem if stem in _LAYER_ROLES else "other"), layer


def _placed(piece: _Piece, offset: int) -> MappedTensor:
    role, layer = role_of(piece.name, piece.packed)
    length = len(piece.content)
    return MappedTensor(
        name=piece.name + PACKED if piece.packed else piece.name,
        role=role,
        layer=layer,
        offset=offset,
        length=length,
        first_page=offset // PAGE_SIZE,
        page_count=-(-length // PAGE_SIZE),
        sparse=role == "embed" and piece.name.endswith((".weight", ".scale")),
        read=not piece.original,
    )


def _entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    """Return the entry of that key, a new one if there is none."""
    entries: list[onnx.StringStringEntryProto] = [e for e in tensor.external_data if e.key == key]
    return entries[0] if entries else _new_entry(tensor, key)


def _new_entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    entry: onnx.StringStringEntryProto = tensor.external_data.add(key=key)
    return entry


def _pieces(tensor: TensorProto, data: memoryview, as_is: set[str]) -> list[_Piece]:
    """Return the parts of a tensor, each with the means to point the graph at its new place."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return [_inline_piece(tensor)] if tensor.data_type == TensorProto.FLOAT else []
    offset, length = (int(_entry(tensor, key).value) for key in ("offset", "length"))
    packed = [
        piece
        for entry in tensor.external_data
        if entry.key.startswith(_PACKED_KEY)
        for piece in _packed_pieces(tensor.name, entry, data)
    ]
    original = bool(packed) and tensor.name not in as_is
    whole = _Piece(tensor.name, data[offset : offset + length], _placer(tensor), False, original)
    return [*packed, whole]


def _inline_piece(tensor: TensorProto) -> _Piece:
    content = onnx.numpy_helper.to_array(tensor).tobytes()
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    _entry(tensor, "location")
    _entry(tensor, "length").value = str(len(content))
    return _Piece(tensor.name, content, _placer(tensor), False, False)


def _placer(tensor: TensorProto) -> Callable[[int], None]:
    def place(offset: int) -> None:
        _entry(tensor, "offset").value = str(offset)

    return place


def _packed_pieces(name: str, entry: onnx.StringStringEntryProto, data: memoryview) -> list[_Piece]:
    """Read ``<key>|<offset>;<length>;<checksum>[|...]``: one group for each buffer a kernel packed into.

    Source: onnxruntime 1.32, ``core/framework/tensor_external_data_info.cc``.
    """
    fields = [field.split(";") for field in entry.value.split("|")]

    def placer(field: list[str]) -> Callable[[int], None]:
        def place(offset: int) -> None:
            field[0] = str(offset)
            entry.value = "|".join(";".join(parts) for parts in fields)

        return place

    return [
        _Piece(name, data[int(field[0]) : int(field[0]) + int(field[1])], placer(field), True, False)
        for field in fields[1:]
        if int(field[1]) > 0
    ]
