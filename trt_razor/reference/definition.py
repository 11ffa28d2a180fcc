"""Razor attention of one KV head group, by the definition: no ring, no running mean, no batching.

Slow on purpose. Every step is the sentence of docs/semantics.md it stands for; the caches of
``reference.cache`` are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_razor.errors import UsageError
from trt_razor.policy import SELECT_QUERIES, RazorPolicy


@dataclass(frozen=True)
class DefinitionResult:
    """Outputs of all queries and what the head holds after the last token.

    Attributes:
        out: [g, n, D].
        kept: positions held as rows of their own, ascending; heavy hitters apart.
        heavy: positions of the heavy hitters, in row order.
        clusters: the M sets of dropped positions; a position that is no heavy hitter is in
            exactly one of them (M >= 1).
        comp: [M, 2, D] mean key and mean value of each cluster, zero for an empty one.
    """

    out: Tensor
    kept: list[int]
    heavy: list[int]
    clusters: list[list[int]]
    comp: Tensor

    @property
    def count(self) -> list[int]:
        """N_m of each cluster."""
        return [len(members) for members in self.clusters]

    @property
    def log_weight(self) -> list[float]:
        """ln N_m, -inf for an empty cluster."""
        return [math.log(c) if c else -math.inf for c in self.count]


def razor_attention_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Sequence[int],
    policy: RazorPolicy | None,
    scale: float | None = None,
    slopes: Sequence[float] | None = None,
) -> DefinitionResult:
    """Outputs and final state of one KV head and its g query heads over a whole sequence.

    Args:
        q: [g, n, D] queries, k, v: [n, D] keys and values (after RoPE, if any), one float dtype.
        chunks: lengths of the chunks in which the tokens arrive; their sum is n.
        policy: of a local head; None = a retrieval head, which keeps everything.
        scale: 1/√D unless given.
        slopes: g ALiBi slopes, or None.

    Raises:
        UsageError: the chunks do not sum to n, or ALiBi with more than one compensation token or
            heavy hitters.
    """
    group, n, dim = q.shape
    if sum(chunks) != n:
        raise UsageError(f"chunks: expected lengths that sum to {n}, found {list(chunks)}")
    scale = 1 / math.sqrt(dim) if scale is None else scale
    sinks = policy.sink_tokens if policy else 0
    comp_tokens = policy.comp_tokens if policy else 0
    if slopes is not None and comp_tokens > 1:
        raise UsageError(f"comp_tokens: expected 0 or 1 with ALiBi, found {comp_tokens}")
    most = policy.heavy_hitters if policy else 0
    if slopes is not None and most:
        raise UsageError(f"heavy_hitters: expected 0 with ALiBi, found {most}")

    out = torch.empty_like(q)
    clusters: list[list[int]] = [[] for _ in range(comp_tokens)]
    heavy: list[int] = []
    t0 = 0
    for length in chunks:
        t1 = t0 + length
        gone = policy.dropped(t0) if policy else 0  # D(t0)
        kept = [p for p in range(t0) if p < sinks or p >= sinks + gone]
        used = [c for c in clusters if c]
        mean_k = [_mean(k, c) for c in used]
        mean_v = [_mean(v, c) for c in used]
        mean_position = sinks + (gone - 1) / 2
        for t in range(t0, t1):
            seen = kept + heavy + list(range(t0, t + 1))
            rows_k = torch.stack([*mean_k, *(k[p] for p in seen)])
            rows_v = torch.stack([*mean_v, *(v[p] for p in seen)])
            weight = torch.tensor([len(c) for c in used] + [1] * len(seen)).to(q)
            position = torch.tensor([mean_position] * len(used) + seen).to(q)
            for h in range(group):
                logits = scale * (rows_k @ q[h, t])
                if slopes is not None:
                    logits = logits - float(slopes[h]) * (t - position)
                terms = weight * torch.exp(logits - logits.max())
                out[h, t] = (terms @ rows_v) / terms.sum()
        gone_after = policy.dropped(t1) if policy else 0
        folded = list(range(sinks + gone, sinks + gone_after))
        if folded:
            last = q[:, max(t0, t1 - SELECT_QUERIES) : t1]
            heavy, lost = _choose(heavy, folded, most, k, v, last, scale)
            if lost and comp_tokens:
                clusters = _fold(clusters, lost, k)
        t0 = t1

    gone = policy.dropped(n) if policy else 0
    comp = torch.zeros(comp_tokens, 2, dim).to(q)
    for m, members in enumerate(clusters):
        if members:
            comp[m] = torch.stack([_mean(k, members), _mean(v, members)])
    kept = [p for p in range(n) if p < sinks or p >= sinks + gone]
    return DefinitionResult(out, kept, heavy, clusters, comp)


def _choose(
    heavy: list[int],
    dropped: list[int],
    most: int,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    scale: float,
) -> tuple[list[int], list[int]]:
    """Heavy hitters by row after ``dropped`` (ascending) have left the window, and those that lose.

    Args:
        queries: [g, W, D] at the end of the chunk.
    """
    candidates = heavy + dropped
    if not most or len(candidates) <= most:
        room = most - len(heavy)
        return heavy + dropped[:room], dropped[room:]
    score = {
        p: float(v[p].norm().log() + torch.logsumexp(scale * (queries @ k[p]).flatten(), 0))
        for p in candidates
    }
    winners = sorted(candidates, key=lambda p: (-score[p], candidates.index(p)))[:most]
    rows = [p if p in winners else None for p in heavy] + [None] * (most - len(heavy))
    entering = [p for p in dropped if p in winners]
    after = [entering.pop(0) if p is None else p for p in rows]
    return after, [p for p in candidates if p not in winners]


def _fold(clusters: list[list[int]], folded: list[int], k: Tensor) -> list[list[int]]:
    """The clusters after the positions ``folded`` have joined them, in this order."""
    clusters = [list(c) for c in clusters]
    if not any(clusters):
        for m, members in enumerate(_seed(folded, k, min(len(clusters), len(folded)))):
            clusters[m] = members
        return clusters
    centroids = {m: _mean(k, c) for m, c in enumerate(clusters) if c}
    free = [m for m, c in enumerate(clusters) if not c]
    for i, p in enumerate(folded):
        clusters[free[i] if i < len(free) else _nearest(k[p], centroids)].append(p)
    return clusters


def _seed(folded: list[int], k: Tensor, num: int) -> list[list[int]]:
    """Clusters of the first fold: evenly spread starts, then four rounds of Lloyd's algorithm."""
    centroids = {i: k[folded[(2 * i + 1) * len(folded) // (2 * num)]] for i in range(num)}
    members: list[list[int]] = []
    for _ in range(4):
        members = [[] for _ in range(num)]
        for p in folded:
            members[_nearest(k[p], centroids)].append(p)
        centroids = {i: _mean(k, c) if c else centroids[i] for i, c in enumerate(members)}
    return members


def _nearest(key: Tensor, centroids: dict[int, Tensor]) -> int:
    """Index of the nearest centroid, the lowest one of equals."""
    return min(centroids, key=lambda m: (float((key - centroids[m]).square().sum()), m))


def _mean(x: Tensor, positions: list[int]) -> Tensor:
    return torch.stack([x[p] for p in positions]).mean(0)
