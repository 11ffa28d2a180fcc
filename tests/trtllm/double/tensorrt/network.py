"""Recorded networks: ``INetworkDefinition``, ``ITensor``, layers.

Beside TensorRT's own attributes a tensor has, for checks,

* ``origin``: where its data comes from: the name of an engine input or of a weight, also through
  casts and reshapes; ``<kind of layer>`` for what a layer computed;
* ``values``: the elements of a shape tensor (-1 = known at run time only) or of a small constant.

Plain layers (matrix products, sums, ...) have no method each: ``record`` adds any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import require
from .types import DataType, LayerType, TensorLocation


class ITensor:
    def __init__(
        self,
        name: str,
        dtype: DataType,
        shape: Sequence[int],
        origin: str,
        values: list[Any] | None = None,
    ) -> None:
        require(isinstance(dtype, DataType), f"{name}: dtype {dtype!r} is no trt.DataType")
        self.name = name
        self.dtype = dtype
        self.shape = tuple(int(d) for d in shape)
        self.location = TensorLocation.DEVICE
        self.origin = origin
        self.values = values
        self.dimension_names: dict[int, str] = {}
        self.is_network_input = False

    def set_dimension_name(self, index: int, name: str) -> None:
        self.dimension_names[index] = name


class Layer:
    """Any layer; ``plugin`` only of plugin layers."""

    def __init__(
        self, kind: LayerType, name: str, inputs: list[ITensor], outputs: list[ITensor], plugin: Any
    ) -> None:
        self.type = kind
        self.name = name
        self.metadata = ""
        self.plugin = plugin
        self.inputs = inputs
        self.outputs = outputs
        self.num_inputs = len(inputs)
        self.num_outputs = len(outputs)

    def get_input(self, index: int) -> ITensor | None:
        return self.inputs[index] if index < self.num_inputs else None

    def get_output(self, index: int) -> ITensor | None:
        return self.outputs[index] if index < self.num_outputs else None


class INetworkDefinition:
    def __init__(self) -> None:
        self.name = "double"
        self.layers: list[Layer] = []
        self.inputs: list[ITensor] = []
        self.outputs: list[ITensor] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> ITensor:
        require(name not in [t.name for t in self.inputs], f"two engine inputs named {name!r}")
        tensor = ITensor(name, dtype, shape, name)
        tensor.is_network_input = True
        self.inputs.append(tensor)
        return tensor

    def mark_output(self, tensor: ITensor) -> None:
        self.outputs.append(tensor)

    def add_plugin_v2(self, inputs: Sequence[ITensor], plugin: Any) -> Layer:
        return self._add_plugin(LayerType.PLUGIN_V2, inputs, plugin)

    def add_plugin_v3(
        self, inputs: Sequence[ITensor], shape_inputs: Sequence[ITensor], plugin: Any
    ) -> Layer:
        require(list(shape_inputs) == [], "none of the plugins here has shape inputs")
        return self._add_plugin(LayerType.PLUGIN_V3, inputs, plugin)

    def _add_plugin(self, kind: LayerType, inputs: Sequence[ITensor], plugin: Any) -> Layer:
        inputs = list(inputs)
        for i, tensor in enumerate(inputs):
            if not isinstance(tensor, ITensor):
                raise TypeError(
                    f"plugin input {i}: expected ITensor, found {type(tensor).__name__}"
                )
        if plugin is None or getattr(plugin, "kind", None) is not kind:
            raise TypeError(f"add_plugin: {plugin!r} is no {kind.value} plugin")
        outputs = [
            ITensor(
                f"(Unnamed Layer* {self.num_layers}) output {i}",
                dtype,
                shape,
                f"<{plugin.plugin_type}>",
            )
            for i, (dtype, shape) in enumerate(plugin.outputs(inputs))
        ]
        return self._append(kind, inputs, outputs, plugin)

    def record(
        self,
        what: str,
        inputs: Sequence[ITensor],
        dtype: DataType,
        shape: Sequence[int],
        origin: str | None = None,
        values: list[Any] | None = None,
    ) -> Layer:
        """Adds a plain layer with one output (double only)."""
        name = f"(Unnamed Layer* {self.num_layers}) [{what}] output"
        output = ITensor(name, dtype, shape, origin or f"<{what}>", values)
        return self._append(LayerType.PLAIN, list(inputs), [output], what)

    def _append(
        self, kind: LayerType, inputs: list[ITensor], outputs: list[ITensor], plugin: Any
    ) -> Layer:
        label = plugin if kind is LayerType.PLAIN else kind.value
        layer = Layer(
            kind, f"(Unnamed Layer* {self.num_layers}) [{label}]", inputs, outputs, plugin
        )
        self.layers.append(layer)
        return layer
