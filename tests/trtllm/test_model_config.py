"""config.json of a TensorRT-LLM checkpoint, both ways."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from tiny_checkpoints import SPECS, head_map_of, spec_of

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.checkpoint import spec_from_trtllm_config, trtllm_config
from trt_razor.trtllm.options import RazorSection, TrtLlmOptions, razor_section
from trt_razor.trtllm.ranks import equalise, rank_layout

ONE = TrtLlmOptions()


def back(config: dict[str, Any]) -> ModelSpec:
    return spec_from_trtllm_config(json.loads(json.dumps(config)), "m", "dir/config.json")


@pytest.mark.parametrize("name", zoo_names())
def test_zoo_models_survive_the_round_trip(name: str) -> None:
    spec = zoo_spec(name)
    found = back(trtllm_config(spec, "bfloat16", ONE, None))
    assert found.fingerprint() == spec.fingerprint()
    assert found.max_positions == spec.max_positions
    assert (found.name, found.torch_dtype) == ("m", "bfloat16")


@pytest.mark.parametrize("name", SPECS)
def test_tiny_models_survive_it_too(name: str) -> None:
    found = back(trtllm_config(SPECS[name], "float16", TrtLlmOptions(tp_size=2), None))
    assert found.fingerprint() == SPECS[name].fingerprint()


# What TensorRT-LLM's own converter writes for these models, as far as its model classes read it.
KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "architecture": "Qwen2ForCausalLM",
        "qwen_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_size": 128,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "rotary_base": 1000000.0,
        "rotary_scaling": None,
        "attn_bias": True,
        "norm_epsilon": 1e-6,
        "position_embedding_type": "rope_gpt_neox",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
        "seq_length": 8192,
    },
    "qwen3-8b": {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "attn_bias": False,
        "qk_layernorm": False,
        "head_size": 128,
        "max_position_embeddings": 40960,
    },
    "llama3.1-8b": {
        "architecture": "LlamaForCausalLM",
        "rotary_base": 500000.0,
        "rotary_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "attn_bias": False,
        "mlp_bias": False,
        "norm_epsilon": 1e-5,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rotary_embedding_dim": 128,
    },
    "mistral-7b": {"architecture": "MistralForCausalLM", "rotary_scaling": None},
    "baichuan2-7b": {
        "architecture": "BaichuanForCausalLM",
        "model_version": "v2_7b",
        "position_embedding_type": "rope_gpt_neox",
        "num_key_value_heads": 32,
        "vocab_size": 125696,
    },
    "baichuan2-13b": {
        "architecture": "BaichuanForCausalLM",
        "model_version": "v2_13b",
        "position_embedding_type": "alibi",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 40,
        "intermediate_size": 13696,
    },
}


@pytest.mark.parametrize("name", KNOWN)
def test_fields_of_known_models(name: str) -> None:
    config = trtllm_config(zoo_spec(name), "float16", ONE, None)
    assert {field: config[field] for field in KNOWN[name]} == KNOWN[name]
    assert config["dtype"] == "float16"
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}
    assert "razor" not in config


def test_ranks_and_fp8_cache() -> None:
    options = TrtLlmOptions(tp_size=4, pp_size=2, kv_dtype="fp8")
    config = trtllm_config(zoo_spec("qwen-7b"), "bfloat16", options, None)
    # The releases know different fields here, and refuse those that they do not know.
    assert config["mapping"] == {"world_size": 8, "tp_size": 4, "pp_size": 2}
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}


def test_razor_section_is_in_it() -> None:
    spec = SPECS["llama-gqa"]
    head_map = equalise(head_map_of(spec), 2)
    section = razor_section(spec, head_map, rank_layout(head_map, 2), RazorPolicy(min_window=64))
    config = json.loads(json.dumps(trtllm_config(spec, "float16", TrtLlmOptions(2), section)))
    assert RazorSection.from_json(config["razor"]) == section
    assert back(config).fingerprint() == spec.fingerprint() == section.model


def test_mlp_must_divide() -> None:
    message = (
        "^tp_size: expected a divisor of the intermediate size 1536 of 'smollm2-135m', found 9$"
    )
    with pytest.raises(UsageError, match=message):
        trtllm_config(zoo_spec("smollm2-135m"), "float16", TrtLlmOptions(tp_size=9), None)


@pytest.mark.parametrize(
    "spec, field",
    [
        (spec_of("qwen3", 8, 4, qk_norm=True, qkv_bias=True, o_bias=True), "o_bias = True"),
        (spec_of("baichuan", 4, 4, rope=RopeSpec(5e4)), "rope = "),
        (spec_of("llama", 4, 4, qkv_bias=True), "o_bias = False"),
    ],
)
def test_what_the_model_class_has_not_is_refused(spec: ModelSpec, field: str) -> None:
    with pytest.raises(UsageError) as e:
        trtllm_config(spec, "float16", ONE, None)
    assert str(e.value).startswith(f"{spec.name}: {field}")
    assert str(e.value).endswith("has no such thing; use --backend tensorrt or onnxruntime")


# Configs of others ------------------------------------------------------------------------------
def test_defaults_of_the_config_classes() -> None:
    """Fields that TensorRT-LLM fills in when they are missing or null."""
    config = trtllm_config(spec_of("llama", 6, 6, hidden_size=48), "float16", ONE, None)
    for name in ("num_key_value_heads", "head_size"):
        config[name] = None
    for name in ("rotary_base", "attn_bias", "mlp_bias", "norm_epsilon", "rotary_embedding_dim"):
        del config[name]
    found = back(config)
    assert (found.num_kv_heads, found.head_dim, found.rms_norm_eps) == (6, 8, 1e-5)
    assert found.rope == RopeSpec(10000.0)
    assert not found.qkv_bias
    qwen = trtllm_config(SPECS["qwen2-gqa"], "float16", ONE, None)
    del qwen["attn_bias"]
    assert back(qwen).qkv_bias


def test_what_a_loaded_config_writes_again_is_read() -> None:
    """TensorRT-LLM's to_dict() adds every field of its class."""
    config = trtllm_config(SPECS["llama-gqa"], "float16", ONE, None)
    config |= {
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
        "remove_duplicated_kv_heads": False,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "attention_multiplier": 1.0,
        "residual_mlp": False,
        "runtime_defaults": None,
        "layer_idx_offset": 0,
        "producer": {"name": "modelopt"},
    }
    assert back(config).fingerprint() == SPECS["llama-gqa"].fingerprint()


