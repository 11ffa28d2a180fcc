"""``BaichuanForCausalLM``: 7B (RoPE) and 13B (ALiBi).

Read: attention without head size, RoPE base or scaling; embedding, last norm and lm_head on every
rank, so no pipeline stages; layers know neither LoRA nor speculative decoding. 13B is ``alibi``
(slopes not scaled) and has no RoPE tables.
"""

from __future__ import annotations

from typing import Any

from tensorrt.errors import require

from ...functional import AttentionMaskType
from ...layers import Attention, GatedMLP, RmsNorm
from ...module import Module
from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import Transformer, output_layer
from .config import BaichuanConfig


class BaichuanDecoderLayer(Module):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.config = layer_idx, config
        mapping, dtype = config.mapping, config.dtype
        norm: dict[str, Any] = {"eps": config.norm_epsilon, "dtype": dtype}
        self.input_layernorm = RmsNorm(config.hidden_size, **norm)
        first = mapping.pp_layers(config.num_hidden_layers)[0]
        self.attention = Attention(
            local_layer_idx=layer_idx - first,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            dtype=dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=False,
            position_embedding_type=config.position_embedding_type,
            tp_group=mapping.tp_group,
            tp_size=mapping.tp_size,
            tp_rank=mapping.tp_rank,
            quant_mode=config.quant_mode,
        )
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=False,
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
        kv_cache_params: Any = None,
        attention_params: Any = None,
    ) -> Any:
        residual = hidden_states
        attention_output = self.attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
        )
        presents: Any = None
        if use_cache:
            attention_output, presents = attention_output
        hidden_states = residual + attention_output
        hidden_states = hidden_states + self.mlp(self.post_layernorm(hidden_states))
        return (hidden_states, presents) if use_cache else hidden_states


class BaichuanModel(Transformer):
    layer_class = BaichuanDecoderLayer


class BaichuanForCausalLM(DecoderModelForCausalLM):
    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        require(config.mapping.pp_size == 1, "Baichuan has no pipeline parallelism")
        super().__init__(config, BaichuanModel(config), output_layer(config))
