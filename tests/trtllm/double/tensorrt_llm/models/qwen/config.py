"""``QWenConfig``. Read. ``qwen_type``, ``seq_length``, ``tie_word_embeddings``, ``moe_intermediate_size``
are no parameters but extra keys that the network reads."""

from __future__ import annotations

from typing import Any

from ..moe_config import moe_dict
from ..pretrained_config import PretrainedConfig


class QWenConfig(PretrainedConfig):
    def __init__(
        self,
        *,
        mlp_bias: bool = False,
        attn_bias: bool = True,
        rotary_base: float = 10000.0,
        rotary_scaling: dict[str, Any] | None = None,
        disable_weight_only_quant_plugin: bool = False,
        use_logn_attn: bool = False,
        moe: dict[str, Any] | None = None,
        num_labels: int = 1,
        mlp_only_layers: list[int] | None = None,
        decoder_sparse_step: int = 1,
        **kwargs: Any,
    ) -> None:
        self.mlp_bias, self.attn_bias = mlp_bias, attn_bias
        self.rotary_base, self.rotary_scaling = rotary_base, rotary_scaling
        self.disable_weight_only_quant_plugin = disable_weight_only_quant_plugin
        self.use_logn_attn, self.num_labels = use_logn_attn, num_labels
        self.moe = moe_dict(moe)
        self.mlp_only_layers = mlp_only_layers or []
        self.decoder_sparse_step = decoder_sparse_step
        super().__init__(**kwargs)
