"""Symbolic tensors and the operations that network definitions use.

Read (1.1 - 1.2 age): signature of Tensor, rules of ``dim_range``, the enumerations, ``cast``,
AllReduceParams; ``gpt_attention`` and what belongs to positions have files of their own here
(attention_plugin.py, positions.py). Signatures of the small tensor operations (split, concat, view,
shape, ...) are inferred from the public API documentation. Networks are strongly typed:
operands of different dtypes are refused.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import tensorrt as trt
from tensorrt.errors import require

from ._common import default_net, default_trtnet, keep
from ._release import RELEASE
from ._utils import to_trt_dtype
from .positions import (
    AttentionMaskType,
    PositionEmbeddingType,
    RopeEmbeddingUtils,
    RotaryScalingType,
    generate_alibi_slopes,
)


class LayerNormType(enum.IntEnum):
    LayerNorm = 0
    RmsNorm = 1
    GroupNorm = 2


class AllReduceStrategy(enum.IntEnum):
    NCCL = 0
    AUTO = 3


class AllReduceFusionOp(enum.IntEnum):
    NONE = 0
    RESIDUAL_RMS_NORM = 1


class AllReduceParams:
    def __init__(
        self,
        strategy: AllReduceStrategy = AllReduceStrategy.AUTO,
        fusion_op: AllReduceFusionOp = AllReduceFusionOp.NONE,
        bias: Any = None,
        residual: Any = None,
        norm_weight: Any = None,
        scale: Any = None,
        norm_pre_residual_weight: Any = None,
        eps: float = 1e-06,
        enable_allreduce: bool = True,
    ) -> None:
        keep(self, locals())


class Tensor:
    """A symbolic tensor. With a ``name`` and ``is_network_input`` an input of the current network."""

    def __init__(
        self,
        name: str | None = None,
        dtype: Any = None,
        shape: Sequence[int] | None = None,
        dim_range: Any = None,
        is_network_input: bool = True,
        location: trt.TensorLocation = trt.TensorLocation.DEVICE,
        network: Any = None,
        trt_tensor: Any = None,
    ) -> None:
        if RELEASE < (1, 1) and isinstance(dtype, str):
            raise AssertionError(
                f"{name}: dtype {dtype!r} is no trt.DataType (names: 1.1 and newer)"
            )
        self.dim_range = dim_range
        self.trt_tensor = trt_tensor
        if trt_tensor is None and is_network_input:
            network = default_net() if network is None else network
            network._add_input(self, name, to_trt_dtype(dtype), list(shape or []), dim_range)
            self.trt_tensor.location = location

    @property
    def name(self) -> str:
        return str(self.trt_tensor.name)

    @property
    def dtype(self) -> trt.DataType:
        return self.trt_tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.trt_tensor.shape)

    @property
    def location(self) -> trt.TensorLocation:
        return self.trt_tensor.location

    def ndim(self) -> int:
        return len(self.shape)

    def rank(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def mark_output(self, name: str | None = None, dtype: Any = None) -> None:
        default_net()._mark_output(self, name or self.name, dtype and to_trt_dtype(dtype))

    def cast(self, dtype: Any) -> Tensor:
        return cast(self, dtype)

    def view(self, shape: Any, zero_is_placeholder: bool = True) -> Tensor:
        return view(self, shape, zero_is_placeholder)

    def split(self, split_size_or_sections: Any, dim: int = 0) -> Any:
        return split(self, split_size_or_sections, dim)

    def __add__(self, other: Any) -> Tensor:
        return _elementwise("add", self, other)

    def __mul__(self, other: Any) -> Tensor:
        return _elementwise("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__


def _create_tensor(trt_tensor: Any, producer: Any) -> Tensor:
    """The output of a layer that was just added; the layer gets its name."""
    require(isinstance(trt_tensor, trt.ITensor), f"_create_tensor: {trt_tensor!r}")
    require(isinstance(producer, trt.Layer), f"_create_tensor: producer {producer!r}")
    default_net()._set_layer_name(producer)
    return Tensor(is_network_input=False, trt_tensor=trt_tensor)


def record(
    what: str,
    inputs: Sequence[Tensor],
    shape: Sequence[int],
    dtype: Any = None,
    origin: str | None = None,
    values: list[Any] | None = None,
) -> Tensor:
    tensors = [t.trt_tensor for t in inputs]
    dtype = inputs[0].dtype if dtype is None else dtype
    layer = default_trtnet().record(what, tensors, dtype, shape, origin, values)
    return _create_tensor(layer.get_output(0), layer)


def cast(input: Tensor, dtype: Any) -> Tensor:
    dtype = to_trt_dtype(dtype)
    if input.dtype == dtype:
        return input
    return record("cast", [input], input.shape, dtype, *_same_data(input))


def _same_data(input: Tensor) -> tuple[str, list[Any] | None]:
    return input.trt_tensor.origin, input.trt_tensor.values


def _shape_values(shape: Any) -> list[int]:
    """Sizes given as numbers, as tensors with one number each, or as a shape tensor."""
    if isinstance(shape, Tensor):
        require(shape.trt_tensor.values is not None, "a shape must be made of sizes")
        return [int(v) for v in shape.trt_tensor.values]
    return [_shape_values(s)[0] if isinstance(s, Tensor) else int(s) for s in shape]


def view(input: Tensor, shape: Any, zero_is_placeholder: bool = True) -> Tensor:
    """-1: one dimension worked out (TensorRT takes one), or a size known at run time only."""
    sizes = _shape_values(shape)
    if zero_is_placeholder:
        sizes = [input.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    old, new = [math.prod(d for d in s if d != -1) for s in (input.shape, sizes)]
    if -1 not in input.shape:
        if -1 in sizes:
            require(
                sizes.count(-1) == 1 and new and old % new == 0, f"view {input.shape} as {sizes}"
            )
            sizes[sizes.index(-1)], new = old // new, old
        require(old == new, f"view {input.shape} as {sizes}")
    else:
        if isinstance(shape, list | tuple) and all(isinstance(s, int) for s in shape):
            require(list(shape).count(-1) <= 1, f"view: two unknown sizes in {shape}")
        require(
            -1 in sizes and (old % new == 0 or new % old == 0), f"view {input.shape} as {sizes}"
        )
        if input.shape.count(-1) == 1 and input.shape[0] == -1 and sizes[0] == -1:
            require(old == new, f"view {input.shape} as {sizes}: rows would change")
    return record("view", [input], sizes, None, *_same_data(input))


def shape(
    input: Tensor, dim: int | None = None, cast_to_dtype: Any = None, clip_before_cast: Any = None
) -> Tensor:
    sizes = list(input.shape) if dim is None else [input.shape[dim]]
    out_shape = [len(sizes)] if dim is None else []
    return record("shape", [input], out_shape, cast_to_dtype or trt.int64, values=sizes)


def concat(inputs: Sequence[Any], dim: int = 0) -> Tensor:
    """Tensors, or sizes (numbers and tensors of one number) to a shape tensor."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if len(tensors) < len(inputs) or all(t.ndim() == 0 for t in tensors):
        sizes = _shape_values(list(inputs))
        return record("concat", tensors, [len(sizes)], trt.int64, values=sizes)
    first = tensors[0]
    axis = dim % first.ndim()
    for t in tensors:
        require(t.dtype == first.dtype, f"concat: {t.dtype.name} and {first.dtype.name}")
        rest = [s for i, s in enumerate(t.shape) if i != axis]
        require(
            rest == [s for i, s in enumerate(first.shape) if i != axis],
            f"concat in dimension {dim}: {t.shape} and {first.shape}",
        )
    lengths = [t.shape[axis] for t in tensors]
    out = list(first.shape)
    out[axis] = -1 if -1 in lengths else sum(lengths)
    values = None
    if first.ndim() == 1 and all(t.trt_tensor.values is not None for t in tensors):
        values = [v for t in tensors for v in t.trt_tensor.values]
    return record("concat", tensors, out, values=values)


