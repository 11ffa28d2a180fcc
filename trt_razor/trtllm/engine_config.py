"""What a Razor engine for TensorRT-LLM looks like: cache layers, windows, slots, fields of the plugin.

TensorRT-LLM knows one kind of KV head per cache layer, so a layer of the model becomes up to two:

* ``CYCLIC`` (1.0): one attention layer for its retrieval heads (window = max_seq_len) and one for its
  local heads (window W, wrapped around behind the sinks by the cache manager). Compensation tokens
  lie in the *bubble*, the rows that the manager leaves unused between the sinks and the next block.
* ``SLOTS`` (1.0 - 1.2): an attention layer for its retrieval heads and a *recurrent* layer whose
  state slots hold its local heads; to the runtime the engine is a hybrid model.

A kind that a layer has no heads of gets no cache layer. All counts are those of one tensor-parallel
rank unless said. Pure Python: no TensorRT-LLM, no NumPy. docs/tensorrt-llm.md tells it for users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_razor.cache_layout import dtype_bytes
from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.sharding import ceil_div
from trt_razor.trtllm.arguments import BuildArguments, build_arguments
from trt_razor.trtllm.checks import check_engine, check_policy, cyclic_window
from trt_razor.trtllm.options import (
    KV_DTYPES,
    SECTION,
    SECTION_VERSION,
    RazorSection,
    TrtLlmOptions,
    razor_section,
)
from trt_razor.trtllm.release import LocalCache, Release

__all__ = [
    "KV_DTYPES",
    "SECTION",
    "SECTION_VERSION",
    "BuildArguments",
    "LayerPlan",
    "RazorPlan",
    "RazorSection",
    "TrtLlmOptions",
    "build_arguments",
    "check_engine",
    "check_policy",
    "plan_engine",
    "razor_section",
    "shortest_cycle",
]

HYBRID_ARCHITECTURE = "RecurrentGemmaForCausalLM"
"""The one architecture that the runtime takes for attention and state layers mixed."""
SLOT_ALIGN = 16
"""Bytes: slots begin aligned for the widest loads of the kernels."""
MIN_STATE = 4
"""Elements of a state that is not used: the runtime gives no address to an empty one."""
_INT32 = (1 << 31) - 1


@dataclass(frozen=True)
class LayerPlan:
    """Where the heads of one layer of the model live.

    Attributes:
        num_retrieval, num_local: R and Lh of a rank.
        full_row, local_row: cache layer (row of the pool mapping and of the windows) of either kind,
            counted over the whole model; -1 = none.
        state_layer: number in the names of its state inputs (``conv_state_ptr_{n}``); -1 = none.
    """

    num_retrieval: int
    num_local: int
    full_row: int
    local_row: int
    state_layer: int


@dataclass(frozen=True)
class RazorPlan:
    """A Razor engine, as far as caches go. See the module.

    Attributes:
        layers: one for each layer of the model.
        head_dim, dtype, fp8: D; dtype of the model; whether caches are FP8.
        window: W, of local cache layers: N0 + a whole number of blocks; 0 without them.
        layer_types: kind of each runtime layer, ``attention`` or ``recurrent``.
        kv_heads: per attention layer, heads of all ranks together (the runtime divides by tp_size).
        windows: per attention layer. ring_slot_bytes, comp_slot_bytes: of a state slot; 0 = none.
    """

    local_cache: LocalCache
    policy: RazorPolicy
    layers: tuple[LayerPlan, ...]
    tp_size: int
    pp_size: int
    head_dim: int
    dtype: str
    fp8: bool
    max_seq_len: int
    tokens_per_block: int
    window: int
    layer_types: tuple[str, ...]
    kv_heads: tuple[int, ...]
    windows: tuple[int, ...]
    ring_slot_bytes: int
    comp_slot_bytes: int

    @property
    def sink_token_length(self) -> int:
        """The server's setting: the sinks of a cyclic cache; with slots the manager knows none."""
        return self.policy.sink_tokens if self.local_cache is LocalCache.CYCLIC else 0

    @property
    def bubble(self) -> int:
        """Rows between the sinks and the next block, in every cache layer."""
        return -self.sink_token_length % self.tokens_per_block

    @property
    def element_bytes(self) -> int:
        """Of a cached key or value."""
        return 1 if self.fp8 else dtype_bytes(self.dtype)

    @property
    def attention_layers(self) -> int:
        return len(self.kv_heads)

    def window_list(self) -> list[int]:
        """``max_attention_window_size`` of the server, which repeats it over the attention layers."""
        return shortest_cycle(self.windows)

    # Bytes ------------------------------------------------------------------------------------
    def block_bytes(self, heads: int) -> int:
        """Keys and values of one block of one cache layer with so many heads."""
        return 2 * heads * self.tokens_per_block * self.head_dim * self.element_bytes

    def temporary_rows(self, arguments: BuildArguments) -> int:
        """Rows beyond its window that a long prompt takes of a local cache layer while it is read in
        chunks: the manager gives it the blocks of a chunk more."""
        if not self.window or not arguments.chunked:
            return 0
        return max(0, min(arguments.max_num_tokens, arguments.max_input_len - self.window))

    def blocks(self, row: int, tokens: int, temporary: int = 0) -> int:
        """Blocks that a sequence of ``tokens`` tokens takes of a cache layer."""
        window = self.windows[row]
        if window < self.max_seq_len:
            window += temporary
        return ceil_div(min(tokens, window) + self.bubble, self.tokens_per_block)

    def pool_bytes(self, tokens: int, temporary: int = 0) -> int:
        """Bytes of the paged pools that a sequence of ``tokens`` tokens takes on one rank.

        Pipeline stages have equally many layers, and all layers the same heads then.

        Args:
            temporary: ``temporary_rows`` of an engine that reads prompts in chunks.
        """
        return sum(
            self.blocks(row, tokens, temporary) * self.block_bytes(heads // self.tp_size)
            for row, heads in enumerate(self.kv_heads[: self.attention_layers // self.pp_size])
        )

    def slot_bytes(self) -> int:
        """Bytes of state slots per sequence on one rank, reserved for every sequence of the batch."""
        return self.layer_types.count("recurrent") * (self.ring_slot_bytes + self.comp_slot_bytes)

    def sequence_bytes(self, tokens: int, temporary: int = 0) -> int:
        """KV memory of a sequence on one rank: pools and slots."""
        return self.pool_bytes(tokens, temporary) + self.slot_bytes()

    def dense_bytes(self, tokens: int) -> int:
        """What a dense engine takes for the same sequence on one rank."""
        stage = self.layers[: len(self.layers) // self.pp_size]
        heads = sum(layer.num_retrieval + layer.num_local for layer in stage)
        return ceil_div(tokens, self.tokens_per_block) * self.block_bytes(heads)

    def describe(self, temporary: int = 0) -> str:
        """One line for people: where the caches are and what they take."""
        if self.local_cache is LocalCache.CYCLIC:
            where = f"local heads in cache layers of their own, window {self.window:,}"
        else:
            where = f"local heads in state slots of {self.ring_slot_bytes + self.comp_slot_bytes:,} bytes"
        n = self.max_seq_len
        kv, dense = self.sequence_bytes(n, temporary), self.dense_bytes(n)
        return (
            f"{where}; {self.attention_layers} cache layers for {len(self.layers)} of the model; a "
            f"sequence of {n:,} tokens takes {kv:,} bytes of a GPU, {kv / dense:.1%} of dense"
        )

    # What TensorRT-LLM is told ----------------------------------------------------------------
    def pretrained_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``pretrained_config`` of the engine's config.json, from that of the checkpoint.

        The runtime reads from it how many cache layers there are, of which kind and with how many
        heads; the network was made with the checkpoint's own numbers.
        """
        out = dict(config)
        out["num_hidden_layers"] = len(self.layer_types)
        out["num_kv_heads_per_layer"] = list(self.kv_heads)
        out["runtime_defaults"] = {"max_attention_window": self.window_list()}
        if self.sink_token_length:  # 0 is no value for the runtime's settings: none at all is
            out["runtime_defaults"]["sink_token_length"] = self.sink_token_length
        if self.local_cache is LocalCache.SLOTS:
            out["razor_architecture"] = out.get("razor_architecture", config.get("architecture"))
            out["architecture"] = HYBRID_ARCHITECTURE
            out["layer_types"] = list(self.layer_types)
            out |= self.state_config()
        return out

    def state_config(self) -> dict[str, int]:
        """Sizes of the state slots in elements: not divided by the ranks; ``conv_state`` has the
        model's dtype (FP8 bytes lie in it two by two), ``rnn_state`` is float32."""
        return {
            "conv_kernel": 2,  # conv_state has conv_kernel - 1 rows
            "rnn_conv_dim_size": max(MIN_STATE, self.ring_slot_bytes // dtype_bytes(self.dtype)),
            "state_size": 1,
            "rnn_hidden_size": max(MIN_STATE, self.comp_slot_bytes // 4),
        }

    def plugin_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``plugin_config`` of the engine's config.json, from what the builder wrote."""
        out = dict(config)
        if self.local_cache is LocalCache.SLOTS:
            out["mamba_conv1d_plugin"] = self.dtype
            out["paged_state"] = True
        return out

    def plugin_fields(
        self, layer: int, first_layer: int, attention: Mapping[str, Any]
    ) -> dict[str, int | float]:
        """Fields of RazorGptAttention for a layer of the model.

        Args:
            layer: of the whole model. first_layer: of this pipeline stage, whose rows begin at 0.
            attention: ``num_heads``, ``num_kv_heads`` (of a rank), ``head_dim``, ``position``,
                ``rotary_dim`` and ``scale``, as the plugin's README has them.
        """
        mine = self.layers[layer]
        before = sum((p.full_row >= 0) + (p.local_row >= 0) for p in self.layers[:first_layer])

        def row(number: int) -> int:
            return number - before if number >= 0 else -1

        slots = mine.state_layer >= 0
        policy = self.policy
        return {
            **attention,
            "num_retrieval": mine.num_retrieval,
            "max_seq_len": self.max_seq_len,
            "sink_tokens": policy.sink_tokens,
            "min_window": policy.min_window,
            "compression": policy.compression or 0,
            "comp_tokens": policy.comp_tokens,
            "heavy_hitters": policy.heavy_hitters,
            "kv_cache_fp8": int(self.fp8),
            "tokens_per_block": self.tokens_per_block,
            "local_cache": self.local_cache.value,
            "layer_full": row(mine.full_row),
            "layer_local": row(mine.local_row),
            "window": self.window if mine.local_row >= 0 else 0,
            "ring_slot_bytes": self.ring_slot_bytes if slots else 0,
            "comp_slot_bytes": self.comp_slot_bytes if slots else 0,
        }


def plan_engine(
    spec: ModelSpec,
    section: RazorSection,
    max_seq_len: int,
    dtype: str,
    options: TrtLlmOptions,
    release: Release,
    prefill_chunk: int = 0,
) -> RazorPlan:
    """The plan of a Razor engine.

    Raises:
        UsageError: anything that TensorRT-LLM, its cache manager or our plugin cannot do, with the
            reason and the way out. Nothing long has started then.
    """
    check_engine(
        spec, max_seq_len, dtype, options, release, razor=True, prefill_chunk=prefill_chunk
    )
    policy, heads = section.policy, spec.num_kv_heads // options.tp_size
    check_policy(spec, policy, max_seq_len, dtype, options, release, prefill_chunk)
    _check_section(spec, section, options)
    cache = options.local_cache or release.default_cache
    cyclic = cache is LocalCache.CYCLIC
    counts = section.num_retrieval
    if all(r == 0 for r in counts):
        raise UsageError(
            "head map: no retrieval heads at all; TensorRT-LLM needs one layer with a paged cache that "
            "keeps every token: choose at least one head"
        )
    if all(r == heads for r in counts):
        raise UsageError(
            f"head map: every KV head retrieves (after rounding up to equal counts on {options.tp_size} "
            "ranks), so there is nothing to compress; build without --razor, or with fewer ranks"
        )
    layers: list[LayerPlan] = []
    types: list[str] = []
    kinds: list[tuple[int, bool]] = []  # attention layers: heads of a rank, local?
    for r in counts:
        local = heads - r
        full_row = local_row = state = -1
        if r:
            full_row = len(kinds)
            kinds.append((r, False))
            types.append("attention")
        if local and cyclic:
            local_row = len(kinds)
            kinds.append((local, True))
            types.append("attention")
        elif local:
            state = len(types)
            types.append("recurrent")
        layers.append(LayerPlan(r, local, full_row, local_row, state))

    element = 1 if options.fp8 else dtype_bytes(dtype)
    window = ring_bytes = comp_bytes = 0
    if cyclic:
        window = cyclic_window(policy, max_seq_len, options.tokens_per_block)
    else:
        most = max(layer.num_local for layer in layers)  # one size of slot for all layers
        ring_bytes = _aligned(2 * most * policy.local_rows(max_seq_len) * spec.head_dim * element)
        comp_bytes = _aligned(4 * most * policy.comp_tokens * (2 * spec.head_dim + 2))
        comp_bytes = max(comp_bytes, SLOT_ALIGN)
        if max(ring_bytes // dtype_bytes(dtype), comp_bytes // 4) > _INT32:
            raise UsageError(
                f"max_seq_len: the window of {most} local heads takes {ring_bytes:,} bytes per sequence "
                "and layer, more than a state slot can have; lower --max-seq-len, raise --compression "
                "or --tp-size"
            )
    return RazorPlan(
        local_cache=cache,
        policy=policy,
        layers=tuple(layers),
        tp_size=options.tp_size,
        pp_size=options.pp_size,
        head_dim=spec.head_dim,
        dtype=dtype,
        fp8=options.fp8,
        max_seq_len=max_seq_len,
        tokens_per_block=options.tokens_per_block,
        window=window,
        layer_types=tuple(types),
        kv_heads=tuple(n * options.tp_size for n, _ in kinds),
        windows=tuple(window if local else max_seq_len for _, local in kinds),
        ring_slot_bytes=ring_bytes,
        comp_slot_bytes=comp_bytes,
    )


def _check_section(spec: ModelSpec, section: RazorSection, options: TrtLlmOptions) -> None:
    heads = spec.num_kv_heads // options.tp_size
    if section.model != spec.fingerprint():
        raise UsageError(
            f"checkpoint: its heads were ordered for another model than '{spec.name}'; convert it again"
        )
    if section.tp_size != options.tp_size:
        raise UsageError(
            f"tp_size: the checkpoint's heads are ordered for {section.tp_size} ranks, found "
            f"{options.tp_size}; convert it for {options.tp_size}"
        )
    counts = section.num_retrieval
    if len(counts) != spec.num_layers or any(r > heads for r in counts):
        raise UsageError(
            f"checkpoint: {SECTION}.num_retrieval: expected {spec.num_layers} counts of 0..{heads}, "
            f"found {list(counts)!r:.60}"
        )
    if options.pp_size > 1 and (len(set(counts)) > 1 or not 0 < counts[0] < heads):
        raise UsageError(
            f"pp_size: {options.pp_size} needs the same number of retrieval heads in every layer, and "
            f"local heads beside them; found {min(counts)}..{max(counts)} of {heads} on a rank; use "
            "--tp-size instead, or a head map with equal layers"
        )


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % SLOT_ALIGN


def shortest_cycle(values: Sequence[int]) -> list[int]:
    """The shortest list that repeated gives ``values``: [8, 4, 8, 4] is [8, 4]."""
    for size in range(1, len(values) + 1):
        if len(values) % size == 0 and list(values) == list(values[:size]) * (len(values) // size):
            return list(values[:size])
    return []
