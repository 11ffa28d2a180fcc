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
from trt_razor.headmap import HeadMap
from trt_razor.kernels.layer import DTYPES, HEAD_DIMS
from trt_razor.models.spec import ModelSpec
from trt_razor.planner import check_seq_len
from trt_razor.policy import RazorPolicy
from trt_razor.sharding import ceil_div
from trt_razor.trtllm.ranks import RankLayout, check_ranks
from trt_razor.trtllm.release import LocalCache, Release

SECTION = "razor"
"""Key of ``RazorSection`` in the config.json of a checkpoint and of an engine."""
SECTION_VERSION = 1
HYBRID_ARCHITECTURE = "RecurrentGemmaForCausalLM"
"""The one architecture that the runtime takes for attention and state layers mixed."""
SLOT_ALIGN = 16
"""Bytes: slots begin aligned for the widest loads of the kernels."""
MIN_STATE = 4
"""Elements of a state that is not used: the runtime gives no address to an empty one."""
_INT32 = (1 << 31) - 1
KV_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class TrtLlmOptions:
    """What decides a TensorRT-LLM engine beside the options that all backends have.

    Attributes:
        tp_size, pp_size: tensor-parallel ranks, pipeline stages.
        kv_dtype: ``auto`` = the engine's dtype, or ``fp8`` (E4M3).
        tokens_per_block: of the paged pools; a power of two, 8 .. 1024.
        max_num_tokens: tokens of one step, all requests together; None = as much as the longest
            prompt read in one go needs (or ``prefill_chunk`` where prompts are read in chunks).
        local_cache: None = the release's default.
        gather_logits: build with context logits, for evaluation.
    """

    tp_size: int = 1
    pp_size: int = 1
    kv_dtype: str = "auto"
    tokens_per_block: int = 32
    max_num_tokens: int | None = None
    local_cache: LocalCache | None = None
    gather_logits: bool = False

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def fp8(self) -> bool:
        return self.kv_dtype == "fp8"


@dataclass(frozen=True)
class RazorSection:
    """What a converted checkpoint says about its heads: the ``razor`` object of its config.json.

    Kept small, because TensorRT-LLM prints it in a line of its log.

    Attributes:
        model: fingerprint of the model. heads: digest of its (equalised) head map.
        tp_size: ranks the heads were ordered for; an engine for another number needs a conversion.
        num_retrieval: R of a rank, per layer of the whole model.
    """

    model: str
    heads: str
    tp_size: int
    num_retrieval: tuple[int, ...]
    policy: RazorPolicy

    def to_json(self) -> dict[str, Any]:
        return {
            "version": SECTION_VERSION,
            "model": self.model,
            "heads": self.heads,
            "tp_size": self.tp_size,
            "num_retrieval": list(self.num_retrieval),
            "policy": self.policy.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "config.json") -> RazorSection:
        """Raises UsageError naming the wrong field."""
        prefix = f"{where}: {SECTION}"
        if not isinstance(data, Mapping):
            raise UsageError(
                f"{prefix}: expected an object, found {type(data).__name__}; convert the checkpoint "
                "with: trt-razor build --backend tensorrt-llm --razor --convert-only"
            )
        if data.get("version") != SECTION_VERSION:
            raise UsageError(
                f"{prefix}.version: expected {SECTION_VERSION}, found {data.get('version')!r:.20}; "
                "convert the checkpoint again"
            )
        for name, kind in (("model", str), ("heads", str), ("tp_size", int), ("policy", Mapping)):
            if not isinstance(data.get(name), kind) or isinstance(data.get(name), bool):
                raise UsageError(
                    f"{prefix}.{name}: expected {kind.__name__}, found {data.get(name)!r:.40}"
                )
        counts = data.get("num_retrieval")
        if not isinstance(counts, list) or not all(type(r) is int and r >= 0 for r in counts):
            raise UsageError(
                f"{prefix}.num_retrieval: expected a list of counts, found {counts!r:.40}"
            )
        policy = RazorPolicy.from_json(data["policy"], f"{prefix}.policy")
        return cls(data["model"], data["heads"], data["tp_size"], tuple(counts), policy)


