"""The tensors of a ``tensorrt_llm`` request as prompts and sampling parameters.

Names, shapes and meaning are those of the stock TensorRT-LLM backend (``interface.py``), so that
its clients work here. NumPy only: nothing in this module needs a server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.sampling import SamplingParams
from trt_razor.serving.words import stop_rules, words_of

Tensors = Mapping[str, np.ndarray]

# Tensors that change nothing for this engine, whatever they hold: for decoders with an encoder,
# for beam search and top-p decay (both refused below), or hints that other tensors switch on.
_WITHOUT_EFFECT = frozenset({
    "decoder_input_ids", "decoder_input_lengths", "pad_id", "len_penalty", "early_stopping",
    "beam_search_diversity_rate", "runtime_top_p_min", "runtime_top_p_reset_ids",
    "prompt_vocab_size", "draft_acceptance_threshold",
})  # fmt: skip
# Asked for by any value that is there: 0 is a valid id.
_REFUSED_IF_PRESENT = frozenset({"lora_task_id"})
# The only value (or none, or 0) that means: do not.
_NEUTRAL = {"beam_width": 1, "num_return_sequences": 1, "runtime_top_p_decay": 1}
_UNDERSTOOD = frozenset({
    "input_ids", "input_lengths", "request_output_len", "end_id", "stop_words_list",
    "bad_words_list", "embedding_bias", "temperature", "runtime_top_k", "runtime_top_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "seed",
    "return_log_probs", "return_perf_metrics", "return_num_input_tokens",
    "return_num_output_tokens", "exclude_input_in_output", "stop", "streaming",
})  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one engine can take.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1.
        max_input_tokens: longest prompt (at most the engine's max_seq_len).
        max_output_tokens: largest ``request_output_len``.
        end_ids: the engine's own end tokens.
    """

    vocab_size: int
    max_input_tokens: int
    max_output_tokens: int
    end_ids: frozenset[int]


@dataclass(frozen=True)
class GenerationRequest:
    """A request that can run.

    Attributes:
        prompts: ids of every row, trimmed to its length. params: of every row.
        streaming: a response per token. exclude_input: without the prompt in the one response of a
            request that does not stream.
        log_probs, perf_metrics, num_input_tokens, num_output_tokens: wanted outputs.
    """

    prompts: tuple[list[int], ...]
    params: tuple[SamplingParams, ...]
    streaming: bool
    exclude_input: bool
    log_probs: bool
    perf_metrics: bool
    num_input_tokens: bool
    num_output_tokens: bool


def wants_stop(tensors: Tensors) -> bool:
    """Whether a request only asks to stop the one with its id; its other tensors mean nothing."""
    return _flag(tensors, "stop")


def read_request(
    tensors: Tensors,
    limits: Limits,
    tokenizer: Tokenizer | None,
    exclude_input: bool = True,
) -> GenerationRequest:
    """Check the tensors that a request gave and say what to generate.

    Args:
        tensors: by name, those that are there: ``input_ids`` int32 [B, L]; numbers of a row [B]
            or [B, 1]; word lists int32 [B, 2, N].
        exclude_input: for a request that does not say it.

    Raises:
        UsageError: names the tensor, what was expected and what was found.
    """
    _refuse_what_is_not_supported(tensors)
    prompts = _prompts(tensors, limits)
    rows = len(prompts)
    params = []
    for i in range(rows):
        try:
            params.append(_params(tensors, i, rows, limits, tokenizer))
        except UsageError as e:
            raise e if rows == 1 else UsageError(f"row {i} of {rows}: {e}") from None
    return GenerationRequest(
        prompts=tuple(prompts),
        params=tuple(params),
        streaming=_flag(tensors, "streaming"),
        exclude_input=_flag(tensors, "exclude_input_in_output", exclude_input),
        log_probs=_flag(tensors, "return_log_probs"),
        perf_metrics=_flag(tensors, "return_perf_metrics"),
        num_input_tokens=_flag(tensors, "return_num_input_tokens"),
        num_output_tokens=_flag(tensors, "return_num_output_tokens"),
    )


