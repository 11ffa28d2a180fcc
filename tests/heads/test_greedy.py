"""``trt_razor.heads.greedy``: each head for what it adds to those chosen before it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import TinyCheckpoint, tiny_spec

from trt_razor.errors import RazorError, UsageError
from trt_razor.evaluation.auto_heads import greedy_answers
from trt_razor.evaluation.tasks.needle import HELD_OUT_WORDINGS, TUNING_WORDINGS, WORDINGS
from trt_razor.evaluation.text import load_text
from trt_razor.headmap import HeadMap
from trt_razor.heads.answers import AnswerProbe, random_probes
from trt_razor.heads.effect import GatedContext
from trt_razor.heads.find import FindOptions, examine_heads
from trt_razor.heads.greedy import GreedyOptions, greedy_heads
from trt_razor.heads.selection import SelectionOptions, choose_again, select
from trt_razor.policy import RazorPolicy
from trt_razor.reference.decoder import ReferenceDecoder

POLICY = RazorPolicy(sink_tokens=2, min_window=8, compression=None, comp_tokens=2, heavy_hitters=4)
OPTIONS = GreedyOptions(start_share=0.0, contexts=2, length=90, policy=POLICY)


def loss_by_the_cache(
    checkpoint: TinyCheckpoint, probe: AnswerProbe, heads: set[tuple[int, int]]
) -> float:
    """The answer's loss by the reference's own cache, with these (layer, KV head) full."""
    spec = checkpoint.spec
    rows = tuple(
        tuple(h for h in range(spec.num_kv_heads) if (layer, h) in heads)
        for layer in range(spec.num_layers)
    )
    fields = (spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, rows)
    decoder = ReferenceDecoder(checkpoint, torch.float64)
    cache = decoder.new_cache(POLICY, HeadMap(*fields, "test", "test"), 200)
    decoder.forward(probe.context, cache, last_only=True)
    logits = decoder.forward(probe.chunk[:-1], cache)[probe.first - 1 :]
    return float(F.cross_entropy(logits, torch.from_numpy(probe.answer)))


def test_gates_are_what_the_cache_does_heavy_hitters_included() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    (probe,) = random_probes(checkpoint.spec, 90, 8, 1, seed=1)
    context = GatedContext(ReferenceDecoder(checkpoint, torch.float64), probe.context, POLICY)
    for heads in (set[tuple[int, int]](), {(0, 1), (2, 0)}, {(1, 0), (1, 1)}):
        gates = np.zeros((3, 2))
        for head in heads:
            gates[head] = 1
        want = loss_by_the_cache(checkpoint, probe, heads)
        assert context.loss(probe, gates) == pytest.approx(want, abs=1e-10)
        loss, slope = context.slope(probe, gates)
        assert loss == pytest.approx(want, abs=1e-10)
        for at in np.ndindex(3, 2):
            up, down = gates.copy(), gates.copy()
            up[at] += 1e-5
            down[at] -= 1e-5
            rise = (context.loss(probe, up) - context.loss(probe, down)) / 2e-5
            assert slope[at] == pytest.approx(-rise, abs=1e-6)


def test_the_loss_to_dense_attention_and_its_slope() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    (probe,) = random_probes(checkpoint.spec, 90, 8, 1, seed=1)
    context = GatedContext(ReferenceDecoder(checkpoint, torch.float64), probe.context, POLICY)
    dense = context.predicted(probe)
    # The same as reading all tokens at once.
    tokens = np.concatenate([probe.context, probe.chunk[:-1]])
    decoder = ReferenceDecoder(checkpoint, torch.float64)
    whole = decoder.forward(tokens, decoder.new_cache(POLICY, None, 200))
    torch.testing.assert_close(
        dense, whole[len(probe.context) + probe.first - 1 :].log_softmax(-1), rtol=0, atol=1e-9
    )
    assert context.loss(probe, np.ones((3, 2)), dense) == pytest.approx(0, abs=1e-12)
    gates = np.zeros((3, 2))
    gates[1, 0] = 1
    mine = context.predicted(probe, gates)
    want = float(F.kl_div(mine, dense, reduction="none", log_target=True).sum(-1).mean())
    loss, slope = context.slope(probe, gates, dense)
    assert want > 1e-4
    assert loss == pytest.approx(want, abs=1e-12)
    for at in np.ndindex(3, 2):
        up, down = gates.copy(), gates.copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        rise = (context.loss(probe, up, dense) - context.loss(probe, down, dense)) / 2e-5
        assert slope[at] == pytest.approx(-rise, abs=1e-6)


def test_every_step_takes_the_steepest_of_its_own_state() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    probes = random_probes(checkpoint.spec, 90, 8, 3, seed=3)
    probes[2] = dataclasses.replace(probes[2], kind="text")
    found = greedy_heads(checkpoint, probes, [3], 4, OPTIONS, "float64")
    assert found.order[0] == 3
    assert [r.heads for r in found.rounds] == [1, 3, 4]
    contexts = [
        GatedContext(ReferenceDecoder(checkpoint, torch.float64), p.context, POLICY) for p in probes
    ]

    def mean(gates: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Two answers and one text: the text counts as much as both answers together."""
        (a, slope_a), (b, slope_b), (t, slope_t) = (
            c.slope(p, gates, c.predicted(p)) for c, p in zip(contexts, probes, strict=True)
        )
        return {"answer": (a + b) / 2, "text": t}, (slope_a + slope_b) / 2 + slope_t

    for step in found.rounds:
        gates = np.zeros(6)
        gates[list(found.order[: step.heads])] = 1
        loss, slope = mean(gates.reshape(3, 2))
        assert dict(step.loss) == pytest.approx(loss, abs=1e-12)
        free = [h for h in range(6) if not gates[h]]
        best = sorted(free, key=lambda h: -slope.ravel()[h])[: len(step.added)]
        assert [layer * 2 + head for layer, head, _ in step.added] == best
        assert [g for *_, g in step.added] == pytest.approx([slope.ravel()[h] for h in best])
    # Slopes before any head was chosen would have chosen others: the state matters.
    first = np.argsort(-mean(np.zeros((3, 2)))[1].ravel())
    assert [3, *[int(h) for h in first if h != 3][:3]] != list(found.order)


