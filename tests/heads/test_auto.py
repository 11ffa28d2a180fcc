"""``trt_razor.evaluation.auto_heads``: the share rises until the target holds."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation.auto_heads import AutoOptions, auto_heads, needle_answers, selection_of
from trt_razor.headmap import HeadMap
from trt_razor.heads.heatmap import chosen_by
from trt_razor.heads.measure import EffectOptions
from trt_razor.heads.selection import SelectionOptions, select, with_share
from trt_razor.policy import RazorPolicy

NARROW = RazorPolicy(sink_tokens=2, min_window=24, compression=None, comp_tokens=0)


def test_shares_rise_in_steps() -> None:
    assert AutoOptions(step=0.03, max_share=0.12).shares == [0.03, 0.06, 0.09, 0.12]
    assert AutoOptions(step=0.3, max_share=0.5).shares == [0.3]
    assert AutoOptions(step=0.1, max_share=1.0).shares[-1] == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kept": None}, "target: expected kept=SHARE or kl=NATS"),
        ({"kept": 1.1}, "target kept: expected a share between 0 and 1"),
        ({"kl": 0.0}, "target kl: expected a number above 0"),
        ({"step": 0.0}, "auto step: expected a share above 0"),
        ({"step": 0.4, "max_share": 0.3}, "up to the max share 0.3, found 0.4"),
        ({"trials": 0}, "auto trials"),
        ({"length": 64}, "drop nothing of 64 tokens with a window of 64"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AutoOptions(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method", ["paper", "combined", "echo", "induction", "effect", "gradient", "greedy"]
)
def test_every_ranking_can_be_raised(method: str) -> None:
    rng = np.random.default_rng(0)
    scores = {n: rng.random((10, 5)) for n in ("echo", "induction", "effect", "gradient", "greedy")}
    options = SelectionOptions(method, min_echo=0)
    counts = []
    for share in (0.1, 0.2, 0.5):
        chosen = select(scores, with_share(options, share)).heads
        counts.append(sum(map(len, chosen)))
        assert counts[-1] <= 50 * share + 1
    assert counts[0] < counts[1] < counts[2]


def test_maps_without_a_ranking_are_refused() -> None:
    listed = HeadMap.uniform("m", "f" * 64, 2, 2, [0], "import", "test")
    with pytest.raises(UsageError, match="method 'import': expected a map ranked by scores"):
        selection_of(listed)


@pytest.mark.real
def test_smollm2_stops_at_the_first_share_that_holds() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from trt_razor.evaluation.runners.hf import HfRunner
    from trt_razor.models.checkpoint import open_checkpoint
    from trt_razor.recipes import recipe_heads
    from trt_razor.reference.hf.load import checkpoint_model

    checkpoint = open_checkpoint("smollm2-135m", None)
    found = recipe_heads(checkpoint.spec)
    tokenizer = checkpoint.tokenizer()
    assert found is not None
    assert tokenizer is not None
    head_map = found[1]
    runner = HfRunner(checkpoint_model(checkpoint, torch.float32), tokenizer)
    steps: list[tuple[str, int, int]] = []
    try:
        options = AutoOptions(
            kept=None, kl=0.5, length=320, trials=2, step=0.1, max_share=1.0, policy=NARROW
        )
        result = auto_heads(head_map, runner, options, lambda *a: steps.append(a))
        # Nothing is exact but all heads, so a bound of next to nothing is never met below them.
        strict = dataclasses.replace(options, kl=1e-9, step=0.2, max_share=0.2)
        failed = auto_heads(head_map, runner, strict)
    finally:
        runner.close()
    tried = result.tried
    assert result.reached
    assert [t.holds for t in tried] == [False] * (len(tried) - 1) + [True]
    assert tried[-1].kl <= 0.5
    assert all(t.kl > 0.5 for t in tried[:-1])
    assert all(0 < t.kv < 1 and t.low <= t.kept / max(1, t.right) <= t.high for t in tried)
    assert steps[0] == ("reading contexts", 0, 2)
    assert steps[-1] == (f"share {tried[-1].share:.0%}", 2, 2)

    made = result.head_map
    assert made.num_retrieval == tried[-1].heads
    assert made.options["effect_share"] == tried[-1].share
    assert chosen_by(made) is not None  # the settings explain the choice
    assert made.options["auto"]["tried"] == [t.to_json() for t in tried]
    assert made.options["auto"]["part"] == "calibration"
    json.dumps(made.to_json())
    assert "target met" in result.table()

    assert not failed.reached
    assert failed.head_map.options["auto"]["reached"] is False
    assert "target met" not in failed.table()


@pytest.mark.real
def test_needle_probes_hold_their_answer() -> None:
    from trt_razor.models.checkpoint import open_checkpoint

    tokenizer = open_checkpoint("smollm2-135m", None).tokenizer()
    assert tokenizer is not None
    source = needle_answers(tokenizer, EffectOptions(trials=2, length=300))
    probes = source.make(4)
    for probe in probes:
        assert len(probe.context) <= 300
        number = tokenizer.decode([int(t) for t in probe.answer]).strip()
        assert number.isdigit()
        assert f"is {number}" in tokenizer.decode([int(t) for t in probe.context])
    assert len(probes) == 2
    assert (probes[0].chunk[-5:] != source.make(5)[0].chunk[-5:]).any()