def split(tensor: Tensor, split_size_or_sections: Any, dim: int = 0) -> list[Tensor]:
    axis = dim % tensor.ndim()
    whole = tensor.shape[axis]
    require(whole != -1, "split: only dimensions known when the network is defined")
    sections = split_size_or_sections
    if isinstance(sections, int):
        require(whole % sections == 0, f"split {whole} by {sections}")
        sections = [sections] * (whole // sections)
    require(sum(sections) == whole, f"split {tensor.shape} in dimension {dim} into {sections}")
    out = []
    for size in sections:
        new = list(tensor.shape)
        new[axis] = size
        out.append(record("slice", [tensor], new))
    return out


def _elementwise(what: str, left: Any, right: Any) -> Tensor:
    tensors = [t for t in (left, right) if isinstance(t, Tensor)]
    if len(tensors) == 1:  # a Python number becomes a constant of the same dtype
        return record(what, tensors, tensors[0].shape)
    require(left.dtype == right.dtype, f"{what}: {left.dtype.name} and {right.dtype.name}")
    n = max(left.ndim(), right.ndim())
    shapes = [(1,) * (n - t.ndim()) + t.shape for t in (left, right)]
    out = []
    for a, b in zip(*shapes, strict=True):
        require(a == b or 1 in (a, b) or -1 in (a, b), f"{what}: {left.shape} and {right.shape}")
        out.append(b if a == 1 else a if b in (1, -1) else b)
    return record(what, tensors, out)


def clip(input: Tensor, alpha: float, beta: float) -> Tensor:
    require(alpha <= beta, f"clip: {alpha} .. {beta}")
    return record("clip", [input], input.shape)


def silu(input: Tensor) -> Tensor:
    return record("silu", [input], input.shape)


ACT2FN = {"silu": silu, "swiglu": silu}


def matmul(
    input: Tensor,
    mat2: Tensor,
    transa: bool = False,
    transb: bool = False,
    use_fp32_acc: bool = True,
) -> Tensor:
    a = input.shape[::-1] if transa else input.shape
    b = mat2.shape[::-1] if transb else mat2.shape
    require(a[-1] == b[-2], f"matmul: {a} by {b}")
    require(input.dtype == mat2.dtype, f"matmul: {input.dtype.name} by {mat2.dtype.name}")
    return record("matmul", [input, mat2], (*a[:-1], b[-1]))


def _normalised(what: str, input: Tensor, shape: Any, operands: Sequence[Any]) -> Tensor:
    shape = [shape] if isinstance(shape, int) else list(shape)
    require(list(input.shape[-len(shape) :]) == shape, f"{what}: {input.shape} over {shape}")
    tensors = [t for t in operands if isinstance(t, Tensor)]
    for t in tensors:
        require(list(t.shape) == shape and t.dtype == input.dtype, f"{what}: weight {t.shape}")
    return record(what, [input, *tensors], input.shape)


def rms_norm(
    input: Tensor,
    normalized_shape: Any,
    num_groups: int = 1,
    weight: Any = None,
    eps: float = 1e-06,
) -> Tensor:
    return _normalised(f"rms_norm eps={eps}", input, normalized_shape, [weight])


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-05,
    use_diff_of_squares: bool = True,
) -> Tensor:
    return _normalised(f"layer_norm eps={eps}", input, normalized_shape, [weight, bias])


