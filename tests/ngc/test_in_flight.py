"""Requests that come and go while others run: each gets the tokens it would get alone."""

from __future__ import annotations

from collections.abc import Callable

from ngc_model import MAX_BATCH_SIZE, NgcModel, Oracle, prompts
from ngc_rig import LIMIT, Engines, Runs, check

from trt_razor.trtllm.executor import Request


def schedule() -> tuple[list[list[int]], list[Request]]:
    """12 requests on 4 slots, of many lengths, sent while earlier ones are at various places."""
    asked = prompts(12, (700, 33, 130, 69, 400, 5, 257), seed=3)
    lengths = (40, 90, 25, 60)
    requests = [
        Request(prompt, lengths[i % 4], after_tokens=17 * i) for i, prompt in enumerate(asked)
    ]
    return asked, requests


def test_mixed_arrivals(
    family: str,
    tp_size: int,
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    asked, requests = schedule()
    engine = engines(family, True, tp_size)
    outcome = run_engine(engine, requests, tp_size=tp_size, stream=True)
    assert [len(t) for t in outcome.tokens] == [r.max_new_tokens for r in requests]
    check(outcome, asked, oracles(family), models(family).head_map(tp_size), LIMIT)
    # They did share steps, and did not all start together.
    steps = outcome.iterations
    assert max(s["generations"] for s in steps) == MAX_BATCH_SIZE
    busy = [i for i, s in enumerate(steps) if s["generations"]]
    late = [i for i, s in enumerate(steps) if s["contexts"] and i > busy[0]]
    assert len(late) >= 4
    assert sum(s["contexts"] for s in steps) == len(requests)


def test_slots_are_clean_for_the_next(
    engines: Engines,
    run_engine: Runs,
    models: Callable[[str], NgcModel],
    oracles: Callable[[str], Oracle],
) -> None:
    """A short request after a long one in the same place: nothing of the long one may be left."""
    asked = prompts(8, (900, 900, 900, 900, 3, 80, 3, 80), seed=5)
    requests = [Request(p, 20, after_tokens=0 if i < 4 else 80) for i, p in enumerate(asked)]
    outcome = run_engine(engines("llama", True), requests)
    check(outcome, asked, oracles("llama"), models("llama").head_map(1), LIMIT)
