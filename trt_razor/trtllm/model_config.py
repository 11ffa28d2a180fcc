"""``config.json`` of a TensorRT-LLM checkpoint: from a model's shape, and back to it.

The fields are those of TensorRT-LLM 1.0 - 1.2's ``PretrainedConfig`` and of the classes for Qwen,
LLaMA and Baichuan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.models.spec import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    ModelSpec,
    RopeSpec,
)
from trt_razor.trtllm.options import SECTION, RazorSection, TrtLlmOptions

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan": "BaichuanForCausalLM",
}
_ARCHITECTURES = {
    **{name: architecture for architecture, name in _CLASSES.items()},
    "BaiChuanForCausalLM": "baichuan",
}
_QWEN = ("qwen2", "qwen3")
_POSITIONS = {"rope": "rope_gpt_neox", "alibi": "alibi"}
# Of ModelSpec, what no fingerprint covers.
_NOT_IN_CONFIG = ("name", "bos_token_id", "eos_token_ids", "torch_dtype", "max_positions")
# Fields that change what a model computes, with the only value that ours have.
_FIXED: dict[str, Any] = {
    "use_parallel_embedding": False,
    "remove_duplicated_kv_heads": False,
    "is_pruned": False,
    "use_logn_attn": False,
    "rotary_pct": 1.0,
    "residual_mlp": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "clip_qkv": None,
}


def trtllm_config(
    spec: ModelSpec, dtype: str, options: TrtLlmOptions, section: RazorSection | None
) -> dict[str, Any]:
    """``config.json`` of a TensorRT-LLM checkpoint, the same for all ranks.

    ``mapping`` and ``quantization`` hold no field that one of the releases does not know; an unknown
    one there is an error, at the top level it is kept.

    Args:
        dtype: of the weights. section: None = a dense engine.

    Raises:
        UsageError: the model has something that TensorRT-LLM's class of it has not, or an MLP that
            cannot be shared out to the ranks.
    """
    if spec.intermediate_size % options.tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of the intermediate size {spec.intermediate_size} of "
            f"'{spec.name}', found {options.tp_size}"
        )
    config: dict[str, Any] = {
        "architecture": _CLASSES[spec.architecture],
        "dtype": dtype,
        "logits_dtype": "float32",
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "hidden_size": spec.hidden_size,
        "head_size": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "hidden_act": "silu",
        "norm_epsilon": spec.rms_norm_eps,
        "position_embedding_type": _POSITIONS[spec.position],
        "max_position_embeddings": spec.max_positions,
        "rotary_embedding_dim": spec.head_dim,
        # Not for Qwen3 either, whose QK-norm the model class decides.
        "qk_layernorm": False,
        "tie_word_embeddings": spec.tie_embeddings,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": options.mapping(),
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": "FP8" if options.fp8 else None,
        },
    }
    if spec.architecture == "baichuan":
        size = "13b" if spec.position == "alibi" else "7b"
        config["model_version"] = f"v{2 if spec.norm_head else 1}_{size}"
    else:
        config |= {
            "rotary_base": spec.rope.theta,
            "rotary_scaling": _rotary_scaling(spec.rope),
            "attn_bias": spec.qkv_bias,
            "mlp_bias": spec.mlp_bias,
        }
    if spec.architecture in _QWEN:
        config |= {
            "qwen_type": spec.architecture,
            "seq_length": 8192,  # of logn scaling, which none of these models uses
            "moe_intermediate_size": 0,
            "moe_shared_expert_intermediate_size": 0,
        }
    _check_expressible(spec, config)
    if section is not None:
        config[SECTION] = section.for_cache(options.local_cache)
    return config


def _rotary_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """As in Hugging Face's config, from which TensorRT-LLM's converter copies it."""
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return scaling


def _check_expressible(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """The config must say all that decides what the model computes: it is read back."""
    back = spec_from_trtllm_config(config, spec.name, spec.name)
    if back.fingerprint() == spec.fingerprint():
        return
    mine, found = asdict(spec), asdict(back)
    name = next(n for n in mine if n not in _NOT_IN_CONFIG and mine[n] != found[n])
    raise UsageError(
        f"{spec.name}: {name} = {mine[name]!r:.80}: TensorRT-LLM's {config['architecture']} has no "
        "such thing; use --backend tensorrt or onnxruntime"
    )


def spec_from_trtllm_config(config: Mapping[str, Any], name: str, where: str) -> ModelSpec:
    """ModelSpec from ``config.json`` of a TensorRT-LLM checkpoint, whoever converted it.

    Quantisation and the mapping to ranks are not looked at. ``tie_word_embeddings`` counts as false
    where it is missing (Model Optimizer does not write it). Special tokens are not in the file.

    Args:
        config: parsed JSON, untrusted. where: the file, for messages.

    Raises:
        UsageError: an architecture that is not supported, a missing or impossible field, or one
            that changes what the model computes in a way we do not know.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"{where}: expected a JSON object, found {type(config).__name__}")
    c = ConfigFields(config, where)
    architecture = _architecture(c)
    _check_fixed(c, architecture)
    baichuan = architecture == "baichuan"
    hidden_size = c.integer("hidden_size", 1, MAX_WIDTH)
    num_heads, num_kv_heads, head_dim = _heads(c, hidden_size, baichuan)
    vocab_size = c.integer("vocab_size", 2, MAX_VOCAB)
    position = _position(c, head_dim, baichuan)
    dtype = c.get("dtype")
    if dtype not in ("float16", "bfloat16", "float32"):
        c.fail("dtype", "float16, bfloat16 or float32", dtype)
    bias = not baichuan and c.boolean("attn_bias", architecture in _QWEN)
    return ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=c.integer("num_hidden_layers", 1, MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=c.integer("intermediate_size", 1, MAX_WIDTH),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_positions=c.integer("max_position_embeddings", 1, MAX_POSITIONS),
        rms_norm_eps=c.number("norm_epsilon", 1e-12, 1e-1, 1e-5),
        position=position,
        rope=RopeSpec() if baichuan else _rope(c),  # Baichuan's class knows no other base
        qkv_bias=bias,
        o_bias=bias and architecture not in _QWEN,
        mlp_bias=not baichuan and c.boolean("mlp_bias", False),
        qk_norm=architecture == "qwen3",
        tie_embeddings=c.boolean("tie_word_embeddings", False),
        norm_head=baichuan and _norm_head(c, vocab_size),
        torch_dtype=dtype,
    )


