"""Checks of torch tensors before their addresses leave Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trt_razor.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise MissingExtra("torch", "torch", "calling the kernels from Python") from None
    return torch


def check(
    name: str,
    tensor: Tensor,
    device: torch.device,
    dtype: str,
    shape: Sequence[int | str],
    dense: int | None = None,
) -> None:
    """Raise UsageError unless ``tensor`` is what a kernel may be pointed at.

    Args:
        dtype: torch's name of it.
        shape: of each dimension its size, or what it is if any size will do.
        dense: how many trailing dimensions lie in memory without gaps; None = all.
    """
    found = str(tensor.dtype).removeprefix("torch.")
    if found != dtype:
        raise UsageError(f"{name}: expected dtype {dtype}, found {found}")
    if tensor.device != device:
        raise UsageError(
            f"{name}: expected a tensor on {device} (where qkv is), found {tensor.device}"
        )
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(
        isinstance(want, int) and want != size for want, size in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise UsageError(f"{name}: expected shape [{wanted}], found {list(sizes)}")
    stride = 1
    first = 0 if dense is None else len(sizes) - dense
    for i in reversed(range(first, len(sizes))):
        if sizes[i] > 1 and tensor.stride(i) != stride and tensor.numel():
            raise UsageError(
                f"{name}: expected its last {len(sizes) - first} dimensions without gaps, found "
                f"shape {list(sizes)} with strides {list(tensor.stride())}"
            )
        stride *= sizes[i]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
