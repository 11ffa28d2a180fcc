"""Triton model ``tensorrt_llm_bls``: preprocessing, the engine and its text in one model.

Every request has a thread of its own that waits for the engine's responses and passes them on, so
that any number run side by side. One more thread asks for all of them whether the client is still
there: if not, the engine gets a ``stop`` request with the same id, as Triton tells nothing of a
client's cancellation to the models behind a model.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.models import tensors
from trt_razor.serving.models.answers import Answers, Prompt

MAX_REQUESTS = 512
"""Requests at once; the engine's own queue is shorter."""
POLL_SECONDS = 0.1
REPEAT_STOP_SECONDS = 0.5
"""A stop that came before the engine knew the request is lost: so it is repeated."""

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


@dataclass(frozen=True)
class Settings:
    """What the configuration says.

    Attributes:
        engine: name of the engine's model.
        decoupled: any number of responses per request; otherwise exactly one.
        tokenizer: for the text; None = the engine gives ``text_output`` itself.
        skip_special: leave special tokens out of the text.
        accumulate: every response of a stream has all text so far.
        outputs: names this model may give.
    """

    engine: str
    decoupled: bool
    tokenizer: Tokenizer | None
    skip_special: bool
    accumulate: bool
    outputs: tuple[str, ...]


class Call:
    """One client's request while it is here.

    The sender must not be asked anything after its final flag (that ends the whole server), and
    two threads use it: so all goes through this class's lock.
    """

    def __init__(self, request: Any, decoupled: bool) -> None:
        self.request = request
        self.id = uuid.uuid4().hex
        self.at_engine = False
        self.over = False  # no more text is wanted: the client left, or a stop word was found
        self.stop_sent = -REPEAT_STOP_SECONDS
        self._decoupled = decoupled
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()

    def send(self, outputs: Sequence[Any]) -> None:
        """A response of a stream, or the only one."""
        pb = tensors.triton()
        response = pb.InferenceResponse(output_tensors=list(outputs))
        with self._lock:
            if self._sender is None:
                return
            if self._decoupled:
                self._sender.send(response)
            else:
                self._close(response)

    def end(self, error: BaseException | str | None = None) -> None:
        """The last word: an error, or nothing. Later ones are ignored."""
        with self._lock:
            if self._sender is None:
                return
            if error is None and not self._decoupled:
                error = "cancelled"  # one response is owed
            self._close(None if error is None else tensors.error_response(error))

    def _close(self, response: Any) -> None:
        sender, self._sender = self._sender, None
        final = tensors.triton().TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if response is None:
            sender.send(flags=final)
        else:
            sender.send(response, flags=final)

    def client_left(self) -> bool:
        """Whether the client cancelled or is gone; False once the request is done."""
        with self._lock:
            return self._sender is not None and bool(self._sender.is_cancelled())


