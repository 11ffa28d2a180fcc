"""What a generator gives, and the longest document that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.evaluation.documents import text_ids
from trt_razor.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Problem:
    """One sample before its length is known.

    Attributes:
        before: instruction in front of the document.
        document: size → its text; more size is more text, and the answer stays the same.
        question: what comes behind the document, after it was compressed.
        lead: how the answer is made to begin.
        references: right answers.
        max_new_tokens: room for the answer; it counts into the length.
        metric: ``string_match_all`` or ``string_match_part``.
        smallest, largest: sizes that make sense; largest None = any.
        meta: size → values for the sample's ``meta``.
    """

    before: str
    document: Callable[[int], str]
    question: str
    lead: str
    references: tuple[str, ...]
    max_new_tokens: int
    metric: str = "string_match_all"
    smallest: int = 1
    largest: int | None = None
    meta: Callable[[int], Mapping[str, Any]] = field(default=lambda size: {})


def largest_document(
    tokenizer: Tokenizer, problem: Problem, room: int
) -> tuple[int, tuple[int, ...]]:
    """(size, ids) of the largest document of at most ``room`` tokens.

    The number of tokens grows nearly evenly with the size, so a few guesses find it.

    Raises:
        UsageError: the smallest document is longer.
    """

    def made(size: int) -> tuple[int, ...]:
        return text_ids(tokenizer, problem.document(size))

    low, best = problem.smallest, made(problem.smallest)
    if len(best) > room:
        raise UsageError(
            f"expected room for at least {len(best)} tokens of text besides instruction, question "
            f"and answer, found {max(0, room)}"
        )
    top = problem.largest
    high, high_tokens = low, len(best)
    while high_tokens <= room:  # best is the document of size low
        if high == top:
            return high, best
        low, low_ids = high, best
        # Somewhat above the guess: the answer is then between two sizes that are near each other.
        guess = int(high * room / max(1, high_tokens) * 1.05) + 1
        high = max(high + 1, min(guess, 8 * high))
        high = high if top is None else min(high, top)
        ids = made(high)
        high_tokens = len(ids)
        best = ids if high_tokens <= room else low_ids
    while high - low > 1:
        guess = low + int((high - low) * (room - len(best)) / (high_tokens - len(best)))
        size = min(max(guess, low + 1), high - 1)
        ids = made(size)
        if len(ids) <= room:
            low, best = size, ids
        else:
            high, high_tokens = size, len(ids)
    return low, best
