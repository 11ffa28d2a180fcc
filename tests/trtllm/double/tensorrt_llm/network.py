"""``Network``: the network being defined with its plugin configuration and named inputs.

Read: ``_add_input`` wants a trt.DataType and names the dimensions; ``_mark_output``; layers get the
names of the modules they were made in, PLUGIN_V3 layers ``<module>/PLUGIN_V3_<n>``, and a module that
was not in the tree at the first call an empty prefix. Inferred: the exact counting of ``n``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import tensorrt as trt
from tensorrt.errors import require

from .plugin import PluginConfig


class Network:
    def __init__(self, **kwargs: Any) -> None:
        self.trt_network = trt.INetworkDefinition()
        self.plugin_config = PluginConfig()
        self.strongly_typed = True
        self._inputs: OrderedDict[str, Any] = OrderedDict()
        self._named_parameters: list[tuple[str, Any]] = []
        self._parameter_names: dict[int, str] = {}
        self._module_names: dict[int, str] | None = None
        self._module_stack: list[Any] = []

    def set_named_parameters(self, named_parameters: Iterable[tuple[str, Any]]) -> None:
        self._named_parameters = list(named_parameters)
        self._parameter_names = {id(p): name for name, p in self._named_parameters}

    @property
    def named_parameters(self) -> list[tuple[str, Any]]:
        return self._named_parameters

    def parameter_name(self, parameter: Any) -> str:
        """Double only: the name of a weight, or what the module that has it calls it."""
        return self._parameter_names.get(id(parameter), parameter.local_name)

    def get_inputs(self) -> OrderedDict[str, Any]:
        return self._inputs

    def _add_input(
        self, tensor: Any, name: str, dtype: Any, shape: list[int], dim_range: Any = None
    ) -> None:
        assert isinstance(dtype, trt.DataType), f"{name}: dtype {dtype!r}"
        require(isinstance(dim_range, OrderedDict), f"input {name}: dim_range is no OrderedDict")
        require(len(dim_range) == len(shape), f"input {name}: {shape} with {list(dim_range)}")
        profiles = {len(ranges) for ranges in dim_range.values()}
        require(len(profiles) == 1, f"input {name}: dimensions with different numbers of profiles")
        for size, (dim, ranges) in zip(shape, dim_range.items(), strict=True):
            for r in ranges:
                low, opt, high = (r, r, r) if isinstance(r, int) else r
                require(1 <= low <= opt <= high, f"input {name}: {dim}: range {r}")
                require(size in (-1, low) and (size == -1 or low == high), f"{name}: {dim}: {r}")
        tensor.trt_tensor = self.trt_network.add_input(name=name, shape=shape, dtype=dtype)
        for i, dim in enumerate(dim_range):
            tensor.trt_tensor.set_dimension_name(i, dim)
        tensor.dim_range = dim_range
        self._inputs[name] = tensor

    def _mark_output(self, tensor: Any, name: str, dtype: Any) -> None:
        if self.strongly_typed and dtype is not None and tensor.trt_tensor.dtype != dtype:
            tensor = tensor.cast(dtype)
        tensor.trt_tensor.name = name
        self.trt_network.mark_output(tensor.trt_tensor)

    def _set_layer_name(self, layer: Any) -> None:
        names = self._module_names or {}
        prefix = names.get(id(self._module_stack[-1]), "") if self._module_stack else ""
        count = sum(other.type is layer.type for other in self.trt_network.layers) - 1
        layer.name = f"{prefix}/{layer.type.value}_{count}"
        layer.metadata = prefix
        for i, output in enumerate(layer.outputs):
            output.name = f"{layer.name}_output_{i}"