class Bls:
    """What the model does, apart from Triton's entry points.

    Args:
        settings: of the model.
        poll: seconds between two looks at the clients.
    """

    def __init__(self, settings: Settings, poll: float = POLL_SECONDS) -> None:
        self._settings, self._poll = settings, poll
        self._live: set[Call] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(MAX_REQUESTS, "bls")
        self._stops = ThreadPoolExecutor(4, "bls-stop")
        self._watcher = threading.Thread(target=self._watch, name="bls-watch", daemon=True)
        self._watcher.start()

    def take(self, request: Any) -> None:
        """Start a request; its answer comes through its response sender."""
        call = Call(request, self._settings.decoupled)
        with self._lock:
            full = len(self._live) >= MAX_REQUESTS
            if not full:
                self._live.add(call)
        if full:
            message = f"busy: {MAX_REQUESTS} requests are being answered; try again later"
            call.end(RazorError(message))
        else:
            self._pool.submit(self._serve, call)

    def close(self) -> None:
        """End the threads; Triton calls this after the last request."""
        self._closing.set()
        self._watcher.join()
        self._pool.shutdown(wait=False)
        self._stops.shutdown(wait=False)

    # One request --------------------------------------------------------------------------------
    def _serve(self, call: Call) -> None:
        error: BaseException | None = None
        try:
            self._answer(call)
        except RazorError as e:
            error = e
        except BaseException as e:  # a client must not wait for ever
            tensors.log_unexpected("tensorrt_llm_bls", e)
            error = e
        with self._lock:
            self._live.discard(call)
        try:
            call.end(error)
        except Exception as e:
            tensors.log_unexpected("tensorrt_llm_bls: last response", e)

    def _answer(self, call: Call) -> None:
        request, s = call.request, self._settings
        _check(request)
        batch = len(_required(request, "text_input"))
        stream = tensors.array(request, "stream")
        streaming = stream is not None and bool(stream.reshape(-1)[:1].any())
        if streaming and not s.decoupled:
            raise UsageError("stream: tensorrt_llm_bls answers all at once here; send false")
        prepared = _preprocess(request, call.id)
        asked = set(request.requested_output_names())
        wanted = [n for n in s.outputs if n in asked]
        texts: Texts
        if s.tokenizer is None:
            texts = EngineTexts(streaming and s.accumulate)
        else:
            prompts = _prompts(request, prepared, batch)
            texts = DecodedTexts(
                Answers(s.tokenizer, prompts, streaming, s.skip_special, s.accumulate)
            )
        names = {*(n for n in wanted if n != "text_output"), *texts.needs}
        last: dict[tuple[int, int], dict[str, Any]] = {}
        for outputs in self._engine(call, prepared, names):
            key = (_index(outputs, "batch_index"), _index(outputs, "sequence_index"))
            text = texts.of(outputs, *key)
            if text is None:
                continue  # a stop word ended this sequence before
            result = {n: outputs[n] for n in wanted if n in outputs}
            result["text_output"] = text
            last[key] = result
            if s.decoupled:
                call.send(list(result.values()))
            if streaming and texts.stopped:
                call.over = True
                self._request_stop(call)
        if call.over:
            return
        if not s.decoupled:
            call.send(_joined([last[key] for key in sorted(last)]))
        for row, number, left in texts.left():
            call.send(list(_repeated(last[row, number], left).values()))

    def _engine(
        self, call: Call, prepared: Mapping[str, Any], names: set[str]
    ) -> Iterator[dict[str, Any]]:
        """The engine's responses, each as tensors by name; an empty last one is left out."""
        names = names | {"batch_index", "sequence_index"}
        inputs = _engine_inputs(call.request, prepared)
        call.at_engine = True
        for response in _call(self._settings.engine, call.id, inputs, sorted(names), True):
            outputs = _outputs(response)
            if outputs and not call.over:
                yield outputs

    # Cancellation -------------------------------------------------------------------------------
    def _watch(self) -> None:
        count = 0
        # A look costs a round trip to the server: less often for many.
        while not self._closing.wait(max(self._poll, count * 0.002)):
            with self._lock:
                live = list(self._live)
            count = len(live)
            for call in live:
                try:
                    call.over = call.over or call.client_left()
                except Exception as e:
                    tensors.log_unexpected("tensorrt_llm_bls: cancellation", e)
                if call.over and call.at_engine:
                    self._request_stop(call)

    def _request_stop(self, call: Call) -> None:
        """Have the engine stop a request; asked again soon, it does nothing."""
        now = time.monotonic()
        if now - call.stop_sent >= REPEAT_STOP_SECONDS:
            call.stop_sent = now
            self._stops.submit(self._stop, call)

    def _stop(self, call: Call) -> None:
        try:
            inputs = [
                tensors.tensor("input_ids", np.zeros((1, 1), np.int32)),
                tensors.tensor("input_lengths", np.zeros((1, 1), np.int32)),
                tensors.tensor("request_output_len", np.zeros((1, 1), np.int32)),
                tensors.tensor("stop", np.ones((1, 1), np.bool_)),
            ]
            outputs = ["output_ids", "sequence_length"]
            for response in _call(self._settings.engine, call.id, inputs, outputs, True):
                _outputs(response)
        except Exception as e:
            tensors.log_unexpected("tensorrt_llm_bls: stop", e)


