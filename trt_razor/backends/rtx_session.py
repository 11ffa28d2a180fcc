"""Running a TensorRT-RTX engine: caches in GPU memory, two copies of each.

The builder promises nothing about an output that has the address of an input, so a cache is never
updated in place: every cache tensor exists twice, a forward pass reads one copy of its slots and
writes the other, and per slot one bit says which copy is current. Slots of one pass that disagree
are first brought to the same side by a copy on the device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.backends.base import check_pass
from trt_razor.backends.cuda import Cuda, import_cudart
from trt_razor.backends.rtx_builder import collect_errors, first_line
from trt_razor.backends.tensorrt_rtx import (
    ENGINE_FILE,
    IO_FILE,
    IO_SCHEMA,
    IO_VERSION,
    PROFILES,
    import_tensorrt_rtx,
)
from trt_razor.errors import RazorError, UsageError
from trt_razor.planner import CacheTensor

ALIGNMENT = 256
"""Bytes; TensorRT wants the address of every input and output at a multiple of this."""
MAX_IO_BYTES = 16 << 20
SMALL_INPUTS = ("input_ids", "past", "chunk", "past_span", "logits_index")
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
MIN_SPAN = 128
SPANS_PER_OCTAVE = 8


def read_facts(directory: Path) -> dict[str, Any]:
    """``io.json``: what the builder wrote down about the engine.

    Raises:
        RazorError: the file is missing, damaged, or of another version.
    """
    path = directory / IO_FILE
    try:
        if path.stat().st_size > MAX_IO_BYTES:
            raise RazorError(f"{path}: too large for an engine's I/O list; rebuild the engine")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise RazorError(f"{path}: cannot read: {e.strerror}; rebuild the engine") from None
    except (ValueError, RecursionError) as e:
        raise RazorError(f"{path}: not valid JSON ({e}); rebuild the engine") from None
    if not isinstance(data, dict) or data.get("schema") != IO_SCHEMA:
        raise RazorError(f"{path}: schema: expected '{IO_SCHEMA}'; rebuild the engine")
    if data.get("version") != IO_VERSION:
        found = repr(data.get("version"))[:60]
        raise RazorError(
            f"{path}: version: expected {IO_VERSION}, found {found}; rebuild the engine"
        )
    kinds: dict[str, type] = {
        "tensorrt_rtx": str,
        "targets": list,
        "max_batch_size": int,
        "max_seq_len": int,
        "max_chunk": int,
        "max_logits": int,
        "inputs": list,
        "outputs": list,
    }
    for name, kind in kinds.items():
        value: Any = data.get(name)
        if not isinstance(value, kind) or (isinstance(value, int) and (value is True or value < 1)):
            raise RazorError(
                f"{path}: {name}: expected {kind.__name__}, found {repr(value)[:60]}; rebuild the "
                "engine"
            )
    for side in ("inputs", "outputs"):
        for i, tensor in enumerate(data[side]):
            if not isinstance(tensor, dict) or not (
                isinstance(tensor.get("name"), str) and isinstance(tensor.get("shape"), list)
            ):
                raise RazorError(
                    f"{path}: {side}[{i}]: expected a name and a shape; rebuild the engine"
                )
    return data


class _DeviceCache:
    """One cache tensor of all slots, twice; slot s begins at byte s · slot_bytes of a copy.

    Where that is no multiple of ``ALIGNMENT``, passes that begin there go through two scratch
    buffers (in, out). It happens to tensors of a few bytes a slot, and to rows of an odd size.
    """

    def __init__(self, cuda: Cuda, tensor: CacheTensor, num_slots: int) -> None:
        self.tensor = tensor
        self.slot_bytes = tensor.nbytes
        size = self.slot_bytes * num_slots
        self.nbytes = 2 * size
        self.sides = [cuda.alloc(size, tensor.name) for _ in range(2)]
        self.scratch: list[int] = []
        if num_slots > 1 and self.slot_bytes % ALIGNMENT:
            self.scratch = [cuda.alloc(size - self.slot_bytes, tensor.name) for _ in range(2)]
            self.nbytes += 2 * (size - self.slot_bytes)

    def staged(self, slot: int) -> bool:
        return bool(slot * self.slot_bytes % ALIGNMENT)

    def at(self, side: int, slot: int) -> int:
        return self.sides[side] + slot * self.slot_bytes


class RtxSession:
    """A loaded TensorRT-RTX engine with its caches in GPU memory.

    Args:
        directory: engine folder with ``model.engine`` and ``io.json``.
        caches: the cache tensors of the graph (``planner.cache_tensors``).
        num_slots: sequences that can be cached at the same time.
        max_seq_len: capacity of a slot in tokens, as built.
        trt, cudart: ``tensorrt_rtx`` and ``cuda.bindings.runtime``; None = import them.

    Raises:
        MissingExtra: a package is not installed.
        UsageError: another TensorRT-RTX version, or a GPU the engine was not built for.
        RazorError: no GPU, not enough memory, or a damaged engine.
    """

    def __init__(
        self,
        directory: Path,
        caches: Sequence[CacheTensor],
        num_slots: int,
        max_seq_len: int,
        trt: Any = None,
        cudart: Any = None,
    ) -> None:
        facts = read_facts(directory)
        self._trt = trt or import_tensorrt_rtx("running a TensorRT-RTX engine")
        self._check_version(directory, facts)
        self._check_caches(directory, facts, caches, max_seq_len)
        self._cuda = cuda = Cuda(cudart or import_cudart())
        self._check_gpu(directory, facts)
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len
        self.max_batch_size: int = facts["max_batch_size"]
        self.max_chunk: int = facts["max_chunk"]
        self.max_logits: int = facts["max_logits"]
        self.vocab_size = int(facts["outputs"][0]["shape"][2])

        self._stream = cuda.stream()
        self._load(directory / ENGINE_FILE)
        self._caches = [_DeviceCache(cuda, t, num_slots) for t in caches]
        self._side = np.zeros(num_slots, np.int64)  # which copy of a slot is current
        rows = min(num_slots, self.max_batch_size)
        sizes = {
            "input_ids": 4 * rows * self.max_chunk,
            "past": 4 * rows,
            "chunk": 4 * rows,
            "past_span": max_seq_len,
            "logits_index": 4 * rows * self.max_logits,
            "logits": 4 * rows * self.max_logits * self.vocab_size,
        }
        self._small = {name: cuda.alloc(size, name) for name, size in sizes.items()}
        weights = [c for c in self._caches if c.tensor.kind == "comp_log_weight"]
        self._unused_weights = np.full(
            max((c.slot_bytes // 4 for c in weights), default=0), -np.inf, np.float32
        )
        for slot in range(num_slots):
            self.reset(slot)

    # Checks before anything is loaded -----------------------------------------------------------
    def _check_version(self, directory: Path, facts: dict[str, Any]) -> None:
        built, here = facts["tensorrt_rtx"], self._trt.__version__
        if built != here:
            raise UsageError(
                f"{directory}: built with tensorrt_rtx {built}, found {here} here, and engines run "
                f"only with the version that built them; pip install tensorrt-rtx=={built}, or "
                "rebuild the engine"
            )

    def _check_caches(
        self,
        directory: Path,
        facts: dict[str, Any],
        caches: Sequence[CacheTensor],
        max_seq_len: int,
    ) -> None:
        where = directory / IO_FILE
        if facts["max_seq_len"] != max_seq_len:
            raise RazorError(
                f"{where}: max_seq_len: expected {max_seq_len}, found {facts['max_seq_len']}; "
                "rebuild the engine"
            )
        found = {t["name"]: (t.get("dtype"), t["shape"][1:]) for t in facts["inputs"]}
        expected = {t.name: (DTYPES[t.dtype], list(t.shape)) for t in caches}
        for name in SMALL_INPUTS:
            if found.pop(name, None) is None:
                raise RazorError(f"{where}: inputs: {name} is missing; rebuild the engine")
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise RazorError(
                    f"{where}: cache tensor {name}: expected {expected.get(name)}, found "
                    f"{found.get(name)}; rebuild the engine"
                )
        logits = facts["outputs"][0] if facts["outputs"] else {}
        shape = logits.get("shape")
        if logits.get("name") != "logits" or not isinstance(shape, list) or len(shape) != 3:
            raise RazorError(f"{where}: outputs[0]: expected logits; rebuild the engine")

    def _check_gpu(self, directory: Path, facts: dict[str, Any]) -> None:
        cuda, hint = self._cuda, "run it on an RTX GPU, or build with --backend onnxruntime"
        try:
            count = cuda.call("cudaGetDeviceCount")
        except RazorError as e:
            raise RazorError(
                f"{directory}: a TensorRT-RTX engine needs a GPU ({e}); {hint}"
            ) from None
        if not count:
            raise RazorError(f"{directory}: a TensorRT-RTX engine needs a GPU, found none; {hint}")
        device = cuda.call("cudaGetDevice")
        attribute = cuda.api.cudaDeviceAttr
        major, minor = (
            cuda.call("cudaDeviceGetAttribute", a, device)
            for a in (
                attribute.cudaDevAttrComputeCapabilityMajor,
                attribute.cudaDevAttrComputeCapabilityMinor,
            )
        )
        if f"{major}.{minor}" not in facts["targets"]:
            raise UsageError(
                f"{directory}: built for compute capability {', '.join(map(str, facts['targets']))}, "
                f"this GPU has {major}.{minor}; {hint}"
            )

    def _load(self, path: Path) -> None:
        trt, self._errors = self._trt, collect_errors(self._trt)
        self._runtime = trt.Runtime(self._errors)
        try:
            plan = path.read_bytes()
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror}; rebuild the engine") from None
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RazorError(f"{path}: TensorRT-RTX cannot load this engine: {self._first_error()}")
        # One context per profile, each with the workspace of its profile only.
        self._contexts = []
        for i in range(len(PROFILES)):
            context = self._engine.create_execution_context(
                trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            )
            if context is None or not context.set_optimization_profile_async(i, int(self._stream)):
                raise RazorError(
                    f"{path}: no memory for profile '{PROFILES[i]}': {self._first_error()}"
                )
            self._contexts.append(context)
        self._sync()

    def _first_error(self) -> str:
        return first_line(self._errors.messages)

    # Session --------------------------------------------------------------------------------
    @property
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated: both copies, and scratch."""
        return sum(c.nbytes for c in self._caches)

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""
        side = int(self._side[slot])
        for cache in self._caches:
            # Zeros, not garbage: a masked row has weight 0, and 0 · NaN would still be NaN.
            address = cache.at(side, slot)
            self._cuda.call("cudaMemsetAsync", address, 0, cache.slot_bytes, self._stream)
            if cache.tensor.kind == "comp_log_weight":  # float32, −inf = unused
                self._to_device(address, self._unused_weights[: cache.slot_bytes // 4])
        self._sync()

    def forward(
        self,
        first_slot: int,
        tokens: np.ndarray,
        past: np.ndarray,
        chunk: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """See ``backends.base.Session.forward``.

        Raises:
            UsageError: more rows, tokens or logits than the engine was built for.
        """
        check_pass(self, first_slot, tokens, past, chunk, logits_index)
        (rows, seq), wanted = tokens.shape, logits_index.shape[1]
        for name, found, limit in (
            ("rows", rows, self.max_batch_size),
            ("tokens in a chunk", seq, self.max_chunk),
            ("logits of a chunk", wanted, self.max_logits),
        ):
            if found > limit:
                raise UsageError(
                    f"TensorRT-RTX engine: {name}: expected at most {limit}, found {found}"
                )
        context = self._contexts[1 if seq == wanted == 1 else 0]
        lo, hi = first_slot, first_slot + rows
        side = self._same_side(lo, hi)
        feeds: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(tokens, np.int32),
            "past": np.ascontiguousarray(past, np.int32),
            "chunk": np.ascontiguousarray(chunk, np.int32),
            "past_span": np.zeros(past_span(int(np.max(past)), self.max_seq_len), np.int8),
            "logits_index": np.ascontiguousarray(logits_index, np.int32),
        }
        for name, value in feeds.items():
            self._to_device(self._small[name], value)
            self._bind(context, name, self._small[name], value.shape)
        self._bind(context, "logits", self._small["logits"])
        for cache in self._caches:
            source, target = cache.at(side, lo), cache.at(1 - side, lo)
            if cache.staged(lo):
                self._on_device(cache.scratch[0], source, rows * cache.slot_bytes)
                source, target = cache.scratch
            self._bind(context, cache.tensor.name, source, (rows, *cache.tensor.shape))
            self._bind(context, f"{cache.tensor.name}_out", target)

        if not context.execute_async_v3(int(self._stream)):
            raise RazorError(f"TensorRT-RTX failed to run the engine: {self._first_error()}")
        for cache in self._caches:
            if cache.staged(lo):
                self._on_device(cache.at(1 - side, lo), cache.scratch[1], rows * cache.slot_bytes)
        logits = np.empty((rows, wanted, self.vocab_size), np.float32)
        self._cuda.copy(
            logits.ctypes.data, self._small["logits"], logits.nbytes, "DeviceToHost", self._stream
        )
        self._sync()
        self._side[lo:hi] = 1 - side
        return logits

    # Pieces -----------------------------------------------------------------------------------
    def _same_side(self, lo: int, hi: int) -> int:
        """The side that holds all of slots lo..hi-1, the fewest possible copied to it first."""
        side = int(2 * self._side[lo:hi].sum() > hi - lo)
        for slot in range(lo, hi):
            if self._side[slot] != side:
                for cache in self._caches:
                    self._on_device(
                        cache.at(side, slot), cache.at(1 - side, slot), cache.slot_bytes
                    )
                self._side[slot] = side
        return side

    def _bind(
        self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None
    ) -> None:
        ok = context.set_tensor_address(name, address)
        if ok and shape is not None:
            ok = context.set_input_shape(name, shape)
        if not ok:
            raise RazorError(
                f"TensorRT-RTX engine: {name}: shape {shape} refused: {self._first_error()}"
            )

    def _to_device(self, target: int, value: np.ndarray) -> None:
        self._cuda.copy(target, value.ctypes.data, value.nbytes, "HostToDevice", self._stream)

    def _on_device(self, target: int, source: int, nbytes: int) -> None:
        self._cuda.copy(target, source, nbytes, "DeviceToDevice", self._stream)

    def _sync(self) -> None:
        self._cuda.call("cudaStreamSynchronize", self._stream)


def past_span(past: int, max_seq_len: int) -> int:
    """Length of the ``past_span`` input for ``past`` cached tokens: at least that, and >= 1.

    Rounded up to one of a few lengths per doubling, because RTX compiles kernels per shape.
    """
    step = max(MIN_SPAN, (1 << past.bit_length()) // (2 * SPANS_PER_OCTAVE))
    return min(-(-max(past, 1) // step) * step, max_seq_len)
