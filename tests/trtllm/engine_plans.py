"""Plans of tiny engines for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    plan_engine,
)
from trt_razor.trtllm.release import release_of

OLD, NEW = release_of("1.0.0"), release_of("1.2.1")
SPEC = ModelSpec("tiny", "llama", 4, 1024, 256, 8, 4, 128, 300, 4096, 1e-5)
WIDE = dataclasses.replace(SPEC, num_heads=16, num_kv_heads=16)
# L = 63, so the ring has 64 rows: two blocks of 32.
POLICY = RazorPolicy(sink_tokens=4, min_window=63, compression=None, comp_tokens=1)
COUNTS = (1, 4, 0, 2)
"""Retrieval heads of 4: beside local ones, alone, none, and half of them."""


def section(
    counts: tuple[int, ...] = COUNTS,
    policy: RazorPolicy = POLICY,
    tp_size: int = 1,
    spec: ModelSpec = SPEC,
) -> RazorSection:
    return RazorSection(spec.fingerprint(), "heads", tp_size, counts, policy)


def plan(
    version: str = "1.0.0",
    counts: tuple[int, ...] = COUNTS,
    spec: ModelSpec = SPEC,
    max_seq_len: int = 1000,
    dtype: str = "float16",
    chunk: int = 0,
    policy: RazorPolicy = POLICY,
    **options: Any,
) -> RazorPlan:
    wanted = TrtLlmOptions(**options)
    razor = section(counts, policy, wanted.tp_size, spec)
    return plan_engine(spec, razor, max_seq_len, dtype, wanted, release_of(version), chunk)
