"""What TensorRT-LLM's runtime reads in config.json of an engine, checked before a server meets it.

The fields, their types and how they must agree are those of the C++ runtime of TensorRT-LLM 1.0 - 1.2,
narrowed to what our engines are: paged caches, packed input, no LoRA, no speculation, one beam.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError
from trt_razor.kernels.layer import DTYPES
from trt_razor.trtllm.engine_config import (
    HYBRID_ARCHITECTURE,
    SECTION,
    RazorPlan,
    RazorSection,
)

_LAYER_KINDS = ("attention", "recurrent", "linear", "no_op")
STATE_SIZES = ("state_size", "conv_kernel", "rnn_hidden_size", "rnn_conv_dim_size")
"""Fields that the runtime asks of a hybrid model."""

_INT32 = (1 << 31) - 1
_MAX_LAYERS = 4096  # cache layers; far above any real model

Kind = tuple[str, Callable[[Any], bool]]
_TEXT: Kind = ("a string", lambda v: isinstance(v, str))
_COUNT: Kind = ("an integer in 1..2147483647", lambda v: type(v) is int and 1 <= v <= _INT32)
_LAYERS: Kind = ("a number of layers", lambda v: type(v) is int and 1 <= v <= _MAX_LAYERS)
_FLAG: Kind = ("true or false", lambda v: isinstance(v, bool))
_OBJECT: Kind = ("an object", lambda v: isinstance(v, dict))
_ON: Kind = ("true", lambda v: v is True)
_NULL: Kind = ("null", lambda v: v is None)
_SET: Kind = ("a plugin, not null", lambda v: v is not None)

# Absent, the runtime throws; or takes another meaning than ours.
_REQUIRED: Mapping[str, Kind] = {
    # Without a version, or with this one, the runtime looks for fields of another layout.
    "version": ("a version", lambda v: isinstance(v, str) and v != "none"),
    "pretrained_config.architecture": _TEXT,
    "pretrained_config.dtype": (
        " or ".join(DTYPES),
        lambda v: isinstance(v, str) and v in DTYPES,
    ),
    "pretrained_config.mapping.tp_size": _COUNT,
    "pretrained_config.num_hidden_layers": _LAYERS,
    "pretrained_config.num_attention_heads": _COUNT,
    "pretrained_config.vocab_size": _COUNT,
    "pretrained_config.hidden_size": _COUNT,
    "pretrained_config.quantization": _OBJECT,
    "build_config.max_batch_size": _COUNT,
    "build_config.max_beam_width": ("1", lambda v: type(v) is int and v == 1),
    "build_config.max_input_len": _COUNT,
    "build_config.max_seq_len": _COUNT,
    "build_config.max_num_tokens": _COUNT,
    "build_config.kv_cache_type": (
        "'PAGED'",
        lambda v: isinstance(v, str) and v.upper() == "PAGED",
    ),
    "build_config.lora_config": _OBJECT,
    "build_config.plugin_config.gpt_attention_plugin": _SET,
    "build_config.plugin_config.lora_plugin": _NULL,
    "build_config.plugin_config.remove_input_padding": _ON,
    "build_config.plugin_config.context_fmha": _ON,
    "build_config.plugin_config.use_paged_context_fmha": _FLAG,
    "build_config.plugin_config.paged_kv_cache": _ON,
    "build_config.plugin_config.tokens_per_block": _COUNT,
}
# Absent or null, the runtime has a default that suits us.
_OPTIONAL: Mapping[str, Kind] = {
    "pretrained_config.mapping.pp_size": _COUNT,
    "pretrained_config.mapping.cp_size": ("1", lambda v: type(v) is int and v == 1),
    "pretrained_config.mapping.gpus_per_node": _COUNT,
    "pretrained_config.num_key_value_heads": _COUNT,
    "pretrained_config.head_size": _COUNT,
    "pretrained_config.logits_dtype": (
        "'float32' or 'float16'",
        lambda v: v in ("float32", "float16"),
    ),
    "pretrained_config.quantization.quant_algo": _TEXT,
    "pretrained_config.quantization.kv_cache_quant_algo": _TEXT,
    "pretrained_config.num_kv_heads_per_layer": (
        "a list of counts",
        lambda v: isinstance(v, list) and all(type(n) is int and n >= 0 for n in v),
    ),
    "pretrained_config.layer_types": (
        f"a list of {', '.join(_LAYER_KINDS)}",
        lambda v: isinstance(v, list) and all(n in _LAYER_KINDS for n in v),
    ),
    "pretrained_config.runtime_defaults": _OBJECT,
    "build_config.gather_context_logits": _FLAG,
    "build_config.gather_generation_logits": _FLAG,
    "build_config.max_draft_len": ("0", lambda v: type(v) is int and v == 0),
    "build_config.max_prompt_embedding_table_size": ("0", lambda v: type(v) is int and v == 0),
    # 1 is the number of "none".
    "build_config.speculative_decoding_mode": ("1", lambda v: type(v) is int and v == 1),
    "build_config.lora_config.lora_target_modules": ("no modules", lambda v: v == []),
    "build_config.plugin_config.paged_state": _FLAG,
    # Of --fast_build: weights apart from the network, which our layers have never been tried with.
    "build_config.plugin_config.manage_weights": ("false", lambda v: v is False),
}
_ABSENT = object()


def check_engine_json(
    config: Mapping[str, Any], plan: RazorPlan | None, where: str = "config.json"
) -> None:
    """Refuse a config.json that the runtime would not load, or would take for something else.

    Args:
        plan: what a Razor engine must say; None = a dense engine.

    Raises:
        RazorError: the field, what was expected, what was found.
    """
    for path in (*_REQUIRED, *_OPTIONAL):
        check_field(config, path, where)
    pretrained, build = config["pretrained_config"], config["build_config"]
    _check_heads(pretrained, where)
    if "GLM" in pretrained["architecture"]:  # the runtime then asks for a version of ChatGLM
        raise _wrong(
            where, "pretrained_config.architecture", "no 'GLM'", pretrained["architecture"]
        )
    hybrid = pretrained["architecture"] == HYBRID_ARCHITECTURE
    recurrent = _kinds(pretrained).count("recurrent")
    if hybrid:
        _check_hybrid(config, where)
    if bool(recurrent) != hybrid:
        expected = (
            "a 'recurrent' layer"
            if hybrid
            else f"no 'recurrent' layer without {HYBRID_ARCHITECTURE}"
        )
        raise _wrong(where, "pretrained_config.layer_types", expected, f"{recurrent} of them")
    if build["max_input_len"] > build["max_seq_len"]:
        expected = f"at most max_seq_len = {build['max_seq_len']}"
        raise _wrong(where, "build_config.max_input_len", expected, build["max_input_len"])
    if plan is not None:
        _check_plan(config, plan, where)
    elif hybrid or pretrained.get(SECTION) is not None:
        raise _wrong(where, f"pretrained_config.{SECTION}", "a dense engine", "a Razor engine")


def check_field(config: Mapping[str, Any], path: str, where: str = "config.json") -> None:
    """Raises RazorError if a field that the runtime reads is missing or of a wrong kind.

    Args:
        path: dotted, from the top: ``build_config.max_seq_len``.
    """
    kind = _REQUIRED.get(path)
    if kind is None:
        kind = _OPTIONAL[path]
        if _get(config, path) in (None, _ABSENT):
            return
    _typed(config, path, kind, where)


def require_object(config: Mapping[str, Any], path: str, where: str) -> None:
    """Raises RazorError if there is no JSON object at ``path``."""
    _typed(config, path, _OBJECT, where)


def check_rank_files(directory: Path, world_size: int) -> int:
    """The engines of all ranks are there, and no others. Returns their bytes.

    Raises:
        RazorError: naming the first file that is missing, empty or too many.
    """
    total = 0
    for rank in range(world_size):
        path = directory / f"rank{rank}.engine"
        size = path.stat().st_size if path.is_file() else 0
        if size == 0:
            raise RazorError(f"{path}: expected the engine of rank {rank}, found nothing")
        total += size
    extra = sorted(p.name for p in directory.glob("rank*.engine"))
    if len(extra) != world_size:
        raise RazorError(
            f"{directory}: expected the engines of {world_size} ranks, found {', '.join(extra)}"
        )
    return total


def _check_heads(pretrained: Mapping[str, Any], where: str) -> None:
    """Counts that the runtime divides by the ranks, and lists that it counts."""
    tp, heads = pretrained["mapping"]["tp_size"], pretrained["num_attention_heads"]
    if heads % tp:
        raise _wrong(
            where, "pretrained_config.num_attention_heads", f"a multiple of tp_size = {tp}", heads
        )
    counts = pretrained.get("num_kv_heads_per_layer") or []
    attention = _kinds(pretrained).count("attention")
    if counts and len(counts) != attention:
        raise _wrong(
            where,
            "pretrained_config.num_kv_heads_per_layer",
            f"one count for each of {attention} attention layers",
            len(counts),
        )
    for i, count in enumerate(counts):
        if count % tp or count == 0:
            field = f"pretrained_config.num_kv_heads_per_layer[{i}]"
            raise _wrong(where, field, f"a positive multiple of tp_size = {tp}", count)


def _check_hybrid(config: Mapping[str, Any], where: str) -> None:
    """What the manager of state slots asks for; its plugin and paged states are in the plan."""
    for name in STATE_SIZES:
        _typed(config, f"pretrained_config.{name}", _COUNT, where)
    if config["pretrained_config"]["conv_kernel"] < 2:
        raise _wrong(where, "pretrained_config.conv_kernel", ">= 2: one row less is kept", 1)
    head = _get(config, "pretrained_config.rnn_head_size")
    if head not in (None, _ABSENT, 0):
        raise _wrong(where, "pretrained_config.rnn_head_size", "none", head)
    plugins = "build_config.plugin_config"
    off = ("false: a reused prefix would lack its state", lambda v: v is False)
    _typed(config, f"{plugins}.use_paged_context_fmha", off, where)
    pp = config["pretrained_config"]["mapping"].get("pp_size") or 1
    if pp != 1:
        raise _wrong(where, "pretrained_config.mapping.pp_size", "1 with state slots", pp)


def _check_plan(config: Mapping[str, Any], plan: RazorPlan, where: str) -> None:
    pretrained, build = config["pretrained_config"], config["build_config"]
    for name, expected, found in (
        ("mapping.tp_size", plan.tp_size, pretrained["mapping"]["tp_size"]),
        ("mapping.pp_size", plan.pp_size, pretrained["mapping"].get("pp_size") or 1),
        ("dtype", plan.dtype, pretrained["dtype"]),
        ("head_size", plan.head_dim, pretrained.get("head_size")),
        (
            "quantization.kv_cache_quant_algo",
            "FP8" if plan.fp8 else None,
            kv_algorithm(pretrained),
        ),
    ):
        if found != expected:
            raise _wrong(where, f"pretrained_config.{name}", expected, found)
    section = RazorSection.from_json(pretrained.get(SECTION), f"{where}: pretrained_config")
    counts = tuple(layer.num_retrieval for layer in plan.layers)
    for name, mine, theirs in (
        ("num_retrieval", counts, section.num_retrieval),
        ("policy", plan.policy.to_json(), section.policy.to_json()),
        ("tp_size", plan.tp_size, section.tp_size),
    ):
        if mine != theirs:
            raise _wrong(where, f"pretrained_config.{SECTION}.{name}", mine, theirs)
    if build["max_seq_len"] != plan.max_seq_len:
        raise _wrong(where, "build_config.max_seq_len", plan.max_seq_len, build["max_seq_len"])
    block = build["plugin_config"]["tokens_per_block"]
    if block != plan.tokens_per_block:
        field = "build_config.plugin_config.tokens_per_block"
        raise _wrong(where, field, plan.tokens_per_block, block)
    difference = first_difference(plan, config)
    if difference is not None:
        raise _wrong(where, *difference)


def first_difference(plan: RazorPlan, config: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field that ``finish`` would change: its name, the plan's value, the one found."""
    for prefix, found, expected in (
        (
            "pretrained_config",
            config["pretrained_config"],
            plan.pretrained_config(config["pretrained_config"]),
        ),
        (
            "build_config.plugin_config",
            config["build_config"]["plugin_config"],
            plan.plugin_config(config["build_config"]["plugin_config"]),
        ),
    ):
        for name, value in expected.items():
            if name not in found or found[name] != value:
                return f"{prefix}.{name}", value, found.get(name, "nothing")
    return None


