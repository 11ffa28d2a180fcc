"""TensorRT-LLM checkpoints: a Hugging Face model as ``config.json`` and ``rank{N}.safetensors``.

Names, fused weights and splits are TensorRT-LLM's own (1.0 - 1.2), so that its model classes load them
with or without Razor; only the order of KV heads is ours.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.backends.base import Progress
from trt_razor.errors import RazorError
from trt_razor.files import write_text_atomic
from trt_razor.models.checkpoint import WeightSource
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import convert, numpy_dtype
from trt_razor.sharding import ceil_div, stages
from trt_razor.trtllm.model_config import spec_from_trtllm_config, trtllm_config
from trt_razor.trtllm.options import CONFIG, RazorSection, TrtLlmOptions
from trt_razor.trtllm.permute import PermutedCheckpoint, permuted_slopes
from trt_razor.trtllm.rank_files import RankFile, rank_path
from trt_razor.trtllm.rank_tensors import EMBEDDING, FINAL_NORM, HEAD, layer_name
from trt_razor.trtllm.ranks import RankLayout

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Part",
    "convert_checkpoint",
    "destinations",
    "rank_part",
    "spec_from_trtllm_config",
    "trtllm_config",
    "trtllm_name",
]

Array = npt.NDArray[Any]

_CHUNK = 16 << 20
"""Elements converted at a time: bounds the float32 copy."""


@dataclass(frozen=True)
class Part:
    """What a rank has of a weight of the model.

    Attributes:
        name: of the rank's tensor, which may be made of several weights (``attention.qkv``).
        shape: of the rank's tensor.
        row: of the rank's tensor where this part begins.
        rows, columns: of the weight, first and end; columns None = all, or no such axis.
    """

    name: str
    shape: tuple[int, ...]
    row: int
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None


_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm",
    "post_attention_layernorm": "post_layernorm",
    "mlp.gate_proj": "mlp.fc",  # the one that goes through the activation
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def trtllm_name(name: str, first_layer: int = 0) -> str:
    """TensorRT-LLM's name of a weight; layers are counted from the first of a pipeline stage."""
    if name == "model.embed_tokens.weight":
        return EMBEDDING
    if name == "model.norm.weight":
        return FINAL_NORM
    if name == HEAD:
        return name
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return layer_name(int(layer) - first_layer, f"{_LAYER_NAMES[module]}.{kind}")


def destinations(spec: ModelSpec, source: str, pp_size: int) -> list[tuple[int, str]]:
    """(pipeline stage, TensorRT-LLM name) of a weight. A tied embedding has two: it is written twice."""
    last = pp_size - 1
    if source == "model.embed_tokens.weight":
        tied = [(last, HEAD)] if spec.tie_embeddings else []
        return [(0, trtllm_name(source)), *tied]
    if not source.startswith("model.layers."):
        return [(last, trtllm_name(source))]
    layer = int(source.split(".")[2])
    for stage, (first, end) in enumerate(stages(spec.num_layers, pp_size)):
        if first <= layer < end:
            return [(stage, trtllm_name(source, first))]
    raise RazorError(f"{source}: expected a layer below {spec.num_layers}")


def rank_part(
    spec: ModelSpec, source: str, shape: tuple[int, ...], target: str, tp_size: int, tp_rank: int
) -> Part:
    """How a weight is split over tensor-parallel ranks.

    Columns of the two projections that write to the residual stream, rows of the other ones; the
    rest is whole on every rank: norms, the input embedding, and biases that are added after the sum
    over ranks. With fewer KV heads than ranks, neighbouring ranks hold the same one.

    Args:
        source: Hugging Face name. shape: of the weight.
        target: TensorRT-LLM name of the tensor that it becomes, or becomes a part of.
    """
    projection = source.split(".")[-2]
    if target == HEAD:  # as many rows on every rank; the last ones are filled up
        size = ceil_div(shape[0], tp_size)
        first = min(tp_rank * size, shape[0])
        return Part(target, (size, *shape[1:]), 0, (first, min(first + size, shape[0])))
    if projection in _QKV:
        query, kv = spec.num_heads // tp_size, max(1, spec.num_kv_heads // tp_size)
        counts, which = (query, kv, kv), _QKV.index(projection)
        first = tp_rank * query if which == 0 else tp_rank * spec.num_kv_heads // tp_size
        rows = first * spec.head_dim, (first + counts[which]) * spec.head_dim
        whole = sum(counts) * spec.head_dim, *shape[1:]
        return Part(target, whole, sum(counts[:which]) * spec.head_dim, rows)
    if projection in ("gate_proj", "up_proj"):
        size = shape[0] // tp_size
        return Part(target, (size, *shape[1:]), 0, (tp_rank * size, (tp_rank + 1) * size))
    if projection in ("o_proj", "down_proj") and len(shape) == 2:
        size = shape[1] // tp_size
        columns = tp_rank * size, (tp_rank + 1) * size
        return Part(target, (shape[0], size), 0, (0, shape[0]), columns)
    return Part(target, shape, 0, (0, shape[0]))


