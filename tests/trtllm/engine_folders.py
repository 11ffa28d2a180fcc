"""Engine folders for the executor's double: the config.json of a plan, and a file for each rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.backends.base import EngineOptions
from trt_razor.engine import HEADS_FILE, write_manifest
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    SECTION,
    RazorPlan,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
    razor_section,
)
from trt_razor.trtllm.ranks import equalise, rank_layout
from trt_razor.trtllm.release import release_of

POLICY = RazorPolicy(sink_tokens=4, min_window=40, compression=5, comp_tokens=1)
MAX_SEQ_LEN = 256


def model() -> ModelSpec:
    """4 layers, 8 KV heads of 64, two query heads each."""
    config = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    }
    return spec_from_hf_config(config, "little-llama")


def head_map(spec: ModelSpec) -> HeadMap:
    """Layers that mix, one that only retrieves, one without retrieval heads."""
    heads = ((0, 5), (1, 2, 3), tuple(range(8)), ())
    return HeadMap(spec.name, spec.fingerprint(), 4, 8, heads, method="test", source="by hand")


@dataclass(frozen=True)
class Folder:
    """An engine folder and what it was made of."""

    path: Path
    spec: ModelSpec
    plan: RazorPlan | None


def engine_folder(
    path: Path,
    release: str = "1.0.0",
    razor: bool = True,
    tp_size: int = 1,
    fp8: bool = False,
    batch: int = 4,
    chunk: int = 0,
    max_seq_len: int = MAX_SEQ_LEN,
    facts: dict[str, str] | None = None,
) -> Folder:
    """Write the folder as a build for that release leaves it, engines apart: those are empty."""
    spec, heads = model(), None
    options = TrtLlmOptions(tp_size=tp_size, kv_dtype="fp8" if fp8 else "auto")
    plan = None
    config = _checkpoint_config(spec, tp_size, fp8)
    if razor:
        heads = equalise(head_map(spec), tp_size)
        section = razor_section(spec, heads, rank_layout(heads, tp_size), POLICY)
        plan = plan_engine(
            spec, section, max_seq_len, "float16", options, release_of(release), chunk
        )
        config = plan.pretrained_config({**config, SECTION: section.to_json()})
    arguments = build_arguments(max_seq_len, batch, options, chunk)
    plugins = arguments.plugin_config()
    path.mkdir(parents=True)
    document = {
        "version": release,
        "pretrained_config": config,
        "build_config": {
            **arguments.build_config(),
            "plugin_config": plugins if plan is None else plan.plugin_config(plugins),
        },
    }
    (path / "config.json").write_text(json.dumps(document))
    for rank in range(tp_size):
        (path / f"rank{rank}.engine").write_bytes(b"")
    if heads is not None:
        heads.save(path / HEADS_FILE)
    graph = GraphOptions(POLICY, heads, max_seq_len, "float16")
    found = {"tensorrt_llm": release, "tensorrt": "10.11", "tp_size": str(tp_size), **(facts or {})}
    write_manifest(path, spec, "test", "tensorrt-llm", found, EngineOptions(graph, batch, chunk))
    return Folder(path, spec, plan)


def _checkpoint_config(spec: ModelSpec, tp_size: int, fp8: bool) -> dict[str, Any]:
    return {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_size": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8" if fp8 else None},
    }