def razor_section(
    spec: ModelSpec, head_map: HeadMap, layout: RankLayout, policy: RazorPolicy
) -> RazorSection:
    """The section for a checkpoint with ``layout``, made of the equalised ``head_map``."""
    return RazorSection(
        spec.fingerprint(), head_map.digest(), layout.tp_size, layout.num_retrieval, policy
    )


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

    def blocks(self, row: int, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` tokens takes of a cache layer."""
        return ceil_div(min(tokens, self.windows[row]) + self.bubble, self.tokens_per_block)

    def pool_bytes(self, tokens: int) -> int:
        """Bytes of the paged pools that a sequence of ``tokens`` tokens takes on one rank."""
        return sum(
            self.blocks(row, tokens) * self.block_bytes(heads // self.tp_size)
            for row, heads in enumerate(self.kv_heads)
        )

    def slot_bytes(self) -> int:
        """Bytes of state slots per sequence on one rank, reserved for every sequence of the batch."""
        return self.layer_types.count("recurrent") * (self.ring_slot_bytes + self.comp_slot_bytes)

    def sequence_bytes(self, tokens: int) -> int:
        """KV memory of a sequence on one rank of one pipeline stage's whole: pools and slots."""
        return self.pool_bytes(tokens) + self.slot_bytes()

    def dense_bytes(self, tokens: int) -> int:
        """What a dense engine takes for the same sequence."""
        heads = sum(layer.num_retrieval + layer.num_local for layer in self.layers)
        return ceil_div(tokens, self.tokens_per_block) * self.block_bytes(heads)

    # What TensorRT-LLM is told ----------------------------------------------------------------
    def pretrained_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``pretrained_config`` of the engine's config.json, from that of the checkpoint.

        The runtime reads from it how many cache layers there are, of which kind and with how many
        heads; the network was made with the checkpoint's own numbers.
        """
        out = dict(config)
        out["num_hidden_layers"] = len(self.layer_types)
        out["num_kv_heads_per_layer"] = list(self.kv_heads)
        out["runtime_defaults"] = {
            "max_attention_window": self.window_list(),
            "sink_token_length": self.sink_token_length,
        }
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
    if policy.compression == 1 or policy.dropped(max_seq_len) == 0:
        raise UsageError(
            f"max_seq_len: {max_seq_len} tokens all fit into sinks and window, so nothing would be "
            "compressed; raise --max-seq-len, lower --min-window, or build without --razor"
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

    ring = policy.ring_rows(max_seq_len)
    element = 1 if options.fp8 else dtype_bytes(dtype)
    window = ring_bytes = comp_bytes = 0
    if cyclic:
        window = _cyclic_window(spec, policy, max_seq_len, options, element, ring)
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


def check_engine(
    spec: ModelSpec,
    max_seq_len: int,
    dtype: str,
    options: TrtLlmOptions,
    release: Release,
    razor: bool,
    prefill_chunk: int = 0,
) -> None:
    """Refuse what does not depend on the heads, for Razor and for dense engines.

    Args:
        prefill_chunk: 0 = prompts are read in one go.

    Raises:
        UsageError: naming the option, the reason and the way out.
    """
    check_seq_len(spec, max_seq_len)
    check_ranks(spec, options.tp_size, razor)
    if dtype not in DTYPES:
        raise UsageError(
            f"dtype: expected {' or '.join(DTYPES)} for --backend tensorrt-llm, found {dtype}"
        )
    if options.kv_dtype not in KV_DTYPES:
        raise UsageError(
            f"kv_dtype: expected {' or '.join(KV_DTYPES)}, found {options.kv_dtype!r:.20}"
        )
    block = options.tokens_per_block
    if not 8 <= block <= 1024 or block & (block - 1):
        raise UsageError(f"tokens_per_block: expected a power of two in 8..1024, found {block}")
    if options.max_num_tokens is not None and options.max_num_tokens < 1:
        raise UsageError(f"max_num_tokens: expected >= 1, found {options.max_num_tokens}")
    if spec.rope.scaling == "yarn":
        raise UsageError(
            f"{spec.name}: rope scaling 'yarn': TensorRT-LLM's attention layers make no YaRN tables for "
            "this architecture; use --backend tensorrt or onnxruntime, or a config.json without it and "
            "a shorter --max-seq-len"
        )
    _check_pipeline(spec, options)
    if prefill_chunk and options.fp8:
        raise UsageError(
            "prefill_chunk: prompts cannot be read in chunks with an FP8 cache and unquantised weights "
            "(TensorRT-LLM then has no paged context attention); use --prefill-chunk 0"
        )
    if not razor:
        return
    if spec.head_dim not in HEAD_DIMS:
        raise UsageError(
            f"{spec.name}: head_dim: the plugin has kernels for {', '.join(map(str, HEAD_DIMS))}, found "
            f"{spec.head_dim}; build with --backend onnxruntime"
        )
    cache = options.local_cache or release.default_cache
    if cache not in release.local_caches:
        raise UsageError(
            f"local_cache: TensorRT-LLM {release.version} has no cyclic cache with sinks any more; "
            "leave --local-cache out, or use 1.0"
        )
    if cache is LocalCache.SLOTS:
        if options.pp_size > 1:
            raise UsageError(
                f"pp_size: {options.pp_size} with local heads in state slots: TensorRT-LLM's runtime "
                "finds the slots of one pipeline stage only; use --tp-size, or TensorRT-LLM 1.0"
            )
        if prefill_chunk:
            raise UsageError(
                f"prefill_chunk: {prefill_chunk} with local heads in state slots: TensorRT-LLM reads "
                "the prompts of hybrid models in one go; use --prefill-chunk 0, or TensorRT-LLM 1.0"
            )


def _check_pipeline(spec: ModelSpec, options: TrtLlmOptions) -> None:
    pp = options.pp_size
    if pp < 1:
        raise UsageError(f"pp_size: expected >= 1, found {pp}")
    if spec.num_layers % pp:
        raise UsageError(
            f"pp_size: expected a divisor of the {spec.num_layers} layers of '{spec.name}', found {pp}: "
            "a stage would end between the two cache layers of a layer"
        )
    if pp > 1 and spec.architecture == "baichuan":
        raise UsageError(
            f"pp_size: {pp}: TensorRT-LLM's Baichuan has no pipeline parallelism; use --tp-size"
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
    if spec.position == "alibi" and section.policy.comp_tokens > 1:
        raise UsageError(
            f"comp_tokens: {section.policy.comp_tokens} with ALiBi ({spec.name}): only 0 or 1 is defined "
            "there; use --comp-tokens 1"
        )


def _cyclic_window(
    spec: ModelSpec,
    policy: RazorPolicy,
    max_seq_len: int,
    options: TrtLlmOptions,
    element: int,
    ring: int,
) -> int:
    """W: sinks and a ring of whole blocks."""
    block = options.tokens_per_block
    window = policy.sink_tokens + ceil_div(ring, block) * block
    if window > max_seq_len:
        raise UsageError(
            f"max_seq_len: the window of local heads, {window} tokens in whole blocks of {block}, must not "
            f"exceed it, found {max_seq_len}; raise --max-seq-len, lower --min-window or "
            "--tokens-per-block, or build without --razor"
        )
    bubble = -policy.sink_tokens % block
    room = bubble * spec.head_dim * element // (4 * (spec.head_dim + 2))
    if policy.comp_tokens > room:
        raise UsageError(
            f"comp_tokens: at most {room} fit behind {policy.sink_tokens} sinks in a block of {block} "
            f"tokens, found {policy.comp_tokens}; use fewer, a larger --tokens-per-block, or "
            "--local-cache slots"
        )
    return window


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % SLOT_ALIGN


def shortest_cycle(values: Sequence[int]) -> list[int]:
    """The shortest list that repeated gives ``values``: [8, 4, 8, 4] is [8, 4]."""
    for size in range(1, len(values) + 1):
        if len(values) % size == 0 and list(values) == list(values[:size]) * (len(values) // size):
            return list(values[:size])
    return []


@dataclass(frozen=True)
class BuildArguments:
    """What TensorRT-LLM's builder is told, apart from the network.

    Attributes:
        max_input_len: longest prompt. max_num_tokens: of one step, all requests together.
        chunked: prompts may be read in chunks (needs paged context attention).
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    tokens_per_block: int
    chunked: bool
    gather_context_logits: bool

    def build_config(self) -> dict[str, Any]:
        """Keyword arguments of ``BuildConfig``."""
        return {
            "max_batch_size": self.max_batch_size,
            "max_input_len": self.max_input_len,
            "max_seq_len": self.max_seq_len,
            "max_num_tokens": self.max_num_tokens,
            "max_beam_width": 1,
            "gather_context_logits": self.gather_context_logits,
        }

    def plugin_config(self) -> dict[str, Any]:
        """Attributes to set on ``PluginConfig``.

        Paged context attention is what reuse of cached prompts hangs on, and Razor caches cannot be
        reused: a prefix would bring its full rows but not its compressed ones.
        """
        return {
            "gpt_attention_plugin": "auto",
            "gemm_plugin": "auto",
            "remove_input_padding": True,
            "context_fmha": True,
            "use_paged_context_fmha": self.chunked,
            "use_fp8_context_fmha": False,
            "tokens_per_block": self.tokens_per_block,
            "reduce_fusion": False,
            "user_buffer": False,
            "norm_quant_fusion": False,
            "streamingllm": False,
            "multiple_profiles": False,
        }


def build_arguments(
    max_seq_len: int, max_batch_size: int, options: TrtLlmOptions, prefill_chunk: int
) -> BuildArguments:
    """Sizes of an engine. Without chunks a step must take the longest prompt whole.

    Raises:
        UsageError: ``max_num_tokens`` below what a step needs.
    """
    chunk = prefill_chunk if 0 < prefill_chunk < max_seq_len else 0
    needed = chunk or max_seq_len
    tokens = options.max_num_tokens or max(needed, max_batch_size)
    if tokens < max_batch_size:
        raise UsageError(
            f"max_num_tokens: expected at least max_batch_size = {max_batch_size}, one token of every "
            f"sequence, found {tokens}"
        )
    if chunk and tokens < options.tokens_per_block:
        raise UsageError(
            f"max_num_tokens: expected at least a block of {options.tokens_per_block} tokens, found {tokens}"
        )
    return BuildArguments(
        max_batch_size=max_batch_size,
        max_input_len=max_seq_len - 1 if chunk else min(max_seq_len - 1, tokens),
        max_seq_len=max_seq_len,
        max_num_tokens=tokens,
        tokens_per_block=options.tokens_per_block,
        chunked=bool(chunk),
        gather_context_logits=options.gather_logits,
    )
