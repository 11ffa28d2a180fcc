"""``start.sh`` of a repository: variables that say what this engine is, then a fixed script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TEMPLATES = Path(__file__).with_name("templates")
START_SCRIPT = "start.sh"

_HEADER = """\
#!/usr/bin/env bash
# Starts Triton Inference Server with this repository: bash start.sh [options of tritonserver]
#
# ADDRESS (127.0.0.1), HTTP_PORT (8000), GRPC_PORT (8001), METRICS_PORT (8002)   where it listens
# TRITONSERVER               the server; else /opt/tritonserver/bin/tritonserver, or the one of PATH
# TRT_RAZOR_TRITON_PYTHON    runs the Python models; else python3 of PATH
"""
_HEADER_OWN = """\
#
# The server inside the Python package nvidia-pytriton is taken where there is no other, and before
# others if TRT_RAZOR_TRITON_PYTHON has it.
"""
_HEADER_TRTLLM = """\
# TRITON_BACKENDS            folder of the backends; else beside the server
# RAZOR_PRELOAD              library that servers of Razor engines load; else that of trt_razor
# MPIRUN, MPI_ARGS           mpirun, and options for it (hosts, -x NAME); NO_MPI=1: one rank without
"""
_HERE = 'here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)\n'


@dataclass(frozen=True)
class PythonNeeds:
    """What the Python models import: modules to look for, and what to give pip for them."""

    modules: Sequence[str]
    packages: Sequence[str]


@dataclass(frozen=True)
class RankFacts:
    """What the servers of a TensorRT-LLM engine need.

    Attributes:
        world_size: ranks. preload, plugin: names of our libraries; empty for a dense engine.
        plugin_sha256: of the plugins that the engine was built with; empty = not known.
    """

    world_size: int
    preload: str = ""
    plugin: str = ""
    plugin_sha256: str = ""


def own_script(engine: str, needs: PythonNeeds, gpu: bool) -> str:
    """The script of an engine of ours.

    Args:
        engine: absolute path for the server, or relative to the folder ``tensorrt_llm``.
        gpu: whether the engine runs on a GPU; otherwise the server does not look for one.
    """
    lines = _HERE + _variables({"engine": engine}, needs)
    common = _template("start_common.sh")
    if not gpu:
        common += "arguments+=(--allow-gpu-metrics=false)\n"
    return _HEADER + _HEADER_OWN + _SET + lines + common + _template("start_own.sh")


def trtllm_script(engine: str, needs: PythonNeeds, ranks: RankFacts) -> str:
    """The script of a TensorRT-LLM engine. ``engine``: as of ``own_script``."""
    values = {
        "engine": engine,
        "world_size": str(ranks.world_size),
        "preload_name": ranks.preload,
        "plugin_name": ranks.plugin,
        "plugin_sha256": ranks.plugin_sha256,
    }
    lines = _HERE + _variables(values, needs)
    body = _template("start_common.sh") + _template("start_trtllm.sh")
    return _HEADER + _HEADER_TRTLLM + _SET + lines + body


_SET = "set -euo pipefail\n\n"


def _variables(values: Mapping[str, str], needs: PythonNeeds) -> str:
    lines = []
    for name, value in values.items():
        quoted = shlex.quote(value)
        if name == "engine" and not value.startswith("/"):
            quoted = f'"$here"/tensorrt_llm/{quoted}'
        lines.append(f"{name}={quoted}\n")
    lines.append(f"python_modules=({' '.join(map(shlex.quote, needs.modules))})\n")
    packages = " ".join(f"'{p}'" for p in needs.packages)  # as a user would type it
    lines.append(f'python_packages="{packages}"\n')
    return "".join(lines)


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
