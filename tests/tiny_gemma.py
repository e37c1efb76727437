"""A tiny model of the Gemma 3 architecture as a GGUF: seeded weights, a vocabulary of Gemma's kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 64, 2, 1, 32, 128
CONTEXT, WINDOW, GLOBAL_EVERY = 256, 16, 3
BOS, EOS, PAD, UNKNOWN = 2, 1, 0, 3
WORDS = ("the", "capital", "of", "is", "sun", "light", "orbit", "moon")
RUNS = (
    *(" " * length for length in range(2, 8)),
    *("\n" * length for length in (1, 2, 3)),
    "\t\t",
    "<td>",
    "</td>",
)
"""Pieces found before anything is merged, with spaces as GGUF files have them."""
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_Q8, _F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32
_Q5 = gguf.GGMLQuantizationType.Q5_0


@dataclass(frozen=True)
class Size:
    """Dimensions of a model, and whether its head has a table of its own."""

    layers: int = LAYERS
    width: int = WIDTH
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    ffn: int = FFN
    global_every: int = GLOBAL_EVERY
    context: int = CONTEXT
    untied: bool = False


def vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    """Pieces, scores, types: control pieces, bytes, characters, merges that lead to `WORDS`, and `RUNS`."""
    pieces: dict[str, int] = {"<pad>": _CONTROL, "<eos>": _CONTROL, "<bos>": _CONTROL, "<unk>": _CONTROL}
    pieces |= {f"<0x{value:02X}>": _BYTE for value in range(256)}
    merges = [word[:length] for word in WORDS for length in range(2, len(word) + 1)]
    merges += ["\u2581" + word for word in WORDS]
    characters = sorted({"\u2581", *"abcdefghijklmnopqrstuvwxyzT.,"})
    pieces |= dict.fromkeys([*merges, *characters], _NORMAL)
    pieces |= dict.fromkeys(RUNS, _USER_DEFINED)
    while len(pieces) % 32:
        pieces[f"<unused{len(pieces)}>"] = _CONTROL
    rank = {piece: number for number, piece in enumerate(merges)}
    scores = [-float(rank.get(piece, 500)) if kind == _NORMAL else -1000.0 for piece, kind in pieces.items()]
    return [piece.encode() for piece in pieces], scores, list(pieces.values())


def tensors(
    seed: int = 7, size: Size = Size()
) -> dict[str, tuple[NDArray[np.float32], gguf.GGMLQuantizationType]]:
    """Weights by name, with the type each is stored in."""
    random = np.random.default_rng(seed)
    vocab = len(vocabulary()[0])

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm(length: int) -> NDArray[np.float32]:
        return (1 + 0.2 * random.standard_normal(length)).astype(np.float32)

    found: dict[str, tuple[NDArray[np.float32], gguf.GGMLQuantizationType]] = {
        "token_embd.weight": (matrix(vocab, size.width), _Q8),
        "output_norm.weight": (norm(size.width), _F32),
    }
    for layer in range(size.layers):
        for name, rows, columns, kind in (
            ("attn_q", size.heads * size.head_dim, size.width, _Q5),
            ("attn_k", size.kv_heads * size.head_dim, size.width, _Q8),
            ("attn_v", size.kv_heads * size.head_dim, size.width, _Q8),
            ("attn_output", size.width, size.heads * size.head_dim, _F32),
            ("ffn_gate", size.ffn, size.width, _Q5),
            ("ffn_up", size.ffn, size.width, _Q8),
            ("ffn_down", size.width, size.ffn, _Q8),
        ):
            found[f"blk.{layer}.{name}.weight"] = (matrix(rows, columns), kind)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            found[f"blk.{layer}.{name}.weight"] = (norm(size.width), _F32)
        for name in ("attn_q_norm", "attn_k_norm"):
            found[f"blk.{layer}.{name}.weight"] = (norm(size.head_dim), _F32)
    if size.untied:
        found["output.weight"] = (matrix(vocab, size.width), _Q8)
    return found


def write_tiny_gguf(
    path: Path,
    *,
    seed: int = 7,
    architecture: str = "gemma3",
    without: frozenset[str] = frozenset(),
    size: Size = Size(),
) -> Path:
    """Write the model; ``without`` names tensors and metadata fields to leave out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny Gemma")
    for key, value in (
        ("context_length", size.context),
        ("embedding_length", size.width),
        ("block_count", size.layers),
        ("feed_forward_length", size.ffn),
        ("attention.head_count", size.heads),
        ("attention.head_count_kv", size.kv_heads),
        ("attention.key_length", size.head_dim),
        ("attention.value_length", size.head_dim),
        ("attention.sliding_window", WINDOW),
        ("attention.sliding_window_pattern", size.global_every),
    ):
        if key not in without:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e6)
    pieces, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNKNOWN)
    writer.add_pad_token_id(PAD)
    for name, (weights, kind) in tensors(seed, size).items():
        if name not in without:
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
