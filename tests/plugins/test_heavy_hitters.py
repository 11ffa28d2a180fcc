"""Rows behind the sinks that stay: attended like any other, in decode and in prefill, a number a head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from trt_razor.kernels import Caches, LayerConfig
from trt_razor.policy import RazorPolicy
from trt_razor.reference import CachedRows, FullHeadsCache, LocalHeadsCache, chunk_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from trt_razor.kernels import RazorKernels

H, N_MAX, HEADS, D = 19, 96, 4, 64
POLICY = RazorPolicy(sink_tokens=3, min_window=20, compression=None, comp_tokens=2)
LAYER = LayerConfig(8, HEADS, D, N_MAX, POLICY, (2,), position="none", scale=0.4, heavy_hitters=H)
LOCAL = LAYER.local_heads
# Asked for, per sequence and local head; what does not fit counts as the nearest that does.
ASKED = torch.tensor([[0, 19, 4], [1, 200, -3], [18, 0, 0]], dtype=torch.int32)
USED = ASKED.clamp(0, H)


def with_extra(rows: CachedRows, k: Tensor, v: Tensor) -> CachedRows:
    """The rows of one head, and those of its heavy hitters."""
    weight = torch.cat([rows.log_weight, torch.zeros(1, len(k))], dim=1)
    position = torch.cat([rows.position, torch.zeros(len(k), dtype=torch.float64)])
    return CachedRows(
        torch.cat([rows.k, k[None].float()], 1),
        torch.cat([rows.v, v[None].float()], 1),
        weight,
        position,
    )


@pytest.mark.parametrize("multiprocessors", [1, 13])
def test_they_are_seen(kernels_on: Callable[[int], RazorKernels], multiprocessors: int) -> None:
    kernels = kernels_on(multiprocessors)
    torch.manual_seed(multiprocessors)
    batch, group = len(ASKED), LAYER.group
    caches = Caches.empty(LAYER, batch, "cpu")
    assert caches.local is not None
    local_k, local_v = caches.local.k, caches.local.v
    local_k.fill_(torch.nan)
    local_v.fill_(torch.nan)
    front = slice(POLICY.sink_tokens, POLICY.sink_tokens + H)
    full = [FullHeadsCache(1, D, N_MAX) for _ in range(batch)]
    local = [[LocalHeadsCache(POLICY, 1, D, N_MAX) for _ in LOCAL] for _ in range(batch)]

    past = 0
    for step, length in enumerate([33, 1, 1, 12, 1]):
        if step == 1:  # now they are chosen; rows of others stay NaN
            for b in range(batch):
                for h, used in enumerate(USED[b].tolist()):
                    rows = slice(front.start, front.start + used)
                    local_k[b, h, rows] = torch.randn(used, D).half()
                    local_v[b, h, rows] = torch.randn(used, D).half()
            kept = local_k[:, :, front].clone(), local_v[:, :, front].clone()
        qkv = torch.randn(batch, length, LAYER.qkv_width).half()
        got = kernels.attention(
            LAYER,
            qkv,
            caches,
            past=torch.full((batch,), past, dtype=torch.int32),
            chunk=torch.full((batch,), length, dtype=torch.int32),
            num_heavy_hitters=ASKED if step else None,
        )
        q, k, v = (
            x.unflatten(2, (-1, D)).transpose(1, 2).float()
            for x in qkv.split([8 * D, HEADS * D, HEADS * D], dim=2)
        )
        for b in range(batch):
            for head in range(HEADS):
                one = slice(head, head + 1)
                queries = q[b, head * group : (head + 1) * group][None]
                if head == 2:
                    cache, rows = full[b], full[b].rows()
                else:
                    h = LOCAL.index(head)
                    cache, rows = local[b][h], local[b][h].rows()
                    if step:
                        used = int(USED[b, h])
                        extra = slice(front.start, front.start + used)
                        rows = with_extra(rows, local_k[b, h, extra], local_v[b, h, extra])
                want = chunk_attention(queries, rows, k[b, one], v[b, one], past, 0.4)[0]
                cache.update(k[b, one], v[b, one])
                mine = got[b].float().unflatten(1, (8, D)).transpose(0, 1)
                mine = mine[head * group : (head + 1) * group]
                error = float((mine - want).norm() / want.norm())
                assert error < 1e-3, (step, b, head, error)
        past += length
        if step:  # nobody else writes them
            for now, before in zip((local_k, local_v), kept, strict=True):
                assert torch.equal(now[:, :, front].view(torch.int16), before.view(torch.int16))
    assert POLICY.dropped(past) > 0
    counts = [[int(local[b][h].comp_count.sum()) for h in range(3)] for b in range(batch)]
    assert caches.comp is not None
    assert caches.comp.count.sum(-1).int().tolist() == counts


def test_they_need_room(kernels_on: Callable[[int], RazorKernels]) -> None:
    from trt_razor.errors import UsageError

    with pytest.raises(UsageError, match=r"local_ring_offset: expected at least .* \(3 \+ 19\)"):
        kernels_on(1).check_layer(replace(LAYER, local_ring_offset=21))
