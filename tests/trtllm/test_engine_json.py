"""config.json of engines, read as the C++ runtime reads it, and every field that may be wrong in it."""

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
from runtime_config import LoadError, ModelConfig, ParseError, parse, without_comments

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.policy import PRESETS, RazorPolicy
from trt_razor.trtllm import engine_json
from trt_razor.trtllm.engine_config import (
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    build_arguments,
    plan_engine,
)
from trt_razor.trtllm.engine_json import (
    check_engine_json,
    check_rank_files,
    finish,
    local_cache_of,
    main,
    plan_of,
)
from trt_razor.trtllm.model_config import trtllm_config
from trt_razor.trtllm.release import LocalCache, release_of

SPEC = ModelSpec("tiny", "llama", 4, 1024, 256, 8, 4, 128, 300, 4096, 1e-5)
POLICY = RazorPolicy(sink_tokens=4, min_window=63, compression=None, comp_tokens=1)
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


def section(
    counts: tuple[int, ...], policy: RazorPolicy, spec: ModelSpec, tp_size: int
) -> RazorSection:
    return RazorSection(spec.fingerprint(), "digest", tp_size, counts, policy)


def engine(
    cache: LocalCache | None,
    spec: ModelSpec = SPEC,
    counts: tuple[int, ...] = (1, 4, 0, 2),
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
    razor = None if cache is None else section(counts, policy, spec, wanted.tp_size)
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


# Fields --------------------------------------------------------------------------------------------
P, B, G = "pretrained_config", "build_config", "build_config.plugin_config"
REQUIRED = {
    **dict.fromkeys((f"{P}.num_hidden_layers", f"{P}.num_attention_heads"), 2.5),
    **dict.fromkeys((f"{P}.vocab_size", f"{P}.hidden_size", f"{P}.mapping.tp_size"), "4"),
    f"{P}.architecture": 5,
    f"{P}.dtype": "int8",
    f"{P}.quantization": None,
    f"{B}.lora_config": None,
    **dict.fromkeys((f"{G}.remove_input_padding", f"{G}.context_fmha"), None),
    **dict.fromkeys((f"{G}.use_paged_context_fmha", f"{G}.paged_kv_cache"), None),
    f"{G}.tokens_per_block": "32",
}
"""Without these, or with these values, the runtime throws."""


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


@pytest.mark.parametrize("path", REQUIRED)
@pytest.mark.parametrize("cache", [None, *LocalCache])
def test_what_the_runtime_asks_for_is_asked_for(
    path: str, cache: LocalCache | None, tmp_path: Path
) -> None:
    """Both ways: our check refuses it, and the runtime would have thrown."""
    config, plan = engine(cache)
    if plan is not None:
        config = finish(written(tmp_path, config), plan)
    check_engine_json(config, plan)
    parse(json.dumps(config))
    for value in (..., REQUIRED[path]):
        broken = put(config, path, value)
        with pytest.raises(ParseError, match=path.rpartition(".")[2]):
            parse(json.dumps(broken))
        with pytest.raises(RazorError, match=f"^config.json: {path}: expected") as e:
            check_engine_json(broken, plan)
        assert "\n" not in str(e.value)


STATES = ["state_size", "conv_kernel", "rnn_hidden_size", "rnn_conv_dim_size"]


@pytest.mark.parametrize("name", STATES)
def test_a_hybrid_engine_must_have_its_state_sizes(name: str, tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.SLOTS)
    broken = put(config, f"{P}.{name}", ...)
    with pytest.raises(ParseError, match=f"{name}: absent"):
        parse(json.dumps(broken))
    with pytest.raises(RazorError, match=f"{name}: expected an integer in 1.."):
        check_engine_json(broken, plan)


CONTRADICTIONS: dict[str, tuple[LocalCache | None, str, Any, str]] = {
    "one count too few": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 4, 4, 2],
        "one count for each of 6 attention layers, found 5",
    ),
    "counts of all layers": (
        LocalCache.SLOTS,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 4, 4, 2, 2],
        "one count for each of 3 attention layers",
    ),
    "no heads": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [1, 3, 0, 4, 2, 2],
        r"\[2\]: expected a pos",
    ),
    "kinds": (
        LocalCache.SLOTS,
        f"{P}.layer_types",
        ["attention", "state"],
        "layer_types: expected a list of",
    ),
    "no states": (
        LocalCache.SLOTS,
        f"{P}.layer_types",
        ["attention"],
        "one count for each of 6|'recurrent'",
    ),
    "states in a dense architecture": (
        None,
        f"{P}.layer_types",
        ["attention", "recurrent"],
        "no 'recurrent' layer without",
    ),
    "a dense hybrid": (
        None,
        f"{P}.architecture",
        "RecurrentGemmaForCausalLM",
        "state_size: expected",
    ),
    "GLM": (None, f"{P}.architecture", "ChatGLMForCausalLM", "architecture: expected no 'GLM'"),
    "no Mamba plugin": (
        LocalCache.SLOTS,
        f"{G}.mamba_conv1d_plugin",
        None,
        "mamba_conv1d_plugin: expected float16, found null",
    ),
    "no paged state": (LocalCache.SLOTS, f"{G}.paged_state", False, "paged_state: expected true"),
    "reuse": (
        LocalCache.SLOTS,
        f"{G}.use_paged_context_fmha",
        True,
        "expected false: a reused prefix",
    ),
    "one conv row": (LocalCache.SLOTS, f"{P}.conv_kernel", 1, "conv_kernel: expected >= 2"),
    "head of state": (LocalCache.SLOTS, f"{P}.rnn_head_size", 4, "rnn_head_size: expected none"),
    "beams": (None, f"{B}.max_beam_width", 4, "max_beam_width: expected 1, found 4"),
    "no beam": (LocalCache.SLOTS, f"{B}.max_beam_width", 0, "max_beam_width: expected 1, found 0"),
    "prompts": (
        None,
        f"{B}.max_input_len",
        1001,
        "max_input_len: expected at most max_seq_len = 1000",
    ),
    "no paging": (None, f"{B}.kv_cache_type", "CONTINUOUS", "kv_cache_type: expected 'PAGED'"),
    "no attention plugin": (
        None,
        f"{G}.gpt_attention_plugin",
        None,
        "gpt_attention_plugin: expected",
    ),
    "LoRA": (None, f"{G}.lora_plugin", "auto", "lora_plugin: expected null"),
    "LoRA modules": (
        None,
        f"{B}.lora_config.lora_target_modules",
        ["attn_q"],
        "expected no modules",
    ),
    "speculation": (
        None,
        f"{B}.speculative_decoding_mode",
        2,
        "speculative_decoding_mode: expected 1",
    ),
    "drafts": (None, f"{B}.max_draft_len", 5, "max_draft_len: expected 0"),
    "version": (None, "version", "none", "version: expected a version"),
    "ranks": (
        None,
        f"{P}.mapping.tp_size",
        3,
        "num_attention_heads: expected a multiple of tp_size = 3",
    ),
    "context ranks": (None, f"{P}.mapping.cp_size", 2, "cp_size: expected 1, found 2"),
    "logits": (
        None,
        f"{P}.logits_dtype",
        "bfloat16",
        "logits_dtype: expected 'float32' or 'float16'",
    ),
    "layers without end": (None, f"{P}.num_hidden_layers", 1 << 40, "num_hidden_layers: expected"),
    "number too large": (
        None,
        f"{B}.max_num_tokens",
        1 << 31,
        "max_num_tokens: expected an integer in",
    ),
    "flag for a number": (None, f"{B}.max_batch_size", True, "max_batch_size: expected an integer"),
    "razor in a dense engine": (None, f"{P}.razor", {"version": 1}, "expected a dense engine"),
    # Against the plan.
    "other heads": (
        LocalCache.CYCLIC,
        f"{P}.num_kv_heads_per_layer",
        [3, 1, 4, 4, 2, 2],
        r"num_kv_heads_per_layer: expected \[1, 3, 4, 4, 2, 2\], found \[3, 1, 4, 4, 2, 2\]",
    ),
    "other windows": (
        LocalCache.CYCLIC,
        f"{P}.runtime_defaults.max_attention_window",
        [1000, 100],
        r"runtime_defaults: expected .*\[1000, 68\].* found .*\[1000, 100\]",
    ),
    "smaller slots": (
        LocalCache.SLOTS,
        f"{P}.rnn_conv_dim_size",
        52224,
        "rnn_conv_dim_size: expected 69632",
    ),
    "shorter": (
        LocalCache.CYCLIC,
        f"{B}.max_seq_len",
        999,
        "max_input_len|max_seq_len: expected 1000",
    ),
    "other blocks": (
        LocalCache.CYCLIC,
        f"{G}.tokens_per_block",
        64,
        "tokens_per_block: expected 32, found 64",
    ),
    "other dtype": (
        LocalCache.SLOTS,
        f"{P}.dtype",
        "bfloat16",
        "dtype: expected float16, found bfloat16",
    ),
    "other head size": (
        LocalCache.SLOTS,
        f"{P}.head_size",
        64,
        "head_size: expected 128, found 64",
    ),
    "fp8": (
        LocalCache.SLOTS,
        f"{P}.quantization.kv_cache_quant_algo",
        "FP8",
        "expected null, found FP8",
    ),
    "other section": (
        LocalCache.SLOTS,
        f"{P}.razor.num_retrieval",
        [1] * 4,
        r"razor\.num_retrieval: expected",
    ),
    "other policy": (
        LocalCache.CYCLIC,
        f"{P}.razor.policy.min_window",
        62,
        r"razor\.policy: expected",
    ),
    "other stages": (
        LocalCache.CYCLIC,
        f"{P}.mapping.pp_size",
        2,
        r"mapping\.pp_size: expected 1, found 2",
    ),
    "stages of slots": (
        LocalCache.SLOTS,
        f"{P}.mapping.pp_size",
        2,
        r"mapping\.pp_size: expected 1 with state slots, found 2",
    ),
    "ordered for other ranks": (
        LocalCache.CYCLIC,
        f"{P}.razor.tp_size",
        2,
        r"razor\.tp_size: expected 1, found 2",
    ),
    "no section": (
        LocalCache.CYCLIC,
        f"{P}.razor",
        ...,
        "razor: expected an object, found NoneType",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_named(case: str, tmp_path: Path) -> None:
    cache, path, value, message = CONTRADICTIONS[case]
    config, plan = engine(cache)
    if plan is not None:
        config = finish(written(tmp_path, config), plan)
    with pytest.raises(RazorError, match=message):
        check_engine_json(put(config, path, value), plan)


def test_other_ranks_than_planned_are_named(tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.CYCLIC, counts=(2,) * 4)
    with pytest.raises(RazorError, match=r"mapping\.tp_size: expected 1, found 2"):
        check_engine_json(put(config, f"{P}.mapping.tp_size", 2), plan)


def test_heads_that_ranks_cannot_share_are_named(tmp_path: Path) -> None:
    """The runtime would round up, and read past the heads that a rank has."""
    config, plan = finished(tmp_path, LocalCache.CYCLIC)
    with pytest.raises(
        RazorError, match=r"layer\[0\]: expected a positive multiple of tp_size = 2"
    ):
        check_engine_json(put(config, f"{P}.mapping.tp_size", 2), plan)


def test_no_quantisation_has_two_spellings(tmp_path: Path) -> None:
    config, plan = finished(tmp_path, LocalCache.CYCLIC)
    spelled = put(config, f"{P}.quantization.kv_cache_quant_algo", "NO_QUANT")
    check_engine_json(spelled, plan)
    assert plan_of(spelled, "tiny") == plan


def test_of_what_finish_sets_nothing_else_will_do(tmp_path: Path) -> None:
    for cache in LocalCache:
        config, plan = finished(tmp_path, cache)
        assert engine_json.first_difference(plan, config) is None
        for name in plan.pretrained_config({}):
            if name == "razor_architecture":
                continue
            field, expected, found = engine_json.first_difference(
                plan, put(config, f"{P}.{name}", ...)
            ) or ("", None, None)
            assert (field, found) == (f"{P}.{name}", "nothing")
            assert expected == config[P][name]


def test_a_config_of_no_known_shape_is_refused() -> None:
    for config in (
        {},
        {"version": "1.0.0", P: [], B: 3},
        {"version": "1.0.0", P: {"mapping": 1}, B: {}},
    ):
        with pytest.raises(RazorError):
            check_engine_json(config, None)


# The test's own runtime ------------------------------------------------------------------------------
def test_the_runtime_repeats_a_group_of_kinds(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.SLOTS, counts=(1,) * 4)
    config[P]["layer_types"] = ["attention", "recurrent"]
    model = parse(json.dumps(config))
    assert model.layer_types == ("attention", "recurrent") * 4
    assert model.state_inputs()[-1] == ("conv_state_ptr_7", "rnn_state_ptr_7")
    config[P]["num_hidden_layers"] = 7  # the last group is not whole
    assert parse(json.dumps(config)).layer_types.count("attention") == 4
    config[P]["layer_types"] = ["attention", "recurrent", "no_op"]
    with pytest.raises(ParseError, match="4 counts, 3 attention layers"):
        parse(json.dumps(config))


def test_the_runtime_divides_heads_and_rounds_up(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.CYCLIC)
    config[P]["mapping"]["tp_size"] = 2
    assert parse(json.dumps(config)).kv_heads == (1, 2, 2, 2, 1, 1)
    config[P]["num_kv_heads_per_layer"] = []
    config[P]["mapping"]["tp_size"] = 8
    assert parse(json.dumps(config)).kv_heads == (1,) * 6


def test_the_runtime_cannot_load_what_we_refuse(tmp_path: Path) -> None:
    config, _ = finished(tmp_path, LocalCache.SLOTS)
    for path, value, message in (
        (f"{G}.paged_state", False, "not paged"),
        (f"{G}.mamba_conv1d_plugin", None, "without mamba_conv1d_plugin"),
        (f"{B}.max_beam_width", 0, "with beams"),
        (f"{P}.mapping.pp_size", 2, "several pipeline stages"),
        (f"{G}.remove_input_padding", False, "no in-flight batching"),
    ):
        with pytest.raises(LoadError, match=message):
            parse(json.dumps(put(config, path, value))).check_in_flight()
    with pytest.raises(LoadError, match="below 1"):
        parse(json.dumps(config)).windows([0])


def test_comments_are_skipped_outside_strings() -> None:
    text = '{"a": "x // y", /* 1 */ "b": "\\"/*", // end\n "c": 2}'
    assert json.loads(without_comments(text)) == {"a": "x // y", "b": '"/*', "c": 2}
    with pytest.raises(ParseError, match="without an end"):
        without_comments("{} /* ")
