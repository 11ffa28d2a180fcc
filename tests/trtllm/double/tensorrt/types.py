"""Enumerations of TensorRT 10, those that matter here; numbers as in its public headers."""

import enum


class DataType(enum.IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9


class PluginFieldType(enum.Enum):
    FLOAT16 = 0
    FLOAT32 = 1
    FLOAT64 = 2
    INT8 = 3
    INT16 = 4
    INT32 = 5
    CHAR = 6
    DIMS = 7
    UNKNOWN = 8
    BF16 = 9
    INT64 = 10
    FP8 = 11
    INT4 = 12


class TensorRTPhase(enum.Enum):
    BUILD = 0
    RUNTIME = 1


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class LayerType(enum.Enum):
    """Only the two that TensorRT-LLM tells apart; every other layer is PLAIN in the double."""

    PLUGIN_V2 = "PLUGIN_V2"
    PLUGIN_V3 = "PLUGIN_V3"
    PLAIN = "PLAIN"
