"""Tensors of a ``tensorrt_llm`` request → one ``Asked`` for each row, as the stock backend reads them.

Errors have its texts where they are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = Mapping[str, "np.ndarray[Any, Any]"]


class BadRequest(Exception):
    """The text of an error response."""


@dataclass(frozen=True)
class Asked:
    """One row of a request. ``request_output_len`` is what fits the engine at most."""

    prompt: tuple[int, ...]
    max_tokens: int
    end_id: int | None
    min_tokens: int
    stop: tuple[tuple[int, ...], ...]
    bad: tuple[tuple[int, ...], ...]
    streaming: bool
    exclude_input: bool
    log_probs: bool
    perf_metrics: bool
    num_input_tokens: bool
    num_output_tokens: bool


# What this engine was not built for: any value but these is an error.
_NEUTRAL: dict[str, Sequence[Any]] = {
    "beam_width": (1,),
    "num_return_sequences": (1,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
}
_REFUSED = (
    *("prompt_embedding_table", "lora_task_id", "lora_weights", "lora_config"),
    *("draft_input_ids", "draft_logits", "encoder_input_features", "context_phase_params"),
    *("guided_decoding_guide_type", "guided_decoding_guide", "cross_attention_mask"),
    *("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size"),
)


def read_request(
    tensors: Tensors,
    decoupled: bool,
    exclude_input: bool,
    max_input_len: int,
    max_seq_len: int,
    vocab_size: int,
) -> list[Asked]:
    """Rows of a request.

    Args:
        tensors: name → array as it arrived, [B, …]; what has no value in a row [B].
        exclude_input: of the configuration.

    Raises:
        BadRequest: it is answered by one final error.
    """
    ids = tensors.get("input_ids")
    if ids is None:
        raise BadRequest("input_ids: required")
    if ids.ndim != 2:
        raise BadRequest("input_ids: expected 2 dimensions")
    rows = len(ids)
    if rows > 1 and not decoupled:
        raise BadRequest("several rows need a decoupled model")
    lengths = tensors.get("input_lengths")
    if rows > 1 and lengths is None:
        raise BadRequest("input_lengths: required")
    streaming = _flag(tensors, "streaming")
    if streaming and not decoupled:
        raise BadRequest("streaming needs a decoupled model")
    out = []
    for row in range(rows):
        prompt = ids[row]
        if rows > 1:
            assert lengths is not None
            prompt = prompt[: int(lengths.reshape(rows, -1)[row, 0])]
        out.append(
            _row(
                {name: value[row] for name, value in tensors.items() if len(value) == rows},
                tuple(int(t) for t in prompt),
                streaming,
                exclude_input,
                (max_input_len, max_seq_len, vocab_size),
                {
                    name: _flag(tensors, f"return_{name}")
                    for name in ("num_input_tokens", "num_output_tokens")
                },
            )
        )
    return out


def _flag(tensors: Tensors, name: str) -> bool:
    """Of the whole request: only its first element is read."""
    value = tensors.get(name)
    return value is not None and bool(np.ravel(value)[0])


def _row(
    tensors: Tensors,
    prompt: tuple[int, ...],
    streaming: bool,
    exclude_input: bool,
    limits: tuple[int, int, int],
    flags: Mapping[str, bool],
) -> Asked:
    max_input_len, max_seq_len, vocab_size = limits

    def scalar(name: str) -> Any:
        value = tensors.get(name)
        if value is None:
            return None
        if np.size(value) != 1:
            raise BadRequest(f"{name}: another size")
        return np.ravel(value)[0].item()

    wanted = scalar("request_output_len")
    if wanted is None:
        raise BadRequest("request_output_len: required")
    for name, values in _NEUTRAL.items():
        if scalar(name) not in (None, *values):
            raise BadRequest(f"{name}: not supported by this engine: {scalar(name)}")
    for name in _REFUSED:
        if np.size(tensors.get(name, ())):
            raise BadRequest(f"{name}: not supported by this engine")
    for name, most in (("temperature", math.inf), ("runtime_top_k", math.inf)):
        value = scalar(name)
        if value is not None and not 0 <= value <= most:
            raise BadRequest(f"{name}: expected >= 0, found {value}")
    top_p = scalar("runtime_top_p")
    if top_p is not None and not (top_p <= 1):
        raise BadRequest(f"runtime_top_p: expected <= 1, found {top_p}")
    if not 1 <= len(prompt) <= max_input_len:
        raise BadRequest(f"input_ids: expected 1 .. {max_input_len} ids, found {len(prompt)}")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise BadRequest("input_ids: an id out of range")
    if wanted < 1:
        raise BadRequest(f"request_output_len: expected > 0, found {wanted}")
    bias = tensors.get("embedding_bias")
    if bias is not None and np.size(bias) not in (0, vocab_size):
        raise BadRequest(f"embedding_bias: expected {vocab_size} numbers, found {np.size(bias)}")
    end_id, excluded = scalar("end_id"), scalar("exclude_input_in_output")
    return Asked(
        prompt=prompt,
        max_tokens=min(wanted, max_seq_len - len(prompt)),
        end_id=None if end_id == -1 else end_id,
        min_tokens=scalar("min_tokens") or 0,
        stop=sparse_list(tensors.get("stop_words_list")),
        bad=sparse_list(tensors.get("bad_words_list")),
        streaming=streaming,
        exclude_input=exclude_input if excluded is None else bool(excluded),
        log_probs=bool(scalar("return_log_probs")),
        perf_metrics=bool(scalar("return_perf_metrics")),
        num_input_tokens=flags["num_input_tokens"],
        num_output_tokens=flags["num_output_tokens"],
    )


def sparse_list(value: np.ndarray[Any, Any] | None) -> tuple[tuple[int, ...], ...]:
    """[2, N]: ids of all words, and the end offset of each, up to the first -1."""
    if value is None or value.size == 0:
        return ()
    flat = [int(x) for x in np.ravel(value)]
    shown = ", ".join(map(str, flat))
    if len(flat) % 2:
        raise BadRequest(f"word list: odd length: {shown}")
    half = len(flat) // 2
    ids, offsets = flat[:half], flat[half:]
    ends = offsets[: offsets.index(-1)] if -1 in offsets else offsets
    if any(x != -1 for x in offsets[len(ends) :]):
        raise BadRequest(f"word list: -1 in the middle: {shown}")
    words, start = [], 0
    for end in ends:
        if not 0 <= end <= half:
            raise BadRequest(f"word list: an end beyond the ids: {shown}")
        if end <= start:
            raise BadRequest(f"word list: ends that do not rise: {shown}")
        words.append(tuple(ids[start:end]))
        start = end
    return tuple(words)