def convert_checkpoint(
    checkpoint: WeightSource,
    layout: RankLayout,
    dtype: str,
    options: TrtLlmOptions,
    section: RazorSection | None,
    directory: Path,
    progress: Progress,
) -> None:
    """Write ``rank{pp_rank * tp_size + tp_rank}.safetensors`` and, when all are whole, ``config.json``.

    Every weight is read once and held alone. An FP8 cache gets scales of 1; a Razor checkpoint with
    ALiBi the slopes of its heads, which TensorRT-LLM loads in place of those it computes.

    Args:
        layout: of the heads; ``ranks.dense_layout`` leaves them where they are.
        dtype: float16 or bfloat16.
        section: None = a dense engine.
        directory: an existing folder; what is left in it after an error is of no use.
        progress: stage ``convert`` in parameters of the model.

    Raises:
        UsageError: see ``trtllm_config``.
        RazorError: a weight that float16 cannot hold, or a layout of another model or other ranks.
    """
    spec, tp_size = checkpoint.spec, options.tp_size
    config = trtllm_config(spec, dtype, options, section)
    if layout.tp_size != tp_size:
        raise RazorError(f"head layout: expected {tp_size} ranks, found {layout.tp_size}")
    source = PermutedCheckpoint(checkpoint, layout)
    with ExitStack() as stack:
        files = []
        for rank in range(options.world_size):
            pp_rank, tp_rank = divmod(rank, tp_size)
            extra = _extra_tensors(spec, layout, options, section is not None, pp_rank, tp_rank)
            tensors = _rank_tensors(spec, dtype, options, pp_rank, tp_rank)
            tensors |= {name: (value.dtype.name, value.shape) for name, value in extra.items()}
            file = stack.enter_context(RankFile(rank_path(directory, rank), tensors))
            for name, value in extra.items():
                file.add(name, value)
            files.append(file)
        done, total = 0, spec.num_parameters()
        for name, shape in spec.tensors().items():
            value = source.tensor(name)
            for stage, target in destinations(spec, name, options.pp_size):
                here = files[stage * tp_size : (stage + 1) * tp_size]
                _share_out(spec, name, value, target, dtype, here)
            del value
            done += math.prod(shape)
            progress("convert", done, total)
    write_text_atomic(directory / CONFIG, json.dumps(config, indent=1) + "\n")


def _rank_tensors(
    spec: ModelSpec, dtype: str, options: TrtLlmOptions, pp_rank: int, tp_rank: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of a rank's weights."""
    parts = [
        rank_part(spec, source, shape, target, options.tp_size, tp_rank)
        for source, shape in spec.tensors().items()
        for stage, target in destinations(spec, source, options.pp_size)
        if stage == pp_rank
    ]
    return {part.name: (dtype, part.shape) for part in parts}


def _extra_tensors(
    spec: ModelSpec,
    layout: RankLayout,
    options: TrtLlmOptions,
    razor: bool,
    pp_rank: int,
    tp_rank: int,
) -> dict[str, Array]:
    """A rank's float32 tensors that are no weights of the model."""
    out: dict[str, Array] = {}
    first, end = stages(spec.num_layers, options.pp_size)[pp_rank]
    heads = spec.num_heads // options.tp_size
    for layer in range(first, end):
        prefix = f"transformer.layers.{layer - first}.attention."
        if options.fp8:
            out[prefix + "kv_cache_scaling_factor"] = np.ones(1, np.float32)
        if razor and spec.position == "alibi":
            slopes = permuted_slopes(spec, layout.order[layer])
            mine = slopes[tp_rank * heads : (tp_rank + 1) * heads]
            out[prefix + "alibi_slopes"] = mine.reshape(1, heads, 1, 1)
    return out


def _share_out(
    spec: ModelSpec, source: str, value: Array, target: str, dtype: str, files: list[RankFile]
) -> None:
    """Write a weight to the ranks of a stage; what several of them hold is converted once."""
    shares: dict[Part, list[RankFile]] = {}
    for tp_rank, file in enumerate(files):
        part = rank_part(spec, source, value.shape, target, len(files), tp_rank)
        shares.setdefault(part, []).append(file)
    for part, holders in shares.items():
        first, end = part.rows
        columns = slice(None) if part.columns is None else slice(*part.columns)
        step = max(1, _CHUNK // math.prod(value.shape[1:]))
        for row in range(first, end, step):
            block = value[row : min(row + step, end)]
            block = block[:, columns] if block.ndim == 2 else block
            block = convert(block, dtype, source, wider="bfloat16")
            for file in holders:
                file.add(part.name, block, part.row + row - first)
        missing = part.shape[0] - (end - first)
        if target == HEAD and missing:
            fill = np.zeros((missing, *part.shape[1:]), numpy_dtype(dtype))
            for file in holders:
                file.add(part.name, fill, end - first)
