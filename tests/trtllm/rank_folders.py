"""Folders as TensorRT-LLM's converter and Model Optimizer write them, and how to read them again.

Written from the formats' descriptions, head by head and with no code of ``trt_razor.trtllm``: what reads
our files here must not share an error with what wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trt_razor.models.spec import ModelSpec

Stored = dict[str, tuple[str, np.ndarray]]
"""name → (safetensors dtype, array)."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan": "BaichuanForCausalLM",
}
_NUMPY = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "U8": np.uint8,
}


def write_safetensors(path: Path, tensors: Stored) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, value) in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_safetensors(path: Path) -> Stored:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    out = {}
    for name, info in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            dtype = np.dtype(_NUMPY[info["dtype"]])
            value = np.frombuffer(data[start + begin : start + end], dtype)
            out[name] = info["dtype"], value.reshape(info["shape"])
    return out


# A quantised model ------------------------------------------------------------------------------
@dataclass
class Linear:
    """A projection under its Hugging Face name, quantised or not.

    Attributes:
        codes: [out, in]: floats, FP8 values, or 4-bit integers in int8.
        scale: [1] or [out, in / group]; None = not quantised. prequant: [in].
    """

    codes: np.ndarray
    scale: np.ndarray | None = None
    prequant: np.ndarray | None = None

    def value(self) -> np.ndarray:
        """What it multiplies activations by, float64 [out, in]."""
        out = self.codes.astype(np.float64)
        if self.scale is not None:
            scale = self.scale.astype(np.float64)
            if scale.ndim == 2:
                scale = np.repeat(scale, out.shape[1] // scale.shape[1], axis=1)
            out = out * scale
        return out if self.prequant is None else out * self.prequant.astype(np.float64)


@dataclass
class Model:
    """Weights under Hugging Face names; norms, biases and the embedding are arrays."""

    spec: ModelSpec
    weights: dict[str, Any]
    algo: str | None = None
    group: int = 16
    activations: float = 0.25
    kv_scales: tuple[float, ...] = ()

    def tensor(self, name: str) -> np.ndarray:
        """For the reference: floats."""
        value = self.weights[name]
        return value.value() if isinstance(value, Linear) else value.astype(np.float64)


def make_model(
    spec: ModelSpec, algo: str | None = None, group: int = 16, kv: bool = False, seed: int = 0
) -> Model:
    """Seeded random weights, quantised."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {}
    for name, shape in spec.tensors().items():
        value = rng.standard_normal(shape)
        if len(shape) == 1:
            weights[name] = (1 + value / 8).astype(np.float16)
        elif ".layers." not in name:
            weights[name] = (value / 4).astype(np.float16)
        else:
            weights[name] = Linear((value / np.sqrt(shape[1])).astype(np.float16))
    for name, weight in weights.items():
        if not isinstance(weight, Linear) or algo is None:
            continue
        rows, columns = weight.codes.shape
        if algo == "FP8":
            # One scale for the three that are stored as one.
            scale = np.array([0.01 + (0 if "self_attn" in name else 0.01)], np.float32)
            codes = (weight.codes.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
            weights[name] = Linear(codes, scale)
        else:
            codes = rng.integers(-8, 8, (rows, columns)).astype(np.int8)
            scale = (rng.random((rows, columns // group)) / 16).astype(np.float16)
            weights[name] = Linear(codes, scale, (1 + rng.random(columns)).astype(np.float16))
    if algo == "W4A16_AWQ":
        for i in range(spec.num_layers):
            q, k, v = (weights[f"model.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkv")
            k.prequant = v.prequant = q.prequant
    scales = tuple(1.5 + i for i in range(spec.num_layers)) if kv else ()
    return Model(spec, weights, algo, group, kv_scales=scales)


# Ranks ------------------------------------------------------------------------------------------
def stage_layers(num_layers: int, pp: int) -> list[list[int]]:
    return [part.tolist() for part in np.array_split(np.arange(num_layers), pp)]


def kv_of_rank(spec: ModelSpec, tp: int, rank: int) -> list[int]:
    if tp > spec.num_kv_heads:
        return [rank // (tp // spec.num_kv_heads)]
    return np.array_split(np.arange(spec.num_kv_heads), tp)[rank].tolist()


def head_rows(value: np.ndarray, heads: list[int], dim: int) -> np.ndarray:
    return np.concatenate([value[h * dim : (h + 1) * dim] for h in heads])


def _store(out: Stored, module: str, linear: Linear, model: Model) -> None:
    if linear.scale is None:
        out[f"{module}.weight"] = "F16", linear.codes
        return
    if model.algo == "FP8":
        out[f"{module}.weight"] = "F8_E4M3", linear.codes
        out[f"{module}.weights_scaling_factor"] = "F32", linear.scale
        scale = np.array([model.activations], np.float32)
        out[f"{module}.activation_scaling_factor"] = "F32", scale
        return
    nibbles = linear.codes.astype(np.uint8) & 15
    out[f"{module}.weight"] = "I8", (nibbles[0::2] | nibbles[1::2] << 4).view(np.int8)
    out[f"{module}.weights_scaling_factor"] = "F16", linear.scale
    assert linear.prequant is not None
    out[f"{module}.prequant_scaling_factor"] = "F16", linear.prequant


def _rows_of(linear: Linear, pick: Any) -> Linear:
    scale = linear.scale
    if scale is not None and scale.ndim == 2:
        scale = pick(scale)
    return Linear(pick(linear.codes), scale, linear.prequant)


def _columns_of(linear: Linear, first: int, end: int) -> Linear:
    scale, prequant = linear.scale, linear.prequant
    if scale is not None and scale.ndim == 2:
        group = linear.codes.shape[1] // scale.shape[1]
        assert first % group == end % group == 0
        scale = scale[:, first // group : end // group]
    if prequant is not None:
        prequant = prequant[first:end]
    return Linear(linear.codes[:, first:end], scale, prequant)


def _joined(parts: list[Linear]) -> Linear:
    scale = parts[0].scale
    if scale is not None and scale.ndim == 2:
        scale = np.concatenate([p.scale for p in parts])
    return Linear(np.concatenate([p.codes for p in parts]), scale, parts[0].prequant)


def rank_tensors(model: Model, tp: int, rank: int, layers: list[int]) -> Stored:
    """Tensors of a tensor-parallel rank in the stage of these layers."""
    spec, w = model.spec, model.weights
    dim, out = spec.head_dim, Stored()
    if layers[0] == 0:
        out["transformer.vocab_embedding.weight"] = "F16", w["model.embed_tokens.weight"]
    kv = kv_of_rank(spec, tp, rank)
    queries = np.array_split(np.arange(spec.num_heads), tp)[rank].tolist()
    for local, layer in enumerate(layers):
        hf, to = f"model.layers.{layer}.", f"transformer.layers.{local}."
        out[to + "input_layernorm.weight"] = "F16", w[hf + "input_layernorm.weight"]
        out[to + "post_layernorm.weight"] = "F16", w[hf + "post_attention_layernorm.weight"]
        held = {"q": queries, "k": kv, "v": kv}
        parts = [
            _rows_of(w[f"{hf}self_attn.{p}_proj.weight"], lambda x, h=heads: head_rows(x, h, dim))
            for p, heads in held.items()
        ]
        _store(out, to + "attention.qkv", _joined(parts), model)
        if spec.qkv_bias:
            biases = [head_rows(w[f"{hf}self_attn.{p}_proj.bias"], h, dim) for p, h in held.items()]
            out[to + "attention.qkv.bias"] = "F16", np.concatenate(biases)
        columns = queries[0] * dim, (queries[-1] + 1) * dim
        dense = _columns_of(w[hf + "self_attn.o_proj.weight"], *columns)
        _store(out, to + "attention.dense", dense, model)
        if spec.o_bias:
            out[to + "attention.dense.bias"] = "F16", w[hf + "self_attn.o_proj.bias"]
        if spec.qk_norm:
            for x in "qk":
                norm = w[f"{hf}self_attn.{x}_norm.weight"]
                out[f"{to}attention.{x}_layernorm.weight"] = "F16", norm
        size = spec.intermediate_size // tp
        first, end = rank * size, (rank + 1) * size
        for name, theirs in (("gate", "fc"), ("up", "gate")):
            rows = _rows_of(w[f"{hf}mlp.{name}_proj.weight"], lambda x, a=first, b=end: x[a:b])
            _store(out, f"{to}mlp.{theirs}", rows, model)
        down = _columns_of(w[hf + "mlp.down_proj.weight"], first, end)
        _store(out, to + "mlp.proj", down, model)
        if model.kv_scales:
            scale = np.array([model.kv_scales[layer]], np.float32)
            out[to + "attention.kv_cache_scaling_factor"] = "F32", scale
    if layers[-1] == spec.num_layers - 1:
        out["transformer.ln_f.weight"] = "F16", w["model.norm.weight"]
        head = w["model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"]
        size = -(-spec.vocab_size // tp)
        padded = np.zeros((size * tp, spec.hidden_size), np.float16)
        padded[: spec.vocab_size] = head
        out["lm_head.weight"] = "F16", padded[rank * size : (rank + 1) * size]
    return out


def config_of(model: Model, tp: int = 1, pp: int = 1) -> dict[str, Any]:
    """As Model Optimizer writes it, with what our models need."""
    spec = model.spec
    config: dict[str, Any] = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "architecture": CLASSES[spec.architecture],
        "dtype": "float16",
        "logits_dtype": "float16",
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "hidden_size": spec.hidden_size,
        "head_size": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "norm_epsilon": spec.rms_norm_eps,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_positions,
        "hidden_act": "silu",
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "position_embedding_type": "alibi" if spec.position == "alibi" else "rope_gpt_neox",
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {
            "quant_algo": model.algo,
            "kv_cache_quant_algo": "FP8" if model.kv_scales else None,
            "exclude_modules": ["lm_head"],
        },
    }
    if model.algo == "W4A16_AWQ":
        config["quantization"] |= {
            "group_size": model.group,
            "has_zero_point": False,
            "pre_quant_scale": True,
        }
    if spec.architecture == "baichuan":
        config["model_version"] = "v1_13b" if spec.position == "alibi" else "v1_7b"
    else:
        config |= {"rotary_base": spec.rope.theta, "attn_bias": spec.qkv_bias}
    if spec.architecture.startswith("qwen"):
        config["qwen_type"] = spec.architecture
    return config


def write_folder(folder: Path, model: Model, tp: int = 1, pp: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model, tp, pp)))
    for stage, layers in enumerate(stage_layers(model.spec.num_layers, pp)):
        for rank in range(tp):
            path = folder / f"rank{stage * tp + rank}.safetensors"
            write_safetensors(path, rank_tensors(model, tp, rank, layers))
    return folder


# Reading ----------------------------------------------------------------------------------------
def _load(tensors: Stored, module: str) -> Linear:
    kind, weight = tensors[f"{module}.weight"]
    if f"{module}.weights_scaling_factor" not in tensors:
        assert kind == "F16"
        return Linear(weight)
    scale = tensors[f"{module}.weights_scaling_factor"][1]
    if f"{module}.activation_scaling_factor" in tensors:
        return Linear(weight.view(ml_dtypes.float8_e4m3fn), scale)
    assert kind == "I8"
    nibbles = np.empty((2 * len(weight), weight.shape[1]), np.int8)
    nibbles[0::2] = weight << 4 >> 4  # arithmetic shifts keep the sign
    nibbles[1::2] = weight >> 4
    return Linear(nibbles, scale, tensors[f"{module}.prequant_scaling_factor"][1])


def read_model(folder: Path, spec: ModelSpec) -> Mapping[str, np.ndarray]:
    """Float64 weights under Hugging Face names, the heads in the order of the ranks."""
    config = json.loads((folder / "config.json").read_text())
    tp, pp = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
    assert len(list(folder.glob("rank*"))) == tp * pp == config["mapping"]["world_size"]
    out: dict[str, np.ndarray] = {}
    dim, copies = spec.head_dim, max(1, tp // spec.num_kv_heads)
    for stage, layers in enumerate(stage_layers(spec.num_layers, pp)):
        ranks = [read_safetensors(folder / f"rank{stage * tp + r}.safetensors") for r in range(tp)]
        for local, layer in enumerate(layers):
            hf, at = f"model.layers.{layer}.", f"transformer.layers.{local}."
            out[hf + "input_layernorm.weight"] = ranks[-1][at + "input_layernorm.weight"][1]
            out[hf + "post_attention_layernorm.weight"] = ranks[-1][at + "post_layernorm.weight"][1]
            queries, kv = spec.num_heads // tp, max(1, spec.num_kv_heads // tp)
            ends = [queries * dim, (queries + kv) * dim]
            fused = [np.split(_load(r, at + "attention.qkv").value(), ends) for r in ranks]
            for i, p in enumerate("qkv"):
                parts = [f[i] for f in fused][:: copies if p != "q" else 1]
                out[f"{hf}self_attn.{p}_proj.weight"] = np.concatenate(parts)
            if spec.qkv_bias:
                biases = [np.split(r[at + "attention.qkv.bias"][1], ends) for r in ranks]
                for i, p in enumerate("qkv"):
                    parts = [b[i] for b in biases][:: copies if p != "q" else 1]
                    out[f"{hf}self_attn.{p}_proj.bias"] = np.concatenate(parts)
            for name, theirs in (("self_attn.o", "attention.dense"), ("mlp.down", "mlp.proj")):
                parts = [_load(r, at + theirs).value() for r in ranks]
                out[f"{hf}{name}_proj.weight"] = np.concatenate(parts, axis=1)
            for name, theirs in (("gate", "mlp.fc"), ("up", "mlp.gate")):
                parts = [_load(r, at + theirs).value() for r in ranks]
                out[f"{hf}mlp.{name}_proj.weight"] = np.concatenate(parts)
            if spec.o_bias:
                out[hf + "self_attn.o_proj.bias"] = ranks[-1][at + "attention.dense.bias"][1]
            if spec.qk_norm:
                for x in "qk":
                    norm = ranks[-1][f"{at}attention.{x}_layernorm.weight"][1]
                    out[f"{hf}self_attn.{x}_norm.weight"] = norm
        if stage == 0:
            out["model.embed_tokens.weight"] = ranks[-1]["transformer.vocab_embedding.weight"][1]
        if stage == pp - 1:
            out["model.norm.weight"] = ranks[-1]["transformer.ln_f.weight"][1]
            head = np.concatenate([r["lm_head.weight"][1] for r in ranks])
            assert not head[spec.vocab_size :].any()
            out["lm_head.weight"] = head[: spec.vocab_size]
    return {name: value.astype(np.float64) for name, value in out.items()}
