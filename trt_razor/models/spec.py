"""ModelSpec: the shape of a decoder-only model, from a Hugging Face ``config.json``.

One description serves the planner, the reference, head finding and the graph. Supported
architectures: llama (1, 2, 3, 3.1), mistral, qwen2 (Qwen1.5 / 2 / 2.5), qwen3, baichuan (2, 7B
with RoPE and 13B with ALiBi).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trt_razor.errors import UsageError, did_you_mean

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "baichuan")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: base ``theta`` and one of the scalings none, linear, llama3, yarn.

    Field names are those of Hugging Face ``rope_scaling``.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a decoder-only model. Sizes in elements, positions in tokens."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    position: str = "rope"  # or "alibi"
    rope: RopeSpec = field(default_factory=RopeSpec)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    norm_head: bool = False  # Baichuan 2: rows of lm_head are normalised to length 1
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str = "bfloat16"  # dtype of the published weights

    @property
    def group(self) -> int:
        """g = Hq / Hkv: query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def fingerprint(self) -> str:
        """sha256 over everything that decides what a head does, but not over name or weights."""
        data = asdict(self)
        for key in ("name", "bos_token_id", "eos_token_ids", "torch_dtype", "max_positions"):
            data.pop(key)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every weight by its Hugging Face name, with its shape (``nn.Linear``: [out, in])."""
        h, f = self.hidden_size, self.intermediate_size
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            out[p + "input_layernorm.weight"] = (h,)
            for proj, size in (("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)):
                out[f"{p}self_attn.{proj}_proj.weight"] = (size, h)
                if self.qkv_bias:
                    out[f"{p}self_attn.{proj}_proj.bias"] = (size,)
            if self.qk_norm:
                out[p + "self_attn.q_norm.weight"] = (self.head_dim,)
                out[p + "self_attn.k_norm.weight"] = (self.head_dim,)
            out[p + "self_attn.o_proj.weight"] = (h, self.q_size)
            if self.o_bias:
                out[p + "self_attn.o_proj.bias"] = (h,)
            out[p + "post_attention_layernorm.weight"] = (h,)
            for proj, shape in (("gate", (f, h)), ("up", (f, h)), ("down", (h, f))):
                out[f"{p}mlp.{proj}_proj.weight"] = shape
                if self.mlp_bias:
                    out[f"{p}mlp.{proj}_proj.bias"] = shape[:1]
        out["model.norm.weight"] = (h,)
        if not self.tie_embeddings:
            out["lm_head.weight"] = (self.vocab_size, h)
        return out

    def num_parameters(self) -> int:
        return sum(math.prod(s) for s in self.tensors().values())


def spec_from_hf_config(config: Mapping[str, Any], name: str, where: str = "config.json") -> ModelSpec:
    """ModelSpec from the parsed ``config.json`` of a Hugging Face checkpoint.

    Raises:
        UsageError: unknown architecture, missing or impossible field, or a feature that would
            silently change the result (sliding windows in use, dynamic RoPE, other activations).
    """
    raise UsageError(f"{where}: {name}: {did_you_mean('x', ARCHITECTURES)}")  # filled in below
