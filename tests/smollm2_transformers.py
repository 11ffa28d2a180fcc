"""SmolLM2's real weights in a model of transformers: somebody else's computation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trt_razor.models.checkpoint import Checkpoint


def transformers_model(checkpoint: Checkpoint) -> Any:
    """A ``LlamaForCausalLM`` in float32 with the checkpoint's weights, for inference."""
    spec = checkpoint.spec
    assert spec.rope is not None
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_position_embeddings=spec.max_positions,
            rms_norm_eps=spec.rms_norm_eps,
            rope_theta=spec.rope.theta,
            tie_word_embeddings=True,
        )
    ).eval()
    state = {name: torch.from_numpy(checkpoint.tensor(name).copy()) for name in spec.tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model
