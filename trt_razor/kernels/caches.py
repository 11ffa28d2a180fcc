"""Where the caches of a layer are: contiguous tensors or TensorRT-LLM's pools.

Tensor names and rows are those of docs/semantics.md ("Cache layout"), with slots in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_razor.errors import UsageError
from trt_razor.kernels import structs
from trt_razor.kernels.layer import LayerConfig
from trt_razor.kernels.tensors import address, check, import_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TENSORS = ("full_k", "full_v", "local_k", "local_v", "comp", "comp_log_weight", "comp_count")


@dataclass(frozen=True)
class ContiguousView:
    """Keys and values of one class of heads, rows side by side.

    Attributes:
        k, v: [slots, heads, rows, D] of the cache dtype. Rows of a head lie without gaps; slots
            and heads may be apart, the same way in k and v.
        slots: int32 [B], the slot of each sequence; None: sequence b is in slot b.
    """

    k: Tensor
    v: Tensor
    slots: Tensor | None = None

    def c_struct(
        self, name: str, layer: LayerConfig, heads: int, batch: int, device: torch.device
    ) -> structs.RazorView:
        shape: tuple[int | str, ...] = (_slots(self.slots), heads, "rows", layer.head_dim)
        check(f"{name}.k", self.k, device, layer.cache_dtype_name, shape, dense=2)
        shape = (self.k.shape[0], heads, self.k.shape[2], layer.head_dim)
        check(f"{name}.v", self.v, device, layer.cache_dtype_name, shape, dense=2)
        if self.k.stride() != self.v.stride():
            raise UsageError(
                f"{name}.v: expected the strides of {name}.k {list(self.k.stride())}, "
                f"found {list(self.v.stride())}"
            )
        _check_slots(name, self.slots, self.k.shape[0], batch, device)
        out = structs.RazorView()
        structs.fill(
            out,
            kind=structs.VIEW_CONTIGUOUS,
            capacity=self.k.shape[2],
            k=self.k.data_ptr(),
            v=self.v.data_ptr(),
            slot_stride=self.k.stride(0),
            head_stride=self.k.stride(1),
        )
        out.slots = address(self.slots)
        return out


@dataclass(frozen=True)
class PagedView:
    """Keys and values of one class of heads in blocks of a pool (razor.h, razor_view).

    Attributes:
        pool: contiguous, any dtype.
        block_offsets: int32 [B, 2, max_blocks], keys and values; any stride but that of the blocks.
        tokens_per_block: a power of two.
        layer_offset: bytes from the pool's first to this layer's.
        block_bytes: bytes from block to block; those of one block unless given.
        capacity: rows of a sequence; all of ``max_blocks`` unless given.
    """

    pool: Tensor
    block_offsets: Tensor
    tokens_per_block: int
    layer_offset: int = 0
    block_bytes: int | None = None
    capacity: int | None = None

    def c_struct(
        self, name: str, layer: LayerConfig, heads: int, batch: int, device: torch.device
    ) -> structs.RazorView:
        pool, offsets = self.pool, self.block_offsets
        pool_dtype = str(pool.dtype).removeprefix("torch.")
        check(f"{name}.pool", pool, device, pool_dtype, tuple(pool.shape))
        shape = (batch, 2, "blocks")
        check(f"{name}.block_offsets", offsets, device, "int32", shape, dense=1)
        rows = offsets.shape[2] * self.tokens_per_block
        capacity = rows if self.capacity is None else self.capacity
        if capacity > rows:
            raise UsageError(
                f"{name}.capacity: expected at most {rows} rows ({offsets.shape[2]} blocks of "
                f"{self.tokens_per_block}), found {capacity}"
            )
        block_bytes = self.block_bytes
        if block_bytes is None:
            row_bytes = layer.head_dim * layer.cache_element_bytes
            block_bytes = heads * self.tokens_per_block * row_bytes
        out = structs.RazorView()
        structs.fill(
            out,
            kind=structs.VIEW_PAGED,
            capacity=capacity,
            pool=pool.data_ptr(),
            layer_offset=self.layer_offset,
            block_bytes=block_bytes,
            block_offsets=offsets.data_ptr(),
            sequence_stride=offsets.stride(0),
            key_value_stride=offsets.stride(1),
            tokens_per_block=self.tokens_per_block,
        )
        return out


@dataclass(frozen=True)
class Compensation:
    """The compensation tokens of local heads, float32; slots may be apart, the rest lies dense.

    Attributes:
        comp: [slots, Lh, M, 2, D] mean key and mean value.
        log_weight: [slots, Lh, M]; -inf = unused.
        count: [slots, Lh, M]; 0 = unused.
        slots: int32 [B], the slot of each sequence; None: sequence b is in slot b.
    """

    comp: Tensor
    log_weight: Tensor
    count: Tensor
    slots: Tensor | None = None

    def c_struct(self, layer: LayerConfig, batch: int, device: torch.device) -> structs.RazorComp:
        heads, tokens = layer.num_local, layer.comp_tokens
        shape: tuple[int | str, ...] = (_slots(self.slots), heads, tokens, 2, layer.head_dim)
        check("comp", self.comp, device, "float32", shape, dense=4)
        slots = self.comp.shape[0]
        shape = (slots, heads, tokens)
        check("comp_log_weight", self.log_weight, device, "float32", shape, dense=2)
        check("comp_count", self.count, device, "float32", shape, dense=2)
        if slots > 1 and self.count.stride(0) != self.log_weight.stride(0):
            raise UsageError(
                f"comp_count: expected the slot stride of comp_log_weight "
                f"({self.log_weight.stride(0)}), found {self.count.stride(0)}"
            )
        _check_slots("comp", self.slots, slots, batch, device)
        out = structs.RazorComp()
        structs.fill(
            out,
            kind=structs.COMP_CONTIGUOUS,
            comp=self.comp.data_ptr(),
            log_weight=self.log_weight.data_ptr(),
            count=self.count.data_ptr(),
            comp_slot_stride=self.comp.stride(0),
            weight_slot_stride=self.log_weight.stride(0),
        )
        out.slots = address(self.slots)
        return out


class Bubble:
    """Compensation tokens lie between the sinks and the ring of a paged local view."""


BUBBLE = Bubble()


@dataclass(frozen=True)
class Caches:
    """The caches of one layer.

    Attributes:
        full: of the retrieval heads; None if there are none.
        local: of the local heads; None if there are none.
        comp: the compensation tokens; None with M = 0 or without local heads.
    """

    full: ContiguousView | PagedView | None = None
    local: ContiguousView | PagedView | None = None
    comp: Compensation | Bubble | None = None

    @classmethod
    def empty(cls, layer: LayerConfig, slots: int, device: torch.device | str = "cuda") -> Caches:
        """Contiguous caches for ``slots`` sequences, uninitialised: a first chunk starts them."""
        torch = import_torch()
        dtype = getattr(torch, layer.cache_dtype_name)

        def make(*shape: int) -> Tensor:
            out: Tensor = torch.empty(slots, *shape, dtype=dtype, device=device)
            return out

        def make_comp(*shape: int) -> Tensor:
            out: Tensor = torch.empty(slots, *shape, dtype=torch.float32, device=device)
            return out

        full = local = comp = None
        if layer.num_retrieval:
            rows = layer.full_rows
            shape = (layer.num_retrieval, rows, layer.head_dim)
            full = ContiguousView(make(*shape), make(*shape))
        if layer.num_local:
            shape = (layer.num_local, layer.local_rows, layer.head_dim)
            local = ContiguousView(make(*shape), make(*shape))
        if layer.comp_tokens:
            weights = (layer.num_local, layer.comp_tokens)
            comp = Compensation(
                make_comp(*weights, 2, layer.head_dim), make_comp(*weights), make_comp(*weights)
            )
        return cls(full, local, comp)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Caches:
        """Contiguous caches by the names of ``cache_layout`` without the layer's number.

        Raises:
            UsageError: an unknown name, or one of a pair or triple is missing.
        """
        for name in tensors:
            if name not in TENSORS:
                raise UsageError(f"caches: unknown tensor '{name}'; known: {', '.join(TENSORS)}")

        def group(*names: str) -> list[Tensor]:
            missing = [n for n in names if n not in tensors]
            if missing and len(missing) < len(names):
                raise UsageError(f"caches: missing tensor '{missing[0]}'")
            return [] if missing else [tensors[n] for n in names]

        full, local, comp = group(*TENSORS[:2]), group(*TENSORS[2:4]), group(*TENSORS[4:])
        return cls(
            ContiguousView(*full) if full else None,
            ContiguousView(*local) if local else None,
            Compensation(*comp) if comp else None,
        )

    def fill(
        self, call: structs.RazorCall, layer: LayerConfig, batch: int, device: torch.device
    ) -> None:
        """Write these caches into a call. Raises UsageError for what does not fit the layer."""
        for name, view, heads in (
            ("full", self.full, layer.num_retrieval),
            ("local", self.local, layer.num_local),
        ):
            if (view is None) != (heads == 0):
                kind = "retrieval" if name == "full" else "local"
                raise UsageError(
                    f"caches.{name}: expected {'a view' if heads else 'None'} for a layer with "
                    f"{heads} {kind} heads, found {_kind(view)}"
                )
            if view is not None:
                setattr(call, name, view.c_struct(name, layer, heads, batch, device))
        if (self.comp is None) != (layer.comp_tokens == 0):
            raise UsageError(
                f"caches.comp: expected {'Compensation' if layer.comp_tokens else 'None'} for a "
                f"layer with {layer.comp_tokens} compensation tokens, "
                f"found {_kind(self.comp)}"
            )
        if isinstance(self.comp, Bubble):
            call.comp.kind = structs.COMP_IN_BUBBLE
        elif self.comp is not None:
            call.comp = self.comp.c_struct(layer, batch, device)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _slots(slots: Tensor | None) -> str:
    return "slots >= B" if slots is None else "slots"


def _check_slots(
    name: str, slots: Tensor | None, found: int, batch: int, device: torch.device
) -> None:
    if slots is not None:
        check(f"{name}.slots", slots, device, "int32", (batch,))
    elif found < batch:
        raise UsageError(f"{name}: expected a slot for each of {batch} sequences, found {found}")
