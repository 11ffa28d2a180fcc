"""The KV cache of one sequence and one layer, tensor for tensor as the engines lay it out.

Layout, ring rule, heavy hitters and fold rule: docs/semantics.md. An engine's cache can be compared with these
tensors row by row; rows that hold no token are never read and may hold anything finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import SELECT_QUERIES, RazorPolicy
from trt_razor.reference import heavy
from trt_razor.reference.attention import (
    CachedRows,
    chunk_attention,
    compute_dtype,
    group_queries,
)
from trt_razor.reference.clusters import fold


class FullHeadsCache:
    """Retrieval heads of one layer: every key and value, position p in row p.

    Attributes:
        full_k, full_v: [R, N_max, D] in ``dtype``.
        n: tokens cached.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        n_max: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_max = n_max
        self.full_k = torch.zeros(num_heads, n_max, head_dim, dtype=dtype, device=device)
        self.full_v = torch.zeros_like(self.full_k)
        self.n = 0

    @property
    def nbytes(self) -> int:
        return self.full_k.nbytes + self.full_v.nbytes

    def rows(self) -> CachedRows:
        """All cached tokens, in float32 (float64 if that is the cache's dtype)."""
        dtype = compute_dtype(self.full_k.dtype)
        k, v = self.full_k[:, : self.n].to(dtype), self.full_v[:, : self.n].to(dtype)
        position = torch.arange(self.n, device=k.device, dtype=torch.float64)
        return CachedRows(k, v, k.new_zeros(k.shape[:2]), position)

    def update(self, k: Tensor, v: Tensor) -> None:
        """Append the new tokens: k, v [R, S, D]. Raises RazorError past ``n_max``."""
        end = _room(self.n, k.shape[1], self.n_max)
        self.full_k[:, self.n : end] = k
        self.full_v[:, self.n : end] = v
        self.n = end

    def grow(self, n_max: int) -> None:
        """Make room for ``n_max`` tokens; what is cached moves to the new tensors."""
        every = torch.arange(self.n, device=self.full_k.device)
        self.full_k = _moved(self.full_k, every, every, n_max)
        self.full_v = _moved(self.full_v, every, every, n_max)
        self.n_max = n_max


