"""What a layer is and how large its calls may become, as Python values."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.kernels import structs
from trt_razor.policy import RazorPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trt_razor.models.spec import ModelSpec

HEAD_DIMS = (64, 96, 128, 256)
"""Head dimensions that the library has kernels for; it checks them itself."""
DTYPES = {"float16": structs.FP16, "bfloat16": structs.BF16}
CACHE_DTYPES = {**DTYPES, "float8_e4m3fn": structs.FP8_E4M3}
POSITIONS = {
    "rope": structs.ROPE_HALF,
    "rope_interleaved": structs.ROPE_INTERLEAVED,
    "alibi": structs.ALIBI,
    "none": structs.NO_POSITION,
}
ROPE_TABLES = {"split": structs.TABLE_SPLIT, "pairs": structs.TABLE_PAIRS}


@dataclass(frozen=True)
class LayerConfig:
    """One attention layer: heads, dtypes, positions, and the policy of its local heads.

    Args:
        num_heads, num_kv_heads, head_dim: Hq, Hkv, D.
        max_seq_len: N_max, longest sequence in tokens.
        policy: what local heads keep; needed if there are any.
        retrieval_heads: ascending KV heads that keep everything; None = all of them (dense).
        dtype: of qkv and out, "float16" or "bfloat16".
        cache_dtype: of cached keys and values: ``dtype`` unless given, or "float8_e4m3fn".
        position: "rope" (pairs i and i + rotary_dim / 2), "rope_interleaved" (pairs 2 i and
            2 i + 1), "alibi", or "none" (queries and keys arrive as they shall be cached).
        rope_table: a row of cos_sin is [cos | sin] ("split") or (cos, sin) pairs ("pairs").
        rotary_dim: leading elements that RoPE turns; head_dim unless given.
        scale: of the logits, 1/√D unless given.
        ring_rows, local_ring_offset, full_ring_offset: where rows are (razor.h); the layout of
            docs/semantics.md unless given.

    Raises:
        UsageError: an unknown name, or local heads without a policy. Numbers are checked by the
            library, ``RazorKernels.check_layer``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    policy: RazorPolicy | None = None
    retrieval_heads: tuple[int, ...] | None = None
    dtype: str = "float16"
    cache_dtype: str | None = None
    position: str = "rope"
    rope_table: str = "split"
    rotary_dim: int | None = None
    scale: float | None = None
    ring_rows: int | None = None
    local_ring_offset: int | None = None
    full_ring_offset: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DTYPES),
            ("cache_dtype", CACHE_DTYPES),
            ("position", POSITIONS),
            ("rope_table", ROPE_TABLES),
        ):
            value = getattr(self, name)
            if value not in known and not (name == "cache_dtype" and value is None):
                raise UsageError(f"{name} {value!r}: unknown; {did_you_mean(str(value), known)}")
        if self.policy is None and self.num_local:
            raise UsageError(
                f"policy: missing; {self.num_local} of {self.num_kv_heads} KV heads are local"
            )

    @classmethod
    def from_spec(
        cls,
        spec: ModelSpec,
        policy: RazorPolicy | None,
        retrieval_heads: Sequence[int] | None,
        max_seq_len: int,
        **changes: Any,
    ) -> LayerConfig:
        """A layer of a model; ``changes`` are further fields (dtype, cache_dtype …)."""
        heads = None if retrieval_heads is None else tuple(retrieval_heads)
        layer = cls(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            max_seq_len,
            policy,
            heads,
            position=spec.position,
        )
        return replace(layer, **changes)

    # Derived ----------------------------------------------------------------------------------
    @property
    def group(self) -> int:
        """g = Hq / Hkv: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_retrieval(self) -> int:
        """R."""
        every = self.retrieval_heads is None
        return self.num_kv_heads if every else len(self.retrieval_heads or ())

    @property
    def num_local(self) -> int:
        """Lh."""
        return self.num_kv_heads - self.num_retrieval

    @property
    def local_heads(self) -> tuple[int, ...]:
        """KV heads that are no retrieval heads, ascending: the order of the local caches."""
        if self.retrieval_heads is None:
            return ()
        return tuple(h for h in range(self.num_kv_heads) if h not in set(self.retrieval_heads))

    @property
    def comp_tokens(self) -> int:
        """M, 0 for a layer without local heads."""
        return self.policy.comp_tokens if self.policy and self.num_local else 0

    @property
    def full_rows(self) -> int:
        """Rows of a retrieval head for ``max_seq_len`` tokens."""
        c = self.c_struct
        return max(self.max_seq_len, self.max_seq_len - c.sink_tokens + c.full_ring_offset)

    @property
    def local_rows(self) -> int:
        """Rows of a local head: up to the end of its ring."""
        return self.c_struct.local_ring_offset + self.c_struct.ring_rows if self.num_local else 0

    @property
    def qkv_width(self) -> int:
        """(Hq + 2 Hkv) D, elements of a row of qkv."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def out_width(self) -> int:
        """Hq D, elements of a row of out."""
        return self.num_heads * self.head_dim

    @property
    def cache_dtype_name(self) -> str:
        return self.cache_dtype or self.dtype

    @property
    def cache_element_bytes(self) -> int:
        return 1 if self.cache_dtype_name == "float8_e4m3fn" else 2

    @cached_property
    def c_struct(self) -> structs.RazorLayer:
        """The layer as the C API takes it."""
        out = structs.new_layer()
        structs.fill(
            out,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_retrieval=self.num_retrieval,
            dtype=DTYPES[self.dtype],
            cache_dtype=CACHE_DTYPES[self.cache_dtype_name],
            position=POSITIONS[self.position],
            rope_table=ROPE_TABLES[self.rope_table],
            rotary_dim=self.rotary_dim or 0,
            max_seq_len=self.max_seq_len,
        )
        if self.retrieval_heads:
            array = (ctypes.c_int32 * len(self.retrieval_heads))(*self.retrieval_heads)
            out.retrieval_heads = ctypes.cast(array, ctypes.POINTER(ctypes.c_int32))
        scale = self.scale
        if scale is None and self.head_dim > 0:
            scale = 1 / math.sqrt(self.head_dim)
        out.scale = scale or 0.0
        kept = rows = sinks = 0
        if self.policy:
            sinks, kept = self.policy.sink_tokens, self.policy.kept_rows
            rows = self.policy.ring_rows(self.max_seq_len)
            structs.fill(
                out,
                sink_tokens=sinks,
                min_window=self.policy.min_window,
                compression=self.policy.compression or 0,
                comp_tokens=self.policy.comp_tokens,
                heavy_hitters=self.policy.heavy_hitters,
            )
        structs.fill(
            out,
            ring_rows=_default(self.ring_rows, rows),
            local_ring_offset=_default(self.local_ring_offset, kept),
            full_ring_offset=_default(self.full_ring_offset, sinks),
        )
        return out


def _default(value: int | None, default: int) -> int:
    return default if value is None else value


@dataclass(frozen=True)
class Limits:
    """How large a call may become (razor_limits)."""

    max_batch: int
    max_context_tokens: int
    max_chunk: int
    max_past: int

    @property
    def c_struct(self) -> structs.RazorLimits:
        out = structs.new_limits()
        structs.fill(
            out,
            max_batch=self.max_batch,
            max_context_tokens=self.max_context_tokens,
            max_chunk=self.max_chunk,
            max_past=self.max_past,
        )
        return out
