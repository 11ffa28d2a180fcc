"""Variable tracking: a value goes from variable to variable (section 3.2)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from trt_razor.evaluation.ruler.needles import NOISE
from trt_razor.evaluation.ruler.problem import Problem
from trt_razor.evaluation.ruler.words import new_variable

HOPS = 4
_BEFORE = "Variables are assigned in the following text, some of them to others. Keep track of the values."


def tracking_problem(rng: random.Random) -> Problem:
    """One chain of four hops, five variables, in repeated noise; a short solved example before it."""
    shown_names, shown_value = _chain(rng, 3)
    names, value = _chain(rng, 5)
    depths = sorted(rng.random() for _ in names)
    shown = _text(10, shown_names, shown_value, sorted(rng.random() for _ in shown_names))
    example = (
        f"{_BEFORE}\n\n{shown}\n\n{_question(shown_value)}{_lead(shown_value)} "
        f"{' '.join(shown_names)}\n\n"
    )
    return Problem(
        f"{example}{_BEFORE}\n\n",
        lambda size: _text(size, names, value, depths),
        f"\n\n{_question(value)}",
        _lead(value),
        tuple(names),
        max_new_tokens=30,
        smallest=HOPS + 1,
        meta=lambda size: {"depth": list(depths)},
    )


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str]:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names[new_variable(rng, letters)] = None
    return list(names), str(rng.randrange(10000, 100000))


def _text(size: int, names: Sequence[str], value: str, depths: Sequence[float]) -> str:
    """Lines of noise with the assignments between them, in the order of the chain."""
    lines = [" ".join(NOISE)] * size
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    for step, depth in reversed(list(zip(steps, depths, strict=True))):
        lines.insert(round(depth * size), step)
    return "\n".join(lines)


def _question(value: str) -> str:
    return f"Question: Which variables have the value {value} in the text above? List all of them."


def _lead(value: str) -> str:
    return f" Answer: {HOPS + 1} variables have the value {value} in the text above:"
