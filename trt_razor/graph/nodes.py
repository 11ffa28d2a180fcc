"""A small writer of ONNX nodes: names, shared constants, and the arithmetic we use a lot."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10  # the first with function overloads

MASKED = -1e30
"""Added to the logit of a row that must not be seen; finite, so that no arithmetic makes NaN."""

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Nodes:
    """Collects nodes in order. Methods return the name of the value they make.

    Every node gets a name that starts with ``prefix``, so that builders which inline functions
    see no duplicates.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.list: list[onnx.NodeProto] = []
        self._count = 0
        self._constants: dict[tuple[Any, ...], str] = {}

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{self.prefix}{hint}_{self._count}"

    def op(
        self, op_type: str, *inputs: str, out: str | None = None, domain: str = "", **attrs: Any
    ) -> str:
        """One node with one output."""
        name = self.fresh(op_type)
        result = out or name
        self.list.append(
            helper.make_node(op_type, list(inputs), [result], name=name, domain=domain, **attrs)
        )
        return result

    def multi(self, op_type: str, inputs: list[str], count: int, **attrs: Any) -> list[str]:
        """One node with several outputs."""
        name = self.fresh(op_type)
        outs = [f"{name}_{i}" for i in range(count)]
        self.list.append(helper.make_node(op_type, inputs, outs, name=name, **attrs))
        return outs

    def split(self, x: str, sizes: list[int], axis: int) -> list[str]:
        name = self.fresh("Split")
        outs = [f"{name}_{i}" for i in range(len(sizes))]
        self.list.append(
            helper.make_node("Split", [x, self.i64s(sizes)], outs, name=name, axis=axis)
        )
        return outs

    # Constants --------------------------------------------------------------------------------
    def const(self, value: np.ndarray) -> str:
        """A constant tensor; equal constants are shared."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = self.fresh("Constant")
            self.list.append(
                helper.make_node(
                    "Constant", [], [name], name=name, value=numpy_helper.from_array(value, name)
                )
            )
            self._constants[key] = name
        return self._constants[key]

    def i64s(self, values: list[int] | tuple[int, ...]) -> str:
        """1-D int64 constant."""
        return self.const(np.asarray(values, np.int64))

    def i64(self, value: int) -> str:
        """0-D int64 constant."""
        return self.const(np.asarray(value, np.int64))

    def f32(self, value: float) -> str:
        """0-D float32 constant."""
        return self.const(np.asarray(value, np.float32))

    # Short forms ------------------------------------------------------------------------------
    def add(self, a: str, b: str) -> str:
        return self.op("Add", a, b)

    def sub(self, a: str, b: str) -> str:
        return self.op("Sub", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.op("Mul", a, b)

    def div(self, a: str, b: str) -> str:
        return self.op("Div", a, b)

    def cast(self, x: str, dtype: str) -> str:
        return self.op("Cast", x, to=DTYPES[dtype])

    def dim(self, x: str, axis: int) -> str:
        """1-D int64 tensor with the size of one axis."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def scalar(self, x: str) -> str:
        """[1] → 0-D."""
        return self.op("Squeeze", x, self.i64s([0]))

    def arange(self, length: str) -> str:
        """int64 [length], ``length`` being a [1] tensor."""
        return self.op("Range", self.i64(0), self.scalar(length), self.i64(1))

    def concat(self, *xs: str, axis: int, out: str | None = None) -> str:
        if len(xs) == 1 and out is None:
            return xs[0]
        return self.op("Concat", *xs, axis=axis, out=out)

    def shape_of(self, *parts: str | int) -> str:
        """A shape tensor from constants and [1] tensors, neighbouring constants joined."""
        pieces: list[str] = []
        run: list[int] = []
        for part in parts:
            if isinstance(part, str):
                if run:
                    pieces.append(self.i64s(run))
                    run = []
                pieces.append(part)
            else:
                run.append(part)
        if run:
            pieces.append(self.i64s(run))
        return self.concat(*pieces, axis=0)

    def reshape(self, x: str, *parts: str | int, out: str | None = None) -> str:
        return self.op("Reshape", x, self.shape_of(*parts), out=out)

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self.op("Unsqueeze", x, self.i64s(list(axes)))

    def slice(self, x: str, start: str, end: str, axis: int) -> str:
        """x[start:end] along ``axis``; ``start`` and ``end`` are [1] tensors."""
        return self.op("Slice", x, start, end, self.i64s([axis]))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def transposed_matmul(self, a: str, b: str, rank: int) -> str:
        """a · bᵀ over the last two of ``rank`` axes."""
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return self.op("MatMul", a, self.transpose(b, *perm))

    def sum(self, x: str, axis: int, keepdims: int = 0) -> str:
        return self.op("ReduceSum", x, self.i64s([axis]), keepdims=keepdims)

    def topk(self, x: str, k: int, largest: int = 1) -> tuple[str, str]:
        """The k highest or lowest of the last axis in order, ties to the lower index: values, indices."""
        values, indices = self.multi("TopK", [x, self.i64s([k])], 2, axis=-1, largest=largest)
        return values, indices

    def mod(self, a: str, divisor: str) -> str:
        """a mod divisor for a >= 0 (integer division exists everywhere; Mod does not)."""
        return self.sub(a, self.mul(self.div(a, divisor), divisor))

    def select(self, cond: str, a: str, b: str) -> str:
        """Where for booleans, which ONNX Runtime's Where does not take."""
        return self.op("Or", self.op("And", cond, a), self.op("And", self.op("Not", cond), b))
