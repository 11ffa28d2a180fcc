"""A layer with caches in ordinary CUDA memory and sequences of random tokens: for graphs and threads."""

from __future__ import annotations

import torch
from razor_layers import Layer
from torch import Tensor

from trt_razor.kernels import Caches, Limits, RazorKernels
from trt_razor.kernels.attention import new_workspace
from trt_razor.kernels.caches import Compensation, ContiguousView


class Sequences:
    """B sequences in caches of their own, with buffers at fixed addresses as a captured call needs them.

    ``rows`` is the padded number of tokens of each sequence in a call.
    """

    def __init__(self, kernels: RazorKernels, layer: Layer, batch: int, rows: int) -> None:
        self.kernels, self.layer, self.config = kernels, layer, layer.config()
        self.caches = Caches.empty(self.config, batch)
        for tensor in self.tensors():
            tensor.view(torch.uint8).fill_(0xFF)  # NaN
        self.qkv = torch.zeros(batch, rows, self.config.qkv_width, dtype=layer.dtype, device="cuda")
        self.out = torch.empty(batch, rows, self.config.out_width, dtype=layer.dtype, device="cuda")
        self.past = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.chunk = torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.table = torch.from_numpy(layer.cos_sin()).cuda()
        contexts = batch if rows > 1 else 0
        limits = Limits(batch, contexts * rows, rows, layer.n_max)
        size = kernels.workspace_size(self.config, limits)
        self.workspace = new_workspace(size, device="cuda")

    def tensors(self) -> list[Tensor]:
        """All memory of the caches."""
        out: list[Tensor] = []
        for view in (self.caches.full, self.caches.local):
            if isinstance(view, ContiguousView):
                out += [view.k, view.v]
        if isinstance(self.caches.comp, Compensation):
            out += [self.caches.comp.comp, self.caches.comp.log_weight, self.caches.comp.count]
        return out

    def set(self, qkv: Tensor, past: list[int], chunk: list[int]) -> None:
        """What the next call brings; the addresses stay."""
        self.qkv.copy_(qkv)
        self.past.copy_(torch.tensor(past, dtype=torch.int32))
        self.chunk.copy_(torch.tensor(chunk, dtype=torch.int32))
        self.out.fill_(torch.nan)

    def call(self) -> None:
        """Enqueues one call on the current stream."""
        self.kernels.attention(
            self.config,
            self.qkv,
            self.caches,
            past=self.past,
            chunk=self.chunk,
            cos_sin=self.table,
            out=self.out,
            workspace=self.workspace,
        )

    def copy_caches(self, other: Sequences) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
