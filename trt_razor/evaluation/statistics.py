"""How sure a number is: intervals of 95 % and a paired test.

Samples that ask about the same context are not independent, so contexts are drawn again, not samples
(cluster bootstrap; Efron and Tibshirani 1993, ch. 8 and 13: percentile intervals). Everything is seeded:
equal records give equal reports.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS = 4000
Z95 = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""
_BLOCK = 1 << 22
"""Numbers of a block of draws in memory."""
_KEPT = 1000
"""Up to so many contexts the draws stay in memory (32 MB)."""


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) with its 95 % interval.

    Attributes:
        n: trials it is taken over. clusters: independent contexts they come from.
        interval: "wilson", "bootstrap", "agresti-min", or "none" (one context says nothing about its
            spread; low and high are None).
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    interval: str

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def wilson(share: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share of n independent trials (Wilson 1927, JASA 22).

    Unlike share ± z·σ it is right near 0 and 1, where tests of long contexts live.

    Args:
        n: may be a fraction: an effective number of trials.
    """
    if n <= 0:
        return 0.0, 1.0
    shrink = 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At its ends the formula is exact in real numbers, and a rounding away from 0 or 1 here.
    low = 0.0 if share <= 0 else max(0.0, middle - half)
    return low, 1.0 if share >= 1 else min(1.0, middle + half)


def accuracy(scores: Sequence[float], contexts: Sequence[Hashable]) -> Estimate:
    """Mean of scores; right-or-wrong scores get Wilson's interval, others the bootstrap's.

    Trials that share contexts count for fewer (Korn and Graubard 1998, Survey Methodology 24): n is
    divided by the design effect, the variance of the mean over contexts over that of independent
    trials, but not raised. All right or all wrong tells nothing of the effect; then contexts count.
    """
    values = np.asarray(scores, np.float64)
    sums, counts = _cluster_sums(contexts, values, np.ones(len(values)))
    clusters = len(counts)
    mean = float(values.mean())
    if not np.isin(values, (0.0, 1.0)).all():
        return mean_of(scores, contexts)
    n = float(len(values))
    if clusters < len(values):
        spread = mean * (1 - mean) / n
        if spread == 0 or clusters == 1:
            n = float(clusters)
        else:
            residual = sums - mean * counts
            variance = clusters / (clusters - 1) * float((residual**2).sum()) / n**2
            n = max(n / max(1.0, variance / spread), 1.0)
    low, high = wilson(mean, n)
    return Estimate(mean, low, high, len(values), clusters, "wilson")


def mean_of(
    values: Sequence[float],
    contexts: Sequence[Hashable],
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean Σwx / Σw with its bootstrap interval.

    Args:
        weights: e.g. tokens of each sample; None = equal.
    """
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    return _ratio(*_cluster_sums(contexts, w * x, w), len(x), seed)


def difference_of(
    mine: Sequence[float], other: Sequence[float], contexts: Sequence[Hashable]
) -> Estimate:
    """Mean of mine - other, paired, with its bootstrap interval.

    Where all contexts of right-or-wrong scores differ alike (mostly: not at all), the bootstrap would
    claim to be certain. There the interval is that of Agresti and Min (2005, Statistics in Medicine 24)
    with as many pairs as contexts: half a pair more for each of a pair's four outcomes.
    """
    a, b = np.asarray(mine, np.float64), np.asarray(other, np.float64)
    found = mean_of(list(a - b), contexts)
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    if found.clusters < 2 or found.low != found.high or not binary:
        return found
    n = found.clusters
    won, lost = (n * float(x.mean()) + 0.5 for x in (a > b, a < b))
    middle = (won - lost) / (n + 2)
    half = Z95 * math.sqrt((won + lost) - (won - lost) ** 2 / (n + 2)) / (n + 2)
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Estimate(
        found.mean, min(low, found.mean), max(high, found.mean), found.n, n, "agresti-min"
    )


def ratio_of(
    over: Sequence[float], under: Sequence[float], contexts: Sequence[Hashable], seed: int = 0
) -> Estimate | None:
    """Σ over / Σ under of paired values (KL of two methods on the same tokens), bootstrapped in pairs.

    None if the lower sum is zero. Draws in which it is zero are left out.
    """
    a, b = np.asarray(over, np.float64), np.asarray(under, np.float64)
    if float(b.sum()) <= 0:
        return None
    return _ratio(*_cluster_sums(contexts, a, b), len(a), seed)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: would lost and won be so unlike if both were equally likely?

    Args:
        lost, won: trials only the one, and only the other, got right. Trials are taken as independent.
    """
    n, least = lost + won, min(lost, won)
    term = total = 1  # binomial coefficients as whole numbers: exact for any n
    for k in range(least):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


# Bootstrap ----------------------------------------------------------------------------------------
def _cluster_sums(
    contexts: Sequence[Hashable], over: Floats, under: Floats
) -> tuple[Floats, Floats]:
    """[C] sums of both for each context, in order of first appearance."""
    index: dict[Hashable, int] = {}
    which = np.array([index.setdefault(c, len(index)) for c in contexts], np.int64)
    if len(which) != len(over) or len(which) == 0:
        raise ValueError(f"{len(which)} contexts for {len(over)} values")
    return (
        np.bincount(which, over, len(index)).astype(np.float64),
        np.bincount(which, under, len(index)).astype(np.float64),
    )


def _ratio(over: Floats, under: Floats, n: int, seed: int) -> Estimate:
    clusters = len(over)
    mean = float(over.sum() / under.sum())
    if clusters == 1:
        return Estimate(mean, None, None, n, 1, "none")
    drawn = _draws(over, under, seed)
    low, high = (float(v) for v in np.quantile(drawn, (0.025, 0.975)))
    return Estimate(mean, low, high, n, clusters, "bootstrap")


def _draws(over: Floats, under: Floats, seed: int) -> Floats:
    """Ratios of sums over contexts drawn with replacement, DRAWS times."""
    clusters = len(over)
    if clusters <= _KEPT:
        blocks: Iterator[Floats] = iter([_times(clusters, seed)])
    else:
        rng = np.random.default_rng(seed)
        step = max(1, _BLOCK // clusters)
        blocks = (_multinomial(rng, clusters, min(step, DRAWS - i)) for i in range(0, DRAWS, step))
    parts = []
    for times in blocks:
        a, b = times @ over, times @ under
        parts.append(a[b > 0] / b[b > 0])
    return np.concatenate(parts)


@lru_cache(maxsize=8)
def _times(clusters: int, seed: int) -> Floats:
    """[DRAWS, C] how often each context is drawn; a report needs the same ones again and again."""
    return _multinomial(np.random.default_rng(seed), clusters, DRAWS)


def _multinomial(rng: np.random.Generator, clusters: int, size: int) -> Floats:
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), size).astype(np.float64)
