"""Builds the engines of all ranks with TensorRT-LLM, each in a process of its own.

A build takes many minutes inside native calls that nothing can interrupt, and needs the GPU's and the
host's memory for itself. As a child it can be ended at any moment and gives its memory back. The
children run one after another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_razor.backends.base import Progress
from trt_razor.console import TRACEBACK_ENV
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.stored import read_json
from trt_razor.trtllm.arguments import BuildArguments
from trt_razor.trtllm.build_rank import TIMING_CACHE
from trt_razor.trtllm.engine_config import RazorPlan
from trt_razor.trtllm.engine_json import check_rank_files, finish, read_config
from trt_razor.trtllm.options import CONFIG
from trt_razor.trtllm.runtime_fields import check_engine_json

LOG = "build.log"
_LINE = 300
# "[date] [TRT] [E] message" of TensorRT and of TensorRT-LLM's Python, "[TensorRT-LLM][ERROR] message" of
# its C++.
_ERROR_LINE = re.compile(r"\[(?:TRT|TRT-LLM|TensorRT-LLM)\] ?\[(?:E|F|ERROR|FATAL)\] ?(.+)")


def build_engines(
    config: Path,
    checkpoint: Path | None,
    output: Path,
    arguments: BuildArguments,
    plan: RazorPlan | None,
    progress: Progress,
) -> dict[str, str]:
    """Write ``config.json`` and ``rank{N}.engine`` of all ranks.

    Args:
        config: config.json of the checkpoint. checkpoint: its folder; None = TensorRT-LLM makes the
            weights up.
        output: an existing folder. When anything fails, it is left as it was.
        plan: of a Razor engine; None = a dense one.

    Returns:
        for the manifest: ``tensorrt_llm`` and ``tensorrt`` (versions), ``engine_bytes``.

    Raises:
        RazorError: the first error that TensorRT-LLM or we had, with the rank it happened on.
            With TRT_RAZOR_TRACEBACK=1 all that was printed goes to standard error.
    """
    before = set(output.iterdir())
    try:
        return _build(config, checkpoint, output, arguments, plan, progress)
    except BaseException:
        if os.environ.get(TRACEBACK_ENV):
            sys.stderr.write(_read(output / LOG))
        for path in set(output.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        raise


def _build(
    config: Path,
    checkpoint: Path | None,
    output: Path,
    arguments: BuildArguments,
    plan: RazorPlan | None,
    progress: Progress,
) -> dict[str, str]:
    told = read_json(config, "the config.json of a TensorRT-LLM checkpoint")
    world_size = _world_size(told, plan, config)
    expected = {} if plan is None else _reported(plan, told)
    job = {
        "config": str(config.resolve()),
        "checkpoint": None if checkpoint is None else str(checkpoint.resolve()),
        "output": str(output.resolve()),
        "local_cache": None if plan is None else plan.local_cache.name,
        "build_config": arguments.build_config(),
        "plugin_config": arguments.plugin_config(),
        "report": list(expected),
        "parent": os.getpid(),
    }
    facts: dict[str, str] = {}
    for rank in range(world_size):
        progress("engine", rank, world_size)
        answer = _run({**job, "rank": rank}, output)
        _check_model(rank, expected, answer["reported"])
        facts = {name: str(answer[name]) for name in ("tensorrt_llm", "tensorrt")}
    if plan is None:
        check_engine_json(read_config(output), None, str(output / CONFIG))
    else:
        finish(output, plan)
    size = check_rank_files(output, world_size)
    for name in (TIMING_CACHE, LOG):
        (output / name).unlink(missing_ok=True)
    progress("engine", world_size, world_size)
    return {**facts, "engine_bytes": str(size)}


def _world_size(config: Mapping[str, Any], plan: RazorPlan | None, where: Path) -> int:
    mapping = config.get("mapping")
    sizes = [mapping.get(n, 1) for n in ("tp_size", "pp_size")] if isinstance(mapping, dict) else []
    if not sizes or not all(type(n) is int and 1 <= n <= 1024 for n in sizes):
        raise UsageError(f"{where}: mapping: expected tp_size and pp_size, found {mapping!r:.80}")
    if plan is not None and sizes != [plan.tp_size, plan.pp_size]:
        raise UsageError(
            f"{where}: mapping: expected tp_size {plan.tp_size} and pp_size {plan.pp_size}, found "
            f"{sizes[0]} and {sizes[1]}; convert the checkpoint again"
        )
    tp_size, pp_size = sizes
    return int(tp_size * pp_size)


def _reported(plan: RazorPlan, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the model must say of itself after the build: all that the plan puts into its config."""
    names = plan.pretrained_config({})
    said = plan.pretrained_config(config)
    fields: dict[str, Any] = json.loads(json.dumps({name: said[name] for name in names}))
    return fields


def _check_model(rank: int, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """The model plans its caches on its own, from the checkpoint's config.json: to the same end."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise RazorError(
                f"rank {rank}: {name}: planned {json.dumps(value):.200}, but the model was built with "
                f"{json.dumps(found.get(name)):.200}; convert the checkpoint again with this version"
            )


# The child ----------------------------------------------------------------------------------------
def _run(job: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """One rank in a child, which is gone when this returns or raises."""
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
    log = output / LOG
    start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "trt_razor.trtllm.build_rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            cwd=output,  # where TensorRT-LLM drops files
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # to end whatever it starts with it
        )
    try:
        out, _ = child.communicate(json.dumps(job).encode())
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return _answer(job["rank"], out, child.returncode, _read(log, start))


def _answer(rank: int, out: bytes, status: int, log: str) -> dict[str, Any]:
    error = _ERROR_LINE.search(log)
    first = error[1] if error else ""
    try:
        answer: dict[str, Any] = json.loads(out)
    except ValueError:
        lines = log.strip().splitlines()
        reason = first or (lines[-1] if lines else "")
        if status == -signal.SIGKILL and not first:  # its last words are chatter
            reason = f"killed: host out of memory? It last said: {reason or 'nothing'}"
        raise RazorError(
            f"rank {rank}: TensorRT-LLM's builder died (exit status {status}): {_short(reason)}"
        ) from None
    if "error" in answer:
        raise (UsageError if answer["usage"] else RazorError)(answer["error"])
    if "failure" in answer:
        reason = " - ".join(_short(text) for text in (first, answer["failure"]) if text)
        raise RazorError(f"rank {rank}: TensorRT-LLM's builder failed: {reason}")
    return answer


def _read(log: Path, start: int = 0) -> str:
    try:
        with log.open("rb") as f:
            f.seek(start)
            return f.read().decode(errors="replace")
    except OSError:
        return ""


def _short(text: str) -> str:
    return " ".join(text.split())[:_LINE]
