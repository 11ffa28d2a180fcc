"""The clients that users of Triton with TensorRT-LLM have, made again from what they are known to do.

``run_engine_client`` does what ``inflight_batcher_llm_client.py`` does (token ids to ``tensorrt_llm``),
``run_text_client`` what ``end_to_end_grpc_client.py`` does (text to ``ensemble`` or
``tensorrt_llm_bls``). Requests are theirs: the same tensors, types and shapes, always sent or
only when asked. Answers are read as they read them: what would make such a client fail raises
ClientFailed here.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERF_METRICS = (
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
    "acceptance_rate",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
)
LONG = 60.0
"""Seconds that no answer takes."""

_TYPES = {"int32": "INT32", "uint64": "UINT64", "float32": "FP32", "bool": "BOOL"}


class ClientFailed(Exception):
    """The official client would end with an error, or crash."""


def tensor(name: str, value: np.ndarray[Any, Any]) -> Any:
    import tritonclient.grpc as grpc

    kind = "BYTES" if value.dtype == object else _TYPES[value.dtype.name]
    tensor = grpc.InferInput(name, list(value.shape), kind)
    tensor.set_data_from_numpy(value)
    return tensor


def one(kind: Any, value: Any) -> np.ndarray[Any, Any]:
    return np.array([[value]], kind)


def strings(words: Sequence[str]) -> np.ndarray[Any, Any]:
    return np.array([[w.encode() for w in words]], object)


# Token ids ----------------------------------------------------------------------------------------
@dataclass
class EngineAnswer:
    """What the token client has at its end.

    Attributes:
        tokens: prompt and answer (of a stream it puts the prompt there itself).
        chunks: tokens of each response.
        cancelled: a response without output_ids came, or the call was cancelled.
        last: tensors of the last response.
    """

    tokens: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    cancelled: bool = False
    cum_log_probs: float | None = None
    last: dict[str, Any] = field(default_factory=dict)


def run_engine_client(
    url: str,
    input_ids: Sequence[int],
    *,
    end_id: int,
    pad_id: int,
    request_output_len: int = 16,
    streaming: bool = False,
    beam_width: int = 1,
    temperature: float = 1.0,
    top_k: int = 1,
    top_p: float = 0.0,
    exclude_input_in_output: bool | None = None,
    flags: Sequence[str] = (),
    penalties: Mapping[str, float] | None = None,
    requested_outputs: Sequence[str] = (),
    request_id: str = "",
    stop_after_ms: int = 0,
    stop_via_request_cancel: bool = False,
    model: str = "tensorrt_llm",
) -> EngineAnswer:
    """A request as the token client sends it, and its answer as it reads it.

    Args:
        flags: of ``return_log_probs``, ``return_perf_metrics``, ``return_num_input_tokens`` …
        penalties: ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``.

    Raises:
        ClientFailed: where the client ends with "Encountered error", fails its own checks or
            crashes.
    """
    ids = np.array([list(input_ids)], np.int32)
    inputs = {
        "input_ids": ids,
        "input_lengths": one(np.int32, ids.shape[1]),
        "request_output_len": one(np.int32, request_output_len),
        "beam_width": one(np.int32, beam_width),
        "temperature": one(np.float32, temperature),
        "streaming": one(bool, streaming),
        "end_id": one(np.int32, end_id),
        "pad_id": one(np.int32, pad_id),
        "runtime_top_k": one(np.int32, top_k),
        "runtime_top_p": one(np.float32, top_p),
        **{name: one(np.float32, value) for name, value in (penalties or {}).items()},
        **{name: one(bool, True) for name in flags},
    }
    if exclude_input_in_output is not None:
        inputs["exclude_input_in_output"] = one(bool, exclude_input_in_output)
    call = _EngineCall(url, model, inputs, requested_outputs, request_id)
    send = call.stream if streaming else call.unary
    responses = send(stop_after_ms, stop_via_request_cancel)
    answer = EngineAnswer()
    generated: list[int] = []
    for result in responses:
        if isinstance(result, Exception):
            if stop_via_request_cancel and "CANCELLED" in str(result):
                answer.cancelled = True
                continue
            raise ClientFailed(f"Encountered error: {result}")
        _check_outputs(result, requested_outputs)
        ids_out = result.as_numpy("output_ids")
        if ids_out is None:
            answer.cancelled = True
            continue
        lengths = result.as_numpy("sequence_length")
        if lengths is None or lengths[0][0] > 0:
            # All of it, not cut to sequence_length: padding would be taken for tokens.
            chunk = ids_out[0][0].tolist() if streaming else ids_out[0][0][: lengths[0][0]].tolist()
            generated += chunk
            answer.chunks.append(len(chunk))
        if "return_log_probs" in flags:
            answer.cum_log_probs = float(_of(result, "cum_log_probs")[0][0])
            _of(result, "output_log_probs")[0]
        answer.last = {o.name: result.as_numpy(o.name) for o in result.get_response().outputs}
    if "return_perf_metrics" in flags:
        for name in PERF_METRICS:
            if name not in answer.last:
                raise ClientFailed(f"{name}: 'NoneType' object is not subscriptable")
    answer.tokens = [*input_ids, *generated] if streaming else generated
    echoed = not streaming and not exclude_input_in_output
    if echoed and not answer.cancelled and generated[: len(input_ids)] != list(input_ids):
        raise ClientFailed("the answer does not begin with the prompt")
    new = len(generated) - (len(input_ids) if echoed else 0)
    if stop_after_ms and new >= request_output_len:
        raise ClientFailed("not cancelled in time")
    return answer


def _of(result: Any, name: str) -> Any:
    value = result.as_numpy(name)
    if value is None:
        raise ClientFailed(f"{name}: 'NoneType' object is not subscriptable")
    return value


def _check_outputs(result: Any, requested: Sequence[str]) -> None:
    found = {o.name for o in result.get_response().outputs}
    if requested and found != set(requested):
        raise ClientFailed(f"expected the outputs {sorted(requested)}, found {sorted(found)}")


class _EngineCall:
    """One request of the token client over gRPC."""

    def __init__(
        self,
        url: str,
        model: str,
        inputs: Mapping[str, np.ndarray[Any, Any]],
        requested: Sequence[str],
        request_id: str,
    ) -> None:
        import tritonclient.grpc as grpc

        self.url, self.model, self.request_id = url, model, request_id
        self.inputs = [tensor(n, v) for n, v in inputs.items()]
        self.outputs = [grpc.InferRequestedOutput(o) for o in requested]

    def stop_inputs(self) -> list[Any]:
        """A stop request: its prompt is whatever lies in memory."""
        return [
            tensor("input_ids", np.empty([1, 1], np.int32)),
            tensor("input_lengths", one(np.int32, 0)),
            tensor("request_output_len", one(np.int32, 0)),
            tensor("stop", one(bool, True)),
        ]

    def stream(self, stop_after_ms: int, by_cancel: bool) -> list[Any]:
        """Responses and errors, in order. The end is stop_stream's return, not a final flag."""
        import tritonclient.grpc as grpc

        got: queue.Queue[Any] = queue.Queue()
        with grpc.InferenceServerClient(self.url) as client:
            client.start_stream(callback=lambda result, error: got.put(error or result))
            client.async_stream_infer(
                self.model, self.inputs, outputs=self.outputs, request_id=self.request_id
            )
            if stop_after_ms:
                time.sleep(stop_after_ms / 1000)
                if by_cancel:
                    client.stop_stream(cancel_requests=True)
                else:
                    client.async_stream_infer(
                        self.model,
                        self.stop_inputs(),
                        request_id=self.request_id,
                        parameters={"Streaming": True},
                    )
            client.stop_stream()
        return list(got.queue)

    def unary(self, stop_after_ms: int, by_cancel: bool) -> list[Any]:
        """Exactly one response, and one for a stop request."""
        import tritonclient.grpc as grpc

        got: queue.Queue[Any] = queue.Queue()

        def take(result: Any, error: Any) -> None:
            got.put(result if error is None else error)

        wait_for = 1
        with grpc.InferenceServerClient(self.url) as client:
            future = client.async_infer(
                self.model,
                self.inputs,
                callback=take,
                outputs=self.outputs,
                request_id=self.request_id,
                parameters={"Streaming": False},
            )
            if stop_after_ms:
                time.sleep(stop_after_ms / 1000)
                if by_cancel:
                    future.cancel()
                else:
                    client.async_infer(
                        self.model,
                        self.stop_inputs(),
                        callback=take,
                        request_id=self.request_id,
                        parameters={"Streaming": False},
                    )
                    wait_for += 1
            return [got.get(timeout=LONG) for _ in range(wait_for)]


