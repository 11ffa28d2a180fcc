"""Shared by these tests: building and running engines, comparing them with the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ngc_model import (
    MAX_BATCH_SIZE,
    MAX_SEQ_LEN,
    POLICY,
    NgcModel,
    Oracle,
    distance,
    wrong_tokens,
)

from trt_razor.errors import RazorError
from trt_razor.headmap import HeadMap
from trt_razor.trtllm.release import NoTensorRtLlm, installed_release

BUILD_SECONDS = 1800
LIMIT = 0.05
"""Standard deviations that a logit may be off in float16. Razor and dense attention are about 2 apart, and
every smaller mistake that tests/trtllm/test_ngc_harness.py makes on purpose is well above this."""
FP8_LIMIT = 0.8
"""With keys and values of 8 bits: three bits of mantissa move peaked attention a good deal."""


def gpus() -> list[str]:
    """Compute capability of each GPU, as nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.split() if found.returncode == 0 else []


def missing() -> str | None:
    """Why nothing can run here, or None."""
    try:
        installed_release()
    except NoTensorRtLlm:
        return "TensorRT-LLM is not installed; these tests run inside an NGC image: docs/ngc.md"
    except RazorError as e:
        return str(e)
    if not gpus():
        return "nvidia-smi finds no GPU; start the container with --gpus all"
    return None


def build_engine(
    model: NgcModel, folder: Path, razor: bool, tp_size: int, flags: Sequence[str]
) -> None:
    command = [sys.executable, "-m", "trt_razor", "build", "--backend", "tensorrt-llm"]
    command += ["--checkpoint", str(model.folder), "--output", str(folder), "--dtype", "float16"]
    command += ["--tp-size", str(tp_size), "--max-seq-len", str(MAX_SEQ_LEN)]
    command += ["--max-batch-size", str(MAX_BATCH_SIZE), "--prefill-chunk", "0", *flags]
    if razor:
        command += ["--razor", "--heads", str(model.heads)]
        command += ["--sinks", str(POLICY.sink_tokens), "--min-window", str(POLICY.min_window)]
        command += ["--compression", str(POLICY.compression)]
        command += ["--comp-tokens", str(POLICY.comp_tokens)]
    call(command, BUILD_SECONDS, {})


def call(command: Sequence[str], seconds: float, environment: dict[str, str]) -> str:
    """Run a command; its output, which a failure shows."""
    found = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        env={**os.environ, **environment},
    )
    if found.returncode != 0:
        pytest.fail(f"exit code {found.returncode}: {' '.join(command)}\n{found.stdout[-8000:]}")
    return found.stdout


@dataclass(frozen=True)
class Outcome:
    """What a run of requests gave.

    Attributes:
        tokens, logits: for each request; logits None if not asked for.
        windows: window → (blocks, bytes), from the executor. log_gib, log_windows: what TensorRT-LLM's
            log says of the same.
        iterations: fields of ``Iteration``, step by step.
    """

    tokens: list[list[int]]
    logits: list[np.ndarray | None]
    windows: dict[int, tuple[int, int]]
    log_windows: dict[int, int]
    log_gib: float | None
    sequences_that_fit: int
    preloaded: bool
    iterations: list[dict[str, Any]]


Engines = Callable[..., Path]
Runs = Callable[..., Outcome]


def read_outcome(out: Path) -> Outcome:
    data = json.loads(out.with_suffix(".json").read_text())
    with np.load(out.with_suffix(".npz")) as arrays:
        logits = [arrays.get(f"logits{i}") for i in range(len(data["tokens"]))]
    return Outcome(
        tokens=data["tokens"],
        logits=logits,
        windows={int(w): (blocks, nbytes) for w, blocks, nbytes in data["windows"]},
        log_windows={int(w): blocks for w, blocks in data["log_windows"].items()},
        log_gib=data["log_gib"],
        sequences_that_fit=data["sequences_that_fit"],
        preloaded=data["preloaded"],
        iterations=data["iterations"],
    )


def check(
    outcome: Outcome,
    asked: Sequence[Sequence[int]],
    oracle: Oracle,
    head_map: HeadMap | None,
    limit: float,
) -> float:
    """Compare all requests of a run with the reference; returns the largest distance."""
    worst = 0.0
    for prompt, tokens, logits in zip(asked, outcome.tokens, outcome.logits, strict=True):
        assert logits is not None
        reference = oracle.logits(prompt, tokens, head_map)
        assert logits.shape == reference.shape
        assert list(logits.argmax(1)) == tokens  # greedy, on the logits that it reports
        found = distance(logits, reference)
        assert found < limit, f"prompt of {len(prompt)} tokens: logits differ by {found:.3f}"
        assert wrong_tokens(tokens, reference, limit) == []
        worst = max(worst, found)
    return worst
