"""RazorPolicy: the window rule, the ring layout, JSON, and every refusal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_razor.errors import UsageError
from trt_razor.policy import MAX_COMP_TOKENS, MAX_HEAVY_HITTERS, PRESETS, RazorPolicy

policies = st.builds(
    RazorPolicy,
    sink_tokens=st.integers(0, 20),
    min_window=st.integers(1, 200),
    compression=st.none() | st.integers(1, 12),
    comp_tokens=st.integers(0, MAX_COMP_TOKENS),
)
lengths = st.integers(0, 3000)


@given(policies, lengths)
def test_window_and_dropped_grow_by_at_most_one(policy: RazorPolicy, n: int) -> None:
    assert policy.window(n + 1) - policy.window(n) in (0, 1)
    assert policy.dropped(n + 1) - policy.dropped(n) in (0, 1)


@given(policies, lengths)
def test_kept_and_dropped_add_up(policy: RazorPolicy, n: int) -> None:
    kept = min(n, policy.sink_tokens + policy.window(n))
    assert kept + policy.dropped(n) == n


@given(policies, st.data())
def test_ring_rows_of_live_positions_are_distinct(policy: RazorPolicy, data: st.DataObject) -> None:
    n_max = data.draw(st.integers(1, 1500))
    n = data.draw(st.integers(0, n_max))
    rows = policy.ring_rows(n_max)
    # The window of n, and the token a decode step writes before it folds.
    live = list(range(policy.sink_tokens + policy.dropped(n), n))
    if policy.sink_tokens <= n < n_max:
        live.append(n)
    taken = {(p - policy.sink_tokens) % rows for p in live}
    assert len(taken) == len(live)
    assert policy.local_rows(n_max) == policy.sink_tokens + rows


@given(policies, st.integers(1, 1500))
def test_ring_wastes_at_most_one_row(policy: RazorPolicy, n_max: int) -> None:
    live = max(0, n_max - policy.sink_tokens - policy.dropped(n_max))
    assert policy.ring_rows(n_max) - 1 <= live <= policy.ring_rows(n_max)


@given(policies)
def test_first_drop_is_minimal(policy: RazorPolicy) -> None:
    if policy.compression == 1:
        with pytest.raises(UsageError, match="keeps every token"):
            policy.first_drop()
        assert policy.dropped(10**6) == 0
        return
    n = policy.first_drop()
    assert policy.dropped(n) == 1
    assert policy.dropped(n - 1) == 0


@pytest.mark.parametrize(
    ("n", "window", "dropped"),
    [
        (4004, 4000, 0),
        (4005, 4000, 1),
        (20000, 4000, 15996),
        (20001, 4001, 15996),
        (131072, 26215, 104853),
    ],
)
def test_paper_preset(n: int, window: int, dropped: int) -> None:
    paper = PRESETS["paper"]
    assert (paper.window(n), paper.dropped(n)) == (window, dropped)
    assert paper.first_drop() == 4005


def test_fixed_window_never_grows() -> None:
    tight = PRESETS["tight"]
    assert tight.window(10**6) == tight.min_window
    assert tight.ring_rows(10**6) == tight.min_window + 1


@given(policies)
def test_json_round_trip(policy: RazorPolicy) -> None:
    assert RazorPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sink_tokens", -1),
        ("sink_tokens", True),
        ("sink_tokens", 4.0),
        ("min_window", 0),
        ("min_window", "4000"),
        ("compression", 0),
        ("compression", 2.5),
        ("compression", True),
        ("comp_tokens", -1),
        ("comp_tokens", MAX_COMP_TOKENS + 1),
        ("comp_tokens", None),
        ("heavy_hitters", -1),
        ("heavy_hitters", MAX_HEAVY_HITTERS + 1),
    ],
)
def test_wrong_value_names_the_field(field: str, value: object) -> None:
    data = {**RazorPolicy().to_json(), field: value}
    with pytest.raises(UsageError, match=rf"policy\.{field}") as e:
        RazorPolicy.from_json(data)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("field", sorted(RazorPolicy().to_json()))
def test_missing_field_is_named(field: str) -> None:
    data = RazorPolicy().to_json()
    del data[field]
    with pytest.raises(UsageError, match=rf"manifest\.policy\.{field}: missing"):
        RazorPolicy.from_json(data, "manifest.policy")


def test_unknown_field_is_named() -> None:
    with pytest.raises(UsageError, match=r"policy\.window: unknown field"):
        RazorPolicy.from_json({**RazorPolicy().to_json(), "window": 3})


def test_with_changes_one_field_and_validates() -> None:
    policy = RazorPolicy().with_(compression=None)
    assert policy.compression is None
    assert policy.with_(compression=5) == RazorPolicy()
    with pytest.raises(UsageError, match=r"policy\.min_window"):
        policy.with_(min_window=0)
