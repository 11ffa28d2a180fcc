"""Needles: exact lengths, whole needles at their depths, answers as the model writes them."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from trt_razor.errors import UsageError
from trt_razor.evaluation.samples import Sample
from trt_razor.evaluation.tasks.interface import TASKS
from trt_razor.evaluation.tasks.needle import NAMES, WORDINGS, Needle
from trt_razor.evaluation.text import load_text
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.reference import ReferenceDecoder

pytestmark = pytest.mark.real

FACT = re.compile(r"The magic number for (\w+) is (\d{5})\.")


def make(tokenizer: Tokenizer, seed: int = 0, **options: Any) -> list[Sample]:
    task = TASKS.make("needle", options, "tasks[0]")
    samples = list(task.samples(tokenizer, seed))
    assert len(samples) == task.count()
    assert len({s.id for s in samples}) == len(samples)
    return samples


def test_contexts_have_the_exact_length_and_whole_needles(smollm2_tokenizer: Tokenizer) -> None:
    samples = make(smollm2_tokenizer, lengths=(500, 1024), trials=12, needles=4)
    for s in samples:
        assert len(s.context) == s.meta["length"] == int(s.group)
        text = smollm2_tokenizer.decode(s.context)
        facts = dict(FACT.findall(text))
        (name,), (turn,), (position,) = s.meta["names"], s.turns, s.meta["positions"]
        assert len(facts) == 4
        assert (facts[name],) == turn.references
        assert smollm2_tokenizer.decode(s.context[position:]).startswith(
            f" The magic number for {name} is {facts[name]}."
        )
        assert text[-1] in ".!?:\"'”’)"  # the question follows a whole sentence


def test_pieces_are_what_the_tokenizer_makes_of_the_whole(smollm2_tokenizer: Tokenizer) -> None:
    for s in make(smollm2_tokenizer, lengths=(700,), trials=4, needles=2):
        (turn,) = s.turns
        ids = [*s.context, *turn.prompt, *turn.answer]
        whole = smollm2_tokenizer.encode(smollm2_tokenizer.decode(ids, skip_special=False))
        # Only the first sentence may differ, which lost its beginning.
        assert whole[-600:] == ids[-600:]
        assert smollm2_tokenizer.decode(turn.answer) == f" {turn.references[0]}"
        assert len(turn.answer) == 6  # a space and digits one by one


def test_the_model_writes_the_answer_token_for_token(smollm2: Checkpoint) -> None:
    decoder = ReferenceDecoder(smollm2)
    right = 0
    for s in make(smollm2.tokenizer(), lengths=(200,), trials=2):
        (turn,) = s.turns
        cache = decoder.new_cache(None, None, 300)
        decoder.forward(torch.tensor(s.context), cache, last_only=True)
        logits = decoder.forward(torch.tensor([*turn.prompt, *turn.answer]), cache)
        greedy = logits[-len(turn.answer) - 1 : -1].argmax(-1).tolist()
        right += tuple(greedy) == turn.answer
    assert right >= 1  # a wrong way to write a number is never right


def test_questions_share_a_context_that_is_read_once(smollm2_tokenizer: Tokenizer) -> None:
    samples = make(smollm2_tokenizer, lengths=(600,), trials=7, needles=5, questions=3)
    assert [s.context_id for s in samples] == ["600-0"] * 3 + ["600-1"] * 3 + ["600-2"]
    by_id = {s.context_id: s.context for s in samples}
    assert len(set(by_id.values())) == 3
    assert all(by_id[s.context_id] == s.context for s in samples)
    assert len({s.turns[0].prompt for s in samples[:3]}) == 3


def test_several_wordings_are_met_in_turn(smollm2_tokenizer: Tokenizer) -> None:
    words = ("number", "room", "members")
    samples = make(
        smollm2_tokenizer, lengths=(400,), trials=12, needles=2, wording=words, part="calibration"
    )
    assert [s.meta["wording"] for s in samples[::2]] == [*words, *words]
    for s in samples:
        say = WORDINGS[s.meta["wording"]]
        assert say.fact.format(s.meta["names"][0]) in smollm2_tokenizer.decode(s.context)
        assert say.question.format(s.meta["names"][0]) in smollm2_tokenizer.decode(
            s.turns[0].prompt
        )
    # One of them alone makes the same context where its turn is.
    (alone, *_) = make(
        smollm2_tokenizer, lengths=(400,), trials=1, needles=2, wording="number", part="calibration"
    )
    assert alone.context == samples[0].context
    with pytest.raises(UsageError, match="wording 'rom': did you mean room"):
        Needle(wording=("number", "rom"))
    with pytest.raises(UsageError, match="wording ''"):
        Needle(wording=())


def test_depths_are_met_equally_often_and_where_they_say(smollm2_tokenizer: Tokenizer) -> None:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples = make(
        smollm2_tokenizer, lengths=(2048,), trials=20, needles=3, questions=2, depths=depths
    )
    assert Counter(s.meta["depth"] for s in samples) == dict.fromkeys(depths, 4)
    assert {s.meta["depth"] for s in samples[:5]} == set(depths)  # however few the trials are
    for s in samples:
        (position,) = s.meta["positions"]
        assert position / 2048 == pytest.approx(s.meta["depth"], abs=0.05)


def test_random_depths_fill_their_range(smollm2_tokenizer: Tokenizer) -> None:
    samples = make(smollm2_tokenizer, lengths=(400,), trials=60, depth_range=(0.2, 0.6))
    depths = np.array([s.meta["depth"] for s in samples])
    assert 0.2 <= depths.min() < 0.25
    assert 0.55 < depths.max() <= 0.6


def test_turns_are_one_conversation(smollm2_tokenizer: Tokenizer) -> None:
    (s, _) = make(smollm2_tokenizer, lengths=(400,), trials=2, needles=3, questions=2, mode="turns")
    ids = list(s.context)
    for turn in s.turns:
        ids += [*turn.prompt, *turn.answer]
    said = smollm2_tokenizer.decode(ids, skip_special=False)
    names = s.meta["names"]
    assert len(s.turns) == len(names) == 2
    values = [t.references[0] for t in s.turns]
    assert said.endswith(
        f"\n\nWhat is the magic number for {names[0]}?<|im_end|>\n<|im_start|>assistant\n"
        f"The magic number for {names[0]} is {values[0]}.<|im_end|>\n<|im_start|>user\n"
        f"What is the magic number for {names[1]}?<|im_end|>\n<|im_start|>assistant\n"
        f"The magic number for {names[1]} is {values[1]}"
    )
    assert said.count("<|im_start|>system") == 1
    assert "depth" not in s.meta
    assert len(s.meta["depths"]) == 2


def test_one_question_asks_for_several(smollm2_tokenizer: Tokenizer) -> None:
    (s,) = make(smollm2_tokenizer, lengths=(400,), trials=1, needles=3, mode="together")
    (turn,) = s.turns
    facts = dict(FACT.findall(smollm2_tokenizer.decode(s.context)))
    a, b, c = (facts[n] for n in s.meta["names"])
    assert turn.references == (f"{a}, {b} and {c}",)
    assert smollm2_tokenizer.decode(turn.answer) == f" {a}, {b} and {c}"


def test_seed_and_part_decide_everything(smollm2_tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"lengths": (400,), "trials": 8, "needles": 2}
    first = make(smollm2_tokenizer, 5, **options)
    assert first == make(smollm2_tokenizer, 5, **options)
    other = make(smollm2_tokenizer, 6, **options)
    tuning = make(smollm2_tokenizer, 5, part="calibration", **options)
    for these in (other, tuning):
        assert {s.context for s in first}.isdisjoint(s.context for s in these)
        assert {s.turns[0].references for s in first}.isdisjoint(
            s.turns[0].references for s in these
        )
    assert set(NAMES["calibration"]).isdisjoint(NAMES["test"])
    assert set(tuning[0].meta["names"]) <= set(NAMES["calibration"])
    # The haystack of a part is that part's text.
    sentences = load_text("python", "calibration").sentences
    text = FACT.sub("", smollm2_tokenizer.decode(tuning[0].context))
    assert sum(s in text for s in sentences) >= 5
    assert not any(s in text for s in load_text("python", "test").sentences if len(s) > 40)


def test_a_model_without_chat_template_is_asked_in_plain_text(
    smollm2_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", None)
    (s,) = make(smollm2_tokenizer, lengths=(400,), trials=1)
    (turn,), (name,) = s.turns, s.meta["names"]
    assert smollm2_tokenizer.decode(turn.prompt) == (
        f"\n\nQuestion: What is the magic number for {name}?\nAnswer: The magic number for {name} is"
    )
    assert len(s.context) == 400


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "turn"}, "mode 'turn': did you mean turns"),
        ({"needles": 0}, "needles: expected 1"),
        ({"needles": 2, "questions": 3}, r"questions: expected 1 .. needles \(2\), found 3"),
        ({"depths": [1.5]}, r"depths: .* found \[1.5\]"),
        ({"depth_range": [0.5]}, r"depth_range: .* found \[0.5\]"),
        ({"lengths": [0]}, r"lengths: .* found \[0\]"),
        ({"lengths": "long"}, "lengths: expected a list of numbers, found 'long'"),
        ({"text": "nmupy"}, "did you mean numpy"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=rf"tasks\[0\]: .*{message}"):
        TASKS.make("needle", options, "tasks[0]")


def test_impossible_lengths_are_refused(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="length 80: expected room for 4"):
        make(smollm2_tokenizer, lengths=(80,), trials=4, needles=4)
    with pytest.raises(UsageError, match="length 60000: the text has"):
        make(smollm2_tokenizer, lengths=(60000,), trials=1)
