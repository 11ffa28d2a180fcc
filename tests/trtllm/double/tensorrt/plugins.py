"""Plugin fields, the registry, and the creator of RazorGptAttention.

As in TensorRT 10: ``get_creator`` finds creators of V3 plugins, whose ``create_plugin`` takes a phase;
``get_plugin_creator`` those of V2 plugins only. A creator that TensorRT would let return None raises a
ContractError here. TensorRT-LLM's own plugins have no creators in the double (see functional.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import require
from .network import ITensor
from .razor_gpt_attention import Table
from .types import DataType, LayerType, PluginFieldType, TensorRTPhase

_STORED = {
    PluginFieldType.FLOAT32: np.float32,
    PluginFieldType.FLOAT64: np.float64,
    PluginFieldType.INT32: np.int32,
    PluginFieldType.INT64: np.int64,
    PluginFieldType.INT8: np.int8,
}


class PluginField:
    """``PluginField(name, data, type)``: data is a NumPy array whose dtype is that of ``type``."""

    def __init__(
        self,
        name: str = "",
        data: Any = None,
        type: PluginFieldType = PluginFieldType.UNKNOWN,
    ) -> None:
        if not isinstance(name, str | bytes) or not isinstance(type, PluginFieldType):
            raise TypeError(f"PluginField({name!r}, {data!r}, {type!r})")
        if data is not None and not isinstance(data, np.ndarray):
            raise TypeError(f"PluginField {name!r}: data must be a buffer, found {data!r}")
        if data is not None:
            # TensorRT would take the bytes for what the type says.
            require(
                _STORED.get(type) == data.dtype.type,
                f"PluginField {name!r}: {data.dtype} data as {type.name}",
            )
        self.name = name if isinstance(name, str) else name.decode()
        self.data = data
        self.type = type
        self.size = 0 if data is None else int(data.size)


class PluginFieldCollection(list):
    def __init__(self, fields: Iterable[PluginField] = ()) -> None:
        super().__init__(fields)
        for field in self:
            if not isinstance(field, PluginField):
                raise TypeError(f"PluginFieldCollection: {field!r} is no PluginField")


PluginFieldCollection_ = PluginFieldCollection


class IPluginV3:
    """A plugin made by ``RazorCreator``; ``fields`` are Python numbers by name."""

    kind = LayerType.PLUGIN_V3
    plugin_type = "RazorGptAttention"

    def __init__(self, name: str, fields: dict[str, int | float], table: Table) -> None:
        self.layer_name = name
        self.fields = fields
        self._table = table

    def outputs(self, inputs: list[ITensor]) -> list[tuple[DataType, tuple[int, ...]]]:
        """Checks the inputs against the README; dtype and shape of the output."""
        self._table.check_inputs(self.fields, inputs)
        width = self.fields["num_heads"] * self.fields["head_dim"]
        return [(inputs[0].dtype, (inputs[0].shape[0], int(width)))]


class RazorCreator:
    name = "RazorGptAttention"
    plugin_version = "1"
    plugin_namespace = "trt_razor"

    def __init__(self) -> None:
        self._table = Table.read(Path(__file__).parent / "razor_gpt_attention.md")

    @property
    def field_names(self) -> PluginFieldCollection:
        return PluginFieldCollection([PluginField(name) for name in self._table.fields])

    def create_plugin(
        self, name: str, field_collection: PluginFieldCollection, phase: TensorRTPhase
    ) -> IPluginV3:
        if not isinstance(field_collection, PluginFieldCollection):
            raise TypeError(f"create_plugin: {field_collection!r} is no PluginFieldCollection")
        if not isinstance(phase, TensorRTPhase):
            raise TypeError(f"create_plugin: {phase!r} is no TensorRTPhase")
        require(phase is TensorRTPhase.BUILD, "networks are defined with TensorRTPhase.BUILD")
        return IPluginV3(name, self._table.check_fields(field_collection), self._table)


class _Registry:
    def __init__(self) -> None:
        self._creators: dict[tuple[str, str, str], RazorCreator] = {}
        self.libraries: list[str] = []

    def load_library(self, plugin_path: str) -> object | None:
        """Only the file that ``doubles.make`` writes. None, and nothing else, where plugins of the
        library are registered already, as documented; ``libraries`` has every call."""
        if not isinstance(plugin_path, str):
            raise TypeError(f"load_library: expected str, found {type(plugin_path).__name__}")
        path = Path(plugin_path)
        require(path.parent == Path(__file__).parents[1] and path.is_file(), f"no library {path}")
        self.libraries.append(plugin_path)
        creator = RazorCreator()
        key = (creator.name, creator.plugin_version, creator.plugin_namespace)
        if key in self._creators:
            return None
        self._creators[key] = creator
        return object()

    @property
    def all_creators(self) -> list[RazorCreator]:
        """Name seen in TensorRT-RTX, inferred for TensorRT, which lists its own plugins' creators too."""
        return list(self._creators.values())

    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        return self._creators.get((type, version, plugin_namespace))

    def get_plugin_creator(self, type: str, version: str, plugin_namespace: str = "") -> Any:
        """Creators of V2 plugins: the double has none."""
        return None


_REGISTRY = _Registry()


def get_plugin_registry() -> _Registry:
    return _REGISTRY
