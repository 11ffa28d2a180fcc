"""``functional.gpt_attention``: keyword-only, its plugin inputs in their order.

Read (1.1 - 1.2 age): names, order, defaults, assertions; ``attention_sinks`` since 1.1. It lives in
functional.py of TensorRT-LLM; here it has a file of its own for its length. Block-sparse, cross
attention, long RoPE, speculative and MLA parameters are left out: our code has no use for them.
"""

from __future__ import annotations

from typing import Any

import tensorrt as trt
from tensorrt.errors import require

from ._common import default_net, default_trtnet
from ._release import RELEASE
from .functional import (
    AttentionMaskType,
    PositionEmbeddingType,
    RotaryScalingType,
    Tensor,
    _create_tensor,
)
from .quantization.mode import QuantMode

_NO_QUANT = QuantMode(0)


class _GptAttention:
    kind = trt.LayerType.PLUGIN_V2
    plugin_type = "GPTAttention"

    def __init__(self, fields: dict[str, Any]) -> None:
        self.layer_name = "causal_attn"
        self.fields = fields

    def outputs(self, inputs: list[Any]) -> list[tuple[Any, tuple[int, ...]]]:
        f, qkv = self.fields, inputs[0]
        width = (f["num_heads"] + 2 * f["num_kv_heads"]) * f["head_size"]
        require(qkv.shape[-1] == width, f"gpt_attention: qkv {qkv.shape}, expected {width} columns")
        return [(qkv.dtype, (qkv.shape[0], f["num_heads"] * f["head_size"]))]


def gpt_attention(
    *,
    qkv: Tensor,
    past_key_value: Tensor | None,
    attention_mask: Tensor | None = None,
    attention_packed_mask: Tensor | None = None,
    sequence_length: Tensor,
    host_past_key_value_lengths: Tensor,
    host_max_attention_window_sizes: Tensor,
    host_sink_token_length: Tensor,
    attention_sinks: Any = None,
    context_lengths: Tensor,
    cache_indirection: Tensor,
    host_request_types: Tensor,
    layer_idx: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_size_per_head: int,
    q_scaling: float,
    attn_logit_softcapping_scale: float = 0.0,
    rotary_embedding_dim: int = 0,
    rotary_embedding_base: float = 10000.0,
    rotary_embedding_scale_type: RotaryScalingType = RotaryScalingType.none,
    rotary_embedding_short_m_scale: float = 1.0,
    rotary_embedding_long_m_scale: float = 1.0,
    rotary_embedding_scale: float = 1.0,
    rotary_embedding_max_positions: int = 1024,
    rotary_embedding_original_max_positions: int = 1024,
    position_embedding_type: PositionEmbeddingType = PositionEmbeddingType.learned_absolute,
    rotary_inv_freq: Tensor | None = None,
    rotary_cos_sin: Tensor | None = None,
    kv_orig_quant_scale: Tensor | None = None,
    kv_quant_orig_scale: Tensor | None = None,
    attention_output_orig_quant_scale: Tensor | None = None,
    attention_output_sf_scale: Tensor | None = None,
    kv_cache_quant_mode: QuantMode = _NO_QUANT,
    max_context_length: int | None = None,
    mask_type: AttentionMaskType = AttentionMaskType.causal,
    alibi_slopes: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    kv_cache_block_offsets: Tensor | None = None,
    host_kv_cache_block_offsets: Tensor | None = None,
    host_kv_cache_pool_pointers: Tensor | None = None,
    host_kv_cache_pool_mapping: Tensor | None = None,
    do_cross_attention: bool = False,
    host_context_lengths: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    use_cache: bool = True,
    host_runtime_perf_knobs: Tensor | None = None,
    host_context_progress: Tensor | None = None,
    skip_attn: Tensor | None = None,
    cp_group: Any = (0,),
    cp_size: int = 1,
    cp_rank: int = 0,
    num_kv_heads_origin: int = -1,
) -> tuple[Tensor, None]:
    if RELEASE < (1, 1) and attention_sinks is not None:
        raise TypeError("gpt_attention() got an unexpected keyword argument 'attention_sinks'")
    needed = (host_request_types, host_max_attention_window_sizes, host_sink_token_length)
    require(all(tensor is not None for tensor in needed), "gpt_attention: an input is missing")
    slopes = alibi_slopes is not None
    require(slopes == position_embedding_type.is_alibi(), f"gpt_attention: ALiBi slopes: {slopes}")
    require(isinstance(max_context_length, int), "gpt_attention: max_context_length is no number")
    require(past_key_value is None and not do_cross_attention, "paged self-attention only")
    quant = kv_cache_quant_mode.has_kv_cache_quant()
    inputs = [
        qkv,
        attention_mask if mask_type == AttentionMaskType.custom_mask else None,
        attention_packed_mask,
        sequence_length,
        host_past_key_value_lengths,
        host_max_attention_window_sizes,
        host_sink_token_length,
        attention_sinks,
        context_lengths,
        cache_indirection,
        host_request_types,
        kv_cache_block_offsets,
        host_kv_cache_block_offsets,
        host_kv_cache_pool_pointers,
        host_kv_cache_pool_mapping,
        kv_orig_quant_scale if quant else None,
        kv_quant_orig_scale if quant else None,
        attention_output_orig_quant_scale,
        attention_output_sf_scale,
        rotary_inv_freq,
        rotary_cos_sin,
        alibi_slopes,
        host_context_lengths if default_net().plugin_config.remove_input_padding else None,
        qkv_bias,
        host_runtime_perf_knobs,
        host_context_progress,
        skip_attn,
    ]
    fields = {
        "layer_idx": layer_idx,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_size": hidden_size_per_head,
        "q_scaling": q_scaling,
        "position_embedding_type": int(position_embedding_type),
        "rotary_embedding_dim": rotary_embedding_dim,
        "tp_size": tp_size,
        "tp_rank": tp_rank,
    }
    tensors = [t.trt_tensor for t in inputs if t is not None]
    layer = default_trtnet().add_plugin_v2(tensors, _GptAttention(fields))
    return _create_tensor(layer.get_output(0), layer), None