# Text ---------------------------------------------------------------------------------------------
@dataclass
class TextAnswer:
    """What the text client prints.

    Attributes:
        texts: [prompt][sequence]: of a stream all chunks joined (or the last with ``overwrite``).
        errors: "Received an error from server"; the client goes on and exits with 0.
        metrics: the ten of every response.
    """

    texts: dict[int, dict[int, str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    cum_log_probs: list[Any] = field(default_factory=list)
    responses: int = 0

    def text(self, prompt: int = 0) -> str:
        """Raises ClientFailed if there is none, with what the server said."""
        if prompt not in self.texts:
            raise ClientFailed(f"no text: {self.errors}")
        return self.texts[prompt][0]


def run_text_client(
    url: str,
    prompts: Sequence[str],
    *,
    model: str = "ensemble",
    max_tokens: int = 100,
    streaming: bool = False,
    beam_width: int = 1,
    temperature: float = 1.0,
    exclude_input_in_output: bool = False,
    stop_words: Sequence[str] = (),
    bad_words: Sequence[str] = (),
    flags: Sequence[str] = (),
    penalties: Mapping[str, float] | None = None,
    embedding_bias: Mapping[str, float] | None = None,
    end_id: int | None = None,
    pad_id: int | None = None,
    batch_inputs: bool = False,
    overwrite_output_text: bool = False,
    request_id: str = "",
) -> TextAnswer:
    """Requests as the text client sends them: a stream for each prompt, or one request for all.

    Args:
        flags: of ``return_log_probs``, ``return_perf_metrics``.

    Raises:
        ClientFailed: where the client crashes. Errors of the server do not make it fail.
    """
    rows = []
    for prompt in prompts:
        row = {
            "text_input": strings([prompt]),
            "max_tokens": one(np.int32, max_tokens),
            "stream": one(bool, streaming),
            "beam_width": one(np.int32, beam_width),
            "temperature": one(np.float32, temperature),
            "exclude_input_in_output": one(bool, exclude_input_in_output),
            **{name: one(np.float32, value) for name, value in (penalties or {}).items()},
            **{name: one(bool, True) for name in flags},
        }
        for name, words in (("stop_words", stop_words), ("bad_words", bad_words)):
            if words:
                row[name] = strings(words)
        if embedding_bias:
            row["embedding_bias_words"] = strings(list(embedding_bias))
            row["embedding_bias_weights"] = np.array([list(embedding_bias.values())], np.float32)
        for name, value in (("end_id", end_id), ("pad_id", pad_id)):
            if value is not None:
                row[name] = one(np.int32, value)
        rows.append(row)
    if batch_inputs:
        rows = [{name: np.concatenate([r[name] for r in rows]) for name in rows[0]}]
    outputs = ["text_output"]
    if "return_log_probs" in flags:
        outputs += ["cum_log_probs", "output_log_probs"]
    if "return_perf_metrics" in flags:
        outputs += PERF_METRICS
    if batch_inputs:
        outputs.append("batch_index")
    answer = TextAnswer()
    for number, row in enumerate(rows):
        for result in _text_stream(url, model, row, outputs, request_id):
            if isinstance(result, Exception):
                answer.errors.append(str(result))
            else:
                _take_text(answer, result, number, flags, streaming and not overwrite_output_text)
    return answer


def _text_stream(
    url: str, model: str, row: Mapping[str, Any], outputs: Sequence[str], request_id: str
) -> list[Any]:
    """Always a gRPC stream, also for an answer in one piece."""
    import tritonclient.grpc as grpc

    got: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: got.put(error or result))
        client.async_stream_infer(
            model,
            [tensor(n, v) for n, v in row.items()],
            outputs=[grpc.InferRequestedOutput(o) for o in outputs],
            request_id=request_id,
        )
        client.stop_stream()
    return list(got.queue)


def _take_text(
    answer: TextAnswer, result: Any, prompt: int, flags: Sequence[str], append: bool
) -> None:
    answer.responses += 1
    text = _of(result, "text_output")[0].decode()
    batch_index = result.as_numpy("batch_index")
    if batch_index is not None:
        prompt = int(batch_index[0][0])
    sequence = result.as_numpy("sequence_index")
    number = 0 if sequence is None else int(sequence[0][0])
    texts = answer.texts.setdefault(prompt, {})
    texts[number] = texts.get(number, "") + text if append else text
    if "return_log_probs" in flags:
        answer.cum_log_probs.append(_of(result, "cum_log_probs"))
        _of(result, "output_log_probs")
    if "return_perf_metrics" in flags:
        answer.metrics.append({name: _of(result, name)[0][0] for name in PERF_METRICS})
