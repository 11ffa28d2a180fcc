"""Echo and induction scores of attention heads, in memory linear in the probe length.

With a block of K tokens repeated (see :mod:`trt_razor.heads.probe`), the token at position p
occurred before at p - K, p - 2K, …:

* echo score of a row: attention to p - K, p - 2K, … (the token's own earlier occurrences),
* induction score of a row: attention to p - K + 1, p - 2K + 1, … (the tokens that followed them),

and a head's score is the mean over the rows of repeats 2, 3, … (arXiv 2407.15891, section 3.2).
Only ``2 * (repeats - 1)`` diagonals of the attention map are wanted, so the map is never built: one
pass over blocks of query rows gives the attention's output and the log of every row's softmax
denominator, and the diagonals follow from q·k and that number.
"""

from __future__ import annotations

import torch

SLAB_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Size of one block of attention rows: what fits a CPU's caches, or keeps a GPU busy."""

FLOOR = {torch.float32: -80.0, torch.float64: -700.0}
"""Least logit below its row's largest. exp of anything less is a denormal number or nearly so: far
below rounding error, but 15 times slower to multiply on a CPU (trained heads are that sharp)."""


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, slab_bytes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal softmax attention and its row log-sum-exp, one block of query rows at a time.

    Args:
        q: [Hq, n, D]; k, v: [Hkv, n, D], Hq a multiple of Hkv, any float dtype.
        scale: multiplies q·k, usually 1/sqrt(D).
        slab_bytes: about the size of the one temporary of [rows, n] logits.

    Returns:
        output [Hq, n, D] and log-sum-exp [Hq, n], both float32 (float64 if q is).
    """
    heads, n, dim = q.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if slab_bytes is None:
        slab_bytes = SLAB_BYTES.get(q.device.type, SLAB_BYTES["cpu"])
    rows = max(1, min(n, slab_bytes // (group * n * dtype.itemsize)))
    out = torch.empty(heads, n, dim, dtype=dtype, device=q.device)
    lse = torch.empty(heads, n, dtype=dtype, device=q.device)
    slab = torch.empty(group * rows * n, dtype=dtype, device=q.device)
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    for h in range(kv_heads):
        mine = slice(h * group, (h + 1) * group)
        keys, values = k[h].to(dtype), v[h].to(dtype)
        queries = q[mine].to(dtype) * scale
        for start in range(0, n, rows):
            end = min(start + rows, n)
            r = end - start
            w = slab[: group * r * end].view(group * r, end)
            torch.mm(queries[:, start:end].reshape(group * r, dim), keys[:end].T, out=w)
            w.view(group, r, end)[:, :, start:].masked_fill_(future[:r, :r], float("-inf"))
            top = w.amax(1, keepdim=True)
            total = w.sub_(top).clamp_(min=FLOOR[dtype]).exp_().sum(1, keepdim=True)
            out[mine, start:end] = (torch.mm(w, values[:end]) / total).view(group, r, dim)
            lse[mine, start:end] = (top + total.log()).view(group, r)
    return out, lse


def head_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    length: int,
    repeats: int,
    offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Echo and induction score of every query head of one layer.

    Args:
        q: [Hq, n, D] and k: [Hkv, n, D], n = offset + length * repeats, as they enter attention.
        lse: [Hq, n], from :func:`causal_attention`.
        length, repeats, offset: the probe's layout.

    Returns:
        two tensors [Hq], the dtype of ``lse``, values in 0..1.
    """
    heads, n = lse.shape
    kv_heads = k.shape[0]
    group = heads // kv_heads
    lse = lse.view(kv_heads, group, n)
    echo = lse.new_zeros(kv_heads, group)
    induction = lse.new_zeros(kv_heads, group)
    for h in range(kv_heads):
        queries = q[h * group : (h + 1) * group].to(lse.dtype)
        keys = k[h].to(lse.dtype)
        for back in range(length, length * repeats, length):
            first = offset + back  # the first row that has an occurrence this far back
            for total, shift in ((echo, 0), (induction, 1)):
                there = keys[first - back + shift : n - back + shift]
                dots = (queries[:, first:] * there).sum(-1)
                total[h] += torch.exp(scale * dots - lse[h, :, first:]).sum(-1)
    rows = length * (repeats - 1)
    return echo.view(heads) / rows, induction.view(heads) / rows


def group_max(scores: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Score of a KV head: the largest among the query heads that share it. [..., Hq] → [..., Hkv]."""
    return scores.unflatten(-1, (kv_heads, -1)).amax(-1)
