"""TensorRT for RTX: engines built ahead of time by the real TensorRT builder, without a GPU.

The graph is exported, inlined (graph/inline.py) and compiled; the engine file holds the weights.
See docs/tensorrt-rtx.md for what was measured and what could not be checked without an RTX GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trt_razor.backends.base import EngineOptions, Progress
from trt_razor.backends.onnxruntime import write_graph
from trt_razor.backends.trt_builder import build_in_child
from trt_razor.backends.trt_engine import (
    ENGINE_FILE,
    PROFILES,
    Flavour,
    import_module,
    profile_shapes,
    write_facts,
)
from trt_razor.cache_layout import CacheTensor
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec

if TYPE_CHECKING:
    from trt_razor.backends.rtx_session import RtxSession

RTX = Flavour(
    product="TensorRT-RTX",
    module="tensorrt_rtx",
    package="tensorrt-rtx",
    extra="tensorrt-rtx",
    schema="trt_razor.rtx_io",
    version=1,
    instead="run it on an RTX GPU, or build with --backend onnxruntime",
)
TARGETS = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
"""Compute capabilities an engine is built for, and the builder's names of them. Not 7.5: it has
no float32 matrix product there, which compensation needs."""


class TensorRtRtxBackend:
    """Exports the graph and compiles it with TensorRT for RTX."""

    name = "tensorrt-rtx"

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """See ``Backend.check``. Every dtype, head map and policy builds."""
        options.validate(spec)
        import_module(RTX, "building a TensorRT-RTX engine")

    def build(
        self, checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
    ) -> dict[str, str]:
        """See ``Backend.build``. Writes ``model.engine`` and ``io.json``.

        Raises:
            RazorError: the parser or the builder failed; the message has their first error.
        """
        trt = import_module(RTX, "building a TensorRT-RTX engine")
        scratch = staging / "graph"
        scratch.mkdir()
        try:
            graph = write_graph(checkpoint, options, scratch, progress)
            _inline_file(graph)
            progress("engine", 0, 0)
            found = build_in_child(
                RTX.module,
                graph,
                staging / ENGINE_FILE,
                profile_shapes(options),
                targets=list(TARGETS.values()),
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        write_facts(staging, RTX, trt.__version__, options, {"targets": list(TARGETS), **found})
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
