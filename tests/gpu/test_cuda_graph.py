"""A captured call, replayed with other lengths, computes what fresh calls compute."""

from __future__ import annotations

import pytest
import torch
from gpu_device import skip_without_gpu

skip_without_gpu()

from razor_layers import Layer  # noqa: E402
from sequences import Sequences, same_bytes  # noqa: E402

from trt_razor.kernels import RazorKernels  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402

LAYERS = [
    Layer(n_max=96),
    Layer(num_kv_heads=4, group=4, head_dim=128, retrieval=(1,), dtype=torch.bfloat16, n_max=96),
    Layer(policy=RazorPolicy(2, 6, 3, comp_tokens=3), fp8=True, n_max=96),
    Layer(policy=RazorPolicy(2, 6, None, comp_tokens=3, heavy_hitters=5), retrieval=(), n_max=96),
]


def _capture(run: Sequences) -> torch.cuda.CUDAGraph:
    """The call as it stands now, which runs once to warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.call()
    return graph


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 24])
def test_replay_with_other_lengths(layer: Layer, rows: int) -> None:
    """rows = 1: decode. More: chunks of any length up to that, none included. Some find free rows for what
    they drop, others choose their heavy hitters."""
    kernels, batch = RazorKernels(), 3
    replayed, fresh = (Sequences(kernels, layer, batch, rows) for _ in range(2))
    numbers = torch.Generator().manual_seed(rows)

    def tokens(count: int) -> torch.Tensor:
        shape = batch, count, layer.config().qkv_width
        return torch.randn(shape, generator=numbers).to(layer.dtype)

    # Captured with idle sequences: what was captured must not depend on lengths.
    replayed.set(tokens(rows), [0] * batch, [0] * batch)
    graph = _capture(replayed)

    past = [0] * batch
    if rows == 1:  # sequences of different lengths to decode on
        start = Sequences(kernels, layer, batch, 20)
        past = [20, 7, 13]
        start.set(tokens(20), [0] * batch, past)
        start.call()
        for run in (replayed, fresh):
            run.copy_caches(start)
    for step in range(24 if rows == 1 else 8):
        chunk = (
            [1] * batch if rows == 1 else [(5 * step + 7 * b) % (rows + 1) for b in range(batch)]
        )
        chunk = [min(c, layer.n_max - p) for c, p in zip(chunk, past, strict=True)]
        data = tokens(rows)
        for run in (replayed, fresh):
            run.set(data, past, chunk)
        graph.replay()
        fresh.call()
        torch.cuda.synchronize()
        assert bool(torch.isfinite(replayed.out).all()), f"step {step}"
        assert bool((replayed.out != 0).any()), f"step {step}"
        assert same_bytes(replayed.out, fresh.out), f"step {step}: outputs differ"
        for a, b in zip(replayed.tensors(), fresh.tensors(), strict=True):
            assert same_bytes(a, b), f"step {step}: caches differ"
        past = [p + c for p, c in zip(past, chunk, strict=True)]
