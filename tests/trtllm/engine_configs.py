"""config.json of engines as TensorRT-LLM writes it, for tests, before and after ``finish``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from engine_plans import COUNTS, POLICY, SPEC, section

from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    RazorPlan,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
)
from trt_razor.trtllm.engine_json import finish
from trt_razor.trtllm.model_config import trtllm_config
from trt_razor.trtllm.release import LocalCache, release_of

VERSION = {LocalCache.CYCLIC: "1.0.0", LocalCache.SLOTS: "1.2.1"}
# What TensorRT-LLM writes beside what we tell it; only rank 0 writes it.
BUILD = {
    "opt_num_tokens": 4,
    "max_prompt_embedding_table_size": 0,
    "kv_cache_type": "PAGED",
    "gather_generation_logits": False,
    "max_draft_len": 0,
    "speculative_decoding_mode": 1,
    "lora_config": {"lora_dir": [], "max_lora_rank": 64, "lora_target_modules": []},
    "output_timing_cache": "model.cache",
}
PLUGINS = {
    "dtype": "float16",
    "lora_plugin": None,
    "mamba_conv1d_plugin": "auto",
    "paged_kv_cache": True,
    "paged_state": False,
    "manage_weights": False,
}


def engine(
    cache: LocalCache | None,
    spec: ModelSpec = SPEC,
    counts: tuple[int, ...] = COUNTS,
    policy: RazorPolicy = POLICY,
    max_seq_len: int = 1000,
    dtype: str = "float16",
    **options: Any,
) -> tuple[dict[str, Any], RazorPlan | None]:
    """config.json as TensorRT-LLM leaves it for a model that says nothing of cache layers, and the plan.

    ``cache`` None: a dense engine.
    """
    wanted = TrtLlmOptions(**options)
    version = VERSION[cache or LocalCache.SLOTS]
    razor = None if cache is None else section(counts, policy, wanted.tp_size, spec)
    arguments = build_arguments(max_seq_len, 4, wanted, 0)
    config = {
        "version": version,
        "pretrained_config": trtllm_config(spec, dtype, wanted, razor),
        "build_config": {
            **BUILD,
            **arguments.build_config(),
            "plugin_config": {**PLUGINS, **arguments.plugin_config()},
        },
    }
    if razor is None:
        return config, None
    return config, plan_engine(spec, razor, max_seq_len, dtype, wanted, release_of(version))


def written(folder: Path, config: dict[str, Any], ranks: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        (folder / f"rank{rank}.engine").write_bytes(b"engine")
    return folder


def finished(folder: Path, cache: LocalCache, **changes: Any) -> tuple[dict[str, Any], RazorPlan]:
    config, plan = engine(cache, **changes)
    assert plan is not None
    return finish(written(folder, config), plan), plan


def put(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one field set, or without it: ``...``."""
    out = copy.deepcopy(config)
    *parents, name = path.split(".")
    place = out
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return out
