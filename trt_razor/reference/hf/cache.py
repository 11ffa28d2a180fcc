"""The cache that transformers carries about: rows of ``LayerCache``, one a sequence and layer.

transformers calls ``update`` and then its attention function with what ``update`` returned. Razor's
attention needs the cache as it stood before, so ``update`` only marks the new keys with the layer
they belong to; ``RazorLayer.attend``, called by the attention function, computes and stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from trt_razor.cache_layout import need_bytes
from trt_razor.errors import RazorError, UsageError
from trt_razor.reference.cache import LayerCache
from trt_razor.reference.hf.gpu import kernel_attention
from trt_razor.reference.hf.plan import Plan

GROWTH = 256
"""A cache without ``n_max`` makes room for this many tokens at a time."""

_LAYER = "_trt_razor_layer"


@dataclass(frozen=True)
class ChunkMask:
    """What a 2D attention mask says about a chunk of new tokens, per sequence.

    Attributes:
        padding: padded places at the chunk's start.
        tokens: tokens that are none, cached and new ones together.
    """

    padding: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class KvBytes:
    """Bytes of a cache, all layers and sequences together.

    Attributes:
        allocated: what its tensors take in memory.
        needed: what the tokens it holds need (``cache_layout``), without room for more.
        dense: what dense attention would hold for as many tokens.
    """

    allocated: int
    needed: int
    dense: int


class Row(Protocol):
    """What one layer keeps of one sequence."""

    @property
    def n(self) -> int:
        """Its tokens so far, kept or not."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens, q [Hq, S, D], k and v [Hkv, S, D], see what is kept and join it → [Hq, S, D]."""
        ...


