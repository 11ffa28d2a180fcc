"""Repositories of TensorRT-LLM engines: what the stock backend is told, from engines as they are built."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "trtllm"))
from engine_folders import Folder, engine_folder
from test_repository import parameters, write

from trt_razor.backends.base import EngineOptions
from trt_razor.engine import Engine, write_manifest
from trt_razor.errors import RazorError, UsageError
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.manifest import Manifest
from trt_razor.policy import RazorPolicy
from trt_razor.serving.interface import MODELS

FACTS = {
    "preload": "libtrt_razor_preload_trt10.so",
    "plugin": "libtrt_razor_plugins_trt10.so",
    "plugin_sha256": "0" * 64,
}


def changed(folder: Path) -> Path:
    """Its files were changed: a manifest that agrees with them, as a build writes it."""
    (folder / "manifest.json").rename(folder.parent / "before.json")
    m = Manifest.from_json(json.loads((folder.parent / "before.json").read_text()), "before")
    heads = HeadMap.load(folder / "heads.json") if m.razor else None
    graph = GraphOptions(m.policy or RazorPolicy(), heads, m.max_seq_len, m.dtype)
    options = EngineOptions(graph, m.max_batch_size, m.prefill_chunk)
    write_manifest(folder, m.spec, m.checkpoint, m.backend, m.facts, options)
    return folder


def with_tokenizer(folder: Path, tokenizer: Path) -> None:
    """As a build from a checkpoint with a tokenizer leaves it."""
    shutil.copytree(tokenizer, folder / "tokenizer")
    changed(folder)


@pytest.fixture
def cyclic(tmp_path: Path) -> Folder:
    return engine_folder(tmp_path / "engine", facts=FACTS)


# Settings that come from the engine ---------------------------------------------------------------
@pytest.mark.parametrize(
    "build, windows, sinks, chunked",
    [
        ({"release": "1.0.0"}, "256,68", "4", "false"),
        ({"release": "1.0.0", "chunk": 32}, "256,68", "4", "true"),
        ({"release": "1.0.0", "tp_size": 2}, "256,68", "4", "false"),
        # Local heads in state slots: one window, and no sinks that the manager knows.
        ({"release": "1.1.0"}, "256", "", "false"),
        ({"release": "1.2.1"}, "256", "", "false"),
        ({"release": "1.2.1", "tp_size": 2}, "256", "", "false"),
        ({"release": "1.2.1", "razor": False}, "", "", "false"),
        ({"release": "1.2.1", "razor": False, "chunk": 32}, "", "", "true"),
    ],
)
def test_caches(
    tmp_path: Path, build: dict[str, Any], windows: str, sinks: str, chunked: str
) -> None:
    folder = engine_folder(tmp_path / "engine", **build)
    if folder.plan is not None:
        assert windows == ",".join(map(str, folder.plan.window_list()))
        assert sinks == ("4" if folder.plan.sink_token_length else "")
    found = parameters(write(folder.path, tmp_path / "r"))
    assert found["max_attention_window_size"] == windows
    assert found["sink_token_length"] == sinks
    assert found["enable_chunked_context"] == chunked
    assert found["enable_kv_cache_reuse"] == "false"
    assert found["gpt_model_type"] == "inflight_fused_batching"
    assert found["gpt_model_path"] == str(folder.path)
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.9"
    assert found["max_tokens_in_paged_kv_cache"] == found["gpu_device_ids"] == ""
    assert found["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert found["cuda_graph_mode"] == "false"
    config = (tmp_path / "r" / "tensorrt_llm" / "config.pbtxt").read_text()
    assert "max_batch_size: 4\n" in config
    assert "decoupled: true" in config
    assert "${" not in config


def test_options_reach_the_config(cyclic: Folder, tmp_path: Path) -> None:
    output = write(
        cyclic.path,
        tmp_path / "r",
        kv_cache_free_gpu_mem_fraction=0.123456789,
        max_tokens_in_paged_kv_cache=256,
        batch_scheduler_policy="max_utilization",
        gpu_device_ids="3",
        decoupled=False,
        max_queue_size=7,
        max_batch_size=2,
        exclude_input_in_output=False,
    )
    found = parameters(output)
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.123456789"
    assert found["max_tokens_in_paged_kv_cache"] == "256"
    assert found["batch_scheduler_policy"] == "max_utilization"
    assert found["gpu_device_ids"] == "3"
    assert found["exclude_input_in_output"] == "false"
    config = (output / "tensorrt_llm" / "config.pbtxt").read_text()
    assert "decoupled: false" in config
    assert "max_queue_size: 7" in config
    assert "max_batch_size: 2\n" in config
    assert "come whole" in (output / "README.md").read_text()


@pytest.mark.parametrize("dtype, shown", [("float32", "FP32"), ("float16", "FP16"), (None, "FP32")])
def test_type_of_the_logits(tmp_path: Path, dtype: str | None, shown: str) -> None:
    folder = engine_folder(tmp_path / "engine").path
    path = folder / "config.json"
    data = json.loads(path.read_text())
    if dtype is not None:
        data["pretrained_config"]["logits_dtype"] = dtype
    path.write_text(json.dumps(data))
    config = (write(changed(folder), tmp_path / "r") / "tensorrt_llm" / "config.pbtxt").read_text()
    assert f'name: "generation_logits" data_type: TYPE_{shown} ' in config


def test_type_of_the_logits_that_triton_has_no_word_for(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine").path
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["pretrained_config"]["logits_dtype"] = "bfloat16"
    path.write_text(json.dumps(data))
    with pytest.raises(
        RazorError, match="logits_dtype: expected float32 or float16, found 'bfloat16'"
    ):
        write(changed(folder), tmp_path / "r")


# With a tokenizer ---------------------------------------------------------------------------------
@pytest.mark.parametrize("mounted", [None, "/data/models"])
def test_five_models(
    cyclic: Folder, razor_engine: Engine, tmp_path: Path, mounted: str | None
) -> None:
    with_tokenizer(cyclic.path, razor_engine.directory / "tokenizer")
    output = write(cyclic.path, tmp_path / "r", copy_engine=True, mounted_at=mounted)
    assert sorted(p.name for p in output.iterdir() if p.is_dir()) == sorted(MODELS)
    # The stock backend takes an absolute path only.
    place = f"{mounted or output}/tensorrt_llm/1/engine"
    assert parameters(output)["gpt_model_path"] == place
    assert f"\nengine={place}\n" in (output / "start.sh").read_text()
    assert not (output / "tensorrt_llm" / "1" / "model.py").exists()
    assert (output / "tensorrt_llm" / "1" / "engine" / "rank0.engine").exists()
    bls = parameters(output, "tensorrt_llm_bls")
    tokenizer = output / "tensorrt_llm_bls" / bls["tokenizer_dir"] / "tokenizer.json"
    assert tokenizer.exists()
    if importlib.util.find_spec("tritonclient") is not None:
        from trt_razor.serving.check import check_repository

        assert check_repository(output, mounted) == []


def test_without_tokenizer(cyclic: Folder, tmp_path: Path) -> None:
    output = write(cyclic.path, tmp_path / "r")
    assert [p.name for p in output.iterdir() if p.is_dir()] == ["tensorrt_llm"]


def test_readme(cyclic: Folder, razor_engine: Engine, tmp_path: Path) -> None:
    with_tokenizer(cyclic.path, razor_engine.directory / "tokenizer")
    text = (write(cyclic.path, tmp_path / "r") / "README.md").read_text()
    assert "| `max_attention_window_size` | 256,68 |" in text
    assert "| `sink_token_length` | 4 |" in text
    assert "plugins preloaded" in text
    assert "13 of 32 KV heads" in text
    assert "on 1 GPU:" in text
    assert "trt_razor_kv" not in text  # metrics of our own model
    dense = engine_folder(tmp_path / "dense", razor=False, tp_size=2)
    text = (write(dense.path, tmp_path / "d") / "README.md").read_text()
    assert "plugins preloaded" not in text
    assert "on 2 GPUs, one for each rank:" in text
    assert "| `max_attention_window_size` | unset |" in text


# What is refused ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 1}, "slots: does not apply"),
        ({"max_input_tokens": 1}, "max_input_tokens: does not apply"),
        ({"max_batch_size": 5}, r"max_batch_size: expected 1\.\.4"),
        ({"kv_cache_free_gpu_mem_fraction": 0.0}, "kv_cache_free_gpu_mem_fraction"),
        ({"kv_cache_free_gpu_mem_fraction": 1.5}, "kv_cache_free_gpu_mem_fraction"),
        ({"kv_cache_free_gpu_mem_fraction": float("nan")}, "kv_cache_free_gpu_mem_fraction"),
        # TensorRT-LLM would shorten the windows, and the plugin refuse to run.
        ({"max_tokens_in_paged_kv_cache": 255}, "expected at least 256"),
        ({"batch_scheduler_policy": "static"}, "batch_scheduler_policy"),
        ({"gpu_device_ids": "0,0"}, "expected 2 different GPUs"),
        ({"gpu_device_ids": "0"}, "expected 2 different GPUs"),
        ({"gpu_device_ids": "0,1;2"}, "expected 2 different GPUs"),
        ({"gpu_device_ids": "a,b"}, "gpu_device_ids"),
        ({"prompt_format": "chat"}, "chat template"),
        ({"max_queue_size": -1}, "max_queue_size"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    folder = engine_folder(tmp_path / "engine", tp_size=2)
    with pytest.raises(UsageError, match=message):
        write(folder.path, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_gpus_of_several_instances(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", tp_size=2)
    found = parameters(write(folder.path, tmp_path / "r", gpu_device_ids="0,1;2,3"))
    assert found["gpu_device_ids"] == "0,1;2,3"


@pytest.mark.parametrize(
    "facts, message",
    [
        (
            {"max_attention_window_size": "256"},
            "max_attention_window_size: expected 256 .* found 256,68",
        ),
        ({"sink_token_length": "0"}, "sink_token_length: expected 0 .* found 4"),
        ({"tp_size": "2"}, "tp_size: expected 2 .* found 1"),
    ],
)
def test_config_that_is_not_the_manifests(
    tmp_path: Path, facts: dict[str, str], message: str
) -> None:
    folder = engine_folder(tmp_path / "engine", facts=facts)
    with pytest.raises(RazorError, match=message):
        write(folder.path, tmp_path / "r")


def test_rank_that_is_missing(tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", tp_size=2).path
    (folder / "rank1.engine").unlink()
    with pytest.raises(RazorError, match=r"rank1\.engine: missing"):
        write(changed(folder), tmp_path / "r")
