"""ModelSpec from config.json: against transformers' own configuration classes, and refusals."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from model_files import config

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec, RopeSpec, spec_from_hf_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def spec(model_type: str = "llama", /, **changes: Any) -> ModelSpec:
    return spec_from_hf_config(config(model_type, **changes), "tiny")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("given", ["explicit", "null", "tied"])
def test_same_reading_and_same_tensors_as_transformers(model_type: str, given: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if (model_type, given) == ("mistral", "null"):
        pytest.skip("transformers itself refuses null here")
    changes: dict[str, Any] = {
        "explicit": {"head_dim": 16, "rope_theta": 5e5, "attention_bias": True, "mlp_bias": True},
        "null": {"num_key_value_heads": None},
        "tied": {"tie_word_embeddings": True, "rms_norm_eps": ...},
    }[given]
    data = config(model_type, **changes)
    ours = spec_from_hf_config(data, "tiny")
    hf = transformers.AutoConfig.for_model(**data)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert ours.tensors() == theirs
    assert ours.num_parameters() == sum(math.prod(s) for s in theirs.values())
    assert ours.num_kv_heads == hf.num_key_value_heads
    assert ours.rms_norm_eps == hf.rms_norm_eps
    assert ours.rope.theta == hf.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == hf.tie_word_embeddings
    assert ours.max_positions == hf.max_position_embeddings  # 64 < mistral's default window


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_absent_kv_heads_take_the_class_default(model_type: str) -> None:
    found = spec(
        model_type, num_key_value_heads=..., num_attention_heads=32, hidden_size=64
    ).num_kv_heads
    assert found == {"mistral": 8, "qwen2": 32}[model_type]
    assert spec("llama", num_key_value_heads=...).num_kv_heads == 4


def test_qwen3_head_dim_defaults_to_128() -> None:
    assert spec("qwen3").head_dim == 128
    assert spec("llama").head_dim == 8


@pytest.mark.parametrize("form", ["v4 type", "v4 rope_type", "v5"])
@pytest.mark.parametrize(
    "kind, values, expected",
    [
        ("default", {}, RopeSpec(5e5)),
        ("linear", {"factor": 4.0}, RopeSpec(5e5, "linear", 4.0)),
        ("llama3", LLAMA3, RopeSpec(5e5, "llama3", 8.0, 32, 1.0, 4.0)),
        ("yarn", {"factor": 4.0}, RopeSpec(5e5, "yarn", 4.0, 64)),
        (
            "yarn",
            {"factor": 4, "original_max_position_embeddings": 16, "beta_fast": 24, "beta_slow": 2},
            RopeSpec(5e5, "yarn", 4.0, 16, beta_fast=24.0, beta_slow=2.0),
        ),
        (
            "yarn",
            {"factor": 4.0, "attention_factor": 1.5},
            RopeSpec(5e5, "yarn", 4.0, 64, attention_factor=1.5),
        ),
        (
            "yarn",
            {"factor": math.e, "mscale": 2.0, "mscale_all_dim": 1.0},
            RopeSpec(5e5, "yarn", math.e, 64, attention_factor=1.2 / 1.1),
        ),
    ],
)
def test_rope_forms(form: str, kind: str, values: dict[str, Any], expected: RopeSpec) -> None:
    if form == "v5":
        found = spec(rope_parameters={"rope_type": kind, "rope_theta": 5e5, **values})
    else:
        key = form.split()[1]
        found = spec(rope_theta=5e5, rope_scaling={key: kind, **values})
    assert found.rope == expected


def test_yarn_reaches_beyond_the_trained_positions() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert spec("qwen2", rope_scaling=yarn).max_positions == 256
    assert spec("qwen2", rope_scaling=yarn, max_position_embeddings=512).max_positions == 512


@pytest.mark.parametrize(
    "model_type, changes, expected",
    [
        ("mistral", {"sliding_window": None}, 64),
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": 100}, 64),
        ("mistral", {"max_position_embeddings": 8192}, 4096),  # absent: the class default, 4096
        ("qwen2", {"sliding_window": 16}, 64),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, 64),  # max_window_layers 28
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, 16),
        (
            "qwen3",
            {
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            16,
        ),
        ("llama", {"sliding_window": 16}, 64),  # llama has no such feature
    ],
)
def test_sliding_windows_cap_the_positions(
    model_type: str, changes: dict[str, Any], expected: int
) -> None:
    assert spec(model_type, **changes).max_positions == expected


def test_biases_follow_the_architecture() -> None:
    qwen2 = spec("qwen2", attention_bias=False)
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    llama = spec("llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen3 = spec("qwen3", attention_bias=True, mlp_bias=True)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (
        True,
        True,
        False,
        True,
    )


def test_baichuan_kinds() -> None:
    small = config("baichuan", vocab_size=125696, num_key_value_heads=...)
    seven = spec_from_hf_config(small, "b")
    assert (seven.position, seven.norm_head, seven.num_kv_heads) == ("rope", True, 4)
    small |= {"model_max_length": 99, "vocab_size": 64000}
    del small["max_position_embeddings"]
    small["architectures"] = ["BaiChuanForCausalLM"]
    thirteen = spec_from_hf_config(small, "b")
    assert (thirteen.position, thirteen.norm_head, thirteen.max_positions) == ("alibi", False, 99)
    # A 13B whose config was enriched by another tool is still the ALiBi model.
    enriched = config("baichuan", vocab_size=125696, hidden_size=5120, num_attention_heads=40)
    assert spec_from_hf_config(enriched, "b").position == "alibi"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architectures", "GPT2LMHeadModel", "Llama"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
        ({"architectures": ..., "model_type": "lama"}, ["model_type", "did you mean llama"]),
        ({"architectures": ..., "model_type": ...}, ["model_type", "None"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"hidden_size": None}, ["hidden_size", "found None"]),
        ({"hidden_size": 1 << 40}, ["hidden_size", "1..1048576"]),
        ({"hidden_size": 30}, ["hidden_size", "multiple of num_attention_heads=4"]),
        ({"hidden_size": 12}, ["head_dim", "even", "found 3"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "found 0"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "found True"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers", "found 2.0"]),
        ({"vocab_size": -1}, ["vocab_size", "found -1"]),
        ({"vocab_size": "61"}, ["vocab_size", "found '61'"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "divisor", "found 3"]),
        ({"head_dim": 100_000}, ["head_dim", "found 100000"]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings", "found 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rope_theta": -1.0}, ["config.json: rope_theta", "found -1.0"]),
        ({"rope_scaling": {"rope_theta": 0}}, ["rope_scaling.rope_theta", "found 0"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu", "gelu"]),
        ({"attention_bias": "yes"}, ["attention_bias", "'yes'"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8"]),
        ({"eos_token_id": "2"}, ["eos_token_id", "'2'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "dequantise"]),
        ({"num_local_experts": 8}, ["num_local_experts", "mixture of experts"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["rope_scaling.rope_type", "dynamic"],
        ),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling.rope_type", "longrope"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor", "None"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling.factor", "0.5"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 9}},
            ["high_freq_factor"],
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, ["truncate"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 64}}, ["beta_fast", "64"]),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            ["rope_parameters", "layers"],
        ),
    ],
)
def test_refusals_name_field_expected_and_found(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as e:
        spec(**changes)
    message = str(e.value)
    assert "\n" not in message
    for word in ("config.json", *words):
        assert word in message


def test_baichuan_of_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vocab_size: expected 64000 .* found 61"):
        spec("baichuan")


def test_not_an_object() -> None:
    with pytest.raises(UsageError, match="JSON object"):
        spec_from_hf_config([], "x")  # type: ignore[arg-type]


def test_token_ids() -> None:
    found = spec(bos_token_id=1, eos_token_id=[2, 5])
    assert (found.bos_token_id, found.eos_token_ids) == (1, (2, 5))
    none = spec(bos_token_id=None, eos_token_id=-1)
    assert (none.bos_token_id, none.eos_token_ids) == (None, ())


def test_fingerprint_covers_the_heads_not_the_name() -> None:
    one = spec_from_hf_config(config(), "a")
    same = spec_from_hf_config(config(eos_token_id=3, max_position_embeddings=128), "b")
    other = spec_from_hf_config(config(rope_theta=2e4), "a")
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != other.fingerprint()
