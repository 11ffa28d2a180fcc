"""Probes: a context, and what follows: an answer found only far back in it, or the text going on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.heads.probe import make_probe
from trt_razor.models.spec import ModelSpec

CUE = 8
"""Tokens of a random probe that are repeated before the first one that must be predicted."""

ANSWER = 24
"""Tokens of a random probe that must be predicted."""


@dataclass(frozen=True)
class AnswerProbe:
    """``context`` is read, then ``chunk`` is fed; what counts is the loss on ``chunk[first:]``.

    Attributes:
        context: int64 [n].
        chunk: int64 [S]: a question and its answer, as the model would write it.
        first: index in ``chunk`` of the answer's first token, 1 .. S - 1.
        kind: probes of one kind count together, each kind as much as any other.
    """

    context: np.ndarray
    chunk: np.ndarray
    first: int
    kind: str = "answer"

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.chunk):
            raise UsageError(
                f"answer probe: first: expected 1..{len(self.chunk) - 1}, found {self.first}"
            )
        if not len(self.context):
            raise UsageError("answer probe: context: expected at least 1 token, found 0")

    @property
    def answer(self) -> np.ndarray:
        """int64 [A], the tokens whose loss counts."""
        return self.chunk[self.first :]


def random_probes(
    spec: ModelSpec, length: int, window: int, count: int, seed: int
) -> list[AnswerProbe]:
    """Random tokens, of which a piece is said again: needs no tokenizer and no language.

    A probe is one block of random tokens (BOS first, if the model has one), then ``CUE + ANSWER``
    tokens from somewhere in it, outside of the last ``window`` tokens.

    Args:
        length: tokens of a context.
        count: probes; the k-th is drawn with seed ``seed + k``.

    Raises:
        UsageError: a length that leaves nothing outside of the window, or see ``make_probe``.
    """
    piece = CUE + ANSWER
    bos = 0 if spec.bos_token_id is None else 1
    block = length - bos
    room = block - window - 2 * piece
    if room < 1:
        raise UsageError(
            f"effect length: expected at least {window + 2 * piece + bos + 1} tokens with a window "
            f"of {window}, found {length}"
        )
    probes = []
    for k in range(count):
        drawn = make_probe(spec, block, 2, seed + k)
        # A piece behind the sinks, another place in every probe.
        start = piece + int(np.random.PCG64(seed + k).random_raw(2)[1] % room)
        context = drawn.tokens[: drawn.offset + block]
        chunk = drawn.tokens[drawn.offset + start : drawn.offset + start + piece]
        probes.append(AnswerProbe(context, chunk, CUE))
    return probes