# Requests to the other models ----------------------------------------------------------------------
def _call(
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
    return request.exec(decoupled=True) if many else request.exec()


def _outputs(response: Any) -> dict[str, Any]:
    """Tensors of a response by name.

    Raises:
        RazorError: with the message of the model that failed.
    """
    if response.has_error():
        raise ModelError(response.error())
    return {t.name(): t for t in response.output_tensors()}


class ModelError(RazorError):
    """An error of a model behind this one; its message and code go on to the client."""

    def __init__(self, error: Any) -> None:
        super().__init__(error.message())
        self.error = error


def _preprocess(request: Any, request_id: str) -> dict[str, Any]:
    inputs = [
        tensors.tensor(theirs, values)
        for ours, theirs in TO_PREPROCESSING.items()
        if (values := tensors.array(request, ours)) is not None
    ]
    return _outputs(_call("preprocessing", request_id, inputs, list(TO_ENGINE), False))


def _engine_inputs(request: Any, prepared: Mapping[str, Any]) -> list[Any]:
    inputs = [
        tensors.tensor(theirs, prepared[ours].as_numpy())
        for ours, theirs in TO_ENGINE.items()
        if ours in prepared
    ]
    for ours, theirs in SCALARS.items():
        values = tensors.array(request, ours)
        if values is not None:
            inputs.append(tensors.tensor(theirs, values.reshape(-1, 1)))
    get: Callable[[Any, str], Any] = tensors.triton().get_input_tensor_by_name
    return inputs + [t for n in WHOLE if (t := get(request, n)) is not None]


def _required(request: Any, name: str) -> np.ndarray:
    values = tensors.array(request, name)
    if values is None or values.size == 0:
        raise UsageError(f"{name}: required, but not in the request")
    return values


def _check(request: Any) -> None:
    limits = _required(request, "max_tokens")
    if limits.min() < 1:
        raise UsageError(f"max_tokens: expected at least 1, found {limits.min()}")
    for name, why in REFUSED.items():
        values = tensors.array(request, name)
        if values is not None and values.any():
            raise UsageError(f"{name}: {why} by this model")


def _prompts(request: Any, prepared: Mapping[str, Any], batch: int) -> list[Prompt]:
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
            excluded is not None and bool(excluded.reshape(-1)[row]),
        )
        for row in range(batch)
    ]


def _numpy(outputs: Mapping[str, Any], name: str) -> np.ndarray:
    values: np.ndarray = outputs[name].as_numpy()
    return values


def _index(outputs: Mapping[str, Any], name: str) -> int:
    return int(_numpy(outputs, name).reshape(-1)[0]) if name in outputs else 0


# Texts ------------------------------------------------------------------------------------------
class DecodedTexts:
    """Texts decoded here from the engine's ids."""

    needs = ("output_ids", "sequence_length")

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def of(self, outputs: Mapping[str, Any], row: int, number: int) -> Any:
        """The tensor ``text_output`` of a response, or None if its sequence is over."""
        for name in self.needs:
            if name not in outputs:
                raise RazorError(f"tensorrt_llm: no {name} in its response")
        ids, lengths = (_numpy(outputs, n) for n in self.needs)
        found = self._answers.add(ids, lengths, row, number)
        return None if found is None else tensors.tensor("text_output", tensors.strings(found))

    @property
    def stopped(self) -> bool:
        """Whether stop words ended all answers."""
        return self._answers.stopped

    def left(self) -> list[tuple[int, int, str]]:
        """(row, number, text) of what the answers still hold at the end."""
        return self._answers.finish()


