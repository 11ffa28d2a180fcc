"""Tiny models for the tests of head finding."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from trt_razor.models.spec import ModelSpec


def tiny_spec(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": "llama",
        "num_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 256,
        "max_positions": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelSpec(**{**fields, **changes})


class TinyCheckpoint:
    """Random weights, each made from (seed, name); counts what is read."""

    location = "memory"

    def __init__(self, spec: ModelSpec, seed: int = 0, gain: float = 1.0) -> None:
        self.spec = spec
        self.seed = seed
        self.gain = gain
        self.reads: dict[str, int] = {}

    def tensor(self, name: str) -> np.ndarray[Any, Any]:
        self.reads[name] = self.reads.get(name, 0) + 1
        shape = self.spec.tensors()[name]
        key = hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(key, "little"))
        if len(shape) == 1:
            return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        scale = self.gain / np.sqrt(shape[1]) if "embed" not in name else 1.0
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def identity(self) -> str:
        return "ab" * 32
