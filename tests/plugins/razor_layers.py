"""Layers and tokens for the kernel tests: shapes, random numbers, and what a cache must hold for them.

Rows of a cache are compared bit by bit. So that float32 arithmetic cannot round either way, keys are
drawn such that no rotated element lies within float32 error of a rounding boundary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trt_razor.kernels import LayerConfig
from trt_razor.policy import RazorPolicy
from trt_razor.reference import clusters, heavy

Bytes = npt.NDArray[np.uint8]

_ROPE = ("half", "interleaved")

TIE_MARGIN = 2e-5
"""Distances closer than this, relative to ‖k‖² + ‖c‖², may decide either way in float32."""

SCORE_MARGIN = 1e-4
"""Scores of heavy hitters closer than this may decide either way: sums of exponentials of float32
dot products."""


@dataclass(frozen=True)
class Layer:
    """What a layer is: the fields of ``razor_layer`` that tests vary.

    ``spare_rows`` are ring rows beyond the smallest ring; ``bubble`` are unused rows before the ring
    of local heads and behind the sinks of retrieval heads (the pools of TensorRT-LLM have them). ``rotary_dim`` 0 = all.
    """

    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    retrieval: tuple[int, ...] = (0,)
    dtype: torch.dtype = torch.float16
    fp8: bool = False
    position: str = "half"  # "half", "interleaved", "alibi", "none"
    table: str = "split"  # "split", "pairs"
    rotary_dim: int = 0
    policy: RazorPolicy = field(
        default_factory=lambda: RazorPolicy(sink_tokens=2, min_window=6, compression=None)
    )
    n_max: int = 48
    scale: float = 0.0  # 0 = 1/√D
    k_scale: float | None = None  # None = null pointer
    v_scale: float | None = None
    spare_rows: int = 0
    bubble: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def local(self) -> tuple[int, ...]:
        return tuple(h for h in range(self.num_kv_heads) if h not in self.retrieval)

    @property
    def logit_scale(self) -> float:
        return self.scale or 1 / math.sqrt(self.head_dim)

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else self.dtype

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.cache_dtype.itemsize

    @property
    def ring_rows(self) -> int:
        return self.policy.ring_rows(self.n_max) + self.spare_rows

    @property
    def ring_offset(self) -> int:
        return self.policy.kept_rows + self.bubble

    @property
    def full_offset(self) -> int:
        return self.policy.sink_tokens + self.bubble

    def rows(self, kind: str) -> int:
        """Rows of a sequence: those of the cache, or all positions and the bubble."""
        return self.ring_offset + self.ring_rows if kind == "local" else self.n_max + self.bubble

    def row(self, kind: str, position: int) -> int:
        behind = position - self.policy.sink_tokens
        if behind < 0:
            return position
        if kind == "full":
            return self.full_offset + behind
        return self.ring_offset + behind % self.ring_rows

    def kept(self, position: int, n: int) -> bool:
        """Does a local head with ``n`` tokens hold this position as a row?"""
        sinks = self.policy.sink_tokens
        return position < sinks or position >= sinks + self.policy.dropped(n)

    def cos_and_sin(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Each [n_max, rotary_dim / 2]."""
        dim = self.rotary_dim or self.head_dim
        frequency = 1000.0 ** (-np.arange(0, dim, 2) / dim)
        angle = np.arange(self.n_max)[:, None] * frequency
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def cos_sin(self) -> npt.NDArray[np.float32]:
        """[n_max, rotary_dim] as the layer's table lays them out."""
        parts = self.cos_and_sin()
        table = np.concatenate(parts, 1) if self.table == "split" else np.stack(parts, 2)
        return np.ascontiguousarray(table.reshape(self.n_max, -1))

    def slopes(self) -> Tensor | None:
        if self.position != "alibi":
            return None
        return (2.0 ** -torch.linspace(0.5, 6, self.num_heads)).float()

    def config(self) -> LayerConfig:
        position = {"half": "rope", "interleaved": "rope_interleaved"}.get(
            self.position, self.position
        )
        return LayerConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_seq_len=self.n_max,
            policy=self.policy,
            retrieval_heads=self.retrieval,
            dtype="float16" if self.dtype == torch.float16 else "bfloat16",
            cache_dtype="float8_e4m3fn" if self.fp8 else None,
            position=position,
            rope_table=self.table,
            rotary_dim=self.rotary_dim or None,
            scale=self.scale or None,
            ring_rows=self.ring_rows,
            local_ring_offset=self.ring_offset,
            full_ring_offset=self.full_offset,
        )

    def __str__(self) -> str:
        p, kind = self.policy, "fp16" if self.dtype == torch.float16 else "bf16"
        table = f".{self.table}{self.rotary_dim or ''}" if self.position in _ROPE else ""
        window = f"w{p.min_window}" + (f"c{p.compression}" if p.compression else "")
        heavy = f"H{p.heavy_hitters}-" if p.heavy_hitters else ""
        return (
            f"D{self.head_dim}-g{self.group}-{kind}{'.fp8' if self.fp8 else ''}-"
            f"{self.position}{table}-M{p.comp_tokens}-{heavy}s{p.sink_tokens}{window}-"
            f"r{''.join(map(str, self.retrieval)) or '_'}of{self.num_kv_heads}"
        )


