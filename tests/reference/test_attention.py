"""The primitive: log-weights stand for repeated rows; masks, blocks and rotation."""

from __future__ import annotations

import math

import pytest
import torch

from trt_razor.reference.attention import (
    CachedRows,
    chunk_attention,
    compute_dtype,
    group_queries,
    rotate,
    weighted_attention,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_weight_equals_repeating_the_row() -> None:
    q, k, v = rand(1, 2, 3, 8), rand(1, 4, 8, seed=1), rand(1, 4, 8, seed=2)
    times = torch.tensor([1, 5, 2, 3])
    repeated = weighted_attention(
        q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), torch.zeros(()), 0.3
    )
    weighted = weighted_attention(q, k, v, times.double().log(), 0.3)
    torch.testing.assert_close(weighted, repeated, rtol=0, atol=1e-14)


def test_hidden_rows_do_not_count() -> None:
    q, k, v = rand(2, 1, 3, 8), rand(2, 4, 8, seed=1), rand(2, 4, 8, seed=2)
    bias = torch.tensor([0.0, -math.inf, 0.0, -math.inf]).double()
    torch.testing.assert_close(
        weighted_attention(q, k, v, bias, 0.5),
        weighted_attention(q, k[:, ::2], v[:, ::2], torch.zeros(()), 0.5),
        rtol=0,
        atol=1e-15,
    )


def test_weights_far_beyond_float32_exp_stay_finite() -> None:
    q, k = torch.full((1, 1, 1, 4), 60.0), torch.full((1, 3, 4), 60.0)
    out = weighted_attention(q, k, torch.ones(1, 3, 4), torch.tensor([0.0, 12.0, 0.0]), 1.0)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_chunk_attention_does_not_depend_on_the_block_and_is_causal() -> None:
    heads, group, new, past, dim = 2, 3, 13, 5, 8
    q, k, v = (
        rand(heads, group, new, dim),
        rand(heads, new, dim, seed=1),
        rand(heads, new, dim, seed=2),
    )
    rows = CachedRows(
        rand(heads, past, dim, seed=3),
        rand(heads, past, dim, seed=4),
        rand(heads, past, seed=5),
        torch.arange(past).double(),
    )
    slopes = rand(heads, group, seed=6).abs()
    whole = chunk_attention(q, rows, k, v, past, 0.3, slopes, query_block=128)
    for block in (1, 4, 13):
        part = chunk_attention(q, rows, k, v, past, 0.3, slopes, query_block=block)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-14)
    k2, v2 = k.clone(), v.clone()
    k2[:, 7:] += 1.0
    v2[:, 7:] -= 1.0
    changed = chunk_attention(q, rows, k2, v2, past, 0.3, slopes)
    assert torch.equal(changed[:, :, :7], whole[:, :, :7])
    assert (changed[:, :, 7:] - whole[:, :, 7:]).abs().min() > 1e-6


def test_group_queries_keeps_neighbours_together() -> None:
    q = torch.arange(6.0).view(6, 1, 1)
    assert group_queries(q, 2).flatten(1).tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_rotate_is_a_rotation_by_the_position_difference() -> None:
    angle = torch.arange(10).double()[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
    table = torch.cat([angle.cos(), angle.sin()], -1)
    q, k = rand(4).expand(10, 4), rand(4, seed=1).expand(10, 4)
    dots = rotate(q, table) @ rotate(k, table).T
    torch.testing.assert_close(dots[9, 6], dots[5, 2], rtol=0, atol=1e-14)
    assert abs(float(dots[9, 6] - dots[9, 5])) > 1e-3
    # Element i turns with element i + D/2: (1, 0) in the first pair becomes (cos, sin).
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]).double(), table[3])
    expected = torch.tensor([math.cos(3.0), 0.0, math.sin(3.0), 0.0], dtype=torch.float64)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "dtypes, expected",
    [
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32,), torch.float32),
        ((torch.float16, torch.float64), torch.float64),
    ],
)
def test_compute_dtype(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert compute_dtype(*dtypes) == expected
