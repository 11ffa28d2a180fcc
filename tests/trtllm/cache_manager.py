"""TensorRT-LLM's KV cache manager for one rank, in Python.

Written after the public sources of TensorRT-LLM's C++ runtime around 1.0 (*cyclic*: windows wrap
around behind the sinks) and 1.1 - 1.2 (*linear*: rows never wrap, blocks in front of a window are
given back). It decides which blocks a sequence has and what stands in the tables that a network is
given; it holds no memory. The sources were read, never run: what the tests find here is as good as
that reading.

Symbols: T tokens_per_block, N0 sink tokens, w a window, P tokens of a prompt.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class OutOfBlocks(AssertionError):
    """The manager was asked for a block that it does not have: a fault of whoever schedules."""


@dataclass(frozen=True)
class CacheConfig:
    """What the manager is made of: the engine's config.json and the server's settings.

    Attributes:
        heads: KV heads of each attention layer on this rank.
        windows: the server's ``max_attention_window_size``, repeated over the layers; () = none.
        linear: 1.1 or later.
        paged_context: the engine was built with paged context attention (chunks, reuse).
        max_num_tokens, max_input_len: of a step, of a prompt.
    """

    heads: tuple[int, ...]
    head_dim: int
    element_bytes: int
    tokens_per_block: int
    max_seq_len: int
    max_num_sequences: int
    windows: tuple[int, ...] = ()
    sink_tokens: int = 0
    linear: bool = False
    paged_context: bool = False
    max_num_tokens: int = 8192
    max_input_len: int = 8192

    def __post_init__(self) -> None:
        # Windows beyond the longest sequence are cut; without any there is one of that length.
        windows = tuple(min(w, self.max_seq_len) for w in self.windows) or (self.max_seq_len,)
        assert min(windows) > 0, f"windows: expected > 0, found {windows}"
        assert not (self.linear and self.sink_tokens), "a linear cache knows no sinks"
        object.__setattr__(self, "windows", windows)

    @property
    def bubble(self) -> int:
        """Rows left free behind the sinks, so that what follows them begins with a block."""
        return -self.sink_tokens % self.tokens_per_block

    def window(self, layer: int) -> int:
        return self.windows[layer % len(self.windows)]

    def layers(self, window: int) -> list[int]:
        return [i for i in range(len(self.heads)) if self.window(i) == window]

    def distinct_windows(self) -> list[int]:
        """Ascending: the order of the managers."""
        return sorted({self.window(i) for i in range(len(self.heads))})

    def block_bytes(self, heads: int) -> int:
        """Keys, or values, of a block of one layer."""
        return heads * self.head_dim * self.tokens_per_block * self.element_bytes

    def token_bytes(self, window: int) -> int:
        """Keys and values of one token in all layers of a window."""
        heads = sum(self.heads[i] for i in self.layers(window))
        return heads * 2 * self.head_dim * self.element_bytes

    def max_token_num(self, window: int) -> int:
        """Rows after which no block is added any more."""
        return (max(window, self.max_seq_len) if self.linear else window) + self.bubble

    def temporary_rows(self, window: int) -> int:
        """Rows beyond a window that a long prompt gets while paged context attention reads it."""
        if not self.paged_context or self.max_input_len <= window:
            return 0
        return max(0, min(self.max_num_tokens, self.max_input_len - window))

    def blocks_per_sequence(self, window: int) -> int:
        rows = self.max_token_num(window) + self.temporary_rows(window)
        return ceil_div(min(rows, self.max_seq_len) if self.linear else rows, self.tokens_per_block)

    @property
    def table_width(self) -> int:
        """Blocks of a row of the offset table, the same for all pools: as the widest window needs."""
        return self.blocks_per_sequence(self.distinct_windows()[-1])


# Memory -------------------------------------------------------------------------------------------


def blocks_of_memory(
    config: CacheConfig, memory: int, max_tokens: int | None = None
) -> dict[int, int]:
    """Blocks of each window for ``memory`` bytes (what is free, times the fraction of it).

    1.0 shares by bytes · window, so that each window holds equally many full sequences, not
    counting the bubble; later releases share evenly.
    """
    windows = config.distinct_windows()
    weights = [1 if config.linear else config.token_bytes(w) * w for w in windows]
    out = {}
    for window, weight in zip(windows, weights, strict=True):
        share = float(np.float32(weight / sum(weights)))
        tokens = int(memory * share / config.token_bytes(window))
        if max_tokens is not None and not (config.linear and len(windows) > 1):
            tokens = min(tokens, max_tokens)
        out[window] = ceil_div(tokens, config.tokens_per_block)
        assert out[window] > 0, f"window {window}: no block"
    return out


def clamp_windows(
    config: CacheConfig, blocks: dict[int, int]
) -> tuple[CacheConfig, dict[int, int]]:
    """Windows made smaller until a sequence fits: what a server with too little memory runs with."""
    size, most, bubble = config.tokens_per_block, config.max_seq_len, config.bubble
    new = {}
    for window, count in blocks.items():
        needed = ceil_div(min(most, window) + bubble, size) + (config.linear and most > window)
        new[window] = window
        if needed > count:
            out = most - config.max_input_len
            out_needed = ceil_div(out + bubble, size)
            shorter = min(out + (count - out_needed) * size, most)
            new[window] = count * size if out_needed > count else shorter
    clamped = replace(config, windows=tuple(new[w] for w in config.windows))
    return clamped, {new[w]: count for w, count in blocks.items()}  # the last of equal ones wins


# Blocks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Memory [blocks, layers, K and V, heads, T, D] of the layers of a window with equally many heads."""

    window: int
    heads: int
    layers: tuple[int, ...]
    blocks: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        return self.blocks * len(self.layers) * 2 * self.block_bytes

    def entry(self, block: int, value: bool) -> int:
        """What the offset table says for a block: counted in keys, or values, of one layer."""
        return block * len(self.layers) * 2 + value


