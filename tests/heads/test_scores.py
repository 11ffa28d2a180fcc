from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trt_razor.heads.scores import causal_attention, group_max, head_scores


def plain_map(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """The whole causal attention map [Hq, n, n], the slow and obvious way."""
    n = q.shape[1]
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = (q @ k.transpose(1, 2)) * scale
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf).softmax(-1)


def plain_scores(
    weights: torch.Tensor, length: int, repeats: int, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both scores read off an attention map, row by row and repeat by repeat."""
    heads, n, _ = weights.shape
    echo, induction = torch.zeros(heads), torch.zeros(heads)
    for row in range(offset + length, n):
        for earlier in range((row - offset) % length + offset, row, length):
            echo += weights[:, row, earlier]
            induction += weights[:, row, earlier + 1]
    rows = n - offset - length
    return echo / rows, induction / rows


def random_qkv(heads: int, kv: int, n: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(h, n, dim, generator=g) for h in (heads, kv, kv))


@pytest.mark.parametrize("heads, kv", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("slab", [1, 3000, 1 << 20])
def test_against_the_whole_map(heads: int, kv: int, offset: int, slab: int) -> None:
    length, repeats, dim = 13, 4, 8
    q, k, v = random_qkv(heads, kv, offset + length * repeats, dim)
    scale = dim**-0.5
    weights = plain_map(q, k, scale)
    out, lse = causal_attention(q, k, v, scale, slab_bytes=slab)
    torch.testing.assert_close(
        out, weights @ v.repeat_interleave(heads // kv, 0), atol=1e-5, rtol=1e-5
    )
    echo, induction = head_scores(q, k, lse, scale, length, repeats, offset)
    want_echo, want_induction = plain_scores(weights, length, repeats, offset)
    torch.testing.assert_close(echo, want_echo, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(induction, want_induction, atol=1e-6, rtol=1e-5)


def test_half_precision_inputs_are_scored_in_float32() -> None:
    q, k, v = (t.half() for t in random_qkv(2, 1, 33, 8))
    out, lse = causal_attention(q, k, v, 0.3)
    assert out.dtype == lse.dtype == torch.float32
    want = plain_map(q.float(), k.float(), 0.3) @ v.float()
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_float64_stays_float64() -> None:
    q, k, v = (t.double() for t in random_qkv(2, 2, 33, 8))
    out, _ = causal_attention(q, k, v, 0.3)
    torch.testing.assert_close(out, plain_map(q, k, 0.3) @ v, atol=1e-13, rtol=1e-12)


def test_sharp_rows_leave_no_denormals() -> None:
    """Logits hundreds apart, as trained heads have: exact, and no slow numbers on the way."""
    q, k, v = random_qkv(2, 1, 64, 8)
    smallest = SmallestPositive()
    with smallest:
        out, lse = causal_attention(30 * q, k, v, 1.0)
    torch.testing.assert_close(out, plain_map(30 * q, k, 1.0) @ v, atol=1e-5, rtol=1e-5)
    assert smallest.value >= torch.finfo(torch.float32).tiny
    assert lse.isfinite().all()


def names_and_repeats(length: int, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot token names and one-hot repeat numbers of a probe, each [n, …]."""
    names = torch.nn.functional.one_hot(torch.arange(length).repeat(repeats), length)
    turns = torch.nn.functional.one_hot(torch.arange(repeats).repeat_interleave(length), repeats)
    return names.float(), turns.float()


def hand_made_scores(q: torch.Tensor, k: torch.Tensor) -> tuple[float, float]:
    q, k = q[None], k[None]
    _, lse = causal_attention(q, k, k, 1.0)
    echo, induction = head_scores(q, k, lse, 1.0, length=6, repeats=3, offset=0)
    return echo.item(), induction.item()


def test_a_hand_made_echo_head_scores_one() -> None:
    """The query asks for its own token's name, but not in its own repeat."""
    names, turns = names_and_repeats(6, 3)
    echo, induction = hand_made_scores(
        torch.cat([60 * names, -60 * turns], 1), torch.cat([names, turns], 1)
    )
    assert echo == pytest.approx(1.0, abs=1e-6)
    assert induction == pytest.approx(0.0, abs=1e-6)


def test_a_hand_made_induction_head_scores_one() -> None:
    """Every key carries the name of the token before it; the query asks for its own token's name."""
    names, _ = names_and_repeats(6, 3)
    before = torch.cat([torch.zeros(1, 6), names[:-1]])
    echo, induction = hand_made_scores(60 * names, before)
    assert induction == pytest.approx(1.0, abs=1e-6)
    assert echo == pytest.approx(0.0, abs=1e-6)


def test_group_max() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.0, 0.0, 0.5]])
    assert torch.equal(group_max(scores, 2), torch.tensor([[0.4, 0.3], [0.9, 0.5]]))
    assert torch.equal(group_max(scores, 4), scores)


class SmallestPositive(TorchDispatchMode):
    """Records the smallest positive result of any exponential."""

    value = math.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.__name__.startswith("exp_") and (result > 0).any():
            self.value = min(self.value, result[result > 0].min().item())
        return result


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return result


def largest_tensor(length: int) -> int:
    repeats, dim = 4, 4
    q, k, v = random_qkv(4, 2, length * repeats, dim)
    with LargestTensor() as mode:
        _, lse = causal_attention(q, k, v, 0.5, slab_bytes=1 << 19)
        head_scores(q, k, lse, 0.5, length, repeats, 0)
    return mode.largest


def test_memory_is_linear_in_the_probe_length() -> None:
    short, long = largest_tensor(200), largest_tensor(800)
    assert short < 150_000  # a map would be 4 * 800 * 800
    assert long <= 4 * short


def test_the_default_slab_bounds_the_temporary() -> None:
    n = 4096
    q, k, v = random_qkv(2, 2, n, 4)
    with LargestTensor() as mode:
        causal_attention(q, k, v, 0.5)
    assert mode.largest <= (8 << 20) // 4  # elements of float32; a map has 2 * 4096 * 4096
