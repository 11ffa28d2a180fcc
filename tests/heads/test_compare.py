from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.compare import compare, depth_bars, rank_correlation


def a_map(heads: tuple[tuple[int, ...], ...], **scores: object) -> HeadMap:
    return HeadMap("m", "f" * 64, len(heads), 3, heads, "test", "test", scores=scores)  # type: ignore[arg-type]


def test_what_two_maps_have_in_common() -> None:
    table = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    turned = tuple(tuple(-x for x in row) for row in table)
    a = a_map(((0, 1), (2,)), echo=table)
    b = a_map(((1, 2), (2,)), echo=table, effect=turned)
    found = compare(a, b, ("first", "second"))
    assert found.both == ((0, 1), (1, 2))
    assert (found.only_a, found.only_b) == (((0, 0),), ((0, 2),))
    assert found.jaccard == 0.5
    assert found.by_chance == 1.5
    assert found.correlations == (("echo", "echo", 1.0), ("echo", "effect", -1.0))
    text = found.table()
    assert "in both: 2 (two random choices: 1.5), overlap (Jaccard) 0.500" in text
    assert "only A (layer.head): 0.0" in text
    assert "echo of A, effect of B: -1.000" in text
    assert found.to_json()["only_b"] == ["0.2"]


def test_equal_maps_agree() -> None:
    a = a_map(((0,), ()), echo=((1.0, 0.0, 0.5), (0.0, 0.0, 0.0)))
    found = compare(a, a, ("a", "a"))
    assert found.jaccard == 1.0
    assert found.correlations == (("echo", "echo", 1.0),)
    empty = a_map(((), ()))
    assert compare(empty, empty, ("a", "b")).jaccard == 1.0


def test_maps_of_other_models_are_refused() -> None:
    a = a_map(((0,),))
    with pytest.raises(UsageError, match="B: a head map of 'other'"):
        compare(a, dataclasses.replace(a, fingerprint="0" * 64, model="other"), ("A", "B"))
    with pytest.raises(UsageError, match="expected 1 layers of 3 KV heads as in A, found 2 of 3"):
        compare(a, a_map(((0,), ())), ("A", "B"))


def test_rank_correlation_with_ties() -> None:
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: r = 4.5 / sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(22.5))
    assert rank_correlation([1, 2, 3], [9, 30, 700]) == pytest.approx(1)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_bars_by_layer() -> None:
    bars = depth_bars([((0, 2), (), (1,)), ((), (0,), (1,))], ("A", "B"))
    assert bars.splitlines() == [
        "layer  A     B",
        "    0  ██ 2  ·",
        "    1  ·     █ 1",
        "    2  █ 1   █ 1",
    ]
    assert depth_bars([((0,),)]).splitlines() == ["layer", "    0  █ 1"]