class RazorLayer(CacheLayerMixin):
    """One layer: a LayerCache a sequence, made when the first tokens come."""

    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, plan: Plan, index: int, n_max: int | None) -> None:
        super().__init__()
        self.plan, self.index, self.n_max = plan, index, n_max
        self.rows: list[Row] = []
        self.seen = 0  # places of the batch, padding included: what transformers counts
        self._pending = False

    # What transformers calls -------------------------------------------------------------------
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark the new keys as this layer's; they are stored by ``attend``."""
        if self._pending:
            raise RazorError(
                f"Razor cache: layer {self.index} got keys that Razor's attention has not seen; the "
                f"model was run with another attention implementation, or changes its keys on the way"
            )
        self._pending = True
        setattr(key_states, _LAYER, self)
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of a mask; transformers 4 gives the positions of the queries."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.seen + new, 0

    def get_max_length(self) -> int:
        return -1 if self.n_max is None else self.n_max

    get_max_cache_shape = get_max_length  # its name in transformers 4

    def reset(self) -> None:
        self.rows, self.seen, self._pending = [], 0, False
        self.is_initialized = False

    @property
    def batch_size(self) -> int:
        return len(self.rows) or -1

    max_batch_size = batch_size  # its name in transformers 4

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        _refuse("beam search")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        _refuse("repeating the sequences of a cache")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        _refuse("choosing among the sequences of a cache")

    def offload(self) -> NoReturn:
        _refuse("offloading the cache")

    # Razor -------------------------------------------------------------------------------------
    @torch.no_grad()
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: ChunkMask | None
    ) -> Tensor:
        """Attention of a chunk, which then joins the cache.

        Args:
            q: [B, Hq, S, D]. k, v: [B, Hkv, S, D]. After RoPE.

        Returns:
            [B, S, Hq, D]; zero where there is padding.

        Raises:
            UsageError: another batch size than before, or padding that is not at the left.
            RazorError: more than ``n_max`` tokens.
        """
        self._pending = False
        batch, _, places, _ = q.shape
        padding = (0,) * batch if mask is None else mask.padding
        if self.rows and len(self.rows) != batch:
            raise UsageError(
                f"Razor cache: it holds {len(self.rows)} sequences, found a batch of {batch}"
            )
        self._check_mask(mask, places)
        lengths = [row.n for row in self.rows] or [0] * batch
        longest = max(n + places - pad for n, pad in zip(lengths, padding, strict=True))
        if self.n_max is not None and longest > self.n_max:
            raise RazorError(
                f"Razor cache: {longest} tokens exceed its n_max = {self.n_max}; make the cache with "
                f"a larger n_max, or with none: it then grows"
            )
        # Caches outlive the call: they must not become inference tensors, which only inference
        # mode may write to.
        with torch.inference_mode(False), torch.no_grad():
            if not self.rows:
                self.rows = [self._new_row(q, k, scale, longest) for _ in range(batch)]
                self.is_initialized = True
            for row, pad in zip(self.rows, padding, strict=True):
                if isinstance(row, LayerCache):
                    row.grow(self._room(row.n + places - pad))
        out = q.new_zeros(q.shape)
        for b, (row, pad) in enumerate(zip(self.rows, padding, strict=True)):
            if pad == places:
                continue
            new = q[b, :, pad:], k[b, :, pad:], v[b, :, pad:]
            if isinstance(row, LayerCache) and (kernels := self.plan.kernels.choose(row, q.device)):
                out[b, :, pad:] = kernel_attention(kernels, row, *new)
            else:
                out[b, :, pad:] = row.attend(*new)
        self.seen += places
        return out.transpose(1, 2)

    def crop(self, tokens: int) -> None:
        """Forget the last ``-tokens`` tokens (or, > 0, as in transformers 4, all after so many)."""
        away = -tokens if tokens <= 0 else max(0, self.seen - tokens)
        for row in self.rows:
            if not isinstance(row, LayerCache):
                _refuse("forgetting tokens of rows that came ready-made")
            if away > row.n:
                raise UsageError(f"Razor cache: expected to remove 0..{row.n} tokens, found {away}")
            row.set_length(row.n - away)
        self.seen -= away if self.rows else 0

    def _new_row(self, q: Tensor, k: Tensor, scale: float, tokens: int) -> LayerCache:
        return LayerCache(
            self.plan.policy,
            self.plan.retrieval_heads[self.index],
            q.shape[1],
            k.shape[1],
            k.shape[3],
            self._room(tokens),
            k.dtype,
            k.device,
            scale=scale,
        )

    def _room(self, tokens: int) -> int:
        if self.n_max is not None:
            return self.n_max
        return max(1, -(-tokens // GROWTH)) * GROWTH

    def _check_mask(self, mask: ChunkMask | None, places: int) -> None:
        if mask is None:
            return
        for b, (pad, tokens) in enumerate(zip(mask.padding, mask.tokens, strict=True)):
            cached = self.rows[b].n if self.rows else 0
            if pad and cached:
                raise UsageError(
                    f"attention_mask: sequence {b} has padding behind its first {cached} tokens; "
                    f"expected padding at the left only (tokenizer.padding_side = 'left')"
                )
            if tokens != cached + places - pad:
                raise UsageError(
                    f"attention_mask: sequence {b}: expected {cached} cached and {places - pad} new "
                    f"tokens, found {tokens} ones; cached tokens cannot be hidden afterwards"
                )


class RazorCache(Cache):
    """``past_key_values`` of a model with Razor: made by ``Razor.new_cache`` or by the first call.

    Local heads hold sinks, window and compensation tokens, nothing else. ``copy.deepcopy`` copies
    it, which is how a prompt's beginning is reused for several continuations.
    """

    def __init__(self, plan: Plan, n_max: int | None = None) -> None:
        if n_max is not None and n_max < 1:
            raise UsageError(f"n_max: expected >= 1 token, found {n_max}")
        self.plan = plan
        super().__init__(layers=[RazorLayer(plan, i, n_max) for i in range(plan.num_layers)])

    @classmethod
    def of_rows(cls, plan: Plan, rows: Sequence[Row]) -> RazorCache:
        """A cache of one sequence, from what its layers keep; see ``Razor.cache_of``."""
        if len(rows) != plan.num_layers:
            raise UsageError(f"rows: expected {plan.num_layers}, one a layer, found {len(rows)}")
        lengths = {row.n for row in rows}
        if len(lengths) != 1:
            raise UsageError(f"rows: expected as many tokens in each, found {sorted(lengths)}")
        cache = cls(plan)
        for layer, row in zip(cache.layers, rows, strict=True):
            layer.rows, layer.seen, layer.is_initialized = [row], row.n, True
        return cache

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; only while no head has dropped any.

        Raises:
            RazorError: tokens were dropped; nothing has changed then.
        """
        away = -tokens_to_remove
        if tokens_to_remove > 0:
            away = self.get_seq_length() - tokens_to_remove
        dropped = max(
            (
                self.plan.policy.dropped(row.n)
                for layer in self.layers
                for row in layer.rows
                if isinstance(row, LayerCache) and row.local
            ),
            default=0,
        )
        if away > 0 and dropped:
            raise RazorError(
                f"crop: {dropped} tokens were dropped by local heads, the cache cannot go back; keep "
                f"a copy.deepcopy of it from before (assisted generation cannot be used with Razor)"
            )
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def kv_bytes(self) -> KvBytes:
        """What it takes, what it needs, and what dense attention would take."""
        allocated = needed = dense = 0
        for layer in self.layers:
            for row in layer.rows:
                if not isinstance(row, LayerCache):
                    _refuse("counting the bytes of rows that came ready-made")
                allocated += sum(t.untyped_storage().nbytes() for t in _state(row))
                # Compensation tokens are float32 beside half precision, else of the cache's dtype.
                name = str(row.dtype).removeprefix("torch.")
                double = row.dtype == torch.float64
                heads = len(row.retrieval_heads), len(row.local_heads)
                kind, times = ("float32", 2) if double else (name, 1)
                policy = self.plan.policy
                needed += times * need_bytes(*heads, row.head_dim, policy, row.n, kind)
                dense += times * need_bytes(sum(heads), 0, row.head_dim, policy, row.n, kind)
        return KvBytes(allocated, needed, dense)


def layer_of(key: Tensor) -> RazorLayer | None:
    """The layer whose ``update`` returned these keys."""
    return getattr(key, _LAYER, None)


def _state(row: LayerCache) -> list[Tensor]:
    out: list[Tensor] = []
    if row.full is not None:
        out += [row.full.full_k, row.full.full_v]
    if row.local is not None:
        local = row.local
        out += [local.local_k, local.local_v, local.comp]
        out += [local.comp_count, local.comp_log_weight]
    return out


def _refuse(what: str) -> NoReturn:
    raise UsageError(f"Razor cache: {what} is not supported")
