"""What the config.json of a TensorRT-LLM engine says about its caches, and what its pools weigh.

The executor reports blocks, not bytes: a block of a window holds ``tokens_per_block`` tokens of every
attention layer with that window. Pure Python, for Razor and dense engines alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.cache_layout import dtype_bytes
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.stored import read_json
from trt_razor.sharding import ceil_div
from trt_razor.trtllm.options import CONFIG, SECTION


@dataclass(frozen=True)
class CacheSettings:
    """The caches of one rank of an engine, of its first pipeline stage.

    Attributes:
        tp_size, pp_size: ranks.
        razor: whether its attention layers are our plugin.
        max_batch_size, max_seq_len, max_num_tokens: limits that it was built with.
        vocab_size: of the model; logits have more columns where TensorRT-LLM padded it.
        chunked: whether prompts may be read in chunks.
        tokens_per_block, head_dim, element_bytes: of the paged pools.
        heads: KV heads of each attention layer on a rank.
        windows: window of each attention layer in tokens; max_seq_len unless the engine says less.
        window_list: what the server is to be told (it repeats the list); empty = nothing.
        sink_tokens: sinks that the cache manager knows; 0 with state slots and in dense engines.
        slot_bytes: of the state slots of one sequence.
    """

    tp_size: int
    pp_size: int
    razor: bool
    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    vocab_size: int
    chunked: bool
    tokens_per_block: int
    head_dim: int
    element_bytes: int
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    window_list: tuple[int, ...]
    sink_tokens: int
    slot_bytes: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def bubble(self) -> int:
        """Rows that the manager leaves unused between the sinks and the next block."""
        return -self.sink_tokens % self.tokens_per_block

    @property
    def distinct_windows(self) -> tuple[int, ...]:
        """Ascending, one block manager each."""
        return tuple(sorted(set(self.windows)))

    def block_bytes(self, window: int) -> int:
        """Keys and values of one block, over all attention layers with that window."""
        heads = sum(h for h, w in zip(self.heads, self.windows, strict=True) if w == window)
        return 2 * heads * self.tokens_per_block * self.head_dim * self.element_bytes

    def blocks(self, window: int, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens takes of a window's manager, while it is read."""
        rows = window + self.temporary_rows(window)
        return ceil_div(min(tokens, rows) + self.bubble, self.tokens_per_block)

    def temporary_rows(self, window: int) -> int:
        """Rows beyond a window that a long prompt takes while it is read in chunks."""
        longest = self.max_seq_len - 1
        if not self.chunked or longest <= window:
            return 0
        return min(self.max_num_tokens, longest - window)

    def sequence_blocks(self, tokens: int) -> int:
        """Blocks of all windows together: what the executor's statistics count."""
        return sum(self.blocks(w, tokens) for w in self.distinct_windows)

    def pool_bytes(self, tokens: int) -> int:
        """Bytes of the paged pools that a sequence of ``tokens`` tokens takes on this rank."""
        return sum(self.blocks(w, tokens) * self.block_bytes(w) for w in self.distinct_windows)

    def sequence_bytes(self, tokens: int) -> int:
        """Pools and state slots of a sequence on this rank."""
        return self.pool_bytes(tokens) + self.slot_bytes


@dataclass(frozen=True)
class WindowPool:
    """The pools of one window: all of their blocks, and what these take on a rank."""

    window: int
    blocks: int
    nbytes: int


