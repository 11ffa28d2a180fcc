"""What methods keep: chosen rows of the context, or Razor's own cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trt_razor.cache_layout import need_bytes
from trt_razor.evaluation.methods.attend import attend_parts
from trt_razor.evaluation.methods.interface import Kept
from trt_razor.policy import RazorPolicy
from trt_razor.reference.attention import group_queries
from trt_razor.reference.cache import LayerCache

VALUE_BITS = 16
"""Bits of a stored key's or value's element unless a method says otherwise."""
ROOM = 256
"""Tokens that a cache makes room for at a time."""


def row_bits(head_dim: int) -> int:
    """Bits of one head's key and value of one token."""
    return 2 * head_dim * VALUE_BITS


@dataclass(frozen=True)
class KeptRows:
    """Rows of some KV heads that are kept as they are; never written to, shared by forks.

    Attributes:
        heads: KV heads, ascending, counted among those of the ``RowsKept`` they are in.
        k, v: [len(heads), P, D].
        bits: what they take in memory.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    bits: int

    @classmethod
    def of(cls, heads: Sequence[int], k: Tensor, v: Tensor) -> KeptRows:
        """Rows in 16 bits."""
        return cls(tuple(heads), k, v, k.shape[0] * k.shape[1] * row_bits(k.shape[2]))


class RowsKept:
    """Chosen rows of a context, and every token that came since.

    Baselines that compress once: nothing is dropped later, so all they save is the context's.

    Args:
        groups: kept rows; every KV head is in exactly one group.
        n: tokens of the context.
        scale: logit scale.
    """

    def __init__(self, groups: Sequence[KeptRows], n: int, scale: float) -> None:
        self.groups, self.n, self.scale = tuple(groups), n, scale
        first = self.groups[0].k
        self.num_kv_heads = sum(len(g.heads) for g in self.groups)
        # [K or V, Hkv, room, D]: the tokens since, `_since` of them.
        self._new = first.new_empty(2, self.num_kv_heads, 0, first.shape[2])
        self._since = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Kept.attend``."""
        self._append(k, v)
        self.n += k.shape[1]
        grouped = group_queries(q, self.num_kv_heads)
        new_k, new_v = self._new[:, :, : self._since]
        if len(self.groups) == 1:
            g = self.groups[0]
            return attend_parts(grouped, g.k, g.v, new_k, new_v, self.scale).flatten(0, 1)
        out = torch.empty_like(grouped)
        for g in self.groups:
            mine = list(g.heads)
            out[mine] = attend_parts(grouped[mine], g.k, g.v, new_k[mine], new_v[mine], self.scale)
        return out.flatten(0, 1)

    def bits(self) -> int:
        """See ``Kept.bits``."""
        new = self._since * self.num_kv_heads * row_bits(self._new.shape[3])
        return sum(g.bits for g in self.groups) + new

    def fork(self) -> RowsKept:
        """The kept rows are shared, the tokens since are copied."""
        other = copy.copy(self)
        other._new = self._new[:, :, : self._since].clone()
        return other

    def _append(self, k: Tensor, v: Tensor) -> None:
        end = self._since + k.shape[1]
        if end > self._new.shape[2]:
            room = -(-end // ROOM) * ROOM
            new = self._new.new_empty(2, self.num_kv_heads, room, self._new.shape[3])
            new[:, :, : self._since] = self._new[:, :, : self._since]
            self._new = new
        self._new[0, :, self._since : end] = k
        self._new[1, :, self._since : end] = v
        self._since = end


class RazorKept:
    """Razor's cache of a layer: it goes on dropping and folding as tokens come."""

    def __init__(self, cache: LayerCache) -> None:
        self.cache = cache

    @property
    def n(self) -> int:
        return self.cache.n

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Kept.attend``."""
        end = self.cache.n + q.shape[1]
        if end > self.cache.n_max:
            self.cache.grow(-(-end // ROOM) * ROOM)
        return self.cache.attend(q, k, v)

    def bits(self) -> int:
        """See ``Kept.bits``: the count of ``cache_layout.need_bytes`` for a 16-bit cache."""
        return layer_bits(self.cache)

    def fork(self) -> RazorKept:
        """A copy: local heads change in place, and they are small."""
        return RazorKept(copy.deepcopy(self.cache))


class SplitKept:
    """Heads of a layer that are kept in different ways.

    Args:
        parts: (KV heads, what keeps them); every KV head is in exactly one part.
    """

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], Kept]]) -> None:
        self.parts = tuple(parts)
        self.num_kv_heads = sum(len(heads) for heads, _ in self.parts)

    @property
    def n(self) -> int:
        return self.parts[0][1].n

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Kept.attend``."""
        grouped = group_queries(q, self.num_kv_heads)
        out = torch.empty_like(grouped)
        for heads, kept in self.parts:
            mine = list(heads)
            part = kept.attend(grouped[mine].flatten(0, 1), k[mine], v[mine])
            out[mine] = group_queries(part, len(mine))
        return out.flatten(0, 1)

    def bits(self) -> int:
        """See ``Kept.bits``."""
        return sum(kept.bits() for _, kept in self.parts)

    def fork(self) -> SplitKept:
        """Each part forks."""
        return SplitKept([(heads, kept.fork()) for heads, kept in self.parts])


def layer_bits(cache: LayerCache) -> int:
    """Bits of what a Razor cache holds, keys and values in 16 bits and means in float32."""
    heads = len(cache.retrieval_heads), len(cache.local_heads)
    policy = None if cache.local is None else cache.local.policy
    return razor_bits(*heads, cache.head_dim, policy, cache.n)


def razor_bits(
    retrieval: int, local: int, head_dim: int, policy: RazorPolicy | None, n: int
) -> int:
    """The same from numbers: of ``retrieval`` and ``local`` heads after n tokens."""
    if policy is None or not local:
        return (retrieval + local) * n * row_bits(head_dim)
    return 8 * need_bytes(retrieval, local, head_dim, policy, n, "float16")
