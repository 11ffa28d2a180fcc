"""The double of TensorRT and TensorRT-LLM itself: it accepts what is right and refuses what is not.

A test against a double shows as much as the double refuses. Every check of it that tests of our code
lean on is seen to fail here, in test_double_plugin.py, test_double_network.py and test_double_models.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import doubles
import pytest
from double_models import build, make_config, make_model
from doubles import Double


def test_installed_release(trtllm: Double) -> None:
    assert importlib.metadata.version("tensorrt_llm") == trtllm.release
    assert trtllm.load("tensorrt_llm").__version__ == trtllm.release
    version = importlib.metadata.version("tensorrt")
    assert trtllm.load("tensorrt").__version__ == version == doubles.RELEASES[trtllm.release]
    assert set(trtllm.modules) >= {"tensorrt", "tensorrt_llm", "tensorrt_llm.models.qwen.model"}


def test_nothing_stays_behind(tmp_path: Path) -> None:
    environment = dict(os.environ)
    for number, release in enumerate(doubles.RELEASES):
        with doubles.installed(tmp_path / str(number), release) as double:
            assert double.load("tensorrt_llm").__version__ == release
        assert not double.modules
    assert importlib.util.find_spec("tensorrt_llm") is None
    assert dict(os.environ) == environment
    with pytest.raises(KeyError):
        doubles.make(tmp_path / "old", "0.20.0")


def test_kv_cache_type_moves(trtllm: Double) -> None:
    bindings = trtllm.load("tensorrt_llm.bindings")
    assert hasattr(bindings, "KVCacheType") == (trtllm.release < "1.2")
    if trtllm.release < "1.2":
        with pytest.raises(ModuleNotFoundError):
            trtllm.load("tensorrt_llm.llmapi.kv_cache_type")
        kinds = bindings.KVCacheType
    else:
        kinds = trtllm.load("tensorrt_llm.llmapi.kv_cache_type").KVCacheType
    assert kinds.from_string("paged") is kinds.PAGED


def test_pretrained_config(trtllm: Double) -> None:
    config = make_config(trtllm, razor={"tp_size": 1})
    assert config.razor == {"tp_size": 1}
    written = config.to_dict()
    assert written["razor"] == {"tp_size": 1}
    assert written["position_embedding_type"] == "rope_gpt_neox"
    assert "rank" not in written["mapping"]
    assert make_config(trtllm, **written).to_dict() == written
    with pytest.raises(KeyError):
        make_config(trtllm, architecture="RecurrentGemmaForCausalLM")
    with pytest.raises(TypeError):
        make_config(trtllm, mapping={"razor": 1})
    with pytest.raises(TypeError):
        make_config(trtllm, quantization={"razor": 1})
    with pytest.raises(ValueError, match="world_size"):
        make_config(trtllm, mapping={"world_size": 4, "tp_size": 2})
    newer = {"mamba_ssm_cache_dtype": None}
    if trtllm.release < "1.1":
        with pytest.raises(TypeError):
            make_config(trtllm, quantization=newer)
    else:
        make_config(trtllm, quantization=newer)


def test_mapping(trtllm: Double) -> None:
    mapping = trtllm.load("tensorrt_llm").Mapping(world_size=4, rank=3, tp_size=2, pp_size=2)
    assert (mapping.tp_rank, mapping.pp_rank, mapping.tp_group) == (1, 1, [2, 3])
    assert mapping.pp_layers(5) == [3, 4]
    mapping.rank = 0
    assert mapping.pp_layers(5) == [0, 1, 2]


def test_plugin_config(trtllm: Double) -> None:
    plugin_config = trtllm.load("tensorrt_llm.plugin").PluginConfig
    old = trtllm.release < "1.1"
    config = plugin_config()
    config.gemm_plugin = "auto"
    config.dtype = "bfloat16"
    assert config.gemm_plugin == "bfloat16"
    stored = config.to_dict() if old else config.model_dump()
    assert stored["gemm_plugin"] == "auto"
    assert stored["paged_state"] is True
    with pytest.raises(AttributeError if old else ValueError):
        config.unknown = 1
    with pytest.raises(AssertionError):
        config.streamingllm = 1
    with pytest.raises(AssertionError):
        config.gemm_plugin = "float17"
    if old:
        with pytest.raises(TypeError):
            plugin_config(streamingllm=True)
        with pytest.raises(AssertionError):
            config.streamingllm = "enable"
        config.update_from_dict({"streamingllm": "enable", "unknown": 1})
    else:
        assert not hasattr(plugin_config(unknown=1), "to_dict")
        config.streamingllm = "enable"
    assert config.streamingllm is True


def test_build_config(trtllm: Double) -> None:
    builder = trtllm.load("tensorrt_llm.builder")
    with pytest.raises(TypeError):
        builder.BuildConfig(1024)
    with pytest.raises(TypeError):
        builder.BuildConfig(tokens_per_block=64)
    hybrid, other = builder.BuildConfig(), builder.BuildConfig()
    hybrid.update_kv_cache_type("RecurrentGemmaForCausalLM")
    other.update_kv_cache_type("LlamaForCausalLM")
    for config, paged_state in ((hybrid, True), (other, False)):
        assert config.kv_cache_type.name == "PAGED"
        assert config.plugin_config.paged_kv_cache is True
        assert config.plugin_config.paged_state is paged_state
    assert builder.BuildConfig().plugin_config is not builder.BuildConfig().plugin_config
    old = "auto_parallel_config" in builder.BuildConfig().to_dict()
    assert old == (trtllm.release < "1.1")


def test_engine(trtllm: Double, tmp_path: Path) -> None:
    model = make_model(trtllm)
    engine = build(trtllm, model)
    assert engine.config.pretrained_config is model.config
    engine.save(str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["version"] == trtllm.release
    build_config = written["build_config"]
    assert build_config["kv_cache_type"] == "PAGED"
    assert "dry_run" not in build_config
    plugins = build_config["plugin_config"]
    assert plugins["paged_kv_cache"] is True
    assert plugins["paged_state"] is False  # but for hybrid architectures
    assert doubles.network(tmp_path / "rank0.engine") == doubles.network(engine)
    model.config.num_hidden_layers = 4  # before save: written
    engine.save(str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["pretrained_config"]["num_hidden_layers"] == 4


def test_fp8_caches_turn_paged_context_off(trtllm: Double) -> None:
    model = make_model(trtllm, quantization={"kv_cache_quant_algo": "FP8"})
    plugins = build(trtllm, model).config.build_config.plugin_config
    assert plugins.use_paged_context_fmha is False


COMMAND = "tensorrt_llm.commands.build"
MODEL_FILE = """
from tensorrt_llm.models import LLaMAForCausalLM

