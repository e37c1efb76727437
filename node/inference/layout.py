"""Lay the tensors of optimised models out on pages of their own, in one file.

ONNX Runtime writes packed weights back to back, several tensors to a page. A page is what is hashed,
repaired and struck, so each must belong to one tensor: this rewrites the data files of several graphs as one
with every tensor at a page boundary, and the references in the graphs with it. A tensor that two graphs have
under one name is stored once. Three kinds go into the file, in this order:

- what a session should map: packed weights, and tensors used as they are (norms, rotary tables, embedding
  rows);
- what no graph uses, and the loader maps itself;
- originals that cannot be rebuilt from the packed bytes (`node.inference.packing`): ONNX Runtime reads them
  while loading, packs them, compares, and drops them.

Of a matrix that can be rebuilt only the packed bytes stay. The loader hands ONNX Runtime the original in
memory; it then reads nothing of that tensor from the file, not even where its packed bytes are. But it looks
packed bytes up by their hash, whichever tensor they came with: they are attached to another tensor of the
graph, the anchor.

Integer constants (shapes, an axis, an index: at most 32 bytes each) stay in the graphs: shapes must be known
before external data are.
"""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from fdir.pages import PAGE_SIZE, MappedTensor
from node.inference.manifest import EMBEDDING, PACKED, TABLE, GemmaShape
from node.inference.packing import STRIPS, PackedMatrix, can_hold, unpack
from telemetry.errors import PenumbraError

_PACKED_KEY: Final = "prepacked_"
_ANCHORED_KEY: Final = "prepacked_of_others_"
_PACKING_OPERATOR: Final = "MatMulNBits"
_LAYER_NAME: Final = re.compile(r"blk\.(\d+)\.(.+)")
_LAYER_ROLES: Final = frozenset({"attn_qkv", "attn_output", "ffn_gate_up", "ffn_down"})
_TABLE_ROLES: Final = {EMBEDDING: "embed", TABLE: "table"}
_OTHER_ROLES: Final = (
    (re.compile(r"\bcheck\."), "check"),
    (re.compile(r"^screen\."), "head"),
    (re.compile(r"^rope\."), "rope"),
    (re.compile(r"norm\.$"), "norm"),
)


@dataclass
class _Piece:
    name: str
    content: memoryview | bytes
    places: list[Callable[[int], None]]
    """Each is called with the piece's offset in the new file."""
    mapped_by: str
    packed: bool = False
    original: bool = False


def lay_out(
    optimised: Mapping[str, Path],
    own: Mapping[str, NDArray[np.generic]],
    weights: Path,
    shape: GemmaShape,
    progress: Callable[[float], object] = lambda _: None,
) -> tuple[list[MappedTensor], dict[str, tuple[PackedMatrix, ...]]]:
    """Rewrite optimised models as the graphs and the weights file of an image.

    Parameters
    ----------
    optimised
        By file name of the graph in the image, the model ONNX Runtime wrote, ``*.onnx``; its data lie beside
        it in ``*.bin``.
    own
        Tensors no graph has, by name.
    weights
        The file to write; the graphs are written beside it and refer to its name.
    shape
        Dimensions of the model: they say how many rows a table has.
    progress
        Called with the part done, 0 to 1.

    Returns
    -------
    All tensors in file order, ``read`` false for the originals; and by graph, the matrices whose originals
    are not in the file.

    Raises
    ------
    OSError
        A file cannot be read or written.
    PenumbraError
        Two graphs have different tensors of one name.
    """
    models = {name: onnx.load(str(path), load_external_data=False) for name, path in optimised.items()}
    pieces: dict[tuple[str, bool], _Piece] = {}
    rebuilt: dict[str, tuple[PackedMatrix, ...]] = {}
    for graph, model in models.items():
        with optimised[graph].with_suffix(".bin").open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        rebuilt[graph] = _take_out_originals(model, data)
        for piece in _graph_pieces(model, data, graph, rebuilt[graph]):
            _join(pieces, piece)
    for name, array in own.items():
        _join(pieces, _Piece(name, np.ascontiguousarray(array).tobytes(), [], ""))
    placed: list[MappedTensor] = []
    ordered = sorted(pieces.values(), key=lambda piece: (piece.original, not piece.mapped_by))
    with weights.open("wb") as out:
        for number, piece in enumerate(ordered):
            offset = out.tell()
            for place in piece.places:
                place(offset)
            out.write(piece.content)
            out.write(bytes(-len(piece.content) % PAGE_SIZE))
            placed.append(_placed(piece, offset, shape))
            progress((number + 1) / len(ordered))
    for graph, model in models.items():
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                _entry(tensor, "location").value = weights.name
        onnx.save(model, str(weights.with_name(graph)))
    return placed, rebuilt


