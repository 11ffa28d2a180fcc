"""Tiny models with given weights, and what a Razor cache must hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec


def tiny_spec(**changes: object) -> ModelSpec:
    fields = {
        "name": "tiny",
        "architecture": "llama",
        "num_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 8,
        "vocab_size": 97,
        "max_positions": 512,
        "rms_norm_eps": 1e-5,
    }
    return ModelSpec(**{**fields, **changes})  # type: ignore[arg-type]


class DictCheckpoint:
    """A checkpoint in memory: matrices of std 0.3, so that attention is far from uniform."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        rng = np.random.default_rng(seed)
        self.weights = {
            name: (0.3 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32)
            for name, shape in spec.tensors().items()
        }

    def tensor(self, name: str) -> np.ndarray:
        return self.weights[name]


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    return tiny_spec


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., DictCheckpoint]:
    return DictCheckpoint


@pytest.fixture(scope="session")
def make_map() -> Callable[..., HeadMap]:
    def build(spec: ModelSpec, *layers: tuple[int, ...]) -> HeadMap:
        return HeadMap(
            spec.name,
            spec.fingerprint(),
            spec.num_layers,
            spec.num_kv_heads,
            tuple(layers),
            "by hand",
            "test",
        )

    return build
