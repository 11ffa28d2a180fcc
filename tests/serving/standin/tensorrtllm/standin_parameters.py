"""Parameters of a ``backend: "tensorrtllm"`` model, read as the stock backend reads them.

The stock backend is lenient: what it cannot parse counts as unset, ``4096abc`` is 4096. So the
stand-in keeps what it would have understood, and beside it refuses all that a generated repository
must never say: leftovers of templates, unknown keys, text after a number, values that are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any


class Refused(Exception):
    """The stock backend would not load it, or our repositories must not have it."""


_INT, _FLOAT, _BOOL, _STRING = "int", "float", "bool", "string"
_INTS, _GROUPS = "ints", "groups"

KINDS = {
    "max_beam_width": _INT,
    "FORCE_CPU_ONLY_INPUT_TENSORS": _STRING,
    "gpt_model_type": _STRING,
    "gpt_model_path": _STRING,
    "encoder_model_path": _STRING,
    "max_tokens_in_paged_kv_cache": _INT,
    "max_attention_window_size": _INTS,
    "sink_token_length": _INT,
    "batch_scheduler_policy": _STRING,
    "kv_cache_free_gpu_mem_fraction": _FLOAT,
    "cross_kv_cache_fraction": _FLOAT,
    "kv_cache_host_memory_bytes": _INT,
    "kv_cache_onboard_blocks": _BOOL,
    "exclude_input_in_output": _BOOL,
    "cancellation_check_period_ms": _INT,
    "stats_check_period_ms": _INT,
    "iter_stats_max_iterations": _INT,
    "request_stats_max_iterations": _INT,
    "enable_kv_cache_reuse": _BOOL,
    "normalize_log_probs": _BOOL,
    "enable_chunked_context": _BOOL,
    "gpu_device_ids": _GROUPS,
    "participant_ids": _GROUPS,
    "num_nodes": _INT,
    "lora_cache_optimal_adapter_size": _INT,
    "lora_cache_max_adapter_size": _INT,
    "lora_cache_gpu_memory_fraction": _FLOAT,
    "lora_cache_host_memory_bytes": _INT,
    "lora_prefetch_dir": _STRING,
    "decoding_mode": _STRING,
    "executor_worker_path": _STRING,
    "lookahead_window_size": _INT,
    "lookahead_ngram_size": _INT,
    "lookahead_verification_set_size": _INT,
    "medusa_choices": _STRING,
    "eagle_choices": _STRING,
    "gpu_weights_percent": _FLOAT,
    "enable_context_fmha_fp32_acc": _BOOL,
    "multi_block_mode": _BOOL,
    "cuda_graph_mode": _BOOL,
    "cuda_graph_cache_size": _INT,
    "speculative_decoding_fast_logits": _BOOL,
    "tokenizer_dir": _STRING,
    "guided_decoding_backend": _STRING,
    "xgrammar_tokenizer_info_path": _STRING,
}
KEY_MUST_EXIST = ("tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path")
"""The stock backend reads these with a getter that throws, whatever their values."""

DEFAULTS: dict[str, Any] = {
    "max_beam_width": 1,
    "batch_scheduler_policy": "guaranteed_no_evict",
    "kv_cache_free_gpu_mem_fraction": 0.9,
    "exclude_input_in_output": False,
    "cancellation_check_period_ms": 100,
    "enable_kv_cache_reuse": True,
    "enable_chunked_context": False,
    "normalize_log_probs": True,
}
_TRUE, _FALSE = ("True", "true", "TRUE", "1"), ("False", "false", "FALSE", "0")
_STOI = re.compile(r"\s*[+-]?\d+")
_STOF = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_POLICIES = ("max_utilization", "guaranteed_no_evict")
_MODES = (
    *("top_k", "top_p", "top_k_top_p", "beam_search"),
    *("medusa", "redrafter", "lookahead", "eagle"),
)


def understood(text: str, kind: str) -> Any:
    """What the stock backend makes of a value; None = as if it were not there."""
    if kind == _STRING:
        return text
    if kind == _BOOL:
        return True if text in _TRUE else False if text in _FALSE else None
    if kind == _INT:
        found = _STOI.match(text)
        return int(found[0]) if found else None
    if kind == _FLOAT:
        found = _STOF.match(text)
        return float(found[0]) if found else None
    if kind == _INTS:
        numbers = [understood(part, _INT) for part in text.split(",")]
        return None if None in numbers else numbers
    groups = [understood(part, _INTS) for part in text.split(";")]
    return None if None in groups else groups


def read(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the model configuration has them → what was understood, defaults filled in.

    An empty value is an unset one, as for the stock backend (for which it cannot be parsed).

    Raises:
        Refused: the stock backend would refuse it, or ignore or cut a value that was given.
    """
    said: dict[str, Any] = {}
    for key, holder in parameters.items():
        text = holder.get("string_value") if isinstance(holder, Mapping) else None
        if not isinstance(text, str):
            raise Refused(f"{key}: expected a string_value, found {holder!r}")
        if key not in KINDS:
            raise Refused(f"{key}: no parameter of this backend")
        if "${" in text:
            raise Refused(f"{key}: a placeholder was left: {text!r}")
        value = understood(text, KINDS[key])
        if text and value is None:
            raise Refused(f"{key}: {text!r} is ignored by the stock backend")
        if text and KINDS[key] in (_INT, _FLOAT, _INTS, _GROUPS):
            _plain(key, text)
        if text:
            said[key] = value
    for key in KEY_MUST_EXIST:
        if key not in parameters:
            raise Refused(f"{key}: the key must exist")
    _check(said)
    return {**DEFAULTS, **said}


def _plain(key: str, text: str) -> None:
    """A number that is read whole."""
    number = r"\d+(\.\d+)?([eE][+-]?\d+)?" if KINDS[key] == _FLOAT else r"\d+"
    if not re.fullmatch(rf"{number}([,;]{number})*", text):
        raise Refused(f"{key}: {text!r} is not plain numbers")


def _check(said: Mapping[str, Any]) -> None:
    kind = said.get("gpt_model_type")
    if kind not in ("V1", "v1", "inflight_batching", "inflight_fused_batching"):
        raise Refused(
            "Invalid gpt_model_type. Must be v1/inflight_batching/inflight_fused_batching."
        )
    path = said.get("gpt_model_path", "")
    if not os.path.exists(path):
        raise Refused(f"gpt_model_path: expected the engine, found {path!r}")
    if "encoder_model_path" in said:
        raise Refused("encoder_model_path: expected none for a decoder")
    for key, known in (("batch_scheduler_policy", _POLICIES), ("decoding_mode", _MODES)):
        if key in said and said[key] not in known:
            raise Refused(f"{key}: {said[key]!r} is replaced by the default in the stock backend")
    if said.get("guided_decoding_backend", "xgrammar") != "xgrammar":
        raise Refused("guided_decoding_backend: expected xgrammar")
    for key in ("kv_cache_free_gpu_mem_fraction", "gpu_weights_percent"):
        if not 0 < said.get(key, 1) <= 1:
            raise Refused(f"{key}: expected 0 .. 1, found {said[key]}")
    if said.get("lora_prefetch_dir") and not os.path.isdir(said["lora_prefetch_dir"]):
        raise Refused(f"lora_prefetch_dir: no folder {said['lora_prefetch_dir']!r}")
