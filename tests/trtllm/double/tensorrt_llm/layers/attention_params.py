"""Tensors that go with every attention layer; they live in layers/attention.py of TensorRT-LLM.

Read: names, order, defaults, attributes, what ``is_valid`` asks for, that ``past_key_value_length``
is taken but not stored.
"""

from __future__ import annotations

from typing import Any

from .._common import keep


class AttentionParams:
    def __init__(
        self,
        sequence_length: Any = None,
        context_lengths: Any = None,
        host_context_lengths: Any = None,
        max_context_length: int | None = None,
        host_request_types: Any = None,
        encoder_input_lengths: Any = None,
        encoder_max_input_length: Any = None,
        host_runtime_perf_knobs: Any = None,
        host_context_progress: Any = None,
    ) -> None:
        keep(self, locals())
        for name in ("embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention"):
            setattr(self, name, None)
            setattr(self, f"long_rope_{name}", None)
        self.short_mscale = self.long_mscale = 1.0

    def fill_attention_const_params_for_rope(
        self,
        embed_positions: Any = None,
        rotary_inv_freq: Any = None,
        embed_positions_for_gpt_attention: Any = None,
    ) -> AttentionParams:
        keep(self, locals())
        return self

    def is_valid(
        self, gpt_attention_plugin: Any, remove_input_padding: bool, use_kv_cache: bool
    ) -> bool:
        names = ["sequence_length", "context_lengths", "max_context_length", "host_request_types"]
        names += ["host_runtime_perf_knobs", "host_context_progress"]
        names += ["host_context_lengths"] if remove_input_padding else []
        return not gpt_attention_plugin or _complete(self, names)


class KeyValueCacheParams:
    def __init__(
        self,
        past_key_value: Any = None,
        host_past_key_value_lengths: Any = None,
        host_max_attention_window_sizes: Any = None,
        host_sink_token_length: Any = None,
        kv_cache_block_offsets: Any = None,
        host_kv_cache_block_offsets: Any = None,
        host_kv_cache_pool_pointers: Any = None,
        host_kv_cache_pool_mapping: Any = None,
        cache_indirection: Any = None,
        past_key_value_length: Any = None,
        cross_kv_cache_block_offsets: Any = None,
        host_cross_kv_cache_block_offsets: Any = None,
        host_cross_kv_cache_pool_pointers: Any = None,
        host_cross_kv_cache_pool_mapping: Any = None,
    ) -> None:
        keep(self, locals())
        del self.past_key_value_length

    def get_first_past_key_value(self) -> Any:
        return self.past_key_value and self.past_key_value[0]

    def fill_none_tensor_list(self, list_size: int) -> None:
        if self.past_key_value is None:  # an empty list stays: it drops every layer
            self.past_key_value = [None] * list_size

    def is_valid(self, gpt_attention_plugin: Any) -> bool:
        names = ["host_past_key_value_lengths", "host_max_attention_window_sizes"]
        names += ["host_sink_token_length", "cache_indirection"]
        return not gpt_attention_plugin or _complete(self, names)


def _complete(params: Any, names: list[str]) -> bool:
    return all(getattr(params, name) is not None for name in names)


class SpecDecodingParams:
    def __init__(
        self,
        spec_decoding_is_generation_length_variable: bool = False,
        spec_decoding_max_generation_length: int = 1,
        spec_decoding_generation_lengths: Any = None,
        spec_decoding_position_offsets: Any = None,
        spec_decoding_packed_mask: Any = None,
        spec_decoding_use: Any = None,
    ) -> None:
        keep(self, locals())


class MropeParams:
    def __init__(self, mrope_rotary_cos_sin: Any = None, mrope_position_deltas: Any = None) -> None:
        keep(self, locals())
