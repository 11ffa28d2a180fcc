"""KV memory that the executor reports, beside what the plan of the engine says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ngc_model import MAX_BATCH_SIZE, MAX_SEQ_LEN, NgcModel, prompts
from ngc_rig import Engines, Runs

from trt_razor.trtllm.cache_settings import read_settings
from trt_razor.trtllm.engine_config import (
    SECTION,
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    plan_engine,
)
from trt_razor.trtllm.executor import Request
from trt_razor.trtllm.release import Release


def plan_of(engine: Path, model: NgcModel, tp_size: int, release: Release) -> RazorPlan:
    """Planned again, from the section that the engine carries."""
    config = json.loads((engine / "config.json").read_text())
    section = RazorSection.from_json(config["pretrained_config"][SECTION])
    options = TrtLlmOptions(tp_size=tp_size)
    return plan_engine(model.spec, section, MAX_SEQ_LEN, "float16", options, release)


def most_blocks(iterations: list[dict[str, Any]]) -> int:
    return max(int(i["used_blocks"]) for i in iterations)


@pytest.mark.parametrize("razor", [False, True])
def test_pools_are_as_large_as_reported(razor: bool, engines: Engines, run_engine: Runs) -> None:
    """Events and log lines agree, and bytes from our settings are the GiB that TensorRT-LLM states."""
    outcome = run_engine(engines("llama", razor), [Request([5, 6], 2)], logits=False, memory=0.1)
    assert {w: blocks for w, (blocks, _) in outcome.windows.items()} == outcome.log_windows
    total = sum(nbytes for _, nbytes in outcome.windows.values())
    assert outcome.log_gib == pytest.approx(total / 2**30, abs=0.011)


@pytest.mark.parametrize("tokens", [50, 300, 900])
def test_a_sequence_takes_what_the_plan_says(
    tokens: int,
    tp_size: int,
    release: Release,
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
) -> None:
    new = 8
    prompt = prompts(1, [tokens])[0]
    used, settings = {}, {}
    for razor in (False, True):
        engine = engines("llama", razor, tp_size)
        outcome = run_engine(engine, [Request(prompt, new)], tp_size=tp_size, logits=False)
        settings[razor] = read_settings(engine)
        used[razor] = most_blocks(outcome.iterations)
        low, high = (settings[razor].sequence_blocks(n) for n in (tokens, tokens + new))
        # A manager may take one block ahead of the token that needs it, for each window.
        spare = len(settings[razor].distinct_windows)
        assert low <= used[razor] <= high + spare, f"razor {razor}"
    plan = plan_of(engines("llama", True, tp_size), models("llama"), tp_size, release)
    assert settings[True].pool_bytes(tokens) == plan.pool_bytes(tokens)
    assert settings[True].slot_bytes == plan.slot_bytes()
    assert settings[False].pool_bytes(tokens) == plan.dense_bytes(tokens)
    if tokens == 900:
        assert plan.sequence_bytes(tokens) < 0.7 * plan.dense_bytes(tokens)


def test_more_sequences_fit(
    release: Release, engines: Engines, run_engine: Runs, models: Callable[[str], NgcModel]
) -> None:
    """The same share of the same GPU, measured in sequences of full length."""
    fit = {}
    for razor in (False, True):
        engine = engines("llama", razor)
        request = [Request([5, 6], 2)]
        fit[razor] = run_engine(engine, request, logits=False, memory=0.2).sequences_that_fit
    plan = plan_of(engines("llama", True), models("llama"), 1, release)
    planned = plan.dense_bytes(MAX_SEQ_LEN) / plan.pool_bytes(MAX_SEQ_LEN)
    print(
        f"sequences of {MAX_SEQ_LEN} tokens: dense {fit[False]}, Razor {fit[True]}; pools × {planned:.2f}"
    )
    # State slots, reserved before, and blocks for sinks cost a little; other processes, too.
    assert fit[True] / fit[False] == pytest.approx(planned, rel=0.15)


def test_used_memory_grows_with_the_batch(engines: Engines, run_engine: Runs) -> None:
    engine = engines("llama", True)
    settings = read_settings(engine)
    asked = [Request(p, 30) for p in prompts(MAX_BATCH_SIZE, [400])]
    outcome = run_engine(engine, asked, logits=False)
    spare = MAX_BATCH_SIZE * len(settings.distinct_windows)
    low, high = (MAX_BATCH_SIZE * settings.sequence_blocks(n) for n in (400, 430))
    assert low <= most_blocks(outcome.iterations) <= high + spare
