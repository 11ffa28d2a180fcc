"""Threads that call at the same time, each with its stream, caches and workspace, do not disturb each other."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_device import skip_without_gpu

skip_without_gpu()

from razor_layers import Layer  # noqa: E402
from sequences import Sequences, same_bytes  # noqa: E402

from trt_razor.errors import UsageError  # noqa: E402
from trt_razor.kernels import RazorKernels  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402

LAYERS = [
    Layer(n_max=128),
    Layer(head_dim=128, group=4, dtype=torch.bfloat16, n_max=128),
    Layer(num_kv_heads=3, retrieval=(), head_dim=96, n_max=128),
    Layer(policy=RazorPolicy(2, 9, None, comp_tokens=4, heavy_hitters=7), group=4, n_max=128),
    Layer(num_kv_heads=1, retrieval=(0,), head_dim=256, group=8, n_max=128),
]


def _generate(kernels: RazorKernels, layer: Layer, seed: int) -> list[torch.Tensor]:
    """A prompt of 40 tokens and 40 more, one by one; all outputs and the caches at the end."""
    numbers = torch.Generator().manual_seed(seed)
    prompt, one = Sequences(kernels, layer, 2, 40), Sequences(kernels, layer, 2, 1)
    outputs = []
    for step in range(41):
        run = one if step else prompt
        data = torch.randn(run.qkv.shape, generator=numbers).to(layer.dtype)
        if step == 1:
            one.copy_caches(prompt)
        run.set(data, [39 + step if step else 0] * 2, [1 if step else 40] * 2)
        run.call()
        outputs.append(run.out.clone())
    return [*outputs, *one.tensors()]


def test_calls_at_the_same_time() -> None:
    kernels = RazorKernels()
    alone = [_generate(kernels, layer, i) for i, layer in enumerate(LAYERS)]
    torch.cuda.synchronize()
    found: dict[int, list[torch.Tensor]] = {}
    failed: list[BaseException] = []
    start = threading.Barrier(2 * len(LAYERS))

    def work(i: int) -> None:
        try:
            start.wait()
            with torch.cuda.stream(torch.cuda.Stream()):
                found[i] = _generate(kernels, LAYERS[i % len(LAYERS)], i % len(LAYERS))
                torch.cuda.current_stream().synchronize()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2 * len(LAYERS))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failed:
        raise failed[0]
    for i, tensors in found.items():
        for a, b in zip(tensors, alone[i % len(LAYERS)], strict=True):
            assert same_bytes(a, b), f"thread {i}: {LAYERS[i % len(LAYERS)]}"


def test_errors_belong_to_their_thread() -> None:
    """A failure in one thread is not the last error of another."""
    kernels, layer = RazorKernels(), LAYERS[0]
    run = Sequences(kernels, layer, 1, 1)
    run.set(torch.zeros(run.qkv.shape), [0], [1])

    def fail() -> None:
        with pytest.raises(UsageError):
            kernels.check_layer(Layer(head_dim=80).config())

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    run.call()
    torch.cuda.synchronize()
    assert kernels._library.last_error == ""
