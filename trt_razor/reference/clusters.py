"""Compensation tokens: dropped tokens folded into M weighted means (docs/semantics.md, "Fold").

One rule for every M >= 1. With M = 1 all of it falls away but the running mean (paper, equation 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

LLOYD_ROUNDS = 4
_DISTANCE_ELEMENTS = 1 << 22  # keys × clusters compared at once


def seed_indices(folded: int, clusters: int) -> list[int]:
    """Keys that start the clusters: floor((i + 1/2)·F / M') for i < M', in whole numbers."""
    return [(2 * i + 1) * folded // (2 * clusters) for i in range(clusters)]


def nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid nearest to each key (Euclidean, ties to the lower index).

    Distances are sums of squared differences in float64, not ‖c‖² - 2k·c: the short form loses the
    small differences that decide, and this is the oracle.

    Args:
        keys: [F, D]. centroids: [M, D].

    Returns:
        int64 [F].
    """
    block = max(1, _DISTANCE_ELEMENTS // max(1, len(centroids)))
    centroids = centroids.double()
    owners = []
    for part in keys.double().split(block):
        distance = torch.cdist(part, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        # argmin does not promise the first of equal values; "is the minimum" as 0/1 and the
        # lowest index among those does.
        is_nearest = distance == distance.amin(-1, keepdim=True)
        index = torch.arange(len(centroids), device=keys.device).expand_as(distance)
        owners.append(index.masked_fill(~is_nearest, len(centroids)).amin(-1))
    return torch.cat(owners)


def seed(keys: Tensor, comp_tokens: int) -> Tensor:
    """Owner of each key in the first fold: M' = min(M, F) clusters, then Lloyd's rounds.

    Args:
        keys: [F, D], F >= 1, in position order.

    Returns:
        int64 [F], the assignment of the last round.
    """
    clusters = min(comp_tokens, len(keys))
    centroids = keys[seed_indices(len(keys), clusters)]
    for _ in range(LLOYD_ROUNDS):
        owner = nearest(keys, centroids)
        member = _membership(owner, clusters, keys.dtype)
        count = member.sum(1, keepdim=True)
        # A cluster nobody chose keeps its place and may win keys in a later round.
        centroids = torch.where(count > 0, member @ keys / count.clamp(min=1), centroids)
    return owner


def join(keys: Tensor, centroids: Tensor, count: Tensor) -> Tensor:
    """Owner of each key in a later fold: open the unused clusters, then join the nearest used one.

    Args:
        keys: [F, D] in position order. centroids: [M, D]. count: [M], at least one > 0.

    Returns:
        int64 [F].
    """
    free = (count == 0).nonzero().flatten()[: len(keys)]
    used = (count > 0).nonzero().flatten()
    rest = keys[len(free) :]
    return torch.cat([free, used[nearest(rest, centroids[used])]]) if len(rest) else free


def fold(comp: Tensor, count: Tensor, keys: Tensor, values: Tensor) -> None:
    """Fold F dropped tokens into the M compensation tokens of one head, in place.

    Args:
        comp: [M, 2, D] mean keys and mean values; rows with count 0 are zero.
        count: [M] number of tokens each stands for; all 0 before the first fold.
        keys, values: [F, D] in position order, F >= 1.
    """
    keys, values = keys.to(comp.dtype), values.to(comp.dtype)
    if bool((count > 0).any()):
        owner = join(keys, comp[:, 0], count)
    else:
        owner = seed(keys, len(count))
    member = _membership(owner, len(count), comp.dtype)
    added = member.sum(1)
    total = torch.stack([member @ keys, member @ values], dim=1)  # [M, 2, D]
    # mean += (sum - F·mean) / (N + F): a running mean that stays exact when N is large.
    after = (count + added).clamp(min=1)
    comp += (total - added[:, None, None] * comp) / after[:, None, None]
    count += added


def _membership(owner: Tensor, clusters: int, dtype: torch.dtype) -> Tensor:
    """[M, F] matrix of 0 and 1: sums as a matrix product are the same on every run and device."""
    return (owner == torch.arange(clusters, device=owner.device)[:, None]).to(dtype)
