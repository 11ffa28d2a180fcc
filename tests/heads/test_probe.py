from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import tiny_spec

from trt_razor.errors import UsageError
from trt_razor.heads.probe import make_probe, position_warning, token_pool


def test_layout_is_bos_then_the_block_repeated() -> None:
    probe = make_probe(tiny_spec(), length=50, repeats=4, seed=3)
    assert probe.offset == 1
    assert probe.tokens.shape == (201,)
    assert probe.tokens.dtype == np.int64
    assert probe.tokens[0] == 1
    blocks = probe.tokens[1:].reshape(4, 50)
    assert (blocks == blocks[0]).all()
    assert len(set(blocks[0].tolist())) == 50  # drawn without replacement


def test_no_bos_no_offset() -> None:
    probe = make_probe(tiny_spec(bos_token_id=None), length=10, repeats=2)
    assert probe.offset == 0
    assert len(probe.tokens) == 20


def test_ids_are_ordinary_tokens_of_the_middle_half() -> None:
    spec = tiny_spec(bos_token_id=100, eos_token_ids=(101, 190))
    pool = token_pool(spec)
    assert pool.min() == 64
    assert pool.max() == 191
    assert not {100, 101, 190} & set(pool.tolist())
    block = make_probe(spec, length=len(pool), repeats=2).tokens[1 : 1 + len(pool)]
    assert sorted(block) == sorted(pool)


def test_a_small_vocabulary_is_used_several_times_over() -> None:
    block = make_probe(tiny_spec(), length=300, repeats=2).tokens[1:301]
    counts = np.bincount(block)
    assert set(counts[counts > 0].tolist()) == {2, 3}  # 128 ids, 300 places


def test_seeds_decide_the_draw_for_ever() -> None:
    a, b, c = (make_probe(tiny_spec(), 20, 2, seed).tokens for seed in (7, 7, 8))
    assert (a == b).all()
    assert (a != c).any()
    # The draw itself, so that a change of rule or of NumPy's streams cannot pass unseen.
    assert make_probe(tiny_spec(), 5, 2, 0).tokens[1:6].tolist() == DRAW


DRAW = [75, 156, 177, 67, 84]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"length": 1}, "length: expected at least 2"),
        ({"repeats": 1}, "repeats: expected at least 2"),
        ({"seed": -1}, "seed: expected >= 0"),
        ({"length": 1024}, "largest probe length with 4 repeats is 1023"),
    ],
)
def test_impossible_probes(changes: dict[str, int], message: str) -> None:
    arguments = {"length": 10, "repeats": 4, "seed": 0, **changes}
    with pytest.raises(UsageError, match=message):
        make_probe(tiny_spec(), **arguments)


def test_the_largest_length_it_names_is_accepted() -> None:
    assert len(make_probe(tiny_spec(), length=1023, repeats=4).tokens) == 4093


def test_vocabulary_too_small() -> None:
    with pytest.raises(UsageError, match="ordinary token ids"):
        make_probe(tiny_spec(vocab_size=12), length=4, repeats=2)


def test_warning_only_past_the_models_positions() -> None:
    spec = tiny_spec()
    assert position_warning(spec, make_probe(spec, 127, 4)) is None
    warning = position_warning(spec, make_probe(spec, 128, 4))
    assert warning is not None
    assert "513 tokens" in warning
    assert "a probe length of 127 fits" in warning
    wide = dataclasses.replace(spec, max_positions=1024)
    assert position_warning(wide, make_probe(wide, 128, 4)) is None