@pytest.mark.parametrize(
    "changes, rope",
    [
        ({"type": "linear", "factor": 2.5}, RopeSpec(5e5, "linear", 2.5)),
        ({"rope_type": "linear", "factor": 3}, RopeSpec(5e5, "linear", 3.0)),
        ({"rope_type": "default"}, RopeSpec(5e5)),
        (None, RopeSpec(5e5)),
    ],
)
def test_forms_of_rotary_scaling(changes: dict[str, Any] | None, rope: RopeSpec) -> None:
    config = trtllm_config(SPECS["llama-gqa"], "float16", ONE, None)
    assert back({**config, "rotary_scaling": changes}).rope == rope


def test_baichuan_versions() -> None:
    config = trtllm_config(SPECS["baichuan-rope"], "float16", ONE, None)
    assert back({**config, "architecture": "BaiChuanForCausalLM"}).norm_head
    assert not back({**config, "model_version": "v1_7b"}).norm_head
    del config["model_version"]  # as NVIDIA's quantisation tool leaves it
    assert back({**config, "vocab_size": 125696}).norm_head
    assert not back({**config, "vocab_size": 64000}).norm_head
    with pytest.raises(UsageError, match=r"config\.json: model_version: expected 'v1_7b'"):
        back(config)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama-gqa", {"architecture": "MixtralForCausalLM"}, "architecture: expected one of Llama"),
    ("llama-gqa", {"architecture": ["LlamaForCausalLM"]}, "architecture: expected one of Llama"),
    ("llama-gqa", {"num_hidden_layers": 1 << 30}, "num_hidden_layers: expected an integer 1..1024"),
    ("llama-gqa", {"num_hidden_layers": None}, "num_hidden_layers: expected an integer"),
    ("llama-gqa", {"num_attention_heads": True}, "num_attention_heads: expected an integer"),
    ("llama-gqa", {"num_attention_heads": 0}, "num_attention_heads: expected an integer"),
    ("llama-gqa", {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of"),
    ("llama-gqa", {"head_size": 7}, "head_size: expected an even number"),
    (
        "llama-gqa",
        {"head_size": None, "hidden_size": 1 << 20, "num_attention_heads": 4},
        "head_size",
    ),
    ("llama-gqa", {"head_size": None, "hidden_size": 50}, "hidden_size: expected a multiple of"),
    ("llama-gqa", {"hidden_size": "48"}, "hidden_size: expected an integer"),
    ("llama-gqa", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', found 'gelu'"),
    ("llama-gqa", {"hidden_act": None}, "hidden_act: expected 'silu', found None"),
    ("llama-gqa", {"norm_epsilon": float("nan")}, "norm_epsilon: expected a number"),
    ("llama-gqa", {"rotary_base": -1.0}, "rotary_base: expected a number"),
    ("llama-gqa", {"rotary_scaling": "yes"}, "rotary_scaling: expected an object or null"),
    (
        "llama-gqa",
        {"rotary_scaling": {"type": "yarn"}},
        "rotary_scaling.rope_type: expected linear",
    ),
    ("llama-gqa", {"rotary_scaling": {"type": "dynamic", "factor": 2}}, "found 'dynamic'"),
    ("llama-gqa", {"rotary_scaling": {"type": ["linear"]}}, "rotary_scaling.rope_type: expected"),
    ("llama-gqa", {"rotary_scaling": {"type": "linear"}}, "rotary_scaling.factor: expected"),
    (
        "llama-gqa",
        {"rotary_scaling": {"type": "llama3"}},
        "rotary_scaling.low_freq_factor: expected",
    ),
    ("llama-gqa", {"rotary_pct": 0.5}, "rotary_pct: expected 1.0, found 0.5"),
    ("llama-gqa", {"rotary_embedding_dim": 4}, "rotary_embedding_dim: expected 8"),
    (
        "llama-gqa",
        {"position_embedding_type": "alibi"},
        "position_embedding_type: expected 'rope_gpt",
    ),
    ("llama-gqa", {"position_embedding_type": None}, "position_embedding_type: expected 'rope_gpt"),
    ("llama-gqa", {"attention_multiplier": 0.5}, "attention_multiplier: expected 1.0, found 0.5"),
    ("llama-gqa", {"residual_mlp": True}, "residual_mlp: expected false, found True"),
    ("llama-gqa", {"use_parallel_embedding": True}, "use_parallel_embedding: expected false"),
    ("llama-gqa", {"clip_qkv": 8.0}, "clip_qkv: expected null, found 8.0"),
    ("llama-gqa", {"moe": {"num_experts": 8}}, "moe: expected a dense model"),
    ("llama-gqa", {"moe_num_experts": 8}, "moe: expected a dense model"),
    ("llama-gqa", {"dtype": "int8"}, "dtype: expected float16, bfloat16 or float32, found 'int8'"),
    ("llama-gqa", {"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ("llama-gqa", {"qk_layernorm": True}, "qk_layernorm: expected false"),
    ("qwen2-gqa", {"use_logn_attn": True}, "use_logn_attn: expected false, found True"),
    ("qwen2-gqa", {"qwen_type": "qwen2_moe"}, "qwen_type: expected 'qwen2', found 'qwen2_moe'"),
    ("baichuan-rope", {"num_key_value_heads": 2}, "num_key_value_heads: expected 4"),
    (
        "baichuan-rope",
        {"head_size": 16},
        "head_size: expected hidden_size / num_attention_heads = 8",
    ),
    ("baichuan-rope", {"model_version": "7b"}, "model_version: expected 'v1_7b'"),
]


@pytest.mark.parametrize(
    "name, changes, message", REFUSED, ids=[str(c)[:60] for _, c, _ in REFUSED]
)
def test_other_configs_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    config = trtllm_config(SPECS[name], "float16", ONE, None)
    with pytest.raises(UsageError) as e:
        spec_from_trtllm_config({**config, **changes}, "m", "dir/config.json")
    assert str(e.value).startswith("dir/config.json: ")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_every_size_must_be_there() -> None:
    config = trtllm_config(SPECS["llama-gqa"], "float16", ONE, None)
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        rest = {k: v for k, v in config.items() if k != name}
        with pytest.raises(UsageError, match=f"^f: {name}: missing"):
            spec_from_trtllm_config(rest, "m", "f")
    with pytest.raises(UsageError, match=r"^f: expected a JSON object, found list"):
        spec_from_trtllm_config([], "m", "f")  # type: ignore[arg-type]


def test_sliding_window_lowers_the_positions() -> None:
    spec = dataclasses.replace(SPECS["mistral-gqa"], max_positions=100)
    config = trtllm_config(spec, "float16", ONE, None)
    assert config["max_position_embeddings"] == 100
