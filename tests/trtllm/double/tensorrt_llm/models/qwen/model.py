"""``QWenForCausalLM``: Qwen 1.5, 2, 2.5 and 3 (dense).

Read: how layers construct and call their attention, attribute paths. The attention's eps is NOT passed:
QK-norm has Attention's default 1e-05 (read in one fork only). Mixture of experts and Qwen 1 are not doubled.
"""

from __future__ import annotations

from typing import Any

from ...functional import AttentionMaskType, LayerNormType
from ...layers import Attention, GatedMLP, RmsNorm
from ...module import Module
from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import Transformer, output_layer
from .config import QWenConfig


class QWenDecoderLayer(Module):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        mapping, dtype = config.mapping, config.dtype
        self.tp_group, self.tp_size = mapping.tp_group, mapping.tp_size
        if config.qwen_type not in ("qwen2", "qwen3"):
            raise NotImplementedError(f"qwen_type {config.qwen_type}: not in the double")
        norm = {"eps": config.norm_epsilon, "dtype": dtype}
        self.input_layernorm = RmsNorm(config.hidden_size, **norm)
        first = mapping.pp_layers(config.num_hidden_layers)[0]
        qk_layernorm = config.qwen_type in ("qwen3", "qwen3_moe")
        self.attention = Attention(
            local_layer_idx=layer_idx - first,
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_seqlen_for_logn_scaling=config.seq_length,
            max_position_embeddings=config.max_position_embeddings,
            dtype=dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=config.attn_bias,
            position_embedding_type=config.position_embedding_type,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            tp_rank=mapping.tp_rank,
            tp_group=self.tp_group,
            tp_size=self.tp_size,
            cp_rank=mapping.cp_rank,
            cp_size=mapping.cp_size,
            cp_group=mapping.cp_group,
            quant_mode=config.quant_mode,
            use_logn_scaling=config.use_logn_attn,
            dense_bias=False,
            qk_layernorm=qk_layernorm,
            layernorm_type=LayerNormType.RmsNorm if qk_layernorm else LayerNormType.LayerNorm,
        )
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            tp_group=self.tp_group,
            tp_size=self.tp_size,
            quant_mode=config.quant_mode,
        )
        self.post_layernorm = RmsNorm(config.hidden_size, **norm)

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        lora_layer_params: Any = None,
        mrope_params: Any = None,
    ) -> Any:
        residual = hidden_states
        attention_output = self.attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            spec_decoding_params=spec_decoding_params,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            lora_layer_params=lora_layer_params,
            mrope_params=mrope_params,
        )
        presents: Any = None
        if use_cache:
            attention_output, presents = attention_output
        hidden_states = residual + attention_output
        hidden_states = hidden_states + self.mlp(self.post_layernorm(hidden_states))
        return (hidden_states, presents) if use_cache else hidden_states


class QWenModel(Transformer):
    layer_class = QWenDecoderLayer


class QWenForCausalLM(DecoderModelForCausalLM):
    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
        transformer, lm_head = QWenModel(config), output_layer(config)
        # Before the base class's constructor, as there.
        self.quant_mode, self.mapping = config.quant_mode, config.mapping
        super().__init__(config, transformer, lm_head)
