"""TensorRT-LLM checkpoints as a source, quantised or not, and which of them can be put in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import check_is
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import read_json
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.models.zoo import zoo_entry
from trt_razor.trtllm.model_config import spec_from_trtllm_config
from trt_razor.trtllm.options import CONFIG
from trt_razor.trtllm.rank_files import rank_path
from trt_razor.trtllm.rank_source import RankTensors
from trt_razor.trtllm.rank_tensors import (
    FLOATS,
    HEAD,
    TABLES,
    Format,
    Rule,
    layer_name,
    tensor_rules,
)
from trt_razor.trtllm.ranks import check_ranks

_MAX_RANKS = 1024
_MAX_GROUP = 4096
KV_SCALE = "attention.kv_cache_scaling_factor"
KV_PAIR = ("attention.k_cache_scaling_factor", "attention.v_cache_scaling_factor")
# TensorRT-LLM computes it where it is missing.
_KV_INVERSE = "attention.kv_cache_rcp_scaling_factor"
_HEAD_SCALES = ("lm_head.activation_scaling_factor", "lm_head.weights_scaling_factor")
_FORMATS = {
    None: Format.PLAIN,
    "NO_QUANT": Format.PLAIN,
    "FP8": Format.FP8,
    "W4A16_AWQ": Format.AWQ,
}
_AT_BUILD = ("W8A16", "W4A16")
"""TensorRT-LLM quantises float weights to these itself when it loads them."""

_AGAIN = "quantise the model to FP8 or W4A16_AWQ with NVIDIA's Model Optimizer"
_INTERLEAVED = (
    "its weights are stored interleaved for one GPU architecture, where heads cannot move"
)
_OWN_ATTENTION = (
    "TensorRT-LLM puts an attention layer of its own in place of any other, so Razor attention "
    "would be lost"
)
_UNKNOWN = "its scales are of a kind that is not supported here"
_REASONS = {
    **dict.fromkeys(("W8A16", "W4A16", "W8A16_GPTQ", "W4A16_GPTQ"), _INTERLEAVED),
    **dict.fromkeys(
        (
            "FP8_PER_CHANNEL_PER_TOKEN",
            "W8A8_SQ_PER_TENSOR_PLUGIN",
            "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
            "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
            "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
            "W4A8_QSERVE_PER_GROUP",
            "W4A8_QSERVE_PER_CHANNEL",
        ),
        _OWN_ATTENTION,
    ),
    "MIXED_PRECISION": "each of its layers may have another format",
}
"""Formats whose heads cannot be moved, and why; of all others, because of their scales."""


@dataclass(frozen=True)
class TrtLlmCheckpoint:
    """A TensorRT-LLM checkpoint, quantised or not, for any number of ranks.

    Attributes:
        spec: shape of the model; its ``torch_dtype`` is what engines compute in.
        location: the folder. config: its config.json.
        tp_size, pp_size: ranks that it is split for.
        quant_algo, kv_cache_quant_algo: TensorRT-LLM's names, or None.
        tensors: of all ranks. rules: what they are; empty for a format whose heads cannot move.
    """

    spec: ModelSpec
    location: str
    config: Mapping[str, Any]
    tp_size: int
    pp_size: int
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    tensors: RankTensors
    rules: Mapping[str, Rule]

    def identity(self) -> str:
        """sha256 hex that tells these weights from others; see ``stored.samples_digest``."""
        return self.tensors.digest()

    def nbytes(self) -> int:
        """Bytes of all rank files' tensors."""
        return self.tensors.nbytes()

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies in the folder, or None.

        Raises:
            UsageError: a kind that is not supported. RazorError: damaged files.
        """
        return Tokenizer.find(Path(self.location))

    def check_permutable(self) -> None:
        """Raises UsageError, with the way out, for a format in which heads cannot be moved."""
        algo, where = self.quant_algo, f"{self.location}: quantization"
        if not self.rules:
            raise UsageError(f"{where}.quant_algo: {algo!r:.40}: {_refusal(algo or '')}")
        if self.kv_cache_quant_algo not in (None, "FP8"):
            raise UsageError(
                f"{where}.kv_cache_quant_algo: expected 'FP8' or null, found "
                f"{self.kv_cache_quant_algo!r:.40}: our attention reads caches in FP8 or the model's dtype; "
                "quantise again with one of these"
            )


def is_trtllm_checkpoint(folder: Path) -> bool:
    """Whether a path is a TensorRT-LLM checkpoint, damaged or not; never raises."""
    try:
        if rank_path(folder, 0).is_file():
            return True
        config = read_json(folder / CONFIG, "config.json")
    except (OSError, ValueError, RazorError):
        return False
    # Hugging Face has a list of architectures, an engine has it a level below.
    return isinstance(config.get("architecture"), str) and "architectures" not in config


def open_trtllm_checkpoint(folder: Path, model: str | None) -> TrtLlmCheckpoint:
    """Open a checkpoint: names, shapes and dtypes of all ranks are checked, no weights are read.

    Args:
        model: zoo name that it must be; None = whatever it is.

    Raises:
        UsageError: another model than named, an unknown architecture, missing ranks, tensors that do
            not fit. RazorError: damaged files.
    """
    where = folder / CONFIG
    config = read_json(where, "a TensorRT-LLM checkpoint's config.json")
    entry = zoo_entry(model) if model is not None else None
    spec = spec_from_trtllm_config(
        config, entry.name if entry else folder.resolve().name, str(where)
    )
    tp_size, pp_size = _mapping(config, spec, where)
    quantization = config.get("quantization") or {}
    if not isinstance(quantization, Mapping):
        raise UsageError(f"{where}: quantization: expected an object, found {quantization!r:.40}")
    algo, kv_algo = (
        _algorithm(quantization, name, where) for name in ("quant_algo", "kv_cache_quant_algo")
    )
    tensors = RankTensors.open(folder, spec, tp_size, pp_size)
    if "tie_word_embeddings" not in config and tensors.tied():
        spec = replace(spec, tie_embeddings=True)  # Model Optimizer does not say so
        tensors = replace(tensors, spec=spec)
    if entry is not None:
        check_is(spec, entry, folder)
    rules: dict[str, Rule] = {}
    stored = _stored_format(algo, tensors)
    if stored is not None:
        rules = _rules(tensors, stored, quantization, kv_algo, where)
    return TrtLlmCheckpoint(
        spec, str(folder), config, tp_size, pp_size, algo, kv_algo, tensors, rules
    )


def _mapping(config: Mapping[str, Any], spec: ModelSpec, where: Path) -> tuple[int, int]:
    """Tensor-parallel ranks and pipeline stages."""
    mapping = config.get("mapping") or {}
    if not isinstance(mapping, Mapping):
        raise UsageError(f"{where}: mapping: expected an object, found {mapping!r:.40}")
    sizes = {}
    for name in ("tp_size", "pp_size", "cp_size"):
        size = mapping.get(name, 1)
        if type(size) is not int or not 1 <= size <= _MAX_RANKS:
            raise UsageError(
                f"{where}: mapping.{name}: expected 1..{_MAX_RANKS}, found {size!r:.40}"
            )
        sizes[name] = size
    tp_size, pp_size = sizes["tp_size"], sizes["pp_size"]
    if sizes["cp_size"] != 1:
        raise UsageError(
            f"{where}: mapping.cp_size: expected 1, found {sizes['cp_size']}; convert again without "
            "context parallelism"
        )
    world = mapping.get("world_size", tp_size * pp_size)
    if world != tp_size * pp_size:
        raise UsageError(
            f"{where}: mapping.world_size: expected tp_size * pp_size = {tp_size * pp_size}, found "
            f"{world!r:.40}"
        )
    if pp_size > spec.num_layers:
        raise UsageError(
            f"{where}: mapping.pp_size: expected at most the {spec.num_layers} layers, found {pp_size}"
        )
    check_ranks(spec, tp_size, razor=False)
    return tp_size, pp_size


def _algorithm(quantization: Mapping[str, Any], name: str, where: Path) -> str | None:
    value = quantization.get(name)
    if value is not None and not isinstance(value, str):
        raise UsageError(
            f"{where}: quantization.{name}: expected a name or null, found {value!r:.40}"
        )
    return value


def _stored_format(algo: str | None, tensors: RankTensors) -> Format | None:
    """How the file stores quantised weights; None where heads cannot be moved."""
    if algo in _AT_BUILD:
        weights = [n for n in tensors.parts if n.endswith(".weight")]
        return Format.PLAIN if all(tensors.dtype(n) in FLOATS for n in weights) else None
    return _FORMATS.get(algo)


def _refusal(algo: str) -> str:
    """Why heads cannot be moved in a format, and what to do."""
    way = _AGAIN
    if algo in _AT_BUILD:
        way = (
            "convert the unquantised model (--convert-only) and set quantization.quant_algo in its "
            f"config.json: TensorRT-LLM then quantises it while it builds; or {_AGAIN}"
        )
    return f"{_REASONS.get(algo, _UNKNOWN)}; {way}"


def _rules(
    tensors: RankTensors,
    stored: Format,
    quantization: Mapping[str, Any],
    kv_algo: str | None,
    where: Path,
) -> dict[str, Rule]:
    """The tensors that the files must have, checked against those they have."""
    spec = tensors.spec

    def format_of(name: str) -> Format:
        # Layers can be excluded from quantisation, as lm_head is.
        weight = f"{name}.weight"
        if weight not in tensors:
            return Format.PLAIN if weight == HEAD else stored
        return Format.PLAIN if tensors.dtype(weight) in FLOATS else stored

    group = quantization.get("group_size", 128)
    if stored is Format.AWQ and (type(group) is not int or not 2 <= group <= _MAX_GROUP):
        raise UsageError(
            f"{where}: quantization.group_size: expected 2..{_MAX_GROUP}, found {group!r:.40}"
        )
    if stored is Format.AWQ and quantization.get("has_zero_point"):
        raise UsageError(f"{where}: quantization.has_zero_point: expected false; {_AGAIN}")
    dtypes = {tensors.dtype(name) for name in tensors.parts if name.endswith(".weight")} - FLOATS
    if (stored is not Format.PLAIN) != bool(dtypes):
        raise UsageError(
            f"{where}: quantization.quant_algo: {quantization.get('quant_algo')!r:.40} does not fit the "
            f"rank files, whose weights are {', '.join(sorted(dtypes)) or 'not quantised'}"
        )
    prequant = quantization.get("pre_quant_scale") is not False
    rules = tensor_rules(spec, format_of, group, prequant)
    if spec.tie_embeddings:
        rules[HEAD] = replace(rules[HEAD], optional=True)
    harmless = {*TABLES}
    if rules[HEAD].dtypes == FLOATS:
        harmless.update(_HEAD_SCALES)
    for i in range(spec.num_layers):
        scale, *pair = (layer_name(i, name) for name in (KV_SCALE, *KV_PAIR))
        harmless.add(layer_name(i, _KV_INVERSE))
        if kv_algo != "FP8":
            harmless.update((scale, *pair))
        elif scale not in tensors and all(name in tensors for name in pair):
            rules.update(dict.fromkeys(pair, Rule((1,))))
        else:
            harmless.update(pair)
            rules[scale] = Rule((1,))
    tensors.check(rules, harmless)
    return rules
