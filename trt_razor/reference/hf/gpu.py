"""The CUDA kernels on the reference's cache tensors: one layout, so nothing is converted.

One call a sequence. Keys arrive after RoPE, so the kernels are told that there are no positions.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from trt_razor.errors import RazorError, UsageError
from trt_razor.kernels import Caches, LayerConfig, RazorKernels
from trt_razor.policy import RazorPolicy
from trt_razor.reference.cache import LayerCache

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class KernelChoice:
    """Which caches go to the kernels.

    Args:
        wanted: "auto" uses them for half precision on a CUDA device where the library is found and
            takes the layer; True for everything, or it is an error; False never; or a library that
            is loaded already.
    """

    def __init__(self, wanted: bool | str | RazorKernels = "auto") -> None:
        if not isinstance(wanted, (bool, RazorKernels)) and wanted != "auto":
            raise UsageError(f"kernels: expected 'auto', True or False, found {wanted!r}")
        self.wanted = wanted
        self._library: RazorKernels | None = wanted if isinstance(wanted, RazorKernels) else None
        self._looked = self._library is not None

    def choose(self, cache: LayerCache, device: torch.device) -> RazorKernels | None:
        """The kernels for a layer's cache, or None for the reference.

        Raises:
            UsageError, RazorError: kernels were asked for, and cannot take this layer or are missing.
        """
        if self.wanted is False:
            return None
        if self.wanted == "auto" and (device.type != "cuda" or cache.dtype not in DTYPES):
            return None
        try:
            library = self._load()
            if library is None:
                return None
            if device.type != library.device_type:
                raise UsageError(
                    f"kernels: expected a model on {library.device_type}, found {device}"
                )
            if cache.dtype not in DTYPES:
                found = str(cache.dtype).removeprefix("torch.")
                raise UsageError(f"kernels: expected float16 or bfloat16, found {found}")
            library.check_layer(_config(cache))
        except RazorError:
            if self.wanted == "auto":
                return None
            raise
        return library

    def _load(self) -> RazorKernels | None:
        if not self._looked:
            self._looked = True  # a missing library is looked for once, not once a layer
            self._library = RazorKernels()
        if self._library is None and self.wanted is True:
            raise RazorError("kernels: the library could not be loaded; build it: make plugin")
        return self._library


def kernel_attention(
    kernels: RazorKernels, cache: LayerCache, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """``LayerCache.attend`` by the kernels: q [Hq, S, D], k and v [Hkv, S, D] → [Hq, S, D]."""
    tokens = q.shape[1]
    qkv = torch.cat([q, k, v]).transpose(0, 1).reshape(1, tokens, -1)
    past, chunk = torch.tensor([[cache.n], [tokens]], dtype=torch.int32, device=q.device)
    out = kernels.attention(
        _config(cache),
        qkv,
        Caches.from_tensors(_tensors(cache)),
        past=past,
        chunk=chunk,
        max_past=cache.n,
    )
    cache.set_length(cache.n + tokens)
    return out.view(tokens, cache.num_heads, cache.head_dim).transpose(0, 1)


def _tensors(cache: LayerCache) -> dict[str, Tensor]:
    """The cache's tensors by their names, as slot 0 of a batch of one."""
    out: dict[str, Tensor] = {}
    if cache.full is not None:
        out |= {"full_k": cache.full.full_k, "full_v": cache.full.full_v}
    local = cache.local
    if local is not None:
        out |= {"local_k": local.local_k, "local_v": local.local_v}
        if local.policy.comp_tokens:
            out |= {
                "comp": local.comp,
                "comp_log_weight": local.comp_log_weight,
                "comp_count": local.comp_count,
            }
    return {name: tensor[None] for name, tensor in out.items()}


def _config(cache: LayerCache) -> LayerConfig:
    return _layer_config(
        cache.num_heads,
        cache.num_kv_heads,
        cache.head_dim,
        cache.n_max,
        None if cache.local is None else cache.local.policy,
        cache.retrieval_heads,
        DTYPES[cache.dtype],
        cache.scale,
    )


@lru_cache(maxsize=256)
def _layer_config(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    n_max: int,
    policy: RazorPolicy | None,
    retrieval_heads: tuple[int, ...],
    dtype: str,
    scale: float,
) -> LayerConfig:
    return LayerConfig(
        num_heads,
        num_kv_heads,
        head_dim,
        n_max,
        policy,
        retrieval_heads,
        dtype=dtype,
        position="none",
        scale=scale,
    )
