"""Triton model ``tensorrt_llm_bls``: preprocessing, the engine and its text in one model.

An instance answers one request at a time, on Triton's own thread, as the public model does: calls
to other models from several threads of one process make Triton's Python backend hang or crash
(seen in 2.51). So the number of instances is the number of requests at once; others wait in
Triton's queue. Triton tells nothing of a client's cancellation to the models behind a model: this
one looks after its client whenever the engine responds, and then sends the engine a ``stop``
request with the same id. A client that leaves before the first token is noticed at that token.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.models import tensors
from trt_razor.serving.models.answers import Answers
from trt_razor.serving.models.bls_requests import (
    call_model,
    check_request,
    copy_of,
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

POLL_SECONDS = 0.1
"""Least time between two looks after a client; each is a round trip to the server."""


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

    The sender must not be asked anything after its final flag: that ends the whole server.
    """

    def __init__(self, request: Any, decoupled: bool) -> None:
        self.request = request
        self.id = uuid.uuid4().hex
        self.over = False  # no more text is wanted: the client left, or a stop word was found
        self._decoupled = decoupled
        self._sender = request.get_response_sender()
        self._looked = -math.inf

    def send(self, outputs: Sequence[Any]) -> None:
        """A response of a stream, or the only one."""
        response = tensors.triton().InferenceResponse(output_tensors=list(outputs))
        if self._sender is None:
            return
        if self._decoupled:
            self._sender.send(response)
        else:
            self._close(response)

    def end(self, error: BaseException | None = None) -> None:
        """The last word: an error, or nothing. Later ones are ignored."""
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
        """Whether the client cancelled or is gone, as far as it is time to look again."""
        now = time.monotonic()
        if self._sender is None or now - self._looked < POLL_SECONDS:
            return False
        self._looked = now
        return bool(self._sender.is_cancelled())


class Bls:
    """What the model does, apart from Triton's entry points."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def serve(self, request: Any) -> None:
        """Answer a request to its end, through its response sender."""
        call = Call(request, self._settings.decoupled)
        error: BaseException | None = None
        try:
            if not call.client_left():  # while it waited in Triton's queue
                self._answer(call)
        except RazorError as e:
            error = e
        except Exception as e:  # a client must not wait for ever
            tensors.log_unexpected("tensorrt_llm_bls", e)
            error = e
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

        def take(outputs: Mapping[str, Any]) -> None:
            key = (index_of(outputs, "batch_index"), index_of(outputs, "sequence_index"))
            text = texts.of(outputs, *key)
            if text is None:
                return  # a stop word ended this sequence before
            result = {n: copy_of(outputs[n]) for n in wanted if n in outputs}
            result["text_output"] = text
            last[key] = result
            if s.decoupled:
                call.send(list(result.values()))
            call.over = call.client_left() or (streaming and texts.stopped)

        self._engine(call, prepared, names, take)
        if call.over:
            return
        if not s.decoupled:
            call.send(joined([last[key] for key in sorted(last)]))
        for row, number, left in texts.left():
            call.send(list(repeated(last[row, number], left).values()))

    def _engine(
        self,
        call: Call,
        prepared: Mapping[str, Any],
        names: set[str],
        take: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """Give the engine's responses to ``take``, each as tensors by name, until no more are
        wanted; an empty last one is left out.

        The others are fetched all the same: the engine waits until somebody does.
        """
        names = names | {"batch_index", "sequence_index"}
        inputs = engine_inputs(call.request, prepared)
        error: Exception | None = None
        stopped = False
        for response in call_model(self._settings.engine, call.id, inputs, sorted(names), True):
            if error is None and not call.over:
                try:
                    outputs = outputs_of(response)
                    if outputs:
                        take(outputs)
                except Exception as e:
                    error = e
            if (call.over or error is not None) and not stopped:
                stopped = True
                self._stop(call)
        if error is not None:
            raise error

    def _stop(self, call: Call) -> None:
        """Have the engine stop a request, all its rows."""
        outputs = ["output_ids", "sequence_length"]
        for _ in call_model(self._settings.engine, call.id, stop_inputs(), outputs, True):
            pass


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
        """Answer the requests, one after another."""
        for request in requests:
            self._bls.serve(request)
