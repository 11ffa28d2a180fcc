"""Builds the engine of one rank with TensorRT-LLM, in a process of its own: see ``driver``.

``python -m trt_razor.trtllm.build_rank`` takes a job as JSON on standard input and answers with one
line of JSON on standard output. All that TensorRT-LLM prints goes to standard error.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_razor.errors import RazorError, UsageError
from trt_razor.trtllm.engine_config import SECTION
from trt_razor.trtllm.engine_json import with_local_cache
from trt_razor.trtllm.release import LocalCache

TIMING_CACHE = "model.cache"
"""Measured times of kernels, which TensorRT-LLM leaves in the working folder after rank 0."""


def main() -> None:
    """The child: a job on stdin, one line of JSON on stdout."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    try:
        result = build_rank(job)
    except RazorError as e:
        result = {"error": str(e), "usage": isinstance(e, UsageError)}
    except Exception as e:  # whatever TensorRT-LLM throws
        traceback.print_exc()
        result = {"failure": f"{type(e).__name__}: {e}"}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    print(json.dumps(result, default=str), file=answer, flush=True)
    os._exit(0)  # all is written; taking TensorRT-LLM and MPI down is slow, and may fail


def _end_with(parent: int) -> None:
    """Ends this process and all it has started (MPI's daemon) when the parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def build_rank(job: Mapping[str, Any]) -> dict[str, Any]:
    """Build and save an engine.

    Args:
        job: ``config``, file of the checkpoint's config.json; ``checkpoint``, its folder, or None
            for made-up weights; ``output``, folder; ``rank``; ``local_cache``, name for a Razor
            engine, None for a dense one; ``build_config`` and ``plugin_config`` as in BuildArguments;
            ``report``, names of fields of ``pretrained_config``.

    Returns:
        ``tensorrt_llm``, ``tensorrt``: versions. ``reported``: the fields asked for, as the model
        has them after the build.

    Raises:
        RazorError: what TensorRT-LLM said no to, as far as we can tell it better than it does.
    """
    rank = job["rank"]
    llm = _module("tensorrt_llm")
    modeling = _module("tensorrt_llm.models.modeling_utils")
    builder = _module("tensorrt_llm.builder")
    config = modeling.PretrainedConfig.from_json_file(job["config"])
    config.set_rank(rank)
    razor = job["local_cache"] is not None
    if razor:
        cache = LocalCache[job["local_cache"]]
        setattr(config, SECTION, with_local_cache(getattr(config, SECTION), cache))
    model_class = _module("trt_razor.trtllm.models").model_class(config.architecture, razor)
    if job["checkpoint"] is None:
        model = model_class(config)
    else:
        model = model_class.from_checkpoint(job["checkpoint"], config=config)
    arguments = build_config(builder.BuildConfig, job["build_config"], rank)
    plugins = plugin_config(_module("tensorrt_llm.plugin.plugin").PluginConfig(), job)
    engine = builder.build(model, builder.BuildConfig(**arguments, plugin_config=plugins))
    if engine is None or engine.engine is None:
        raise RazorError(f"rank {rank}: TensorRT-LLM's builder made no engine and gave no reason")
    engine.save(job["output"])
    pretrained = engine.config.pretrained_config.to_dict()
    return {
        "tensorrt_llm": llm.__version__,
        "tensorrt": _module("tensorrt").__version__,
        "reported": {name: pretrained.get(name) for name in job["report"]},
    }


def build_config(cls: Any, wanted: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Keyword arguments for ``BuildConfig``, whatever it is in this release.

    Ranks after the first have the same kernels to time: they begin with the times of rank 0.

    Raises:
        RazorError: this release does not know one of them.
    """
    known = inspect.signature(cls).parameters
    for name in wanted:
        if name not in known:
            raise RazorError(
                f"tensorrt_llm: BuildConfig: expected '{name}', which it does not have"
            )
    arguments = dict(wanted)
    if rank and "input_timing_cache" in known and Path(TIMING_CACHE).is_file():
        arguments["input_timing_cache"] = TIMING_CACHE
    return arguments


def plugin_config(config: Any, job: Mapping[str, Any]) -> Any:
    """Set what the job wants on a ``PluginConfig``, whose constructor takes nothing in 1.0.

    Raises:
        RazorError: this release lacks what shall be switched on. What shall be off may be missing.
    """
    for name, value in job["plugin_config"].items():
        if hasattr(config, name):
            setattr(config, name, value)
        elif value:
            raise RazorError(
                f"tensorrt_llm: PluginConfig: expected '{name}', which it does not have"
            )
    return config


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:  # OSError: a library it loads is missing
        raise RazorError(f"{name}: cannot be imported: {e}") from e


if __name__ == "__main__":
    main()
