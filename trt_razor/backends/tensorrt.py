"""TensorRT: our ONNX graph, attention by the plugin ``RazorAttention``, caches updated in place.

The graph is the one every backend exports: nodes of our operator with their function body. TensorRT's
parser takes the plugin instead of the body when it is told to (10.15 and newer). Engines are built
on the GPU they run on. See docs/tensorrt.md for what has been run and what has not.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file
from trt_razor.kernels.layer import DTYPES, HEAD_DIMS
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec

if TYPE_CHECKING:
    from trt_razor.backends.tensorrt_session import TensorRtSession

TENSORRT = Flavour(
    product="TensorRT",
    module="tensorrt",
    package="tensorrt",
    extra="tensorrt",
    schema="trt_razor.tensorrt_io",
    version=1,
    instead="run it on the kind of GPU it was built on, or build it there",
)
OLDEST = (10, 15)
"""First version whose parser prefers a plugin to the function body of its name."""
PLUGIN_VARIABLE = "TRT_RAZOR_PLUGIN"


class TensorRtBackend:
    """Exports the graph and compiles it with TensorRT and the RazorAttention plugin."""

    name = "tensorrt"

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """See ``Backend.check``: what the plugin has no kernel for, versions, the library, a GPU."""
        options.validate(spec)
        if options.graph.dtype not in DTYPES:
            raise UsageError(
                f"dtype: expected {' or '.join(DTYPES)} for --backend tensorrt, found "
                f"{options.graph.dtype}"
            )
        if spec.head_dim not in HEAD_DIMS:
            raise UsageError(
                f"{spec.name}: head_dim: the plugin has kernels for "
                f"{', '.join(map(str, HEAD_DIMS))}, found {spec.head_dim}; build with "
                "--backend onnxruntime or tensorrt-rtx"
            )
        find_plugin(import_tensorrt("building a TensorRT engine"))
        gpu_capability()

    def build(
        self, checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
    ) -> dict[str, str]:
        """See ``Backend.build``. Writes ``model.engine`` and ``io.json``. Needs a GPU.

        Raises:
            RazorError: no GPU, or the parser or the builder failed; the message has their first
                error.
        """
        trt = import_tensorrt("building a TensorRT engine")
        plugin = find_plugin(trt)
        capability = gpu_capability()
        scratch = staging / "graph"
        scratch.mkdir()
        try:
            graph = write_graph(checkpoint, options, scratch, progress)
            progress("engine", 0, 0)
            found = build_in_child(
                TENSORRT.module,
                graph,
                staging / ENGINE_FILE,
                profile_shapes(options),
                plugin=plugin,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        facts = {
            "targets": [capability],
            "plugin": plugin.name,
            "plugin_sha256": sha256_file(plugin),
        }
        write_facts(staging, TENSORRT, trt.__version__, options, {**facts, **found})
        return {
            "tensorrt": trt.__version__,
            "target": capability,
            "plugin": plugin.name,
            "plugin_sha256": facts["plugin_sha256"],
            "layers": str(found["layers"]),
            "profiles": ", ".join(PROFILES),
        }

    def open(
        self, directory: Path, caches: Sequence[CacheTensor], num_slots: int, max_seq_len: int
    ) -> TensorRtSession:
        """See ``Backend.open``. Needs the GPU the engine was built for."""
        from trt_razor.backends.tensorrt_session import TensorRtSession

        return TensorRtSession(directory, caches, num_slots, max_seq_len)


def import_tensorrt(why: str) -> Any:
    """The tensorrt module of a version that can build and run our engines."""
    trt = import_module(TENSORRT, why)
    if version_of(trt) < OLDEST:
        raise UsageError(
            f"tensorrt: expected version {OLDEST[0]}.{OLDEST[1]} or newer, found {trt.__version__}: "
            "older parsers cannot put a plugin in the place of a function"
        )
    return trt


def version_of(trt: Any) -> tuple[int, int]:
    """(major, minor) of a tensorrt module."""
    found = str(getattr(trt, "__version__", None))
    match = re.match(r"(\d+)\.(\d+)", found)
    if match is None:
        raise RazorError(f"tensorrt: expected a version such as 10.16.1, found {found[:60]!r}")
    return int(match[1]), int(match[2])


def plugin_name(major: int) -> str:
    """File name of the plugin library for a major version of TensorRT: their ABIs differ."""
    return f"libtrt_razor_plugins_trt{major}.so"


def find_plugin(trt: Any) -> Path:
    """The plugin library for this TensorRT.

    ``$TRT_RAZOR_PLUGIN``, else beside the package's kernels, else in a checkout's build folder.

    Raises:
        RazorError: there is none; the message says where it was looked for and how to make it.
    """
    name = plugin_name(version_of(trt)[0])
    chosen = os.environ.get(PLUGIN_VARIABLE)
    if chosen:
        path = Path(chosen)
        if not path.is_file():
            raise RazorError(
                f"${PLUGIN_VARIABLE}: expected the file {name}, found "
                f"{'a folder' if path.is_dir() else 'nothing'} at '{path}'"
            )
        if path.name != name and re.fullmatch(r"libtrt_razor_\w+_trt\d+\.so", path.name):
            raise RazorError(
                f"${PLUGIN_VARIABLE}: expected {name} for TensorRT {trt.__version__}, found '{path}'"
            )
        return path
    package = Path(__file__).resolve().parents[1]
    build = package.parent / "build"
    built = sorted(build.glob(f"plugins/tensorrt/{name}")) + sorted(
        build.glob(f"*/plugins/tensorrt/{name}")
    )
    for place in (package / "kernels" / name, *built):
        if place.is_file():
            return place
    raise RazorError(
        f"{name}: not found in {package / 'kernels'} or {build}; make it with "
        f"`make plugin TENSORRT_ROOT=…`, or name it in ${PLUGIN_VARIABLE}"
    )


def gpu_capability() -> str:
    """Compute capability of the current GPU, e.g. ``9.0``. Raises RazorError without one."""
    from trt_razor.backends.cuda import Cuda, import_cudart

    cuda = Cuda(import_cudart("building a TensorRT engine", TENSORRT.extra))
    try:
        return cuda.capability()
    except RazorError as e:
        raise RazorError(
            f"--backend tensorrt builds on a GPU ({e}); build where the engine shall run, or with "
            "--backend onnxruntime or tensorrt-rtx here"
        ) from None
