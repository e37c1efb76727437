"""The tokenizer: SentencePiece, rebuilt from a GGUF at build time, loaded from the image in flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import sentencepiece

from telemetry.errors import PenumbraError

if TYPE_CHECKING:
    from node.inference.gguf_source import GgufSource

_UNKNOWN_ID: Final = 3
_NO_ID: Final = -1
_UNKNOWN_TYPE: Final = 2
"""SentencePiece's type of the unknown piece; Gemma's GGUF files mark it as a control piece, which fails."""
USER_DEFINED_TYPE: Final = 4
"""SentencePiece's type of pieces that are cut out before all merging: runs of spaces or newlines, tags."""
SPACE: Final = "\u2581"
"""What stands for a space in a piece."""


def vocabulary(source: GgufSource) -> tuple[list[bytes], list[float], list[int]]:
    """Return pieces, scores and types of the vocabulary in a GGUF, each by id.

    Raises
    ------
    PenumbraError
        The vocabulary is not SentencePiece's, or its fields are missing or differ in length.
    """
    fields = source.file.metadata
    kind = fields.get("tokenizer.ggml.model")
    tokens, scores, types = (
        fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    if (
        kind != "llama"
        or not isinstance(tokens, list)
        or not isinstance(scores, np.ndarray)
        or not isinstance(types, np.ndarray)
        or not len(tokens) == len(scores) == len(types)
    ):
        raise PenumbraError(
            f"{source.path}: no SentencePiece vocabulary: tokenizer.ggml.model is {kind!r}, 'llama' is "
            "needed, with tokens, scores and token_type of one length",
            "give a GGUF converted by llama.cpp from a Gemma 3 model",
        )
    return tokens, scores.tolist(), types.tolist()


def sentencepiece_model(source: GgufSource) -> bytes:
    """Rebuild a SentencePiece model from the vocabulary in a GGUF.

    BPE with byte fallback; text is neither normalised nor prefixed nor are its spaces joined. GGUF piece
    types are those of SentencePiece.

    Parameters
    ----------
    source
        The model.

    Returns
    -------
    A serialised ``ModelProto``.

    Raises
    ------
    PenumbraError
        The vocabulary is not of that kind, or its fields are missing or differ in length.
    """
    from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415

    proto: Any = sentencepiece_model_pb2

    tokens, scores, types = vocabulary(source)
    model = proto.ModelProto()
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = proto.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id = _UNKNOWN_ID, source.bos, source.eos
    trainer.pad_id = _NO_ID
    # SentencePiece finds the control ids by the name of their piece, not by the ids above.
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = (
        tokens[number].decode("utf-8") for number in (_UNKNOWN_ID, source.bos, source.eos)
    )
    trainer.unk_surface = trainer.unk_piece
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    for number, (token, score, type_) in enumerate(zip(tokens, scores, types, strict=True)):
        kind = _UNKNOWN_TYPE if number == _UNKNOWN_ID else type_
        piece = token.decode("utf-8")
        # GGUF files keep the spaces of these pieces as spaces; SentencePiece looks for them in escaped text.
        if kind == USER_DEFINED_TYPE:
            piece = piece.replace(" ", SPACE)
        model.pieces.add(piece=piece, score=score, type=kind)
    serialised: bytes = model.SerializeToString()
    return serialised


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    path
        A serialised SentencePiece model.

    Raises
    ------
    PenumbraError
        The file is missing or is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except FileNotFoundError:
            raise PenumbraError(
                f"{path}: no such file", "build the image again: `penumbra model build`"
            ) from None
        except RuntimeError as error:
            raise PenumbraError(
                f"{path}: not a SentencePiece model: {error}",
                "build the image again: `penumbra model build --force`",
            ) from None
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.size: int = self._processor.vocab_size()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the token ids of a text, led by the begin-of-sequence id unless ``bos`` is false."""
        ids: list[int] = self._processor.encode(text)
        return [self.bos, *ids] if bos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control ids give no text.

        Raises
        ------
        IndexError
            An id is not in the vocabulary.
        """
        text: str = self._processor.decode([int(number) for number in ids])
        return text

    def token_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the UTF-8 bytes token ids add to a text; control ids add none.

        Unlike `decode` this needs no look at the neighbours: the bytes of two pieces of a text, joined, are
        those of the whole, also where a piece ends inside a character.

        Raises
        ------
        IndexError
            An id is not in the vocabulary.
        """
        return b"".join(self._piece_bytes(int(number)) for number in ids)

    def _piece_bytes(self, number: int) -> bytes:
        piece: str = self._processor.id_to_piece(number)
        if self._processor.is_control(number):
            return b""
        if self._processor.is_byte(number):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()