def embedding(input: Tensor, weight: Tensor, tp_size: int = 1, **kwargs: Any) -> Tensor:
    require(input.dtype == trt.int32 and input.ndim() == 1, "embedding: packed int32 ids")
    return record("embedding", [input, weight], (input.shape[0], weight.shape[1]), weight.dtype)


def gather_last_token_logits(
    hidden_states: Tensor, last_token_ids: Tensor, remove_input_padding: bool
) -> Tensor:
    require(remove_input_padding, "the double knows packed input only")
    shape = (last_token_ids.shape[0], hidden_states.shape[-1])
    return record("gather", [hidden_states, last_token_ids], shape)


def allreduce(
    tensor: Tensor, group: list[int], all_reduce_params: AllReduceParams | None = None
) -> Tensor:
    require(
        all_reduce_params is None or isinstance(all_reduce_params, AllReduceParams), "allreduce"
    )
    fused = all_reduce_params and all_reduce_params.fusion_op is not AllReduceFusionOp.NONE
    require(not fused, "allreduce: fusions are not doubled")
    return record("allreduce", [tensor], tensor.shape)


def allgather(tensor: Tensor, group: list[int], gather_dim: int = 0) -> Tensor:
    out = list(tensor.shape)
    if out[gather_dim] != -1:
        out[gather_dim] *= len(group)
    return record("allgather", [tensor], out)


def send(tensor: Tensor, tgt: int) -> Tensor:
    return record(f"send to {tgt}", [tensor], tensor.shape)


def recv(tensor: Tensor, src: int) -> Tensor:
    return record(f"recv from {src}", [tensor], tensor.shape)


from .attention_plugin import gpt_attention  # noqa: E402

__all__ = [
    "ACT2FN",
    "AllReduceFusionOp",
    "AllReduceParams",
    "AllReduceStrategy",
    "AttentionMaskType",
    "LayerNormType",
    "PositionEmbeddingType",
    "RopeEmbeddingUtils",
    "RotaryScalingType",
    "Tensor",
    "allgather",
    "allreduce",
    "cast",
    "clip",
    "concat",
    "embedding",
    "gather_last_token_logits",
    "generate_alibi_slopes",
    "gpt_attention",
    "layer_norm",
    "matmul",
    "recv",
    "rms_norm",
    "send",
    "shape",
    "silu",
    "split",
    "view",
]
