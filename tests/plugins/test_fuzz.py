"""Random layers, random schedules, random memory. RAZOR_FUZZ=1000 runs that many."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from harness import Rig
from pages import bubble, cyclic_store, linear_store
from razor_layers import Layer, TieError
from razor_memory import LayerStore, contiguous_store
from schedules import AXES, layer_of, random_calls

from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy

CASES = int(os.environ.get("RAZOR_FUZZ", "16"))
SEQUENCES = 4


def random_policy(rng: random.Random) -> RazorPolicy:
    return RazorPolicy(
        sink_tokens=rng.choice([0, 1, 2, 4, 5, 9]),
        min_window=rng.choice([1, 2, 5, 8, 13, 30]),
        compression=rng.choice([None, None, 1, 2, 3, 5]),
        comp_tokens=rng.choice([0, 1, 1, 1, 2, 5, 8, 40]),
        heavy_hitters=rng.choice([0, 0, 1, 3, 9, 40]),
    )


def random_layer(rng: random.Random) -> Layer:
    choice = {name: rng.choice(values) for name, values in AXES.items()}
    choice["group"] = rng.choice([1, 2, 3, 4, 5, 6, 8, 9])
    choice["head_dim"] = rng.choice([64, 64, 96, 128, 256])
    policy = random_policy(rng)
    choice["policy"], choice["comp_tokens"] = policy, policy.comp_tokens
    choice["heavy_hitters"] = policy.heavy_hitters
    return layer_of(choice, n_max=rng.choice([17, 40, 64, 97]))


def random_store(layer: Layer, rng: random.Random) -> tuple[Layer, LayerStore]:
    """Memory for the layer, which gets the bubble that goes with it."""
    kind = rng.choice(["plain", "slots", "linear", "cyclic", "cyclic"])
    tokens_per_block, seed = rng.choice([8, 16, 32, 64]), rng.randrange(1 << 30)
    if kind == "cyclic":
        m, space = layer.policy.comp_tokens, bubble(layer.policy.kept_rows, tokens_per_block)
        needed = m * (layer.head_dim + 2) * 4
        if space == 0 or needed <= space * layer.row_bytes:
            layer = replace(layer, bubble=space)
            return layer, cyclic_store(layer, tokens_per_block, SEQUENCES, seed)
    if kind == "linear":
        return layer, linear_store(layer, tokens_per_block, SEQUENCES, seed)
    order = rng.sample(range(SEQUENCES + 2), SEQUENCES + 2) if kind == "slots" else None
    return layer, contiguous_store(layer, SEQUENCES + 2, order)


def run_seed(kernels: RazorKernels, seed: int, calls: int = 8) -> Rig:
    """One random case; a failure can be repeated by its seed."""
    for attempt in range(10):
        rng = random.Random(f"{seed}/{attempt}")
        layer, store = random_store(random_layer(rng), rng)
        rig = Rig(kernels, layer, store, seed=seed)
        try:
            rig.run(random_calls(rig, rng, calls, SEQUENCES), twice=rng.random() < 0.3)
        except TieError:
            continue
        return rig
    raise AssertionError(f"seed {seed}: no data without ties between clusters")


@pytest.mark.parametrize("seed", range(CASES))
def test_random(kernels: RazorKernels, seed: int) -> None:
    run_seed(kernels, seed)
