"""``LLaMAConfig``, for Llama and Mistral. Read (1.0 age)."""

from __future__ import annotations

from typing import Any

from ..moe_config import moe_dict
from ..pretrained_config import PretrainedConfig


class LLaMAConfig(PretrainedConfig):
    def __init__(
        self,
        *,
        mlp_bias: bool = False,
        attn_bias: bool = False,
        rotary_base: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        residual_mlp: bool = False,
        disable_weight_only_quant_plugin: bool = False,
        moe: dict[str, Any] | None = None,
        remove_duplicated_kv_heads: bool = False,
        embedding_multiplier: float = 1.0,
        attention_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        output_multiplier_scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.mlp_bias, self.attn_bias = mlp_bias, attn_bias
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.residual_mlp = residual_mlp
        self.disable_weight_only_quant_plugin = disable_weight_only_quant_plugin
        self.moe = moe_dict(moe)
        self.remove_duplicated_kv_heads = remove_duplicated_kv_heads
        self.fc_after_embed = False
        self.use_input_layernorm_in_first_layer = True
        self.use_last_layernorm = True
        self.layer_idx_offset = 0
        self.embedding_multiplier = embedding_multiplier
        self.attention_multiplier = attention_multiplier
        self.residual_multiplier = residual_multiplier
        self.output_multiplier_scale = output_multiplier_scale
        self.has_partial_lora_mask = False
        super().__init__(**kwargs)
