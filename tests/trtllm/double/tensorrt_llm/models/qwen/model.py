"""``QWenForCausalLM``: Qwen 1.5, 2, 2.5 and 3 (dense).

Read: how layers construct and call their attention, attribute paths. The attention's eps is NOT passed:
QK-norm has Attention's default 1e-05 (read in one fork only). Mixture of experts and Qwen 1 are not doubled.
"""

from __future__ import annotations

from typing import Any

from tensorrt.errors import require

from ...functional import LayerNormType
from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import DecoderLayer, Transformer, output_layer
from .config import QWenConfig


class QWenDecoderLayer(DecoderLayer):
    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        kind = config.qwen_type
        require(kind in ("qwen2", "qwen3"), f"qwen_type {kind}: not in the double")
        normed = kind == "qwen3"
        super().__init__(
            config,
            layer_idx,
            attention_head_size=config.head_size,
            max_seqlen_for_logn_scaling=config.seq_length,
            bias=config.attn_bias,
            dense_bias=False,
            position_embedding_type=config.position_embedding_type,
            rotary_embedding_base=config.rotary_base,
            rotary_embedding_scaling=config.rotary_scaling,
            use_logn_scaling=config.use_logn_attn,
            qk_layernorm=normed,
            layernorm_type=LayerNormType.RmsNorm if normed else LayerNormType.LayerNorm,
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
        mrope_params: Any = None,
    ) -> Any:
        return self._run(
            hidden_states,
            use_cache,
            attention_mask=attention_mask,
            spec_decoding_params=spec_decoding_params,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            lora_layer_params=lora_layer_params,
            mrope_params=mrope_params,
        )


class QWenModel(Transformer):
    layer_class = QWenDecoderLayer


class QWenForCausalLM(DecoderModelForCausalLM):
    config_class = QWenConfig

    def __init__(self, config: QWenConfig) -> None:
        network = QWenModel(config), output_layer(config)
        # Before the base class's constructor, as there.
        self.quant_mode, self.mapping = config.quant_mode, config.mapping
        super().__init__(config, *network)
