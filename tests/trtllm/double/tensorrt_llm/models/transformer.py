"""What the networks of all families have in common, which TensorRT-LLM writes once for each.

Read: attribute paths (``transformer.vocab_embedding | layers | ln_f`` and those of a layer), what all
families pass to Attention, and the pipeline's send and recv. The order of operations in a layer is that
of the models themselves.
"""

from __future__ import annotations

from typing import Any

from ..functional import AttentionMaskType, recv, send
from ..layers import Attention, ColumnLinear, Embedding, GatedMLP, RmsNorm
from ..module import Module
from .modeling_utils import DecoderLayerList


class DecoderLayer(Module):
    """x + attention(norm(x)), then y + mlp(norm(y)); ``attention``: what a family adds or changes."""

    def __init__(self, config: Any, layer_idx: int, **attention: Any) -> None:
        super().__init__()
        mapping, dtype, size = config.mapping, config.dtype, config.hidden_size
        ranks = {"tp_group": mapping.tp_group, "tp_size": mapping.tp_size}
        common: dict[str, Any] = {"dtype": dtype, "quant_mode": config.quant_mode, **ranks}
        norm: dict[str, Any] = {"eps": config.norm_epsilon, "dtype": dtype}
        self.layer_idx, self.config = layer_idx, config
        self.input_layernorm = RmsNorm(size, **norm)
        self.attention = Attention(
            local_layer_idx=layer_idx - mapping.pp_layers(config.num_hidden_layers)[0],
            hidden_size=size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            attention_mask_type=AttentionMaskType.causal,
            tp_rank=mapping.tp_rank,
            **common,
            **attention,
        )
        bias = getattr(config, "mlp_bias", False)
        width, activation = config.intermediate_size, config.hidden_act
        self.mlp = GatedMLP(size, width, activation, bias=bias, **common)
        self.post_layernorm = RmsNorm(size, **norm)

    def _run(self, x: Any, use_cache: bool, **attention: Any) -> Any:
        found = self.attention(self.input_layernorm(x), use_cache=use_cache, **attention)
        found, present = found if use_cache else (found, None)
        x = x + found
        x = x + self.mlp(self.post_layernorm(x))
        return (x, present) if use_cache else x


class Transformer(Module):
    """Between token ids and logits; `layer_class(config, layer_idx)` makes a layer."""

    layer_class: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mapping = config.mapping
        if self.mapping.is_first_pp_rank():
            self.vocab_embedding = Embedding(config.vocab_size, config.hidden_size, config.dtype)
        self.layers = DecoderLayerList(self.layer_class, config)
        if self.mapping.is_last_pp_rank():
            self.ln_f = RmsNorm(config.hidden_size, eps=config.norm_epsilon, dtype=config.dtype)

    def forward(
        self,
        input_ids: Any,
        position_ids: Any = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        hidden_states: Any = None,
        mrope_params: Any = None,
        lora_params: Any = None,
    ) -> Any:
        if self.mapping.is_first_pp_rank():
            x = self.vocab_embedding(input_ids)
        else:
            x = recv(hidden_states, self.mapping.prev_pp_rank())
        x = self.layers(
            x,
            use_cache=use_cache,
            spec_decoding_params=spec_decoding_params,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            mrope_params=mrope_params,
        )
        x, presents = x if use_cache else (x, None)
        if self.mapping.is_last_pp_rank():
            x = self.ln_f(x)
        else:
            x = send(x, self.mapping.next_pp_rank())
        return (x, presents) if use_cache else x


def output_layer(config: Any) -> Any:
    """``lm_head`` with the vocabulary padded for the ranks; None but in the last pipeline stage."""
    mapping = config.mapping
    if not mapping.is_last_pp_rank():
        return None
    return ColumnLinear(
        config.hidden_size,
        -(-config.vocab_size // mapping.tp_size) * mapping.tp_size,
        bias=False,
        dtype=config.dtype,
        tp_group=mapping.tp_group,
        tp_size=mapping.tp_size,
        gather_output=True,
    )
