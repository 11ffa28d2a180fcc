"""Double of TensorRT 10.11 - 10.14: the part of its Python API that defining a network takes.

Names as in TensorRT's public Python documentation. Networks are recorded, not compiled.
"""

from .errors import ContractError as ContractError
from .network import INetworkDefinition, ITensor, Layer
from .plugins import (
    IPluginV3,
    PluginField,
    PluginFieldCollection,
    PluginFieldCollection_,
    get_plugin_registry,
)
from .types import DataType, LayerType, PluginFieldType, TensorLocation, TensorRTPhase
from .version import __version__

float32 = DataType.FLOAT
float16 = DataType.HALF
bfloat16 = DataType.BF16
int8 = DataType.INT8
int32 = DataType.INT32
int64 = DataType.INT64
bool = DataType.BOOL
uint8 = DataType.UINT8
fp8 = DataType.FP8
int4 = DataType.INT4

__all__ = [
    "DataType",
    "INetworkDefinition",
    "IPluginV3",
    "ITensor",
    "Layer",
    "LayerType",
    "PluginField",
    "PluginFieldCollection",
    "PluginFieldCollection_",
    "PluginFieldType",
    "TensorLocation",
    "TensorRTPhase",
    "__version__",
    "get_plugin_registry",
]
