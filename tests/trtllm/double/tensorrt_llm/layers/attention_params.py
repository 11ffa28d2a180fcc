"""Tensors that go with every attention layer; they live in layers/attention.py of TensorRT-LLM.

Read: names, order, defaults, attributes, what ``is_valid`` asks for, that ``past_key_value_length``
is taken but not stored.
"""

from __future__ import annotations

from typing import Any


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
        self.sequence_length = sequence_length
        self.context_lengths = context_lengths
        self.host_context_lengths = host_context_lengths
        self.max_context_length = max_context_length
        self.host_request_types = host_request_types
        self.encoder_input_lengths = encoder_input_lengths
        self.encoder_max_input_length = encoder_max_input_length
        self.host_runtime_perf_knobs = host_runtime_perf_knobs
        self.host_context_progress = host_context_progress
        self.embed_positions = None
        self.rotary_inv_freq = None
        self.embed_positions_for_gpt_attention = None
        self.long_rope_embed_positions = None
        self.long_rope_rotary_inv_freq = None
        self.long_rope_embed_positions_for_gpt_attention = None
        self.short_mscale = 1.0
        self.long_mscale = 1.0

    def fill_attention_const_params_for_rope(
        self,
        embed_positions: Any = None,
        rotary_inv_freq: Any = None,
        embed_positions_for_gpt_attention: Any = None,
    ) -> AttentionParams:
        self.embed_positions = embed_positions
        self.rotary_inv_freq = rotary_inv_freq
        self.embed_positions_for_gpt_attention = embed_positions_for_gpt_attention
        return self

    def is_valid(
        self, gpt_attention_plugin: Any, remove_input_padding: bool, use_kv_cache: bool
    ) -> bool:
        needed = [
            self.sequence_length,
            self.context_lengths,
            self.host_request_types,
            self.max_context_length,
            self.host_runtime_perf_knobs,
            self.host_context_progress,
        ]
        if remove_input_padding:
            needed.append(self.host_context_lengths)
        return not gpt_attention_plugin or all(value is not None for value in needed)


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
        self.past_key_value = past_key_value
        self.host_past_key_value_lengths = host_past_key_value_lengths
        self.host_max_attention_window_sizes = host_max_attention_window_sizes
        self.host_sink_token_length = host_sink_token_length
        self.kv_cache_block_offsets = kv_cache_block_offsets
        self.host_kv_cache_block_offsets = host_kv_cache_block_offsets
        self.host_kv_cache_pool_pointers = host_kv_cache_pool_pointers
        self.host_kv_cache_pool_mapping = host_kv_cache_pool_mapping
        self.cache_indirection = cache_indirection
        self.cross_kv_cache_block_offsets = cross_kv_cache_block_offsets
        self.host_cross_kv_cache_block_offsets = host_cross_kv_cache_block_offsets
        self.host_cross_kv_cache_pool_pointers = host_cross_kv_cache_pool_pointers
        self.host_cross_kv_cache_pool_mapping = host_cross_kv_cache_pool_mapping

    def get_first_past_key_value(self) -> Any:
        return None if self.past_key_value is None else self.past_key_value[0]

    def fill_none_tensor_list(self, list_size: int) -> None:
        if self.past_key_value is None:
            self.past_key_value = (None,) * list_size

    def is_valid(self, gpt_attention_plugin: Any) -> bool:
        needed = [
            self.host_past_key_value_lengths,
            self.host_max_attention_window_sizes,
            self.host_sink_token_length,
            self.cache_indirection,
        ]
        return not gpt_attention_plugin or all(value is not None for value in needed)


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
        variable = spec_decoding_is_generation_length_variable
        self.spec_decoding_is_generation_length_variable = variable
        self.spec_decoding_max_generation_length = spec_decoding_max_generation_length
        self.spec_decoding_generation_lengths = spec_decoding_generation_lengths
        self.spec_decoding_position_offsets = spec_decoding_position_offsets
        self.spec_decoding_packed_mask = spec_decoding_packed_mask
        self.spec_decoding_use = spec_decoding_use


class MropeParams:
    def __init__(self, mrope_rotary_cos_sin: Any = None, mrope_position_deltas: Any = None) -> None:
        self.mrope_rotary_cos_sin = mrope_rotary_cos_sin
        self.mrope_position_deltas = mrope_position_deltas
