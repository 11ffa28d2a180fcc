"""Tiny models of all families for tests on the double, and their builds."""

from __future__ import annotations

from typing import Any

from doubles import Double

CONFIG: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "dtype": "float16",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 64,
    "vocab_size": 100,
    "hidden_act": "silu",
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "position_embedding_type": "rope_gpt_neox",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"architecture": "MistralForCausalLM"},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qwen_type": "qwen2", "seq_length": 512},
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "seq_length": 512,
        "attn_bias": False,
    },
    "baichuan": {"architecture": "BaichuanForCausalLM", "num_key_value_heads": 4},
    "alibi": {
        "architecture": "BaichuanForCausalLM",
        "num_key_value_heads": 4,
        "position_embedding_type": "alibi",
    },
}


def make_config(trtllm: Double, **changes: Any) -> Any:
    return trtllm.load("tensorrt_llm.models").PretrainedConfig.from_dict(CONFIG | changes)


def make_model(trtllm: Double, **changes: Any) -> Any:
    config = make_config(trtllm, **changes)
    return trtllm.load("tensorrt_llm.models").MODEL_MAP[config.architecture](config)


def build(trtllm: Double, model: Any, **options: Any) -> Any:
    builder = trtllm.load("tensorrt_llm.builder")
    sizes = {"max_batch_size": 4, "max_input_len": 128, "max_seq_len": 256, "max_num_tokens": 512}
    return builder.build(model, builder.BuildConfig(**(sizes | options)))
