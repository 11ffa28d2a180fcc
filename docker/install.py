#!/usr/bin/env python3
"""Install trt_razor into an image with TensorRT-LLM, changing nothing that is there. The Dockerfile runs it.

Torch, NumPy and the rest of NVIDIA's stack were built for each other, so every package of the image is
pinned while the few that are missing come in, and compared afterwards. The end is a check of what would
otherwise show in the first build of an engine.

Python's own library only: nothing else is certain to be there.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("gguf", "heads")
"""Of pyproject.toml: reading checkpoints of either kind, finding heads and drawing them."""
TOOLS = ("pytest>=8",)
"""For `make test-ngc`."""
KEPT = ("torch",)
"""Never asked for: the image has one, or heads are found elsewhere."""
PLUGINS = "libtrt_razor_plugins_trt10.so"
PRELOAD = "libtrt_razor_preload_trt10.so"
_VERSION = re.compile(
    r"(\d+!)?\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9.]+)?", re.I
)


def requirements(project: Mapping[str, Any]) -> list[str]:
    """What pip is asked for: the core's dependencies and those of ``EXTRAS``, without ``KEPT``."""
    extras = project["optional-dependencies"]
    wanted: list[str] = []

    def add(items: Iterable[str]) -> None:
        for item in items:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[(.+)\]", item)
            if own:
                for extra in own[1].split(","):
                    add(extras[extra])
            elif re.match(r"[\w.-]+", item)[0] not in KEPT and item not in wanted:
                wanted.append(item)

    add(project["dependencies"])
    for extra in EXTRAS:
        add(extras[extra])
    add(TOOLS)
    return wanted


def installed() -> dict[str, str]:
    """Version of every installed distribution. In a process of its own: pip has changed the folders."""
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions():\n"
        "    if d.metadata['Name']: print(d.metadata['Name'], d.version)"
    )
    listing = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    pairs = (line.split(" ", 1) for line in listing.stdout.splitlines())
    found: dict[str, str] = {}
    for name, version in pairs:
        found.setdefault(
            re.sub(r"[-_.]+", "-", name).lower(), version
        )  # the first on the path counts
    return found


def constraints(found: Mapping[str, str]) -> str:
    """A constraints file that pins them all, but for versions that pip cannot read (Debian's)."""
    return "".join(f"{n}=={v}\n" for n, v in sorted(found.items()) if _VERSION.fullmatch(v))


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Packages that were there and are another version now, or gone."""
    return [f"{n} {v} -> {after.get(n, 'gone')}" for n, v in before.items() if after.get(n) != v]


def pip(*arguments: str) -> None:
    """Run ``pip install``. An image's PIP_CONSTRAINT would also bind the setuptools that builds us."""
    environment = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
    environment |= {"PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", *arguments]
    subprocess.run(command, check=True, env=environment)


def install() -> None:
    """Raises SystemExit if a package of the image was touched; CalledProcessError from pip."""
    import tomllib  # Python 3.11; images have 3.12

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    before = installed()
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "installed.txt"
        pins.write_text(constraints(before))
        pip("--constraint", str(pins), *requirements(project))
    pip("--no-deps", "--editable", str(ROOT))
    before.pop(project["name"], None)
    if touched := changes(before, installed()):
        sys.exit(f"error: expected the image's packages as they were, found {'; '.join(touched)}")


def check(libraries: Path) -> str:
    """What has been made, in a line. TensorRT-LLM is not imported: that takes a GPU.

    Raises:
        SystemExit: an image without a supported TensorRT-LLM or TensorRT; a library that does not load.
    """
    sys.path.insert(0, str(ROOT))
    from trt_razor.errors import RazorError
    from trt_razor.kernels.library import Library
    from trt_razor.trtllm.release import installed_release

    try:
        release = installed_release()
        tensorrt = _tensorrt()
        kernels = Library(libraries / "librazor.so")
        for name, symbol in ((PLUGINS, "getCreators"), (PRELOAD, "createInferRuntime_INTERNAL")):
            getattr(ctypes.CDLL(str(libraries / name)), symbol)
    except (RazorError, OSError, AttributeError) as e:
        sys.exit(f"error: {e}")
    caches = " or ".join(c.name.lower() for c in release.local_caches)
    return (
        f"TensorRT-LLM {release.version} (local heads in {caches}), TensorRT {tensorrt}, "
        f"kernels {kernels.build_info}"
    )


def _tensorrt() -> str:
    """Version of the installed TensorRT, as far as its package says; the plugins are for one major."""
    for name in ("tensorrt", "tensorrt_cu12", "tensorrt_cu13"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith("10."):
            sys.exit(f"error: {name}: expected version 10, found {version}; use another IMAGE")
        return version
    return "10"  # the headers that the plugins were compiled with say so


def main() -> int:
    install()
    print(check(ROOT / "trt_razor" / "kernels"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
