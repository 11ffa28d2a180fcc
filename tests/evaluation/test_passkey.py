"""The passkey: once in its context, at its depth, unlike from sample to sample."""

from __future__ import annotations

import re

import pytest

from trt_razor.errors import UsageError
from trt_razor.evaluation.tasks.passkey import Passkey
from trt_razor.models.tokenizer import Tokenizer

pytestmark = pytest.mark.real


def test_key_is_hidden_at_its_depth(smollm2_tokenizer: Tokenizer) -> None:
    task = Passkey(lengths=(600, 1000), trials=6, depths=(0.0, 0.5, 1.0))
    samples = list(task.samples(smollm2_tokenizer, 0))
    assert len(samples) == task.count() == 12
    for s in samples:
        (turn,) = s.turns
        (position,) = s.meta["positions"]
        text = smollm2_tokenizer.decode(s.context)
        assert len(s.context) == s.meta["length"]
        assert re.findall(r"pass key is (\d{5})", text) == [turn.references[0]]
        assert smollm2_tokenizer.decode(s.context[position:]).startswith(" The pass key is")
        assert position / len(s.context) == pytest.approx(s.meta["depth"], abs=0.15)
    assert len({s.turns[0].references for s in samples}) == 12


def test_parts_draw_other_keys(smollm2_tokenizer: Tokenizer) -> None:
    keys = [
        {
            s.turns[0].references
            for s in Passkey((300,), 20, part=part).samples(smollm2_tokenizer, 0)
        }
        for part in ("calibration", "test")
    ]
    assert keys[0].isdisjoint(keys[1])


def test_wrong_part_is_named() -> None:
    with pytest.raises(UsageError, match="part 'tests': did you mean test"):
        Passkey(part="tests")
