"""How much attention each token of a context gets: what token-dropping methods rank by."""

from __future__ import annotations

import torch
from torch import Tensor

from trt_razor.evaluation.methods.interface import ReadLayer
from trt_razor.reference.attention import group_queries

QUERY_BLOCK = 256
"""Queries scored at once where torch has no fused kernel: no map of n × n is ever in memory."""


def window_attention(layer: ReadLayer, window: int, heads: list[int]) -> Tensor:
    """Attention of the last ``window`` queries to every token, summed over them and each group.

    Args:
        window: queries; no more than the layer has.
        heads: KV heads.

    Returns:
        float32 [H, n].
    """
    q, k = _grouped(layer, heads)
    q = q[:, :, -window:].float()
    kept, group, queries, dim = q.shape
    logits = (q.reshape(kept, group * queries, dim) @ k.float().mT).mul_(layer.scale)
    logits = logits.view(kept, group, queries, layer.n)
    # The last w columns are the window itself, seen causally.
    future = torch.ones(queries, queries, dtype=torch.bool, device=k.device).triu(1)
    logits[..., layer.n - queries :].masked_fill_(future, -torch.inf)
    return torch.softmax(logits, -1).sum((1, 2))


def accumulated_attention(layer: ReadLayer, heads: list[int]) -> Tensor:
    """Attention of all queries to every token: the column sums of the causal map.

    In the precision of the queries (bfloat16, if the context was read in it: 1 % of a sum).

    Args:
        layer: with all its queries.
        heads: KV heads.

    Returns:
        float32 [H, n], summed over the query heads of each KV head's group.
    """
    done: dict[int, Tensor] = layer.memo.setdefault("accumulated_attention", {})
    missing = [h for h in heads if h not in done]
    if missing:  # seconds for a long context: once, whatever the number of budgets
        q, k = _grouped(layer, missing)
        fused = q.device.type == "cpu" and q.dtype != torch.float64
        sums = (_column_sums_fused if fused else _column_sums)(q, k.to(q.dtype), layer.scale)
        done.update(zip(missing, sums, strict=True))
    return torch.stack([done[h] for h in heads])


def _column_sums(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [H, g, n, D], k [H, n, D], block by block."""
    heads, group, n, dim = q.shape
    out = torch.zeros(heads, n, device=q.device)
    for first in range(0, n, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, n)
        rows = q[:, :, first:last].reshape(heads, -1, dim)
        logits = (rows @ k[:, :last].mT).float().mul_(scale).view(heads, group, last - first, last)
        future = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
        logits[..., first:].masked_fill_(future, -torch.inf)
        out[:, :last] += torch.softmax(logits, -1).sum((1, 2))
    return out


def _column_sums_fused(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The same by torch's fused kernel, three times as fast.

    It gives the log-sum-exp l_i of query i's logits along. The column sum of key j,
    Σ_{i >= j} exp(s·q_i·k_j - l_i), is such a sum again, with keys in the place of queries:
    -l_i / s is one more element of q_i, which meets a 1 in k_j, and with the order of tokens turned
    round, i >= j is the causal mask.
    """
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads, group, n, dim = q.shape
    q = q.reshape(1, heads * group, n, dim)
    k = k.repeat_interleave(group, 0)[None]
    _, lse = fused(q, k, k, 0.0, True, scale=scale)
    rest = -lse.float() / scale
    wide_q, wide_k = (torch.zeros(*x.shape[:3], dim + 16, dtype=q.dtype) for x in (q, k))
    wide_q[..., :dim], wide_k[..., :dim] = q, k
    for i in range(3):  # a bfloat16 holds 8 bits of it, three of them 24
        wide_q[..., dim + i] = rest
        rest = rest - wide_q[..., dim + i].float()
    wide_k[..., dim : dim + 3] = 1
    wide_q, wide_k = wide_q.flip(2), wide_k.flip(2)
    _, sums = fused(wide_k, wide_q, wide_q, 0.0, True, scale=scale)
    return sums[0].flip(-1).float().exp().view(heads, group, n).sum(1)


def _grouped(layer: ReadLayer, heads: list[int]) -> tuple[Tensor, Tensor]:
    """Queries [H, g, w, D] and keys [H, n, D] of some KV heads."""
    return group_queries(layer.queries, len(layer.k))[heads], layer.k[heads]
