"""Running a TensorRT engine: one copy of each cache in GPU memory, updated in place by the plugin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trt_razor.backends.cuda import Cuda
from trt_razor.backends.tensorrt import PLUGIN_VARIABLE, TENSORRT, find_plugin
from trt_razor.backends.trt_builder import first_line
from trt_razor.backends.trt_engine import IO_FILE
from trt_razor.backends.trt_session import ALIGNMENT, EngineSession
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file


class _Cache:
    """One cache tensor of all slots; slot s begins at byte s · slot_bytes.

    Where that is no multiple of ``ALIGNMENT``, passes that begin there go through a scratch buffer.
    It happens to tensors of a few bytes a slot, and to rows of an odd size.
    """

    def __init__(self, cuda: Cuda, tensor: CacheTensor, num_slots: int) -> None:
        self.tensor = tensor
        self.slot_bytes = tensor.nbytes
        self.nbytes = self.slot_bytes * num_slots
        self.base = cuda.alloc(self.nbytes, tensor.name)
        self.scratch = 0
        if num_slots > 1 and self.slot_bytes % ALIGNMENT:
            self.scratch = cuda.alloc(self.nbytes - self.slot_bytes, tensor.name)
            self.nbytes += self.nbytes - self.slot_bytes

    def staged(self, slot: int) -> bool:
        return bool(slot * self.slot_bytes % ALIGNMENT)

    def at(self, slot: int) -> int:
        return self.base + slot * self.slot_bytes


class TensorRtSession(EngineSession):
    """A loaded TensorRT engine; see ``EngineSession`` for arguments and errors.

    Args:
        plugin: the plugin library; None = ``find_plugin``.

    Raises:
        UsageError: besides, another plugin library than the one the engine was built with.
    """

    def __init__(
        self,
        directory: Path,
        caches: Sequence[CacheTensor],
        num_slots: int,
        max_seq_len: int,
        trt: Any = None,
        cudart: Any = None,
        plugin: Path | None = None,
    ) -> None:
        self._plugin = plugin
        super().__init__(TENSORRT, directory, caches, num_slots, max_seq_len, trt, cudart)

    def _check_more(self, directory: Path, facts: dict[str, Any]) -> None:
        where = directory / IO_FILE
        for name in ("plugin", "plugin_sha256"):
            if not isinstance(facts.get(name), str):
                raise RazorError(f"{where}: {name}: missing; rebuild the engine")
        self._plugin = self._plugin or find_plugin(self._trt)
        found = sha256_file(self._plugin)
        if found != facts["plugin_sha256"]:
            raise UsageError(
                f"{directory}: built with another plugin library than {self._plugin}: expected "
                f"sha256 {facts['plugin_sha256'][:12]}…, found {found[:12]}…; rebuild the engine, or "
                f"name the library it was built with in ${PLUGIN_VARIABLE}"
            )

    def _before_load(self) -> None:
        registry = self._trt.get_plugin_registry()
        # A second registration of the same creators is an error: one load a process.
        if any(c.plugin_namespace == "trt_razor" for c in registry.all_creators):
            return
        if registry.load_library(str(self._plugin)) is None:
            raise RazorError(f"{self._plugin}: cannot be loaded: {self._first_error()}")

    def _first_error(self) -> str:
        return first_line(self._errors.messages)

    def _allocate_caches(self, caches: Sequence[CacheTensor]) -> None:
        self._caches = [_Cache(self._cuda, t, self.num_slots) for t in caches]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated, scratch included."""
        return sum(c.nbytes for c in self._caches)

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""
        for cache in self._caches:
            address = cache.at(slot)
            self._cuda.call("cudaMemsetAsync", address, 0, cache.slot_bytes, self._stream)
            if cache.tensor.kind == "comp_log_weight":  # float32, −inf = unused
                self._to_device(address, self._unused_weights[: cache.slot_bytes // 4])
        self._sync()

    def _bind_caches(self, context: Any, lo: int, hi: int) -> None:
        for cache in self._caches:
            address = cache.at(lo)
            if cache.staged(lo):
                self._on_device(cache.scratch, address, (hi - lo) * cache.slot_bytes)
                address = cache.scratch
            # The output is the input: the plugin says so to the builder (getAliasedInput).
            self._bind(context, cache.tensor.name, address, (hi - lo, *cache.tensor.shape))
            self._bind(context, f"{cache.tensor.name}_out", address)

    def _after_pass(self, lo: int, hi: int) -> None:
        for cache in self._caches:
            if cache.staged(lo):
                self._on_device(cache.at(lo), cache.scratch, (hi - lo) * cache.slot_bytes)
