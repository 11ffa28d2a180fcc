"""Tiny models of every supported architecture, and rank files put together again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec, RopeSpec

Array = np.ndarray[Any, Any]

LAYERS, VOCAB, DIM = 4, 61, 8
LLAMA3 = RopeSpec(500000.0, "llama3", 4.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


def spec_of(architecture: str, heads: int, kv_heads: int, **changes: Any) -> ModelSpec:
    """hidden_size is not heads · head_dim, except for Baichuan, which has it so."""
    hidden = heads * DIM if architecture == "baichuan" else 48
    spec = ModelSpec(
        f"tiny-{architecture}",
        architecture,
        LAYERS,
        hidden,
        40,
        heads,
        kv_heads,
        DIM,
        VOCAB,
        256,
        1e-5,
    )
    return dataclasses.replace(spec, **changes)


SPECS = {
    "llama-gqa": spec_of("llama", 8, 4, rope=LLAMA3),
    "llama-mha-bias": spec_of("llama", 4, 4, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama-linear": spec_of("llama", 8, 4, rope=RopeSpec(1e4, "linear", 2.5)),
    "mistral-gqa": spec_of("mistral", 16, 4),
    "mistral-mha": spec_of("mistral", 4, 4),
    "qwen2-gqa": spec_of("qwen2", 8, 4, qkv_bias=True, rope=RopeSpec(1e6)),
    "qwen2-mha-tied": spec_of("qwen2", 4, 4, qkv_bias=True, tie_embeddings=True),
    "qwen3-gqa": spec_of("qwen3", 8, 4, qk_norm=True, rope=RopeSpec(1e6)),
    "qwen3-mha-tied": spec_of("qwen3", 4, 4, qk_norm=True, tie_embeddings=True),
    "baichuan-rope": spec_of("baichuan", 4, 4, norm_head=True),
    "baichuan1-rope": spec_of("baichuan", 8, 8),
    "baichuan-alibi": spec_of("baichuan", 8, 8, position="alibi", norm_head=True),
    # Not a power of two: the slopes are no geometric row.
    "baichuan-alibi-12": spec_of("baichuan", 12, 12, position="alibi", norm_head=True),
}


class RandomModel:
    """A WeightSource whose every tensor is random, norms and biases too; it counts reads."""

    def __init__(self, spec: ModelSpec, seed: int = 0, scale: float = 0.2) -> None:
        self.spec = spec
        rng = np.random.default_rng(seed)
        self.reads: list[str] = []
        self.weights: dict[str, Array] = {}
        for name, shape in spec.tensors().items():
            noise = rng.standard_normal(shape)
            if name.endswith("norm.weight"):
                noise = 1 + noise / 4
            else:
                noise *= scale
            self.weights[name] = noise.astype(np.float32)

    def tensor(self, name: str) -> Array:
        self.reads.append(name)
        return self.weights[name]


def head_map_of(spec: ModelSpec, seed: int = 0, per_layer: int | None = None) -> HeadMap:
    """Scattered retrieval heads with scores; every layer has some and leaves some."""
    rng = np.random.default_rng(seed)
    rows, kv = [], spec.num_kv_heads
    for layer in range(spec.num_layers):
        count = per_layer or 1 + layer % (kv - 1)
        rows.append(tuple(sorted(int(h) for h in rng.permutation(kv)[:count])))
    scores = {
        name: tuple(tuple(map(float, row)) for row in rng.random((spec.num_layers, kv)))
        for name in ("echo", "induction")
    }
    return HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        kv,
        tuple(rows),
        "test",
        "random",
        scores=scores,
    )


# Rank files, read as TensorRT-LLM reads them -------------------------------------------------------
def read_ranks(folder: Path) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """config.json and the tensors of each rank."""
    config = json.loads((folder / "config.json").read_text())
    world = config["mapping"]["world_size"]
    assert world == config["mapping"]["tp_size"] * config["mapping"]["pp_size"]
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(["config.json", *(f"rank{r}.safetensors" for r in range(world))])
    return config, [load_file(folder / f"rank{r}.safetensors") for r in range(world)]


class MergedModel:
    """The weights of a model from the rank files of a TensorRT-LLM checkpoint: the split undone.

    Written from what TensorRT-LLM's layers hold (fused qkv, columns and rows of a rank, layers counted
    within a stage, lm_head filled up), not from the code that splits.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self.config, self.ranks = read_ranks(folder)
        self.tp = self.config["mapping"]["tp_size"]
        self.pp = self.config["mapping"]["pp_size"]
        self.unread = [set(rank) for rank in self.ranks]

    def get(self, stage: int, name: str) -> list[torch.Tensor]:
        """A tensor of every tensor-parallel rank of a stage."""
        numbers = range(stage * self.tp, (stage + 1) * self.tp)
        for rank in numbers:
            self.unread[rank].discard(name)
        return [self.ranks[rank][name] for rank in numbers]

    def same(self, stage: int, name: str) -> torch.Tensor:
        first, *rest = self.get(stage, name)
        assert all(torch.equal(first, other) for other in rest), name
        return first

    def torch_tensor(self, name: str) -> torch.Tensor:
        """A weight by its Hugging Face name."""
        if name == "model.embed_tokens.weight":
            return self.same(0, "transformer.vocab_embedding.weight")
        if name == "model.norm.weight":
            return self.same(self.pp - 1, "transformer.ln_f.weight")
        if name == "lm_head.weight":
            rows = torch.cat(self.get(self.pp - 1, "lm_head.weight"))
            assert len(rows) == -(-self.spec.vocab_size // self.tp) * self.tp
            assert not rows[self.spec.vocab_size :].any()
            return rows[: self.spec.vocab_size]
        _, _, layer, rest = name.split(".", 3)
        per_stage = self.spec.num_layers // self.pp
        stage, local = divmod(int(layer), per_stage)
        prefix = f"transformer.layers.{local}."
        module, kind = rest.rsplit(".", 1)
        whole = {
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_layernorm",
            "self_attn.q_norm": "attention.q_layernorm",
            "self_attn.k_norm": "attention.k_layernorm",
        }
        rows = {"mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate"}
        columns = {"self_attn.o_proj": "attention.dense", "mlp.down_proj": "mlp.proj"}
        if module in whole:
            return self.same(stage, f"{prefix}{whole[module]}.{kind}")
        if module in rows:
            return torch.cat(self.get(stage, f"{prefix}{rows[module]}.{kind}"))
        if module in columns and kind == "bias":
            return self.same(stage, f"{prefix}{columns[module]}.bias")
        if module in columns:
            return torch.cat(self.get(stage, f"{prefix}{columns[module]}.weight"), dim=1)
        spec, tp = self.spec, self.tp
        q = spec.num_heads // tp * spec.head_dim
        kv = -(-spec.num_kv_heads // tp) * spec.head_dim
        parts = [
            dict(zip("qkv", t.split([q, kv, kv]), strict=True))[module[len("self_attn.")]]
            for t in self.get(stage, f"{prefix}attention.qkv.{kind}")
        ]
        if module != "self_attn.q_proj" and tp > spec.num_kv_heads:
            copies = tp // spec.num_kv_heads
            for i, part in enumerate(parts):
                assert torch.equal(part, parts[i // copies * copies]), name
            parts = parts[::copies]
        return torch.cat(parts)

    def tensor(self, name: str) -> Array:
        return self.torch_tensor(name).float().numpy()
