"""The kernels under address and undefined-behaviour sanitizers, and proof that these fire.

Buffers have no guards of their own then: what the kernels touch beyond them is the sanitizers' to find.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from shim_build import build_folder, build_shim

HERE = Path(__file__).parent

SETUP = """
import sys
sys.path.insert(0, {here!r})
from trt_razor.kernels import RazorKernels
kernels = RazorKernels({library!r})
"""

CLEAN = """
from harness import check
from schedules import SANITIZED, everything
from test_fuzz import run_seed
from test_heavy_hitters import LAYERS, every_call
for layer in LAYERS[2:6]:  # many rows, FP8, groups of two tiles of queries
    check(kernels, layer, every_call(), slots=3)
for layer in SANITIZED:
    check(kernels, layer, everything(), slots=3)
for seed in range(12):
    run_seed(kernels, 1000 + seed, calls=4)
print("clean")
"""

# The last row of the output lies behind the memory that was asked for.
SHORT = """
import ctypes
import torch
from razor_layers import Layer
from razor_memory import contiguous_store
layer = Layer(retrieval=(0, 1), position="none")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
size = 2 * layer.num_heads * layer.head_dim * 3
memory = libc.malloc(size - 2 * layer.num_heads * layer.head_dim)
out = torch.frombuffer((ctypes.c_char * size).from_address(memory), dtype=layer.dtype).view(1, 3, -1)
qkv = torch.zeros(1, 3, (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim, dtype=layer.dtype)
kernels.attention(
    layer.config(), qkv, contiguous_store(layer, 1).caches([0]), out=out,
    past=torch.zeros(1, dtype=torch.int32), chunk=torch.full((1,), 3, dtype=torch.int32),
)
print("not noticed")
"""


@pytest.fixture(scope="module")
def sanitized_library() -> Path:
    return build_shim(build_folder() / "shim-asan", "-DRAZOR_SHIM_SANITIZE=ON")


def run(library: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A Python process with the sanitizers' runtimes loaded first."""

    def runtime(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RAZOR_TEST_GUARD": "0",
        "OMP_NUM_THREADS": "1",
    }
    code = SETUP.format(here=str(HERE), library=str(library)) + script
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900
    )


def test_nothing_to_report(sanitized_library: Path) -> None:
    done = run(sanitized_library, CLEAN)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.strip() == "clean"
    assert "runtime error" not in done.stderr


def test_a_short_buffer_is_noticed(sanitized_library: Path) -> None:
    done = run(sanitized_library, SHORT)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "razor::" in done.stderr, "the report should name a kernel"
