"""A stand-in for Triton's ``tensorrtllm`` backend: its interface without TensorRT-LLM or a GPU.

A folder ``tensorrtllm`` with this file among the server's backends makes an unedited configuration
with ``backend: "tensorrtllm"`` load. Parameters, engine folder and requests are read as the stock
backend reads them; the answer is the prompt over and over (standin_tokens.py).

Environment of the server:
    TRT_RAZOR_STANDIN_RECORD: a folder; what was understood at load goes there as rank{N}.json.
    TRT_RAZOR_STANDIN_STEP: seconds between tokens; 0.002.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

sys.path.insert(0, str(Path(__file__).resolve().parent))
from standin_engine import read_engine
from standin_parameters import Refused, read
from standin_requests import Asked, BadRequest, read_request
from standin_tokens import log_prob, reply

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass
class _Row:
    """A sequence that is generated."""

    asked: Asked
    tokens: Any
    arrival: int
    out: list[int] = field(default_factory=list)
    sent: int = 0
    first: int = 0
    last: int = 0
    done: bool = False


@dataclass
class _Active:
    """A request. Only the executor's thread touches its sender."""

    request_id: str
    sender: Any
    wanted: frozenset[str]
    rows: list[_Row]
    cancelled: bool = False
    next_check: float = 0.0


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        world = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        try:
            self.settings = read(config.get("parameters", {}))
            preloaded = os.environ.get("LD_PRELOAD", "")
            self.engine = read_engine(self.settings, rank, world, preloaded)
            if config["max_batch_size"] > self.engine.max_batch_size:
                raise Refused(
                    f"max_batch_size: the engine has {self.engine.max_batch_size}, the model "
                    f"{config['max_batch_size']}"
                )
        except Refused as e:
            raise pb_utils.TritonModelException(str(e)) from None
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.inputs = [i["name"] for i in config["input"]]
        self.check_every = self.settings["cancellation_check_period_ms"] / 1000
        self.step_seconds = float(os.environ.get("TRT_RAZOR_STANDIN_STEP", "0.002"))
        if folder := os.environ.get("TRT_RAZOR_STANDIN_RECORD"):
            record = {
                "rank": rank,
                "world_size": world,
                "decoupled": self.decoupled,
                "model_name": args["model_name"],
                "preloaded": preloaded,
                "settings": self.settings,
                "engine": asdict(self.engine),
            }
            (Path(folder) / f"rank{rank}.json").write_text(json.dumps(record))
        self.ended = Path(folder) / "ended" if folder else None
        if rank > 0:
            _wait_for(self.ended)
        self.active: list[_Active] = []
        self.figures = _Figures(args["model_name"], args["model_version"])
        self.condition = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def finalize(self) -> None:
        with self.condition:
            self.closing = True
            self.condition.notify()
        self.thread.join(5)
        if self.ended is not None:
            self.ended.touch()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except BadRequest as e:
                sender.send(_error(str(e)), flags=FINAL)
            except Exception as e:
                sender.send(_error(f"{type(e).__name__}: {e}"), flags=FINAL)

    def _take(self, request: Any, sender: Any) -> None:
        tensors = {}
        for name in self.inputs:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                tensors[name] = tensor.as_numpy()
        request_id = request.request_id()
        if "stop" in tensors and bool(np.ravel(tensors["stop"])[0]):
            if not request_id:
                raise BadRequest("stop: expected a request id, found none")
            with self.condition:
                for active in self.active:
                    active.cancelled |= active.request_id == request_id
            sender.send(pb_utils.InferenceResponse(output_tensors=[]), flags=FINAL)
            return
        engine = self.engine
        rows = read_request(
            tensors,
            self.decoupled,
            self.settings["exclude_input_in_output"],
            engine.max_input_len,
            engine.max_seq_len,
            engine.vocab_size,
        )
        now = time.monotonic_ns()
        made = [
            _Row(
                a, reply(a.prompt, a.max_tokens, a.end_id, a.stop, a.bad, a.min_tokens), arrival=now
            )
            for a in rows
        ]
        wanted = frozenset(request.requested_output_names())
        with self.condition:
            self.active.append(_Active(request_id, sender, wanted, made))
            self.condition.notify()

    # The executor ---------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self.condition:
                while not self.active and not self.closing:
                    self.condition.wait()
                if self.closing:
                    return
                batch = list(self.active)
            time.sleep(self.step_seconds)
            self.figures.show(len(batch))
            for active in batch:
                try:
                    ended = self._step(active)
                except Exception as e:
                    message = f"Error encountered while populating response: {e}"
                    active.sender.send(_error(message), flags=FINAL)
                    ended = True
                if ended:
                    with self.condition:
                        self.active.remove(active)
                        self.figures.show(len(self.active))

    def _step(self, active: _Active) -> bool:
        """One token for each row; True when the request has had its last response."""
        if time.monotonic() >= active.next_check:
            active.next_check = time.monotonic() + self.check_every
            active.cancelled |= active.sender.is_cancelled()
        for index, row in enumerate(active.rows):
            if row.done:
                continue
            token = None if active.cancelled else next(row.tokens, None)
            if token is not None:
                row.last = time.monotonic_ns()
                row.first = row.first or row.last
                row.out.append(token)
                self.figures.tokens.increment(1)
                row.done = len(row.out) == row.asked.max_tokens
            else:
                row.done = True
            final = all(r.done for r in active.rows)
            if row.asked.streaming or row.done:
                response = pb_utils.InferenceResponse(self._outputs(active, index))
                active.sender.send(response, flags=FINAL if final else 0)
            if final:
                return True
        return False

    def _outputs(self, active: _Active, index: int) -> list[Any]:
        row = active.rows[index]
        asked, new = row.asked, row.out[row.sent :]
        row.sent = len(row.out)
        for name in ("output_ids", "sequence_length"):
            if name not in active.wanted:
                raise BadRequest(f"{name}: required among the outputs asked for")
        echo = () if asked.streaming or asked.exclude_input else asked.prompt
        ids = [*echo, *new]
        values: dict[str, Any] = {
            "output_ids": np.array([[ids]], np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(ids)]], np.int32),
        }
        optional: dict[str, Any] = {}
        if len(active.rows) > 1:
            optional["batch_index"] = np.array([[index]], np.int32)
        if asked.log_probs:
            each = np.array([[[log_prob(t) for t in new]]], np.float32).reshape(1, 1, -1)
            total = np.array([[sum(log_prob(t) for t in row.out)]], np.float32)
            optional |= {"output_log_probs": each, "cum_log_probs": total}
        if asked.num_input_tokens:
            optional["num_input_tokens"] = np.array([[len(asked.prompt)]], np.int32)
        if asked.num_output_tokens:
            optional["num_output_tokens"] = np.array([[len(ids)]], np.int32)
        values |= {name: value for name, value in optional.items() if name in active.wanted}
        if asked.perf_metrics and row.done:
            values |= self._metrics(row)
        return [pb_utils.Tensor(name, value) for name, value in values.items()]

    def _metrics(self, row: _Row) -> dict[str, Any]:
        size = self.engine.tokens_per_block
        prompt, total = len(row.asked.prompt), len(row.asked.prompt) + len(row.out)
        counts = {
            "kv_cache_alloc_new_blocks": -(-total // size) - prompt // size,
            "kv_cache_reused_blocks": 0,
            "kv_cache_alloc_total_blocks": -(-total // size),
            "total_accepted_draft_tokens": 0,
            "total_draft_tokens": 0,
        }
        times = {
            "arrival_time_ns": row.arrival,
            "first_scheduled_time_ns": row.arrival,
            "first_token_time_ns": row.first,
            "last_token_time_ns": row.last,
        }
        return {
            **{name: np.array([[value]], np.int32) for name, value in counts.items()},
            **{name: np.array([[value]], np.int64) for name, value in times.items()},
            "acceptance_rate": np.zeros((1, 1), np.float32),
        }


class _Figures:
    """Metrics: one of the stock backend's, and how many tokens were made."""

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        family = pb_utils.MetricFamily(
            name="nv_trt_llm_request_metrics",
            description="Requests by state",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        made = pb_utils.MetricFamily(
            name="standin_tokens",
            description="tokens made",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self.families = (family, made)  # metrics end with them
        self.active = family.Metric(labels={**labels, "request_type": "active"})
        self.tokens = made.Metric(labels=labels)
        self.shown = -1

    def show(self, active: int) -> None:
        if active != self.shown:
            self.shown = active
            self.active.set(active)


def _wait_for(ended: Path | None) -> None:
    """What a rank without requests does: it stays in its load until the leader ends."""
    while ended is None or not ended.exists():
        time.sleep(0.1)
    raise pb_utils.TritonModelException("the leader has ended")


def _error(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
