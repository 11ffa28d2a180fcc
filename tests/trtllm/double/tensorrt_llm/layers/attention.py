"""``Attention``: attributes, weights and forward as TensorRT-LLM's own attention layer has them.

Read (mid 2025): keyword-only constructor with its order and defaults, attributes (heads PER RANK,
``num_kv_heads`` global), the weights registered as None, slopes as a float32 buffer [1, heads, 1, 1]
that forward casts to the model's dtype, QK-norm by two layouts, forward's parameters and its tail.
Which of the constructor's names are newer than 1.0 is not known: code should not construct it.
"""

from __future__ import annotations

import math
from typing import Any

from tensorrt.errors import require

from .._common import default_net, keep
from ..functional import (
    AttentionMaskType,
    LayerNormType,
    PositionEmbeddingType,
    RopeEmbeddingUtils,
    RotaryScalingType,
    Tensor,
    cast,
    clip,
    concat,
    generate_alibi_slopes,
    gpt_attention,
    shape,
    split,
    view,
)
from ..module import Module
from ..parameter import Parameter
from ..quantization.mode import QuantMode
from .attention_params import (
    AttentionParams,
    KeyValueCacheParams,
    MropeParams,
    SpecDecodingParams,
)
from .linear import ColumnLinear, RowLinear
from .normalization import LayerNorm, RmsNorm

_NO_QUANT = QuantMode(0)
_KEPT = (
    "local_layer_idx", "hidden_size", "num_layers", "dtype", "bias", "cross_attention",
    "attention_mask_type", "max_position_embeddings", "original_max_position_embeddings",
    "position_embedding_type", "apply_query_key_layer_scaling", "alibi_bias_max",
    "relative_attention", "max_distance", "num_buckets", "use_logn_scaling", "quant_mode",
    "max_attn_value", "block_sparse_params", "skip_cross_kv", "clip_qkv", "tp_group", "tp_size",
    "tp_rank", "cp_group", "cp_size", "cp_rank",
)  # fmt: skip
"""Arguments that are attributes under the same names."""
_SCALES = (
    "kv_cache_scaling_factor",
    "attention_output_orig_quant_scale",
    "attention_output_sf_scale",
)
_ROTARY = [f"rotary_embedding_{name}" for name in ("dim", "base", "scale_type", "scale")]
_FROM_CACHE = (
    "host_past_key_value_lengths",
    "host_max_attention_window_sizes",
    "host_sink_token_length",
    "cache_indirection",
    "kv_cache_block_offsets",
    "host_kv_cache_block_offsets",
    "host_kv_cache_pool_pointers",
    "host_kv_cache_pool_mapping",
)
_FROM_REQUESTS = (
    "sequence_length",
    "context_lengths",
    "host_context_lengths",
    "max_context_length",
    "host_request_types",
    "host_runtime_perf_knobs",
    "host_context_progress",
)
_CONST = ("embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention")


