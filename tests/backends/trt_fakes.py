"""Stand-ins for CUDA and the runtimes of TensorRT: device memory is host memory, and executing an
engine runs the same ONNX graph in ONNX Runtime.

They check what the real ones demand: addresses inside one allocation and aligned, shapes inside
the profile. Fresh memory is full of NaN bytes, so that nothing can rely on what was never written.
"""

from __future__ import annotations

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from trt_razor.backends.base import EngineOptions, Session
from trt_razor.backends.tensorrt_rtx import RTX, TARGETS, _inline_file
from trt_razor.backends.trt_engine import Flavour, profile_shapes, write_facts
from trt_razor.graph.decoder import export_decoder
from trt_razor.models.checkpoint import Checkpoint

VERSION = "99.9.9"


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class FakeCudart:
    """The part of ``cuda.bindings.runtime`` that a session uses.

    Args:
        memory: bytes that can be allocated in all.
    """

    cudaError_t = Error

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2
        cudaMemcpyDeviceToDevice = 3

    class cudaDeviceAttr(enum.IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    def __init__(
        self, capability: tuple[int, int] = (8, 9), devices: int = 1, memory: int = 1 << 30
    ) -> None:
        self.capability = capability
        self.devices = devices
        self.memory = memory
        self.live: dict[int, np.ndarray] = {}
        self.device_copies = 0

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetDeviceCount(self) -> tuple[Error, int | None]:
        if self.devices < 0:
            return Error.cudaErrorInsufficientDriver, None
        return Error.cudaSuccess, self.devices

    def cudaGetDevice(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 0

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Error, int]:
        minor = attribute == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor
        return Error.cudaSuccess, self.capability[int(minor)]

    def cudaStreamCreate(self) -> tuple[Error, int]:
        return Error.cudaSuccess, 1234

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int | None]:
        if sum(a.nbytes for a in self.live.values()) + size > self.memory:
            return Error.cudaErrorMemoryAllocation, None
        whole = np.full(size + 512, 0xFF, np.uint8)
        start = -whole.ctypes.data % 256
        block = whole[start : start + size]
        self.live[block.ctypes.data] = block
        return Error.cudaSuccess, block.ctypes.data

    def cudaFree(self, address: int) -> tuple[Error]:
        del self.live[address]
        return (Error.cudaSuccess,)

    def view(self, address: int, size: int) -> np.ndarray | None:
        """Device bytes, or None if they are not inside one allocation."""
        for base, block in self.live.items():
            if base <= address and address + size <= base + block.nbytes:
                return block[address - base : address - base + size]
        return None

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> tuple[Error]:
        view = self.view(address, size)
        if view is None:
            return (Error.cudaErrorInvalidValue,)
        view.fill(value)
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[Error]:
        if kind != 2 and self.view(target, size) is None:
            return (Error.cudaErrorInvalidValue,)
        if kind != 1 and self.view(source, size) is None:
            return (Error.cudaErrorInvalidValue,)
        self.device_copies += kind == 3
        ctypes.memmove(target, source, size)
        return (Error.cudaSuccess,)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name}: address {address} is not aligned"
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.profile]
        for bound, sign in ((low, 1), (high, -1)):
            limits = bound.get(name, (bound["past"][0], *shape[1:]))
            if any(sign * a < sign * b for a, b in zip(shape, limits, strict=True)):
                return False
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        session, cudart = self.engine.session, self.engine.cudart
        kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int8)": np.int8}
        feeds, used = {}, []
        for value in session.get_inputs():
            dtype, shape = np.dtype(kinds[value.type]), self.shapes[value.name]
            size = int(np.prod(shape)) * dtype.itemsize
            view = cudart.view(self.addresses[value.name], size)
            assert view is not None, f"{value.name}: outside of its allocation"
            feeds[value.name] = view.view(dtype).reshape(shape).copy()
            used.append((self.addresses[value.name], size))
        names = [o.name for o in session.get_outputs()]
        for name, value in zip(names, session.run(names, feeds), strict=True):
            address = self.addresses[name]
            view = cudart.view(address, value.nbytes)
            assert view is not None, f"{name}: outside of its allocation"
            if self.engine.in_place and name.endswith("_out"):
                own = (self.addresses[name.removesuffix("_out")], value.nbytes)
                assert own[0] == address, f"{name}: not the memory of its input"
                used_by_others = [u for u in used if u != own]
            else:
                used_by_others = used
            for start, size in used_by_others:
                assert address + value.nbytes <= start or start + size <= address, "aliased"
            view[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return True


class _Engine:
    def __init__(self, session: Any, cudart: FakeCudart, profiles: Any, in_place: bool) -> None:
        self.session, self.cudart, self.profiles = session, cudart, profiles
        self.in_place = in_place

    def create_execution_context(self, strategy: int) -> _Context:
        return _Context(self)


class FakeRegistry:
    """A plugin registry: a library that exists has our creator in it."""

    def __init__(self) -> None:
        self.all_creators: list[Any] = []
        self.loads = 0

    def load_library(self, path: str) -> object | None:
        if not Path(path).is_file():
            return None
        self.loads += 1
        self.all_creators.append(
            SimpleNamespace(name="RazorAttention", plugin_namespace="trt_razor")
        )
        return object()


class FakeTrt:
    """The part of ``tensorrt`` and ``tensorrt_rtx`` that a session uses; an engine file holds the
    graph's path.

    Args:
        in_place: cache outputs must have the memory of their inputs (the plugin's aliasing), and
            the plugin library must be loaded first; else no output may touch an input.
    """

    __version__ = VERSION

    class ILogger:
        class Severity(enum.Enum):
            ERROR = 1

    class ExecutionContextAllocationStrategy(enum.Enum):
        ON_PROFILE_CHANGE = 1

    def __init__(self, cudart: FakeCudart, options: EngineOptions, in_place: bool = False) -> None:
        self.cudart, self.options, self.in_place = cudart, options, in_place
        self.registry = FakeRegistry()

    def get_plugin_registry(self) -> FakeRegistry:
        return self.registry

    def Runtime(self, logger: Any) -> Any:
        outer = self

        class Runtime:
            def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
                if not plan.startswith(b"graph:"):
                    logger.log(FakeTrt.ILogger.Severity.ERROR, "Magic tag does not match.\nmore")
                    return None
                session = onnxruntime.InferenceSession(
                    plan[6:].decode(), providers=["CPUExecutionProvider"]
                )
                if outer.in_place and not outer.registry.all_creators:
                    logger.log(FakeTrt.ILogger.Severity.ERROR, "Cannot find plugin RazorAttention")
                    return None
                profiles = profile_shapes(outer.options)
                return _Engine(session, outer.cudart, profiles, outer.in_place)

        return Runtime()


def write_fake_engine(
    checkpoint: Checkpoint,
    options: EngineOptions,
    directory: Path,
    flavour: Flavour = RTX,
    **more: Any,
) -> Path:
    """An engine folder for the stand-ins; returns the graph that ONNX Runtime can open as it is."""
    plain, flat = directory / "plain", directory / "flat"
    for folder in (plain, flat):
        folder.mkdir()
        graph = export_decoder(checkpoint, options.graph, folder)
    _inline_file(graph)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    names = {"tensor(float)": "FLOAT", "tensor(int32)": "INT32", "tensor(int8)": "INT8"}

    def facts(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": v.name,
                "dtype": names[v.type],
                "shape": [d if isinstance(d, int) else -1 for d in v.shape],
            }
            for v in values
        ]

    (directory / "model.engine").write_bytes(b"graph:" + str(graph).encode())
    io = {"inputs": facts(session.get_inputs()), "outputs": facts(session.get_outputs())}
    write_facts(directory, flavour, VERSION, options, {"targets": list(TARGETS), **io, **more})
    return plain / "model.onnx"


