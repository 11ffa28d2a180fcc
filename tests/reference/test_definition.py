"""The definition against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trt_razor.errors import UsageError
from trt_razor.policy import RazorPolicy
from trt_razor.reference import razor_attention_by_definition
from trt_razor.reference.clusters import nearest, seed, seed_indices


def fixed(sinks: int, window: int, comp_tokens: int) -> RazorPolicy:
    return RazorPolicy(sinks, window, None, comp_tokens)


def line(values: list[float]) -> torch.Tensor:
    """Keys on a line, [n, 1]."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_worked_example_of_docs_semantics() -> None:
    """docs/semantics.md, "Worked example": N0 = 1, S0 = 2, C = none, M = 1, D = 1, scale 1."""
    k = line([0.0, 1.0, 3.0, 0.0, 2.0])
    v = line([1.0, 2.0, 4.0, 8.0, 16.0])
    result = razor_attention_by_definition(
        torch.ones(1, 5, 1, dtype=torch.float64), k, v, [4, 1], fixed(1, 2, 1), scale=1.0
    )
    # After 4 tokens: D = 1, position 1 folded. The fifth token sees sink 0, window 2 and 3,
    # the compensation token (1, 2) with weight 1, and itself.
    logits = [1.0, 0.0, 3.0, 0.0, 2.0]
    values = [2.0, 1.0, 4.0, 8.0, 16.0]
    top = sum(math.exp(a) * b for a, b in zip(logits, values, strict=True))
    assert float(result.out[0, 4, 0]) == pytest.approx(top / sum(map(math.exp, logits)), rel=1e-14)
    assert result.clusters == [[1, 2]]
    assert result.comp.flatten().tolist() == [2.0, 3.0]
    assert result.log_weight == [math.log(2)]
    assert result.kept == [0, 3, 4]


def test_compensation_row_weighs_as_many_tokens_as_it_stands_for() -> None:
    k, v = line([0.0] * 8), line([float(i) for i in range(8)])
    q = torch.zeros(1, 8, 1, dtype=torch.float64)
    result = razor_attention_by_definition(q, k, v, [7, 1], fixed(1, 2, 1))
    # Equal logits: the mean of all 8 values, though 4 of them are one row of weight 4.
    assert float(result.out[0, 7, 0]) == pytest.approx(3.5, rel=1e-14)
    without = razor_attention_by_definition(q, k, v, [7, 1], fixed(1, 2, 0))
    assert float(without.out[0, 7, 0]) == pytest.approx((0 + 5 + 6 + 7) / 4, rel=1e-14)


def test_seed_indices_are_the_middles_in_whole_numbers() -> None:
    assert seed_indices(8, 2) == [2, 6]
    assert seed_indices(7, 3) == [1, 3, 5]
    assert seed_indices(3, 3) == [0, 1, 2]
    # (183.5 · 61817) / 255 is 44484.0 in float32, but its floor is one less.
    assert seed_indices(61817, 255)[183] == 44483


def test_lloyd_runs_four_rounds() -> None:
    keys = line([132.0, 361.0, 100.0, 9.0, 25.0, 1.0, 0.0, 0.0, 225.0, 42.0, 81.0, 90.0])
    centroids = keys[seed_indices(12, 2)]
    rounds = []
    for _ in range(5):
        owner = nearest(keys, centroids)
        centroids = torch.stack([keys[owner == m].mean(0) for m in range(2)])
        rounds.append(owner.tolist())
    assert rounds[2] != rounds[3] != rounds[4]  # a case in which the number of rounds shows
    assert seed(keys, 2).tolist() == rounds[3]
    # The definition has its own loop; one more token makes these twelve the first fold.
    k = torch.cat([keys, keys[:1]])
    q = torch.zeros(1, 13, 1, dtype=torch.float64)
    clusters = razor_attention_by_definition(q, k, k, [13], fixed(0, 1, 2)).clusters
    assert clusters == [[p for p in range(12) if rounds[3][p] == m] for m in range(2)]


def test_clusters_of_two_lumps_and_joining() -> None:
    k = line([0.0, 10.0, 11.0, 0.5, 10.5, 1.0, 9.0, 0.0, 0.0])
    q = torch.zeros(1, 9, 1, dtype=torch.float64)
    result = razor_attention_by_definition(q, k, k, [6, 1, 2], fixed(1, 2, 2))
    # 6 tokens: keys 10, 11, 0.5 seed (starts 10 and 0.5); then 10.5 joins; then 1.0 and 9.0.
    assert result.clusters == [[1, 2, 4, 6], [3, 5]]
    assert result.comp[:, 0, 0].tolist() == [40.5 / 4, 0.75]


def test_free_clusters_open_before_keys_join() -> None:
    k = line([5.0, 5.1, 5.2, 5.3, 5.4])
    q = torch.zeros(1, 5, 1, dtype=torch.float64)
    step = razor_attention_by_definition(q, k, k, [1] * 5, fixed(0, 1, 3))
    assert step.clusters == [[0], [1], [2, 3]]


def test_equal_keys_tie_to_the_lower_index_and_leave_clusters_unused() -> None:
    k = line([1.0] * 6)
    q = torch.zeros(1, 6, 1, dtype=torch.float64)
    result = razor_attention_by_definition(q, k, k, [6], fixed(0, 1, 3))
    assert result.clusters == [[0, 1, 2, 3, 4], [], []]
    assert result.log_weight == [math.log(5), -math.inf, -math.inf]
    assert nearest(k, k[:3]).tolist() == [0] * 6


def test_refuses() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(UsageError, match="sum to 4"):
        razor_attention_by_definition(x[None], x, x, [3], fixed(1, 2, 1))
    with pytest.raises(UsageError, match="with ALiBi, found 2"):
        razor_attention_by_definition(x[None], x, x, [4], fixed(1, 2, 2), slopes=[0.5])
