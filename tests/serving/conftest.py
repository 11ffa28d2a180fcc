"""Tests of serving: helper modules beside them, and one real Triton server shared by most."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
for folder in (HERE.parent, HERE):
    sys.path.insert(0, str(folder))
import serving_model  # noqa: E402 (the loop above)
import serving_rig  # noqa: E402
import serving_server  # noqa: E402
from trtllm_fixtures import (  # noqa: E402, F401
    trtllm_engines,
    trtllm_record,
    trtllm_repository,
    trtllm_server,
    trtllm_unary_server,
)

from trt_razor.engine import Engine  # noqa: E402


def _absent(reason: str) -> Any:
    """Skips a test, or fails it where everything has to be there."""
    if os.environ.get("CI") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def triton_python() -> Path:
    """The Python whose nvidia-pytriton is the server."""
    name = os.environ.get("TRT_RAZOR_TRITON_PYTHON")
    if not name:
        _absent("needs a Triton server: make serve-environment, TRT_RAZOR_TRITON_PYTHON")
    for package in ("tritonclient.grpc", "google.protobuf"):
        try:
            importlib.import_module(package)
        except ImportError:
            _absent(f"needs the package {package}: pip install -e '.[triton]'")
    return Path(str(name))


@pytest.fixture(scope="session")
def serving_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine that is served. Shared: copy the folder before changing it."""
    return serving_model.build(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def reference(serving_engine: Engine) -> serving_model.Reference:
    """The same engine in this process: what every answer is compared with."""
    return serving_model.Reference(serving_engine)


@pytest.fixture(scope="session")
def repository(serving_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of that engine. Shared: copy the folder before changing it."""
    return serving_server.write(serving_engine, tmp_path_factory.mktemp("repository") / "models")


@pytest.fixture(scope="session")
def start_server(
    triton_python: Path,
) -> Callable[..., AbstractContextManager[serving_server.Server]]:
    """``with start_server(repository, …) as server``: a server of the test's own."""

    def start(repository: Path, **options: Any) -> AbstractContextManager[serving_server.Server]:
        return serving_server.running(repository, triton_python, **options)

    return start


@pytest.fixture(scope="session")
def shared_server(
    repository: Path, start_server: Callable[..., AbstractContextManager[serving_server.Server]]
) -> Iterator[serving_server.Server]:
    with start_server(repository) as server:
        yield server


@pytest.fixture
def server(
    shared_server: serving_server.Server, reference: serving_model.Reference
) -> Iterator[serving_server.Server]:
    """The shared server. After each test all of it must be free again, and right."""
    yield shared_server
    serving_rig.wait_idle(shared_server.metrics)
    shared_server.check_good(reference)
