"""What running an engine of TensorRT and of TensorRT for RTX has in common.

Checks of the engine's facts, loading, profiles, small inputs and outputs. Where the caches are and
how a pass updates them differs: ``rtx_session`` and ``tensorrt_session``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.backends.base import check_pass
from trt_razor.backends.cuda import Cuda, import_cudart
from trt_razor.backends.trt_builder import collect_errors, first_line
from trt_razor.backends.trt_engine import (
    ENGINE_FILE,
    IO_FILE,
    PROFILES,
    Flavour,
    import_module,
    read_facts,
)
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import RazorError, UsageError

ALIGNMENT = 256
"""Bytes; TensorRT wants the address of every input and output at a multiple of this."""
SMALL_INPUTS = ("input_ids", "past", "chunk", "past_span", "logits_index")
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


class EngineSession(ABC):
    """A loaded engine with its caches in GPU memory. Subclasses say where the caches are.

    Args:
        flavour: which TensorRT.
        directory: engine folder with ``model.engine`` and ``io.json``.
        caches: the cache tensors of the graph (``cache_layout.cache_tensors``).
        num_slots: sequences that can be cached at the same time.
        max_seq_len: capacity of a slot in tokens, as built.
        trt, cudart: the flavour's module and ``cuda.bindings.runtime``; None = import them.

    Raises:
        MissingExtra: a package is not installed.
        UsageError: another version, or a GPU the engine was not built for.
        RazorError: no GPU, not enough memory, or a damaged engine.
    """

    def __init__(
        self,
        flavour: Flavour,
        directory: Path,
        caches: Sequence[CacheTensor],
        num_slots: int,
        max_seq_len: int,
        trt: Any = None,
        cudart: Any = None,
    ) -> None:
        self.flavour = flavour
        facts = read_facts(directory, flavour)
        why = f"running a {flavour.product} engine"
        self._trt = trt or import_module(flavour, why)
        self._check_version(directory, facts)
        self._check_caches(directory, facts, caches, max_seq_len)
        self._check_more(directory, facts)
        self._cuda = cuda = Cuda(cudart or import_cudart(why, flavour.extra))
        self._check_gpu(directory, facts)
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len
        self.max_batch_size: int = facts["max_batch_size"]
        self.max_chunk: int = facts["max_chunk"]
        self.max_logits: int = facts["max_logits"]
        self.vocab_size = int(facts["outputs"][0]["shape"][2])

        self._stream = cuda.stream()
        self._load(directory / ENGINE_FILE)
        self._allocate_caches(caches)
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
        weights = (t.nbytes // 4 for t in caches if t.kind == "comp_log_weight")
        self._unused_weights = np.full(max(weights, default=0), -np.inf, np.float32)
        for slot in range(num_slots):
            self.reset(slot)

    # What subclasses do ---------------------------------------------------------------------
    def _check_more(self, directory: Path, facts: dict[str, Any]) -> None:  # noqa: B027 optional
        """Checks of their own, before anything is loaded."""

    def _before_load(self) -> None:  # noqa: B027 optional
        """What the engine needs in this process."""

    @abstractmethod
    def _allocate_caches(self, caches: Sequence[CacheTensor]) -> None:
        """Memory for all slots."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated."""

    @abstractmethod
    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""

    @abstractmethod
    def _bind_caches(self, context: Any, lo: int, hi: int) -> None:
        """Give a pass its caches of slots lo..hi-1."""

    @abstractmethod
    def _after_pass(self, lo: int, hi: int) -> None:
        """Enqueue what makes the pass's caches current."""

    def _span(self, past: int) -> int:
        """Length of the ``past_span`` input for ``past`` cached tokens: at least that, and >= 1."""
        return min(max(past, 1), self.max_seq_len)

    # Checks before anything is loaded -----------------------------------------------------------
    def _check_version(self, directory: Path, facts: dict[str, Any]) -> None:
        f = self.flavour
        built, here = facts[f.module], self._trt.__version__
        if built != here:
            raise UsageError(
                f"{directory}: built with {f.module} {built}, found {here} here, and engines run "
                f"only with the version that built them; pip install {f.package}=={built}, or "
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
        product, hint = self.flavour.product, self.flavour.instead
        try:
            capability = self._cuda.capability()
        except RazorError as e:
            raise RazorError(f"{directory}: a {product} engine needs a GPU ({e}); {hint}") from None
        if capability not in facts["targets"]:
            raise UsageError(
                f"{directory}: built for compute capability {', '.join(map(str, facts['targets']))}, "
                f"this GPU has {capability}; {hint}"
            )

    def _load(self, path: Path) -> None:
        trt, self._errors = self._trt, collect_errors(self._trt)
        self._before_load()
        try:
            self._runtime = trt.Runtime(self._errors)
        except TypeError:  # how the bindings say null: no GPU, no driver
            raise RazorError(
                f"{path}: TensorRT's runtime cannot start: {first_line(self._errors.messages)}"
            ) from None
        try:
            plan = path.read_bytes()
        except OSError as e:
            raise RazorError(f"{path}: cannot read: {e.strerror}; rebuild the engine") from None
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RazorError(
                f"{path}: {self.flavour.product} cannot load this engine: {self._first_error()}"
            )
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
                    f"{self.flavour.product} engine: {name}: expected at most {limit}, found {found}"
                )
        context = self._contexts[1 if seq == wanted == 1 else 0]
        lo, hi = first_slot, first_slot + rows
        feeds: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(tokens, np.int32),
            "past": np.ascontiguousarray(past, np.int32),
            "chunk": np.ascontiguousarray(chunk, np.int32),
            "past_span": np.zeros(self._span(int(np.max(past))), np.int8),
            "logits_index": np.ascontiguousarray(logits_index, np.int32),
        }
        for name, value in feeds.items():
            self._to_device(self._small[name], value)
            self._bind(context, name, self._small[name], value.shape)
        self._bind(context, "logits", self._small["logits"])
        self._bind_caches(context, lo, hi)

        if not context.execute_async_v3(int(self._stream)):
            raise RazorError(
                f"{self.flavour.product} failed to run the engine: {self._first_error()}"
            )
        self._after_pass(lo, hi)
        logits = np.empty((rows, wanted, self.vocab_size), np.float32)
        self._cuda.copy(
            logits.ctypes.data, self._small["logits"], logits.nbytes, "DeviceToHost", self._stream
        )
        self._sync()
        return logits

    # Pieces -----------------------------------------------------------------------------------
    def _bind(
        self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None
    ) -> None:
        ok = context.set_tensor_address(name, address)
        if ok and shape is not None:
            ok = context.set_input_shape(name, shape)
        if not ok:
            raise RazorError(
                f"{self.flavour.product} engine: {name}: shape {shape} refused: {self._first_error()}"
            )

    def _to_device(self, target: int, value: np.ndarray) -> None:
        self._cuda.copy(target, value.ctypes.data, value.nbytes, "HostToDevice", self._stream)

    def _on_device(self, target: int, source: int, nbytes: int) -> None:
        self._cuda.copy(target, source, nbytes, "DeviceToDevice", self._stream)

    def _sync(self) -> None:
        self._cuda.call("cudaStreamSynchronize", self._stream)
