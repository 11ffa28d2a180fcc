"""Intervals and tests against known values, and coverage on simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trt_razor.evaluation.statistics import (
    Z95,
    accuracy,
    difference_of,
    mcnemar,
    mean_of,
    ratio_of,
    wilson,
)


def test_wilson_by_hand() -> None:
    # z = 2, 8 of 10: (0.8 + 4/20) / 1.4 = 5/7, 2/1.4·√(0.016 + 0.01) = 0.230347
    low, high = wilson(0.8, 10, z=2)
    assert low == pytest.approx(5 / 7 - 2 / 1.4 * math.sqrt(0.026))
    assert high == pytest.approx(5 / 7 + 2 / 1.4 * math.sqrt(0.026))
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    for right, n, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        assert wilson(right / n, n) == pytest.approx(expected, abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(0.5, 0) == (0, 1)


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(5000, 5100) == pytest.approx(0.325, abs=0.005)  # normal: z = 99/√10100


def test_accuracy_of_independent_trials_is_wilson() -> None:
    found = accuracy([1, 1, 0, 1], ["a", "b", "c", "d"])
    assert (found.mean, found.n, found.clusters, found.interval) == (0.75, 4, 4, "wilson")
    assert (found.low, found.high) == wilson(0.75, 4)


def test_trials_of_one_context_count_for_fewer() -> None:
    # Ten contexts, each with four equal answers: as much as ten trials (but for C / (C - 1)).
    scores = [float(c < 7) for c in range(10) for _ in range(4)]
    contexts = [c for c in range(10) for _ in range(4)]
    found = accuracy(scores, contexts)
    assert (found.low, found.high) == pytest.approx(wilson(0.7, 9))
    # All right: nothing is known of how alike answers of a context are.
    assert accuracy([1.0] * 40, contexts).low == wilson(1.0, 10)[0]
    # Never more than the trials there are.
    even = [float(i % 4 < 2) for i in range(40)]
    assert (accuracy(even, contexts).low, accuracy(even, contexts).high) == wilson(0.5, 40)


def test_partial_scores_are_bootstrapped() -> None:
    found = accuracy([0.25, 0.5, 1.0, 0.75], list("abcd"))
    assert found.interval == "bootstrap"
    assert found.low is not None
    assert 0.25 <= found.low < 0.625 < (found.high or 0) <= 1.0


def test_mean_is_weighted_and_seeded() -> None:
    found = mean_of([1.0, 4.0], ["a", "b"], [3, 1])
    assert found.mean == 1.75
    assert (found.low, found.high) == (1.0, 4.0)
    assert mean_of([1.0, 4.0], ["a", "b"], [3, 1]) == found
    alone = mean_of([1.0, 4.0], ["a", "a"])
    assert (alone.mean, alone.low, alone.interval) == (2.5, None, "none")


@pytest.mark.parametrize("clustered", [False, True])
def test_bootstrap_covers_95_percent(clustered: bool) -> None:
    """300 simulated runs of 60 contexts: the interval holds the true mean in about 95 % of them."""
    rng = np.random.default_rng(3)
    per = 3 if clustered else 1
    held = 0
    for _ in range(300):
        shared = rng.standard_normal((60, 1)) if clustered else 0.0
        values = (shared + rng.standard_normal((60, per)) + 2).ravel()
        found = mean_of(list(values), [i // per for i in range(60 * per)])
        assert found.low is not None
        held += found.low <= 2 <= (found.high or 0)
    assert 0.91 <= held / 300 <= 0.98


def test_samples_taken_for_contexts_would_cover_too_rarely() -> None:
    rng = np.random.default_rng(4)
    values = np.repeat(rng.standard_normal(50), 4)
    right = mean_of(list(values), [i // 4 for i in range(200)])
    wrong = mean_of(list(values), list(range(200)))
    width = [(e.high or 0) - (e.low or 0) for e in (right, wrong)]
    assert width[0] / width[1] == pytest.approx(2, rel=0.15)  # √4


def test_accuracy_covers_95_percent() -> None:
    rng = np.random.default_rng(5)
    contexts = [i // 4 for i in range(160)]
    held = 0
    for _ in range(300):
        p = np.repeat(rng.beta(3, 1, 40), 4)  # contexts differ: mean 0.75
        found = accuracy(list((rng.random(160) < p).astype(float)), contexts)
        assert found.low is not None
        held += found.low <= 0.75 <= (found.high or 0)
    assert 0.91 <= held / 300 <= 0.98


def test_paired_differences() -> None:
    found = difference_of([1, 0, 1, 1], [1, 1, 1, 0], list("abcd"))
    assert (found.mean, found.interval) == (0.0, "bootstrap")
    # Pairs that move together: the difference is known better than either mean.
    rng = np.random.default_rng(0)
    base = rng.random(100)
    paired = difference_of(list(base + 0.1), list(base), list(range(100)))
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))


def test_no_difference_is_not_certainty() -> None:
    equal = difference_of([1.0] * 98, [1.0] * 98, list(range(98)))
    assert (equal.mean, equal.interval) == (0, "agresti-min")
    assert (equal.low, equal.high) == pytest.approx((-Z95 / 100, Z95 / 100))
    lost = difference_of([0.0] * 8, [1.0] * 8, list(range(8)))
    assert lost.mean == lost.low == -1
    assert lost.high == pytest.approx(-0.8 + Z95 * math.sqrt(2.6) / 10)


def test_ratio_of_sums_in_pairs() -> None:
    found = ratio_of([1.0, 3.0, 2.0], [2.0, 6.0, 4.0], list("abc"))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_of([1.0, 1.0], [0.0, 0.0], list("ab")) is None
    uneven = ratio_of([1.0, 0.0], [1.0, 3.0], list("ab"))
    assert uneven is not None
    assert (uneven.mean, uneven.low, uneven.high) == pytest.approx((0.25, 0.0, 1.0))
