"""Fixtures of tests/plugins, on a GPU: `make test-gpu`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Imported, not collected, by the modules here.
pytest.register_assert_rewrite(
    "harness", "razor_memory", "test_attention", "test_paged", "test_fuzz"
)

if TYPE_CHECKING:
    from trt_razor.kernels import RazorKernels


@pytest.fixture(scope="session", autouse=True)
def managed_buffers() -> Iterator[None]:
    from gpu_device import buffers_on_gpu

    with buffers_on_gpu():
        yield


@pytest.fixture(scope="session")
def kernels() -> RazorKernels:
    from gpu_device import WaitingKernels

    return WaitingKernels()


@pytest.fixture(scope="session")
def kernels_on(kernels: RazorKernels) -> Callable[[int], RazorKernels]:
    """A GPU has the multiprocessors that it has."""
    return lambda multiprocessors: kernels
