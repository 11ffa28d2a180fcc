"""The kernels against the reference over contiguous caches: shapes, types, boundaries, calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Call, Rig, check
from razor_layers import Layer
from razor_memory import contiguous_store
from schedules import AXES, POLICIES, chunks_of, everything, layer_of, pairwise

from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy

SMALL = Layer()  # D = 64, g = 2, one retrieval and one local head, N0 = 2, S0 = 6, M = 1
WINDOW = POLICIES["window"]

MATRIX = [layer_of(choice) for choice in pairwise(AXES)]


@pytest.mark.parametrize("layer", MATRIX, ids=str)
def test_matrix(kernels: RazorKernels, layer: Layer) -> None:
    """Every pair of values of every two axes, through every kind of call."""
    check(kernels, layer, everything())


# Lengths ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("comp_tokens", [0, 1, 3])
def test_token_by_token(kernels: RazorKernels, name: str, comp_tokens: int) -> None:
    """A sequence decoded from its first token to max_seq_len: every D, every row of the ring."""
    layer = replace(SMALL, policy=POLICIES[name].with_(comp_tokens=comp_tokens), n_max=40)
    check(kernels, layer, [Call(generations=[(0, 1)])] * 40, slots=1)


@pytest.mark.parametrize(
    "name, dtype",
    list(zip(POLICIES, itertools.cycle([torch.float16, torch.bfloat16]), strict=False)),
)
def test_prompts_of_every_length(kernels: RazorKernels, name: str, dtype: torch.dtype) -> None:
    """Prompts of 1 .. 32 tokens in one chunk, then two single tokens and a second chunk."""
    layer = replace(SMALL, policy=POLICIES[name], dtype=dtype)
    for first in range(1, 33, 8):
        every = list(enumerate(range(first, first + 8)))
        check(
            kernels,
            layer,
            [
                Call(contexts=every),
                *[Call(generations=[(s, 1) for s, _ in every])] * 2,
                Call(contexts=[(s, 1 + (5 * s) % 13) for s, _ in every], packed=True),
            ],
            seed=first,
            slots=8,
        )


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 11, 24, 48])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_of_every_size(kernels: RazorKernels, size: int, packed: bool) -> None:
    """The same prompt up to max_seq_len in chunks below, at and above sinks, window and ring."""
    layer = replace(SMALL, policy=WINDOW.with_(comp_tokens=2), num_kv_heads=3, retrieval=(1,))
    calls = [Call(contexts=[(0, c)], packed=packed) for c in chunks_of(48, size)]
    check(kernels, layer, calls, slots=1)


@pytest.mark.parametrize("spare_rows", [0, 1, 5])
def test_compression_one_drops_nothing(kernels: RazorKernels, spare_rows: int) -> None:
    layer = replace(SMALL, policy=RazorPolicy(2, 1, 1), spare_rows=spare_rows)
    rig = check(kernels, layer, [Call(contexts=[(0, 41)]), *[Call(generations=[(0, 1)])] * 3])
    assert rig.store.comp(0, 0).count.floats().tolist() == [0]


def test_max_seq_len_of_one_token(kernels: RazorKernels) -> None:
    for policy in (WINDOW, POLICIES["no-sinks"]):
        layer = replace(SMALL, policy=policy, n_max=1)
        check(kernels, layer, [Call(generations=[(0, 1)])])
        check(kernels, layer, [Call(contexts=[(0, 1)], packed=True)])


LARGE = replace(SMALL, policy=RazorPolicy(5, 90, None, 1), n_max=340)
# Layers of several tiles, and multiprocessors of the device, which decide how rows are split.
LONG = [
    (replace(LARGE, group=1, num_kv_heads=3, retrieval=(1,)), 1),
    (replace(LARGE, group=1, num_kv_heads=3, retrieval=(1,)), 13),
    (replace(LARGE, group=4, dtype=torch.bfloat16, head_dim=128), 4),
    (replace(LARGE, group=4, dtype=torch.bfloat16, head_dim=128), 29),
    (replace(LARGE, group=5, fp8=True, k_scale=0.0625, v_scale=0.05), 13),
    (replace(LARGE, position="alibi"), 13),
    (replace(LARGE, group=8, policy=RazorPolicy(4, 70, None, 32)), 4),
    (replace(LARGE, group=16, policy=RazorPolicy(4, 50, 3, 1)), 13),
    (replace(LARGE, group=4, retrieval=()), 2),
]


@pytest.mark.parametrize("layer, multiprocessors", LONG, ids=lambda x: str(x))
def test_many_tiles(
    kernels_on: Callable[[int], RazorKernels], layer: Layer, multiprocessors: int
) -> None:
    """Chunks and pasts of several tiles, unequal ones, on devices that split them differently; the
    same call made twice gives the same bits."""
    kernels = kernels_on(multiprocessors)
    calls = [
        Call(contexts=[(0, 140), (1, 1), (2, 67)], packed=True),
        Call(contexts=[(2, 70)], generations=[(0, 1), (1, 1)], packed=True),
        Call(contexts=[(0, 190)], generations=[(2, 1), (1, 1)], packed=True),
    ]
    decode = [
        Call(generations=[(0, 1), (1, 1), (2, 1)]),
        Call(generations=[(0, 1), (2, 1), (1, 0)], slack=60),
    ]
    rig = check(kernels, layer, calls)
    rig.run(decode, twice=True)


# Numbers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_scale(kernels: RazorKernels, dtype: torch.dtype, scale: float) -> None:
    """Nearly uniform softmax, and one in which few rows have all the weight."""
    layer = replace(SMALL, dtype=dtype, scale=scale, group=4)
    check(kernels, layer, everything())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_saturates(kernels: RazorKernels, dtype: torch.dtype) -> None:
    """Values beyond 448 scales are stored as the largest number, tiny ones as subnormal numbers."""
    layer = replace(SMALL, dtype=dtype, fp8=True, v_scale=0.25, k_scale=4.0)
    rig = check(kernels, layer, everything(), loud=100.0)
    values = torch.from_numpy(rig.sequences[1].tokens.v_bytes).view(torch.float8_e4m3fn).float()
    keys = torch.from_numpy(rig.sequences[1].tokens.k_bytes).view(torch.float8_e4m3fn).float()
    assert (values.abs() == 448).any(), "the data of this test must saturate"
    assert ((keys.abs() < 2**-6) & (keys != 0)).any(), "and hold subnormal numbers"


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    "call", [Call(generations=[(0, 1)]), Call(contexts=[(0, 1)], packed=True)], ids=["one", "chunk"]
)
def test_log_weights_are_read_not_computed(kernels: RazorKernels, group: int, call: Call) -> None:
    """A weighting other than the count needs no new kernel."""
    policy = POLICIES["half"].with_(comp_tokens=3)
    assert policy.dropped(30) == policy.dropped(31), "nothing is folded, the weights stay"
    rig = Rig(kernels, replace(SMALL, retrieval=(), group=group, policy=policy), slots=1)
    rig.run([Call(contexts=[(0, 30)])])
    local = rig.sequences[0].cache.local
    assert local is not None
    local.comp_log_weight += torch.tensor([1.5, -0.5, 0.25])
    for head in range(len(rig.layer.local)):
        place = rig.store.comp(0, head).log_weight
        place.floats()[:] = local.comp_log_weight[head].numpy()
        place.adopt()
    rig.run([call])


# Calls --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slots(kernels: RazorKernels, dtype: torch.dtype) -> None:
    """Batches in any order over slots in any order; slots of nobody stay untouched."""
    layer = replace(SMALL, dtype=dtype, num_kv_heads=4, retrieval=(0, 3))
    check(kernels, layer, everything(), store=lambda: contiguous_store(layer, 7, (5, 0, 6)))


def test_a_slot_begins_anew(kernels: RazorKernels) -> None:
    """past = 0 makes compensation tokens of an earlier sequence disappear."""
    rig = Rig(kernels, replace(SMALL, policy=WINDOW.with_(comp_tokens=5)), slots=2)
    for first in (Call(contexts=[(0, 3), (1, 30)]), Call(generations=[(0, 1), (1, 1)])):
        rig.run([Call(contexts=[(0, 31), (1, 17)]), Call(generations=[(0, 1), (1, 1)])])
        rig.finish(0)
        rig.finish(1)
        rig.run([first, Call(generations=[(0, 1), (1, 1)])])
        rig.finish(0)
        rig.finish(1)


@pytest.mark.parametrize(
    "layer", [SMALL, replace(SMALL, retrieval=()), replace(SMALL, retrieval=(0, 1))]
)
def test_idle_batches_change_nothing(kernels: RazorKernels, layer: Layer) -> None:
    rig = Rig(kernels, layer)
    idle = [
        Call(contexts=[(0, 0), (1, 0)], slack=3),
        Call(generations=[(0, 0), (1, 0)]),
        Call(generations=[(0, 0), (1, 0)], packed=True),
    ]
    rig.run([*idle, Call(contexts=[(0, 14), (1, 3)]), *idle])


# What the device is told instead of (past, chunk); the sequence has 10 tokens, chunks at most 6.
LIES: dict[str, tuple[int, int]] = {
    "negative past": (-1, 3),
    "negative chunk": (10, -2),
    "smallest past": (-(2**31), 1),
    "largest past": (2**31 - 1, 1),
    "beyond max_seq_len": (46, 3),
    "past = max_seq_len": (48, 1),
}


# Without those whose total is no int32.
TOTAL_LIES = [name for name, (past, _) in LIES.items() if abs(past) < 2**30]


@pytest.mark.parametrize(
    "lie, use_total", [*((n, False) for n in LIES), *((n, True) for n in TOTAL_LIES)]
)
def test_lengths_out_of_bounds_are_idle(kernels: RazorKernels, lie: str, use_total: bool) -> None:
    past, chunk = LIES[lie]
    rig = Rig(kernels, SMALL, slots=3)
    rig.run([Call(contexts=[(0, 10), (1, 10), (2, 4)])])
    rig.run([Call(contexts=[(0, 6), (1, 3), (2, 5)], lies={1: (past, chunk)}, use_total=use_total)])
    one, lies = [(0, 1), (1, 1), (2, 1)], {1: (past, min(chunk, 1))}
    rig.run([Call(generations=one, lies=lies, use_total=use_total)])
    rig.run([Call(generations=one, lies=lies, use_total=use_total, packed=True)])


def test_chunks_out_of_bounds_are_idle(kernels: RazorKernels) -> None:
    """Longer or further than the call says, more than one token of a generation, behind the rows."""
    rig = Rig(kernels, SMALL, slots=3)
    rig.run([Call(contexts=[(0, 10), (1, 10), (2, 4)])])
    rig.run([Call(contexts=[(0, 6), (1, 3), (2, 5)], lies={1: (10, 7)})])
    # A past beyond max_past of the call, which is 16 here: workspace and grids are made for that.
    rig.run([Call(contexts=[(0, 6), (1, 3), (2, 5)], lies={1: (17, 3)})])
    rig.run([Call(contexts=[(0, 6), (2, 2)], generations=[(1, 1)], packed=True, lies={2: (10, 2)})])
    # The last context of a packed call would end behind the rows of contexts.
    rig.run([Call(contexts=[(0, 6), (1, 1)], generations=[(2, 1)], packed=True, lies={1: (10, 2)})])


@pytest.mark.parametrize("call", [{}, {"packed": True}, {"use_total": True}, {"slack": 7}])
def test_layouts_and_bounds(kernels: RazorKernels, call: dict[str, Any]) -> None:
    """The same tokens padded or packed, by past or by total, with exact or generous bounds."""
    rig = check(
        kernels,
        replace(SMALL, num_kv_heads=3, retrieval=(2,)),
        [
            Call(contexts=[(0, 9), (1, 20)], **call),
            Call(generations=[(0, 1), (1, 1)], **call),
            Call(contexts=[(0, 4), (1, 1)], **call),
        ],
    )
    assert rig.n(1) == 22
