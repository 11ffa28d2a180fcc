"""Triton's Python interface as far as the models use it, for tests without a server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import TEMPLATE, byte_tokenizer_json

from trt_razor.models.tokenizer import Tokenizer

FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = 1, 3, 4, 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert values.dtype.kind in "iufbO", values.dtype
        assert values.flags["C_CONTIGUOUS"]
        self._name, self._values = name, values

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values


class InferenceResponse:
    def __init__(self, output_tensors: Iterable[Tensor] = (), error: Any = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Any:
        return self._error

    def arrays(self) -> dict[str, np.ndarray]:
        assert not self.has_error(), self._error.message()
        return {t.name(): t.as_numpy() for t in self._tensors}


class Sender:
    """Keeps what a model sends; asking it after the final flag would end the real server."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.final = threading.Event()
        self.cancelled = False
        self.asked = 0

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response after the final flag"
        if response is not None:
            self.responses.append(response)
        if flags & FINAL:
            self.final.set()

    def is_cancelled(self) -> bool:
        assert not self.final.is_set(), "is_cancelled after the final flag: the server would die"
        self.asked += 1
        return self.cancelled

    def wait(self) -> list[InferenceResponse]:
        assert self.final.wait(20), "no final flag"
        return self.responses

    def error(self) -> str:
        last = self.wait()[-1]
        assert last.has_error()
        return str(last.error().message())


class Request:
    """A client's request; arrays by name."""

    def __init__(self, outputs: Iterable[str] = (), **inputs: Any) -> None:
        self._inputs = {n: Tensor(n, v) for n, v in inputs.items()}
        self._outputs = set(outputs)
        self.sender = Sender()

    def inputs(self) -> list[Tensor]:
        return list(self._inputs.values())

    def get(self, name: str) -> Tensor | None:
        return self._inputs.get(name)

    def requested_output_names(self) -> set[str]:
        return self._outputs

    def get_response_sender(self) -> Sender:
        return self.sender


Answer = Callable[["ModelRequest"], Iterator[InferenceResponse]]


class ModelRequest:
    """A request from one model to another: ``models`` answers it."""

    def __init__(self, models: Mapping[str, Answer], **fields: Any) -> None:
        self._models = models
        self.model: str = fields["model_name"]
        self.id: str = fields["request_id"]
        self.outputs: list[str] = fields["requested_output_names"]
        self.tensors = {t.name(): t.as_numpy() for t in fields["inputs"]}

    def exec(self, decoupled: bool = False) -> Any:
        answers = self._models[self.model](self)
        return answers if decoupled else next(answers)


def install(monkeypatch: pytest.MonkeyPatch, models: Mapping[str, Answer] | None = None) -> Any:
    """Put the interface where the models import it from; requests to other models go to
    ``models``. Returns what was logged as errors."""
    errors: list[str] = []
    pb: Any = ModuleType("triton_python_backend_utils")
    for kind in (TritonModelException, TritonError, Tensor, InferenceResponse):
        setattr(pb, kind.__name__, kind)
    pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    pb.TRITONSERVER_MEMORY_CPU = 0
    pb.PreferredMemory = lambda kind, number: (kind, number)
    pb.get_input_tensor_by_name = lambda request, name: request.get(name)
    pb.InferenceRequest = lambda **fields: ModelRequest(models or {}, **fields)
    pb.Logger = SimpleNamespace(log_error=errors.append)
    monkeypatch.setitem(sys.modules, pb.__name__, pb)
    return errors


def arguments(
    folder: Path, outputs: Iterable[str] = (), decoupled: bool = True, **parameters: str
) -> dict[str, str]:
    """What a model's ``initialize`` gets."""
    config = {
        "parameters": {k: {"string_value": v} for k, v in parameters.items()},
        "output": [{"name": n} for n in outputs],
        "model_transaction_policy": {"decoupled": decoupled},
    }
    return {"model_config": json.dumps(config), "model_repository": str(folder)}


def strings(*rows: str | bytes | list[str | bytes]) -> np.ndarray:
    """A string tensor [rows, elements]."""
    data = [[x] if isinstance(x, (str, bytes)) else x for x in rows]
    result = np.empty((len(data), len(data[0])), object)
    for i, row in enumerate(data):
        result[i] = [x.encode() if isinstance(x, str) else x for x in row]
    return result


def ints(*rows: int) -> np.ndarray:
    """An int32 tensor [rows, 1]."""
    return np.array([[r] for r in rows], np.int32)


def save_tokenizer(
    folder: Path | None,
    named: Mapping[str, str] | None = None,
    ends: tuple[int, ...] = (),
    template: str | None = TEMPLATE,
) -> Tokenizer:
    """A tokenizer of bytes; <s> 256 stands before every text, </s> 257 ends, <pad> 258 fills."""
    data = json.loads(byte_tokenizer_json())
    last = data["added_tokens"][-1]
    data["added_tokens"].append({**last, "id": 258, "content": "<pad>"})
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, text],
        "pair": [start, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    if named is None:
        named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(json.dumps(data), named, 256, ends, template, "test")
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer
