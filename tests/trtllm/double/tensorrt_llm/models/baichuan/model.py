"""``BaichuanForCausalLM``: 7B (RoPE) and 13B (ALiBi).

Read: attention without head size, RoPE base or scaling; embedding, last norm and lm_head on every
rank, so no pipeline stages; layers know neither LoRA nor speculative decoding. 13B is ``alibi``
(slopes not scaled) and has no RoPE tables.
"""

from __future__ import annotations

from typing import Any

from tensorrt.errors import require

from ..modeling_utils import DecoderModelForCausalLM
from ..transformer import DecoderLayer, Transformer, output_layer
from .config import BaichuanConfig


class BaichuanDecoderLayer(DecoderLayer):
    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        position = config.position_embedding_type
        super().__init__(config, layer_idx, bias=False, position_embedding_type=position)

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        use_cache: bool = False,
        kv_cache_params: Any = None,
        attention_params: Any = None,
    ) -> Any:
        return self._run(
            hidden_states,
            use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
        )


class BaichuanModel(Transformer):
    layer_class = BaichuanDecoderLayer


class BaichuanForCausalLM(DecoderModelForCausalLM):
    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        require(config.mapping.pp_size == 1, "Baichuan has no pipeline parallelism")
        super().__init__(config, BaichuanModel(config), output_layer(config))