class Attention(Module):
    def __init__(
        self,
        *,
        local_layer_idx: int,
        hidden_size: int,
        num_attention_heads: int,
        num_kv_heads: int | None = None,
        max_position_embeddings: int = 1024,
        num_layers: int = 1,
        apply_query_key_layer_scaling: bool = False,
        attention_head_size: int | None = None,
        qk_layernorm: bool = False,
        layernorm_type: LayerNormType = LayerNormType.LayerNorm,
        layernorm_share: bool = True,
        inner_layernorm: bool = False,
        eps: float = 1e-05,
        attention_mask_type: AttentionMaskType = AttentionMaskType.padding,
        bias: bool = True,
        dtype: str | None = None,
        position_embedding_type: PositionEmbeddingType = PositionEmbeddingType.learned_absolute,
        rotary_embedding_base: float = 10000.0,
        rotary_embedding_scaling: dict[str, Any] | None = None,
        rotary_embedding_percentage: float = 1.0,
        rope_scaling_short_factors: Any = None,
        rope_scaling_long_factors: Any = None,
        rope_scaling_short_mscale: float | None = None,
        rope_scaling_long_mscale: float | None = None,
        original_max_position_embeddings: int = 1024,
        tp_group: list[int] | None = None,
        tp_size: int = 1,
        tp_rank: int = 0,
        quant_mode: QuantMode = _NO_QUANT,
        q_scaling: float = 1.0,
        cross_attention: bool = False,
        relative_attention: bool = False,
        max_distance: int = 0,
        num_buckets: int = 0,
        dense_bias: bool | None = None,
        clip_qkv: float | None = None,
        alibi_bias_max: int = 8,
        skip_cross_kv: bool = False,
        max_attn_value: float = 0.0,
        block_sparse_params: Any = None,
        use_implicit_relative_attention: bool = False,
        reorder: bool = False,
        enable_qkv: bool = True,
        cp_group: Any = (0,),
        cp_size: int = 1,
        cp_rank: int = 0,
        max_seqlen_for_logn_scaling: int = 8192,
        use_logn_scaling: bool = False,
    ) -> None:
        super().__init__()
        require(num_attention_heads % tp_size == 0, f"{num_attention_heads} heads, {tp_size} ranks")
        keep(self, locals(), _KEPT)
        head = self.attention_head_size = attention_head_size or hidden_size // num_attention_heads
        self.num_attention_heads = num_attention_heads // tp_size
        self.num_kv_heads = num_attention_heads if num_kv_heads is None else num_kv_heads
        self.num_attention_kv_heads = -(-self.num_kv_heads // tp_size)
        self.attention_hidden_size = head * self.num_attention_heads
        self.dense_bias = bias if dense_bias is None else dense_bias
        layers = num_layers if apply_query_key_layer_scaling else 1
        self.norm_factor, self.q_scaling = math.sqrt(head) * layers, q_scaling * layers
        self.short_mscale, self.long_mscale = rope_scaling_short_mscale, rope_scaling_long_mscale
        self._set_rotary(
            rotary_embedding_base, rotary_embedding_scaling, rotary_embedding_percentage
        )
        self.scale_alibi_bias = position_embedding_type == PositionEmbeddingType.alibi_with_scale
        if position_embedding_type.is_alibi():
            scale = 1.0 / self.norm_factor if self.scale_alibi_bias else 1.0
            slopes = generate_alibi_slopes(
                num_attention_heads, tp_size, tp_rank, scale, alibi_bias_max
            )
            self.alibi_slopes = Parameter(slopes, dtype="float32", is_buffer=True)
        for name in _SCALES:
            self.register_parameter(name, None)
        self._make_layers(qk_layernorm, layernorm_type, layernorm_share, inner_layernorm, eps)

    def _set_rotary(self, base: float, scaling: dict[str, Any] | None, percentage: float) -> None:
        self.rotary_embedding_base, self.rotary_embedding_scaling = base, scaling
        self.rotary_embedding_scale_type = RotaryScalingType.none
        self.rotary_embedding_scale = 1.0
        self.rotary_embedding_percentage = percentage
        self.rotary_embedding_dim = 0
        if scaling is not None:
            kind = scaling.get("type", scaling.get("rope_type"))
            self.rotary_embedding_scale_type = RotaryScalingType.from_string(kind)
            self.rotary_embedding_scale = scaling.get("factor", 1.0)
        if self.position_embedding_type.is_rope():
            self.rotary_embedding_dim = int(self.attention_head_size * percentage)

    def _make_layers(
        self, qk_norm: bool, kind: LayerNormType, share: bool, inner: bool, eps: float
    ) -> None:
        head, tp = self.attention_head_size, self.tp_size
        ranks: dict[str, Any] = {"dtype": self.dtype, "tp_group": self.tp_group, "tp_size": tp}
        self.qkv = ColumnLinear(
            self.hidden_size,
            tp * head * (self.num_attention_heads + 2 * self.num_attention_kv_heads),
            bias=self.bias,
            gather_output=False,
            is_qkv=True,
            **ranks,
        )
        width = tp * self.attention_hidden_size
        self.dense = RowLinear(width, self.hidden_size, bias=self.dense_bias, **ranks)
        self.qkv_lora = self.qkv_dora = None
        self.qk_layernorm, self.layernorm_type, self.layernorm_share = qk_norm, kind, share
        norm: Any = RmsNorm if kind == LayerNormType.RmsNorm else LayerNorm
        if qk_norm:
            require(share, "QK-norm with a weight for each head is not in the double")
            self.q_layernorm = norm(head, eps=eps, dtype=self.dtype)
            self.k_layernorm = norm(head, eps=eps, dtype=self.dtype)
        self.inner_layernorm = norm(self.hidden_size, dtype=self.dtype, eps=eps) if inner else None

    @staticmethod
    def create_attention_const_params(model_cls: Any, config: Any) -> None:
        """Registers the RoPE tables on the model (an instance), for all layers together."""
        if not config.position_embedding_type.is_rope():
            return
        scaling = getattr(config, "rotary_scaling", None) or {}
        kind = RotaryScalingType.from_string(scaling.get("type", scaling.get("rope_type", "none")))
        percentage = getattr(config, "rotary_pct", 1.0)
        dim = getattr(config, "rotary_dim", None) or int(config.head_size * percentage)
        positions = config.max_position_embeddings
        create = RopeEmbeddingUtils.create_sinusoidal_positions_for_attention_plugin
        base, scale = getattr(config, "rotary_base", 10000.0), scaling.get("factor", 1.0)
        inv_freq, cos_sin = create(positions, dim, base, scale, kind, scaling or None)
        tables = (cos_sin.reshape(1, positions, dim), inv_freq, cos_sin)
        for name, table in zip(_CONST, tables, strict=True):
            setattr(model_cls, name, Parameter(table, dtype="float32", is_buffer=True))

    @staticmethod
    def fill_attention_params(model_cls: Any, attention_params: AttentionParams) -> AttentionParams:
        if model_cls.position_embedding_type.is_rope():
            values = {name: getattr(model_cls, name).value for name in _CONST}
            return attention_params.fill_attention_const_params_for_rope(**values)
        return attention_params

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        attention_packed_mask: Any = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        mrope_params: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        encoder_output: Any = None,
        position_embedding: Any = None,
        norm_before_bmm1: bool = False,
        lora_layer_params: Any = None,
        cross_kv_cache_gen: Any = None,
        cross_kv_reuse: Any = None,
        all_reduce_params: Any = None,
        skip_attn: Any = None,
    ) -> Any:
        require(isinstance(hidden_states, Tensor), f"hidden_states: {type(hidden_states).__name__}")
        require(attention_params and kv_cache_params, "attention needs both kinds of parameters")
        plugins = default_net().plugin_config
        plugin = plugins.gpt_attention_plugin
        given = attention_params.is_valid(plugin, plugins.remove_input_padding, use_cache)
        require(given, "attention_params: incomplete")
        require(not use_cache or kv_cache_params.is_valid(plugin), "kv_cache_params: incomplete")
        qkv = self.qkv(hidden_states, None)
        require(qkv.ndim() == 2, f"qkv: {qkv.shape}: packed tokens only")
        if self.clip_qkv is not None:
            qkv = clip(qkv, -self.clip_qkv, self.clip_qkv)
        if self.qk_layernorm:
            qkv = self._normalise(qkv)
        inputs: dict[str, Any] = {name: getattr(kv_cache_params, name) for name in _FROM_CACHE}
        inputs |= {name: getattr(attention_params, name) for name in _FROM_REQUESTS}
        if self.position_embedding_type.is_alibi():
            inputs["alibi_slopes"] = cast(self.alibi_slopes.value, hidden_states.dtype)
        if self.kv_cache_scaling_factor is not None:
            inputs["kv_orig_quant_scale"] = self.kv_cache_rcp_scaling_factor.value
            inputs["kv_quant_orig_scale"] = self.kv_cache_scaling_factor.value
        if self.attention_output_orig_quant_scale is not None:
            scale = self.attention_output_orig_quant_scale.value
            inputs["attention_output_orig_quant_scale"] = scale
        context, past = gpt_attention(
            qkv=qkv,
            past_key_value=kv_cache_params.get_first_past_key_value(),
            attention_mask=attention_mask,
            layer_idx=self.local_layer_idx,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_kv_heads,
            num_kv_heads_origin=self.num_kv_heads,
            hidden_size_per_head=self.attention_head_size,
            q_scaling=self.q_scaling,
            rotary_embedding_max_positions=self.max_position_embeddings,
            position_embedding_type=self.position_embedding_type,
            rotary_inv_freq=attention_params.rotary_inv_freq,
            rotary_cos_sin=attention_params.embed_positions_for_gpt_attention,
            kv_cache_quant_mode=self.quant_mode,
            mask_type=self.attention_mask_type,
            tp_size=self.tp_size,
            tp_rank=self.tp_rank,
            use_cache=use_cache,
            skip_attn=skip_attn,
            **inputs,
            **{name: getattr(self, name) for name in _ROTARY},
        )
        if self.inner_layernorm is not None:
            context = self.inner_layernorm(context)
        context = self.dense(context, lora_runtime_params=None, all_reduce_params=all_reduce_params)
        return (context, past) if use_cache else context

    def _normalise(self, qkv: Tensor) -> Tensor:
        """QK-norm. With as many KV heads as query heads the columns are taken as [heads, 3, D]."""
        head, q, kv = (
            self.attention_head_size,
            self.num_attention_heads,
            self.num_attention_kv_heads,
        )
        tokens = shape(qkv, 0)
        if q == kv:
            parts = split(view(qkv, concat([tokens, q, 3, head])), 1, dim=2)
            parts = [view(part, concat([tokens, q, head])) for part in parts]
        else:
            parts = split(view(qkv, concat([tokens, q + 2 * kv, head])), [q, kv, kv], dim=1)
        normed = [self.q_layernorm(parts[0]), self.k_layernorm(parts[1]), parts[2]]
        return view(concat(normed, dim=1), concat([tokens, (q + 2 * kv) * head]))


__all__ = [
    "Attention",
    "AttentionParams",
    "KeyValueCacheParams",
    "MropeParams",
    "SpecDecodingParams",
]
