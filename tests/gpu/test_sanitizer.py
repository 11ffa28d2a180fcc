"""compute-sanitizer over a subset of the kernel tests: no access out of bounds, no race, no lost barrier."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_device import compute_sanitizer, skip_without_gpu

skip_without_gpu()

FOUND = 86  # an exit status that Python does not use


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean(tool: str) -> None:
    program = compute_sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer, part of the CUDA toolkit, on PATH")
    command = [program, f"--tool={tool}", f"--error-exitcode={FOUND}"]
    # No guards around buffers: the tool sees the first byte outside of an allocation.
    done = subprocess.run(
        [*command, sys.executable, str(Path(__file__).with_name("sanitizer_subset.py"))],
        env={**os.environ, "RAZOR_TEST_GUARD": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{tool}: {done.stdout[-4000:]}\n{done.stderr[-2000:]}"
