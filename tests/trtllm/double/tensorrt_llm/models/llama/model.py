"""``LLaMAForCausalLM``: Llama 2, 3, 3.1 and Mistral.

Read: constructor and call of the attention (all_reduce_params always given), RoPE fixed to the
half style, no sliding window anywhere. Mixture of experts, Granite's multipliers other than
``attention_multiplier`` and fused reductions are not doubled.
"""

from __future__ import annotations

from typing import Any

from ...functional import (
    AllReduceFusionOp,
    AllReduceParams,
    AttentionMaskType,
    PositionEmbeddingType,
)
from ...layers import Attention, GatedMLP, RmsNorm
from ...module import Module
from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import Transformer, output_layer
from .config import LLaMAConfig


class LLaMADecoderLayer(Module):
    def __init__(self, config: LLaMAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        mapping, dtype = config.mapping, config.dtype
        norm: dict[str, Any] = {"eps": config.norm_epsilon, "dtype": dtype}
        self.input_layernorm = RmsNorm(config.hidden_size, **norm)
        first = mapping.pp_layers(config.num_hidden_layers)[0]
        self.local_layer_idx = layer_idx - first
        self.attention = Attention(
            local_layer_idx=self.local_layer_idx,
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            dtype=dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=config.attn_bias,
            position_embedding_type=PositionEmbeddingType.rope_gpt_neox,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            tp_rank=mapping.tp_rank,
            q_scaling=1.0 / config.attention_multiplier,
            quant_mode=config.quant_mode,
            cp_group=mapping.cp_group,
            cp_size=mapping.cp_size,
            cp_rank=mapping.cp_rank,
        )
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=config.mlp_bias,
            dtype=dtype,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
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
        next_layer_input_layernorm_args: Any = None,
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
            all_reduce_params=AllReduceParams(
                fusion_op=AllReduceFusionOp.NONE,
                residual=residual,
                norm_weight=self.post_layernorm.weight.value,
                scale=None,
                eps=self.post_layernorm.eps,
            ),
        )
        presents: Any = None
        if use_cache:
            attention_output, presents = attention_output
        hidden_states = residual + attention_output
        hidden_states = hidden_states + self.mlp(self.post_layernorm(hidden_states))
        return (hidden_states, presents) if use_cache else hidden_states


class LLaMAModel(Transformer):
    layer_class = LLaMADecoderLayer


class LLaMAForCausalLM(DecoderModelForCausalLM):
    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        transformer, lm_head = LLaMAModel(config), output_layer(config)
        self.quant_mode, self.mapping = config.quant_mode, config.mapping
        super().__init__(config, transformer, lm_head)
