"""The builder of TensorRT, or of TensorRT for RTX, in a process of its own.

The builder works for a minute inside a few native calls that nothing can interrupt, and a graph it
does not like may abort the process. As a child it can be ended at any moment, takes nobody with it,
and gives its memory back.
"""

from __future__ import annotations

import importlib
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

PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Python modules and what messages call them."""


def build_in_child(
    module: str,
    graph: Path,
    engine: Path,
    profiles: Sequence[Sequence[Shapes]],
    targets: Sequence[str] = (),
    plugin: Path | None = None,
) -> dict[str, Any]:
    """Parse and compile a graph in a child process, which writes the engine file.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        graph: an ONNX file; its weights lie beside it. For TensorRT-RTX without local functions.
        engine: the file to create.
        profiles: per optimisation profile the smallest, the best and the largest shapes by input
            name; an input without a shape has the batch of ``past`` and is fixed otherwise.
        targets: names of ``tensorrt_rtx.ComputeCapability``; none = the GPU that is here.
        plugin: a library of TensorRT plugins. Nodes with a plugin of their name become plugin
            layers, whose outputs may alias inputs.

    Returns:
        ``layers``: layers of the network; ``inputs`` and ``outputs``: name, dtype, shape of each.
        Taken at build time, because an engine cannot be asked on a machine without a GPU.

    Raises:
        RazorError: the plugin library cannot be loaded, the parser or the builder refused the graph
            (their first error), the child died, or the engine cannot be written.
    """
    job = {
        "module": module,
        "graph": str(graph),
        "engine": str(engine),
        "targets": list(targets),
        "profiles": profiles,
        "plugin": str(plugin) if plugin else "",
        "parent": os.getpid(),
    }
    child = subprocess.Popen(
        [sys.executable, "-c", "from trt_razor.backends.trt_builder import main; main()"],
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
            f"the {PRODUCTS[module]} builder died (exit status {child.returncode}): "
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
    trt = importlib.import_module(job["module"])
    product = PRODUCTS[job["module"]]
    logger = collect_errors(trt)
    if job["plugin"]:
        _load_plugins(trt, job["plugin"], logger)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # how the bindings say null: no GPU, no driver
        raise RazorError(
            f"{product}'s builder cannot start: {first_line(logger.messages)}"
        ) from None
    network = builder.create_network(_network_flags(trt))
    config = builder.create_builder_config()
    try:
        parser = trt.OnnxParser(network, logger)
    except TypeError:
        raise RazorError(
            f"{product}'s parser cannot start: {first_line(logger.messages)}"
        ) from None
    if job["plugin"]:
        # The plugin rather than the function body the graph brings along, and caches in place.
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if not parser.parse_from_file(job["graph"]):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RazorError(_failure(product, "parser", found or logger.messages))
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    if job["targets"]:
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
            raise RazorError(_failure(product, "builder", logger.messages))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RazorError(_failure(product, "builder", logger.messages))
    with open(job["engine"], "wb") as f:
        f.write(memoryview(plan))
    return {
        "layers": network.num_layers,
        "inputs": [_tensor_facts(t) for t in inputs],
        "outputs": [_tensor_facts(t) for t in outputs],
    }


def _tensor_facts(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _network_flags(trt: Any) -> int:
    """Strongly typed: tensors have the dtypes the graph says. Newer versions know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _load_plugins(trt: Any, library: str, logger: Any) -> None:
    if trt.get_plugin_registry().load_library(library) is None:
        raise RazorError(f"{library}: cannot be loaded: {first_line(logger.messages)}")


def _failure(product: str, part: str, messages: list[str]) -> str:
    return f"{product}'s {part} refused the graph: {first_line(messages)}"


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