def compare_over_any_slots(session: Session, ort: Session, vocab: int, seed: int) -> None:
    """Same logits from both, over random ranges of slots, chunks, idle rows and resets."""
    rng = np.random.default_rng(seed)
    past = np.zeros(4, np.int64)
    compared = 0
    for _ in range(60):
        lo = int(rng.integers(0, 4))
        hi = int(rng.integers(lo, 4)) + 1
        longest = int(rng.choice([1, 1, 3, 16]))
        room = 47 - past[lo:hi]
        for slot in range(lo, hi):
            if room[slot - lo] < longest or rng.random() < 0.05:
                session.reset(slot)
                ort.reset(slot)
                past[slot] = 0
        chunk = rng.integers(0, longest + 1, hi - lo)
        tokens = rng.integers(0, vocab, (hi - lo, longest))
        wanted = np.tile(np.arange(rng.integers(1, longest + 1)), (hi - lo, 1))
        args = (lo, tokens, past[lo:hi], chunk, wanted)
        got, want = session.forward(*args), ort.forward(*args)
        valid = wanted < chunk[:, None]
        np.testing.assert_allclose(got[valid], want[valid], rtol=1e-4, atol=1e-5)
        compared += int(valid.sum())
        past[lo:hi] += chunk
    assert compared > 50
    assert past.max() > 20  # beyond the window: compression happened
