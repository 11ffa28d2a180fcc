"""Needles in a haystack: single 1 – 3, multikey 1 – 3, multivalue, multiquery (section 3.1)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_razor.evaluation.ruler.problem import Problem
from trt_razor.evaluation.ruler.words import new_number, new_uuid, new_word

NOISE = (
    "The lake is calm.",
    "The wind is low.",
    "The path is long.",
    "Out we go.",
    "Then home again.",
)
"""What repeated noise consists of."""

_MAKE: dict[str, Callable[[random.Random], str]] = {
    "word": new_word,
    "number": new_number,
    "uuid": new_uuid,
}
_SAID = {"number": "number", "uuid": "code"}


@dataclass(frozen=True)
class NeedleKind:
    """One of the tasks.

    Attributes:
        haystack: "noise" (the same sentences again and again), "text", or "needles" (sentences like
            the one that is asked for, with other keys).
        key, value: "word", "number" or "uuid".
        keys, values, queries: needles with different keys, values of each key, keys asked for.
    """

    haystack: str
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS: dict[str, NeedleKind] = {
    "niah_single_1": NeedleKind("noise"),
    "niah_single_2": NeedleKind("text"),
    "niah_single_3": NeedleKind("text", value="uuid"),
    "niah_multikey_1": NeedleKind("text", keys=4),
    "niah_multikey_2": NeedleKind("needles"),
    "niah_multikey_3": NeedleKind("needles", key="uuid", value="uuid"),
    "niah_multivalue": NeedleKind("text", values=4),
    "niah_multiquery": NeedleKind("text", keys=4, queries=4),
}


def needle_problem(kind: NeedleKind, rng: random.Random, sentences: Sequence[str]) -> Problem:
    """A problem of one kind.

    Args:
        sentences: the text of "text" haystacks; it starts at a random one and begins again at its end.
    """
    taken: set[str] = set()
    keys = [_other(_MAKE[kind.key], rng, taken) for _ in range(kind.keys)]
    values = [[_other(_MAKE[kind.value], rng, taken) for _ in range(kind.values)] for _ in keys]
    noun = _SAID[kind.value]
    needles = [_sentence(noun, k, v) for k, vs in zip(keys, values, strict=True) for v in vs]
    rng.shuffle(needles)
    asked = rng.sample(range(len(keys)), kind.queries)
    wanted = tuple(v for i in asked for v in values[i])
    depths = sorted(rng.random() for _ in needles)
    filler = _filler(kind, rng, sentences, taken)

    def document(size: int) -> str:
        return " ".join(_hidden(filler(size), needles, depths))

    def meta(size: int) -> Mapping[str, Any]:
        return {"depth": depths[0] if len(depths) == 1 else list(depths)}

    names, several = _listed([keys[i] for i in asked]), len(wanted) > 1
    hidden = f"Secret {noun}s are" if several else f"A secret {noun} is"
    them, what = ("them", f"{noun}s") if several else ("it", noun)
    are = "are" if several else "is"
    return Problem(
        f"{hidden} hidden in the following text. Keep {them} in mind: you will be asked for {them} "
        f"afterwards.\n\n",
        document,
        f"\n\nWhich secret {what} for {names} {are} given in the text?",
        f" In the text the secret {what} for {names} {are}",
        wanted,
        max_new_tokens=128,
        meta=meta,
    )


def _filler(
    kind: NeedleKind, rng: random.Random, sentences: Sequence[str], taken: set[str]
) -> Callable[[int], list[str]]:
    """size → so many sentences of haystack, those of a smaller size first."""
    if kind.haystack == "noise":
        return lambda size: [NOISE[i % len(NOISE)] for i in range(size)]
    if kind.haystack == "text":
        start = rng.randrange(len(sentences))
        return lambda size: [sentences[(start + i) % len(sentences)] for i in range(size)]
    made: list[str] = []

    def others(size: int) -> list[str]:
        while len(made) < size:
            key = _other(_MAKE[kind.key], rng, taken)
            made.append(_sentence(_SAID[kind.value], key, _MAKE[kind.value](rng)))
        return made[:size]

    return others


def _hidden(hay: list[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Needles put between the sentences of ``hay``; 0 is before the first, 1 behind the last."""
    out = list(hay)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        out.insert(round(depth * len(hay)), needle)
    return out


def _sentence(noun: str, key: str, value: str) -> str:
    return f"The secret {noun} for {key} is {value}."


def _other(make: Callable[[random.Random], str], rng: random.Random, taken: set[str]) -> str:
    while (made := make(rng)) in taken:
        pass
    taken.add(made)
    return made


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
