"""Requests of ``tensorrt_llm_bls`` to the models behind it: which of its inputs go where."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.serving.models import tensors
from trt_razor.serving.models.answers import Prompt

# input of this model → input of preprocessing
TO_PREPROCESSING = {
    "text_input": "QUERY",
    "decoder_text_input": "DECODER_QUERY",
    "max_tokens": "REQUEST_OUTPUT_LEN",
    "bad_words": "BAD_WORDS_DICT",
    "stop_words": "STOP_WORDS_DICT",
    "embedding_bias_words": "EMBEDDING_BIAS_WORDS",
    "embedding_bias_weights": "EMBEDDING_BIAS_WEIGHTS",
    "end_id": "END_ID",
    "pad_id": "PAD_ID",
    "prompt_table_extra_id": "PROMPT_TABLE_EXTRA_ID",
    "prompt_format": "PROMPT_FORMAT",
}
# output of preprocessing → input of the engine
TO_ENGINE = {
    "INPUT_ID": "input_ids",
    "REQUEST_INPUT_LEN": "input_lengths",
    "REQUEST_OUTPUT_LEN": "request_output_len",
    "BAD_WORDS_IDS": "bad_words_list",
    "STOP_WORDS_IDS": "stop_words_list",
    "EMBEDDING_BIAS": "embedding_bias",
    "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id",
    "DECODER_INPUT_ID": "decoder_input_ids",
    "REQUEST_DECODER_INPUT_LEN": "decoder_input_lengths",
    "OUT_PROMPT_TABLE_EXTRA_IDS": "prompt_table_extra_ids",
}
# one number per row: input of this model → input of the engine
SCALARS = {
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    "stream": "streaming",
    **{
        name: name
        for name in (
            "exclude_input_in_output",
            "temperature",
            "repetition_penalty",
            "min_tokens",
            "presence_penalty",
            "frequency_penalty",
            "seed",
            "return_log_probs",
            "return_context_logits",
            "return_generation_logits",
            "num_return_sequences",
            "beam_width",
            "prompt_vocab_size",
            "lora_task_id",
            "return_perf_metrics",
            "return_num_input_tokens",
            "return_num_output_tokens",
        )
    },
}
WHOLE = (
    "prompt_embedding_table",
    "lora_weights",
    "lora_config",
    "guided_decoding_guide_type",
    "guided_decoding_guide",
)
REFUSED = {
    "image_input": "images are not supported",
    "image_bytes_input": "images are not supported",
    "image_url_input": "images are not supported",
    "image_sizes_input": "images are not supported",
    "video_bytes_input": "videos are not supported",
    "num_draft_tokens": "speculative decoding is not supported",
    "use_draft_logits": "speculative decoding is not supported",
}


def call_model(
    model: str, request_id: str, inputs: Sequence[Any], outputs: Sequence[str], many: bool
) -> Any:
    """Ask another model: an iterator of its responses, or the only one."""
    pb = tensors.triton()
    request = pb.InferenceRequest(
        model_name=model,
        request_id=request_id,
        inputs=list(inputs),
        requested_output_names=list(outputs),
        preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),
    )
    return _kept(request) if many else request.exec()


KEEP_SECONDS, KEEP_AT_LEAST = 1.0, 8
_recent: deque[tuple[float, Any]] = deque()


def _kept(request: Any) -> Iterator[Any]:
    """The responses of a decoupled model, each kept for a while after its use.

    The thread of the Python backend that brings a response still holds it when we get it. Should
    that thread be the last to let go, it frees NumPy arrays without holding Python's lock, and the
    process ends sooner or later with a damaged heap (seen in Triton 2.51 as soon as a few streams
    ran on a busy machine). It brings one response after another: when a later one is here, it has
    let go of the earlier ones.
    """
    responses = request.exec(decoupled=True)
    for response in responses:
        now = time.monotonic()
        _recent.append((now, response))
        while len(_recent) > KEEP_AT_LEAST and _recent[0][0] < now - KEEP_SECONDS:
            _recent.popleft()
        yield response
    _recent.append((time.monotonic(), responses))


def outputs_of(response: Any) -> dict[str, Any]:
    """Tensors of a response by name.

    Raises:
        RazorError: with the message of the model that failed.
    """
    if response.has_error():
        raise ModelError(response.error())
    return {t.name(): t for t in response.output_tensors()}


def copy_of(tensor: Any) -> Any:
    """A tensor of another model as one of our own, which does not hold on to its memory."""
    try:
        values = tensor.as_numpy()
    except Exception:  # BF16, which numpy does not know
        return tensor
    return tensors.tensor(tensor.name(), values.copy())


class ModelError(RazorError):
    """An error of a model behind this one; its message and code go on to the client."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


