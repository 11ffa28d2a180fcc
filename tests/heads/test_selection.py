from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import tiny_spec

from trt_razor.errors import RazorError, UsageError
from trt_razor.heads.selection import SelectionOptions, select, share_count, uniform_share
from trt_razor.heads.stability import stability

ECHO = np.array([[0.9, 0.0, 0.1, 0.0], [0.0, 0.8, 0.2, 0.0]])
INDUCTION = np.array([[0.0, 0.2, 0.0, 0.3], [0.1, 0.0, 0.0, 0.4]])
SCORES = {"echo": ECHO, "induction": INDUCTION}


def test_paper_is_the_union_of_both_tops() -> None:
    options = SelectionOptions(induction_share=0.25, echo_share=0.125, min_echo=1)
    choice = select(SCORES, options)
    assert choice.by_echo == ((0,), ())
    assert choice.by_induction == ((3,), (3,))
    assert choice.heads == ((0, 3), (3,))


def test_the_echo_floor() -> None:
    options = SelectionOptions(induction_share=0.0, echo_share=0.01, min_echo=3)
    assert select(SCORES, options).heads == ((0,), (1, 2))
    many = SelectionOptions(induction_share=0.0, echo_share=0.01, min_echo=99)
    assert select(SCORES, many).heads == ((0, 1, 2, 3), (0, 1, 2, 3))  # never more than there are
    none = SelectionOptions(induction_share=0.0, echo_share=0.0, min_echo=3)
    assert select(SCORES, none).heads == ((), ())  # a share of 0 asks for none


def test_combined_ranks_by_the_larger_relative_score() -> None:
    # relative echo of (0,0) is 1 and of (1,1) 0.89; relative induction of (1,3) is 1, of (0,3) 0.75
    choice = select(SCORES, SelectionOptions(method="combined", combined_share=0.375))
    assert choice.heads == ((0,), (1, 3))
    assert choice.by_echo == ((0,), (1,))
    assert choice.by_induction == ((), (3,))


@pytest.mark.parametrize("method, heads", [("echo", ((0,), (1,))), ("induction", ((3,), (3,)))])
def test_one_score_alone(method: str, heads: tuple[tuple[int, ...], ...]) -> None:
    options = SelectionOptions(method=method, induction_share=0.25, echo_share=0.25, min_echo=0)
    assert select(SCORES, options).heads == heads


@pytest.mark.parametrize("method", ["paper", "combined", "echo", "induction"])
def test_ties_go_to_the_lower_layer_then_the_lower_head(method: str) -> None:
    flat = np.full((3, 4), 0.5)
    options = SelectionOptions(method, 0.5, 0.5, 0.5, min_echo=0)
    assert select({"echo": flat, "induction": flat}, options).heads == ((0, 1, 2, 3), (0, 1), ())


@pytest.mark.parametrize("method", ["paper", "combined"])
def test_whole_and_empty_shares(method: str) -> None:
    zeros = {"echo": np.zeros((2, 2)), "induction": np.zeros((2, 2))}
    assert select(zeros, SelectionOptions(method, 1.0, 1.0, 1.0)).heads == ((0, 1), (0, 1))
    assert select(zeros, SelectionOptions(method, 0.0, 0.0, 0.0)).heads == ((), ())


@pytest.mark.parametrize(
    "share, total, count", [(0.14, 50, 7), (0.14, 90, 13), (0.01, 90, 1), (0, 90, 0), (1, 7, 7)]
)
def test_shares_round_up_but_not_by_a_binary_fraction(share: float, total: int, count: int) -> None:
    assert share_count(share, total) == count


@pytest.mark.parametrize("name", ["induction_share", "echo_share", "combined_share"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), True, "0.5"])
def test_shares_outside_0_to_1(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name}: expected a share between 0 and 1"):
        SelectionOptions(**{name: value})  # type: ignore[arg-type]


def test_wrong_options_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean combined"):
        SelectionOptions(method="combine")
    with pytest.raises(UsageError, match="min_echo: expected >= 0"):
        SelectionOptions(min_echo=-1)


def test_bad_scores_are_named() -> None:
    with pytest.raises(RazorError, match=r"scores\.induction: missing"):
        select({"echo": ECHO}, SelectionOptions())
    with pytest.raises(RazorError, match="echo is"):
        select({"echo": ECHO[:1], "induction": INDUCTION}, SelectionOptions())
    bad = ECHO.copy()
    bad[1, 2] = np.nan
    with pytest.raises(RazorError, match=r"scores\.echo\[1\]\[2\]: not a finite number"):
        select({"echo": bad, "induction": INDUCTION}, SelectionOptions())


@pytest.mark.parametrize(
    "layers, kv, share", [(30, 3, 0.15), (80, 8, 0.15), (5, 2, 0.5), (4, 4, 1)]
)
def test_uniform_share_is_even_over_layers_and_heads(layers: int, kv: int, share: float) -> None:
    spec = tiny_spec(num_layers=layers, num_kv_heads=kv, num_heads=2 * kv)
    head_map = uniform_share(spec, share)
    assert head_map.num_retrieval == share_count(share, layers * kv)
    per_layer = [len(h) for h in head_map.retrieval_heads]
    assert max(per_layer) - min(per_layer) <= 1
    per_head = np.bincount([h for row in head_map.retrieval_heads for h in row], minlength=kv)
    assert per_head.max() - per_head.min() <= 1
    assert head_map.method == "spread"
    assert head_map.fingerprint == spec.fingerprint()


def test_uniform_share_refuses_a_wrong_share() -> None:
    with pytest.raises(UsageError, match="share: expected a share between 0 and 1"):
        uniform_share(tiny_spec(), 1.5)


def test_stability_of_three_choices() -> None:
    choices = (((0, 1), ()), ((0,), (1,)), ((0, 1), ()))
    found = stability([5, 6, 7], choices)
    assert found.overlaps == (
        (5, 6, pytest.approx(1 / 3)),
        (5, 7, 1.0),
        (6, 7, pytest.approx(1 / 3)),
    )
    assert found.mean == pytest.approx(5 / 9)
    assert found.min == pytest.approx(1 / 3)
    assert found.frequency == {
        (0, 0): 1.0,
        (0, 1): pytest.approx(2 / 3),
        (1, 1): pytest.approx(1 / 3),
    }
    assert found.to_json()["chosen_by_all"] == 1
    assert found.to_json()["chosen_by_some"] == {"0.1": 0.6667, "1.1": 0.3333}
    assert "seeds 5 and 6: overlap (Jaccard) 0.333" in found.table()
    assert "0.1 (67%), 1.1 (33%)" in found.table()


def test_two_empty_choices_agree() -> None:
    assert stability([0, 1], [((), ()), ((), ())]).min == 1.0