def test_scores_are_the_order_of_choosing() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    probes = random_probes(checkpoint.spec, 90, 8, 2, seed=3)
    found = greedy_heads(checkpoint, probes, [3], 4, OPTIONS, "float64")
    assert [int(found.scores.flat[h]) for h in found.order] == [4, 3, 2, 1]
    rest = [found.scores.flat[h] for h in range(6) if h not in found.order]
    assert max(map(abs, rest)) <= 0.5
    for count in range(1, 5):
        options = SelectionOptions("greedy", effect_share=count / 6)
        chosen = select({"greedy": found.scores}, options).heads
        flat = {layer * 2 + h for layer, row in enumerate(chosen) for h in row}
        assert flat == set(found.order[:count])


def test_contexts_are_read_once_for_their_questions() -> None:
    checkpoint = TinyCheckpoint(tiny_spec())
    (probe,) = random_probes(checkpoint.spec, 90, 8, 1, seed=3)
    other = dataclasses.replace(probe, chunk=probe.chunk[::-1].copy())
    steps: list[tuple[str, int, int]] = []
    found = greedy_heads(
        checkpoint, [probe, other], [], 1, OPTIONS, progress=lambda *s: steps.append(s)
    )
    assert len(found.order) == 1
    assert ("reading contexts", 2, 2) in steps
    assert ("greedy, 1 of 1 heads", 2, 2) in steps


def test_reading_in_bfloat16_is_near() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    (probe,) = random_probes(checkpoint.spec, 90, 8, 1, seed=1)
    decoder, gates = ReferenceDecoder(checkpoint), np.ones((3, 2))
    exact, narrow = (
        GatedContext(decoder, probe.context, POLICY, dtype).loss(probe, gates)
        for dtype in (None, torch.bfloat16)
    )
    assert narrow != exact
    assert narrow == pytest.approx(exact, rel=0.02)


