"""A host for TensorRT plugins, without TensorRT: fake_host.cpp behind ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BUILD, RUNTIME = 0, 1
ROOM = 64  # fields of a plugin, at most

TYPES = {
    "float32": 0,
    "float16": 1,
    "int8": 2,
    "int32": 3,
    "float8_e4m3fn": 6,
    "bfloat16": 7,
    "int64": 8,
}
"""nvinfer1::DataType by name."""

FIELD_TYPES: dict[type, int] = {np.float32: 1, np.float64: 2, np.int8: 3, np.int32: 5, np.int64: 10}
"""nvinfer1::PluginFieldType."""

FieldValue = int | float | Sequence[int] | np.ndarray


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Field(Structure):
    _fields_ = (("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32))


class _Tensor(Structure):
    _fields_ = (
        ("type", c_int32),
        ("num_dims", c_int32),
        ("dims", c_int64 * 8),
        ("min", c_int64 * 8),
        ("max", c_int64 * 8),
        ("data", c_void_p),
        ("format", c_int32),
    )


@dataclass
class Tensor:
    """A tensor of a call, or of a profile: ``least`` and ``most`` are dimensions, ``shape`` if None."""

    dtype: str
    shape: Sequence[int]
    data: int = 0
    least: Sequence[int] | None = None
    most: Sequence[int] | None = None
    linear: bool = True

    def to_c(self) -> _Tensor:
        out = _Tensor(type=TYPES[self.dtype], num_dims=len(self.shape), data=self.data or None)
        for name, dims in (
            ("dims", self.shape),
            ("min", self.shape if self.least is None else self.least),
            ("max", self.shape if self.most is None else self.most),
        ):
            getattr(out, name)[: len(dims)] = dims
        out.format = 0 if self.linear else 1
        return out


def as_field(value: FieldValue) -> np.ndarray:
    """As an ONNX parser makes fields: int32 and float32."""
    if isinstance(value, np.ndarray):
        return value
    return np.atleast_1d(np.asarray(value, np.float32 if isinstance(value, float) else np.int32))


def _fields(fields: Sequence[tuple[str, np.ndarray]]) -> ctypes.Array[_Field]:
    out = (_Field * max(1, len(fields)))()
    for c, (name, data) in zip(out, fields, strict=False):
        c.name, c.type, c.length = name.encode(), FIELD_TYPES[data.dtype.type], data.size
        c.data = data.ctypes.data if data.size else None
    return out


class Host:
    """A loaded plugin library."""

    def __init__(self, host_library: Path, plugins: Path) -> None:
        self._c = c = ctypes.CDLL(str(host_library))
        for name in ("log", "creator", "identity", "timing_id", "metadata"):
            getattr(c, f"host_{name}").restype = c_char_p
        for name in ("open", "create", "clone", "attach"):
            getattr(c, f"host_{name}").restype = c_void_p
        c.host_workspace.restype = c_int64
        c.host_destroy.restype = c.host_clear_log.restype = None
        self._library = c.host_open(str(plugins).encode())
        assert self._library, self.log()
        self._library = c_void_p(self._library)

    def log(self) -> str:
        """Messages since the last call: severity (1 = error) and text, a line each."""
        text = self._c.host_log().decode()
        self._c.host_clear_log()
        return text

    def set_logger_throws(self, throws: bool) -> None:
        self._c.host_logger_throws(int(throws))

    def creators(self) -> list[str]:
        """Name, version and namespace of each."""
        out: list[str] = []
        while text := self._c.host_creator(self._library, len(out)):
            out.append(text.decode())
        return out

    def field_names(self, plugin: str) -> list[str]:
        fields = (_Field * ROOM)()
        count = self._c.host_field_names(self._library, plugin.encode(), fields, ROOM)
        return [f.name.decode() for f in fields[:count]]

    def create(
        self,
        plugin: str,
        fields: Mapping[str, FieldValue] | Sequence[tuple[str, FieldValue]] | None,
        phase: int = BUILD,
        layer: str = "layer.7",
    ) -> Plugin | None:
        """A plugin, or None if it refuses; ``fields`` None: no collection at all."""
        pairs = list(fields.items()) if isinstance(fields, Mapping) else list(fields or ())
        arrays = [(name, as_field(value)) for name, value in pairs]
        count = -1 if fields is None else len(arrays)
        made = self._c.host_create(
            self._library, plugin.encode(), layer.encode(), phase, _fields(arrays), count
        )
        return Plugin(self, made) if made else None


class Plugin:
    """An IPluginV3."""

    def __init__(self, host: Host, pointer: int) -> None:
        self.host, self._c, self._p = host, host._c, c_void_p(pointer)

    def __del__(self) -> None:
        self._c.host_destroy(self._p)

    def clone(self) -> Plugin:
        return Plugin(self.host, self._c.host_clone(self._p))

    def attach(self) -> Plugin:
        return Plugin(self.host, self._c.host_attach(self._p))

    @property
    def identity(self) -> str:
        return self._c.host_identity(self._p).decode()

    @property
    def timing_id(self) -> str:
        return self._c.host_timing_id(self._p).decode()

    @property
    def metadata(self) -> str:
        return self._c.host_metadata(self._p).decode()

    @property
    def num_outputs(self) -> int:
        return self._c.host_num_outputs(self._p)

    @property
    def format_limit(self) -> int:
        return self._c.host_format_limit(self._p)

    def serialise(self) -> list[tuple[str, np.ndarray]]:
        fields = (_Field * ROOM)()
        count = self._c.host_serialise(self._p, fields, ROOM)
        dtypes = {code: dtype for dtype, code in FIELD_TYPES.items()}
        out: list[tuple[str, np.ndarray]] = []
        for f in fields[:count]:
            dtype = np.dtype(dtypes[f.type])
            content = ctypes.string_at(f.data, f.length * dtype.itemsize)
            out.append((f.name.decode(), np.frombuffer(content, dtype).copy()))
        return out

    def aliased_input(self, output: int) -> int:
        return self._c.host_aliased_input(self._p, output)

    def output_types(self, inputs: Sequence[Tensor]) -> list[str] | None:
        """None if refused."""
        outputs = (_Tensor * self.num_outputs)()
        if self._c.host_types(self._p, _all(inputs), len(inputs), outputs, len(outputs)):
            return None
        names = {code: name for name, code in TYPES.items()}
        return [names[o.type] for o in outputs]

    def output_shapes(self, inputs: Sequence[Tensor]) -> list[list[int]] | None:
        """None if refused."""
        outputs = (_Tensor * self.num_outputs)()
        if self._c.host_shapes(self._p, _all(inputs), len(inputs), outputs, len(outputs)):
            return None
        return [list(o.dims[: o.num_dims]) for o in outputs]

    def refused_format(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        """Position of the first tensor whose type or format is refused, or -1."""
        return self._c.host_formats(self._p, _all([*inputs, *outputs]), len(inputs), len(outputs))

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return not self._call("configure", inputs, outputs)

    def workspace_size(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return self._call("workspace", inputs, outputs)

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
        return not self._call("shape_change", inputs, outputs)

    def enqueue(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], workspace: int) -> bool:
        return not self._call("enqueue", inputs, outputs, c_void_p(workspace))

    def _call(
        self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *more: c_void_p
    ) -> int:
        function = getattr(self._c, f"host_{name}")
        return function(self._p, _all(inputs), len(inputs), _all(outputs), len(outputs), *more)


def _all(tensors: Sequence[Tensor]) -> ctypes.Array[_Tensor]:
    return (_Tensor * max(1, len(tensors)))(*(t.to_c() for t in tensors))


__all__ = ["BUILD", "RUNTIME", "FieldValue", "Host", "Plugin", "Tensor", "dtype_name"]