@dataclass(frozen=True)
class PoolReport:
    """The KV memory that an executor has set aside on a rank.

    Attributes:
        windows: ascending by window.
        slot_bytes: of the state slots of all sequences together.
        source: where block counts come from, ``events`` or ``log``.
    """

    settings: CacheSettings
    windows: tuple[WindowPool, ...]
    slot_bytes: int
    source: str

    @property
    def pool_bytes(self) -> int:
        return sum(w.nbytes for w in self.windows)

    def sequences(self, tokens: int) -> int:
        """How many sequences of ``tokens`` tokens fit at the same time."""
        fit = [w.blocks // self.settings.blocks(w.window, tokens) for w in self.windows]
        return min(fit, default=0)

    def check(self) -> None:
        """Raises RazorError if not even one sequence of full length fits.

        TensorRT-LLM would shorten windows then; a Razor engine must not run with those.
        """
        longest = self.settings.max_seq_len
        for pool in self.windows:
            need = self.settings.blocks(pool.window, longest)
            if pool.blocks < need:
                raise RazorError(
                    f"KV cache: window {pool.window}: expected at least {need} blocks for one sequence of "
                    f"{longest} tokens, found {pool.blocks}; give it more memory "
                    "(free_gpu_memory_fraction), or build with a smaller --max-seq-len"
                )


def pool_report(
    settings: CacheSettings, blocks: Mapping[int, int], max_batch_size: int, source: str
) -> PoolReport:
    """Block counts of an executor, put beside what the engine's settings say.

    Args:
        blocks: window → primary blocks.
        max_batch_size: of the executor; it has so many state slots (times the pipeline stages).

    Raises:
        RazorError: other windows than planned.
    """
    planned = settings.distinct_windows
    if tuple(sorted(blocks)) != planned:
        raise RazorError(
            f"KV cache: expected the windows {_list(planned)}, found {_list(sorted(blocks))}: "
            "TensorRT-LLM changed them, or was told others; leave max_attention_window as the engine "
            "has it and give the cache enough memory"
        )
    pools = tuple(WindowPool(w, blocks[w], blocks[w] * settings.block_bytes(w)) for w in planned)
    slots = settings.slot_bytes * max_batch_size * settings.pp_size
    return PoolReport(settings, pools, slots, source)


# What TensorRT-LLM 1.0 - 1.2 logs, "seconday" included.
_POOL_LINE = re.compile(r"\[windowSize=(\d+)\] \{\.primaryBlocks=(\d+), \.second\w*Blocks=(\d+)\}")
_MEMORY_LINE = re.compile(r"Allocated ([\d.]+) GiB for max tokens in paged KV cache \((\d+)\)")
_CLAMP_LINE = re.compile(r"maxAttentionWindowVec too large to fit.*")


def blocks_in_log(text: str) -> dict[int, int]:
    """Window → primary blocks, from the lines that the cache manager writes at log level INFO."""
    return {int(window): int(primary) for window, primary, _ in _POOL_LINE.findall(text)}


def gib_in_log(text: str) -> float | None:
    """GiB of all pools as TensorRT-LLM states them (two digits), or None if it does not."""
    found = _MEMORY_LINE.findall(text)
    return sum(float(gib) for gib, _ in found) if found else None


def clamp_in_log(text: str) -> str | None:
    """The warning that windows were shortened, if there is one."""
    found = _CLAMP_LINE.search(text)
    return found[0].strip() if found else None


def read_settings(directory: Path) -> CacheSettings:
    """Settings of an engine directory; ours or one that trtllm-build made.

    Raises:
        UsageError: no config.json there. RazorError: one that lacks a field, or with a wrong value.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise UsageError(
            f"{directory}: no {CONFIG}: not an engine directory of TensorRT-LLM; build one with: "
            "trt-razor build --backend tensorrt-llm"
        )
    return settings_of(read_json(path, "the engine's config.json"), str(path))


def settings_of(config: Any, where: str) -> CacheSettings:
    """As ``read_settings``, of parsed JSON."""
    read = _Fields(config, where)
    tp = read.integer("pretrained_config.mapping.tp_size", 1)
    pp = read.integer("pretrained_config.mapping.pp_size", 1, default=1)
    hidden_layers = read.integer("pretrained_config.num_hidden_layers", 1)
    num_heads = read.integer("pretrained_config.num_attention_heads", 1)
    kv_heads = read.integer("pretrained_config.num_key_value_heads", 1, default=num_heads)
    hidden = read.integer("pretrained_config.hidden_size", 1)
    head_dim = read.integer("pretrained_config.head_size", 1, default=hidden // num_heads)
    max_seq_len = read.integer("build_config.max_seq_len", 1)
    max_batch_size = read.integer("build_config.max_batch_size", 1)
    fp8 = read.get("pretrained_config.quantization.kv_cache_quant_algo", None) == "FP8"
    try:
        element = dtype_bytes(str(read.get("pretrained_config.dtype")))
    except UsageError as e:
        raise RazorError(f"{where}: pretrained_config.dtype: {e}") from None

    types = read.get("pretrained_config.layer_types", None) or ["attention"]
    if not isinstance(types, list):
        raise RazorError(f"{where}: pretrained_config.layer_types: expected a list")
    layer_types = [types[i % len(types)] for i in range(hidden_layers)]
    attention = layer_types.count("attention")
    per_layer = read.integers("pretrained_config.num_kv_heads_per_layer")
    if per_layer and len(per_layer) != attention:
        raise RazorError(
            f"{where}: pretrained_config.num_kv_heads_per_layer: expected {attention} numbers, one for "
            f"each attention layer, found {len(per_layer)}"
        )
    heads = [ceil_div(h, tp) for h in per_layer] or [max(1, kv_heads // tp)] * attention
    told = read.integers("pretrained_config.runtime_defaults.max_attention_window")
    windows = [
        min(told[i % len(told)], max_seq_len) if told else max_seq_len for i in range(attention)
    ]
    stage = attention // pp

    slot_bytes = 0
    if "recurrent" in layer_types:
        rows = read.integer("pretrained_config.conv_kernel", 1) - 1
        ring = rows * read.integer("pretrained_config.rnn_conv_dim_size", 1) * element
        states = read.integer("pretrained_config.state_size", 1)
        comp = 4 * states * read.integer("pretrained_config.rnn_hidden_size", 1)
        slot_bytes = layer_types.count("recurrent") * (ring + comp)
    plugins = "build_config.plugin_config"
    return CacheSettings(
        tp_size=tp,
        pp_size=pp,
        razor=read.get(f"pretrained_config.{SECTION}", None) is not None,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        max_num_tokens=read.integer("build_config.max_num_tokens", 1, default=max_seq_len),
        vocab_size=read.integer("pretrained_config.vocab_size", 1),
        chunked=read.get(f"{plugins}.use_paged_context_fmha", False) is True
        and "recurrent" not in layer_types,
        tokens_per_block=read.integer(f"{plugins}.tokens_per_block", 1),
        head_dim=head_dim,
        element_bytes=1 if fp8 else element,
        heads=tuple(heads[:stage]),
        windows=tuple(windows[:stage]),
        window_list=tuple(told),
        sink_tokens=read.integer(
            "pretrained_config.runtime_defaults.sink_token_length", 0, default=0
        ),
        slot_bytes=slot_bytes,
    )


_MISSING = object()


class _Fields:
    """Typed reading of nested JSON by dotted names."""

    def __init__(self, data: Any, where: str) -> None:
        self.data, self.where = data, where

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """Raises RazorError for a field that is missing and has no default; null counts as missing."""
        value = self.data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
        if default is _MISSING:
            raise RazorError(
                f"{self.where}: {name}: missing; not the config.json of a TensorRT-LLM engine, or a "
                "damaged one: build the engine again"
            )
        return default

    def integer(self, name: str, low: int, default: Any = _MISSING) -> int:
        value = self.get(name, default)
        if type(value) is not int or value < low:
            raise RazorError(
                f"{self.where}: {name}: expected an integer >= {low}, found {value!r:.40}"
            )
        return value

    def integers(self, name: str) -> list[int]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
            raise RazorError(
                f"{self.where}: {name}: expected a list of numbers, found {value!r:.40}"
            )
        return value


def _list(values: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, values)) + "}"