# Numbers ------------------------------------------------------------------------------------------
def rotate(x: Tensor, layer: Layer, inverse: bool = False) -> Tensor:
    """RoPE of x [H, n, D] at positions 0 .. n-1, in float64, with the layer's float32 table."""
    if layer.position not in _ROPE:
        return x
    dim = layer.rotary_dim or layer.head_dim
    cos, sin = (torch.from_numpy(t[: x.shape[1]]).double() for t in layer.cos_and_sin())
    if inverse:
        sin = -sin
    head, rest = x[..., :dim], x[..., dim:]
    if layer.position == "half":
        a, b = head[..., : dim // 2], head[..., dim // 2 :]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, rest], -1)


def stored(x: Tensor, layer: Layer, scale: float | None) -> Tensor:
    """What a cache holds for the exact numbers x: elements of its dtype."""
    if layer.fp8:
        return (x / (scale or 1.0)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return x.to(layer.dtype)


def restored(x: Tensor, layer: Layer, scale: float | None) -> Tensor:
    """The numbers that stored elements stand for, float64."""
    return x.double() * (np.float32(scale or 1.0).item() if layer.fp8 else 1.0)


def _ambiguous(exact: Tensor, layer: Layer, scale: float | None, rotated: bool) -> Tensor:
    """Elements that float32 arithmetic may round to either of two neighbours."""
    error = torch.zeros_like(exact)
    if rotated and layer.position in _ROPE:
        dim = layer.rotary_dim or layer.head_dim
        error[..., :dim] = 2.0**-22 * exact[..., :dim].abs().amax(-1, keepdim=True)
    if layer.fp8 and scale and math.frexp(scale)[0] != 0.5:
        error = torch.maximum(error, 2.0**-22 * exact.abs())
    low, high = (stored(exact + e, layer, scale).float() for e in (-error, error))
    return low != high


@dataclass
class Tokens:
    """All tokens a sequence may ever have: inputs, and what the reference is fed with."""

    q: Tensor  # [Hq, n, D] input dtype, before rotation
    k: Tensor  # [Hkv, n, D]
    v: Tensor
    ref_q: Tensor  # float64, after rotation and rounding
    ref_k: Tensor
    ref_v: Tensor
    k_bytes: Bytes  # [Hkv, n, row bytes], as cached
    v_bytes: Bytes


def draw_tokens(layer: Layer, seed: int, blobs: int = 3, loud: float = 1.0) -> Tokens:
    """Random tokens. Keys lie around ``blobs`` centres (after rotation) and a mean that is not 0,
    so that compensation tokens count; values have a mean too.

    Args:
        loud: factor on values; far above 1 an FP8 cache saturates.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def rounded(x: Tensor) -> Tensor:
        """Input elements whose rotation is near x."""
        return rotate(x, layer, inverse=True).to(layer.dtype)

    heads, n, dim = layer.num_kv_heads, layer.n_max, layer.head_dim
    centres = 0.6 * normal(heads, blobs, dim)
    owner = torch.randint(blobs, (heads, n), generator=rng)
    centre = 0.4 * normal(heads, 1, dim) + centres[torch.arange(heads)[:, None], owner]
    noise = 0.6 * normal(heads, n, dim)
    q = rounded(1.5 * normal(layer.num_heads, n, dim) + 0.5 * normal(layer.num_heads, 1, dim))
    for _ in range(200):
        k = rounded(centre + noise)
        exact_k = rotate(k.double(), layer)
        bad = _ambiguous(exact_k, layer, layer.k_scale, rotated=True)
        if not bad.any():
            break
        # A rotated element hangs on two: redraw both, which is to draw the rotated one anew.
        noise = torch.where(bad, 0.6 * normal(heads, n, dim), noise)
    else:
        raise AssertionError(f"{layer}: no keys without rounding ties found")
    v_noise = normal(heads, n, dim)
    for _ in range(200):
        v = (loud * (0.7 * normal(heads, 1, dim) + v_noise)).to(layer.dtype)
        bad = _ambiguous(v.double(), layer, layer.v_scale, rotated=False)
        if not bad.any():
            break
        v_noise = torch.where(bad, normal(heads, n, dim), v_noise)
    k_stored = stored(exact_k, layer, layer.k_scale)
    v_stored = stored(v.double(), layer, layer.v_scale)
    return Tokens(
        q,
        k,
        v,
        rotate(q.double(), layer).to(layer.dtype).double(),
        restored(k_stored, layer, layer.k_scale),
        restored(v_stored, layer, layer.v_scale),
        as_bytes(k_stored),
        as_bytes(v_stored),
    )


def as_bytes(x: Tensor) -> Bytes:
    """[..., D] elements as [..., D · itemsize] bytes."""
    return x.contiguous().view(torch.uint8).numpy()


class TieError(AssertionError):
    """The data of a test leaves a decision to rounding: another seed is needed."""


@contextmanager
def no_ties() -> Iterator[None]:
    """Raises TieError when the reference decides between clusters by less than TIE_MARGIN, or between
    heavy hitters by less than SCORE_MARGIN."""
    original, choose = clusters.nearest, heavy.choose

    def careful(keys: Tensor, centroids: Tensor) -> Tensor:
        if len(centroids) > 1 and len(keys):
            distance = (keys[:, None] - centroids).square().sum(-1)
            best = distance.topk(2, dim=1, largest=False).values
            size = keys.square().sum(-1) + centroids.square().sum(-1).amax()
            if bool(((best[:, 1] - best[:, 0]) < TIE_MARGIN * size).any()):
                raise TieError("two clusters are equally near")
        return original(keys, centroids)

    def careful_choose(score: Tensor, keep: int) -> Tensor:
        if 0 < keep < score.shape[1]:
            best = score.topk(keep + 1, dim=1).values
            if bool(((best[:, keep - 1] - best[:, keep]) < SCORE_MARGIN).any()):
                raise TieError("two scores are equally high")
        return choose(score, keep)

    clusters.nearest, heavy.choose = careful, careful_choose
    try:
        yield
    finally:
        clusters.nearest, heavy.choose = original, choose
