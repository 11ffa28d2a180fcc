"""The Python model ``tensorrt_llm`` of our own engines: the stock backend's interface over a
Generator with continuous batching.

Runs inside Triton's Python backend. ``execute`` only reads requests and queues them; from then on
a response sender belongs to the loop's thread. That one must never touch a sender after its final
flag: ``is_cancelled`` on it would take the whole server down.
"""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from trt_razor.cache_layout import dtype_bytes, need_bytes
from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Generator
from trt_razor.policy import RazorPolicy
from trt_razor.serving.loop import EngineLoop, LoopClosed, QueueFull
from trt_razor.serving.models.metrics import Metrics
from trt_razor.serving.models.respond import Answer
from trt_razor.serving.requests import Limits, read_request, wants_stop
from trt_razor.serving.settings import EngineSettings
from trt_razor.serving.statistics import Statistics

log = logging.getLogger(__name__)

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """What the Python backend calls, in this order: ``initialize``, ``execute`` …, ``finalize``."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine and start its loop.

        Raises:
            pb_utils.TritonModelException: one line that says why not.
        """
        try:
            self._initialize(args)
        except RazorError as e:
            raise pb_utils.TritonModelException(str(e)) from None

    def _initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        _check_config(config)
        folder = Path(args["model_repository"])
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        settings = EngineSettings.from_parameters(parameters, folder)
        engine = Engine.load(settings.engine, verify=settings.verify)
        m, tokenizer = engine.manifest, engine.tokenizer()
        ends = frozenset({*m.spec.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())})
        session = engine.open(settings.slots)
        generator = Generator(session, m.prefill_chunk, ends, tokenizer)
        self._tokenizer = tokenizer
        self._exclude_input = settings.exclude_input_in_output
        self._limits = Limits(
            session.vocab_size,
            min(settings.max_input_tokens or m.max_seq_len, m.max_seq_len),
            min(settings.max_output_tokens or m.max_seq_len, m.max_seq_len),
            ends,
        )
        self._kv = _KvBytes(engine)
        self._statistics = Statistics(session.num_slots, session.kv_bytes)
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = Metrics(pb_utils, self._statistics, labels)
        self._answers: dict[str, set[Answer]] = {}  # by request id, for ``stop``
        self._answers_lock = threading.Lock()
        self._loop = EngineLoop(
            generator,
            settings.max_queue_size,
            self._statistics,
            self._metrics.publish,
            self._kv.used,
            settings.cancellation_check_period_ms / 1000,
        )
        self._loop.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue requests; their answers come later, from the loop's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except QueueFull as e:
                self._loop.count("rejected")
                _refuse(sender, str(e), pb_utils.TritonError.UNAVAILABLE)
            except LoopClosed as e:
                self._loop.count("error")
                _refuse(sender, str(e), pb_utils.TritonError.UNAVAILABLE)
            except RazorError as e:
                self._loop.count("error")
                _refuse(sender, str(e), pb_utils.TritonError.INVALID_ARG)
            except Exception as e:  # a bug must not leave a client waiting for ever
                log.exception("a request could not be read")
                self._loop.count("error")
                reason = " ".join(f"{type(e).__name__}: {e}".split())[:300]
                _refuse(sender, f"internal error: {reason}", pb_utils.TritonError.INTERNAL)
        return None

    def _accept(self, request: Any, sender: Any) -> None:
        tensors = {t.name(): t.as_numpy() for t in request.inputs()}
        request_id = request.request_id()
        if wants_stop(tensors):
            self._stop(request_id)
            sender.send(flags=FINAL)
            return
        _check_parameters(request.parameters())
        asked = read_request(tensors, self._limits, self._tokenizer, self._exclude_input)
        answer = Answer(
            pb_utils,
            sender,
            asked,
            request.requested_output_names(),
            self._tokenizer,
            self._kv,
            self._loop.cancel,
            lambda a: self._forget(request_id, a),
        )
        if request_id:
            with self._answers_lock:
                self._answers.setdefault(request_id, set()).add(answer)
        try:
            self._loop.submit(*answer.jobs)
        except RazorError:
            self._forget(request_id, answer)
            raise

    def _stop(self, request_id: str) -> None:
        """Cancel all requests with an id; one that is unknown or has ended is no error."""
        if not request_id:
            raise UsageError(
                "stop: expected the id of the request to stop, found a request without id"
            )
        with self._answers_lock:
            answers = list(self._answers.get(request_id, ()))
        for answer in answers:
            for job in answer.jobs:
                self._loop.cancel(job)

    def _forget(self, request_id: str, answer: Answer) -> None:
        with self._answers_lock:
            answers = self._answers.get(request_id, set())
            answers.discard(answer)
            if not answers:
                self._answers.pop(request_id, None)

    def finalize(self) -> None:
        """End the loop and what still runs. The server calls this when no request runs."""
        loop = getattr(self, "_loop", None)
        if loop is None:
            return
        loop.close()
        self._statistics.clear_gauges()
        self._metrics.publish()


class _KvBytes:
    """Bytes that a sequence of n cached tokens keeps, and what dense attention would."""

    def __init__(self, engine: Engine) -> None:
        m = engine.manifest
        self._policy = m.policy or RazorPolicy()
        self._heads = m.spec.num_layers * m.spec.num_kv_heads
        self._retrieval = engine.head_map.num_retrieval if engine.head_map else self._heads
        self._head_dim, self._dtype = m.spec.head_dim, m.dtype
        self._row = 2 * m.spec.head_dim * dtype_bytes(m.dtype) * self._heads

    def used(self, n: int) -> int:
        local = self._heads - self._retrieval
        return need_bytes(self._retrieval, local, self._head_dim, self._policy, n, self._dtype)

    def dense(self, n: int) -> int:
        return n * self._row


def _check_config(config: dict[str, Any]) -> None:
    if not pb_utils.using_decoupled_model_transaction_policy(config):
        raise UsageError(
            "config.pbtxt: expected model_transaction_policy { decoupled: true }: tokens are streamed"
        )
    count = sum(int(g.get("count", 1)) for g in config.get("instance_group", []))
    if count > 1:
        raise UsageError(
            f"config.pbtxt: instance_group: expected count 1, found {count}: one instance serves "
            f"all slots; for more at once raise the parameter slots"
        )


def _check_parameters(text: str) -> None:
    """Refuse a request for one half of a disaggregated server."""
    if "request_type" not in text:
        return
    kind = json.loads(text).get("request_type", "context_and_generation")
    if kind != "context_and_generation":
        raise UsageError(f"request_type: {kind!r:.60}: not supported by this engine; leave it out")


def _refuse(sender: Any, message: str, code: int) -> None:
    try:
        error = pb_utils.TritonError(message, code)
        sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
    except Exception:  # the client has gone
        log.exception("an error could not be sent")
