"""Answers of one request: events of its rows as response tensors, sent in order, ended once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trt_razor.generate import Event
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.loop import SHUTTING_DOWN, Job
from trt_razor.serving.requests import GenerationRequest, prompt_text


class KvBytes(Protocol):
    """Bytes kept for n cached tokens, and what dense attention would keep."""

    def used(self, n: int) -> int: ...

    def dense(self, n: int) -> int: ...


@dataclass
class _Row:
    job: Job
    generated: int = 0
    cum_log_prob: float = 0.0
    # What the next response carries:
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


class Answer:
    """The responses of one request; apart from its making, for the loop's thread only.

    Args:
        pb_utils: the module ``triton_python_backend_utils``. sender: of the request.
        outputs: names the client asked for; empty = all.
        cancel: ends a job. on_end: called once, when the last response is out.

    Attributes:
        jobs: one for each row.
    """

    def __init__(
        self,
        pb_utils: Any,
        sender: Any,
        asked: GenerationRequest,
        outputs: Collection[str],
        tokenizer: Tokenizer | None,
        kv: KvBytes,
        cancel: Callable[[Job], None],
        on_end: Callable[[Answer], None],
    ) -> None:
        self._pb, self._sender, self._asked = pb_utils, sender, asked
        self._outputs = frozenset(outputs)
        self._tokenizer, self._kv, self._cancel, self._on_end = tokenizer, kv, cancel, on_end
        self._rows: list[_Row] = []
        for i, (prompt, params) in enumerate(zip(asked.prompts, asked.params, strict=True)):
            # One question for all rows: they have one client.
            ask = self._is_cancelled if i == 0 else self._known_cancelled
            job = Job(prompt, params, lambda e, i=i: self._on_event(i, e), ask)  # type: ignore[misc]
            self._rows.append(_Row(job))
        self._open = len(self._rows)  # rows that have not ended
        self._client_gone = False

    @property
    def jobs(self) -> list[Job]:
        return [r.job for r in self._rows]

    def _is_cancelled(self) -> bool:
        if self._sender is not None and not self._client_gone:
            self._client_gone = self._sender.is_cancelled()
            if self._client_gone:
                for row in self._rows:
                    self._cancel(row.job)
        return self._client_gone

    def _known_cancelled(self) -> bool:
        # The first row may have ended: then this one has to ask.
        return self._is_cancelled() if self._rows[0].job.done else self._client_gone

    def _on_event(self, i: int, event: Event) -> None:
        row = self._rows[i]
        if event.token is not None:
            row.tokens.append(event.token)
            row.generated += 1
        if event.logprob is not None:
            row.log_probs.append(event.logprob)
            row.cum_log_prob += event.logprob
        row.text.append(event.text)
        if event.finished:
            self._open -= 1
        if self._sender is None:
            return
        if event.finished == "error":
            self._end_with_error(i, event.error or "unknown error")
        elif self._client_gone or row.job.gone:
            if self._open == 0:
                self._send(None, final=True)
        elif event.finished or self._asked.streaming:
            self._send(self._tensors(i, event.finished), final=self._open == 0)

    def _end_with_error(self, i: int, message: str) -> None:
        where = f"row {i} of {len(self._rows)}: " if len(self._rows) > 1 else ""
        codes = self._pb.TritonError
        code = codes.UNAVAILABLE if message == SHUTTING_DOWN else codes.INTERNAL
        error = self._pb.TritonError(where + message, code)
        for row in self._rows:  # an error ends a request: the other rows have no reader
            self._cancel(row.job)
        self._send_response(self._pb.InferenceResponse(error=error), final=True)

    def _send(self, tensors: list[Any] | None, final: bool) -> None:
        response = None if tensors is None else self._pb.InferenceResponse(output_tensors=tensors)
        self._send_response(response, final)

    def _send_response(self, response: Any, final: bool) -> None:
        sender = self._sender
        if final:
            # From here on nobody may ask it anything, not even if sending fails.
            self._sender = None
            self._on_end(self)
        flags = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        try:
            if response is None:
                sender.send(flags=flags)
            else:
                sender.send(response, flags=flags)
        except Exception:
            if final:
                with contextlib.suppress(Exception):  # that it was closed after all is no harm
                    sender.send(flags=flags)  # without it a client waits for ever
            raise

    # Tensors ----------------------------------------------------------------------------------
    def _tensors(self, i: int, finished: str | None) -> list[Any]:
        """The response of a row with what has come since its last one. Leading dimension 1."""
        row, asked = self._rows[i], self._asked
        tokens, text, log_probs = row.tokens, "".join(row.text), row.log_probs
        row.tokens, row.text, row.log_probs = [], [], []
        prompt = row.job.prompt
        if not asked.streaming and not asked.exclude_input:
            tokens = [*prompt, *tokens]
            text = prompt_text(self._tokenizer, prompt) + text
        # The last token is not in the cache; without any, the prompt may not be either.
        cached = len(prompt) + row.generated - 1 if row.generated else 0
        out: list[Any] = []

        def add(name: str, value: Any, dtype: Any, shape: tuple[int, ...] = (1, 1)) -> None:
            if not self._outputs or name in self._outputs:
                out.append(self._pb.Tensor(name, np.array(value, dtype).reshape(shape)))

        add("output_ids", tokens, np.int32, (1, 1, len(tokens)))
        add("sequence_length", len(tokens), np.int32)
        # As the public postprocessing has it: no batch dimension.
        add("text_output", [text.encode("utf-8")], np.object_, (1,))
        add("finish_reason", [(finished or "").encode()], np.object_)
        add("kv_cache_used_bytes", self._kv.used(cached), np.int64)
        add("kv_cache_dense_bytes", self._kv.dense(cached), np.int64)
        if len(self._rows) > 1:
            add("batch_index", i, np.int32)
        if asked.log_probs:
            add("cum_log_probs", row.cum_log_prob, np.float32)
            add("output_log_probs", log_probs, np.float32, (1, 1, len(log_probs)))
        if asked.num_input_tokens:
            add("num_input_tokens", len(prompt), np.int32)
        if asked.num_output_tokens:
            add("num_output_tokens", len(tokens), np.int32)
        if asked.perf_metrics:
            job = row.job
            for name, blocks in (("alloc_new", 1), ("reused", 0), ("alloc_total", 1)):
                add(f"kv_cache_{name}_blocks", blocks, np.int32)  # a slot is one block
            add("arrival_time_ns", job.arrival_ns, np.int64)
            add("first_scheduled_time_ns", job.scheduled_ns, np.int64)
            add("first_token_time_ns", job.first_token_ns, np.int64)
            add("last_token_time_ns", job.last_token_ns, np.int64)
            add("acceptance_rate", 0.0, np.float32)
            add("total_accepted_draft_tokens", 0, np.int32)
            add("total_draft_tokens", 0, np.int32)
        return out
