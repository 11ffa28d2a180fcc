"""Backends: one file per way to build or run an engine."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess

from trt_razor.backends.base import Backend
from trt_razor.errors import RazorError, UsageError, did_you_mean

BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt", "tensorrt-llm")


def get_backend(name: str) -> Backend:
    """The backend of a name. Raises UsageError for an unknown one."""
    if name == "onnxruntime":
        from trt_razor.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend()
    if name == "tensorrt-rtx":
        from trt_razor.backends.tensorrt_rtx import TensorRtRtxBackend

        return TensorRtRtxBackend()
    if name == "tensorrt":
        from trt_razor.backends.tensorrt import TensorRtBackend

        return TensorRtBackend()
    if name == "tensorrt-llm":
        from trt_razor.trtllm.backend import TensorRtLlmBackend

        return TensorRtLlmBackend()
    raise UsageError(f"backend '{name}': unknown; {did_you_mean(name, ('auto', *BACKENDS))}")


def choose_backend(requested: str) -> tuple[str, str]:
    """(name, why): the named backend, or for ``auto`` the best one that this machine can run."""
    if requested != "auto":
        return requested, "as asked"
    capability = gpu_capability()
    if capability is None:
        return "onnxruntime", "no NVIDIA GPU found here; it runs on any CPU"
    if _has_tensorrt():
        return "tensorrt", (
            f"a GPU, compute capability {capability}, TensorRT and its plugin are here; running on one "
            "is untested so far, --backend onnxruntime is the safe choice"
        )
    from trt_razor.backends.tensorrt_rtx import TARGETS

    if capability not in TARGETS:
        return "onnxruntime", f"TensorRT for RTX does not run on compute capability {capability}"
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return "onnxruntime", "the package tensorrt-rtx is not installed"
    return "tensorrt-rtx", (
        f"an RTX GPU, compute capability {capability}, is here; running on one is untested so far, "
        f"--backend onnxruntime is the safe choice"
    )


def _has_tensorrt() -> bool:
    """Whether a TensorRT new enough and our plugin library for it are here."""
    if importlib.util.find_spec("tensorrt") is None:
        return False
    from trt_razor.backends.tensorrt import find_plugin, import_tensorrt

    try:
        find_plugin(import_tensorrt("looking for a backend"))
    except RazorError:
        return False
    return True


def gpu_capability() -> str | None:
    """Compute capability of the first GPU by nvidia-smi, or None."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        out = subprocess.run(
            [tool, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.splitlines()[0].strip() if out.strip() else None
