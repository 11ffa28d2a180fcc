"""Weights of a graph as ONNX external data, written one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import helper, numpy_helper

from trt_razor.graph.nodes import DTYPES

PAGE = 4096
"""External tensors start on pages, so that executors can map the file instead of reading it."""
INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file: shape inference and constant folding see them."""


class WeightFile:
    """Writes initialisers to one file as they come; holds at most one tensor at a time.

    Args:
        path: the file to create; its name is what the graph refers to.
        progress: called with the bytes of each tensor once written.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None) -> None:
        self.path = path
        self.initializers: list[onnx.TensorProto] = []
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._offset = 0
        self._progress = progress

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, name: str, value: np.ndarray) -> str:
        """Append one tensor and return its name."""
        value = np.ascontiguousarray(value)
        if value.nbytes <= INLINE_BYTES and value.dtype.name != "bfloat16":
            self.initializers.append(numpy_helper.from_array(value, name))
            return name
        pad = -self._offset % PAGE
        self._file.write(b"\0" * pad)
        self._offset += pad
        self._file.write(value.reshape(-1).view(np.uint8).data)
        tensor = onnx.TensorProto(
            name=name,
            dims=value.shape,
            data_type=DTYPES.get(value.dtype.name) or helper.np_dtype_to_tensor_dtype(value.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, item in (
            ("location", self.path.name),
            ("offset", str(self._offset)),
            ("length", str(value.nbytes)),
        ):
            tensor.external_data.add(key=key, value=item)
        self.initializers.append(tensor)
        self._offset += value.nbytes
        if self._progress is not None:
            self._progress(value.nbytes)
        return name
