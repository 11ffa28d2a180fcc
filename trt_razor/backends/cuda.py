"""The few CUDA runtime calls that running an engine needs, with errors that say what failed."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

from trt_razor.errors import MissingExtra, RazorError


def import_cudart(why: str, extra: str) -> Any:
    """The module ``cuda.bindings.runtime``, or a clear error that names the extra."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise MissingExtra("cuda-bindings", extra, why) from None
    return runtime


class Cuda:
    """The few CUDA runtime calls a session needs; every failure is a RazorError.

    Args:
        api: ``cuda.bindings.runtime``.
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self._owned: list[int] = []
        self._streams: list[Any] = []
        # Also runs when a session's constructor fails half-way.
        weakref.finalize(self, _free, api, self._owned, self._streams)

    def call(self, name: str, *args: Any) -> Any:
        """``api.name(*args)`` without its leading error code."""
        error, *rest = getattr(self.api, name)(*args)
        if error != self.api.cudaError_t.cudaSuccess:
            text = self.api.cudaGetErrorString(error)[1]
            text = text.decode() if isinstance(text, bytes) else str(text)
            raise RazorError(f"CUDA: {name} failed: {text}")
        return rest[0] if rest else None

    def capability(self) -> str:
        """Compute capability of the current GPU, e.g. ``9.0``. Raises RazorError without one."""
        if not self.call("cudaGetDeviceCount"):
            raise RazorError("no GPU found")
        device, attribute = self.call("cudaGetDevice"), self.api.cudaDeviceAttr
        major, minor = (
            self.call("cudaDeviceGetAttribute", a, device)
            for a in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    def alloc(self, nbytes: int, what: str) -> int:
        """Address of new device memory, freed with this object."""
        try:
            address = int(self.call("cudaMalloc", nbytes))
        except RazorError as e:
            raise RazorError(
                f"{e}; allocating {nbytes} bytes for {what}: use fewer slots, or build with a "
                "smaller --max-seq-len or --max-batch-size"
            ) from None
        self._owned.append(address)
        return address

    def stream(self) -> Any:
        """A new stream, destroyed with this object."""
        self._streams.append(self.call("cudaStreamCreate"))
        return self._streams[-1]

    def copy(self, target: int, source: int, nbytes: int, kind: str, stream: Any) -> None:
        """kind: HostToDevice, DeviceToHost or DeviceToDevice."""
        kind_value = getattr(self.api.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call("cudaMemcpyAsync", target, source, nbytes, kind_value, stream)


def _free(api: Any, owned: list[int], streams: list[Any]) -> None:
    with contextlib.suppress(Exception):  # at exit the driver may be gone already
        for address in owned:
            api.cudaFree(address)
        for stream in streams:
            api.cudaStreamDestroy(stream)
