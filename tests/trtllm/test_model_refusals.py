"""What Razor model classes refuse, one by one, before anything long starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import doubles
import pytest
from razor_models import LAYERS, Case, build, caches, network

from trt_razor.errors import UsageError
from trt_razor.trtllm import options
from trt_razor.trtllm.options import SECTION, TrtLlmOptions
from trt_razor.trtllm.release import LocalCache

CYCLIC, SLOTS = LocalCache.CYCLIC, LocalCache.SLOTS


BUILD_REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "beams": ({"max_beam_width": 2}, {}, r"max_beam_width: expected 1 .* found 2"),
    "drafts": ({"max_draft_len": 3}, {}, r"max_draft_len: .* speculative decoding"),
    "prompts": (
        {"max_prompt_embedding_table_size": 8},
        {},
        r"prompt_embedding_table_size: .* prompt tuning; build with --max_prompt_embedding",
    ),
    "lora": ({}, {"lora_plugin": "auto"}, r"plugin_config\.lora_plugin: .* LoRA"),
    "sinks": ({}, {"streamingllm": True}, r"plugin_config\.streamingllm: .*--streamingllm disable"),
    "padding": ({}, {"remove_input_padding": False}, r"plugin_config\.remove_input_padding: "),
    "no plugin": ({}, {"gpt_attention_plugin": None}, r"plugin_config\.gpt_attention_plugin: "),
    "fusion": ({}, {"reduce_fusion": True}, r"plugin_config\.reduce_fusion: .*disable"),
    "fp8 norm": ({}, {"norm_quant_fusion": True}, r"plugin_config\.norm_quant_fusion: .*disable"),
    "fp4": ({}, {"fuse_fp4_quant": True}, r"plugin_config\.fuse_fp4_quant: .*disable"),
    "too long": ({"max_seq_len": 9999}, {}, r"max_seq_len"),
}


@pytest.mark.parametrize("name", BUILD_REFUSALS)
def test_refused_while_inputs_are_made(trtllm: doubles.Double, tmp_path: Path, name: str) -> None:
    changes, plugins, message = BUILD_REFUSALS[name]
    case = Case("llama")
    with pytest.raises(UsageError, match=message) as error:
        build(trtllm, case.model(trtllm, tmp_path / "x"), case.options, plugins=plugins, **changes)
    assert "\n" not in str(error.value)


def _inputs(trtllm: doubles.Double, model: Any, **changes: Any) -> dict[str, Any]:
    """prepare_inputs as the builder calls it."""
    common, module = trtllm.load("tensorrt_llm._common"), trtllm.load("tensorrt_llm.network")
    net = module.Network()
    net.plugin_config.paged_kv_cache = True
    net.plugin_config.use_paged_context_fmha = False
    sizes = {"max_batch_size": 4, "max_input_len": 1000, "max_num_tokens": 1024, "use_cache": True}
    with common.net_guard(net):
        inputs: dict[str, Any] = model.prepare_inputs(max_seq_len=1024, **{**sizes, **changes})
    return inputs


@pytest.mark.parametrize(
    "change",
    [
        {"use_cache": False},
        {"speculative_decoding_draft_tokens_external": True},
        {"spec_decoding_is_generation_length_variable": True},
        {"lora_target_modules": ["attn_qkv"]},
        {"position_encoding_2d": True},
        {"mrope_rotary_cos_sin_size": 1},
        {"num_hidden_layers": 2 * LAYERS},
    ],
    ids=lambda change: next(iter(change)),
)
def test_refused_arguments_of_prepare_inputs(
    trtllm: doubles.Double, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = Case("llama").model(trtllm, tmp_path / "x")
    with pytest.raises(UsageError, match=next(iter(change))):
        _inputs(trtllm, model, **change)
    assert "attention_params" in _inputs(trtllm, model)


def test_prompts_in_chunks_only_with_cyclic_caches(trtllm: doubles.Double, tmp_path: Path) -> None:
    """trtllm-build's default is what makes them possible, so its option is named."""
    for cache in caches(trtllm.release):
        case = Case("llama", TrtLlmOptions(local_cache=cache))
        model = case.model(trtllm, tmp_path / cache.name)
        if cache is CYCLIC:
            build(trtllm, model, case.options, chunk=128)
            continue
        with pytest.raises(
            UsageError, match=r"^use_paged_context_fmha: prefill_chunk.*fmha disable\)$"
        ):
            build(trtllm, model, case.options, chunk=128)


QUANT_REFUSALS = {
    "rowwise": ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, r"quant_algo: expected .*FP8, "),
    "smooth": ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, r"quantization\.quant_algo: expected"),
    "int8 cache": ({"kv_cache_quant_algo": "INT8"}, r"kv_cache_quant_algo: .*found .*INT8"),
    "fp4 cache": ({"kv_cache_quant_algo": "NVFP4"}, r"kv_cache_quant_algo: .*found .*NVFP4"),
}


