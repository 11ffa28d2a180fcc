"""The Python model ``tensorrt_llm`` outside a server: loaded over a strict stand-in for Triton."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from fake_triton import FakeTriton, Request, Sender

from trt_razor.engine import Engine
from trt_razor.generate import Completion, Generator, SamplingParams


@contextmanager
def imported(triton: FakeTriton) -> Iterator[Any]:
    """trt_razor.serving.models.engine, imported over the stand-in."""
    names = ("triton_python_backend_utils", "trt_razor.serving.models.engine")
    before = {n: sys.modules.pop(n, None) for n in names}
    sys.modules[names[0]] = triton  # type: ignore[assignment]
    try:
        yield importlib.import_module(names[1])
    finally:
        for n, m in before.items():
            sys.modules.pop(n, None)
            if m is not None:
                sys.modules[n] = m


class Served:
    """A loaded model and what its engine gives by itself."""

    def __init__(self, module: Any, triton: FakeTriton, engine: Engine, **parameters: str) -> None:
        self.triton, self.engine = triton, engine
        self.model = module.TritonPythonModel()
        given = {"gpt_model_path": str(engine.directory), **parameters}
        self.args = arguments(given)
        self.model.initialize(self.args)

    def __call__(self, *requests: Request, wait: bool = True) -> list[Sender]:
        assert self.model.execute(list(requests)) is None
        senders = [r.sender for r in requests]
        for s in senders if wait else ():
            assert s.ended.wait(20)
        return senders

    def one(self, **tensors: Any) -> Sender:
        return self(ask(**tensors))[0]

    def expected(self, prompt: list[int], params: SamplingParams) -> Completion:
        m, tokenizer = self.engine.manifest, self.engine.tokenizer()
        assert tokenizer is not None
        ends = {*m.spec.eos_token_ids, *tokenizer.eos_token_ids}
        return Generator(self.engine.open(1), m.prefill_chunk, ends, tokenizer).run(
            [prompt], params
        )[0]

    def metric(self, name: str, **labels: str) -> float:
        return self.triton.metric(name, **labels)


def arguments(parameters: dict[str, str], **config: Any) -> dict[str, str]:
    given = {
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"count": 1}],
        "parameters": {k: {"string_value": v} for k, v in parameters.items()},
        **config,
    }
    return {
        "model_config": json.dumps(given),
        "model_repository": "/repository/tensorrt_llm",
        "model_name": "tensorrt_llm",
        "model_version": "1",
    }


def ask(prompt: list[int] | None = None, count: int = 6, **tensors: Any) -> Request:
    """A request for one row; arrays are taken as they are, other values become the right ones."""
    ids = [5, 6, 7] if prompt is None else prompt
    kinds: dict[type, Any] = {int: np.int32, float: np.float32, bool: np.bool_}
    given: dict[str, Any] = {
        "input_ids": np.array([ids], np.int32),
        "input_lengths": len(ids),
        "request_output_len": count,
        **{k: v for k, v in tensors.items() if k not in ("id", "outputs", "parameters")},
    }
    return Request(
        {
            k: v if isinstance(v, np.ndarray) else np.array([v], kinds[type(v)])
            for k, v in given.items()
        },
        tensors.get("id", ""),
        tensors.get("outputs", ()),
        tensors.get("parameters", "{}"),
    )


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)
