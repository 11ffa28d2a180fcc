"""What the networks of all families have around their layers.

TensorRT-LLM writes it once per family (QWenModel, LLaMAModel, BaichuanModel); the attribute paths
``transformer.vocab_embedding | layers | ln_f`` and the pipeline's send and recv are read.
"""

from __future__ import annotations

from typing import Any

from ..functional import recv, send
from ..layers import ColumnLinear, Embedding, RmsNorm
from ..module import Module
from .modeling_utils import DecoderLayerList


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
            hidden_states = self.vocab_embedding(input_ids)
        else:
            hidden_states = recv(hidden_states, self.mapping.prev_pp_rank())
        hidden_states = self.layers(
            hidden_states,
            use_cache=use_cache,
            spec_decoding_params=spec_decoding_params,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=attention_params,
            mrope_params=mrope_params,
        )
        presents: Any = None
        if use_cache:
            hidden_states, presents = hidden_states
        if self.mapping.is_last_pp_rank():
            hidden_states = self.ln_f(hidden_states)
        else:
            hidden_states = send(hidden_states, self.mapping.next_pp_rank())
        return (hidden_states, presents) if use_cache else hidden_states


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
