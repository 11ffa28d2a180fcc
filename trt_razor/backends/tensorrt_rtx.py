"""TensorRT for RTX: engines built ahead of time by the real TensorRT builder, without a GPU.

The graph is exported, inlined (graph/inline.py) and compiled; the engine file holds the weights.
See docs/tensorrt-rtx.md for what was measured and what could not be checked without an RTX GPU.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trt_razor.backends.base import EngineOptions, Progress
from trt_razor.backends.onnxruntime import write_graph
from trt_razor.errors import MissingExtra, RazorError
from trt_razor.files import write_text_atomic
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.planner import CacheTensor

if TYPE_CHECKING:
    from trt_razor.backends.rtx_session import RtxSession

ENGINE_FILE = "model.engine"
IO_FILE = "io.json"
IO_SCHEMA = "trt_razor.rtx_io"
IO_VERSION = 1

TARGETS = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capabilities an engine is built for, and the builder's names of them."""
MAX_LOGITS = 128
"""Most tokens of a chunk whose logits can be asked for: workspace grows by them times the
vocabulary. Generation wants one; evaluation reads its text in chunks of this length."""
PROFILES = ("context", "generation")

_T = TypeVar("_T")


def import_tensorrt_rtx(why: str) -> Any:
    """The tensorrt_rtx module, or a clear error that names the extra."""
    try:
        import tensorrt_rtx
    except ImportError:
        raise MissingExtra("tensorrt-rtx", "tensorrt-rtx", why) from None
    return tensorrt_rtx


class TensorRtRtxBackend:
    """Exports the graph and compiles it with TensorRT for RTX."""

    name = "tensorrt-rtx"

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """See ``Backend.check``. Every dtype, head map and policy builds."""
        options.validate(spec)
        import_tensorrt_rtx("building a TensorRT-RTX engine")

    def build(
        self, checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
    ) -> dict[str, str]:
        """See ``Backend.build``. Writes ``model.engine`` and ``io.json``; Ctrl-C stops the builder.

        Raises:
            RazorError: the parser or the builder failed; the message has their first error.
        """
        trt = import_tensorrt_rtx("building a TensorRT-RTX engine")
        scratch = staging / "graph"
        scratch.mkdir()
        try:
            graph = write_graph(checkpoint, options, scratch, progress)
            _inline_file(graph)
            builder = _Builder(trt, options, progress)
            plan = _interruptible(lambda: builder.build(graph), builder.cancel)
            with open(staging / ENGINE_FILE, "wb") as f:
                f.write(memoryview(plan))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_text_atomic(staging / IO_FILE, json.dumps(builder.facts, indent=1) + "\n")
        return {
            "tensorrt_rtx": trt.__version__,
            "target": ", ".join(TARGETS),
            "layers": str(builder.facts["layers"]),
            "profiles": ", ".join(PROFILES),
        }

    def open(
        self, directory: Path, caches: Sequence[CacheTensor], num_slots: int, max_seq_len: int
    ) -> RtxSession:
        """See ``Backend.open``. Needs an RTX GPU."""
        from trt_razor.backends.rtx_session import RtxSession

        return RtxSession(directory, caches, num_slots, max_seq_len)


def _inline_file(path: Path) -> None:
    """Replace a graph file by its inlined form; the weights beside it stay where they are."""
    import onnx

    from trt_razor.graph.inline import inline_graph

    model = inline_graph(onnx.load(path, load_external_data=False))
    path.write_bytes(model.SerializeToString(deterministic=True))


