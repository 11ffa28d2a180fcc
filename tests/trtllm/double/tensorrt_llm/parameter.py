"""``Parameter(value, shape, dtype, is_buffer, prefer_managed)``.

Read: names and order of the first four, ``value``, ``raw_value``, ``is_inited``, the check of shapes.
Values may be arrays or torch tensors (float8 and bfloat16 included). The real class makes random
values for what is unset; the double gives zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._common import default_net
from ._utils import str_dtype_to_np, str_dtype_to_trt, to_trt_dtype, trt_dtype_to_str
from .functional import Tensor, _create_tensor
from .logger import logger

_SMALL = 512
"""Elements: constants up to this many are recorded with their values."""


def _dtype_name(value: Any) -> str:
    name = str(value.dtype).removeprefix("torch.")
    return "fp8" if name == "float8_e4m3fn" else name


class Parameter:
    def __init__(
        self,
        value: Any = None,
        shape: Any = None,
        dtype: Any = None,
        is_buffer: bool = False,
        prefer_managed: bool = False,
    ) -> None:
        assert value is not None or shape is not None, "a Parameter has a value or a shape"
        self._shape = tuple(int(d) for d in (shape if value is None else value.shape))
        if dtype is None:
            dtype = "float32" if value is None else _dtype_name(value)
        self._dtype = to_trt_dtype(dtype)
        self._value = value
        self.is_buffer = is_buffer
        self.local_name = "<unnamed weight>"

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> Any:
        return self._dtype

    def is_inited(self) -> bool:
        return self._value is not None

    @property
    def raw_value(self) -> Any:
        if self._value is None:
            return np.zeros(self._shape, str_dtype_to_np(trt_dtype_to_str(self._dtype)))
        return self._value

    @property
    def value(self) -> Tensor:
        """A constant of the network that is being defined."""
        return self.get_constant_tensor(default_net())

    @value.setter
    def value(self, value: Any) -> None:
        if tuple(value.shape) != self._shape:
            raise AssertionError(f"shape {tuple(value.shape)} for a weight of {self._shape}")
        if str_dtype_to_trt(_dtype_name(value)) != self._dtype:
            logger.warning(f"dtype {_dtype_name(value)} where {trt_dtype_to_str(self._dtype)} was")
            self._dtype = str_dtype_to_trt(_dtype_name(value))
        self._value = value

    def get_constant_tensor(self, network: Any) -> Tensor:
        values = None
        if self._value is not None and int(np.prod(self._shape)) <= _SMALL:
            flat = self._value.reshape(-1)
            values = [float(v) for v in flat]
        layer = network.trt_network.record(
            "weight", [], self._dtype, self._shape, network.parameter_name(self), values
        )
        return _create_tensor(layer.get_output(0), layer)
