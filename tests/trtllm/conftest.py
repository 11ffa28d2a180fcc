"""Tests of the TensorRT-LLM backend: helper modules beside them, and the double (doubles.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
for folder in (HERE.parent / "plugins" / "tensorrt", HERE.parent / "plugins", HERE.parent, HERE):
    sys.path.insert(0, str(folder))
import doubles  # noqa: E402 (the loop above)


@pytest.fixture(scope="session")
def _double_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("doubles")
    return {release: doubles.make(root / release, release) for release in doubles.RELEASES}


@pytest.fixture(params=sorted(doubles.RELEASES))
def trtllm(
    request: pytest.FixtureRequest, _double_folders: dict[str, Path]
) -> Iterator[doubles.Double]:
    """The double of TensorRT-LLM, once per release, importable in this process. Its folder is shared."""
    with doubles.installed(_double_folders[request.param], request.param) as double:
        yield double


@pytest.fixture
def refused(trtllm: doubles.Double) -> Any:
    """The exception of the double."""
    return trtllm.load("tensorrt").ContractError
