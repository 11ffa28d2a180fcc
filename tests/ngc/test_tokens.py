"""Engines against the reference: dense first, as the control, then Razor; every logit of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ngc_model import NgcModel, Oracle, distance, prompts
from ngc_rig import FP8_LIMIT, LIMIT, Engines, Runs, check, gpus

from trt_razor.trtllm.executor import Request
from trt_razor.trtllm.release import LocalCache, Release

LENGTHS = (700, 60, 101, 300)
NEW_TOKENS = 24


def requests_for(asked: Sequence[Sequence[int]]) -> list[Request]:
    return [Request(prompt, NEW_TOKENS) for prompt in asked]


def test_dense_engine(
    family: str, tp_size: int, engines: Engines, run_engine: Runs, oracles: Callable[[str], Oracle]
) -> None:
    """The control: checkpoint conversion, RoPE, biases and the comparison itself, without our plugin."""
    asked = prompts(4, LENGTHS)
    outcome = run_engine(engines(family, False, tp_size), requests_for(asked), tp_size=tp_size)
    worst = check(outcome, asked, oracles(family), None, LIMIT)
    print(f"dense, TP {tp_size}: logits within {worst:.4f} standard deviations")


def test_razor_engine(
    family: str,
    tp_size: int,
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    asked = prompts(4, LENGTHS)
    head_map = models(family).head_map(tp_size)
    outcome = run_engine(engines(family, True, tp_size), requests_for(asked), tp_size=tp_size)
    worst = check(outcome, asked, oracles(family), head_map, LIMIT)
    print(f"Razor, TP {tp_size}: logits within {worst:.4f} standard deviations")
    # Else the engine could be a dense one.
    assert outcome.logits[0] is not None
    dense = oracles(family).logits(asked[0], outcome.tokens[0], None)
    assert distance(outcome.logits[0], dense) > 1


def test_a_long_answer(
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    """From nothing dropped to a ring that went round: the window is passed while decoding."""
    prompt = prompts(1, [40])[0]
    outcome = run_engine(engines("llama", True), [Request(prompt, 400)])
    check(outcome, [prompt], oracles("llama"), models("llama").head_map(1), LIMIT)


def test_streamed_logits_are_the_same(engines: Engines, run_engine: Runs) -> None:
    asked = prompts(2, (300, 90))
    whole = run_engine(engines("llama", True), requests_for(asked))
    stream = run_engine(engines("llama", True), requests_for(asked), stream=True)
    assert stream.tokens == whole.tokens
    for a, b in zip(stream.logits, whole.logits, strict=True):
        assert a is not None
        assert b is not None
        assert np.abs(a - b).max() < LIMIT


@pytest.mark.parametrize("razor", [False, True])
def test_fp8_cache(
    razor: bool,
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    if min(float(capability) for capability in gpus()) < 8.9:
        pytest.skip("NOT TESTED: FP8 caches need compute capability 8.9 or newer")
    asked = prompts(2, (500, 200))
    engine = engines("llama", razor, 1, "--kv-dtype", "fp8")
    head_map = models("llama").head_map(1) if razor else None
    worst = check(
        run_engine(engine, requests_for(asked)), asked, oracles("llama"), head_map, FP8_LIMIT
    )
    print(f"FP8 cache, {'Razor' if razor else 'dense'}: logits within {worst:.3f}")


def test_slots_on_a_release_with_both_caches(
    release: Release,
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    if LocalCache.CYCLIC not in release.local_caches:
        pytest.skip(f"TensorRT-LLM {release.version} has state slots only: tested above")
    asked = prompts(3, LENGTHS)
    engine = engines("llama", True, 1, "--local-cache", "slots")
    outcome = run_engine(engine, requests_for(asked))
    check(outcome, asked, oracles("llama"), models("llama").head_map(1), LIMIT)


def test_preloaded_plugin(engines: Engines, run_engine: Runs) -> None:
    """As a server loads it: LD_PRELOAD, and nobody calls load_library."""
    import tensorrt

    from trt_razor.backends.tensorrt import find_plugin

    plugin = find_plugin(tensorrt)
    preload = Path(str(plugin).replace("_plugins_", "_preload_"))
    assert preload.is_file(), f"{preload}: missing; `make plugin TENSORRT_ROOT=…` makes it"
    asked = prompts(1, [300])
    engine = engines("llama", True)
    plain = run_engine(engine, requests_for(asked))
    loaded = run_engine(
        engine,
        requests_for(asked),
        environment={"LD_PRELOAD": str(preload), "TRT_RAZOR_PLUGIN": "/nonexistent"},
    )
    assert loaded.preloaded
    assert not plain.preloaded
    assert loaded.tokens == plain.tokens
