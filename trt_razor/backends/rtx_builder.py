"""The TensorRT-RTX builder in a process of its own.

The builder works for a minute inside a few native calls that nothing can interrupt, and a graph it
does not like may abort the process. As a child it can be ended at any moment, takes nobody with it,
and gives its memory back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError

Shapes = Mapping[str, Sequence[int]]


def build_in_child(
    graph: Path, engine: Path, targets: Sequence[str], profiles: Sequence[Sequence[Shapes]]
) -> dict[str, Any]:
    """Parse and compile a graph in a child process, which writes the engine file.

    Args:
        graph: an ONNX file without local functions; its weights lie beside it.
        engine: the file to create.
        targets: names of ``tensorrt_rtx.ComputeCapability``.
        profiles: per optimisation profile the smallest, the best and the largest shapes by input
            name; an input without a shape has the batch of ``past`` and is fixed otherwise.

    Returns:
        ``layers``: layers of the network; ``inputs`` and ``outputs``: name, dtype, shape of each.
        Taken at build time, because an engine cannot be asked on a machine without a GPU.

    Raises:
        RazorError: the parser or the builder refused the graph (their first error), the child
            died, or the engine cannot be written.
    """
    job = {
        "graph": str(graph),
        "engine": str(engine),
        "targets": list(targets),
        "profiles": profiles,
        "parent": os.getpid(),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", "from trt_razor.backends.rtx_builder import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    try:
        out, err = child.communicate(json.dumps(job).encode())
    finally:
        child.kill()
        child.wait()
    try:
        answer = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        lines = err.decode(errors="replace").strip().splitlines()
        raise RazorError(
            f"the TensorRT-RTX builder died (exit status {child.returncode}): "
            f"{lines[-1][:300] if lines else 'out of memory?'}"
        ) from None
    if "error" in answer:
        raise RazorError(answer["error"])
    facts: dict[str, Any] = answer
    return facts


def main() -> None:
    """The child: a job on stdin, one line of JSON on stdout."""
    job = json.load(sys.stdin)
    threading.Thread(target=_exit_with, args=(job["parent"],), daemon=True).start()
    try:
        answer = _compile(job)
    except RazorError as e:
        answer = {"error": str(e)}
    except OSError as e:
        answer = {"error": f"{job['engine']}: cannot write: {e.strerror}"}
    print("\n" + json.dumps(answer), flush=True)


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _compile(job: Mapping[str, Any]) -> dict[str, Any]:
    import tensorrt_rtx as trt

    logger = collect_errors(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["graph"]):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RazorError(_failure("parser", found or logger.messages))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(job["targets"])
    for i, target in enumerate(job["targets"]):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            rest = list(tensor.shape)[1:]
            low, best, high = (s.get(tensor.name, [s["past"][0], *rest]) for s in shapes)
            profile.set_shape(tensor.name, low, best, high)
        if config.add_optimization_profile(profile) < 0:
            raise RazorError(_failure("builder", logger.messages))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RazorError(_failure("builder", logger.messages))
    with open(job["engine"], "wb") as f:
        f.write(memoryview(plan))
    return {
        "layers": network.num_layers,
        "inputs": [_tensor_facts(t) for t in inputs],
        "outputs": [_tensor_facts(t) for t in outputs],
    }


def _tensor_facts(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _failure(part: str, messages: list[str]) -> str:
    return f"TensorRT-RTX's {part} refused the graph: {first_line(messages)}"


def first_line(messages: list[str]) -> str:
    """The first message on one line."""
    return " ".join(messages[0].split())[:300] if messages else "no reason given"


def collect_errors(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps error messages in ``messages``."""

    class Errors(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.ERROR.value:
                self.messages.append(message)

    return Errors()
