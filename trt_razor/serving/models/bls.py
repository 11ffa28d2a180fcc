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
from dataclasses import dataclass
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.models import tensors
from trt_razor.serving.models.answers import Answers
from trt_razor.serving.models.bls_requests import (
    call_model,
    check_request,
    engine_inputs,
    outputs_of,
    preprocess,
    prompts_of,
    required,
    stop_inputs,
)
from trt_razor.serving.models.bls_texts import (
    DecodedTexts,
    EngineTexts,
    Texts,
    index_of,
    joined,
    repeated,
)

MAX_REQUESTS = 512
"""Requests at once; the engine's own queue is shorter."""
POLL_SECONDS = 0.1
REPEAT_STOP_SECONDS = 0.5
"""A stop that came before the engine knew the request is lost: so it is repeated."""


class Busy(RazorError):
    """Too many requests at once."""

    triton_code = "UNAVAILABLE"


@dataclass(frozen=True)
class Settings:
    """What the configuration says.

    Attributes:
        engine: name of the engine's model.
        decoupled: any number of responses per request; otherwise exactly one.
        tokenizer: for the text; None = the engine gives ``text_output`` itself.
        skip_special: leave special tokens out of the text.
        accumulate: every response of a stream has all text so far.
        exclude_input: what the engine does for requests that do not say; without it, an answer
            that begins as its prompt does would be taken for the prompt.
        outputs: names this model may give.
    """

    engine: str
    decoupled: bool
    tokenizer: Tokenizer | None
    skip_special: bool
    accumulate: bool
    exclude_input: bool
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
        self.stopping = False  # a stop request is under way
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

    def end(self, error: BaseException | None = None) -> None:
        """The last word: an error, or nothing. Later ones are ignored."""
        with self._lock:
            if self._sender is None:
                return
            if error is None and not self._decoupled:
                self._close(tensors.error_response("cancelled", "CANCELLED"))  # one is owed
            else:
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
        self._watcher = _start(self._watch)

    def take(self, request: Any) -> None:
        """Start a request; its answer comes through its response sender."""
        call = Call(request, self._settings.decoupled)
        with self._lock:
            full = len(self._live) >= MAX_REQUESTS
            if not full:
                self._live.add(call)
        if full:
            call.end(Busy(f"busy: {MAX_REQUESTS} requests are being answered; try again later"))
        else:
            _start(self._serve, call)

    def close(self) -> None:
        """Look after clients no more; Triton calls this after the last request."""
        self._closing.set()
        self._watcher.join()

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
        if error is not None and call.at_engine:
            self._request_stop(call)  # other rows of the request may still run
        try:
            call.end(error)
        except Exception as e:
            tensors.log_unexpected("tensorrt_llm_bls: last response", e)

    def _answer(self, call: Call) -> None:
        request, s = call.request, self._settings
        check_request(request)
        batch = len(required(request, "text_input"))
        stream = tensors.array(request, "stream")
        streaming = stream is not None and bool(stream.reshape(-1)[:1].any())
        if streaming and not s.decoupled:
            raise UsageError("stream: tensorrt_llm_bls answers all at once here; send false")
        prepared = preprocess(request, call.id)
        asked = set(request.requested_output_names())
        wanted = [n for n in s.outputs if n in asked]
        texts: Texts
        if s.tokenizer is None:
            texts = EngineTexts(streaming and s.accumulate)
        else:
            prompts = prompts_of(request, prepared, batch, s.exclude_input)
            texts = DecodedTexts(
                Answers(s.tokenizer, prompts, streaming, s.skip_special, s.accumulate)
            )
        names = {*(n for n in wanted if n != "text_output"), *texts.needs}
        last: dict[tuple[int, int], dict[str, Any]] = {}
        for outputs in self._engine(call, prepared, names):
            key = (index_of(outputs, "batch_index"), index_of(outputs, "sequence_index"))
            text = texts.of(outputs, *key)
            if text is None:
                continue  # a stop word ended this sequence before
            result = {n: tensors.tensor(n, outputs[n].as_numpy().copy()) for n in wanted if n in outputs}
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
            call.send(joined([last[key] for key in sorted(last)]))
        for row, number, left in texts.left():
            call.send(list(repeated(last[row, number], left).values()))

    def _engine(
        self, call: Call, prepared: Mapping[str, Any], names: set[str]
    ) -> Iterator[dict[str, Any]]:
        """The engine's responses, each as tensors by name; an empty last one is left out."""
        names = names | {"batch_index", "sequence_index"}
        inputs = engine_inputs(call.request, prepared)
        if call.over:
            return
        call.at_engine = True
        for response in call_model(self._settings.engine, call.id, inputs, sorted(names), True):
            outputs = outputs_of(response)
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
        if not call.stopping and now - call.stop_sent >= REPEAT_STOP_SECONDS:
            call.stopping, call.stop_sent = True, now
            _start(self._stop, call)

    def _stop(self, call: Call) -> None:
        try:
            outputs = ["output_ids", "sequence_length"]
            for response in call_model(
                self._settings.engine, call.id, stop_inputs(), outputs, True
            ):
                outputs_of(response)
        except Exception as e:
            tensors.log_unexpected("tensorrt_llm_bls: stop", e)
        finally:
            call.stopping = False


def _start(work: Callable[..., None], *args: Any) -> threading.Thread:
    """A thread that does not keep the process alive: an engine that died never answers."""
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


# Triton's entry points ------------------------------------------------------------------------------
class TritonPythonModel:
    """The model as Triton runs it."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the parameters: the public ``accumulate_tokens`` and ``tensorrt_llm_model_name``
        (``tensorrt_llm_draft_model_name`` and ``multimodal_encoders_name`` must be empty), ours
        ``text_from_engine``, and ``tokenizer_dir``, ``skip_special_tokens`` and
        ``exclude_input_in_output`` (as of ``tensorrt_llm``) without it."""
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
                    exclude_input=tensors.flag(given, "exclude_input_in_output", False),
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
        """End the threads; there are none if the model was not loaded."""
        if hasattr(self, "_bls"):
            self._bls.close()
