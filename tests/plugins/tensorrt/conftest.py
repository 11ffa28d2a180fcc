"""The TensorRT plugins over the CPU shim, built against a stand-in for TensorRT's headers and, where
TENSORRT_ROOT says so, against the real ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from plugin_build import HERE, Build, build_plugins

if TYPE_CHECKING:
    from fake_host import Host


@pytest.fixture(scope="session")
def stand_in(shim_library: Path) -> Build:
    """Built against fake_trt/."""
    # Beside the shim library that it links: another place of that means another folder here.
    return build_plugins(shim_library.parent / "plugins-stand-in", HERE / "fake_trt", shim_library)


@pytest.fixture(scope="session")
def real(shim_library: Path) -> Build:
    """Built against the headers of a TensorRT."""
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("TENSORRT_ROOT is not set: a folder with TensorRT's include/NvInferRuntime.h")
    folders = [f for f in (Path(root, "include"), Path(root)) if (f / "NvInferRuntime.h").is_file()]
    if not folders:
        pytest.fail(f"TENSORRT_ROOT={root}: expected include/NvInferRuntime.h, found none")
    include = folders[0].resolve()
    name = "-".join(include.parts[-3:-1] if include.name == "include" else include.parts[-2:])
    return build_plugins(shim_library.parent / f"plugins-{name}", include, shim_library)


@pytest.fixture(scope="session", params=["stand-in", "TENSORRT_ROOT"])
def build(request: pytest.FixtureRequest) -> Build:
    """Built against either kind of headers."""
    fixture = "stand_in" if request.param == "stand-in" else "real"
    found: Build = request.getfixturevalue(fixture)
    return found


@pytest.fixture(scope="session")
def host(build: Build) -> Host:
    from fake_host import Host

    return Host(build.folder / "libfake_host.so", build.plugins)