def _architecture(c: ConfigFields) -> str:
    found = c.get("architecture")
    if not isinstance(found, str) or found not in _ARCHITECTURES:
        c.fail("architecture", f"one of {', '.join(_ARCHITECTURES)}", found)
    architecture = _ARCHITECTURES[found]
    if architecture in _QWEN and c.get("qwen_type", architecture) != architecture:
        c.fail("qwen_type", repr(architecture), c.get("qwen_type"))
    return architecture


def _heads(c: ConfigFields, hidden_size: int, baichuan: bool) -> tuple[int, int, int]:
    """Attention heads, KV heads, head_dim."""
    num_heads = num_kv_heads = c.integer("num_attention_heads", 1, MAX_HEADS)
    if c.get("num_key_value_heads") is not None:
        num_kv_heads = c.integer("num_key_value_heads", 1, MAX_HEADS)
    if num_heads % num_kv_heads:
        c.fail("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", num_kv_heads)
    if c.get("head_size") is not None:
        head_dim = c.integer("head_size", 2, MAX_HEAD_DIM)
    elif hidden_size % num_heads:
        c.fail("hidden_size", f"a multiple of num_attention_heads={num_heads}", hidden_size)
    else:
        head_dim = hidden_size // num_heads
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        c.fail("head_size", f"an even number 2..{MAX_HEAD_DIM}", head_dim)
    # TensorRT-LLM's Baichuan takes neither of them from its config.
    if baichuan and num_kv_heads != num_heads:
        c.fail("num_key_value_heads", f"{num_heads} (no grouped heads in Baichuan)", num_kv_heads)
    if baichuan and head_dim * num_heads != hidden_size:
        c.fail(
            "head_size",
            f"hidden_size / num_attention_heads = {hidden_size / num_heads:g}",
            head_dim,
        )
    return num_heads, num_kv_heads, head_dim


def _position(c: ConfigFields, head_dim: int, baichuan: bool) -> str:
    found = c.get("position_embedding_type")
    if baichuan and found == _POSITIONS["alibi"]:
        return "alibi"
    if found != _POSITIONS["rope"]:
        c.fail("position_embedding_type", repr(_POSITIONS["rope"]), found)
    for name in ("rotary_embedding_dim", "rotary_dim"):
        if c.get(name) not in (None, head_dim):
            c.fail(name, f"{head_dim} (all of a head is rotated)", c.get(name))
    return "rope"


def _check_fixed(c: ConfigFields, architecture: str) -> None:
    for name, value in _FIXED.items():
        if c.get(name) is not None and c.get(name) != value:
            c.fail(name, json.dumps(value), c.get(name))
    if architecture != "qwen3" and c.get("qk_layernorm"):
        c.fail("qk_layernorm", "false", c.get("qk_layernorm"))
    if c.get("hidden_act") != "silu":
        c.fail("hidden_act", "'silu'", c.get("hidden_act"))
    moe = c.get("moe")
    experts = moe.get("num_experts") if isinstance(moe, Mapping) else moe
    if experts or c.get("moe_num_experts"):
        c.fail("moe", "a dense model (no mixture of experts)", moe or c.get("moe_num_experts"))


def _rope(c: ConfigFields) -> RopeSpec:
    theta = c.number("rotary_base", 2.0, 1e15, 10000.0)
    raw = c.get("rotary_scaling")
    if raw is None:
        return RopeSpec(theta)
    if not isinstance(raw, Mapping):
        c.fail("rotary_scaling", "an object or null", raw)
    s = ConfigFields(raw, c.where, "rotary_scaling.")
    kind = s.get("type", s.get("rope_type"))
    if kind in (None, "default", "none"):
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, s.number("factor", 1.0, 1e6))
    if kind != "llama3":
        s.fail("rope_type", "linear or llama3", kind)
    low = s.number("low_freq_factor", 1e-3, 1e6)
    high = s.number("high_freq_factor", 1e-3, 1e6)
    if not low < high:
        s.fail("high_freq_factor", f"more than low_freq_factor={low:g}", high)
    return RopeSpec(
        theta,
        kind,
        s.number("factor", 1.0, 1e6),
        s.integer("original_max_position_embeddings", 1, MAX_POSITIONS),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _norm_head(c: ConfigFields, vocab_size: int) -> bool:
    """Baichuan 2 has an lm_head with rows of length 1 (they are, in the rank files)."""
    version = c.get("model_version")
    if version is None and vocab_size in (64000, 125696):
        return vocab_size == 125696
    if not isinstance(version, str) or version[:3] not in ("v1_", "v2_"):
        c.fail("model_version", "'v1_7b', 'v1_13b', 'v2_7b' or 'v2_13b'", version)
    return version.startswith("v2_")
