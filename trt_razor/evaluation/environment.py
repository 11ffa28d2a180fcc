"""Where numbers come from: versions and the machine's processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trt_razor import __version__

PACKAGES = ("numpy", "torch", "transformers", "onnxruntime")


def describe(runners: Sequence[str]) -> dict[str, Any]:
    """JSON values for a report: what computed, which versions, on what.

    Args:
        runners: their labels.
    """
    versions = {"trt_razor": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "runners": list(dict.fromkeys(runners)),
        "versions": versions,
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system tells it."""
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
