"""Tests of the TensorRT-LLM backend: helper modules beside them, and the double (doubles.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import doubles


@pytest.fixture(params=sorted(doubles.RELEASES))
def trtllm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[doubles.Double]:
    """The double of TensorRT-LLM, once per release, importable in this process."""
    with doubles.installed(tmp_path / "double", request.param) as double:
        yield double