class LocalHeadsCache:
    """Local heads of one layer: sinks, heavy hitters, a ring of recent tokens, M compensation tokens.

    Position p < N0 is in row p; a position p >= N0 of the window in row
    N0 + H + (p - N0) mod W_cap, with W_cap = ``policy.ring_rows(n_max)``. The h(n) heavy hitters
    are in rows N0 .. N0 + h(n) - 1.

    Attributes:
        local_k, local_v: [Lh, N0 + H + W_cap, D] in ``dtype``.
        comp: [Lh, M, 2, D] mean key and mean value, float32 (float64 if ``dtype`` is).
        comp_count: [Lh, M] N_m, dtype of ``comp``; 0 = unused.
        comp_log_weight: [Lh, M] ln N_m, dtype of ``comp``; -inf = unused.
        n: tokens of the sequence so far, kept or dropped.

    Raises:
        UsageError: ALiBi (``alibi=True``) with more than one compensation token or heavy hitters.
    """

    def __init__(
        self,
        policy: RazorPolicy,
        num_heads: int,
        head_dim: int,
        n_max: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        alibi: bool = False,
        scale: float | None = None,
    ) -> None:
        if alibi and policy.comp_tokens > 1:
            raise UsageError(
                f"policy.comp_tokens: expected 0 or 1 for a model with ALiBi positions, found "
                f"{policy.comp_tokens}: a cluster has no single position to take the bias from"
            )
        if alibi and policy.heavy_hitters:
            raise UsageError(
                f"policy.heavy_hitters: expected 0 for a model with ALiBi positions, found "
                f"{policy.heavy_hitters}: their rows carry no position to take the bias from"
            )
        self.policy = policy
        self.n_max = n_max
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.ring_rows = policy.ring_rows(n_max)
        rows, tokens = policy.local_rows(n_max), policy.comp_tokens
        exact = compute_dtype(dtype)
        self.local_k = torch.zeros(num_heads, rows, head_dim, dtype=dtype, device=device)
        self.local_v = torch.zeros_like(self.local_k)
        self.comp = torch.zeros(num_heads, tokens, 2, head_dim, dtype=exact, device=device)
        self.comp_count = torch.zeros(num_heads, tokens, dtype=exact, device=device)
        self.comp_log_weight = self.comp_count.log()
        self.n = 0

    @property
    def nbytes(self) -> int:
        tensors = (self.local_k, self.local_v, self.comp, self.comp_count, self.comp_log_weight)
        return sum(t.nbytes for t in tensors)

    def kept_positions(self) -> Tensor:
        """Positions of sinks, then of the window, ascending; heavy hitters apart. int64."""
        # Not a choice among all positions: a step must cost the same however many were dropped.
        device, sinks = self.local_k.device, min(self.n, self.policy.sink_tokens)
        first = sinks + self.policy.dropped(self.n)
        return torch.cat(
            [torch.arange(sinks, device=device), torch.arange(first, self.n, device=device)]
        )

    def row_of(self, positions: Tensor) -> Tensor:
        """Row of ``local_k`` in which each (kept) position lives."""
        past_sinks = positions - self.policy.sink_tokens
        ring = self.policy.kept_rows + past_sinks.remainder(self.ring_rows)
        return torch.where(past_sinks < 0, positions, ring)

    def rows(self) -> CachedRows:
        """What queries see: compensation tokens, then sinks and window by position, heavy hitters."""
        kept, chosen = self.kept_positions(), self.heavy_rows()
        index = torch.cat([self.row_of(kept), chosen])
        exact = self.comp.dtype
        k = torch.cat([self.comp[:, :, 0], self.local_k[:, index].to(exact)], dim=1)
        v = torch.cat([self.comp[:, :, 1], self.local_v[:, index].to(exact)], dim=1)
        tokens = self.comp_log_weight.new_zeros(len(self.comp), len(index))
        log_weight = torch.cat([self.comp_log_weight, tokens], dim=1)
        # ALiBi: the compensation token sits in the middle of the dropped range.
        middle = self.policy.sink_tokens + (self.policy.dropped(self.n) - 1) / 2
        comp_position = torch.full((self.policy.comp_tokens,), middle, dtype=torch.float64)
        # Heavy hitters are cached keys of long ago: any position before the chunk will do.
        position = torch.cat([comp_position.to(kept.device), kept.double(), 0 * chosen.double()])
        return CachedRows(k, v, log_weight, position)

    def heavy_rows(self) -> Tensor:
        """Rows that hold heavy hitters: N0 .. N0 + h(n) - 1. int64."""
        first = self.policy.sink_tokens
        return torch.arange(first, first + self.policy.heavy(self.n), device=self.local_k.device)

    def update(self, k: Tensor, v: Tensor, queries: Tensor | None = None) -> None:
        """Add a chunk of tokens: choose and fold what falls out of the window, store what stays.

        Args:
            k, v: [Lh, S, D]. Positions N0 + D(n) .. N0 + D(n + S) - 1 are dropped in one step;
                they may lie in the cache, in the chunk, or in both.
            queries: [Lh, g, W, D] of the chunk's last W >= min(S, SELECT_QUERIES) tokens; not read
                without heavy hitters, or where nothing is to be chosen.

        Raises:
            UsageError: queries are needed and missing.
            RazorError: past ``n_max``.
        """
        start, end = self.n, _room(self.n, k.shape[1], self.n_max)
        k, v = k.to(self.local_k.dtype), v.to(self.local_v.dtype)
        sinks, gone = self.policy.sink_tokens, self.policy.dropped(end)
        device = self.local_k.device

        folded = torch.arange(sinks + self.policy.dropped(start), sinks + gone, device=device)
        if len(folded) and (self.policy.comp_tokens or self.policy.heavy_hitters):
            # Read before the ring is written: a new token may take the row of a folded one.
            old, new = self.row_of(folded[folded < start]), folded[folded >= start] - start
            old = torch.cat([self.heavy_rows(), old])
            keys = torch.cat([self.local_k[:, old], k[:, new]], dim=1)
            values = torch.cat([self.local_v[:, old], v[:, new]], dim=1)
            self._drop(keys, values, k.shape[1], queries)

        positions = torch.arange(start, end, device=device)
        positions = positions[self._is_kept(positions, gone)]
        index = self.row_of(positions)
        self.local_k[:, index] = k[:, positions - start]
        self.local_v[:, index] = v[:, positions - start]
        self.n = end

    def _drop(self, k: Tensor, v: Tensor, chunk: int, queries: Tensor | None) -> None:
        """Choose the heavy hitters among the candidates and fold the others.

        Args:
            k, v: [Lh, C, D] candidates: the heavy hitters in row order, then what is dropped, by position.
            chunk: tokens of the chunk.
        """
        first, most = self.policy.sink_tokens, self.policy.heavy_hitters
        held, candidates = self.policy.heavy(self.n), k.shape[1]
        exact = self.comp.dtype
        wins = heavy.first_come(held, candidates - held, most, k.device).expand(len(k), -1)
        if most and heavy.selects(candidates, most):
            need = min(chunk, SELECT_QUERIES)
            if queries is None or queries.shape[2] < need:
                found = "none" if queries is None else str(queries.shape[2])
                raise UsageError(
                    f"queries: expected those of the chunk's last {need} tokens, which choose the "
                    f"heavy hitters, found {found}"
                )
            q = queries[:, :, -need:]
            wins = heavy.choose(heavy.scores(q, k.to(exact), v.to(exact), self.scale), most)
        for head, win in enumerate(wins):
            entering, rows = heavy.rows_of_winners(win, held)
            self.local_k[head, first + rows] = k[head, entering]
            self.local_v[head, first + rows] = v[head, entering]
            lost = ~win
            if self.policy.comp_tokens and bool(lost.any()):
                fold(self.comp[head], self.comp_count[head], k[head, lost], v[head, lost])
        self.comp_log_weight.copy_(self.comp_count.log())

    def grow(self, n_max: int) -> None:
        """Lay out the ring for sequences of up to ``n_max`` tokens, as a new cache would have it."""
        kept, chosen, old = self.kept_positions(), self.heavy_rows(), self.ring_rows
        source = torch.cat([self.row_of(kept), chosen])
        self.n_max, self.ring_rows = n_max, self.policy.ring_rows(n_max)
        if self.ring_rows != old:
            target = torch.cat([self.row_of(kept), chosen])
            rows = self.policy.local_rows(n_max)
            self.local_k = _moved(self.local_k, source, target, rows)
            self.local_v = _moved(self.local_v, source, target, rows)

    def _is_kept(self, positions: Tensor, gone: int) -> Tensor:
        sinks = self.policy.sink_tokens
        return (positions < sinks) | (positions >= sinks + gone)