class Custom(LLaMAForCausalLM):
    def __init__(self, config):
        assert __name__ == "models", __name__
        super().__init__(config)
        config.custom = True
"""


def run_build(trtllm: Double, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "custom.py").write_text(MODEL_FILE)
    config = make_config(trtllm, mapping={"world_size": 2, "tp_size": 2})
    config.to_json_file(str(folder / "config.json"))
    command = [sys.executable, "-m", COMMAND, "--model_config", str(folder / "config.json")]
    command += ["--output_dir", str(folder / "out"), "--max_seq_len", "256", *options]
    environment = {**os.environ, **doubles.environment(trtllm.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_build_command(trtllm: Double, tmp_path: Path) -> None:
    custom = ["--model_cls_file", str(tmp_path / "custom.py"), "--model_cls_name", "Custom"]
    done = run_build(trtllm, tmp_path, *custom, "--gemm_plugin", "auto", "--tokens_per_block", "64")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["pretrained_config"]["custom"] is True
    assert written["build_config"]["plugin_config"]["tokens_per_block"] == 64
    assert len(doubles.network(tmp_path / "out/rank1.engine")["plugins"]) == 2
    failed = run_build(trtllm, tmp_path, "--razor", "1")
    assert failed.returncode == 2
    assert "--razor" in failed.stderr


def test_streamingllm_is_gone(trtllm: Double, tmp_path: Path) -> None:
    done = run_build(trtllm, tmp_path, "--streamingllm", "enable")
    assert (done.returncode == 0) == (trtllm.release < "1.1")
