"""Tiny model files for the tests: Hugging Face folders and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan": "BaichuanForCausalLM",
}


def config(model_type: str = "llama", /, **changes: Any) -> dict[str, Any]:
    """A config.json; a change to ``...`` removes the field."""
    data = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "rms_norm_eps": 1e-5,
        **SIZES,
        **changes,
    }
    return {k: v for k, v in data.items() if v is not ...}


def tensors_for(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}


def write_folder(
    folder: Path, config_json: dict[str, Any], tensors: dict[str, Any], shards: int = 1
) -> Path:
    """A Hugging Face folder with safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_gguf(
    path: Path,
    arch: str,
    tensors: dict[str, Any],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    quant: Any = None,
    **more: Any,
) -> Path:
    """A GGUF file. ``tensors`` have GGUF names; ``more`` adds metadata (``__`` for a dot)."""
    import gguf

    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(2)
    w.add_context_length(64)
    w.add_embedding_length(32)
    w.add_feed_forward_length(64)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(5e5)
    for key, value in more.items():
        key = key.replace("__", ".")
        if isinstance(value, str):
            w.add_string(key, value)
        elif isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, list):
            w.add_array(key, value)
        else:
            w.add_uint32(key, value)
    for name, array in tensors.items():
        if quant is not None and array.ndim == 2:
            w.add_tensor(name, gguf.quantize(array, quant), raw_dtype=quant)
        else:
            w.add_tensor(name, array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