class WindowBlocks:
    """The blocks of one window: one list of free ones, whose numbers hold in all its pools."""

    def __init__(self, config: CacheConfig, window: int, blocks: int) -> None:
        self.config, self.window, self.blocks = config, window, blocks
        layers = config.layers(window)
        self.pools = [
            Pool(
                window,
                heads,
                tuple(i for i in layers if config.heads[i] == heads),
                blocks,
                config.block_bytes(heads),
            )
            for heads in sorted({config.heads[i] for i in layers})
        ]
        self.free = deque(range(blocks))
        self.of: dict[int, list[int]] = {}
        """Of each sequence, as its row of the table has them: those given back stay in it."""
        self.max_token_num = config.max_token_num(window)

    def owned(self, sequence: int, removed: int = 0) -> list[int]:
        return self.of[sequence][removed:]

    def prompt_blocks(self, prompt: int) -> int:
        """Of a new sequence: its whole prompt's, also if it is read in chunks."""
        rows = self.max_token_num + self.config.temporary_rows(self.window)
        return ceil_div(min(prompt + self.config.bubble, rows), self.config.tokens_per_block)

    def blocks_to_completion(self, tokens: int) -> int:
        """Of a sequence that will have so many tokens."""
        config = self.config
        rows = min(tokens, self.window + config.temporary_rows(self.window)) + config.bubble
        slides = config.linear and self.window < config.max_seq_len
        return ceil_div(rows, config.tokens_per_block) + slides

    def take(self, sequence: int) -> None:
        if not self.free:
            raise OutOfBlocks(f"window {self.window}: no block for sequence {sequence}")
        self.of[sequence].append(self.free.popleft())

    def add_sequence(self, sequence: int, prompt: int) -> None:
        assert sequence not in self.of
        self.of[sequence] = []
        for _ in range(self.prompt_blocks(prompt)):
            self.take(sequence)

    def grows(self, num_tokens: int) -> bool:
        """Does a token after ``num_tokens`` (bubble included) need another block?"""
        config = self.config
        if config.linear:
            return num_tokens % config.tokens_per_block == 0
        first = config.sink_tokens + config.bubble
        # The remainder keeps the sign of the dividend: below the sinks nothing wraps.
        row = first + int(math.fmod(num_tokens - first, self.max_token_num - first))
        return row % config.tokens_per_block == 0 and num_tokens + 1 <= self.max_token_num

    def remove_sequence(self, sequence: int, removed: int) -> list[int]:
        """Its blocks, which go to the end of the list of free ones, last block first."""
        blocks = self.owned(sequence, removed)
        self.free.extend(reversed(blocks))
        del self.of[sequence]
        return blocks


