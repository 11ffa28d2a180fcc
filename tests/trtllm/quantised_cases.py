"""Quantised checkpoints to permute, shared by the tests of ``quantized.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rank_folders import (
    Model,
    Stored,
    read_safetensors,
    write_folder,
    write_safetensors,
)

from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.options import RazorSection, TrtLlmOptions, razor_section
from trt_razor.trtllm.quantized import (
    TrtLlmCheckpoint,
    open_trtllm_checkpoint,
    permute_checkpoint,
)
from trt_razor.trtllm.ranks import RankLayout, equalise, rank_layout

POLICY = RazorPolicy(sink_tokens=2, min_window=6, compression=5, comp_tokens=1)


def spec_of(architecture: str = "llama", **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": architecture,
        "num_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,
        "vocab_size": 50,
        "max_positions": 128,
        "rms_norm_eps": 1e-5,
    }
    return ModelSpec(**{**fields, **changes})


SPECS = {
    "llama": spec_of(),
    "mistral": spec_of("mistral", num_kv_heads=8),
    "qwen2": spec_of("qwen2", qkv_bias=True),
    "qwen3": spec_of("qwen3", qk_norm=True),
    "llama-bias": spec_of(qkv_bias=True, o_bias=True),
    "baichuan": spec_of("baichuan", hidden_size=128, num_kv_heads=8),
    "baichuan-alibi": spec_of("baichuan", hidden_size=128, num_kv_heads=8, position="alibi"),
}


def head_map_of(spec: ModelSpec) -> HeadMap:
    """Retrieval heads that are in no order of ranks, with scores for the next ones."""
    last = spec.num_kv_heads - 1
    retrieval = ((last,), (1, last), (0, last - 1))[: spec.num_layers]
    row = tuple(float(h * 7 % 5) for h in range(spec.num_kv_heads))
    scores = {"echo": (row,) * spec.num_layers}
    return HeadMap(
        spec.name,
        spec.fingerprint(),
        spec.num_layers,
        spec.num_kv_heads,
        retrieval,
        method="test",
        source="chosen by hand",
        scores=scores,
    )


def permute(
    source: TrtLlmCheckpoint, target: Path, tp: int = 1, pp: int = 1, kv: str = "auto"
) -> tuple[RankLayout, HeadMap]:
    """Permute for a Razor engine; returns the layout and the map that it was made of."""
    spec = source.spec
    equal = equalise(head_map_of(spec), tp)
    layout = rank_layout(equal, tp)
    section = razor_section(spec, equal, layout, POLICY)
    convert(source, layout, section, TrtLlmOptions(tp, pp, kv), target)
    return layout, equal


def convert(
    source: TrtLlmCheckpoint,
    layout: RankLayout,
    section: RazorSection | None,
    options: TrtLlmOptions,
    target: Path,
) -> None:
    target.mkdir(exist_ok=True)
    permute_checkpoint(source, layout, section, options, target, lambda *_: None)


def open_model(folder: Path, model: Model, tp: int = 1, pp: int = 1) -> TrtLlmCheckpoint:
    return open_trtllm_checkpoint(write_folder(folder, model, tp, pp), None)


def moved(spec: ModelSpec, name: str, value: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """A weight with its KV heads in another order, head by head."""
    match = re.search(r"self_attn\.([qkvo])_proj\.(weight|bias)$", name)
    if match is None or match[0].endswith("o_proj.bias"):
        return value
    dim = spec.head_dim
    groups = spec.group if match[1] in "qo" else 1
    rows = value.T if match[1] == "o" else value
    heads = [h * groups + g for h in order for g in range(groups)]
    out = np.concatenate([rows[h * dim : (h + 1) * dim] for h in heads])
    return out.T if match[1] == "o" else out


def change_config(folder: Path, change: Callable[[Any], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_tensors(
    folder: Path, change: Callable[[Stored], object], file: str = "rank0.safetensors"
) -> None:
    tensors = read_safetensors(folder / file)
    change(tensors)
    write_safetensors(folder / file, tensors)
