"""Fixtures of the TensorRT-LLM flavour; conftest.py takes them in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trtllm_rig
from serving_server import Server


@pytest.fixture(scope="session")
def trtllm_engines(tmp_path_factory: pytest.TempPathFactory) -> trtllm_rig.Engines:
    """TensorRT-LLM engines by kind. Shared: copy a folder before changing it."""
    return trtllm_rig.Engines(tmp_path_factory.mktemp("trtllm"))


@pytest.fixture(scope="session")
def trtllm_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stand-in of ``trtllm_server`` says what it understood."""
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="session")
def trtllm_repository(
    trtllm_engines: trtllm_rig.Engines, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("trtllm-repository") / "models"
    return trtllm_rig.repository_of(trtllm_engines("cyclic"), output)


@pytest.fixture(scope="session")
def trtllm_server(
    triton_python: Path,
    trtllm_engines: trtllm_rig.Engines,
    trtllm_repository: Path,
    trtllm_record: Path,
) -> Iterator[Server]:
    """A real server with a Razor engine of TensorRT-LLM 1.0 in the stand-in backend."""
    preload = trtllm_engines.preload("cyclic")
    with trtllm_rig.serving(trtllm_repository, triton_python, trtllm_record, preload) as server:
        yield server


@pytest.fixture(scope="session")
def trtllm_unary_server(
    triton_python: Path,
    trtllm_engines: trtllm_rig.Engines,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """One with state slots (1.2) that is not decoupled, and gives the prompt back by default."""
    folder = tmp_path_factory.mktemp("trtllm-unary")
    options = {"decoupled": False, "exclude_input_in_output": False, "copy_engine": True}
    repository = trtllm_rig.repository_of(trtllm_engines("slots"), folder / "models", **options)
    preload = trtllm_engines.preload("slots")
    with trtllm_rig.serving(repository, triton_python, folder, preload) as server:
        yield server
