"""Jobs a campaign runs while it injects, and what the model says to each when nothing is struck.

The same few jobs are run over and over: their texts are known to the token, so every token that is released
under fire is compared. Half of them are drawn by sampling (deterministic by its seed), which spreads them
over the vocabulary; some have a prompt long enough for the window of the KV cache to slide.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from hil.calibrate import PROMPTS
from hil.campaign.records import write_json
from hil.tether import die_with
from telemetry.errors import PenumbraError
from telemetry.sampling import Sampling

REFERENCE: Final = "reference.json"
_SAMPLED: Final = Sampling(temperature=0.9, top_k=40, top_p=0.95)
_STORY: Final = (
    "The lighthouse on the northern cape was built of grey stone in the spring of 1871. Its keeper wrote down"
    " the weather four times a day, the names of the ships that passed, and what the birds were doing. When"
    " the lamp failed in the great storm, he carried oil up the stairs by hand for eleven hours, and nobody"
    " at sea noticed that anything had been wrong. "
)


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job, and its reference."""

    name: str
    prompt: str
    max_tokens: int
    sampling: Sampling = Sampling()
    prompt_tokens: list[int] = []
    tokens: list[int] = []
    """What the model says when nothing is struck; at most `max_tokens`."""


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    image_id: str
    texts: list[Text]


def make_texts(positions: int, *, count: int = 12, long: int = 2, bytes_a_token: int = 4) -> list[Text]:
    """Return jobs that fit an arena.

    Parameters
    ----------
    positions
        Room of prompt and text together.
    count, long
        How many, and how many of them have a long prompt.
    bytes_a_token
        Bytes of a prompt that give a token, at least.
    """
    texts = []
    for number in range(count):
        is_long = number >= count - long
        tokens = positions // (8 if is_long else 3)
        room = (positions - tokens - 8) * bytes_a_token
        prompt = PROMPTS[number % len(PROMPTS)]
        if is_long:
            # A story of its own for each, lest they share a prefix.
            prompt = f"Story {number}. " + _STORY * (room // len(_STORY))
        sampling = msgspec.structs.replace(_SAMPLED, seed=number) if number % 2 else Sampling()
        texts.append(Text(name=f"text-{number}", prompt=prompt[:room], max_tokens=tokens, sampling=sampling))
    return texts


def with_references(
    texts: Sequence[Text], image_dir: Path, image_id: str, *, keep: Path, positions: int, threads: int
) -> list[Text]:
    """Return texts with their references, computed once and kept in a directory.

    They are computed in a process of their own: the bench maps no model while it injects.

    Parameters
    ----------
    texts
        As `make_texts` gives them.
    image_dir, image_id
        The image.
    keep
        Directory to keep them in.
    positions, threads
        As for `hil.reference.run_reference`.
    """
    path = keep / REFERENCE
    if path.exists():
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        bare = [msgspec.structs.replace(text, prompt_tokens=[], tokens=[]) for text in kept.texts]
        if kept.image_id == image_id and bare == list(texts):
            return kept.texts
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=die_with, initargs=(os.getpid(),)) as pool:
        found = pool.submit(_decode, list(texts), image_dir, positions, threads).result()
    short = [text.name for text in found if not text.tokens]
    if short:
        raise PenumbraError(
            f"the model says nothing to {', '.join(short)}: there is nothing to compare",
            "take other prompts in hil/campaign/texts.py",
        )
    keep.mkdir(parents=True, exist_ok=True)
    write_json(path, _Kept(image_id=image_id, texts=found))
    return found


def _decode(texts: list[Text], image_dir: Path, positions: int, threads: int) -> list[Text]:
    from hil.reference import ReferenceJob, run_reference  # noqa: PLC0415 - loads ONNX Runtime
    from node.inference.manifest import TOKENIZER  # noqa: PLC0415
    from node.inference.tokenizer import Tokenizer  # noqa: PLC0415

    jobs = [ReferenceJob(text.name, text.prompt, text.max_tokens, text.sampling) for text in texts]
    said = run_reference(image_dir, jobs, positions=positions, threads=threads)
    tokenizer = Tokenizer(image_dir / TOKENIZER)
    return [
        msgspec.structs.replace(text, prompt_tokens=tokenizer.encode(text.prompt), tokens=said[text.name])
        for text in texts
    ]
