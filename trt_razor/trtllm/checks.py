"""What TensorRT-LLM, its cache manager or our plugin cannot do, refused before anything long starts."""

from __future__ import annotations

from trt_razor.cache_layout import dtype_bytes
from trt_razor.errors import UsageError
from trt_razor.kernels.layer import DTYPES, HEAD_DIMS
from trt_razor.models.spec import ModelSpec
from trt_razor.planner import check_seq_len
from trt_razor.policy import RazorPolicy
from trt_razor.sharding import ceil_div
from trt_razor.trtllm.options import KV_DTYPES, TrtLlmOptions
from trt_razor.trtllm.ranks import check_ranks
from trt_razor.trtllm.release import LocalCache, Release


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
    if spec.intermediate_size % options.tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of the MLP's {spec.intermediate_size} columns of "
            f"'{spec.name}', found {options.tp_size}"
        )
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
            "prefill_chunk: prompts cannot be read in chunks with an FP8 cache: TensorRT-LLM has paged "
            "context attention for it with FP8 weights alone, which has not been tried here; use "
            "--prefill-chunk 0"
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


def check_policy(
    spec: ModelSpec,
    policy: RazorPolicy,
    max_seq_len: int,
    dtype: str,
    options: TrtLlmOptions,
    release: Release,
    prefill_chunk: int = 0,
) -> None:
    """Refuse a policy that saves nothing, or whose state has no place, whatever the heads.

    Raises:
        UsageError: naming the option, the reason and the way out.
    """
    if policy.compression == 1 or policy.dropped(max_seq_len) == 0:
        raise UsageError(
            f"max_seq_len: {max_seq_len} tokens all fit into sinks and window, so nothing would be "
            "compressed; raise --max-seq-len, lower --min-window, or build without --razor"
        )
    if policy.heavy_hitters:
        raise UsageError(
            f"heavy_hitters: {policy.heavy_hitters}: the caches that TensorRT-LLM manages have no rows for "
            "them; use --heavy-hitters 0, or --backend tensorrt or onnxruntime"
        )
    if spec.position == "alibi" and policy.comp_tokens > 1:
        raise UsageError(
            f"comp_tokens: {policy.comp_tokens} with ALiBi ({spec.name}): only 0 or 1 is defined there; "
            "use --comp-tokens 1"
        )
    if (options.local_cache or release.default_cache) is not LocalCache.CYCLIC:
        return
    block = options.tokens_per_block
    window = cyclic_window(policy, max_seq_len, block)
    if window > max_seq_len:
        raise UsageError(
            f"max_seq_len: the window of local heads, {window} tokens in whole blocks of {block}, must not "
            f"exceed it, found {max_seq_len}; raise --max-seq-len, lower --min-window or "
            "--tokens-per-block, or build without --razor"
        )
    element = 1 if options.fp8 else dtype_bytes(dtype)
    bubble = -policy.sink_tokens % block
    room = bubble * spec.head_dim * element // (4 * (spec.head_dim + 2))
    if policy.comp_tokens > room:
        raise UsageError(
            f"comp_tokens: at most {room} fit behind {policy.sink_tokens} sinks in a block of {block} "
            f"tokens, found {policy.comp_tokens}; use fewer, a larger --tokens-per-block, or "
            "--local-cache slots"
        )
    if prefill_chunk and bubble == 0:
        # Chunks need paged context attention, and only the bubble keeps the server from reusing blocks then.
        raise UsageError(
            f"prefill_chunk: {prefill_chunk} with {policy.sink_tokens} sinks, whole blocks of {block} tokens: "
            "TensorRT-LLM would reuse cached prompts, whose dropped tokens are gone; use --prefill-chunk 0, "
            "or sinks that are no multiple of --tokens-per-block"
        )
    if policy.comp_tokens and policy.sink_tokens > block:
        # The manager gives a prompt the blocks of its own tokens: a short one lacks the sinks' last.
        raise UsageError(
            f"sink_tokens: at most tokens_per_block = {block} with compensation tokens behind them, found "
            f"{policy.sink_tokens}; use fewer, a larger --tokens-per-block, or --local-cache slots"
        )


def cyclic_window(policy: RazorPolicy, max_seq_len: int, tokens_per_block: int) -> int:
    """W of local cache layers: sinks and a ring of whole blocks."""
    ring = ceil_div(policy.ring_rows(max_seq_len), tokens_per_block) * tokens_per_block
    return policy.sink_tokens + ring


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