def test_overflow_is_an_error() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=1e30)
    probes = random_probes(checkpoint.spec, 90, 8, 1, seed=3)
    with pytest.raises(RazorError, match="not finite; the weights overflow in float32"):
        greedy_heads(checkpoint, probes, [], 1, OPTIONS)


def test_a_map_that_can_be_cut_shorter() -> None:
    checkpoint = TinyCheckpoint(tiny_spec(), gain=2.0)
    options = FindOptions(
        probe_length=20,
        repeats=2,
        seeds=2,
        method="greedy",
        effect_share=0.8,
        greedy=dataclasses.replace(OPTIONS, start_share=0.1),
    )
    found = examine_heads(checkpoint, options)  # type: ignore[arg-type]
    made = found.head_map
    assert made.method == "greedy"
    assert made.num_retrieval == 5
    assert found.stability is None
    assert set(made.scores) == {"echo", "induction", "greedy"}
    told = made.options["greedy"]
    assert told["policy"] == POLICY.to_json()
    assert [r["heads"] for r in told["rounds"]] == [1, 3, 5]
    assert all(np.isfinite(r["loss"]["answer"]) for r in told["rounds"])
    first = select(
        {n: np.array(t) for n, t in made.scores.items()},
        SelectionOptions("combined", combined_share=0.1),
    ).heads
    shorter = choose_again(made, SelectionOptions("greedy", effect_share=0.1))
    assert shorter.retrieval_heads == first
    with pytest.raises(UsageError, match="greedy start: expected at most the share"):
        examine_heads(checkpoint, dataclasses.replace(options, effect_share=0.05))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start_share": 1.5}, "greedy start: expected a share"),
        ({"step": 0}, "greedy step: expected 1.."),
        ({"contexts": 1.5}, "greedy contexts: expected 1.."),
        ({"texts": -1}, "greedy texts: expected 0.."),
        ({"length": 100}, "drop nothing of 100 tokens with a window of 128"),
        ({"read_dtype": "bfloat"}, "greedy read dtype 'bfloat'.*bfloat16"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GreedyOptions(**changes)  # type: ignore[arg-type]


def test_wordings_are_either_for_tuning_or_held_out() -> None:
    assert sorted((*TUNING_WORDINGS, *HELD_OUT_WORDINGS)) == sorted(WORDINGS)


@pytest.mark.real
def test_needles_of_smollm2() -> None:
    from trt_razor.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint("smollm2-135m", None)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    options = GreedyOptions(contexts=1, texts=2, length=400, read_dtype="bfloat16")
    for wording in HELD_OUT_WORDINGS:
        with pytest.raises(UsageError, match=f"'{wording}': held out for tests"):
            greedy_answers(tokenizer, options, ["number", wording])
    with pytest.raises(UsageError, match="did you mean printer"):
        greedy_answers(tokenizer, options, ["printr"])
    source = greedy_answers(tokenizer, options)
    *probes, one, two = source.make(0)
    for going_on in (one, two):
        assert (going_on.kind, going_on.first, len(going_on.context)) == ("text", 1, 399)
        assert len(going_on.answer) == 64
        whole = tokenizer.decode([*going_on.context[-20:].tolist(), *going_on.chunk.tolist()])
        assert " ".join(whole.split())[-80:] in " ".join(
            load_text("stdlib", "calibration").sentences
        )
    assert not np.array_equal(one.context, two.context)
    texts = [tokenizer.decode(p.context.tolist()) for p in probes]
    for wording, text in zip(TUNING_WORDINGS, texts[::2], strict=True):
        assert WORDINGS[wording].fact.split("{}")[0] in text
    assert texts[::2] == texts[1::2]
    for probe, text in zip(probes, texts, strict=True):
        assert tokenizer.decode(probe.answer.tolist()).strip(" .\n")[:5] in text
    # Two heads more than nothing: the answers come nearer to dense attention's.
    found = greedy_heads(checkpoint, [*probes[:2], one], [], 2, options)
    assert found.rounds[0].loss.keys() == {"answer", "text"}
    assert 0 < found.rounds[-1].loss["answer"] < found.rounds[0].loss["answer"]
