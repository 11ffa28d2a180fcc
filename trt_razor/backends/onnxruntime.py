"""ONNX Runtime on the CPU: the embedded default. The attention is the operator's function body.

The caches are NumPy arrays owned here and bound as both input and output of the graph: they are
updated in place, and their bytes are the planner's to the byte.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.backends.base import EngineOptions, Progress, check_pass
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.files import write_bytes_atomic
from trt_razor.graph.options import weight_bytes
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec

# These two rewrite shape arithmetic. The graph orders the write of a cache after its last read by
# such arithmetic (graph/operator.py), so they stay away.
SPAN_STEP = 128
DISABLED_OPTIMIZERS = ["ShapeInputMerge", "ReshapeFusion"]


def import_onnxruntime() -> Any:
    """The onnxruntime module, or a clear error that names the extra."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "onnxruntime", "running an ONNX engine") from None
    return onnxruntime


_workers: dict[int, ThreadPoolExecutor] = {}


def _on_worker(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a call on the one thread of this process that makes and runs sessions, and wait for it.

    A session that treats denormal numbers as zero switches the processor to that on the thread
    that makes it. That must not be the caller's thread: his own arithmetic would change.
    """
    worker = _workers.get(os.getpid())  # a forked process has no threads yet
    if worker is None:
        worker = _workers.setdefault(
            os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")
        )
    return worker.submit(call, *args, **kwargs).result()


def _run(session: Any, io: Any, *memory: object) -> None:
    """Run a binding. It knows addresses only: ``memory`` keeps the arrays alive until the run ends,
    also when Ctrl-C has made the caller give up waiting."""
    session.run_with_iobinding(io)


class OrtSession:
    """A loaded graph with its caches.

    Args:
        graph: path of ``model.onnx``; its weights are mapped, not read.
        caches: the cache tensors of the graph (``planner.cache_tensors``).
        num_slots: sequences that can be cached at the same time.
        max_seq_len: capacity of a slot in tokens.
        threads: worker threads; None = all cores.

    Raises:
        RazorError: the graph cannot be loaded or does not have the expected caches.
    """

    def __init__(
        self,
        graph: Path,
        caches: Sequence[CacheTensor],
        num_slots: int,
        max_seq_len: int,
        threads: int | None = None,
    ) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # Trained heads are sharp: most softmax weights are denormal numbers, which cost a CPU several
        # times as much as others and add nothing.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            self._session = _on_worker(
                ort.InferenceSession,
                str(graph),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED_OPTIMIZERS,
            )
        except Exception as e:  # onnxruntime raises bare classes of its own
            first = str(e).splitlines()[0][:300]
            raise RazorError(f"{graph}: ONNX Runtime cannot load this graph: {first}") from None
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len
        self.vocab_size = int(self._session.get_outputs()[0].shape[2])
        self._check_caches(graph, caches)
        # Zeros, not garbage: a masked row has weight 0, and 0 · NaN would still be NaN.
        self._caches: dict[str, np.ndarray] = {
            t.name: np.zeros((num_slots, *t.shape), t.dtype) for t in caches
        }
        for name, array in self._caches.items():
            if name.startswith("comp_log_weight"):
                array.fill(-np.inf)
        # Rows of a slot from here on are as they were at the start, time by time or all of a ring.
        self._written = [0] * num_slots
        self._reserved = {t.name: t.reserved for t in caches}
        self._bindings: dict[tuple[int, int], Any] = {}

    def _check_caches(self, graph: Path, caches: Sequence[CacheTensor]) -> None:
        found = {i.name: list(i.shape[1:]) for i in self._session.get_inputs()[5:]}
        expected = {t.name: list(t.shape) for t in caches}
        if found != expected:
            odd = sorted(
                k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)
            )
            raise RazorError(
                f"{graph}: cache tensor {odd[0]}: expected shape {expected.get(odd[0])}, found "
                f"{found.get(odd[0])}; rebuild the engine"
            )

    @property
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated."""
        return sum(a.nbytes for a in self._caches.values())

    def cache(self, name: str) -> np.ndarray:
        """A cache tensor [num_slots, …]; shared memory, not a copy."""
        return self._caches[name]

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""
        end, self._written[slot] = self._written[slot], 0
        for name, array in self._caches.items():
            if name.startswith(("full_", "local_")):
                array[slot, :, : end + self._reserved[name]] = (
                    0  # clearing tens of megabytes would hold the others up
                )
            else:
                array[slot] = -np.inf if name.startswith("comp_log_weight") else 0

    def forward(
        self,
        first_slot: int,
        tokens: np.ndarray,
        past: np.ndarray,
        chunk: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """See ``backends.base.Session.forward``."""
        check_pass(self, first_slot, tokens, past, chunk, logits_index)
        rows, length = tokens.shape
        for i, n in enumerate(past):
            slot = first_slot + i
            # An idle row is written, too, behind its last token.
            self._written[slot] = max(self._written[slot], int(n) + length)
        io = self._binding(first_slot, first_slot + rows)
        # Rounded up: few distinct shapes, so the executor's per-shape work is done once.
        span = min(-(-max(1, int(np.max(past))) // SPAN_STEP) * SPAN_STEP, self.max_seq_len)
        feeds = {
            "input_ids": np.ascontiguousarray(tokens, np.int32),
            "past": np.ascontiguousarray(past, np.int32),
            "chunk": np.ascontiguousarray(chunk, np.int32),
            "past_span": np.zeros(span, np.int8),
            "logits_index": np.ascontiguousarray(logits_index, np.int32),
        }
        for name, value in feeds.items():
            io.bind_cpu_input(name, value)
        logits = np.empty((rows, logits_index.shape[1], self.vocab_size), np.float32)
        io.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        _on_worker(_run, self._session, io, feeds, logits, self._caches)
        return logits

    def _binding(self, lo: int, hi: int) -> Any:
        """Bindings of the caches of slots lo..hi-1, each array as input and as output."""
        if (lo, hi) not in self._bindings:
            io = self._session.io_binding()
            for name, array in self._caches.items():
                view = array[lo:hi]
                where = ("cpu", 0, array.dtype.type, view.shape, view.ctypes.data)
                io.bind_input(name, *where)
                io.bind_output(f"{name}_out", *where)
            self._bindings[lo, hi] = io
        return self._bindings[lo, hi]


class OnnxRuntimeBackend:
    """Exports the graph; ONNX Runtime runs it as it is."""

    name = "onnxruntime"

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """See ``Backend.check``."""
        options.validate(spec)
        if options.graph.dtype == "bfloat16":
            raise UsageError(
                "dtype bfloat16: ONNX Runtime has no bfloat16 matrix product on the CPU; use "
                "--dtype float32, or --backend tensorrt-rtx"
            )

    def build(
        self, checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
    ) -> dict[str, str]:
        """See ``Backend.build``."""
        ort = import_onnxruntime()
        flatten(write_graph(checkpoint, options, staging, progress))
        return {"onnxruntime": ort.__version__, "target": "cpu"}

    def open(
        self, directory: Path, caches: Sequence[CacheTensor], num_slots: int, max_seq_len: int
    ) -> OrtSession:
        """See ``Backend.open``."""
        return OrtSession(directory / "model.onnx", caches, num_slots, max_seq_len)


def flatten(graph: Path) -> None:
    """Inline the operator's body into a graph file and merge what all layers compute alike.

    ONNX Runtime would inline it at every start, more slowly, and repeat the index arithmetic of
    each layer in each step.
    """
    import onnx

    from trt_razor.graph.inline import inline_graph

    model = inline_graph(onnx.load(graph, load_external_data=False), in_place=True)
    write_bytes_atomic(graph, model.SerializeToString(deterministic=True))


def write_graph(
    checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
) -> Path:
    """``model.onnx`` with its weights, with progress in bytes."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtra("onnx", "onnx", "building an ONNX graph")
    from trt_razor.graph.decoder import export_decoder

    total, done = weight_bytes(checkpoint.spec, options.graph.dtype), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        progress("weights", min(done, total), total)

    return export_decoder(checkpoint, options.graph, staging, count)
