"""How the next token is chosen from logits: penalties and bans first, then greedy, or drawn by
temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
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
            else runs beside it, as far as the runtime rounds alike in batches of other shapes.
            None = a fresh one.
        stop: texts that end generation; they are not part of the output.
        stop_token_ids: ids that end generation, besides the model's own.
        stop_sequences: sequences of ids that end generation; they stay in ``Completion.tokens``.
        bad_words: sequences of ids that are never generated.
        min_tokens: no end before so many tokens, whatever would end it but ``max_new_tokens``.
        repetition_penalty: positive logits of tokens in the prompt or the answer are divided by it,
            negative ones multiplied (arXiv 1909.05858, section 4.1); 1 = none.
        presence_penalty: taken off the logits of tokens in the answer.
        frequency_penalty: taken off them as often as they are there.
        logit_bias: (id, number added to its logit, before the penalties) pairs.
        ignore_eos: go on after the model's end token (for measurements).
        logprobs: also give the log-probability of every token, by the model's own logits.

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
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

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
        for name in ("stop_sequences", "bad_words"):
            words = getattr(self, name)
            ok = all(isinstance(w, tuple) and w and all(map(_is_int, w)) for w in words)
            _check(name, words, ok, "sequences of ids that are not empty")
        low = self.min_tokens
        _check("min_tokens", low, _is_int(low) and 0 <= low <= n, f"0 .. max_new_tokens ({n})")
        r = self.repetition_penalty
        _check("repetition_penalty", r, _is_number(r) and 0 < r <= 100, "a number in (0, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            x = getattr(self, name)
            _check(name, x, _is_number(x) and abs(x) <= 100, "a number in -100 .. 100")
        pairs = self.logit_bias
        ok = all(len(x) == 2 and _is_int(x[0]) and _is_number(x[1]) for x in pairs)
        _check("logit_bias", pairs, ok, "(id, number) pairs")


def _is_int(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float, np.floating)) and not isinstance(x, bool) and math.isfinite(x)


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name}: expected {expected}, found {value!r:.60}")


class History:
    """What a sequence has said so far, as far as its parameters ask for it.

    Args:
        params: of the sequence.
        prompt: its ids [n]. vocab: size of the logits.
        end_ids: ids that end it, banned before ``min_tokens``.
    """

    def __init__(
        self, params: SamplingParams, prompt: np.ndarray, vocab: int, end_ids: Collection[int]
    ) -> None:
        self._params = params
        self._tokens: list[int] = []
        self._ends = np.array([i for i in end_ids if 0 <= i < vocab], np.int64)
        self._bad = [w for w in params.bad_words if all(0 <= i < vocab for i in w)]
        bias = [(i, x) for i, x in params.logit_bias if 0 <= i < vocab]
        self._bias_ids = np.array([i for i, _ in bias], np.int64)
        self._bias = np.array([x for _, x in bias], np.float64)
        self._said: np.ndarray | None = None
        self._count: np.ndarray | None = None
        if params.repetition_penalty != 1:
            self._said = np.zeros(vocab, bool)
            self._said[prompt] = True
        if params.presence_penalty or params.frequency_penalty:
            self._count = np.zeros(vocab, np.float64)

    def add(self, token: int) -> None:
        """A token that was chosen."""
        self._tokens.append(token)
        if self._said is not None:
            self._said[token] = True
        if self._count is not None:
            self._count[token] += 1

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Logits [vocab] with bias and penalties, bans at -inf: the same array if there is nothing
        to do."""
        p = self._params
        early = len(self._tokens) < p.min_tokens and self._ends.size > 0
        changed = self._said is not None or self._count is not None or self._bias.size > 0
        if not (changed or self._bad or early):
            return logits
        scores = logits.astype(np.float64)
        np.add.at(scores, self._bias_ids, self._bias)
        if self._said is not None:
            x, r = scores[self._said], p.repetition_penalty
            scores[self._said] = np.where(x > 0, x / r, x * r)
        if self._count is not None:
            scores -= p.presence_penalty * (self._count > 0) + p.frequency_penalty * self._count
        if early:
            scores[self._ends] = -np.inf
        for word in self._bad:
            if ends_with(self._tokens, word[:-1]):
                scores[word[-1]] = -np.inf
        return scores


def ends_with(tokens: Sequence[int], tail: Sequence[int]) -> bool:
    """Whether a sequence ends with another one."""
    return len(tail) <= len(tokens) and list(tokens[len(tokens) - len(tail) :]) == list(tail)


def log_prob(logits: np.ndarray, token: int) -> float:
    """Natural logarithm of a token's probability by logits [vocab]."""
    scores = logits.astype(np.float64)
    top = scores.max()
    return float(scores[token] - top - np.log(np.exp(scores - top).sum()))


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
        raise RazorError(
            "logits: not finite; the model's weights or its cache are damaged, or every token is banned"
        )
    if params.temperature == 0 or params.top_k == 1:
        return int(scores.argmax())
    keep = np.arange(len(scores))
    if 0 < params.top_k < len(scores):
        keep = _largest(scores, params.top_k)
    with np.errstate(over="ignore"):  # a tiny temperature: the others become impossible
        p = np.exp((scores[keep] - top) / params.temperature)
    if params.top_p < 1:
        inside = _largest(p, _nucleus(p, params.top_p))
        keep, p = keep[inside], p[inside]
    mass = np.cumsum(p)
    drawn = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return int(keep[min(drawn, len(keep) - 1)])


def _largest(x: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` largest numbers of x [n], rising; of equal ones the first."""
    if count >= len(x):
        return np.arange(len(x))
    limit = np.partition(x, -count)[-count]
    above, at = np.flatnonzero(x > limit), np.flatnonzero(x == limit)
    return np.sort(np.concatenate([above, at[: count - len(above)]]))


def _nucleus(p: np.ndarray, share: float) -> int:
    """How many of the largest p [n] it takes to reach a share of their sum."""
    target = share * p.sum()
    # Sorting a whole vocabulary costs milliseconds; the likeliest few are mostly enough.
    for count in (256, 4096, len(p)):
        likely = p if count >= len(p) else np.partition(p, -count)[-count:]
        mass = np.cumsum(np.sort(likely)[::-1])
        if mass[-1] >= target:
            break
    return min(int(np.searchsorted(mass, target)) + 1, len(mass))
