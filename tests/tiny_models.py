"""A tiny model as a user would have it: a Hugging Face folder with weights and a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.build import BuildRequest, build_engine
from trt_razor.engine import Engine
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.policy import RazorPolicy

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 257,
}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
POLICY = RazorPolicy(sink_tokens=2, min_window=8, compression=5, comp_tokens=1)
RETRIEVAL = ((0,), ())


@dataclass(frozen=True)
class TinyModel:
    """A Hugging Face folder, its shape, and a head map file."""

    folder: Path
    spec: ModelSpec
    heads: Path

    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(None, self.folder)

    def request(self, output: Path, razor: bool = True, **changes: Any) -> BuildRequest:
        fields: dict[str, Any] = {
            "checkpoint": self.folder,
            "razor": razor,
            "heads": str(self.heads) if razor else "auto",
            "backend": "onnxruntime",
            "output": output,
            "policy": POLICY,
            "max_seq_len": 64,
            "max_batch_size": 3,
            "prefill_chunk": 5,
        }
        return BuildRequest(**{**fields, **changes})

    def build(self, output: Path, razor: bool = True, **changes: Any) -> Engine:
        return build_engine(self.request(output, razor, **changes))


def byte_tokenizer_json() -> str:
    """Every byte is a token; <s> is 256 and </s> 257."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    return str(backend.to_str())


def write_model(folder: Path, **changes: Any) -> ModelSpec:
    """config.json, model.safetensors (seeded random numbers) and the tokenizer's files.

    ``changes``: of CONFIG; None leaves a field out.
    """
    from safetensors.numpy import save_file

    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    spec = spec_from_hf_config(config, folder.name)
    folder.mkdir(parents=True)
    weights = random_checkpoint(spec)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: weights.tensor(n) for n in spec.tensors()}
    if spec.architecture == "baichuan":  # stores q, k and v as one
        for i in range(spec.num_layers):
            attention = f"model.layers.{i}.self_attn."
            parts = [tensors.pop(f"{attention}{n}_proj.weight") for n in "qkv"]
            tensors[f"{attention}W_pack.weight"] = np.concatenate(parts)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return spec


def make_model(folder: Path) -> TinyModel:
    spec = write_model(folder / "tiny-llama")
    head_map = HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        spec.num_kv_heads,
        RETRIEVAL,
        method="test",
        source="chosen by hand",
    )
    head_map.save(folder / "heads.json")
    return TinyModel(folder / "tiny-llama", spec, folder / "heads.json")
