"""config.json of engines: finished, and read as the C++ runtime reads it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_configs import PLUGINS, engine, finished, written
from engine_plans import SPEC
from runtime_config import ModelConfig, parse

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.trtllm.engine_config import (
    RazorPlan,
)
from trt_razor.trtllm.engine_json import (
    check_engine_json,
    check_rank_files,
    finish,
    local_cache_of,
    main,
    plan_of,
)
from trt_razor.trtllm.release import LocalCache


# Every generated engine, as the runtime sees it -----------------------------------------------------
def agree(model: ModelConfig, plan: RazorPlan, spec: ModelSpec) -> None:
    """What the runtime makes of an engine is what the plan, and so the network, counts on."""
    slots = plan.local_cache is LocalCache.SLOTS
    assert model.rnn_based == slots
    assert model.transformer_based
    model.check_in_flight()
    assert model.kv_cache_type == "PAGED"
    assert (model.tp_size, model.pp_size) == (plan.tp_size, plan.pp_size)
    assert (model.head_size, model.num_heads) == (spec.head_dim, spec.num_heads // plan.tp_size)
    assert (model.kv_dtype, model.dtype) == ("fp8" if plan.fp8 else plan.dtype, plan.dtype)
    assert model.tokens_per_block == plan.tokens_per_block
    assert model.max_seq_len == plan.max_seq_len
    assert not model.block_reuse()
    assert not model.chunked_context()
    assert model.layer_types == plan.layer_types
    assert model.default_sinks == (plan.sink_token_length or None)
    before = 0
    for stage in range(plan.pp_size):
        size = spec.num_layers // plan.pp_size
        layers = plan.layers[stage * size : (stage + 1) * size]
        heads = model.local_kv_heads(stage)
        windows = model.windows(rank=stage)
        assert windows == model.windows(plan.window_list(), stage)  # told by the server: the same
        rows = 0
        for i, layer in enumerate(layers):
            fields = plan.plugin_fields(stage * size + i, stage * size, {})
            for kind, count, window in (
                ("layer_full", layer.num_retrieval, plan.max_seq_len),
                ("layer_local", layer.num_local, plan.window),
            ):
                if fields[kind] >= 0:
                    assert (heads[fields[kind]], windows[fields[kind]]) == (count, window)
                    rows += 1
        assert rows == len(heads) == len(windows) == len(model.local_layers("attention", stage))
        before += len(heads)
    assert before == plan.attention_layers
    states = [layer.state_layer for layer in plan.layers if layer.state_layer >= 0]
    names = [(f"conv_state_ptr_{n}", f"rnn_state_ptr_{n}") for n in states]
    assert model.state_inputs() == names
    if slots:
        conv, rnn = model.state_shapes(7)
        item = {"float16": 2, "bfloat16": 2}[plan.dtype]
        assert conv == (len(states), 7, 1, plan.ring_slot_bytes // item)
        assert rnn == (len(states), 7, 1, plan.comp_slot_bytes // 4)
        assert model.slot_bytes() == plan.slot_bytes()
        assert plan.ring_slot_bytes % 16 == plan.comp_slot_bytes % 16 == 0


POLICIES = {
    **PRESETS,
    "tight": PRESETS["tight"].with_(heavy_hitters=0),  # which this path refuses
    "whole window": RazorPolicy(min_window=512, compression=None),
    "no sinks": RazorPolicy(sink_tokens=0, min_window=100, comp_tokens=0),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", zoo_names())
def test_every_model_on_every_number_of_ranks(name: str, policy: str, tmp_path: Path) -> None:
    spec = zoo_spec(name)
    seen = set()
    for cache in LocalCache:
        for tp_size in (1, 2, 4, 8):
            for kv_dtype in ("auto", "fp8"):
                heads = max(1, spec.num_kv_heads // tp_size)
                # Layers with all kinds of shares, one of them whole and one without.
                counts = tuple(i % (heads + 1) for i in range(spec.num_layers))
                try:
                    config, plan = engine(
                        cache,
                        spec,
                        counts,
                        POLICIES[policy],
                        max_seq_len=min(spec.max_positions, 16384),
                        dtype="bfloat16",
                        tp_size=tp_size,
                        kv_dtype=kv_dtype,
                    )
                except UsageError:
                    continue
                assert plan is not None
                done = finish(written(tmp_path, config), plan)
                text = (tmp_path / "config.json").read_text()
                assert json.loads(text) == done
                agree(parse(text), plan, spec)
                assert plan_of(done, name) == plan
                seen.add((cache, tp_size))
    # One rank always works, but for a window of 4000 that a short model never leaves.
    possible = POLICIES[policy].dropped(min(spec.max_positions, 16384)) > 0
    bubble = -POLICIES[policy].sink_tokens % 32
    cyclic = POLICIES[policy].comp_tokens <= bubble * spec.head_dim * 2 // (4 * (spec.head_dim + 2))
    alibi = spec.position == "alibi" and POLICIES[policy].comp_tokens > 1
    if possible and not alibi:
        assert (LocalCache.SLOTS, 1) in seen
        assert ((LocalCache.CYCLIC, 1) in seen) == cyclic
        assert ((LocalCache.SLOTS, 2) in seen) == (
            spec.num_kv_heads > 2 and spec.num_kv_heads % 2 == 0
        )
    else:
        assert not seen


@pytest.mark.parametrize("pp_size", [2, 4])
def test_pipeline_stages_find_their_cache_layers(pp_size: int, tmp_path: Path) -> None:
    config, plan = engine(LocalCache.CYCLIC, counts=(1,) * 4, pp_size=pp_size)
    assert plan is not None
    finish(written(tmp_path, config), plan)
    model = parse((tmp_path / "config.json").read_text())
    agree(model, plan, SPEC)
    assert model.local_kv_heads(pp_size - 1) == (1, 3) * (4 // pp_size)
    assert plan_of(config, "tiny") == plan


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_dense_engines_are_left_as_they_are(tp_size: int) -> None:
    config, _ = engine(None, tp_size=tp_size)
    check_engine_json(config, None)
    model = parse(json.dumps(config))
    model.check_in_flight()
    assert (model.variant, model.kv_heads) == ("gpt", (max(1, 4 // tp_size),) * 4)
    assert model.windows() == [1000] * 4
    assert model.state_inputs() == []


# Finishing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", LocalCache)
def test_finishing_twice_changes_nothing(cache: LocalCache, tmp_path: Path) -> None:
    first, plan = finished(tmp_path, cache)
    path = tmp_path / "config.json"
    before = path.read_bytes(), path.stat().st_ino
    assert finish(tmp_path, plan) == first
    assert (path.read_bytes(), path.stat().st_ino) == before  # not even written
    assert first["pretrained_config"]["razor"]["local_cache"] == cache.name.lower()


@pytest.mark.parametrize("cache", LocalCache)
def test_finishing_keeps_all_that_is_not_its_own(cache: LocalCache, tmp_path: Path) -> None:
    config, plan = engine(cache)
    assert plan is not None
    config["pretrained_config"]["rotary_base"] = 12345.0
    done = finish(written(tmp_path, config), plan)
    changed = {"num_hidden_layers", "num_kv_heads_per_layer", "runtime_defaults", "razor"}
    if cache is LocalCache.SLOTS:
        changed |= {"architecture", "razor_architecture", "layer_types", "conv_kernel"}
        changed |= {"rnn_conv_dim_size", "state_size", "rnn_hidden_size"}
    before, after = config["pretrained_config"], done["pretrained_config"]
    assert {n for n in after if before.get(n, ...) != after[n]} == changed
    assert set(before) <= set(after)
    plugins = {
        n for n, v in done["build_config"]["plugin_config"].items() if PLUGINS.get(n, v) != v
    }
    assert plugins == (
        {"mamba_conv1d_plugin", "paged_state"} if cache is LocalCache.SLOTS else set()
    )


def test_a_failed_finish_leaves_the_file(tmp_path: Path) -> None:
    config, plan = engine(LocalCache.SLOTS)
    assert plan is not None
    config["build_config"]["plugin_config"]["use_paged_context_fmha"] = True
    before = (written(tmp_path, config) / "config.json").read_bytes()
    with pytest.raises(RazorError, match="use_paged_context_fmha: expected false: a reused prefix"):
        finish(tmp_path, plan)
    assert (tmp_path / "config.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "rank0.engine"]


@pytest.mark.parametrize("cache", LocalCache)
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_the_plan_is_in_the_file_before_and_after(
    cache: LocalCache, kv_dtype: str, tmp_path: Path
) -> None:
    config, plan = engine(cache, kv_dtype=kv_dtype, tokens_per_block=64, tp_size=2, counts=(1,) * 4)
    assert plan is not None
    assert plan_of(config, "tiny") == plan
    assert plan_of(finish(written(tmp_path, config, 2), plan), "tiny") == plan


def test_slots_on_the_old_release_are_remembered(tmp_path: Path) -> None:
    config, _ = engine(LocalCache.CYCLIC)
    config["pretrained_config"]["razor"]["local_cache"] = "slots"
    plan = plan_of(config, "tiny")
    assert plan.local_cache is LocalCache.SLOTS
    done = finish(written(tmp_path, config), plan)
    assert plan_of(done, "tiny") == plan
    del done["pretrained_config"]["razor"]["local_cache"]
    assert local_cache_of(done["pretrained_config"]) is LocalCache.SLOTS  # seen by its architecture
    assert local_cache_of({"razor": {}}) is None


def test_no_plan_without_what_it_hangs_on() -> None:
    config, _ = engine(LocalCache.SLOTS)
    dense, _ = engine(None)
    with pytest.raises(UsageError, match=r"pretrained_config\.razor: missing: not a Razor engine"):
        plan_of(dense, "tiny")
    cases: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda c: c.pop("version"), "version: expected a version, found nothing"),
        (lambda c: c.update(version="0.20.0"), "TensorRT-LLM: expected 1.0, 1.1 and 1.2"),
        (lambda c: c.pop("build_config"), "build_config.plugin_config: expected an object"),
        (lambda c: c["build_config"].pop("max_seq_len"), "max_seq_len: expected an integer"),
        (lambda c: c["pretrained_config"].pop("mapping"), "mapping: expected an object"),
        (
            lambda c: c["pretrained_config"]["mapping"].update(tp_size="1"),
            "mapping.tp_size: expected an integer .*found 1",
        ),
        (lambda c: c["pretrained_config"].pop("quantization"), "quantization: expected an object"),
        (
            lambda c: c["pretrained_config"]["quantization"].update(kv_cache_quant_algo="INT8"),
            "kv_dtype: expected auto or fp8, found 'int8'",
        ),
        (
            lambda c: c["pretrained_config"]["quantization"].update(kv_cache_quant_algo=8),
            "kv_cache_quant_algo: expected a string, found 8",
        ),
        (lambda c: c["pretrained_config"].update(architecture="GPT"), "architecture: expected"),
        (lambda c: c["pretrained_config"].update(hidden_size=None), "hidden_size"),
        (
            lambda c: c["pretrained_config"]["razor"].update(local_cache="ring"),
            "razor.local_cache: expected cyclic or slots, found 'ring'",
        ),
        (lambda c: c["pretrained_config"]["razor"].update(local_cache=[2]), r"found \[2\]"),
        (
            lambda c: c["pretrained_config"]["razor"].update(model="other"),
            "ordered for another model",
        ),
    ]
    for change, message in cases:
        broken = copy.deepcopy(config)
        change(broken)
        with pytest.raises(RazorError, match=message):
            plan_of(broken, "tiny")


# The command -----------------------------------------------------------------------------------------
def test_the_command_finishes_an_engine_of_trtllm_build(tmp_path: Path) -> None:
    config, plan = engine(LocalCache.CYCLIC)
    assert plan is not None
    folder = written(tmp_path / "engine", config)
    run = subprocess.run(
        [sys.executable, "-m", "trt_razor.trtllm.engine_json", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        f"{folder}/config.json: 6 cache layers",
        "max_attention_window_size: 1000,68",
        "sink_token_length: 4",
    ]
    agree(parse((folder / "config.json").read_text()), plan, SPEC)


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = engine(LocalCache.CYCLIC, counts=(1,) * 4, tp_size=2)
    (folder := written(tmp_path / "e", config)).joinpath("rank0.engine").unlink()
    cases = [(folder, 1, "rank0.engine: expected the engine of rank 0, found nothing")]
    cases += [(tmp_path / "none", 2, "no such file"), (tmp_path / "e" / "config.json", 1, "config")]
    for path, code, message in cases:
        assert main([str(path)]) == code
        shown = capsys.readouterr().err
        assert message in shown
        assert "Traceback" not in shown
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.count("\n") == 1


def test_engines_of_all_ranks_and_no_others(tmp_path: Path) -> None:
    config, _ = engine(LocalCache.CYCLIC)
    folder = written(tmp_path, config, ranks=2)
    assert check_rank_files(folder, 2) == 12
    with pytest.raises(
        RazorError, match=r"expected the engines of 1 ranks, found rank0\.engine, rank1"
    ):
        check_rank_files(folder, 1)
    with pytest.raises(RazorError, match=r"rank2\.engine: expected the engine of rank 2"):
        check_rank_files(folder, 3)
    (folder / "rank1.engine").write_bytes(b"")
    with pytest.raises(RazorError, match=r"rank1\.engine: expected the engine of rank 1"):
        check_rank_files(folder, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", r"razor: expected an object")],
)
def test_files_that_are_no_config(text: str, message: str, tmp_path: Path) -> None:
    _, plan = engine(LocalCache.CYCLIC)
    assert plan is not None
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RazorError, match=message):
        finish(tmp_path, plan)
    assert (tmp_path / "config.json").read_text() == text