def _kinds(pretrained: Mapping[str, Any]) -> list[str]:
    """Kind of every layer: ``layer_types`` is a group that the runtime repeats."""
    group = pretrained.get("layer_types") or ["attention"]
    return [group[i % len(group)] for i in range(pretrained["num_hidden_layers"])]


def kv_algorithm(pretrained: Mapping[str, Any]) -> str | None:
    """How caches are quantised: ``FP8`` …, or None."""
    found: str | None = pretrained["quantization"].get("kv_cache_quant_algo")
    return None if found == "NO_QUANT" else found


def _get(config: Mapping[str, Any], path: str) -> Any:
    """The value at ``a.b.c``, or _ABSENT."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _typed(config: Mapping[str, Any], path: str, kind: Kind, where: str) -> None:
    value = _get(config, path)
    if value is _ABSENT or not kind[1](value):
        raise _wrong(where, path, kind[0], "nothing" if value is _ABSENT else value)


def _wrong(where: str, field: str, expected: Any, found: Any) -> RazorError:
    shown = found if isinstance(found, str) else json.dumps(found, default=str)
    wanted = expected if isinstance(expected, str) else json.dumps(expected, default=str)
    return RazorError(
        f"{where}: {field}: expected {wanted:.200}, found {shown:.200}; build the engine again"
    )
