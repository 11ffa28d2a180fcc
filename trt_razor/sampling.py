"""How the next token is chosen from logits: greedy, or drawn by temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from trt_razor.errors import RazorError, UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to generate (>= 1).
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: keep the smallest set of tokens whose probability reaches p (0 < p <= 1).
        seed: of this request's own random numbers; the same seed gives the same tokens whatever
            else runs beside it. None = a fresh one.
        stop: texts that end generation; they are not part of the output.
        stop_token_ids: ids that end generation, besides the model's own.
        ignore_eos: go on after the model's end token (for measurements).

    Raises:
        UsageError: naming the wrong field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        n, k, seed = self.max_new_tokens, self.top_k, self.seed
        _check("max_new_tokens", n, _is_int(n) and n >= 1, "an integer >= 1")
        t, p = self.temperature, self.top_p
        _check("temperature", t, _is_number(t) and 0 <= t <= 1e4, "a number in 0 .. 10000")
        _check("top_k", k, _is_int(k) and k >= 0, "an integer >= 0 (0 = all)")
        _check("top_p", p, _is_number(p) and 0 < p <= 1, "a number in (0, 1]")
        ok = seed is None or (_is_int(seed) and 0 <= seed < 2**64)
        _check("seed", seed, ok, "an integer in 0 .. 2^64 − 1")
        ok = not isinstance(self.stop, str) and all(isinstance(x, str) and x for x in self.stop)
        _check("stop", self.stop, ok, "texts that are not empty")
        _check("stop_token_ids", self.stop_token_ids, all(map(_is_int, self.stop_token_ids)), "ids")


def _is_int(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float, np.floating)) and not isinstance(x, bool) and math.isfinite(x)


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name}: expected {expected}, found {value!r:.60}")


def sample(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token from logits [vocab].

    Order as in common engines: temperature, top-k, top-p on what is left, then a draw. A logit of
    -inf is a token that never comes. Of equally likely tokens the one with the lower id is kept.

    Raises:
        RazorError: a logit is NaN or +inf, or none is finite (a poisoned model or cache).
    """
    scores = logits.astype(np.float64)
    top = float(scores.max())  # NaN if any is
    if not math.isfinite(top):
        raise RazorError("logits: not finite; the model's weights or its cache are damaged")
    if params.temperature == 0 or params.top_k == 1:
        return int(scores.argmax())
    keep = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        limit = np.partition(scores, -params.top_k)[-params.top_k]
        above, at = np.flatnonzero(scores > limit), np.flatnonzero(scores == limit)
        keep = np.sort(np.concatenate([above, at[: params.top_k - len(above)]]))
    with np.errstate(over="ignore"):  # a tiny temperature: the others become impossible
        p = np.exp((scores[keep] - top) / params.temperature)
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        mass = np.cumsum(p[order])
        count = int(np.searchsorted(mass, params.top_p * mass[-1])) + 1
        keep, p = keep[order[:count]], p[order[:count]]
    mass = np.cumsum(p)
    drawn = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(keep[min(drawn, len(keep) - 1)])
