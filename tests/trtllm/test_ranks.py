"""Heads over tensor-parallel ranks: rounding up, order, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import head_map_of, spec_of

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.zoo import zoo_spec
from trt_razor.trtllm.ranks import (
    check_ranks,
    dense_layout,
    equalise,
    query_heads,
    rank_layout,
    ranking,
)


def make_map(heads: list[list[int]], kv_heads: int, **scores: list[list[float]]) -> HeadMap:
    return HeadMap(
        "m",
        "f",
        len(heads),
        kv_heads,
        tuple(map(tuple, heads)),
        "test",
        "by hand",
        scores={n: tuple(map(tuple, s)) for n, s in scores.items()},
    )


@st.composite
def maps(draw: st.DrawFn) -> tuple[HeadMap, int]:
    """A head map, with scores or without, and a number of ranks that divides its heads."""
    tp = draw(st.integers(1, 4))
    kv = tp * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 4))
    heads = [sorted(draw(st.sets(st.integers(0, kv - 1)))) for _ in range(layers)]
    score = st.lists(st.floats(0, 1), min_size=kv, max_size=kv)
    table = st.lists(score, min_size=layers, max_size=layers)
    return make_map(heads, kv, **draw(st.dictionaries(st.sampled_from("ab"), table))), tp


# Rounding up ------------------------------------------------------------------------------------
def test_a_layer_gains_its_next_best_heads() -> None:
    scores = [[0.1, 0.9, 0.3, 0.2, 0.8, 0.4], [0.5, 0.1, 0.2, 0.2, 0.6, 0.0]]
    grown = equalise(make_map([[1], [0, 3, 4]], 6, echo=scores), 2)
    assert grown.retrieval_heads == ((1, 4), (0, 2, 3, 4))
    assert grown.options == {"added_for_ranks": 2, "tp_size": 2}
    grown = equalise(make_map([[1], [0, 3, 4]], 6, echo=scores), 3)
    assert grown.retrieval_heads == ((1, 4, 5), (0, 3, 4))


def test_equal_scores_and_none_add_the_lowest_index() -> None:
    assert equalise(make_map([[3]], 4), 2).retrieval_heads == ((0, 3),)
    flat = make_map([[0]], 4, echo=[[0.5, 0.2, 0.2, 0.2]])
    assert equalise(flat, 3).retrieval_heads == ((0, 1, 2),)


def test_layers_can_be_made_equal() -> None:
    grown = equalise(make_map([[1], [], [0, 2, 3]], 6), 2, every_layer=True)
    assert grown.retrieval_heads == ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))
    grown = equalise(make_map([[1], [], [0, 2, 3]], 6), 2)
    assert grown.retrieval_heads == ((0, 1), (), (0, 1, 2, 3))


def test_nothing_to_add_is_the_same_map() -> None:
    even = make_map([[0, 3], [], [1, 2]], 4)
    assert equalise(even, 2) is even
    assert equalise(even, 1) is even
    assert equalise(even, 2, every_layer=True) is not even


def test_scores_of_several_kinds_compare_by_their_largest() -> None:
    head_map = make_map([[]], 3, echo=[[0.0, 0.001, 0.002]], induction=[[40.0, 0.0, 10.0]])
    assert ranking(head_map).tolist() == [[1.0, 0.5, 1.0]]
    assert ranking(make_map([[0]], 3, echo=[[0.0, 0.0, 0.0]])).tolist() == [[0.0, 0.0, 0.0]]


@given(maps())
def test_equalise_never_drops_a_head(case: tuple[HeadMap, int]) -> None:
    head_map, tp = case
    score = ranking(head_map)
    for layer, (old, new) in enumerate(
        zip(head_map.retrieval_heads, equalise(head_map, tp).retrieval_heads, strict=True)
    ):
        assert set(old) <= set(new)
        assert len(new) % tp == 0
        assert len(new) - len(old) < tp  # no more than needed
        left = set(range(head_map.num_kv_heads)) - set(new)
        for added in set(new) - set(old):
            assert all(score[layer, added] >= score[layer, h] for h in left)


# Order ------------------------------------------------------------------------------------------
def test_each_rank_has_its_retrieval_heads_first() -> None:
    layout = rank_layout(make_map([[1, 2, 4, 7], [0, 7], []], 8), 2)
    assert layout.order[0] == (1, 2, 0, 3, 4, 7, 5, 6)
    assert layout.order[1] == (0, 1, 2, 3, 7, 4, 5, 6)
    assert layout.order[2] == tuple(range(8))
    assert (layout.num_retrieval, layout.num_local) == ((2, 1, 0), (2, 3, 4))
    assert layout.heads_per_rank == 4


@given(maps())
def test_layout_moves_every_head_once(case: tuple[HeadMap, int]) -> None:
    head_map, tp = case
    head_map = equalise(head_map, tp)
    layout = rank_layout(head_map, tp)
    permuted = layout.head_map(head_map)
    size = layout.heads_per_rank
    for layer, order in enumerate(layout.order):
        assert sorted(order) == list(range(head_map.num_kv_heads))
        retrieving = set(head_map.retrieval_heads[layer])
        r = layout.num_retrieval[layer]
        for rank in range(tp):
            mine = order[rank * size : (rank + 1) * size]
            assert [h in retrieving for h in mine] == [True] * r + [False] * (size - r)
            assert list(mine) == [*sorted(mine[:r]), *sorted(mine[r:])]
        # The new map marks the very heads of the old one, at their new places.
        assert {order[i] for i in permuted.retrieval_heads[layer]} == retrieving
        assert len(permuted.retrieval_heads[layer]) == len(retrieving)
    assert (permuted.fingerprint, permuted.scores) == (head_map.fingerprint, {})


def test_heads_in_front_stay_where_they_are_on_one_rank() -> None:
    layout = rank_layout(make_map([[0, 1], [0], [0, 1, 2]], 3), 1)
    assert set(layout.order) == {(0, 1, 2)}


def test_layout_refuses_what_does_not_divide() -> None:
    with pytest.raises(
        UsageError, match=r"^layer 1: expected a multiple of 2 retrieval heads, found 1$"
    ):
        rank_layout(make_map([[0, 1], [2]], 4), 2)
    with pytest.raises(UsageError, match="expected a divisor of 4 KV heads, found 3"):
        rank_layout(make_map([[0, 1, 2]], 4), 3)


def test_dense_layout_moves_nothing() -> None:
    spec = spec_of("llama", 8, 4)
    layout = dense_layout(spec, 2)
    assert layout.order == ((0, 1, 2, 3),) * spec.num_layers
    assert layout.num_retrieval == (2,) * spec.num_layers
    assert layout.num_local == (0,) * spec.num_layers
    assert dense_layout(spec, 8).num_retrieval == (1,) * spec.num_layers  # shared KV heads


def test_query_heads_follow_their_kv_head() -> None:
    assert query_heads([2, 0], 3) == [6, 7, 8, 0, 1, 2]
    assert query_heads([1, 0], 1) == [1, 0]


# Numbers of ranks -------------------------------------------------------------------------------
def test_ranks_that_work() -> None:
    for name, sizes in {
        "qwen-72b": (1, 2, 4, 8, 16, 32),
        "qwen2.5-72b": (1, 2, 4),
        "llama3.1-8b": (1, 2, 4),
        "baichuan2-13b": (1, 2, 4, 5, 8, 10, 20),
    }.items():
        for tp_size in sizes:
            check_ranks(zoo_spec(name), tp_size, razor=True)
    for tp_size in (1, 2, 4, 8, 16, 32):
        check_ranks(zoo_spec("llama3.1-8b"), tp_size, razor=False)


@pytest.mark.parametrize(
    "tp_size, razor, message",
    [
        (0, False, "expected a divisor of the 32 attention heads of 'llama3.1-8b', found 0"),
        (3, True, "expected a divisor of the 32 attention heads of 'llama3.1-8b', found 3"),
        (-2, True, "expected a divisor of the 32 attention heads of 'llama3.1-8b', found -2"),
        (16, True, "ranks that share a KV head cannot compress it; use a smaller --tp-size"),
        (8, True, "which cannot both retrieve and be local; use at most --tp-size 4"),
    ],
)
def test_ranks_that_do_not(tp_size: int, razor: bool, message: str) -> None:
    with pytest.raises(UsageError) as e:
        check_ranks(zoo_spec("llama3.1-8b"), tp_size, razor)
    assert str(e.value).startswith("tp_size: ")
    assert message in str(e.value)


def test_dense_ranks_divide_kv_heads_or_are_a_multiple() -> None:
    spec = dataclasses.replace(zoo_spec("llama3.1-8b"), num_heads=24, num_kv_heads=8)
    check_ranks(spec, 24, razor=False)
    with pytest.raises(UsageError, match="a divisor or a multiple of the 8 KV heads"):
        check_ranks(spec, 12, razor=False)


def test_random_maps_are_usable() -> None:
    """The helper that the other tests draw maps from."""
    head_map = head_map_of(spec_of("llama", 8, 4))
    assert all(0 < len(heads) < 4 for heads in head_map.retrieval_heads)