def _graph_pieces(
    model: onnx.ModelProto, data: memoryview, graph: str, rebuilt: Sequence[PackedMatrix]
) -> list[_Piece]:
    gone = {name for matrix in rebuilt for name in (matrix.weight, matrix.scale)}
    as_is = {name for node in model.graph.node if node.op_type != _PACKING_OPERATOR for name in node.input}
    entries = {
        entry.key: entry
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key.startswith(_ANCHORED_KEY)
    }
    anchored = {matrix.weight: entries[f"{_ANCHORED_KEY}{number}"] for number, matrix in enumerate(rebuilt)}
    found: list[_Piece] = []
    for tensor in model.graph.initializer:
        if tensor.name in anchored:
            found += _packed_pieces(tensor.name, anchored[tensor.name], data, graph)
        elif tensor.name not in gone:
            found += _pieces(tensor, data, as_is, graph)
    return found


def _take_out_originals(model: onnx.ModelProto, data: memoryview) -> tuple[PackedMatrix, ...]:
    """Take originals that can be rebuilt out of a graph, and attach their packed bytes to its anchor.

    The tensors stay, as what is to be given at loading; their place in the file is one that is never read.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    users = Counter(name for node in model.graph.node for name in set(node.input))
    taken: list[PackedMatrix] = []
    entries: list[str] = []
    for node in model.graph.node:
        if node.op_type != _PACKING_OPERATOR:
            continue
        weight, scale = tensors[node.input[1]], tensors[node.input[2]]
        packed = [entry for entry in weight.external_data if entry.key.startswith(_PACKED_KEY)]
        alone = users[weight.name] == users[scale.name] == 1
        if not alone or len(packed) != 1:
            continue
        # Which layout it is depends on the CPU: the one that gives the original back.
        for matrix in (_matrix(node, strip) for strip in STRIPS):
            if _comes_back(matrix, weight, scale, packed[0], data):
                taken.append(matrix)
                entries.append(packed[0].value)
                break
    gone = {name for matrix in taken for name in (matrix.weight, matrix.scale)}
    anchor = _anchor(model, gone)
    if anchor is None:
        return ()
    for name in gone:
        _detach(tensors[name])
    for number, value in enumerate(entries):
        anchor.external_data.add(key=f"{_ANCHORED_KEY}{number}", value=value)
    return tuple(taken)


def _matrix(node: onnx.NodeProto, strip: int) -> PackedMatrix:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return PackedMatrix(
        weight=node.input[1],
        scale=node.input[2],
        rows=attributes["N"],
        columns=attributes["K"],
        bits=attributes["bits"],
        block=attributes["block_size"],
        strip=strip,
    )


def _comes_back(
    matrix: PackedMatrix,
    weight: TensorProto,
    scale: TensorProto,
    packed: onnx.StringStringEntryProto,
    data: memoryview,
) -> bool:
    """Try whether the original can be rebuilt from the packed bytes."""
    buffers = packed.value.split("|")[1:]
    offset, length = (int(field) for field in buffers[0].split(";")[:2])
    if len(buffers) != 1 or not can_hold(matrix, length):
        return False
    content = np.frombuffer(data[offset : offset + length], np.uint8)
    original = unpack(content, matrix, np.empty(matrix.original_bytes, np.uint8))
    return bool(
        _content(weight, data) == original.codes.tobytes()
        and _content(scale, data) == original.scales.tobytes()
    )


def _content(tensor: TensorProto, data: memoryview) -> bytes:
    if tensor.data_location != TensorProto.EXTERNAL:
        return bytes(onnx.numpy_helper.to_array(tensor).tobytes())
    offset, length = (int(_entry(tensor, key).value) for key in ("offset", "length"))
    return bytes(data[offset : offset + length])


def _anchor(model: onnx.ModelProto, gone: set[str]) -> TensorProto | None:
    """Return the tensor packed bytes are attached to: the first that is read from the file as it is."""
    return next(
        (
            tensor
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
            and tensor.name not in gone
            and not any(entry.key.startswith(_PACKED_KEY) for entry in tensor.external_data)
        ),
        None,
    )


def _detach(tensor: TensorProto) -> None:
    """Let a tensor have no content of its own."""
    length = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
    for field in ("raw_data", "float_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", ""), ("offset", "0"), ("length", str(length))):
        _entry(tensor, key).value = value


def _join(pieces: dict[tuple[str, bool], _Piece], piece: _Piece) -> None:
    known = pieces.setdefault((piece.name, piece.packed), piece)
    if known is piece:
        return
    if known.content != piece.content or known.original != piece.original:
        raise PenumbraError(
            f"tensor {piece.name} is another in {piece.mapped_by} than in {known.mapped_by}",
            "this is a fault of the builder: report it",
        )
    known.places += piece.places


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
    if stem in _TABLE_ROLES:
        return _TABLE_ROLES[stem], layer
    if kind == "scale" and not packed:
        return "scale", layer
    if stem in _LAYER_ROLES:
        return stem, layer
    return next((role for pattern, role in _OTHER_ROLES if pattern.search(f"{stem}.")), "other"), layer


def _row_count(role: str, name: str, shape: GemmaShape) -> int:
    """Return the rows of a tensor of which a step reads some only; 0 for one it reads whole."""
    if role == "rope":
        return shape.context
    return shape.vocab if role in {"embed", "table"} and name.endswith((".weight", ".scale")) else 0


def _placed(piece: _Piece, offset: int, shape: GemmaShape) -> MappedTensor:
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
        rows=_row_count(role, piece.name, shape),
        read=not piece.original,
        mapped_by=piece.mapped_by,
    )


def _entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    """Return the entry of that key, a new one if there is none."""
    entries: list[onnx.StringStringEntryProto] = [e for e in tensor.external_data if e.key == key]
    return entries[0] if entries else _new_entry(tensor, key)


def _new_entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    entry: onnx.StringStringEntryProto = tensor.external_data.add(key=key)
    return entry


def _pieces(tensor: TensorProto, data: memoryview, as_is: set[str], graph: str) -> list[_Piece]:
    """Return the parts of a tensor, each with the means to point the graph at its new place."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return [_inline_piece(tensor, graph)] if tensor.data_type == TensorProto.FLOAT else []
    offset, length = (int(_entry(tensor, key).value) for key in ("offset", "length"))
    packed = [
        piece
        for entry in tensor.external_data
        if entry.key.startswith(_PACKED_KEY) and not entry.key.startswith(_ANCHORED_KEY)
        for piece in _packed_pieces(tensor.name, entry, data, graph)
    ]
    original = bool(packed) and tensor.name not in as_is
    content = data[offset : offset + length]
    whole = _Piece(tensor.name, content, [_placer(tensor)], graph, original=original)
    return [*packed, whole]


def _inline_piece(tensor: TensorProto, graph: str) -> _Piece:
    content = onnx.numpy_helper.to_array(tensor).tobytes()
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    _entry(tensor, "location")
    _entry(tensor, "length").value = str(len(content))
    return _Piece(tensor.name, content, [_placer(tensor)], graph)


def _placer(tensor: TensorProto) -> Callable[[int], None]:
    def place(offset: int) -> None:
        _entry(tensor, "offset").value = str(offset)

    return place


def _packed_pieces(
    name: str, entry: onnx.StringStringEntryProto, data: memoryview, graph: str
) -> list[_Piece]:
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
        _Piece(name, data[int(field[0]) : int(field[0]) + int(field[1])], [placer(field)], graph, packed=True)
        for field in fields[1:]
        if int(field[1]) > 0
    ]