class CacheManager:
    """Windows, pools, sequences. ``blocks``: of each window."""

    def __init__(self, config: CacheConfig, blocks: dict[int, int]) -> None:
        assert sorted(blocks) == config.distinct_windows()
        self.config = config
        self.windows = [WindowBlocks(config, w, blocks[w]) for w in config.distinct_windows()]
        self.pools = [pool for window in self.windows for pool in window.pools]
        self.num_tokens: dict[int, int] = {}
        """Of each sequence; in a cyclic cache with the bubble."""
        self.removed: dict[int, int] = {}
        """Blocks given back from the front, one count for all windows."""

    def add_sequence(self, sequence: int, prompt: int) -> None:
        for window in self.windows:
            window.add_sequence(sequence, prompt)
        self.num_tokens[sequence] = prompt + self.config.bubble
        self.removed[sequence] = 0

    def add_token(self, sequence: int) -> None:
        """Before every generation step."""
        before = self.num_tokens[sequence]
        self.num_tokens[sequence] = before + 1
        for window in self.windows:
            if self.config.linear:
                self._give_back_front(window, sequence)
            if window.grows(before):
                window.take(sequence)

    def _give_back_front(self, window: WindowBlocks, sequence: int) -> None:
        size = self.config.tokens_per_block
        while self.num_tokens[sequence] - self.removed[sequence] * size >= window.window + size:
            window.free.append(window.of[sequence][self.removed[sequence]])
            self.removed[sequence] += 1

    def remove_sequence(self, sequence: int) -> dict[int, list[int]]:
        """The sequence ends or pauses. Its blocks by window."""
        del self.num_tokens[sequence]
        removed = self.removed.pop(sequence)
        return {w.window: w.remove_sequence(sequence, removed) for w in self.windows}

    # What the network is told ---------------------------------------------------------------------
    def pool_mapping(self) -> Ints:
        """int32 [attention layers, 2]: pool, and the layer's number in it."""
        out = np.zeros((len(self.config.heads), 2), np.int32)
        for number, pool in enumerate(self.pools):
            for place, layer in enumerate(pool.layers):
                out[layer] = number, place
        return out

    def window_sizes(self) -> Ints:
        """int32 [attention layers]."""
        return np.array([self.config.window(i) for i in range(len(self.config.heads))], np.int32)

    def pool_pointers(self, addresses: Sequence[int]) -> npt.NDArray[np.int64]:
        """int64 [pools, 2]: primary pools; there are no secondary ones."""
        return np.array([[address, 0] for address in addresses], np.int64)


class OffsetTable:
    """kv_cache_block_offsets, on the host and on the device.

    Of a sequence's row only the blocks that it has are written, and only as many columns go to the
    device as the longest sequence of the step has. Everything else is what an earlier step left
    there, whose rows lay elsewhere if its batch was of another size: of other sequences, of other
    pools.
    """

    def __init__(self, manager: CacheManager) -> None:
        self.manager, config = manager, manager.config
        self.width = config.table_width
        size = len(manager.pools) * config.max_num_sequences * 2 * self.width
        self._host, self._device = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def fill(self, batch: Sequence[int]) -> tuple[Ints, Ints]:
        """For the sequences of a call: int32 [pools, sequences, 2, width], host and device."""
        shape = len(self.manager.pools), len(batch), 2, self.width
        host, device = (x[: math.prod(shape)].reshape(shape) for x in (self._host, self._device))
        longest, number = 0, 0
        for window in self.manager.windows:
            for pool in window.pools:
                for row, sequence in enumerate(batch):
                    blocks = window.of[sequence]
                    longest = max(longest, len(blocks))
                    for value in (False, True):
                        entries = [pool.entry(block, value) for block in blocks]
                        host[number, row, int(value), : len(blocks)] = entries
                number += 1
        device[..., :longest] = host[..., :longest]
        return host, device
