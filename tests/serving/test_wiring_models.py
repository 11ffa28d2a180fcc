"""Wiring checks of the five models: the public interface, parameters, and who answers how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from trt_razor.serving.config import ModelConfig
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.wiring import check_models

replace = dataclasses.replace
Models = dict[str, ModelConfig]


def tensor(models: Models, model: str, kind: str, name: str, **change: Any) -> None:
    """Change one tensor of a model."""
    tensors = getattr(models[model], kind)
    assert name in [t.name for t in tensors]
    changed = tuple(replace(t, **change) if t.name == name else t for t in tensors)
    models[model] = replace(models[model], **{kind: changed})


def model(models: Models, name: str, **change: Any) -> None:
    models[name] = replace(models[name], **change)


def trtllm() -> Models:
    return {c.name: c for c in trtllm_configs(TrtllmSettings("/engine"))}


def own() -> Models:
    return {c.name: c for c in own_configs(OwnSettings("1/engine"))}


def parameter(models: Models, name: str, key: str, value: str | None) -> None:
    kept = [(k, v) for k, v in models[name].parameters if k != key]
    given = [] if value is None else [(key, value)]
    models[name] = replace(models[name], parameters=tuple(kept + given))


def drop(models: Models, name: str, kind: str, tensor: str) -> None:
    kept = tuple(t for t in getattr(models[name], kind) if t.name != tensor)
    models[name] = replace(models[name], **{kind: kept})


LLM, BLS = "tensorrt_llm", "tensorrt_llm_bls"
FIVE: dict[str, tuple[Callable[[], Models], Callable[[Models], Any], list[str]]] = {
    "public input missing": (
        trtllm,
        lambda m: drop(m, LLM, "inputs", "stop"),
        ["model 'tensorrt_llm': public input 'stop' is missing"],
    ),
    "public output missing": (
        trtllm,
        lambda m: drop(m, LLM, "outputs", "context_phase_params"),
        ["model 'tensorrt_llm': public output 'context_phase_params' is missing"],
    ),
    "public type": (
        own,
        lambda m: tensor(m, LLM, "inputs", "stop", data_type="INT32"),
        ["model 'tensorrt_llm': public input 'stop': expected BOOL, found INT32"],
    ),
    "open type": (
        own,
        lambda m: tensor(m, LLM, "inputs", "draft_logits", data_type="BF16"),
        ["model 'tensorrt_llm': public input 'draft_logits': expected FP32 or FP16, found BF16"],
    ),
    "open type as allowed": (
        own,
        lambda m: tensor(m, LLM, "inputs", "draft_logits", data_type="FP16"),
        [],
    ),
    "public dims": (
        own,
        lambda m: tensor(m, BLS, "inputs", "image_url_input", dims=(-1,)),
        ["model 'tensorrt_llm_bls': public input 'image_url_input': expected dims [1], found [-1]"],
    ),
    "public optional": (
        own,
        lambda m: tensor(m, BLS, "inputs", "max_tokens", optional=True),
        [
            "model 'tensorrt_llm_bls': public input 'max_tokens': expected optional false, found true"
        ],
    ),
    "public reshape": (
        own,
        lambda m: tensor(m, LLM, "inputs", "stop", scalar=False),
        ["model 'tensorrt_llm': public input 'stop': expected scalar true, found false"],
    ),
    "public ragged": (
        own,
        lambda m: tensor(m, LLM, "inputs", "input_ids", ragged=False),
        ["model 'tensorrt_llm': public input 'input_ids': expected ragged true, found false"],
    ),
    "required input of ours": (
        own,
        lambda m: tensor(m, BLS, "inputs", "prompt_format", optional=False),
        [
            "model 'tensorrt_llm_bls': input 'prompt_format' is ours and must be optional: clients do "
            "not know it"
        ],
    ),
    "two instances of the engine": (
        own,
        lambda m: model(m, LLM, instances=2),
        [
            "model 'tensorrt_llm': expected one instance (a stop request must reach it), found 2"
        ],
    ),
    "no instance group": (
        own,
        lambda m: model(m, BLS, instances=0),
        [
            "model 'tensorrt_llm_bls': expected an instance_group with a count of at least 1, found 0"
        ],
    ),
    "parameter missing": (
        own,
        lambda m: parameter(m, LLM, "slots", None),
        ["model 'tensorrt_llm': parameter 'slots' is missing"],
    ),
    "parameter of the stock backend": (
        trtllm,
        lambda m: parameter(m, LLM, "sink_token_length", "4 tokens"),
        [
            "model 'tensorrt_llm': parameter 'sink_token_length': expected a whole number from 0 to "
            "2147483647, or nothing, found '4 tokens'"
        ],
    ),
    "parameter of our engine": (
        own,
        lambda m: parameter(m, LLM, "sink_token_length", "4"),
        ["model 'tensorrt_llm': parameter 'sink_token_length' does not apply here; leave it empty"],
    ),
    "unknown parameter": (
        own,
        lambda m: parameter(m, "postprocessing", "tokeniser_dir", "x"),
        [
            "model 'postprocessing': unknown parameter 'tokeniser_dir'; did you mean tokenizer_dir?"
        ],
    ),
    "unknown engine of the BLS model": (
        own,
        lambda m: parameter(m, BLS, "tensorrt_llm_model_name", "tensorrt-llm"),
        [
            "model 'tensorrt_llm_bls': parameter 'tensorrt_llm_model_name': unknown model "
            "'tensorrt-llm'; did you mean tensorrt_llm or tensorrt_llm_bls?"
        ],
    ),
    "no engine of the BLS model": (
        own,
        lambda m: parameter(m, BLS, "tensorrt_llm_model_name", ""),
        [
            "model 'tensorrt_llm_bls': parameter 'tensorrt_llm_model_name': expected the name of a "
            "model, found nothing"
        ],
    ),
    "BLS model of another engine": (
        own,
        lambda m: (
            m.update(other=replace(m[LLM], name="other", decoupled=None)),
            parameter(m, BLS, "tensorrt_llm_model_name", "other"),
        ),
        ["model 'tensorrt_llm_bls': expected decoupled false as 'other' has, found true"],
    ),
    "BLS model not decoupled": (
        own,
        lambda m: model(m, BLS, decoupled=None),
        [
            "model 'tensorrt_llm_bls': expected decoupled true as 'tensorrt_llm' has, found false"
        ],
    ),
    "BLS model and engine disagree about the prompt": (
        trtllm,
        lambda m: parameter(m, BLS, "exclude_input_in_output", "false"),
        [
            "model 'tensorrt_llm_bls': parameter 'exclude_input_in_output': expected 'true' as "
            "'tensorrt_llm' has, found 'false'"
        ],
    ),
    "engine not decoupled": (
        trtllm,
        lambda m: model(m, LLM, decoupled=False),
        [
            "model 'tensorrt_llm_bls': expected decoupled false as 'tensorrt_llm' has, found true"
        ],
    ),
    "text of an engine that has none": (
        trtllm,
        lambda m: parameter(m, BLS, "text_from_engine", "true"),
        [
            "model 'tensorrt_llm_bls': parameter 'text_from_engine': expected false, as 'tensorrt_llm' "
            "has no output 'text_output'; found 'true'"
        ],
    ),
    "text without a tokenizer": (
        trtllm,
        lambda m: parameter(m, BLS, "tokenizer_dir", ""),
        [
            "model 'tensorrt_llm_bls': parameter 'tokenizer_dir': expected a value, as text_from_engine "
            "is false; found nothing"
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", FIVE)
def test_one_damage_of_the_five_models(damage: str) -> None:
    make, change, expected = FIVE[damage]
    models = make()
    assert check_models(list(models.values())) == []
    change(models)
    found = check_models(list(models.values()))
    assert found == expected


def test_every_entry_of_the_ensembles_matters() -> None:
    """Without any one entry of any step, some check speaks; optional inputs are seen by their ends."""
    for models in (trtllm(), own()):
        ensemble = models["ensemble"]
        for i, whole in enumerate(ensemble.steps):
            for side in ("inputs", "outputs"):
                entries = getattr(whole, side)
                for j, (_, tensor_name) in enumerate(entries):
                    less = replace(whole, **{side: entries[:j] + entries[j + 1 :]})
                    steps = (*ensemble.steps[:i], less, *ensemble.steps[i + 1 :])
                    damaged = {**models, "ensemble": replace(ensemble, steps=steps)}
                    found = check_models(list(damaged.values()))
                    assert found, (whole.model, side, tensor_name)
                    assert any(repr(tensor_name) in text or "required" in text for text in found)
