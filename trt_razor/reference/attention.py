"""Attention with weighted rows, in plain PyTorch.

Everything a Razor head computes is one softmax over rows (k, v, log-weight): a stored token has
log-weight 0, a compensation token that stands for N tokens has ln N, a row that must not be seen
has -inf. See docs/semantics.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 128
"""Queries scored at once: the map in memory is [Hq, QUERY_BLOCK, n], linear in n."""


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Precision of softmax and means: float64 if any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """RoPE by half rotation: element i turns with element i + D/2.

    Args:
        x: [..., S, D].
        cos_sin: [S, D], rows of ``positions.rope_table`` for the S positions.
    """
    cos, sin = cos_sin.chunk(2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """[Hq, S, D] → [Hkv, g, S, D]: query heads h·g .. h·g + g-1 share KV head h."""
    return q.unflatten(0, (num_kv_heads, -1))


def weighted_attention(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, scale: float) -> Tensor:
    """Softmax attention over rows with log-weights, the one primitive of this package.

        out = Σ_j w_j·exp(s·q·k_j)·v_j / Σ_j w_j·exp(s·q·k_j),   w_j = exp(log_weight_j)

    (paper, equation 5, with one weight per row). The log-weight is added after scaling.

    Args:
        q: [H, g, S, D] queries of H KV heads.
        k, v: [H, T, D] rows.
        log_weight: broadcastable to [H, g, S, T]; -inf hides a row. Every query must see at
            least one row.
        scale: s, usually 1/√D.

    Returns:
        [H, g, S, D] in the dtype of the inputs, which should be float32 or float64.
    """
    heads, group, queries, dim = q.shape
    logits = q.reshape(heads, group * queries, dim) @ k.transpose(-1, -2)
    # In place: at long contexts fresh memory for each step costs more than the arithmetic.
    logits = logits.view(heads, group, queries, k.shape[1]).mul_(scale).add_(log_weight)
    probs = torch.softmax(logits, dim=-1)
    out = probs.reshape(heads, group * queries, k.shape[1]) @ v
    return out.view(heads, group, queries, dim)


@dataclass(frozen=True)
class CachedRows:
    """What H KV heads remember of a sequence: P rows a head.

    Attributes:
        k, v: [H, P, D] in float32 or float64.
        log_weight: [H, P] same dtype; 0 for a token, ln N for a compensation token.
        position: [P] float64, the position that ALiBi sees; less than the number of cached tokens.
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor
    position: Tensor


def chunk_attention(
    q: Tensor,
    past: CachedRows,
    k: Tensor,
    v: Tensor,
    start: int,
    scale: float,
    slopes: Tensor | None = None,
    query_block: int = QUERY_BLOCK,
) -> Tensor:
    """New tokens attend to every cached row, and causally to each other.

    Args:
        q: [H, g, S, D] queries at positions ``start .. start + S - 1``.
        past: rows of the cache as it stood with ``start`` tokens.
        k, v: [H, S, D] keys and values of the new tokens.
        slopes: [H, g] ALiBi slopes, or None: row p gets the bias ``-slope·(t - p)``.
        query_block: queries scored at once; memory grows with it, the result does not change.

    Returns:
        [H, g, S, D], float32 or float64 (the highest precision among the inputs, float32 at least).
    """
    dtype = compute_dtype(q.dtype, k.dtype, past.k.dtype)
    q = q.to(dtype)
    queries = q.shape[2]
    all_k = torch.cat([past.k.to(dtype), k.to(dtype)], dim=1)
    all_v = torch.cat([past.v.to(dtype), v.to(dtype)], dim=1)
    new_position = torch.arange(start, start + queries, device=q.device, dtype=torch.float64)
    position = torch.cat([past.position, new_position])
    log_weight = torch.cat(
        [past.log_weight.to(dtype), torch.zeros(k.shape[:2], device=q.device, dtype=dtype)], dim=1
    )
    out = torch.empty_like(q)
    for first in range(0, queries, query_block):
        last = min(first + query_block, queries)
        seen = past.k.shape[1] + last  # rows after this block's last token are hidden to all of it
        distance = new_position[first:last, None] - position[:seen]  # [block, seen]
        bias = log_weight[:, None, None, :seen].masked_fill(distance < 0, -torch.inf)
        if slopes is not None:
            bias = bias - slopes.to(dtype)[:, :, None, None] * distance.to(dtype)
        out[:, :, first:last] = weighted_attention(
            q[:, :, first:last], all_k[:, :seen], all_v[:, :seen], bias, scale
        )
    return out
