"""The kernels over paged caches, laid out as TensorRT-LLM lays them out (pages.py)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from harness import Call, Rig, check
from pages import bubble, cyclic_store, linear_store
from razor_layers import Layer, TieError
from razor_memory import LayerStore
from schedules import everything, in_flight

from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy

GROUPED = Layer(num_kv_heads=3, group=2, retrieval=(1,), n_max=72)


def cyclic(layer: Layer, tokens_per_block: int) -> Layer:
    """The layer with a bubble behind its sinks, and a ring of whole blocks as the runtime has it."""
    layer = replace(layer, bubble=bubble(layer.policy.kept_rows, tokens_per_block))
    return replace(layer, spare_rows=-layer.ring_rows % tokens_per_block)


def make_store(
    layer: Layer, design: str, tokens_per_block: int, slots: int, seed: int
) -> LayerStore:
    make = cyclic_store if design == "cyclic" else linear_store
    return make(layer, tokens_per_block, slots, seed)


# design, tokens_per_block, sinks, M, changes
CASES = [
    ("cyclic", 8, 4, 1, {}),
    ("cyclic", 8, 3, 1, {"group": 4, "dtype": torch.bfloat16}),
    ("cyclic", 32, 4, 1, {"group": 7}),
    ("cyclic", 32, 4, 5, {"group": 4}),
    ("cyclic", 64, 4, 13, {"retrieval": ()}),
    ("cyclic", 128, 4, 5, {"head_dim": 128, "group": 8, "dtype": torch.bfloat16}),
    ("cyclic", 32, 4, 1, {"head_dim": 96, "position": "alibi", "group": 3}),
    ("cyclic", 32, 4, 0, {"head_dim": 256, "position": "interleaved", "table": "pairs"}),
    ("cyclic", 32, 4, 3, {"fp8": True, "k_scale": 0.0625, "v_scale": 0.03, "group": 4}),
    ("cyclic", 64, 9, 1, {"fp8": True, "group": 1, "dtype": torch.bfloat16}),
    ("cyclic", 8, 8, 2, {"group": 4}),  # no bubble: compensation tokens by slot
    ("cyclic", 8, 13, 1, {}),  # sinks in two blocks
    ("cyclic", 16, 4, 1, {"num_kv_heads": 4, "retrieval": (0, 1, 2, 3)}),
    ("linear", 8, 4, 1, {}),
    ("linear", 32, 4, 5, {"group": 4, "dtype": torch.bfloat16}),
    ("linear", 64, 2, 32, {"group": 8, "head_dim": 128}),
    ("linear", 128, 0, 1, {"fp8": True, "k_scale": 0.05, "v_scale": 0.25}),
    ("linear", 32, 4, 1, {"num_kv_heads": 5, "retrieval": (0, 2, 4), "position": "alibi"}),
]


def _name(case: tuple[object, ...]) -> str:
    design, tokens_per_block, sinks, m, changes = case
    assert isinstance(changes, dict)
    return f"{design}-{tokens_per_block}-sinks{sinks}-M{m}" + "".join(
        f"-{str(v).removeprefix('torch.')}" for v in changes.values()
    )


def _layer(design: str, tokens_per_block: int, sinks: int, m: int, changes: dict) -> Layer:
    window = 11 if tokens_per_block < 32 else 23
    layer = replace(GROUPED, policy=RazorPolicy(sinks, window, None, m), **changes)
    return cyclic(layer, tokens_per_block) if design == "cyclic" else layer


@pytest.mark.parametrize("case", CASES, ids=map(_name, CASES))
def test_every_call(kernels: RazorKernels, case: tuple) -> None:
    """The schedule of the contiguous tests: padded and packed calls, idle sequences."""
    layer, design = _layer(*case), case[0]
    check(kernels, layer, everything(), store=lambda: make_store(layer, design, case[1], 3, 5))


@pytest.mark.parametrize("case", CASES[::2], ids=map(_name, CASES[::2]))
def test_in_flight(kernels: RazorKernels, case: tuple) -> None:
    """Requests come and go; blocks and slots pass from one to the next with what they held."""
    layer, design = _layer(*case), case[0]
    for attempt in range(10):
        rng = random.Random(attempt)
        rig = Rig(kernels, layer, make_store(layer, design, case[1], 3, attempt), seed=attempt)
        try:
            rig.run(in_flight(rig, rng, requests=6, max_batch=3, budget=29))
        except TieError:
            continue
        return
    raise AssertionError("no data without ties between clusters")


def test_blocks_of_one_prompt_at_once(kernels: RazorKernels) -> None:
    """The whole prompt in one chunk, as the runtime without chunked context does."""
    layer = cyclic(replace(GROUPED, policy=RazorPolicy(4, 11, None, 1), n_max=150), 8)
    calls = [
        Call(contexts=[(0, 140), (1, 3)], packed=True, use_total=True),
        *[Call(generations=[(0, 1), (1, 1)], packed=True, use_total=True, one_each=True)] * 10,
    ]
    check(kernels, layer, calls, store=lambda: cyclic_store(layer, 8, 2, seed=3))


def test_growing_window(kernels: RazorKernels) -> None:
    """A window that grows with the sequence over a ring made for the longest one."""
    layer = cyclic(replace(GROUPED, policy=RazorPolicy(4, 5, 3, 1)), 16)
    check(kernels, layer, everything(), store=lambda: cyclic_store(layer, 16, 3, seed=4))
