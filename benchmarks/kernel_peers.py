"""Dense attention by others, for benchmarks/kernels.py: FlashInfer, torch SDPA, flash-attn.

A peer only attends: queries arrive rotated, the new token's key and value are cached already. Its
time is a lower bound of what a layer with it needs; ours rotates, stores and folds as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from kernel_cases import Shape
from torch import Tensor

PAGE = 64
"""Tokens of a FlashInfer page."""

Call = Callable[[], Tensor]


def versions() -> str:
    """torch and the peers that can be imported."""
    found = [f"torch {torch.__version__}"]
    for name in ("flashinfer", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            try:
                module = __import__(name)
            except Exception as e:  # built for another torch: anything can happen here
                found.append(f"{name} cannot be imported ({type(e).__name__})")
                continue
            found.append(f"{name} {getattr(module, '__version__', '')}".strip())
    return ", ".join(found)


def _importable(name: str) -> Any | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return __import__(name)
    except Exception:  # named by versions()
        return None


# Decode -------------------------------------------------------------------------------------------
class DecodePeers:
    """Peers of one decode step over dense caches of ``length`` tokens.

    The caches are [B, Hkv, rows, D] with rows a multiple of PAGE; several may take turns.
    """

    def __init__(self, shape: Shape, length: int, queries: Tensor) -> None:
        self.shape, self.length = shape, length
        self.q = queries  # [B, Hq, D]
        self._flashinfer = _importable("flashinfer") if queries.is_cuda else None
        self._wrappers: dict[bool, Any] = {}

    def calls(self, k: Tensor, v: Tensor) -> dict[str, Call]:
        """A call of each peer on this pair of caches."""
        out: dict[str, Call] = {}
        if self._flashinfer is not None:
            for cores in (True, False):
                name = f"flashinfer ({'tensor' if cores else 'CUDA'} cores)"
                out[name] = self._of_flashinfer(k, v, cores)
        for name, backend in _sdpa_backends(self.q).items():
            out[name] = self._of_sdpa(k[:, :, : self.length], v[:, :, : self.length], backend)
        return out

    def _of_flashinfer(self, k: Tensor, v: Tensor, cores: bool) -> Call:
        """Paged: the same memory seen as pages [Hkv, PAGE, D]; which number is whose does not matter."""
        shape = -1, self.shape.num_kv_heads, PAGE, self.shape.head_dim
        paged = k.reshape(shape), v.reshape(shape)
        return lambda: self._wrapper(cores).run(self.q, paged)

    def _wrapper(self, cores: bool) -> Any:
        """Planned at the first call: plan() compiles, allocates and synchronises."""
        if cores not in self._wrappers:
            assert self._flashinfer is not None
            device, batch = self.q.device, self.q.shape[0]
            wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                torch.zeros(256 << 20, dtype=torch.uint8, device=device),
                kv_layout="HND",
                use_tensor_cores=cores,
            )
            pages = -(-self.length // PAGE)
            counts = torch.arange(batch + 1, dtype=torch.int32, device=device)
            wrapper.plan(
                counts * pages,
                torch.arange(batch * pages, dtype=torch.int32, device=device),
                torch.full_like(counts[1:], (self.length - 1) % PAGE + 1),
                self.shape.num_heads,
                self.shape.num_kv_heads,
                self.shape.head_dim,
                PAGE,
                pos_encoding_mode="NONE",
                q_data_type=self.q.dtype,
                kv_data_type=self.q.dtype,
            )
            self._wrappers[cores] = wrapper
        return self._wrappers[cores]

    def _of_sdpa(self, k: Tensor, v: Tensor, backend: Any) -> Call:
        q = self.q[:, :, None]
        grouped = self.shape.group > 1

        def call() -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            with torch.nn.attention.sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

        return call


def _sdpa_backends(q: Tensor) -> dict[str, Any]:
    if not q.is_cuda:
        return {"sdpa": None}
    backends = torch.nn.attention.SDPBackend
    return {"sdpa (flash)": backends.FLASH_ATTENTION, "sdpa (cudnn)": backends.CUDNN_ATTENTION}


# Prefill ------------------------------------------------------------------------------------------
def prefill_peers(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> dict[str, list[Call]]:
    """Dense causal prefill in chunks: for each peer one call a chunk.

    q: [n, Hq, D] rotated; k, v: [n, Hkv, D]. Query i of a chunk that begins at p sees 0 .. p + i.
    """
    out: dict[str, list[Call]] = {}
    starts = range(0, q.shape[0], chunk)
    parts = [(q[s : s + chunk], k[: s + chunk], v[: s + chunk]) for s in starts]
    if not q.is_cuda:
        out["sdpa"] = [_masked(*p) for p in parts]
        return out
    out["sdpa (flash)"] = [_torch_flash(*p) for p in parts]
    if (flash_attn := _importable("flash_attn")) is not None:
        out["flash_attn"] = [_flash_attn(flash_attn, *p) for p in parts]
    if (flashinfer := _importable("flashinfer")) is not None:
        out["flashinfer"] = [_flashinfer_prefill(flashinfer, *p) for p in parts]
    return out


def _torch_flash(q: Tensor, k: Tensor, v: Tensor) -> Call:
    # The operator under F.scaled_dot_product_attention's flash backend. Its causal mask is aligned at the lower right,
    # which the function itself offers for as many queries as keys only.
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention(
        *heads, dropout_p=0.0, is_causal=True
    )[0]


def _flash_attn(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return lambda: module.flash_attn_func(q[None], k[None], v[None], causal=True)


def _flashinfer_prefill(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return lambda: module.single_prefill_with_kv_cache(q, k, v, causal=True, kv_layout="NHD")


def _masked(q: Tensor, k: Tensor, v: Tensor) -> Call:
    rows, columns = q.shape[0], k.shape[0]
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return lambda: F.scaled_dot_product_attention(
        q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]
    )
