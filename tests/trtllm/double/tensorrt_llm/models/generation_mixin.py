"""``GenerationMixin``: the inputs of an engine, their names, order, shapes, dtypes and ranges.

Read (about 1.0; the same in what could be read of 1.1 - 1.2): everything here. Only what our engines
use is doubled: paged caches, packed input, the attention plugin, one profile, no LoRA, no prompt
tables, no speculative decoding. ``streamingllm`` adds room for one more block to a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import tensorrt as trt
from tensorrt.errors import require

from ..functional import Tensor
from ..mapping import Mapping

try:  # 1.2, inferred
    from ..llmapi.kv_cache_type import KVCacheType
except ModuleNotFoundError:
    from ..bindings import KVCacheType


def default_range(
    max_range: int, offset: int = 0, min_range: int = 1, opt_offset: int = 0
) -> list[int]:
    """[min, opt, max] of a profile; ``opt`` lies in the middle."""
    opt = (min_range + opt_offset + max_range) // 2
    return [min_range + offset, opt + offset, max_range + offset]


def _batch_range(max_batch_size: int, max_beam_width: int, opt_batch_size: int | None) -> list[int]:
    most = max_batch_size * max_beam_width
    return [1, opt_batch_size * max_beam_width, most] if opt_batch_size else default_range(most)


def _input(name: str, dtype: Any, shape: list[int], profiles: int, **dims: Any) -> Tensor:
    ranges = OrderedDict((dim, [size] * profiles) for dim, size in dims.items())
    return Tensor(name=name, dtype=dtype, shape=shape, dim_range=ranges)


class GenerationMixin:
    default_range = staticmethod(default_range)

    @staticmethod
    def has_ctx_gen_opt_profiles(
        use_gpt_attention_plugin: bool = False,
        use_gemm_plugin: bool = False,
        use_mamba_conv1d_plugin: bool = False,
        remove_input_padding: bool = False,
        paged_state: bool = False,
        kv_cache_type: KVCacheType = KVCacheType.CONTINUOUS,
    ) -> bool:
        """Whether prompts and generation need profiles of their own: not for in-flight batching."""
        attention = use_gpt_attention_plugin and kv_cache_type is not KVCacheType.CONTINUOUS
        state = use_mamba_conv1d_plugin and paged_state
        in_flight = remove_input_padding and (attention or state)
        return not (in_flight or (use_gpt_attention_plugin and use_gemm_plugin))

    @staticmethod
    def get_profiles_ranges(
        *,
        max_batch_size: int,
        max_beam_width: int,
        max_input_len: int,
        max_num_tokens: int,
        max_draft_len: int,
        opt_batch_size: int | None,
        opt_num_tokens: int | None,
        enable_ctx_gen_opt_profiles: bool,
        multiple_profiles: bool,
        kv_cache_type: KVCacheType = KVCacheType.CONTINUOUS,
    ) -> tuple[int, dict[str, list[list[int]]]]:
        require(not enable_ctx_gen_opt_profiles and not multiple_profiles, "one profile only")
        require(max_draft_len == 0, "draft tokens are not in the double")
        most = max_batch_size * max_beam_width
        opt = opt_num_tokens if opt_num_tokens is not None else min(max_num_tokens, most)
        batch = _batch_range(max_batch_size, max_beam_width, opt_batch_size)
        tokens = [1, opt, max_num_tokens]
        return 1, {
            "bb_range": [batch],
            "bbd_range": [batch],
            "inlen_range": [[1, 1, max_input_len]],
            "position_ids_inlen_range": [[1, 1, max_input_len]],
            "num_tokens_range": [tokens],
            "position_ids_num_tokens_range": [tokens],
        }

    def prepare_attention_inputs(
        self,
        *,
        max_batch_size: int,
        max_beam_width: int,
        max_input_len: int,
        max_seq_len: int,
        num_kv_heads: int,
        head_size: int,
        num_layers: int,
        kv_dtype: Any,
        kv_cache_type: KVCacheType,
        num_profiles: int = 1,
        enable_ctx_gen_opt_profiles: bool = False,
        remove_input_padding: bool = False,
        use_gpt_attention_plugin: bool = False,
        tokens_per_block: int = 32,
        mapping: Mapping | None = None,
        streamingllm: bool = False,
        attn_layer_idx: list[int] | None = None,
        opt_batch_size: int | None = None,
        num_kv_heads_per_layer: list[int] | None = None,
    ) -> dict[str, Any]:
        require(kv_cache_type is KVCacheType.PAGED, f"{kv_cache_type}: only PAGED is doubled")
        require(use_gpt_attention_plugin and remove_input_padding, "plugin and packed input only")
        mapping = Mapping() if mapping is None else mapping
        layers = mapping.pp_layers(num_layers)
        local = layers
        if attn_layer_idx is not None:
            local = [i for i in layers if i in attn_layer_idx]
        # As many caches as a stage before this one has layers.
        previous = len(layers) if mapping.pp_rank == 0 else layers[0] // mapping.pp_rank
        p, rows = num_profiles, len(local)
        batch = _batch_range(max_batch_size, max_beam_width, opt_batch_size)
        tokens = max_seq_len
        tokens += tokens_per_block - 1 if streamingllm else 0
        tokens += tokens_per_block if max_beam_width > 1 else 0
        blocks = [-(-n // tokens_per_block) for n in default_range(tokens)]

        def scalars(name: str, dtype: Any, count: int, dim: str) -> None:
            out[name] = _input(name, dtype, [count], p, **{dim: count})

        out: dict[str, Any] = {"attention_mask": None, "past_key_value": [None] * previous}
        # In the order in which the engine's inputs are made.
        for name in _PER_SEQUENCE:
            out[name] = _input(name, trt.int32, [-1], p, batch_size_beam_width=batch)
        scalars("host_runtime_perf_knobs", trt.int64, 16, "perf_knob_size")
        scalars("host_context_progress", trt.int64, 1, "context_progress_size")
        scalars("host_max_attention_window_sizes", trt.int32, rows, "num_layers")
        scalars("host_sink_token_length", trt.int32, 1, "scalar")
        sizes: dict[str, Any] = {
            "batch_size_cache": default_range(max_batch_size),
            "beam_width": default_range(max_beam_width),
            "max_seq_len": default_range(max_seq_len),
        }
        name = "cache_indirection"
        out[name] = _input(name, trt.int32, [-1, -1, -1], p, **sizes)
        for name in ("kv_cache_block_offsets", "host_kv_cache_block_offsets"):
            sizes = {"num_kv_cache_pools": [1, 1, rows], "batch_size_beam_width": batch}
            sizes |= {"kv": 2, "max_blocks_per_seq": blocks}
            out[name] = _input(name, trt.int32, [-1, -1, 2, -1], p, **sizes)
        name = "host_kv_cache_pool_pointers"
        sizes = {"num_pools_layers": [1, 1, len(layers)], "num_pools_kv": 2}
        out[name] = _input(name, trt.int64, [-1, 2], p, **sizes)
        name = "host_kv_cache_pool_mapping"
        sizes = {"pools_mapping": rows, "layer_cache_pool_locator": 2}
        out[name] = _input(name, trt.int32, [rows, 2], p, **sizes)
        return {key: out[key] for key in _ATTENTION_KEYS}

    def prepare_basic_inputs(
        self,
        *,
        max_batch_size: int,
        max_beam_width: int,
        max_input_len: int,
        max_seq_len: int,
        max_num_tokens: int,
        hidden_size: int,
        num_kv_heads: int,
        head_size: int,
        num_layers: int,
        kv_dtype: Any,
        kv_cache_type: KVCacheType,
        remove_input_padding: bool = False,
        use_gpt_attention_plugin: bool = False,
        use_gemm_plugin: bool = False,
        tokens_per_block: int = 32,
        gather_context_logits: bool = False,
        dtype: Any = None,
        num_heads: int | None = None,
        mapping: Mapping | None = None,
        opt_num_tokens: int | None = None,
        prompt_embedding_table_size: int = 0,
        position_encoding_2d: bool = False,
        use_lora_plugin: Any = False,
        lora_target_modules: Any = None,
        speculative_decoding_draft_tokens_external: bool = False,
        spec_decoding_is_generation_length_variable: bool = False,
        max_draft_len: int = 0,
        multiple_profiles: bool = False,
        streamingllm: bool = False,
        opt_batch_size: int | None = None,
        pp_reduce_scatter: bool = False,
        mrope_rotary_cos_sin_size: int | None = None,
    ) -> dict[str, Any]:
        unused = (prompt_embedding_table_size, use_lora_plugin, max_draft_len, position_encoding_2d)
        if any(unused) or mrope_rotary_cos_sin_size:
            raise NotImplementedError("prompt tables, LoRA, drafts and mrope are not in the double")
        mapping = Mapping() if mapping is None else mapping
        separate = self.has_ctx_gen_opt_profiles(
            use_gpt_attention_plugin=use_gpt_attention_plugin,
            use_gemm_plugin=use_gemm_plugin,
            remove_input_padding=remove_input_padding,
            kv_cache_type=kv_cache_type,
        )
        p, ranges = self.get_profiles_ranges(
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_input_len=max_input_len,
            max_num_tokens=max_num_tokens,
            max_draft_len=max_draft_len,
            opt_batch_size=opt_batch_size,
            opt_num_tokens=opt_num_tokens,
            enable_ctx_gen_opt_profiles=separate,
            multiple_profiles=multiple_profiles,
            kv_cache_type=kv_cache_type,
        )
        tokens = ranges["num_tokens_range"][0]
        out: dict[str, Any] = dict.fromkeys(_BASIC_KEYS)
        if mapping.is_first_pp_rank():
            out["input_ids"] = _input("input_ids", trt.int32, [-1], p, num_tokens=tokens)
        else:
            require(dtype is not None and num_heads is not None, "stages after the first need both")
            name = "hidden_states_input"
            sizes = {"num_tokens": tokens, "hidden_size": hidden_size}
            out[name] = _input(name, dtype, [-1, hidden_size], p, **sizes)
        dim = {"position_ids_num_tokens_range": tokens}
        out["position_ids"] = _input("position_ids", trt.int32, [-1], p, **dim)
        if mapping.tp_size > 1:
            from ..plugin import current_all_reduce_helper

            current_all_reduce_helper().set_workspace_tensor(mapping, p)
        if mapping.is_last_pp_rank() and not gather_context_logits:
            dim = {"batch_size_last_token_ids": ranges["bbd_range"][0]}
            out["last_token_ids"] = _input("last_token_ids", trt.int32, [-1], p, **dim)
        return out | self.prepare_attention_inputs(
            max_batch_size=max_batch_size,
            max_beam_width=max_beam_width,
            max_input_len=max_input_len,
            max_seq_len=max_seq_len,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            num_layers=num_layers,
            kv_dtype=kv_dtype,
            num_profiles=p,
            enable_ctx_gen_opt_profiles=separate,
            remove_input_padding=remove_input_padding,
            use_gpt_attention_plugin=use_gpt_attention_plugin,
            kv_cache_type=kv_cache_type,
            tokens_per_block=tokens_per_block,
            mapping=mapping,
            streamingllm=streamingllm,
            opt_batch_size=opt_batch_size,
        )


_BASIC_KEYS = (
    "input_ids",
    "hidden_states_input",
    "position_ids",
    "last_token_ids",
    "prompt_embedding_table",
    "tasks",
    "prompt_vocab_size",
    "lora_ranks",
    "lora_weights_pointers",
    "spec_decoding_params",
    "mrope_params",
)
_PER_SEQUENCE = (
    "sequence_length",
    "host_request_types",
    "host_past_key_value_lengths",
    "context_lengths",
    "host_context_lengths",
)
_ATTENTION_KEYS = (
    "attention_mask",
    "sequence_length",
    "host_past_key_value_lengths",
    "host_max_attention_window_sizes",
    "host_sink_token_length",
    "past_key_value",
    "cache_indirection",
    "kv_cache_block_offsets",
    "host_kv_cache_block_offsets",
    "host_kv_cache_pool_pointers",
    "host_kv_cache_pool_mapping",
    "context_lengths",
    "host_context_lengths",
    "host_request_types",
    "host_runtime_perf_knobs",
    "host_context_progress",
)
