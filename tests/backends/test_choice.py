"""Which backend ``auto`` takes, and why it says so."""

from __future__ import annotations

import importlib.util

import pytest

from trt_razor import backends
from trt_razor.errors import UsageError


@pytest.mark.parametrize(
    ("capability", "installed", "name", "why"),
    [
        (None, True, "onnxruntime", "no NVIDIA GPU"),
        ("9.0", True, "onnxruntime", "does not run on compute capability 9.0"),
        ("8.9", False, "onnxruntime", "tensorrt-rtx is not installed"),
        ("8.9", True, "tensorrt-rtx", "untested so far"),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch, capability: str | None, installed: bool, name: str, why: str
) -> None:
    monkeypatch.setattr(backends, "gpu_capability", lambda: capability)
    monkeypatch.setattr(backends, "_has_tensorrt", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    chosen, reason = backends.choose_backend("auto")
    assert chosen == name
    assert why in reason
    assert backends.choose_backend("onnxruntime") == ("onnxruntime", "as asked")


def test_auto_prefers_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "gpu_capability", lambda: "9.0")
    monkeypatch.setattr(backends, "_has_tensorrt", lambda: True)
    name, why = backends.choose_backend("auto")
    assert name == "tensorrt"
    assert "untested" in why
    monkeypatch.setattr(backends, "gpu_capability", lambda: None)
    assert backends.choose_backend("auto")[0] == "onnxruntime"


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorrt-lmm", "did you mean tensorrt-llm"), ("onnxruntim", "did you mean onnxruntime")],
)
def test_backends_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        backends.get_backend(name)
