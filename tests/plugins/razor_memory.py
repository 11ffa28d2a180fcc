"""Memory of the kernel tests: buffers between guards that know what they should hold, and caches in them."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from razor_layers import Bytes, Layer
from torch import Tensor

from trt_razor.kernels import Caches, Compensation, ContiguousView, PagedView

_GUARD = int(os.environ.get("RAZOR_TEST_GUARD", "512"))
"""Bytes on both sides of a buffer; 0 under a sanitizer, which has guards of its own."""

_libc = ctypes.CDLL(None)
_libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class Buffer:
    """Memory at a 256-byte boundary between two guards, filled with 0xff: NaN in every type here.

    ``array`` are its bytes from the address ``pointer`` on, ``expected`` what they should be: see
    :meth:`check`. The memory lives as long as the buffer or anything made of ``array``.
    """

    def __init__(self, name: str, nbytes: int, content: npt.ArrayLike | None = None) -> None:
        self.name, self.nbytes = name, nbytes
        memory, total = ctypes.c_void_p(), nbytes + 2 * _GUARD
        if _libc.posix_memalign(ctypes.byref(memory), 256, max(1, total)) or memory.value is None:
            raise MemoryError(f"{name}: {total} bytes")
        raw = (ctypes.c_uint8 * total).from_address(memory.value)
        self.pointer = memory.value + _GUARD
        # Arrays and tensors of the memory hold on to raw: it is there as long as the last of them.
        weakref.finalize(raw, _libc.free, memory.value).atexit = False
        self._all = np.frombuffer(raw, np.uint8)
        self._all[:] = 0xA5
        self.array: Bytes = self._all[_GUARD : _GUARD + nbytes]
        self.array[:] = 0xFF
        if content is not None:
            self.array[:] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        self.expected: Bytes = self.array.copy()

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        flat = torch.from_numpy(self.array).view(dtype)
        return flat.view(*shape) if shape else flat

    def check_guards(self) -> None:
        for side, guard in (
            ("before", self._all[:_GUARD]),
            ("behind", self._all[_GUARD + self.nbytes :]),
        ):
            wrong = np.flatnonzero(guard != 0xA5)
            assert not len(wrong), f"{self.name}: {len(wrong)} bytes {side} the buffer were written"

    def check(self, ignore: npt.NDArray[np.bool_] | None = None) -> None:
        """Every byte is as expected."""
        self.check_guards()
        wrong = self.array != self.expected
        if ignore is not None:
            wrong &= ~ignore
        places = np.flatnonzero(wrong)
        assert not len(places), (
            f"{self.name}: {len(places)} of {self.nbytes} bytes differ, from byte {places[0]} to "
            f"{places[-1]}: found {self.array[places[:8]]}, expected {self.expected[places[:8]]}"
        )


class Place:
    """Bytes in a buffer: one row, or a stretch of floats."""

    def __init__(self, buffer: Buffer, offset: int, nbytes: int) -> None:
        self.buffer, self.part = buffer, slice(offset, offset + nbytes)
        inside = offset >= 0 and offset + nbytes <= buffer.nbytes
        assert inside, f"{buffer.name}: offset {offset} is outside"

    def expect(self, content: Bytes) -> None:
        self.buffer.expected[self.part] = content

    def adopt(self) -> None:
        """What is there is right."""
        self.buffer.expected[self.part] = self.buffer.array[self.part]

    def floats(self) -> npt.NDArray[np.float32]:
        return self.buffer.array[self.part].view(np.float32)


@dataclass
class CompPlaces:
    """Where the compensation tokens of one head are."""

    k: list[Place]  # M mean keys
    v: list[Place]
    count: Place
    log_weight: Place

    def all(self) -> list[Place]:
        return [*self.k, *self.v, self.count, self.log_weight]


class Store(Protocol):
    """The caches of one layer: memory, and how a call is told about it."""

    buffers: list[Buffer]

    def grow(self, sequence: int, tokens: int) -> None:
        """Make room for ``tokens`` tokens of a sequence; its first call begins it."""

    def finish(self, sequence: int) -> None:
        """A sequence ends; its memory may be given to another."""

    def caches(self, batch: Sequence[int]) -> Caches:
        """For the sequences of a call."""

    def row(self, kind: str, sequence: int, head: int, row: int) -> tuple[Place, Place]:
        """Key and value of a row of head ``head`` of the class ("full", "local")."""

    def comp(self, sequence: int, head: int) -> CompPlaces:
        """Of local head ``head``; M >= 1."""


class Slots:
    """Which slot of contiguous memory a sequence has.

    Args:
        count: slots in memory.
        order: slots in the order in which sequences get them; None: sequence i has slot i, and calls
            whose sequences are 0, 1, 2, … are made without a table.
    """

    def __init__(self, count: int, order: Sequence[int] | None = None) -> None:
        self.count = count
        self._free = None if order is None else list(order)
        self._of: dict[int, int] = {}

    def of(self, sequence: int) -> int:
        if self._free is None:
            return sequence
        if sequence not in self._of:
            self._of[sequence] = self._free.pop(0)
        return self._of[sequence]

    def release(self, sequence: int) -> None:
        if self._free is not None and sequence in self._of:
            self._free.append(self._of.pop(sequence))

    def table(self, batch: Sequence[int]) -> Tensor | None:
        slots = [self.of(s) for s in batch]
        if self._free is None and slots == list(range(len(batch))):
            return None
        return Buffer("slots", 4 * len(slots), np.array(slots, np.int32)).tensor(torch.int32)


class ContiguousRows:
    """Tensors [slots, heads, rows, D] of one class of heads, with gaps between heads and slots."""

    def __init__(self, layer: Layer, kind: str, slots: Slots, gap_rows: int = 1) -> None:
        heads = len(layer.retrieval if kind == "full" else layer.local)
        rows, self.size, self.slots = layer.rows(kind), layer.row_bytes, slots
        # Gaps between neighbours only: behind the last row the buffer ends.
        self.head_rows = rows + gap_rows
        self.slot_rows = heads * self.head_rows + gap_rows
        total = (slots.count - 1) * self.slot_rows + (heads - 1) * self.head_rows + rows
        self.buffers = [Buffer(f"{kind}_{x}", total * self.size) for x in "kv"]
        dim = layer.head_dim
        shape = slots.count, heads, rows, dim
        strides = self.slot_rows * dim, self.head_rows * dim, dim, 1
        self.k, self.v = (
            b.tensor(layer.cache_dtype).as_strided(shape, strides) for b in self.buffers
        )

    def view(self, batch: Sequence[int]) -> ContiguousView:
        return ContiguousView(self.k, self.v, self.slots.table(batch))

    def grow(self, sequence: int, tokens: int) -> None:
        pass

    def finish(self, sequence: int) -> None:
        pass

    def row(self, sequence: int, head: int, row: int) -> tuple[Place, Place]:
        slot = self.slots.of(sequence)
        offset = (slot * self.slot_rows + head * self.head_rows + row) * self.size
        k, v = (Place(b, offset, self.size) for b in self.buffers)
        return k, v


class ContiguousComp:
    """Compensation tokens by slot, with gaps between slots."""

    def __init__(self, layer: Layer, slots: Slots, gap: int = 4) -> None:
        heads, m, dim, count = (
            len(layer.local),
            layer.policy.comp_tokens,
            layer.head_dim,
            slots.count,
        )
        self.m, self.dim, self.slots = m, dim, slots
        self.slot, self.weight_slot = heads * m * 2 * dim + gap, heads * m + gap
        self._comp = Buffer("comp", 4 * ((count - 1) * self.slot + heads * m * 2 * dim))
        self._log_weight, self._count = (
            Buffer(name, 4 * ((count - 1) * self.weight_slot + heads * m))
            for name in ("log_weight", "count")
        )
        self.buffers = [self._comp, self._log_weight, self._count]
        self._tensors = [
            self._comp.tensor(torch.float32).as_strided(
                (count, heads, m, 2, dim), (self.slot, m * 2 * dim, 2 * dim, dim, 1)
            ),
            *(
                b.tensor(torch.float32).as_strided((count, heads, m), (self.weight_slot, m, 1))
                for b in self.buffers[1:]
            ),
        ]

    def view(self, batch: Sequence[int]) -> Compensation:
        return Compensation(*self._tensors, self.slots.table(batch))

    def places(self, sequence: int, head: int) -> CompPlaces:
        row, slot = 4 * self.dim, self.slots.of(sequence)
        start = 4 * slot * self.slot + head * self.m * 2 * row
        weight = 4 * (slot * self.weight_slot + head * self.m)
        return CompPlaces(
            [Place(self._comp, start + 2 * row * i, row) for i in range(self.m)],
            [Place(self._comp, start + 2 * row * i + row, row) for i in range(self.m)],
            Place(self._count, weight, 4 * self.m),
            Place(self._log_weight, weight, 4 * self.m),
        )


class Rows(Protocol):
    """The keys and values of one class of heads."""

    buffers: list[Buffer]

    def view(self, batch: Sequence[int]) -> ContiguousView | PagedView: ...
    def grow(self, sequence: int, tokens: int) -> None: ...
    def finish(self, sequence: int) -> None: ...
    def row(self, sequence: int, head: int, row: int) -> tuple[Place, Place]: ...


class LayerStore:
    """A Store of a view for each class of heads that the layer has, and compensation tokens apart.

    Args:
        rows: "full" and "local", as far as the layer has such heads.
        slots: of ``rows`` and ``comp`` that are contiguous.
    """

    def __init__(self, rows: Mapping[str, Rows], comp: ContiguousComp | None, slots: Slots) -> None:
        self.rows, self.slots, self._comp = rows, slots, comp
        self.buffers = [b for part in rows.values() for b in part.buffers]
        self.buffers += comp.buffers if comp else []

    def grow(self, sequence: int, tokens: int) -> None:
        for part in self.rows.values():
            part.grow(sequence, tokens)

    def finish(self, sequence: int) -> None:
        for part in self.rows.values():
            part.finish(sequence)
        self.slots.release(sequence)

    def caches(self, batch: Sequence[int]) -> Caches:
        views = {kind: part.view(batch) for kind, part in self.rows.items()}
        comp = self._comp.view(batch) if self._comp else None
        return Caches(views.get("full"), views.get("local"), comp)

    def row(self, kind: str, sequence: int, head: int, row: int) -> tuple[Place, Place]:
        return self.rows[kind].row(sequence, head, row)

    def comp(self, sequence: int, head: int) -> CompPlaces:
        assert self._comp is not None
        return self._comp.places(sequence, head)


def classes(layer: Layer) -> list[str]:
    """Classes of heads that the layer has."""
    return ["full"] * bool(layer.retrieval) + ["local"] * bool(layer.local)


def contiguous_comp(layer: Layer, slots: Slots) -> ContiguousComp | None:
    return ContiguousComp(layer, slots) if layer.local and layer.policy.comp_tokens else None


def contiguous_store(layer: Layer, slots: int, order: Sequence[int] | None = None) -> LayerStore:
    """All caches contiguous; ``order``: see Slots."""
    of = Slots(slots, order)
    rows = {kind: ContiguousRows(layer, kind, of) for kind in classes(layer)}
    return LayerStore(rows, contiguous_comp(layer, of), of)