def _refuse_what_is_not_supported(tensors: Tensors) -> None:
    for name, x in tensors.items():
        if name in _UNDERSTOOD or name in _WITHOUT_EFFECT or x.size == 0:
            continue
        if name in _NEUTRAL:
            if np.isin(x, (0, _NEUTRAL[name])).all():
                continue
        elif name not in _REFUSED_IF_PRESENT and not _says_something(x):
            continue
        raise UsageError(
            f"{name}: {_show(x)}: not supported by this engine; leave it out"
            + (f" or set it to {_NEUTRAL[name]}" if name in _NEUTRAL else "")
        )


def _says_something(x: np.ndarray) -> bool:
    """Whether any element is something else than zero, false or an empty text."""
    if x.dtype.kind in "OSU":
        return any(bool(v) for v in x.reshape(-1).tolist())
    return bool(np.any(x != 0))  # NaN is not 0


def _show(x: np.ndarray) -> str:
    if x.size > 1:
        return f"a tensor {list(x.shape)}"
    value = x.reshape(-1)[0]
    return repr(value.decode("utf-8", "replace") if isinstance(value, bytes) else value.item())[:60]


# Prompts --------------------------------------------------------------------------------------
def _prompts(tensors: Tensors, limits: Limits) -> list[list[int]]:
    ids = tensors.get("input_ids")
    if ids is None:
        raise UsageError("input_ids: expected token ids [batch, length], found none")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UsageError(
            f"input_ids: expected int32 [batch, length], found {ids.dtype} {list(ids.shape)}"
        )
    rows, length = ids.shape
    if rows == 0:
        raise UsageError("input_ids: expected at least 1 row, found none")
    prompts = []
    for i in range(rows):
        n = _int(tensors, "input_lengths", i, rows)
        n = length if n is None else n
        where = "" if rows == 1 else f"row {i} of {rows}: "
        if n == 0 or length == 0:
            raise UsageError(f"{where}input_ids: the prompt is empty; expected at least 1 token")
        if not 0 < n <= length:
            raise UsageError(
                f"{where}input_lengths: expected 1..{length}, the ids of input_ids, found {n}"
            )
        if n > limits.max_input_tokens:
            raise UsageError(
                f"{where}input_ids: the prompt has {n} tokens, this server takes at most "
                f"{limits.max_input_tokens}; shorten it"
            )
        row = ids[i, :n]
        if row.min() < 0 or row.max() >= limits.vocab_size:
            raise UsageError(
                f"{where}input_ids: expected ids 0..{limits.vocab_size - 1}, found "
                f"{row.min()}..{row.max()}"
            )
        prompts.append(row.tolist())
    return prompts


# Sampling -------------------------------------------------------------------------------------
def _params(
    tensors: Tensors, i: int, rows: int, limits: Limits, tokenizer: Tokenizer | None
) -> SamplingParams:
    count = _int(tensors, "request_output_len", i, rows)
    if count is None:
        raise UsageError(
            "request_output_len: expected the number of tokens to generate, found none"
        )
    if not 1 <= count <= limits.max_output_tokens:
        raise UsageError(
            f"request_output_len (max_tokens): expected 1..{limits.max_output_tokens}, found {count}"
        )
    temperature, top_k, top_p = _choice(tensors, i, rows)
    fields: dict[str, Any] = {}
    for name, low, high in (
        ("repetition_penalty", 0, 100),
        ("presence_penalty", -100, 100),
        ("frequency_penalty", -100, 100),
    ):
        x = _float(tensors, name, i, rows)
        if x is None:
            continue
        if not (low <= x <= high and (x > 0 or low < 0)):
            left = "(" if low == 0 else "["
            raise UsageError(f"{name}: expected a number in {left}{low}, {high}], found {x}")
        fields[name] = x
    low_count = _int(tensors, "min_tokens", i, rows) or 0
    if not 0 <= low_count <= count:
        raise UsageError(f"min_tokens: expected 0..{count} (request_output_len), found {low_count}")
    ends, ignore = _ends(tensors, i, rows, limits)
    stop = stop_rules(words_of(tensors, "stop_words_list", i, rows, limits.vocab_size), tokenizer)
    return SamplingParams(
        max_new_tokens=count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=_int(tensors, "seed", i, rows),
        stop=stop.texts,
        stop_token_ids=(*ends, *stop.ids),
        stop_sequences=stop.sequences,
        bad_words=words_of(tensors, "bad_words_list", i, rows, limits.vocab_size),
        min_tokens=low_count,
        logit_bias=_bias(tensors, i, rows, limits),
        ignore_eos=ignore,
        logprobs=_flag(tensors, "return_log_probs"),
        **fields,
    )


