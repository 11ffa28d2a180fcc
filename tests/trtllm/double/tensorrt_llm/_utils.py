"""Conversions between names of dtypes; the same in 1.0 - 1.2 (names inferred from their uses)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tensorrt as trt

_TRT = {
    "float32": trt.float32,
    "float16": trt.float16,
    "bfloat16": trt.bfloat16,
    "int8": trt.int8,
    "int32": trt.int32,
    "int64": trt.int64,
    "bool": trt.bool,
    "uint8": trt.uint8,
    "fp8": trt.fp8,
}
_NAMES = {dtype: name for name, dtype in _TRT.items()}


def str_dtype_to_trt(dtype: str) -> trt.DataType:
    return _TRT[dtype]


def trt_dtype_to_str(dtype: trt.DataType) -> str:
    return _NAMES[dtype]


def str_dtype_to_np(dtype: str) -> Any:
    special = {"bfloat16": ml_dtypes.bfloat16, "fp8": ml_dtypes.float8_e4m3fn}
    return np.dtype(special.get(dtype, dtype))


def to_trt_dtype(dtype: Any) -> trt.DataType:
    """Double only: a dtype given as a name or as trt.DataType."""
    return str_dtype_to_trt(dtype) if isinstance(dtype, str) else dtype
