"""What a process needs before it runs a TensorRT-LLM engine: ranks, bindings, our plugin, the log."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trt_razor.backends.tensorrt import find_plugin
from trt_razor.engine import MANIFEST
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file
from trt_razor.manifest import read_manifest
from trt_razor.trtllm.options import PLUGIN
from trt_razor.trtllm.release import NoTensorRtLlm

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_OTHER_LAUNCHERS = ("PMIX_RANK", "SLURM_PROCID")


def import_bindings() -> Any:
    """``tensorrt_llm.bindings.executor``; importing the package registers its own plugins first."""
    try:
        return importlib.import_module("tensorrt_llm.bindings.executor")
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] == "tensorrt_llm":
            raise NoTensorRtLlm from None
        raise RazorError(f"tensorrt_llm: cannot be imported: {first_line(e)}") from None
    except (ImportError, OSError) as e:
        raise RazorError(f"tensorrt_llm: cannot be imported: {first_line(e)}") from None


def is_registered(trt: Any) -> bool:
    """Whether the process has RazorGptAttention. Asking for it would log an error where it has not."""
    creators = trt.get_plugin_registry().all_creators
    return any((c.name, c.plugin_version, c.plugin_namespace) == PLUGIN for c in creators)


def load_plugin(directory: Path) -> None:
    """Register RazorGptAttention in this process, unless a preloaded library did already.

    Raises:
        RazorError: no plugin library, one that TensorRT refuses, or another one than the engine in
            ``directory`` was built with.
    """
    trt: Any = importlib.import_module("tensorrt")
    if is_registered(trt):
        return
    library = find_plugin(trt)
    wanted = _built_with(directory)
    if wanted is not None and (found := sha256_file(library)) != wanted:
        raise RazorError(
            f"{library}: sha256: expected {wanted[:12]}…, the plugin that {directory} was built with, found "
            f"{found[:12]}…; rebuild the engine, or name its library in $TRT_RAZOR_PLUGIN"
        )
    trt.get_plugin_registry().load_library(str(library))
    if not is_registered(trt):
        raise RazorError(
            f"{library}: TensorRT {trt.__version__} found no {PLUGIN[0]} in it; make it again for this "
            "TensorRT with `make plugin TENSORRT_ROOT=…`"
        )


def _built_with(directory: Path) -> str | None:
    """sha256 of the plugin that an engine was built with; None if there is no manifest of ours."""
    try:
        data = read_manifest(directory / MANIFEST)
    except (OSError, RazorError):
        return None
    facts = data.get("facts") if isinstance(data, dict) else None
    found = facts.get("plugin_sha256") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else None


def check_world(expected: int) -> None:
    """Refuse to start with another number of processes than the engine has ranks.

    Raises:
        UsageError: as far as the launcher says how many there are.
    """
    found = next((os.environ[name] for name in _SIZES if name in os.environ), None)
    if found is None and (expected == 1 or any(name in os.environ for name in _OTHER_LAUNCHERS)):
        return
    if found != str(expected):
        raise UsageError(
            f"ranks: expected {expected} processes for this engine, found {found or 1}; start with: mpirun "
            f"-n {expected} --allow-run-as-root python3 …"
        )


@contextlib.contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Everything that this process prints, also from C++, goes to a file and to standard error.

    By a process of its own: whoever prints may hold Python's lock, and a crash must not lose lines.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [os.dup(fd) for fd in (1, 2)]
    tee = subprocess.Popen(["tee", "--", str(path)], stdin=subprocess.PIPE, stdout=saved[1])
    assert tee.stdin is not None
    try:
        for fd in (1, 2):
            os.dup2(tee.stdin.fileno(), fd)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for fd, old in zip((1, 2), saved, strict=True):
            os.dup2(old, fd)
            os.close(old)
        tee.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child of ours may hold the pipe
            tee.wait(5)


def first_line(error: object) -> str:
    """The first line of a C++ exception: what follows is a stack trace."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:300]
