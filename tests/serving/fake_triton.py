"""Stands for ``triton_python_backend_utils`` outside a server: tensors, senders, metrics.

Strict where the real one would take the server down: a sender after its final flag, a metric call
with a wrong name, label or number.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        assert isinstance(value, np.ndarray)
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE = range(5)

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class TritonModelException(Exception):
    pass


class Response:
    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self.tensors = {t.name(): t.as_numpy() for t in output_tensors}
        self.error = error


class Sender:
    """Keeps what was sent; ``ended`` is set with the final flag."""

    def __init__(self) -> None:
        self.responses: list[Response] = []
        self.ended = threading.Event()
        self.gone = False
        self.misuse: list[str] = []
        self.threads: set[str] = set()

    def send(self, response: Response | None = None, flags: int = 0) -> None:
        self._check("send")
        if response is not None:
            self.responses.append(response)
        if flags:
            self.ended.set()

    def is_cancelled(self) -> bool:
        self._check("is_cancelled")
        return self.gone

    def _check(self, what: str) -> None:
        self.threads.add(threading.current_thread().name)
        if self.ended.is_set():
            self.misuse.append(f"{what} after the final flag")
            raise RuntimeError(self.misuse[-1])

    @property
    def errors(self) -> list[str]:
        return [str(r.error) for r in self.responses if r.error]

    def ids(self, row: int | None = None) -> list[int]:
        """Token ids of all responses, or of those of one row of a batch."""
        out: list[int] = []
        for r in self.responses:
            if row is None or r.tensors["batch_index"].item() == row:
                out += r.tensors["output_ids"].reshape(-1).tolist()
        return out

    def text(self) -> str:
        return b"".join(r.tensors["text_output"][0] for r in self.responses).decode()


class Request:
    def __init__(
        self,
        tensors: Mapping[str, Any],
        request_id: str = "",
        outputs: Sequence[str] = (),
        parameters: str = "{}",
    ) -> None:
        self._tensors = [Tensor(n, np.asarray(v)) for n, v in tensors.items()]
        self._id, self._outputs, self._parameters = request_id, set(outputs), parameters
        self.sender = Sender()

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def request_id(self) -> str:
        return self._id

    def requested_output_names(self) -> set[str]:
        return self._outputs

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Sender:
        return self.sender


class FakeTriton:
    """The module itself. Metrics outlive the models that made them, as in a server."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Tensor, TritonError, TritonModelException = Tensor, TritonError, TritonModelException
    InferenceResponse = Response

    def __init__(self) -> None:
        self.calls = 0
        values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        kinds: dict[str, int] = {}
        self._values = values
        triton = self

        class Metric:
            def __init__(self, name: str, kind: int, labels: dict[str, str]) -> None:
                assert all(re.fullmatch(r"[a-zA-Z_]\w*", k) for k in labels)
                assert all(isinstance(v, str) for v in labels.values())
                self.key = (name, frozenset(labels.items()))
                self.kind = kind
                values.setdefault(self.key, 0.0)

            def increment(self, value: float) -> None:
                assert 0 <= value < math.inf
                triton.calls += 1
                values[self.key] += value

            def set(self, value: float) -> None:
                assert self.kind == MetricFamily.GAUGE
                assert math.isfinite(value)
                triton.calls += 1
                values[self.key] = value

        class MetricFamily:
            COUNTER, GAUGE = 0, 1

            def __init__(self, name: str, description: str, kind: int) -> None:
                assert re.fullmatch(r"trt_razor_[a-z_]+", name)
                assert kinds.setdefault(name, kind) == kind
                self.name, self.kind = name, kind

            def Metric(self, labels: dict[str, str]) -> Metric:
                return Metric(self.name, self.kind, labels)

        self.MetricFamily = MetricFamily

    def metric(self, name: str, **labels: str) -> float:
        """Value of a metric of model tensorrt_llm, version 1."""
        key = frozenset({"model": "tensorrt_llm", "version": "1", **labels}.items())
        return self._values[f"trt_razor_{name}", key]

    @staticmethod
    def using_decoupled_model_transaction_policy(config: dict[str, Any]) -> bool:
        return bool(config.get("model_transaction_policy", {}).get("decoupled"))
