"""``LLaMAForCausalLM``: Llama 2, 3, 3.1 and Mistral.

Read: constructor and call of the attention (all_reduce_params always given), RoPE fixed to the
half style, no sliding window anywhere. Mixture of experts, Granite's multipliers other than
``attention_multiplier`` and fused reductions are not doubled.
"""

from __future__ import annotations

from typing import Any

from ...functional import AllReduceFusionOp, AllReduceParams, PositionEmbeddingType
from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import DecoderLayer, Transformer, output_layer
from .config import LLaMAConfig


class LLaMADecoderLayer(DecoderLayer):
    def __init__(self, config: LLaMAConfig, layer_idx: int) -> None:
        super().__init__(
            config,
            layer_idx,
            attention_head_size=config.head_size,
            bias=config.attn_bias,
            position_embedding_type=PositionEmbeddingType.rope_gpt_neox,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            q_scaling=1.0 / config.attention_multiplier,
        )

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
        reduction = AllReduceParams(
            fusion_op=AllReduceFusionOp.NONE,
            residual=hidden_states,
            norm_weight=self.post_layernorm.weight.value,
            eps=self.post_layernorm.eps,
        )
        return self._run(
            hidden_states,
            use_cache,
            attention_mask=attention_mask,
            spec_decoding_params=spec_decoding_params,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            lora_layer_params=lora_layer_params,
            all_reduce_params=reduction,
        )


class LLaMAModel(Transformer):
    layer_class = LLaMADecoderLayer


class LLaMAForCausalLM(DecoderModelForCausalLM):
    config_class = LLaMAConfig

    def __init__(self, config: LLaMAConfig) -> None:
        network = LLaMAModel(config), output_layer(config)
        self.quant_mode, self.mapping = config.quant_mode, config.mapping
        super().__init__(config, *network)
