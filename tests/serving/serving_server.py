"""Servers for tests: started on free ports, gone at the end whatever happens to the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import serving_rig
from serving_model import Reference

from trt_razor.engine import Engine
from trt_razor.serving.repository import RepositoryOptions, write_repository
from trt_razor.serving.server import TritonServer, find_server

MODELS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


def write(engine: Engine, output: Path, **options: Any) -> Path:
    """The repository of an engine."""
    return write_repository(engine.directory, output, RepositoryOptions(**options))


@dataclass
class Server:
    """A server that runs: the urls "host:port" of its three ports."""

    triton: TritonServer

    @property
    def http(self) -> str:
        return self.triton.http

    @property
    def grpc(self) -> str:
        return self.triton.grpc

    @property
    def metrics(self) -> str:
        return self.triton.metrics

    @property
    def pid(self) -> int:
        assert self.triton.process is not None
        return int(self.triton.process.pid)

    def stubs(self, model: str = "") -> list[int]:
        """Process ids of the instances of a Python model, or of all."""
        return [pid for name, pid in serving_rig.stubs(self.pid) if model in ("", name)]

    def read(self) -> serving_rig.Metrics:
        return serving_rig.Metrics.read(self.metrics)

    def check_good(self, reference: Reference, prompt: str = "hello", seed: int = 5) -> None:
        """A sampled answer is right."""
        values = {"temperature": 1.2, "top_k": 30, "seed": seed}
        expected = reference.run(prompt, max_new_tokens=20, **values)
        body = {"text_input": prompt, "max_tokens": 20, **values}
        answer = serving_rig.generate(self.http, "ensemble", body)
        assert answer["text_output"] == expected.text


@contextlib.contextmanager
def running(
    repository: Path, python: Path, variables: Mapping[str, str] | None = None, **options: Any
) -> Iterator[Server]:
    """A server over a repository, ready; killed in the end, for Triton takes a second for each Python
    model to stop (test_stop.py has that).

    Args:
        variables: more of its environment. options: of TritonServer.
    """
    binary = find_server(python)
    environment = {**binary.environment, **(variables or {})}
    triton = TritonServer(repository, replace(binary, environment=environment), **options)
    triton.start()
    try:
        assert triton.process is not None
        with guarded(triton.process.pid):
            triton.wait_ready(60)
            yield Server(triton)
    finally:
        triton.stop(0)


@contextlib.contextmanager
def guarded(group: int) -> Iterator[None]:
    """Kills a process group should this process end without leaving the context (kill -9 too)."""
    assert os.getpgid(group) == group != os.getpgid(0)
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(group)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        guard.send_signal(signal.SIGKILL)
        guard.communicate()