def _choice(tensors: Tensors, i: int, rows: int) -> tuple[float, int, float]:
    """(temperature, top_k, top_p) of SamplingParams.

    The stock backend is greedy without top-k and top-p, whatever the temperature is.
    """
    temperature = _float(tensors, "temperature", i, rows)
    temperature = 1.0 if temperature is None else temperature
    if not 0 <= temperature <= 1e4:  # NaN is not
        raise UsageError(f"temperature: expected a number in 0 .. 10000, found {temperature}")
    top_k = _int(tensors, "runtime_top_k", i, rows) or 0
    if top_k < 0:
        raise UsageError(f"runtime_top_k (top_k): expected an integer >= 0, found {top_k}")
    top_p = _float(tensors, "runtime_top_p", i, rows)
    top_p = 0.0 if top_p is None else top_p
    if math.isnan(top_p) or top_p > 1 or math.isinf(top_p):
        raise UsageError(f"runtime_top_p (top_p): expected a number up to 1, found {top_p}")
    if top_p <= 0:
        return (temperature, top_k, 1.0) if top_k > 1 else (0.0, 0, 1.0)
    return temperature, top_k, top_p


def _ends(tensors: Tensors, i: int, rows: int, limits: Limits) -> tuple[tuple[int, ...], bool]:
    """(end ids besides the engine's own, whether the engine's own do not count)."""
    end = _int(tensors, "end_id", i, rows)
    if end is None or end in limits.end_ids:
        return (), False
    if end == -1:
        return (), True
    if not 0 <= end < limits.vocab_size:
        raise UsageError(
            f"end_id: expected an id 0..{limits.vocab_size - 1}, or -1 for none, found {end}"
        )
    return (end,), True


def _bias(tensors: Tensors, i: int, rows: int, limits: Limits) -> tuple[tuple[int, float], ...]:
    """What ``embedding_bias`` [B, vocab] adds, the zeros left out."""
    x = tensors.get("embedding_bias")
    if x is None or x.size == 0:
        return ()
    if x.ndim != 2 or x.shape[0] != rows or x.shape[1] > limits.vocab_size:
        raise UsageError(
            f"embedding_bias: expected [{rows}, up to {limits.vocab_size}], found {list(x.shape)}"
        )
    row = x[i].astype(np.float64)
    if not np.isfinite(row).all():
        raise UsageError("embedding_bias: expected finite numbers, found NaN or infinity")
    return tuple((int(j), float(row[j])) for j in np.flatnonzero(row))


# Numbers --------------------------------------------------------------------------------------
def _element(tensors: Tensors, name: str, i: int, rows: int) -> Any:
    """The number of one row, or None if the tensor is not there (or empty)."""
    x = tensors.get(name)
    if x is None or x.size == 0:
        return None
    if x.size != rows:
        raise UsageError(
            f"{name}: expected 1 number for each of {rows} rows, found {list(x.shape)}"
        )
    return x.reshape(-1)[i]


def _int(tensors: Tensors, name: str, i: int, rows: int) -> int | None:
    x = _element(tensors, name, i, rows)
    if x is None:
        return None
    if not isinstance(x, np.integer):
        raise UsageError(f"{name}: expected an integer, found {x!r:.40}")
    return int(x)


def _float(tensors: Tensors, name: str, i: int, rows: int) -> float | None:
    """The shortest decimal that means this float32: 0.9 as the client wrote it, not 0.89999998, so
    that draws are those of the same number given anywhere else."""
    x = _element(tensors, name, i, rows)
    if x is None:
        return None
    if not isinstance(x, (np.floating, np.integer)):
        raise UsageError(f"{name}: expected a number, found {x!r:.40}")
    return float(str(x))


def _flag(tensors: Tensors, name: str, default: bool = False) -> bool:
    """The first element: a request has one value for all its rows."""
    x = tensors.get(name)
    return default if x is None or x.size == 0 else bool(x.reshape(-1)[0])


def prompt_text(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> str:
    """Text of a prompt's ids, without control tokens; empty without a tokenizer."""
    return tokenizer.decode(prompt) if tokenizer else ""
