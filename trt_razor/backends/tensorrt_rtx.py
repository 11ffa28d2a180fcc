"""TensorRT for RTX: engines built ahead of time by the real TensorRT builder, without a GPU.

The graph is exported, inlined (graph/inline.py) and compiled; the engine file holds the weights.
See docs/tensorrt-rtx.md for what was measured and what could not be checked without an RTX GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_razor.backends.base import EngineOptions, Progress
from trt_razor.backends.onnxruntime import write_graph
from trt_razor.backends.rtx_builder import build_in_child
from trt_razor.errors import MissingExtra
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

TARGETS = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
"""Compute capabilities an engine is built for, and the builder's names of them. Not 7.5: it has
no float32 matrix product there, which compensation needs."""
MAX_LOGITS = 128
"""Most tokens of a chunk whose logits can be asked for: workspace grows by them times the
vocabulary. Generation wants one; evaluation reads its text in chunks of this length."""
PROFILES = ("context", "generation")


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
        """See ``Backend.build``. Writes ``model.engine`` and ``io.json``.

        Raises:
            RazorError: the parser or the builder failed; the message has their first error.
        """
        trt = import_tensorrt_rtx("building a TensorRT-RTX engine")
        scratch = staging / "graph"
        scratch.mkdir()
        try:
            graph = write_graph(checkpoint, options, scratch, progress)
            _inline_file(graph)
            progress("engine", 0, 0)
            found = build_in_child(
                graph, staging / ENGINE_FILE, list(TARGETS.values()), profile_shapes(options)
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        facts = {
            "schema": IO_SCHEMA,
            "version": IO_VERSION,
            "tensorrt_rtx": trt.__version__,
            "targets": list(TARGETS),
            "profiles": list(PROFILES),
            "max_batch_size": options.max_batch_size,
            "max_seq_len": options.graph.max_seq_len,
            "max_chunk": options.max_chunk,
            "max_logits": max_logits(options),
            **found,
        }
        write_text_atomic(staging / IO_FILE, json.dumps(facts, indent=1) + "\n")
        return {
            "tensorrt_rtx": trt.__version__,
            "target": ", ".join(TARGETS),
            "layers": str(found["layers"]),
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
