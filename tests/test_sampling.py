"""How tokens are chosen: penalties and bans, then temperature, top-k and top-p."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from fake_session import INF, NAN

from trt_razor import sampling
from trt_razor.errors import RazorError, UsageError
from trt_razor.sampling import History, SamplingParams, ends_with, log_prob, sample


@pytest.mark.parametrize(
    "field, values",
    [
        ("max_new_tokens", [0, -1, 1.5, True]),
        ("temperature", [NAN, INF, -0.1, 1e9, "1"]),
        ("top_k", [-1, 2.0]),
        ("top_p", [0, -0.5, 1.01, NAN]),
        ("seed", [-1, 2**64, 0.5]),
        ("stop", ["text", ("",), (3,)]),
        ("stop_token_ids", [("x",)]),
        ("stop_sequences", [((),), ([1],), ("ab",), ((1, "x"),)]),
        ("bad_words", [((),), ((1.5,),)]),
        ("min_tokens", [-1, 1.0, 129]),
        ("repetition_penalty", [0, -1.0, NAN, INF, 101, "1"]),
        ("presence_penalty", [NAN, -INF, 101.0]),
        ("frequency_penalty", [NAN, INF, -101.0, None]),
        ("logit_bias", [((1,),), ((1, NAN),), (("a", 1.0),)]),
    ],
)
def test_sampling_params_name_the_wrong_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{field}: expected"):
            SamplingParams(**{field: value})


# Sampling -------------------------------------------------------------------------------------
def plain_distribution(logits: np.ndarray, t: float, k: int, p: float) -> np.ndarray:
    """Probabilities [vocab] of temperature, top-k, top-p in this order, the slow way."""
    weights = {i: np.exp((float(x) - float(logits.max())) / t) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: (-logits[i], i))[: k or None]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= p:
            break
    out = np.zeros(len(logits))
    out[kept] = [weights[i] for i in kept]
    return out / out.sum()


class Uniform:
    """Stands for a random generator: the midpoints of n equal parts of 0..1."""

    def __init__(self, n: int) -> None:
        self.values: Iterator[float] = iter([(i + 0.5) / n for i in range(n)])

    def random(self) -> float:
        return next(self.values)


@pytest.mark.parametrize("t, k, p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 4, 1.0), (1.0, 0, 0.6), (1.5, 6, 0.7), (1.0, 3, 0.2),
    (1.0, 99, 0.999), (1e-300, 0, 1.0), (1e4, 0, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_are_the_definition(t: float, k: int, p: float, seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    logits[[2, 5, 9]] = logits[4]  # ties
    logits[7] = -np.inf
    n = 2000
    rng: Any = Uniform(n)
    params = SamplingParams(temperature=t, top_k=k, top_p=p)
    drawn = np.bincount([sample(logits, params, rng) for _ in range(n)], minlength=12)
    expected = plain_distribution(logits, t, k, p)
    assert np.abs(drawn / n - expected).max() <= 1.5 / n
    assert (drawn[expected == 0] == 0).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    rng, n = np.random.default_rng(4), 4000
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.9)
    drawn = np.bincount([sample(logits, params, rng) for _ in range(n)], minlength=8)
    p = plain_distribution(logits, 0.8, 6, 0.9)
    sigma = np.sqrt(n * p * (1 - p))
    assert (np.abs(drawn - n * p) <= 4 * sigma).all()


def test_what_cannot_come_does_not_come_for_the_smallest_draw() -> None:
    class Zero:
        def random(self) -> float:
            return 0.0

    rng: Any = Zero()
    assert sample(np.float32([-INF, 1, 1]), SamplingParams(temperature=1.0), rng) == 1


def test_greedy_is_the_first_largest() -> None:
    rng = np.random.default_rng(0)
    logits = np.array([1, 5, 5, -INF], np.float32)
    assert sample(logits, SamplingParams(), rng) == 1
    assert sample(logits, SamplingParams(temperature=2.0, top_k=1), rng) == 1


@pytest.mark.parametrize("logits", [[NAN, 1], [1, NAN], [INF, 1], [-INF, -INF], [NAN, NAN]])
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_logits_without_a_meaning(logits: list[float], k: int, t: float) -> None:
    with pytest.raises(RazorError, match="not finite") as e:
        sample(np.float32(logits), SamplingParams(temperature=t, top_k=k), np.random.default_rng(0))
    assert e.value.exit_code == 1


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999, 0.9999999])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_of_a_large_vocabulary_is_that_of_a_full_sort(p: float, scale: float) -> None:
    logits = (scale * np.random.default_rng(2).standard_normal(5000)).astype(np.float32)
    logits[100:600] = logits.max()  # ties across the place where sorting may stop
    logits[4000:] = -np.inf
    expected = np.flatnonzero(plain_distribution(logits, 1.0, 0, p))
    weights = np.exp(logits.astype(float) - float(logits.max()))
    kept = sampling._largest(weights, sampling._nucleus(weights, p))
    np.testing.assert_array_equal(kept, expected)
    rng: Any = Uniform(200)
    params = SamplingParams(temperature=1.0, top_p=p)
    assert {sample(logits, params, rng) for _ in range(200)} <= set(expected.tolist())


# Penalties and bans ---------------------------------------------------------------------------
V = 10


def plain_adjust(
    logits: list[float], prompt: list[int], said: list[int], p: SamplingParams, ends: list[int]
) -> list[float]:
    """The definition, token by token."""
    out = []
    for token, x in enumerate(logits):
        x += sum(b for i, b in p.logit_bias if i == token)
        if token in prompt or token in said:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        if token in said:
            x -= p.presence_penalty + p.frequency_penalty * said.count(token)
        if token in ends and len(said) < p.min_tokens:
            x = -INF
        for word in p.bad_words:
            if word[-1] == token and [*said, token][-len(word) :] == list(word):
                x = -INF
        out.append(x)
    return out


ID = st.integers(0, V - 1)
WORDS = st.lists(st.lists(st.integers(0, V), min_size=1, max_size=3).map(tuple), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-9, 9, width=32), min_size=V, max_size=V),
    st.lists(ID, min_size=1, max_size=5),
    st.lists(ID, max_size=6),
    st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
        presence_penalty=st.sampled_from([0.0, 0.7, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.4, -0.2]),
        min_tokens=st.integers(0, 5),
        bad_words=WORDS.map(tuple),
        logit_bias=st.lists(st.tuples(st.integers(0, V), st.floats(-5, 5)), max_size=3).map(tuple),
    ),
    st.lists(st.integers(0, V + 2), max_size=2),
)
def test_adjusted_logits_are_the_definition(
    logits: list[float], prompt: list[int], said: list[int], params: SamplingParams, ends: list[int]
) -> None:
    history = History(params, np.array(prompt, np.int32), V, ends)
    for token in said:
        history.add(token)
    given = np.array(logits, np.float32)
    kept = given.copy()
    expected = plain_adjust([float(x) for x in given], prompt, said, params, ends)
    np.testing.assert_allclose(history.adjust(given), expected, atol=1e-9)
    np.testing.assert_array_equal(given, kept)


def test_nothing_to_do_costs_nothing() -> None:
    logits = np.zeros(V, np.float32)
    assert History(SamplingParams(), np.array([1]), V, [2]).adjust(logits) is logits


def test_nan_is_found_behind_penalties() -> None:
    history = History(SamplingParams(repetition_penalty=2.0), np.array([1]), V, [])
    logits = np.zeros(V, np.float32)
    logits[3] = NAN
    with pytest.raises(RazorError, match="not finite"):
        sample(history.adjust(logits), SamplingParams(), np.random.default_rng(0))


def test_a_ban_of_everything_is_told() -> None:
    params = SamplingParams(bad_words=tuple((i,) for i in range(V)))
    scores = History(params, np.array([1]), V, []).adjust(np.zeros(V, np.float32))
    with pytest.raises(RazorError, match="every token is banned"):
        sample(scores, params, np.random.default_rng(0))


def test_log_prob_and_ends_with() -> None:
    logits = np.array([1000.0, 999.0, -INF], np.float32)
    assert log_prob(logits, 0) == pytest.approx(-np.log1p(np.exp(-1)))
    assert log_prob(logits, 2) == -INF
    assert ends_with([1, 2, 3], [2, 3])
    assert ends_with([1], [])
    assert not ends_with([1], [1, 1])
    assert not ends_with([1, 2], [1])