class _Builder:
    """One run of parser and builder.

    Attributes:
        facts: what ``io.json`` says, once ``build`` has returned. Written down here because an
            engine cannot be loaded, and so not asked, on a machine without a GPU.
    """

    def __init__(self, trt: Any, options: EngineOptions, progress: Progress) -> None:
        self.trt = trt
        self.options = options
        self.progress = progress
        self.facts: dict[str, Any] = {}
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Make ``build`` stop soon; may be called from another thread."""
        self._cancelled.set()

    def build(self, graph: Path) -> Any:
        """The serialised engine, an object with the buffer protocol."""
        trt, errors = self.trt, collect_errors(self.trt)
        # The order matters: TensorRT's objects must live longer than what was made from them.
        builder = trt.Builder(errors)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, errors)
        self.progress("parse", 0, 0)
        if not parser.parse_from_file(str(graph)):
            found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise RazorError(_failure("parser", found or errors.messages))
        config = builder.create_builder_config()
        config.num_compute_capabilities = len(TARGETS)
        for i, target in enumerate(TARGETS.values()):
            config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        for shapes in profile_shapes(self.options):
            profile = builder.create_optimization_profile()
            for tensor in inputs:
                rest = tuple(tensor.shape)[1:]
                low, best, high = (s.get(tensor.name, (s["past"][0], *rest)) for s in shapes)
                profile.set_shape(tensor.name, low, best, high)
            if config.add_optimization_profile(profile) < 0:
                raise RazorError(_failure("builder", errors.messages))
        monitor = _monitor(trt, self.progress, self._cancelled)
        config.progress_monitor = monitor
        self.facts = {
            "schema": IO_SCHEMA,
            "version": IO_VERSION,
            "tensorrt_rtx": trt.__version__,
            "targets": list(TARGETS),
            "layers": network.num_layers,
            "profiles": list(PROFILES),
            "max_batch_size": self.options.max_batch_size,
            "max_seq_len": self.options.graph.max_seq_len,
            "max_chunk": self.options.max_chunk,
            "max_logits": max_logits(self.options),
            "inputs": [_tensor_facts(t) for t in inputs],
            "outputs": [_tensor_facts(t) for t in outputs],
        }
        plan = None
        if not self._cancelled.is_set():
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RazorError(
                "building the TensorRT-RTX engine was interrupted"
                if self._cancelled.is_set()
                else _failure("builder", errors.messages)
            )
        return plan


def max_logits(options: EngineOptions) -> int:
    """Most tokens of one chunk whose logits an engine gives."""
    return min(options.max_chunk, MAX_LOGITS)


def profile_shapes(options: EngineOptions) -> list[list[dict[str, tuple[int, ...]]]]:
    """Per profile the smallest, the best and the largest shape of every small input.

    The caches have the batch of ``past`` and are fixed otherwise. ``context`` takes chunks of any
    length, ``generation`` one token a row.
    """

    def shapes(batch: int, seq: int, span: int, wanted: int) -> dict[str, tuple[int, ...]]:
        return {
            "input_ids": (batch, seq),
            "past": (batch,),
            "chunk": (batch,),
            "past_span": (span,),
            "logits_index": (batch, wanted),
        }

    batch, chunk, length = options.max_batch_size, options.max_chunk, options.graph.max_seq_len
    half = max(1, length // 2)
    return [
        [
            shapes(1, 1, 1, 1),
            shapes(1, chunk, half, 1),
            shapes(batch, chunk, length, max_logits(options)),
        ],
        [shapes(1, 1, 1, 1), shapes(batch, 1, half, 1), shapes(batch, 1, length, 1)],
    ]


def _tensor_facts(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def collect_errors(trt: Any) -> Any:
    """A TensorRT logger that prints nothing and keeps error messages in ``messages``."""

    class Errors(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= trt.ILogger.Severity.ERROR.value:
                self.messages.append(message)

    return Errors()


def _failure(part: str, messages: list[str]) -> str:
    text = " ".join(messages[0].split())[:300] if messages else "no reason given"
    return f"TensorRT-RTX's {part} refused the graph: {text}"


def _monitor(trt: Any, progress: Progress, cancelled: threading.Event) -> Any:
    """Progress of the builder in thousandths, and the way to stop it."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Phases nest; a phase is one step of its parent. Called from several threads."""

        def __init__(self) -> None:
            super().__init__()
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int]] = {}  # name → parent, steps
            self._done: dict[str, float] = {}
            self._shown = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases[phase_name] = (parent_phase, max(1, num_steps))
                self._done[phase_name] = 0.0

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._done[phase_name] = step + 1.0
                share = 0.0
                name: str | None = phase_name
                while name is not None and name in self._phases:
                    parent, steps = self._phases[name]
                    share = min(1.0, (self._done[name] + share) / steps)
                    name = parent
                now = int(1000 * share)
                shown, self._shown = self._shown, max(self._shown, now)
            if now > shown:
                progress("engine", now, 1000)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.pop(phase_name, None)
                self._done.pop(phase_name, None)

    return Monitor()


def _interruptible(work: Callable[[], _T], cancel: Callable[[], None]) -> _T:
    """Run ``work`` in a thread, so that Ctrl-C reaches Python while native code runs.

    On an interrupt ``cancel`` is called and the work waited for before the interrupt goes on: what
    the work reads may be deleted after that.
    """
    result: list[_T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=run, name="tensorrt-rtx-builder", daemon=True)
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        cancel()
        if thread.is_alive():
            thread.join()
        raise
    if error:
        raise error[0]
    return result[0]