def preprocess(request: Any, request_id: str) -> dict[str, Any]:
    """What preprocessing makes of a request: tensors by name.

    Raises:
        ModelError: it refuses the request.
    """
    inputs = [
        tensors.tensor(theirs, values)
        for ours, theirs in TO_PREPROCESSING.items()
        if (values := tensors.array(request, ours)) is not None
    ]
    return outputs_of(call_model("preprocessing", request_id, inputs, list(TO_ENGINE), False))


def engine_inputs(request: Any, prepared: Mapping[str, Any]) -> list[Any]:
    """The engine's request: what preprocessing made, and what the client says itself."""
    inputs = [
        tensors.tensor(theirs, prepared[ours].as_numpy())
        for ours, theirs in TO_ENGINE.items()
        if ours in prepared
    ]
    for ours, theirs in SCALARS.items():
        values = tensors.array(request, ours)
        if values is not None:
            inputs.append(tensors.tensor(theirs, values.reshape(-1, 1)))
    get = tensors.triton().get_input_tensor_by_name
    return inputs + [copy_of(t) for n in WHOLE if (t := get(request, n)) is not None]


def required(request: Any, name: str) -> np.ndarray:
    """An input that must be there: Triton counts the inputs, it does not look which are missing.

    Raises:
        UsageError: it is absent or empty.
    """
    values = tensors.array(request, name)
    if values is None or values.size == 0:
        raise UsageError(f"{name}: required, but not in the request")
    return values


def check_request(request: Any) -> None:
    """Check what no model behind this one sees.

    Raises:
        UsageError: naming the input.
    """
    limits = required(request, "max_tokens")
    if limits.min() < 1:
        raise UsageError(f"max_tokens: expected at least 1, found {limits.min()}")
    for name, why in REFUSED.items():
        values = tensors.array(request, name)
        if values is not None and values.any():
            raise UsageError(f"{name}: {why} by this model")


def prompts_of(
    request: Any, prepared: Mapping[str, Any], batch: int, exclude_input: bool
) -> list[Prompt]:
    """The rows of a request for the one who puts the texts together.

    Args:
        exclude_input: what the engine does for requests that do not say.
    """
    ids = prepared["INPUT_ID"].as_numpy()
    lengths = prepared["REQUEST_INPUT_LEN"].as_numpy().reshape(-1)
    words = tensors.array(request, "stop_words")
    excluded = tensors.array(request, "exclude_input_in_output")
    return [
        Prompt(
            ids[row, : lengths[row]].tolist(),
            []
            if words is None
            else [w for w in (tensors.text(x, "stop_words") for x in words[row].reshape(-1)) if w],
            exclude_input if excluded is None else bool(excluded.reshape(-1)[row]),
        )
        for row in range(batch)
    ]


def stop_inputs() -> list[Any]:
    """Inputs of a request that stops another one of the same id."""
    return [
        tensors.tensor("input_ids", np.zeros((1, 1), np.int32)),
        tensors.tensor("input_lengths", np.zeros((1, 1), np.int32)),
        tensors.tensor("request_output_len", np.zeros((1, 1), np.int32)),
        tensors.tensor("stop", np.ones((1, 1), np.bool_)),
    ]
