"""Running a TensorRT-RTX engine: caches in GPU memory, two copies of each.

The builder promises nothing about an output that has the address of an input, so a cache is never
updated in place: every cache tensor exists twice, a forward pass reads one copy of its slots and
writes the other, and per slot one bit says which copy is current. Slots of one pass that disagree
are first brought to the same side by a copy on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.backends.cuda import Cuda
from trt_razor.backends.tensorrt_rtx import RTX
from trt_razor.backends.trt_session import ALIGNMENT, EngineSession
from trt_razor.cache_layout import CacheTensor

MIN_SPAN = 128
SPANS_PER_OCTAVE = 8


class _DeviceCache:
    """One cache tensor of all slots, twice; slot s begins at byte s · slot_bytes of a copy.

    Where that is no multiple of ``ALIGNMENT``, passes that begin there go through two scratch
    buffers (in, out). It happens to tensors of a few bytes a slot, and to rows of an odd size.
    """

    def __init__(self, cuda: Cuda, tensor: CacheTensor, num_slots: int) -> None:
        self.tensor = tensor
        self.slot_bytes = tensor.nbytes
        size = self.slot_bytes * num_slots
        self.nbytes = 2 * size
        self.sides = [cuda.alloc(size, tensor.name) for _ in range(2)]
        self.scratch: list[int] = []
        if num_slots > 1 and self.slot_bytes % ALIGNMENT:
            self.scratch = [cuda.alloc(size - self.slot_bytes, tensor.name) for _ in range(2)]
            self.nbytes += 2 * (size - self.slot_bytes)

    def staged(self, slot: int) -> bool:
        return bool(slot * self.slot_bytes % ALIGNMENT)

    def at(self, side: int, slot: int) -> int:
        return self.sides[side] + slot * self.slot_bytes


class RtxSession(EngineSession):
    """A loaded TensorRT-RTX engine; see ``EngineSession`` for arguments and errors."""

    def __init__(
        self,
        directory: Path,
        caches: Sequence[CacheTensor],
        num_slots: int,
        max_seq_len: int,
        trt: Any = None,
        cudart: Any = None,
    ) -> None:
        super().__init__(RTX, directory, caches, num_slots, max_seq_len, trt, cudart)

    def _allocate_caches(self, caches: Sequence[CacheTensor]) -> None:
        self._caches = [_DeviceCache(self._cuda, t, self.num_slots) for t in caches]
        self._side = np.zeros(self.num_slots, np.int64)  # which copy of a slot is current

    @property
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated: both copies, and scratch."""
        return sum(c.nbytes for c in self._caches)

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""
        side = int(self._side[slot])
        for cache in self._caches:
            # Zeros, not garbage: a masked row has weight 0, and 0 · NaN would still be NaN.
            address = cache.at(side, slot)
            self._cuda.call("cudaMemsetAsync", address, 0, cache.slot_bytes, self._stream)
            if cache.tensor.kind == "comp_log_weight":  # float32, −inf = unused
                self._to_device(address, self._unused_weights[: cache.slot_bytes // 4])
        self._sync()

    def _bind_caches(self, context: Any, lo: int, hi: int) -> None:
        side, rows = self._same_side(lo, hi), hi - lo
        for cache in self._caches:
            source, target = cache.at(side, lo), cache.at(1 - side, lo)
            if cache.staged(lo):
                self._on_device(cache.scratch[0], source, rows * cache.slot_bytes)
                source, target = cache.scratch
            self._bind(context, cache.tensor.name, source, (rows, *cache.tensor.shape))
            self._bind(context, f"{cache.tensor.name}_out", target)

    def _after_pass(self, lo: int, hi: int) -> None:
        other = 1 - int(self._side[lo])
        for cache in self._caches:
            if cache.staged(lo):
                size = (hi - lo) * cache.slot_bytes
                self._on_device(cache.at(other, lo), cache.scratch[1], size)
        self._side[lo:hi] = other

    def _span(self, past: int) -> int:
        return past_span(past, self.max_seq_len)

    def _same_side(self, lo: int, hi: int) -> int:
        """The side that holds all of slots lo..hi-1, the fewest possible copied to it first."""
        side = int(2 * self._side[lo:hi].sum() > hi - lo)
        for slot in range(lo, hi):
            if self._side[slot] != side:
                for cache in self._caches:
                    self._on_device(
                        cache.at(side, slot), cache.at(1 - side, slot), cache.slot_bytes
                    )
                self._side[slot] = side
        return side


def past_span(past: int, max_seq_len: int) -> int:
    """Length of the ``past_span`` input for ``past`` cached tokens: at least that, and >= 1.

    Rounded up to one of a few lengths per doubling, because RTX compiles kernels per shape.
    """
    step = max(MIN_SPAN, (1 << past.bit_length()) // (2 * SPANS_PER_OCTAVE))
    return min(-(-max(past, 1) // step) * step, max_seq_len)