class EngineTexts:
    """Texts that the engine gives, stop texts cut already."""

    needs = ("text_output",)
    stopped = False

    def __init__(self, accumulate: bool) -> None:
        self._so_far: dict[tuple[int, int], bytes] | None = {} if accumulate else None

    def of(self, outputs: Mapping[str, Any], row: int, number: int) -> Any:
        """The tensor ``text_output`` of a response."""
        if "text_output" not in outputs:
            raise RazorError("tensorrt_llm: no text_output in its response")
        if self._so_far is None:
            return outputs["text_output"]
        values = _numpy(outputs, "text_output")
        text = self._so_far.get((row, number), b"") + b"".join(values.reshape(-1))
        self._so_far[row, number] = text
        whole = np.empty(values.shape, object)
        whole[...] = text
        return tensors.tensor("text_output", whole)

    def left(self) -> list[tuple[int, int, str]]:
        """Nothing: the engine holds nothing back at the end."""
        return []


Texts = DecodedTexts | EngineTexts


def _repeated(result: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A sequence's last response once more, for text that came out at its end: no new tokens."""
    again = {**result, "text_output": tensors.tensor("text_output", tensors.strings([text]))}
    if "num_output_tokens" in again:
        again["num_output_tokens"] = tensors.tensor("num_output_tokens", np.zeros((1, 1), np.int32))
    if "output_log_probs" in again:
        empty = _numpy(again, "output_log_probs")[..., :0]
        again["output_log_probs"] = tensors.tensor("output_log_probs", empty)
    return again


def _joined(responses: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One response out of one per row, in the order of the rows."""
    if not responses:
        raise RazorError("tensorrt_llm: ended without an answer")
    if len(responses) == 1:
        return list(responses[0].values())
    result = []
    for name in responses[0]:
        parts = [_numpy(r, name) for r in responses if name in r]
        shape = np.max([p.shape[1:] for p in parts], axis=0, initial=0)
        padded = [np.pad(p, _room(p.shape, shape), constant_values=-1) for p in parts]
        result.append(tensors.tensor(name, np.concatenate(padded)))
    return result


def _room(shape: Sequence[int], wanted: np.ndarray) -> list[tuple[int, int]]:
    return [(0, 0), *((0, int(n) - have) for n, have in zip(wanted, shape[1:], strict=True))]


# Triton's entry points ------------------------------------------------------------------------------
class TritonPythonModel:
    """The model as Triton runs it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the parameters: the public ``accumulate_tokens`` and ``tensorrt_llm_model_name``
        (``tensorrt_llm_draft_model_name`` and ``multimodal_encoders_name`` must be empty), ours
        ``text_from_engine``, and ``tokenizer_dir`` and ``skip_special_tokens`` without it."""
        try:
            given = tensors.parameters(args)
            for name in ("tensorrt_llm_draft_model_name", "multimodal_encoders_name"):
                if name in given:
                    raise UsageError(f"parameter {name}: not supported; leave it empty")
            theirs = tensors.flag(given, "text_from_engine", False)
            self._bls = Bls(
                Settings(
                    engine=given.get("tensorrt_llm_model_name", "tensorrt_llm"),
                    decoupled=tensors.is_decoupled(args),
                    tokenizer=None if theirs else tensors.load_tokenizer(args),
                    skip_special=tensors.flag(given, "skip_special_tokens", True),
                    accumulate=tensors.flag(given, "accumulate_tokens", False),
                    outputs=tensors.output_names(args),
                )
            )
        except RazorError as e:
            raise tensors.load_failure(e) from None

    def execute(self, requests: Sequence[Any]) -> None:
        """Start the requests; their answers come later."""
        for request in requests:
            self._bls.take(request)

    def finalize(self) -> None:
        """End the threads."""
        self._bls.close()
