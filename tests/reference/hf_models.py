"""Tiny Hugging Face models for the tests of reference.hf, and their reference decoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_model
from torch import Tensor

from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import open_checkpoint
from trt_razor.models.positions import rope_table
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.reference import ReferenceDecoder

MAX_POSITIONS = 1024
LAYERS = 2
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8},
}
TOKENS = torch.randint(0, 250, (400,), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class HfModel:
    """A folder that transformers and this package read alike."""

    folder: Path
    spec: ModelSpec

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder).to(dtype).eval()

    def decoder(self, dtype: torch.dtype = torch.float32) -> ReferenceDecoder:
        return ReferenceDecoder(open_checkpoint(None, self.folder), dtype)

    def head_map(self, *heads: tuple[int, ...]) -> HeadMap:
        spec = self.spec
        return HeadMap(
            spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, heads, "test", "test"
        )


def make_hf_model(
    folder: Path, architecture: str, window: int | None = None, embedding: float = 1.0
) -> HfModel:
    """``embedding`` scales the embeddings: tokens of random weights are all alike otherwise."""
    fields = {"max_position_embeddings": MAX_POSITIONS, "torch_dtype": "float32"}
    write_model(folder, **CONFIGS[architecture], **fields)
    if architecture == "mistral":  # write_model leaves None out, and absent means 4096
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    if embedding != 1.0:
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"] *= embedding
        save_file(weights, folder / "model.safetensors")
    return HfModel(folder, open_checkpoint(None, folder).spec)


def hf_logits(model: Any, tokens: Tensor, chunks: Sequence[int], cache: Any = None) -> Tensor:
    """Logits [n, vocab] of one sequence in chunks; ``cache`` goes on where it is."""
    rows = []
    with torch.no_grad():
        for part in tokens.split(list(chunks)):
            out = model(part[None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    return torch.cat(rows)


def reference_logits(
    decoder: ReferenceDecoder,
    tokens: Tensor,
    chunks: Sequence[int],
    policy: RazorPolicy | None,
    head_map: HeadMap | None,
) -> Tensor:
    cache = decoder.new_cache(policy, head_map, MAX_POSITIONS)
    return torch.cat([decoder.forward(part, cache) for part in tokens.split(list(chunks))])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def make_exact(model: Any, spec: ModelSpec) -> Any:
    """Give a float64 model the reference's rotary table and a float64 norm.

    transformers computes both in float32 whatever the dtype of the model.
    """
    table = torch.from_numpy(rope_table(spec, MAX_POSITIONS)).double()
    cos, sin = (half.repeat(1, 2) for half in table.chunk(2, dim=-1))

    def rotary(x: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return cos[position_ids], sin[position_ids]

    def norm(module: Any, x: Tensor) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True)
        return module.weight * (x * torch.rsqrt(mean_square + module.variance_epsilon))

    model.model.rotary_emb.forward = rotary
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(norm, module)
    return model


def storages(thing: Any) -> int:
    """Bytes of all distinct storages that can be reached from an object's attributes."""
    found: dict[int, int] = {}
    visited: set[int] = set()

    def visit(x: Any) -> None:
        if id(x) in visited:
            return
        visited.add(id(x))
        if isinstance(x, Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for value in x.values():
                visit(value)
        elif isinstance(x, (list, tuple)):
            for value in x:
                visit(value)
        elif hasattr(x, "__dict__"):
            visit(vars(x))

    visit(thing)
    return sum(found.values())
