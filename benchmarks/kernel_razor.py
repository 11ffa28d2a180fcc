"""Our side of benchmarks/kernels.py: caches carved from one pool of random numbers, calls, checks.

Checks compare with plain float64 attention over the rows that docs/semantics.md names, read out of
the very caches that are measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_cases import Shape, cache_size
from torch import Tensor

from trt_razor.kernels import (
    Caches,
    Compensation,
    ContiguousView,
    LayerConfig,
    Limits,
    RazorKernels,
)
from trt_razor.kernels.attention import new_workspace
from trt_razor.policy import RazorPolicy

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""‖out − reference‖ / ‖reference‖ of a query head."""

THETA = 500_000.0
ALIGN = 256


class Pool:
    """One block of random numbers that all caches of a run are views of. Contents wear off slowly: kernels
    write rows and compensation tokens of the same kind into it."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.memory = torch.empty(nbytes // 2, dtype=dtype, device=device)
        for part in self.memory.split(1 << 30):  # random numbers are counted in 32 bits somewhere
            part.normal_()
        self.used = 0

    @property
    def nbytes(self) -> int:
        return self.memory.numel() * 2

    @property
    def left(self) -> int:
        return self.nbytes - self.used

    def restart(self) -> None:
        """What was taken may be taken again."""
        self.used = 0

    def take(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        if count * 2 > self.left:
            raise MemoryError(f"pool: {count * 2} bytes wanted, {self.left} left")
        start = self.used // 2
        self.used += -(-count * 2 // ALIGN) * ALIGN
        return self.memory[start : start + count].view(shape)


def rope_table(positions: int, head_dim: int, device: torch.device) -> Tensor:
    """[positions, D] float32, [cos | sin]."""
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    out = torch.empty(positions, head_dim, device=device)
    for start in range(0, positions, 65536):
        p = torch.arange(start, min(start + 65536, positions), dtype=torch.float64, device=device)
        angle = p[:, None] * THETA ** (-steps / head_dim)
        out[start : start + len(p)] = torch.cat([angle.cos(), angle.sin()], 1).float()
    return out


def rotate(x: Tensor, table: Tensor, position: int | Tensor) -> Tensor:
    """RoPE of x [..., D] in float64, rounded to x's dtype like the kernels' own."""
    half = x.shape[-1] // 2
    row = table[position].double()
    cos, sin = row[..., :half], row[..., half:]
    a, b = x[..., :half].double(), x[..., half:].double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Largest of the query heads; infinite where an output is not a number."""
    if not bool(torch.isfinite(found).all()):
        return math.inf
    norm = (found.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
    return float(norm.nan_to_num(nan=math.inf).max())


def plain_attention(q: Tensor, k: Tensor, v: Tensor, extra: Tensor, scale: float) -> Tensor:
    """float64: q [g, D], k and v [n, D], extra [n] added to the logits."""
    logits = q.double() @ k.double().T * scale + extra
    return logits.softmax(-1) @ v.double()


@dataclass
class Memory:
    """The caches of one layer and the numbers a call needs."""

    layer: LayerConfig
    caches: Caches
    batch: int

    @classmethod
    def carve(cls, pool: Pool, layer: LayerConfig, batch: int, past: int) -> Memory:
        """Caches that look as after ``past`` tokens of each sequence, filled with the pool's numbers."""
        dim, full, local, comp = layer.head_dim, None, None, None
        if layer.num_retrieval:
            shape = (batch, layer.num_retrieval, layer.max_seq_len, dim)
            full = ContiguousView(pool.take(*shape), pool.take(*shape))
        if layer.num_local:
            shape = (batch, layer.num_local, layer.local_rows, dim)
            local = ContiguousView(pool.take(*shape), pool.take(*shape))
        if layer.comp_tokens:
            assert layer.policy is not None
            folded = layer.policy.dropped(past) - layer.policy.heavy(past)
            weights = (batch, layer.num_local, layer.comp_tokens)
            comp = Compensation(
                torch.randn(*weights, 2, dim, device=pool.device),
                torch.full(weights, -math.inf, device=pool.device),
                torch.zeros(weights, device=pool.device),
            )
            used = min(layer.comp_tokens, folded)
            if used:
                comp.count[..., :used] = folded / used
                comp.log_weight[..., :used] = math.log(folded / used)
        return cls(layer, Caches(full, local, comp), batch)


def make_layer(
    shape: Shape, retrieval: int, n_max: int, policy: RazorPolicy, dtype: torch.dtype
) -> LayerConfig:
    """Retrieval heads are spread over the layer: every ⌊Hkv / R⌋-th."""
    kv = shape.num_kv_heads
    heads = tuple(i * kv // retrieval for i in range(retrieval))
    return LayerConfig(
        num_heads=shape.num_heads,
        num_kv_heads=kv,
        head_dim=shape.head_dim,
        max_seq_len=n_max,
        policy=policy if retrieval < kv else None,
        retrieval_heads=None if retrieval == kv else heads,
        dtype=str(dtype).removeprefix("torch."),
    )


class DecodeRun:
    """Decode steps of one layer, on as many copies of its caches as there is use and room for."""

    def __init__(
        self,
        kernels: RazorKernels,
        pool: Pool,
        table: Tensor,
        shape: Shape,
        batch: int,
        past: int,
        retrieval: int,
        policy: RazorPolicy,
        copies: int,
    ) -> None:
        self.kernels, self.table, self.past = kernels, table, past
        self.layer = make_layer(shape, retrieval, past + 1, policy, pool.dtype)
        device = pool.device
        self.copies = [Memory.carve(pool, self.layer, batch, past) for _ in range(copies)]
        self.qkv = torch.randn(batch, self.layer.qkv_width, device=device).to(pool.dtype)
        self.out = torch.empty(batch, self.layer.out_width, dtype=pool.dtype, device=device)
        self.lengths = torch.full((batch,), past, dtype=torch.int32, device=device)
        limits = Limits(batch, 0, 1, past)
        self.workspace = new_workspace(kernels.workspace_size(self.layer, limits), device)

    @staticmethod
    def nbytes(shape: Shape, batch: int, past: int, retrieval: int, policy: RazorPolicy) -> int:
        """Of one copy in the pool, rounding included."""
        return cache_size(shape, batch, past + 1, retrieval, policy) + 4 * ALIGN

    def calls(self) -> list[Callable[[], Tensor]]:
        return [self._call(memory) for memory in self.copies]

    def _call(self, memory: Memory) -> Callable[[], Tensor]:
        return lambda: self.kernels.attention(
            self.layer,
            self.qkv,
            memory.caches,
            past=self.lengths,
            num_contexts=0,
            max_past=self.past,
            generation_chunk_is_one=True,
            cos_sin=self.table,
            out=self.out,
            workspace=self.workspace,
        )

    def check(self) -> float:
        """Runs one step and returns the error of a sample; before anything else runs."""
        memory, layer, past = self.copies[0], self.layer, self.past
        before = memory.caches.comp
        if isinstance(before, Compensation):
            before = Compensation(before.comp.clone(), before.log_weight.clone(), before.count)
        self.out.fill_(math.nan)
        self._call(memory)()
        worst = 0.0
        retrieval = (
            range(layer.num_kv_heads) if layer.retrieval_heads is None else layer.retrieval_heads
        )
        sample = [("full", 0, retrieval[0])] if layer.num_retrieval else []
        if layer.num_local:
            sample.append(("local", layer.num_local - 1, layer.local_heads[-1]))
        for b in {0, memory.batch - 1}:
            row = self.qkv[b].view(-1, layer.head_dim)
            for kind, head, kv in sample:
                k = rotate(row[layer.num_heads + kv], self.table, past)[None]
                v = row[layer.num_heads + layer.num_kv_heads + kv][None]
                old_k, old_v, extra = _state(layer, memory.caches, before, kind, b, head, past)
                found, expected = _heads_of(layer, self.out[b], kv), row[_queries(layer, kv)]
                reference = plain_attention(
                    rotate(expected, self.table, past),
                    torch.cat([old_k, k.double()]),
                    torch.cat([old_v, v.double()]),
                    torch.cat([extra, extra.new_zeros(1)]),
                    layer.c_struct.scale,
                )
                worst = max(worst, relative_error(found, reference))
        return worst


class PrefillRun:
    """A prompt in chunks, batch 1. The first chunk begins the sequence, so that it can run again and again."""

    def __init__(
        self,
        kernels: RazorKernels,
        pool: Pool,
        table: Tensor,
        shape: Shape,
        length: int,
        chunk: int,
        retrieval: int,
        policy: RazorPolicy,
    ) -> None:
        self.kernels, self.table, self.chunk = kernels, table, chunk
        self.layer = make_layer(shape, retrieval, length, policy, pool.dtype)
        self.memory = Memory.carve(pool, self.layer, 1, 0)
        self.qkv = pool.take(1, length, self.layer.qkv_width)
        device = pool.device
        self.out = torch.empty(1, chunk, self.layer.out_width, dtype=pool.dtype, device=device)
        self.starts = list(range(0, length, chunk))
        self.sizes = [min(chunk, length - s) for s in self.starts]
        numbers = torch.tensor([self.starts, self.sizes], dtype=torch.int32, device=device)
        self.pasts, self.chunks = numbers[0].contiguous(), numbers[1].contiguous()
        limits = Limits(1, chunk, chunk, length)
        self.workspace = new_workspace(kernels.workspace_size(self.layer, limits), device)

    @staticmethod
    def nbytes(shape: Shape, length: int, retrieval: int, policy: RazorPolicy) -> int:
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        return cache_size(shape, 1, length, retrieval, policy) + length * width * 2 + 5 * ALIGN

    def calls(self) -> list[Callable[[], Tensor]]:
        return [self._call(i) for i in range(len(self.starts))]

    def _call(self, i: int) -> Callable[[], Tensor]:
        start, size = self.starts[i], self.sizes[i]
        return lambda: self.kernels.attention(
            self.layer,
            self.qkv[:, start : start + size],
            self.memory.caches,
            past=self.pasts[i : i + 1],
            chunk=self.chunks[i : i + 1],
            num_contexts=1,
            max_chunk=size,
            max_past=start,
            cos_sin=self.table,
            out=self.out[:, :size],
            workspace=self.workspace,
        )

    def check(self) -> float:
        """Runs the prompt and returns the error of some rows of its last chunk."""
        layer, calls, caches = self.layer, self.calls(), self.memory.caches
        for call in calls[:-1]:
            call()
        last, past, size = len(calls) - 1, self.starts[-1], self.sizes[-1]
        local, comp = caches.local, caches.comp
        if isinstance(local, ContiguousView):
            local = ContiguousView(local.k.clone(), local.v.clone())
        if isinstance(comp, Compensation):
            comp = Compensation(comp.comp.clone(), comp.log_weight.clone(), comp.count.clone())
        before = Caches(caches.full, local, comp)
        self.out.fill_(math.nan)
        calls[last]()
        rows = self.qkv[0, past : past + size].view(size, -1, layer.head_dim)
        positions = torch.arange(past, past + size, device=rows.device)
        worst = 0.0
        retrieval = (
            range(layer.num_kv_heads) if layer.retrieval_heads is None else layer.retrieval_heads
        )
        sample = [("full", 0, retrieval[0])] if layer.num_retrieval else []
        if layer.num_local:
            sample.append(("local", layer.num_local - 1, layer.local_heads[-1]))
        for kind, head, kv in sample:
            k = rotate(rows[:, layer.num_heads + kv], self.table, positions).double()
            v = rows[:, layer.num_heads + layer.num_kv_heads + kv].double()
            old_k, old_v, extra = _state(layer, before, comp, kind, 0, head, past)
            for i in sorted({0, size // 3, size - 1}):
                reference = plain_attention(
                    rotate(rows[i, _queries(layer, kv)], self.table, past + i),
                    torch.cat([old_k, k[: i + 1]]),
                    torch.cat([old_v, v[: i + 1]]),
                    torch.cat([extra, extra.new_zeros(i + 1)]),
                    layer.c_struct.scale,
                )
                worst = max(worst, relative_error(_heads_of(layer, self.out[0, i], kv), reference))
        return worst


def _queries(layer: LayerConfig, kv: int) -> slice:
    return slice(kv * layer.group, (kv + 1) * layer.group)


def _heads_of(layer: LayerConfig, out: Tensor, kv: int) -> Tensor:
    return out.view(layer.num_heads, layer.head_dim)[_queries(layer, kv)]


def _state(
    layer: LayerConfig,
    caches: Caches,
    comp: object,
    kind: str,
    sequence: int,
    head: int,
    past: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and additions to the logits of what a head holds after ``past`` tokens."""
    view = caches.full if kind == "full" else caches.local
    assert isinstance(view, ContiguousView)
    device = view.k.device
    if kind == "full":
        rows = torch.arange(past, device=device)
    else:
        policy = layer.policy
        assert policy is not None
        sinks, dropped = policy.sink_tokens, policy.dropped(past)
        window = torch.arange(min(past, sinks + dropped), past, device=device)
        ring = layer.c_struct.local_ring_offset + (window - sinks) % layer.c_struct.ring_rows
        front = min(sinks, past) + policy.heavy(past)  # heavy hitters follow the sinks
        rows = torch.cat([torch.arange(front, device=device), ring])
    k, v = view.k[sequence, head, rows].double(), view.v[sequence, head, rows].double()
    extra = k.new_zeros(len(rows))
    if kind == "local" and isinstance(comp, Compensation):
        mean = comp.comp[sequence, head].double()
        used = torch.isfinite(comp.log_weight[sequence, head])
        k, v = torch.cat([mean[used, 0], k]), torch.cat([mean[used, 1], v])
        extra = torch.cat([comp.log_weight[sequence, head][used].double(), extra])
    return k, v, extra


def accept(error: float, dtype: torch.dtype, what: str) -> float:
    """The error, if it is small enough to go on and measure.

    Raises:
        WrongResult: it is not, or is no number.
    """
    if not error <= TOLERANCE[dtype]:
        raise WrongResult(
            f"{what}: expected outputs within {TOLERANCE[dtype]:g} of float64, found {error:.2g}; "
            f"nothing wrong is timed"
        )
    return error


class WrongResult(Exception):
    """A kernel's output differs from the reference."""