class LayerCache:
    """Cache and attention of one layer for one sequence: retrieval heads and local heads.

    Args:
        policy: what local heads keep.
        retrieval_heads: KV heads that keep everything; None = all of them (dense attention).
        num_heads, num_kv_heads, head_dim: Hq, Hkv, D.
        n_max: longest sequence in tokens.
        dtype: of cached keys and values. Softmax and means are float32, float64 if this is.
        slopes: [Hq] ALiBi slopes, or None for a model with RoPE.
        scale: logit scale, 1/√D unless given.

    Attributes:
        full: FullHeadsCache of the retrieval heads, or None if there are none.
        local: LocalHeadsCache of the others, or None if there are none.
        retrieval_heads, local_heads: KV head indices, ascending, in the order of their caches.

    Raises:
        UsageError: head counts that do not fit, n_max < 1, or ALiBi with M > 1 or H > 0.
    """

    def __init__(
        self,
        policy: RazorPolicy,
        retrieval_heads: Sequence[int] | None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        n_max: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        slopes: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        every = range(num_kv_heads)
        chosen = sorted(set(every if retrieval_heads is None else retrieval_heads))
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UsageError(
                f"num_heads: expected a multiple of {num_kv_heads} KV heads, found {num_heads}"
            )
        if any(h not in every for h in chosen):
            raise UsageError(
                f"retrieval_heads: expected KV heads 0..{num_kv_heads - 1}, found {chosen}"
            )
        if n_max < 1:
            raise UsageError(f"n_max: expected >= 1 token, found {n_max}")
        if slopes is not None and slopes.shape != (num_heads,):
            raise UsageError(f"slopes: expected [{num_heads}], found {list(slopes.shape)}")
        self.retrieval_heads = tuple(chosen)
        self.local_heads = tuple(h for h in every if h not in chosen)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.n_max = n_max
        self.scale = 1 / math.sqrt(head_dim) if scale is None else scale
        self.slopes = None if slopes is None else group_queries(slopes.to(device), num_kv_heads)
        self.full: FullHeadsCache | None = None
        self.local: LocalHeadsCache | None = None
        if self.retrieval_heads:
            self.full = FullHeadsCache(len(chosen), head_dim, n_max, dtype, device)
        if self.local_heads:
            heads, alibi = len(self.local_heads), slopes is not None
            self.local = LocalHeadsCache(
                policy, heads, head_dim, n_max, dtype, device, alibi, self.scale
            )
        self.dtype = dtype
        self.n = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all state tensors of this layer."""
        return sum(part.nbytes for part in (self.full, self.local) if part is not None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a chunk of new tokens, which then join the cache.

        The queries see the cache as it stood before the chunk, and the new tokens causally
        (docs/semantics.md, "Chunks"). New keys and values are rounded to the cache's dtype first.

        Args:
            q: [Hq, S, D]. k, v: [Hkv, S, D]. After RoPE, if the model has it.

        Returns:
            [Hq, S, D] in the dtype of ``q``.

        Raises:
            UsageError: shapes that do not fit this cache.
            RazorError: the sequence would grow past ``n_max``; nothing has changed then.
        """
        self._check(q, k, v)
        _room(self.n, q.shape[1], self.n_max)
        k, v = k.to(self.dtype), v.to(self.dtype)
        grouped = group_queries(q, self.num_kv_heads)
        out = torch.empty_like(grouped)
        for part, heads in ((self.full, self.retrieval_heads), (self.local, self.local_heads)):
            if part is None:
                continue
            mine = list(heads)
            slopes = None if self.slopes is None else self.slopes[mine]
            out[mine] = chunk_attention(
                grouped[mine], part.rows(), k[mine], v[mine], self.n, self.scale, slopes
            ).to(q.dtype)
            if isinstance(part, LocalHeadsCache):
                part.update(k[mine], v[mine], grouped[mine])
            else:
                part.update(k[mine], v[mine])
        self.n += q.shape[1]
        return out.flatten(0, 1)

    def grow(self, n_max: int) -> None:
        """Make room for sequences of up to ``n_max`` tokens, never for fewer than before."""
        if n_max <= self.n_max:
            return
        for part in (self.full, self.local):
            if part is not None:
                part.grow(n_max)
        self.n_max = n_max

    def set_length(self, n: int) -> None:
        """Count ``n`` tokens: after kernels have written more of them, or to forget the last ones.

        Raises:
            RazorError: fewer tokens than now, and local heads have dropped some: what a compensation
                token has taken in cannot be taken out again.
        """
        dropped = self.local.policy.dropped(self.n) if self.local is not None else 0
        if n < self.n and dropped:
            raise RazorError(
                f"cache: {dropped} of its {self.n} tokens were dropped by local heads; it cannot go "
                f"back to {n} tokens"
            )
        for part in (self.full, self.local):
            if part is not None:
                part.n = n
        self.n = n

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        tokens = q.shape[1] if q.dim() == 3 else 0
        for name, x, heads in (
            ("q", q, self.num_heads),
            ("k", k, self.num_kv_heads),
            ("v", v, self.num_kv_heads),
        ):
            if x.shape != (heads, tokens, self.head_dim):
                raise UsageError(
                    f"{name}: expected [{heads}, {tokens or 'S'}, {self.head_dim}], "
                    f"found {list(x.shape)}"
                )


def new_layer_caches(
    spec: ModelSpec,
    policy: RazorPolicy,
    head_map: HeadMap | None,
    n_max: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[LayerCache]:
    """An empty cache for one sequence: one LayerCache a layer.

    Args:
        head_map: which heads retrieve; None = all of them (dense attention).
        n_max: longest sequence in tokens.

    Raises:
        UsageError: the head map is of another model, or ALiBi with M > 1.
    """
    if head_map is not None:
        head_map.check_model(spec.fingerprint(), spec.name, "head map")
    slopes = None
    if spec.position == "alibi":
        slopes = torch.from_numpy(alibi_slopes(spec.num_heads))
    return [
        LayerCache(
            policy,
            None if head_map is None else head_map.retrieval_heads[layer],
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            n_max,
            dtype,
            device,
            slopes,
        )
        for layer in range(spec.num_layers)
    ]


def _room(cached: int, new: int, n_max: int) -> int:
    """Tokens after adding ``new`` ones. Raises RazorError if they do not fit."""
    if cached + new > n_max:
        raise RazorError(
            f"cache: {cached} tokens cached and {new} new ones exceed its n_max = {n_max}; "
            f"make the cache with a larger n_max or shorten the prompt"
        )
    return cached + new


def _moved(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    """A tensor with ``rows`` rows a head whose rows ``target`` are the rows ``source`` of ``x``."""
    out = x.new_zeros(x.shape[0], rows, x.shape[2])
    out[:, target] = x[:, source]
    return out
