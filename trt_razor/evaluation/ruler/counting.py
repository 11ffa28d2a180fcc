"""Words that occur more often than others: common words, frequent coded words (section 3.3)."""

from __future__ import annotations

import math
import random
import string

from trt_razor.evaluation.ruler.problem import Problem
from trt_razor.evaluation.ruler.words import PAIRS, WORDS, new_letters, pair

COMMON = 10
SHORT = 4096
"""Below this length lists have fewer repetitions, as in the published generator."""
ALPHA = 2.0
DOTS = "..."

_LIST = "A numbered list of words follows. Some words stand in it more often than others; remember them."
_TOP = f"Question: Which {COMMON} words are the most frequent ones in the list above?"
_TOP_LEAD = f" Answer: The {COMMON} words that stand most often in the list are:"
_CODED = (
    "A text of coded words follows. Keep count of how often each of them occurs and find the three "
    "most frequent ones."
)


def common_problem(rng: random.Random, length: int) -> Problem:
    """Ten words occur 30 times each, the others 3 times (6 and 1 below 4096 tokens).

    A short solved example stands before it. Size is the number of other words.
    """
    short = length < SHORT
    often, seldom = (6, 1) if short else (30, 3)
    shown_often, shown_seldom, shown_words = (3, 1, 10) if short else (10, 3, 30)
    seed = rng.getrandbits(64)
    words = rng.sample(WORDS, COMMON + shown_words)
    shown_common, shown_others = words[:COMMON], words[COMMON:]
    shown = _numbered(shown_common * shown_often + shown_others * shown_seldom, seed)
    answer = " ".join(f"{i}. {w}" for i, w in enumerate(shown_common, 1))
    left = [w for w in WORDS if w not in words]
    # An entry has 4 tokens or more. Where the words might not be enough, all are pairs of words: a
    # common word must not be known by its form.
    if length // (4 * seldom) > len(left) - COMMON:
        pool = [pair(i) for i in rng.sample(range(PAIRS), PAIRS)]
    else:
        pool = rng.sample(left, len(left))
    common = pool[:COMMON]

    def document(size: int) -> str:
        return _numbered(common * often + pool[COMMON : COMMON + size] * seldom, seed)

    return Problem(
        f"{_LIST}\n{shown}\n{_TOP}{_TOP_LEAD} {answer}\n\n{_LIST}\n",
        document,
        f"\n{_TOP}",
        _TOP_LEAD,
        tuple(common),
        max_new_tokens=120,
        largest=len(pool) - COMMON,
    )


def frequent_problem(rng: random.Random, length: int) -> Problem:
    """Coded words; the one of rank k occurs in a share k^-2 / zeta(2), rank 1 is dots.

    Asked for are ranks 2 to 4. Size is the number of words before shares are rounded down.
    """
    count = max(length // 50, 8)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < count:
        vocabulary[new_letters(rng, string.ascii_lowercase, 6)] = None
    words = [DOTS, *list(vocabulary)[1:]]
    seed = rng.getrandbits(64)
    zeta = math.pi**2 / 6  # zeta(ALPHA)

    def counts(size: int) -> list[int]:
        return [int(size * rank**-ALPHA / zeta) for rank in range(1, count + 1)]

    def document(size: int) -> str:
        out = [w for w, n in zip(words, counts(size), strict=True) for _ in range(n)]
        random.Random(seed).shuffle(out)
        return " ".join(out)

    # Ranks 4 and 5 must differ, or there is no right answer.
    smallest = next(s for s in range(1, 1000) if all(_apart(counts(t)) for t in range(s, s + 200)))
    return Problem(
        f"{_CODED}\n\n",
        document,
        "\n\nQuestion: Which three words are the most frequent ones in the coded text above? Do not "
        "count the dots, and explain nothing.",
        " Answer: The three most frequent words in the coded text above are:",
        tuple(words[1:4]),
        max_new_tokens=50,
        smallest=smallest,
    )


def _apart(counts: list[int]) -> bool:
    return counts[3] > counts[4]


def _numbered(words: list[str], seed: int) -> str:
    order = list(words)
    random.Random(seed).shuffle(order)
    return " ".join(f"{i}. {word}" for i, word in enumerate(order, 1))
