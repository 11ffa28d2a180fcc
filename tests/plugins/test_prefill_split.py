"""Chunks over pasts that prefill cuts into pieces (plugins/kernels/prefill_split.cuh), against the reference.

The shim is built with pieces of one tile of keys (64; head_dim 256: 32) at least, and splits from 128 keys on.
The number of multiprocessors decides whether, and how short pieces may become.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness import Call, Rig, check
from pages import bubble, cyclic_store, linear_store
from razor_layers import Layer
from razor_memory import LayerStore, contiguous_store
from shim_build import build_folder, build_shim
from test_sanitizers import run as run_sanitized

from trt_razor.kernels import Limits, RazorKernels
from trt_razor.policy import RazorPolicy

Device = Callable[[int], RazorKernels]

LAYER = Layer(
    num_kv_heads=3, retrieval=(1,), policy=RazorPolicy(5, 150, None, 1), n_max=420
)  # the ring of a local head wraps and is three pieces long
MANY = 80  # multiprocessors: more pieces than there are tiles of keys


def launches(kernels: RazorKernels) -> int:
    count = kernels._library._c.razor_shim_launches
    count.restype = ctypes.c_uint64
    return int(count())


def prompts(*lengths: int) -> Call:
    return Call(contexts=list(enumerate(lengths)), packed=True)


# Layers -------------------------------------------------------------------------------------------
LAYERS = [
    LAYER,
    replace(LAYER, head_dim=96, group=3, dtype=torch.bfloat16, position="interleaved"),
    replace(LAYER, head_dim=128, group=8, policy=RazorPolicy(4, 120, None, 32)),
    replace(LAYER, head_dim=256, group=1, dtype=torch.bfloat16),
    replace(LAYER, head_dim=256, group=4, fp8=True, k_scale=0.0625, v_scale=0.03),
    replace(LAYER, group=5, fp8=True, dtype=torch.bfloat16, v_scale=0.25, spare_rows=7),
    replace(LAYER, head_dim=96, fp8=True, position="alibi", k_scale=0.05),
    replace(LAYER, head_dim=128, position="alibi", group=7, dtype=torch.bfloat16),
    replace(LAYER, position="none", policy=RazorPolicy(0, 90, None, 0), group=20),
    replace(LAYER, retrieval=(), policy=RazorPolicy(3, 140, None, 70), group=2),  # comp: 2 tiles
    replace(LAYER, retrieval=(0, 1, 2), group=1),
    replace(LAYER, policy=RazorPolicy(2, 10, 2, 3), group=4),
]


@pytest.mark.parametrize("multiprocessors", [3, MANY])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers(kernels_on: Device, layer: Layer, multiprocessors: int) -> None:
    """Unequal sequences; a question behind a long past, tokens to verify, chunks of several tiles."""
    calls = [
        prompts(290, 30, 170),
        Call(contexts=[(0, 8), (1, 1), (2, 3)]),
        Call(contexts=[(2, 50)], generations=[(0, 1), (1, 1)], packed=True),
        Call(contexts=[(1, 9), (0, 70)], packed=True, use_total=True),
    ]
    check(kernels_on(multiprocessors), layer, calls, twice=True)


# Lengths ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", range(1, 71, 10))
@pytest.mark.parametrize("group", [1, 3])
def test_chunks_of_every_length(kernels_on: Device, first: int, group: int) -> None:
    """1 .. 70 tokens: below, at and above a tile of query rows."""
    layer = replace(LAYER, group=group, num_kv_heads=2)
    every = range(first, first + 10)
    calls = [
        prompts(*(185 + i for i in range(10))),
        Call(contexts=list(enumerate(every)), packed=first % 20 == 1),
    ]
    check(kernels_on(MANY), layer, calls, slots=10)


@pytest.mark.parametrize("head_dim, edge", [(64, 64), (64, 128), (128, 192), (256, 32), (256, 160)])
@pytest.mark.parametrize("multiprocessors", [14, MANY])
def test_pasts_around_edges(
    kernels_on: Device, head_dim: int, edge: int, multiprocessors: int
) -> None:
    """Pieces end before, at and behind the past, the first and the last token of a chunk."""
    layer = replace(
        LAYER, head_dim=head_dim, num_kv_heads=2, policy=RazorPolicy(4, 66, None, 2), n_max=480
    )
    pasts = [*range(edge - 4, edge + 3), 2 * edge + 60]
    calls = [prompts(*pasts), Call(contexts=[(s, 1 + s % 4) for s in range(len(pasts))])]
    check(kernels_on(multiprocessors), layer, calls, slots=len(pasts))


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 8, 21, 47, 132])
def test_devices(kernels_on: Device, multiprocessors: int) -> None:
    """Pieces of any number of tiles, and items that are not cut beside others that are."""
    layer = replace(LAYER, policy=RazorPolicy(3, 40, None, 1), n_max=700)
    calls = [prompts(600, 90), *[Call(contexts=[(0, 20), (1, 33)])] * 2]
    check(kernels_on(multiprocessors), layer, calls, slots=2)


@pytest.mark.parametrize("size", [16, 48, 130])
def test_prompt_in_chunks(kernels_on: Device, size: int) -> None:
    """From nothing to max_seq_len: the sequence becomes long enough on the way."""
    layer = replace(LAYER, group=4, head_dim=128)
    chunks = [Call(contexts=[(0, min(size, 420 - n))]) for n in range(0, 420, size)]
    check(kernels_on(MANY), layer, chunks, slots=1)


# Calls --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True])
def test_many_sequences(kernels_on: Device, packed: bool) -> None:
    """More than the lanes of a warp, in any order, some idle."""
    layer = replace(LAYER, num_kv_heads=2, policy=RazorPolicy(2, 70, None, 1), n_max=160)
    size = 70
    order = [(s * 29) % size for s in range(size)]
    calls = [
        Call(contexts=[(s, 1 + (s * 37) % 150) for s in order], packed=True),
        Call(contexts=[(s, 0 if s % 3 == 0 else 1 + s % 4) for s in order], packed=packed),
    ]
    check(kernels_on(MANY), layer, calls, slots=size)


IDLE = [
    [(0, 0), (1, 4), (2, 5)],
    [(0, 7), (1, 0), (2, 2)],
    [(0, 3), (1, 6), (2, 0)],
    [(0, 0), (1, 0), (2, 1)],
    [(0, 0), (1, 0), (2, 0)],
]


@pytest.mark.parametrize("contexts", IDLE)
@pytest.mark.parametrize("retrieval", [(1,), (), (0, 1, 2)])
def test_idle_sequences(
    kernels_on: Device, contexts: list[tuple[int, int]], retrieval: tuple[int, ...]
) -> None:
    layer = replace(LAYER, retrieval=retrieval, policy=RazorPolicy(5, 130, None, 3))
    calls = [prompts(200, 140, 260), Call(contexts=contexts, slack=2)]
    if any(chunk for _, chunk in contexts):
        calls.append(Call(contexts=contexts, packed=True))
    check(kernels_on(MANY), layer, calls)


@pytest.mark.parametrize("lie", [(-1, 3), (250, 9), (2**31 - 1, 1), (261, 5)])
@pytest.mark.parametrize("liar", [0, 1, 2])
def test_lengths_out_of_bounds_are_idle(
    kernels_on: Device, lie: tuple[int, int], liar: int
) -> None:
    rig = Rig(kernels_on(MANY), LAYER, slots=3)
    calls = [
        prompts(200, 140, 260),
        Call(contexts=[(0, 6), (1, 5), (2, 6)], lies={liar: lie}),
        Call(contexts=[(0, 6), (1, 5), (2, 6)]),
    ]
    rig.run(calls)


@pytest.mark.parametrize("slack", [1, 64, 300])
@pytest.mark.parametrize("multiprocessors", [6, MANY])
def test_generous_bounds(kernels_on: Device, slack: int, multiprocessors: int) -> None:
    """The host does not know how long sequences are: pieces follow the lengths on the device."""
    calls = [prompts(20, 75), *[Call(contexts=[(0, 4), (1, 8)], slack=slack)] * 3]
    check(kernels_on(multiprocessors), LAYER, calls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_scale(kernels_on: Device, dtype: torch.dtype, scale: float) -> None:
    """Pieces of about equal weight, and one that has nearly all of it."""
    layer = replace(LAYER, dtype=dtype, scale=scale, group=4)
    check(kernels_on(MANY), layer, [prompts(280, 150), Call(contexts=[(0, 17), (1, 30)])])


# Memory -------------------------------------------------------------------------------------------
# design, tokens_per_block, M, changes
PAGED = [
    ("cyclic", 8, 1, {}),
    ("cyclic", 32, 5, {"head_dim": 128, "group": 4, "dtype": torch.bfloat16}),
    ("cyclic", 64, 1, {"fp8": True, "k_scale": 0.0625, "position": "alibi"}),
    ("linear", 16, 40, {"group": 8}),
    ("linear", 128, 0, {"head_dim": 256, "fp8": True}),
]


@pytest.mark.parametrize("case", PAGED, ids=lambda c: f"{c[0]}-{c[1]}-M{c[2]}")
def test_paged(kernels_on: Device, case: tuple[str, int, int, dict]) -> None:
    design, tokens_per_block, m, changes = case
    layer = replace(LAYER, policy=RazorPolicy(4, 140, None, m), **changes)
    if design == "cyclic":
        layer = replace(layer, bubble=bubble(4, tokens_per_block))
        layer = replace(layer, spare_rows=-layer.ring_rows % tokens_per_block)
    make = cyclic_store if design == "cyclic" else linear_store
    calls = [
        prompts(290, 30, 170),
        Call(contexts=[(2, 50), (0, 8)], generations=[(1, 1)], packed=True),
        Call(contexts=[(0, 40), (1, 100)], packed=True),
    ]
    check(kernels_on(MANY), layer, calls, store=lambda: make(layer, tokens_per_block, 3, 5))


def test_slots(kernels_on: Device) -> None:
    """Sequences of a batch in slots of any order."""

    def store() -> LayerStore:
        return contiguous_store(LAYER, 6, (4, 0, 5))

    calls = [prompts(290, 30, 170), Call(contexts=[(2, 5), (0, 40)], packed=True)]
    check(kernels_on(MANY), LAYER, calls, store=store)


@pytest.mark.parametrize("m", [0, 3])
def test_heavy_hitters(kernels_on: Device, m: int) -> None:
    """Pieces end before, in and behind the rows of heavy hitters, which are full in one sequence, in part
    used in another, and unused in the third."""
    policy = RazorPolicy(3, 100, None, comp_tokens=m, heavy_hitters=70)
    layer = replace(LAYER, policy=policy)
    assert [policy.heavy(n) for n in (290, 30, 170)] == [70, 0, 67]
    calls = [
        prompts(290, 30, 170),
        Call(contexts=[(2, 11), (1, 8), (0, 40)], packed=True),
        Call(contexts=[(0, 8), (2, 16)], generations=[(1, 1)], packed=True),
    ]
    check(kernels_on(MANY), layer, calls)


# Which way ----------------------------------------------------------------------------------------
def test_split_only_where_the_chip_is_not_filled(kernels_on: Device) -> None:
    """One more launch, other roundings; the same numbers on a device that is too small for it, or
    with a past that is too short."""
    found = {}
    calls = [Call(contexts=[(0, 8), (1, 8)]), Call(contexts=[(0, 200), (1, 200)])]
    calls.append(calls[0])
    for multiprocessors in (1, MANY):
        kernels = kernels_on(multiprocessors)
        rig = Rig(kernels, LAYER, slots=2, seed=3)
        for i, call in enumerate(calls):
            before = launches(kernels)
            out = rig.call(call)
            found[multiprocessors, i] = launches(kernels) - before, out
    for i, split in enumerate((False, True, True)):
        (one, out), (many, out_many) = found[1, i], found[MANY, i]
        assert many - one == split
        assert torch.equal(out, out_many) != split


def test_order_of_blocks_changes_nothing(kernels_on: Device) -> None:
    kernels, found = kernels_on(MANY), []
    for seed in (0, 1, 2):
        kernels._library._c.razor_shim_set_seed(ctypes.c_uint64(seed))
        rig = Rig(kernels, LAYER, slots=3, seed=4)
        rig.run([prompts(290, 30, 170)])
        found.append(rig.call(Call(contexts=[(0, 8), (1, 40), (2, 25)])))
    kernels._library._c.razor_shim_set_seed(ctypes.c_uint64(0))
    assert all(torch.equal(found[0].view(torch.int16), x.view(torch.int16)) for x in found)


@pytest.mark.parametrize("head_dim, group", [(64, 1), (96, 7), (128, 4), (256, 8)])
def test_workspace(kernels: RazorKernels, head_dim: int, group: int) -> None:
    """Never falls when a limit grows, and pieces have a bounded share of it."""
    layer = replace(LAYER, head_dim=head_dim, group=group, n_max=1 << 20)
    axes = ((1, 2, 33), (1, 7, 8, 16, 63, 64, 65), (0, 119, 120, 127, 128, 5000, 1 << 19))

    def size(batch: int, chunk: int, past: int) -> int:
        return kernels.workspace_size(
            layer.config(),
            Limits(batch, max_context_tokens=batch * 70, max_chunk=chunk, max_past=past),
        )

    sizes = {numbers: size(*numbers) for numbers in itertools.product(*axes)}
    for a, b in itertools.product(sizes, sizes):
        if all(x <= y for x, y in zip(a, b, strict=True)):
            assert sizes[a] <= sizes[b], f"limits {a} and {b}"
    for batch, chunk, past in sizes:
        without = size(batch, 1, 0)
        assert sizes[batch, chunk, past] - without <= 21 << 20
    assert sizes[1, 64, 1 << 19] > sizes[1, 64, 0]


SANITIZED = """
from harness import Call, check
from test_prefill_split import LAYERS, prompts
for layer in LAYERS[1:7]:
    check(kernels, layer, [prompts(150, 30, 79), Call(contexts=[(2, 34), (0, 3), (1, 0)], slack=1)])
print("clean")
"""


def test_sanitizers_have_nothing_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAZOR_SHIM_SMS", str(MANY))
    library = build_shim(build_folder() / "shim-asan", "-DRAZOR_SHIM_SANITIZE=ON")
    done = run_sanitized(library, SANITIZED)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.strip() == "clean"
    assert "runtime error" not in done.stderr