@pytest.mark.parametrize("name", QUANT_REFUSALS)
def test_refused_quantisation(trtllm: doubles.Double, tmp_path: Path, name: str) -> None:
    quant, message = QUANT_REFUSALS[name]
    with pytest.raises(UsageError, match=message):
        Case("llama", quant=quant).model(trtllm, tmp_path / "x")


def test_quantisation_that_replaces_attention_is_noticed(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its name."""
    known = (*options.WEIGHT_ALGORITHMS, "FP8_PER_CHANNEL_PER_TOKEN")
    monkeypatch.setattr(options, "WEIGHT_ALGORITHMS", known)
    case = Case("llama", quant={"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})
    with pytest.raises(UsageError, match=r"quant_algo: expected one that keeps attention layers"):
        case.model(trtllm, tmp_path / "x")


CONFIG_REFUSALS = {
    "no section": ({SECTION: None}, r"config\.json: razor: expected an object, found NoneType"),
    "old section": ({SECTION: {"version": 0}}, r"razor\.version: expected 1, found 0"),
    "unknown cache": (
        {SECTION: {**Case("llama").section.to_json(), "local_cache": "lru"}},
        r"razor\.local_cache: expected cyclic or slots, found 'lru'",
    ),
}


@pytest.mark.parametrize("name", CONFIG_REFUSALS)
def test_refused_checkpoints(trtllm: doubles.Double, tmp_path: Path, name: str) -> None:
    change, message = CONFIG_REFUSALS[name]
    with pytest.raises(UsageError, match=message):
        Case("llama", change=change).model(trtllm, tmp_path / "x")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tp_size": 1}, r"tp_size: the checkpoint's heads are ordered for 1 ranks, found 2"),
        ({"model": "another"}, r"its heads were ordered for another model"),
        ({"num_retrieval": [1, 1]}, r"razor\.num_retrieval: expected 4 counts of 0\.\.2"),
    ],
)
def test_section_must_fit_the_engine(
    trtllm: doubles.Double, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    case = Case("llama", TrtLlmOptions(tp_size=2))
    section = {**case.section.to_json(), **change}
    case = dataclasses.replace(case, change={SECTION: section})
    with pytest.raises(UsageError, match=message):
        build(trtllm, case.model(trtllm, tmp_path / "x"), case.options)


def test_cyclic_caches_of_the_first_release_only(trtllm: doubles.Double, tmp_path: Path) -> None:
    case = Case("llama", TrtLlmOptions(local_cache=CYCLIC))
    if trtllm.release.startswith("1.0"):
        assert network(trtllm, case, tmp_path / "x")["plugins"]
        return
    with pytest.raises(UsageError, match=r"local_cache: TensorRT-LLM .* no cyclic cache"):
        network(trtllm, case, tmp_path / "x")


def test_slots_of_one_stage_only(trtllm: doubles.Double, tmp_path: Path) -> None:
    case = Case("llama", TrtLlmOptions(pp_size=2, local_cache=SLOTS), counts=(1,) * LAYERS)
    with pytest.raises(UsageError, match=r"pp_size: 2 with local heads in state slots"):
        network(trtllm, case, tmp_path / "x")


def test_stages_split_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A partition that sums up to the layers says nothing about cache layers."""
    with doubles.installed(tmp_path / "double", "1.0.0") as trtllm:
        case = Case("llama", TrtLlmOptions(pp_size=2), counts=(1,) * LAYERS)
        model = case.model(trtllm, tmp_path / "x")

        def uneven(mapping: Any, num_layers: int) -> list[int]:
            if num_layers != LAYERS:
                raise ValueError(f"partition does not sum up to {num_layers}")
            return [[0, 1, 2], [3]][mapping.pp_rank]

        monkeypatch.setattr(trtllm.load("tensorrt_llm.mapping").Mapping, "pp_layers", uneven)
        with pytest.raises(UsageError, match=r"stage 0 has layers 0\.\.2.*no pp_partition"):
            build(trtllm, model, case.options)


def test_other_releases_are_refused(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.3.0")
    with pytest.raises(UsageError, match=r"expected 1\.0, 1\.1 and 1\.2, found '1\.3\.0'"):
        Case("llama").model(trtllm, tmp_path / "x")


def test_other_architectures_are_refused(trtllm: doubles.Double) -> None:
    models = trtllm.load("trt_razor.trtllm.models")
    for razor in (True, False):
        with pytest.raises(UsageError, match=r"'GPTForCausalLM' is not supported"):
            models.model_class("GPTForCausalLM", razor)
