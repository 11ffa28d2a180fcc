"""Pools of blocks as TensorRT-LLM hands them to a plugin, and layers whose caches live in them.

A pool is memory [blocks, layers, K and V, heads, tokens_per_block, D]. A call is given, for each of its
sequences and for keys and values apart, the numbers of the sequence's blocks, counted in halves of one
layer: block b of a pool with L layers is number 2·L·b for keys and 2·L·b + 1 for values, and a layer
begins 2·layer halves into the pool.

Two arrangements of a layer:

* ``cyclic_store``: both classes of heads in pools. The sinks do not fill their last block; the rows that
  are left in it, the *bubble*, hold compensation tokens, and rings and full rows begin behind it.
* ``linear_store``: retrieval heads in a pool without bubble, local heads in memory by slot.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from razor_layers import Layer
from razor_memory import (
    Buffer,
    CompPlaces,
    ContiguousRows,
    LayerStore,
    Place,
    Rows,
    Slots,
    classes,
    contiguous_comp,
)

from trt_razor.kernels import BUBBLE, Caches, PagedView


class PagedRows:
    """One class of heads in a pool of blocks that sequences take at random and give back.

    Numbers of blocks that a sequence does not have (yet) lead to a block that nobody owns: a kernel that
    writes there is caught, one that reads there finds NaN.

    Args:
        blocks: in the pool, that block apart.
        layers, layer_in_pool: how many layers share the pool, and which of them is this one.
    """

    def __init__(
        self,
        layer: Layer,
        kind: str,
        tokens_per_block: int,
        blocks: int,
        seed: int,
        layers: int = 3,
        layer_in_pool: int = 1,
    ) -> None:
        self.layer, self.kind, self.tokens_per_block = layer, kind, tokens_per_block
        heads = len(layer.retrieval if kind == "full" else layer.local)
        self.layers, self.head_bytes = layers, tokens_per_block * layer.row_bytes
        self.half_bytes = heads * self.head_bytes
        self.layer_offset = layer_in_pool * 2 * self.half_bytes
        self.pool = Buffer(f"{kind} pool", (blocks + 1) * layers * 2 * self.half_bytes)
        self.buffers = [self.pool]
        self.max_blocks = -(-layer.rows(kind) // tokens_per_block)
        self._random = random.Random(seed)
        self._free = self._random.sample(range(blocks + 1), blocks + 1)
        self._nobodys = self._free.pop()
        self._of: dict[int, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks of a sequence of this many tokens; those of sinks and bubble are always there."""
        layer = self.layer
        behind_sinks = max(0, tokens - layer.policy.sink_tokens)
        if self.kind == "local":
            behind_sinks = min(behind_sinks, layer.ring_rows)
        offset = layer.ring_offset if self.kind == "local" else layer.full_offset
        rows = max(1, offset + behind_sinks)
        return -(-rows // self.tokens_per_block)

    def grow(self, sequence: int, tokens: int) -> None:
        mine = self._of.setdefault(sequence, [])
        while len(mine) < self.blocks_for(tokens):
            mine.append(self._free.pop(self._random.randrange(len(self._free))))

    def finish(self, sequence: int) -> None:
        """Some blocks keep what they held, some turn into NaN: neither may show in another sequence."""
        for block in self._of.pop(sequence, []):
            self._free.append(block)
            if self._random.random() < 0.5:
                part = slice(block * self.layers * 2 * self.half_bytes, None)
                part = slice(part.start, part.start + self.layers * 2 * self.half_bytes)
                self.pool.array[part] = self.pool.expected[part] = 0xFF

    def view(self, batch: Sequence[int]) -> PagedView:
        table = np.full((len(batch), 2, self.max_blocks), self._nobodys * self.layers * 2, np.int32)
        for row, sequence in zip(table, batch, strict=True):
            mine = np.array(self._of.get(sequence, []), np.int32) * self.layers * 2
            row[0, : len(mine)], row[1, : len(mine)] = mine, mine + 1
        offsets = Buffer("block offsets", table.nbytes, table)
        return PagedView(
            pool=self.pool.tensor(torch.uint8),
            block_offsets=offsets.tensor(torch.int32, *table.shape),
            tokens_per_block=self.tokens_per_block,
            layer_offset=self.layer_offset,
            block_bytes=self.half_bytes,
            capacity=self.layer.rows(self.kind),
        )

    def offset(self, sequence: int, head: int, row: int, value: bool) -> int:
        """Byte of a row in the pool."""
        block = self._of[sequence][row // self.tokens_per_block]
        half = (block * self.layers * 2 + value) * self.half_bytes + self.layer_offset
        return half + head * self.head_bytes + row % self.tokens_per_block * self.layer.row_bytes

    def row(self, sequence: int, head: int, row: int) -> tuple[Place, Place]:
        k, v = (
            Place(self.pool, self.offset(sequence, head, row, value), self.layer.row_bytes)
            for value in (False, True)
        )
        return k, v


class CyclicStore(LayerStore):
    """Both classes paged, compensation tokens in the bubble of the local pool."""

    def __init__(self, layer: Layer, rows: dict[str, Rows], slots: Slots) -> None:
        super().__init__(rows, None, slots)
        self._layer = layer

    def caches(self, batch: Sequence[int]) -> Caches:
        caches = super().caches(batch)
        has_comp = self._layer.local and self._layer.policy.comp_tokens
        return replace(caches, comp=BUBBLE) if has_comp else caches

    def comp(self, sequence: int, head: int) -> CompPlaces:
        local, m, row = self.rows["local"], self._layer.policy.comp_tokens, 4 * self._layer.head_dim
        assert isinstance(local, PagedRows)
        first = self._layer.policy.kept_rows
        k, v = (local.offset(sequence, head, first, value) for value in (False, True))
        weights = k + m * row
        return CompPlaces(
            [Place(local.pool, k + i * row, row) for i in range(m)],
            [Place(local.pool, v + i * row, row) for i in range(m)],
            Place(local.pool, weights, 4 * m),
            Place(local.pool, weights + 4 * m, 4 * m),
        )


def bubble(kept_rows: int, tokens_per_block: int) -> int:
    """Rows between the sinks and heavy hitters and the next block."""
    return -kept_rows % tokens_per_block


def cyclic_store(
    layer: Layer, tokens_per_block: int, slots: int, seed: int = 0, spare_blocks: int = 2
) -> LayerStore:
    """Both classes in pools; needs a layer made with ``bubble(kept_rows, tokens_per_block)``.

    Compensation tokens lie in the bubble, or by slot where there is none.
    """
    assert layer.bubble == bubble(layer.policy.kept_rows, tokens_per_block)
    of = Slots(slots, random.Random(seed).sample(range(slots), slots))
    rows: dict[str, Rows] = {}
    for kind in classes(layer):
        blocks = slots * -(-layer.rows(kind) // tokens_per_block) + spare_blocks
        rows[kind] = PagedRows(layer, kind, tokens_per_block, blocks, seed)
    if layer.bubble:
        return CyclicStore(layer, rows, of)
    return LayerStore(rows, contiguous_comp(layer, of), of)


def linear_store(layer: Layer, tokens_per_block: int, slots: int, seed: int = 0) -> LayerStore:
    """Retrieval heads in a pool, local heads and compensation tokens by slot."""
    assert layer.bubble == 0
    of = Slots(slots, random.Random(seed).sample(range(slots), slots))
    rows: dict[str, Rows] = {}
    for kind in classes(layer):
        if kind == "full":
            blocks = slots * -(-layer.rows(kind) // tokens_per_block) + 2
            rows[kind] = PagedRows(
                layer, kind, tokens_per_block, blocks, seed, layers=2, layer_in_pool=0
            )
        else:
            rows[kind] = ContiguousRows(layer, kind, of)
    return LayerStore(rows, contiguous_comp(layer, of), of)
