"""Dropped tokens that stay rows of their own: chosen, kept and attended as the reference does.

The Rig compares every byte of their rows with the reference's choice, and the compensation tokens, which
hold the losers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Call, Rig, check
from pages import bubble, cyclic_store, linear_store
from razor_layers import Layer, TieError, as_bytes
from razor_memory import contiguous_store
from schedules import in_flight

from trt_razor.errors import UsageError
from trt_razor.kernels import Limits, RazorKernels
from trt_razor.policy import RazorPolicy

POLICY = RazorPolicy(sink_tokens=2, min_window=6, compression=None, comp_tokens=1, heavy_hitters=3)
SMALL = Layer(policy=POLICY, n_max=160)  # D = 64, g = 2, one retrieval and one local head


def with_policy(layer: Layer = SMALL, **changes: Any) -> Layer:
    return replace(layer, policy=layer.policy.with_(**changes))


LAYERS = [
    SMALL,
    replace(with_policy(comp_tokens=0, heavy_hitters=1), head_dim=128, group=4, retrieval=()),
    replace(with_policy(comp_tokens=4, heavy_hitters=64), group=1, dtype=torch.bfloat16),
    replace(
        with_policy(comp_tokens=32),
        head_dim=96,
        group=3,
        position="interleaved",
        table="pairs",
        rotary_dim=48,
        num_kv_heads=3,
        retrieval=(1,),
    ),
    replace(
        with_policy(comp_tokens=4, heavy_hitters=5),
        head_dim=256,
        dtype=torch.bfloat16,
        fp8=True,
        k_scale=0.0625,
        v_scale=0.25,
    ),
    replace(
        with_policy(comp_tokens=32, heavy_hitters=64, sink_tokens=0),
        group=20,
        fp8=True,
        num_kv_heads=1,
        retrieval=(),
    ),
    replace(with_policy(min_window=3, compression=3, comp_tokens=4), position="none", spare_rows=3),
    replace(with_policy(min_window=1), head_dim=96, group=7, fp8=True, dtype=torch.bfloat16),
    replace(SMALL, retrieval=(0, 1)),
]


def every_call() -> list[Call]:
    """Three sequences: long and short chunks, decode between them, all kinds of calls. Ring and rows wrap
    and fill at different times."""
    every = [(0, 1), (1, 1), (2, 1)]
    return [
        Call(contexts=[(0, 5), (1, 33), (2, 0)]),
        Call(contexts=[(0, 17), (1, 16), (2, 15)], slack=2),
        Call(generations=every),
        Call(contexts=[(2, 71), (0, 1)], generations=[(1, 1)], packed=True, use_total=True),
        Call(generations=every, slack=3),
        Call(contexts=[(1, 40), (0, 16)], generations=[(2, 1)], packed=True, one_each=True),
        Call(generations=[(2, 1), (1, 0), (0, 1)], packed=True),
    ]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_call(kernels: RazorKernels, layer: Layer) -> None:
    check(kernels, layer, every_call())


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3]], ids=str)
def test_the_same_bits_every_time(kernels_on: Callable[[int], RazorKernels], layer: Layer) -> None:
    check(kernels_on(13), layer, every_call(), twice=True)


# Lengths ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("min_window", [9, 12])
def test_prompts_around_every_boundary(kernels: RazorKernels, min_window: int) -> None:
    """The first dropped token, as many as there are rows and one more; then chunks of all lengths, of more
    tokens than judge too, behind rows that are full, half full and empty."""
    layer = replace(with_policy(min_window=min_window, heavy_hitters=4, comp_tokens=2), n_max=98)
    first = range(layer.policy.first_drop() - 1, layer.policy.first_drop() + 9)
    assert {3, 4, 5} <= {layer.policy.dropped(n) for n in first}
    every = list(enumerate(first))
    seconds = [3, 5, 4, 63, 64, 65, 2, 30, 1, 17]
    calls = [
        Call(contexts=every),
        Call(contexts=list(zip(range(10), seconds, strict=True)), packed=True),
        *[Call(generations=[(s, 1) for s in range(10)])] * 3,
    ]
    check(kernels, layer, calls, slots=10)


@pytest.mark.parametrize("size", [2, 3, 15, 16, 40])
def test_chunks_of_every_size(kernels: RazorKernels, size: int) -> None:
    """Short chunks choose as long ones do, by fewer queries."""
    layer = with_policy(heavy_hitters=20, comp_tokens=2)
    calls = [Call(contexts=[(0, size)])] * (120 // size) + [Call(generations=[(0, 1)])] * 2
    check(kernels, layer, calls, slots=1)


def test_a_context_of_one_token(kernels: RazorKernels) -> None:
    """Packed beside a longer one it goes the way of contexts, and chooses."""
    layer = with_policy(heavy_hitters=4, comp_tokens=2)
    call = Call(contexts=[(0, 1), (1, 2)], packed=True)
    check(kernels, layer, [Call(contexts=[(0, 20), (1, 9)]), *[call] * 20], slots=2)


def test_more_candidates_than_a_round_of_the_block(kernels: RazorKernels) -> None:
    """Hundreds of rows among a thousand candidates: several tiles of keys, several rounds."""
    policy = RazorPolicy(1, 8, None, comp_tokens=1, heavy_hitters=300)
    layer = Layer(num_kv_heads=1, group=1, retrieval=(), policy=policy, n_max=1500)
    check(kernels, layer, [Call(contexts=[(0, 1180)]), Call(contexts=[(0, 40)])], slots=1)


# Decode -------------------------------------------------------------------------------------------
DECODED = [
    (1, 0, {}),
    (1, 1, {"group": 1, "dtype": torch.bfloat16}),
    (3, 4, {"group": 17}),  # two tiles of queries
    (9, 1, {"group": 40, "num_kv_heads": 1, "retrieval": ()}),  # three
    (5, 0, {"group": 9, "head_dim": 96, "num_kv_heads": 3, "retrieval": (1,)}),
    (16, 4, {"head_dim": 256, "fp8": True, "k_scale": 0.03, "v_scale": 0.017, "group": 5}),
    (17, 1, {"head_dim": 128, "dtype": torch.bfloat16, "group": 8, "retrieval": ()}),
    (40, 4, {"fp8": True, "k_scale": 0.0625, "v_scale": 2.5, "position": "none"}),
]


@pytest.mark.parametrize(
    "heavy_hitters, comp_tokens, changes",
    DECODED,
    ids=lambda x: "" if isinstance(x, dict) else str(x),
)
def test_decode(
    kernels: RazorKernels, heavy_hitters: int, comp_tokens: int, changes: dict[str, Any]
) -> None:
    """Token by token: the first ones to be dropped fill the rows; then at each step the lowest candidate
    goes, a row or the token itself, while the ring wraps; at last a chunk chooses among what is left."""
    policy = POLICY.with_(heavy_hitters=heavy_hitters, comp_tokens=comp_tokens)
    layer = replace(SMALL, policy=policy, n_max=110, **changes)
    changed: list[bool] = []

    def calls(rig: Rig) -> Iterator[Call]:
        changed.clear()
        before = torch.empty(0)
        for _ in range(90):
            yield Call(generations=[(0, 1)])
            local = rig.sequences[0].cache.local
            assert local is not None
            rows = local.local_k[:, local.heavy_rows()]
            if before.shape == rows.shape and rows.shape[1]:
                changed.append(not torch.equal(rows[0], before[0]))
            before = rows.clone()
        yield Call(contexts=[(0, 20)])

    check(kernels, layer, calls, slots=1)
    assert changed.count(True) >= 5
    assert changed.count(False) >= 5 or heavy_hitters > 9  # of many the last is rarely the lowest


@pytest.mark.parametrize("case", [0, 2, 5, 7])
def test_decode_of_many_sequences(kernels: RazorKernels, case: int) -> None:
    """Unequal lengths in one batch: some still fill their rows, some have not dropped a token, one idles."""
    heavy_hitters, comp_tokens, changes = DECODED[case]
    policy = POLICY.with_(heavy_hitters=heavy_hitters, comp_tokens=comp_tokens)
    layer = replace(SMALL, policy=policy, n_max=64, **changes)
    filled = policy.first_drop() + heavy_hitters
    lengths = [1, policy.first_drop() - 2, min(filled, 40) - 2, 40]
    calls = [
        Call(contexts=list(enumerate(lengths))),
        *[Call(generations=[(3, 1), (1, 1), (0, 1), (2, 1)], slack=4)] * 4,
        *[Call(generations=[(2, 1), (3, 0), (0, 1), (1, 1)])] * 4,
        *[Call(contexts=[(1, 7)], generations=[(3, 1), (2, 1)], packed=True)] * 3,
        *[Call(generations=[(s, 1) for s in range(4)], one_each=True)] * 5,
    ]
    check(kernels, layer, calls, slots=4)


@pytest.mark.parametrize("head_dim, heavy_hitters", [(64, 127), (64, 128), (96, 150), (256, 70)])
def test_decode_with_many_rows(kernels: RazorKernels, head_dim: int, heavy_hitters: int) -> None:
    """More candidates than the block scores at once, one more than it does, and as many."""
    policy = POLICY.with_(heavy_hitters=heavy_hitters, comp_tokens=2)
    layer = replace(SMALL, policy=policy, head_dim=head_dim, n_max=240, retrieval=())
    prompt = policy.first_drop() + heavy_hitters
    check(
        kernels, layer, [Call(contexts=[(0, prompt)]), *[Call(generations=[(0, 1)])] * 24], slots=1
    )


def test_decode_over_many_blocks(kernels_on: Callable[[int], RazorKernels]) -> None:
    """A head's rows and its tiles of queries are spread over blocks of the launch: whoever finishes the
    last one chooses. Twice, with the same bits."""
    layer = replace(
        with_policy(heavy_hitters=64, comp_tokens=32),
        group=20,
        n_max=240,
        num_kv_heads=1,
        retrieval=(),
    )
    calls = [Call(contexts=[(0, 150), (1, 90)]), *[Call(generations=[(1, 1), (0, 1)])] * 12]
    check(kernels_on(13), layer, calls, slots=2, twice=True)


# Scores -------------------------------------------------------------------------------------------
def test_equal_scores_go_to_the_first(kernels: RazorKernels) -> None:
    """Queries of zeros leave the length of the values to decide, and most are equally long."""
    layer = replace(with_policy(heavy_hitters=6), position="none", n_max=96, retrieval=(), group=3)
    rig = Rig(kernels, layer, slots=1)
    tokens = rig._of(0).tokens
    tokens.q.zero_()
    tokens.ref_q.zero_()
    signs = tokens.v.sign().double()  # values of ones, and of twos at a few positions
    signs[:, 10] *= 2
    signs[:, 25:30] *= 2
    tokens.v.copy_(signs)
    tokens.ref_v.copy_(signs)
    tokens.v_bytes[:] = as_bytes(tokens.v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("razor_layers.SCORE_MARGIN", -1.0)
        rig.run([Call(contexts=[(0, 30)])])  # 10 is long; 25 .. 29 are in the window
        local = rig.sequences[0].cache.local
        assert local is not None
        held = local.local_v[0, 2:8].abs().amax(1).tolist()
        assert held == [1, 1, 1, 1, 1, 2], "positions 2 .. 6 and 10"
        rig.run([Call(contexts=[(0, 40)])])
        assert local.local_v[0, 2:8].abs().amax(1).tolist() == [2, 2, 2, 2, 2, 2]


def test_values_of_zeros_lose(kernels: RazorKernels) -> None:
    """A score of minus infinity is the lowest, and still wins where nothing else is left."""
    layer = replace(with_policy(heavy_hitters=20), position="none", n_max=96, retrieval=())
    rig = Rig(kernels, layer, slots=1)
    tokens = rig._of(0).tokens
    for x in (tokens.v, tokens.ref_v):
        x[:, 2:18] = 0
    tokens.v_bytes[:, 2:18] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("razor_layers.SCORE_MARGIN", -1.0)
        rig.run([Call(contexts=[(0, 32)]), Call(contexts=[(0, 32)])])


def with_values(rig: Rig, lengths: dict[int, float]) -> None:
    """The sequence 0 to be: queries of zeros, and values that are equally long but at these positions."""
    tokens = rig._of(0).tokens
    tokens.q.zero_()
    tokens.ref_q.zero_()
    values = tokens.v.sign().double()
    for position, length in lengths.items():
        values[:, position] *= length
    tokens.v.copy_(values)
    tokens.ref_v.copy_(values)
    tokens.v_bytes[:] = as_bytes(tokens.v)


@pytest.mark.parametrize("comp_tokens", [0, 2])
def test_of_equal_scores_the_last_candidate_loses(kernels: RazorKernels, comp_tokens: int) -> None:
    """Decode steps: the token that leaves the window, if it is no better than the rows; else the last of
    the lowest rows. Values of zeros are the lowest, and go the same way."""
    layer = with_policy(heavy_hitters=20, comp_tokens=comp_tokens)
    layer = replace(layer, position="none", n_max=96, retrieval=(), group=3)
    rig = Rig(kernels, layer, slots=1)
    longer = {p: 2.0 for p in (*range(30, 36), 50)} | {p: 0.0 for p in (5, 9, 21, 40, 41)}
    with_values(rig, longer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("razor_layers.SCORE_MARGIN", -1.0)
        rig.run([Call(generations=[(0, 1)])] * 38)  # 2 .. 21 fill the rows, up to 31 have left
        local = rig.sequences[0].cache.local
        assert local is not None

        def held() -> list[float]:
            return local.local_v[0, 2:22].abs().amax(1).tolist()

        expected = [1.0] * 20  # of positions 2 .. 21
        # Ones of the window enter rows of zeros, from the last, at 22, 23 and 24; twos those of ones.
        expected[18:] = [2.0, 2.0]
        assert held() == expected
        rig.run([Call(generations=[(0, 1)])] * 40)
        assert held() == [1.0] * 13 + [2.0] * 7


# Memory -------------------------------------------------------------------------------------------
# design, tokens_per_block, sinks, H, M, changes
PAGED = [
    ("cyclic", 8, 4, 1, 1, {}),
    ("cyclic", 32, 4, 3, 5, {"group": 4, "dtype": torch.bfloat16}),
    ("cyclic", 16, 4, 12, 2, {"num_kv_heads": 3, "retrieval": (1,)}),  # no bubble
    ("cyclic", 8, 2, 17, 1, {"fp8": True, "head_dim": 128}),  # heavy hitters over block edges
    ("cyclic", 64, 9, 20, 13, {"retrieval": ()}),
    ("linear", 8, 4, 9, 4, {}),
    ("linear", 32, 0, 64, 0, {"fp8": True, "k_scale": 0.05, "v_scale": 0.25}),
]


def _paged(case: tuple[str, int, int, int, int, dict]) -> Layer:
    design, block, sinks, heavy_hitters, m, changes = case
    layer = replace(SMALL, policy=RazorPolicy(sinks, 11, None, m, heavy_hitters), **changes)
    if design == "linear":
        return layer
    layer = replace(layer, bubble=bubble(layer.policy.kept_rows, block))
    return replace(layer, spare_rows=-layer.ring_rows % block)


@pytest.mark.parametrize("case", PAGED, ids=lambda c: f"{c[0]}-{c[1]}-s{c[2]}-H{c[3]}-M{c[4]}")
def test_paged(kernels: RazorKernels, case: tuple[str, int, int, int, int, dict]) -> None:
    layer = _paged(case)
    make = cyclic_store if case[0] == "cyclic" else linear_store
    calls = [*every_call(), *[Call(generations=[(2, 1), (0, 1), (1, 1)])] * 16]
    check(kernels, layer, calls, store=lambda: make(layer, case[1], 3, 5))


@pytest.mark.parametrize("case", [PAGED[1], PAGED[5]], ids=["cyclic", "linear"])
def test_in_flight(kernels: RazorKernels, case: tuple[str, int, int, int, int, dict]) -> None:
    """Requests come and go, with what their blocks and slots held."""
    layer = replace(_paged(case), n_max=72)
    if case[0] == "cyclic":
        layer = replace(layer, spare_rows=0)
        layer = replace(layer, spare_rows=-layer.ring_rows % case[1])
    make = cyclic_store if case[0] == "cyclic" else linear_store
    for attempt in range(10):
        rig = Rig(kernels, layer, make(layer, case[1], 3, attempt), seed=attempt)
        try:
            rig.run(in_flight(rig, random.Random(attempt), requests=5, max_batch=3, budget=29))
        except TieError:
            continue
        return
    raise AssertionError("no data without ties")


def test_slots(kernels: RazorKernels) -> None:
    layer = replace(SMALL, num_kv_heads=4, retrieval=(0, 3))
    check(kernels, layer, every_call(), store=lambda: contiguous_store(layer, 7, (5, 0, 6)))


def test_a_slot_begins_anew(kernels: RazorKernels) -> None:
    """Rows of an earlier sequence are not attended, nor candidates."""
    rig = Rig(kernels, with_policy(heavy_hitters=9), slots=2)
    for _ in range(2):
        rig.run([Call(contexts=[(0, 31), (1, 17)]), Call(generations=[(0, 1), (1, 1)])])
        rig.finish(0)
        rig.finish(1)


# Calls that do not fit ----------------------------------------------------------------------------
@pytest.mark.parametrize("lie", [(20, 41), (-1, 30), (159, 30), (2**31 - 1, 16)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_lengths_out_of_bounds_are_idle(
    kernels: RazorKernels, lie: tuple[int, int], packed: bool
) -> None:
    rig = Rig(kernels, SMALL, slots=3)
    rig.run([Call(contexts=[(0, 20), (1, 20), (2, 24)])])
    call = Call(contexts=[(0, 40), (1, 17), (2, 20)], lies={2: lie}, packed=packed)
    rig.run([call, Call(generations=[(0, 1), (1, 1), (2, 1)])])


def test_more_rows_than_the_library_takes(kernels: RazorKernels) -> None:
    layer = SMALL.config()
    layer.c_struct.heavy_hitters = 1025
    with pytest.raises(UsageError, match=r"heavy_hitters: expected 0\.\.1024, found 1025"):
        kernels.check_layer(layer)


def test_they_need_room(kernels: RazorKernels) -> None:
    layer = replace(SMALL.config(), local_ring_offset=4)
    with pytest.raises(UsageError, match=r"local_ring_offset: expected at least .* \(2 \+ 3\)"):
        kernels.check_layer(layer)


def _limits() -> Iterator[Limits]:
    for batch in (1, 3, 8):
        for tokens in (0, 16, 300, 5000):
            for chunk in (1, 15, 16, 300):
                if chunk <= max(tokens, 1):
                    yield Limits(batch, tokens, chunk, 1000)


@pytest.mark.parametrize("comp_tokens", [0, 1, 32])
def test_workspace_never_falls(kernels: RazorKernels, comp_tokens: int) -> None:
    layer = replace(with_policy(comp_tokens=comp_tokens, heavy_hitters=64), n_max=5000).config()
    sizes = [(limits, kernels.workspace_size(layer, limits)) for limits in _limits()]
    for a, small in sizes:
        for b, large in sizes:
            fits = all(
                getattr(a, name) <= getattr(b, name)
                for name in ("max_batch", "max_context_tokens", "max_chunk")
            )
            assert not fits or small <= large, (a, b)
