"""Tensors of a TensorRT-LLM checkpoint: names, shapes as stored, and what a rank holds of each.

Covers unquantised weights and the two quantised formats whose files are not interleaved, so that heads
can still be moved in them (TensorRT-LLM 1.0 - 1.2):

* FP8: a byte for each weight [out, in]; one scale for the weights and one for the activations of a
  linear layer, which no order of heads touches.
* W4A16_AWQ as NVIDIA's quantisation tool writes it: byte row j of [out / 2, in] holds row 2j of the
  weights in its low half and row 2j + 1 in its high half; ``weights_scaling_factor``
  [out, in / group]; ``prequant_scaling_factor`` [in] multiplies the input.

TensorRT-LLM interleaves AWQ weights for the GPU while it builds, after reading these files.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec
from trt_razor.sharding import ceil_div
from trt_razor.trtllm.ranks import query_heads

Index = npt.NDArray[np.int64]

LAYER = "transformer.layers."
EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
HEAD = "lm_head.weight"
TABLES = ("embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention")
"""RoPE tables that TensorRT-LLM's converter leaves in the files, and computes where they are missing."""
FLOATS = frozenset({"F32", "F16", "BF16"})


class Format(enum.Enum):
    """How the weights of a linear layer are stored: the safetensors dtypes they may have."""

    PLAIN = FLOATS
    FP8 = frozenset({"F8_E4M3", "I8", "U8"})
    AWQ = frozenset({"I8", "U8"})


class Share(enum.Enum):
    """How the ranks share out an axis."""

    WHOLE = "every rank has all of it"
    EVEN = "in equal parts"
    VOCAB = "in equal parts, the last ones padded with zeros"
    QKV = "a rank's query heads, then its key heads, then its value heads"
    HEADS = "a rank's query heads"


@dataclass(frozen=True)
class Rule:
    """A tensor and how ranks share it out.

    Attributes:
        shape: of the whole model's tensor, as stored: query heads, key heads, value heads.
        axis: the one that is shared out.
        unit: elements of the model that one entry of that axis stands for: 2 for bytes of two rows,
            the group size for scales of groups.
        dtypes: safetensors dtypes it may have.
        optional: files without it are fine.
    """

    shape: tuple[int, ...]
    share: Share = Share.WHOLE
    axis: int = 0
    unit: int = 1
    dtypes: frozenset[str] = FLOATS
    optional: bool = False


def layer_name(layer: int, name: str) -> str:
    return f"{LAYER}{layer}.{name}"


def tensor_rules(
    spec: ModelSpec, format_of: Callable[[str], Format], group_size: int, prequant: bool
) -> dict[str, Rule]:
    """Every tensor of a checkpoint by name, layers numbered over the whole model.

    Without the scale of FP8 caches, which depends on options, and without tables.

    Args:
        format_of: of a linear layer by its name, ``transformer.layers.3.mlp.fc``.
        group_size: inputs that share an AWQ scale. prequant: whether AWQ scales the inputs, too.

    Raises:
        UsageError: sizes that the format cannot store.
    """
    h, f, attention = spec.hidden_size, spec.intermediate_size, spec.q_size
    qkv = attention + 2 * spec.kv_size
    rules = {EMBEDDING: Rule((spec.vocab_size, h))}

    def linear(name: str, out: int, inputs: int, share: Share, rows: bool, bias: bool) -> None:
        stored = format_of(name)
        if stored is Format.AWQ and (out % 2 or inputs % group_size):
            raise UsageError(
                f"{name}: {out} outputs and {inputs} inputs do not come in pairs and in groups of "
                f"{group_size}, as W4A16_AWQ has them; quantise with another group size, or to FP8"
            )
        tensors = _linear(out, inputs, share, rows, bias, stored, group_size, prequant)
        rules.update({f"{name}.{leaf}": rule for leaf, rule in tensors.items()})

    for i in range(spec.num_layers):
        p = layer_name(i, "")
        rules[p + "input_layernorm.weight"] = Rule((h,))
        linear(p + "attention.qkv", qkv, h, Share.QKV, True, spec.qkv_bias)
        linear(p + "attention.dense", h, attention, Share.HEADS, False, spec.o_bias)
        if spec.qk_norm:
            rules[p + "attention.q_layernorm.weight"] = Rule((spec.head_dim,))
            rules[p + "attention.k_layernorm.weight"] = Rule((spec.head_dim,))
        if spec.position == "alibi":
            rules[slopes_name(i)] = slopes_rule(spec)
        rules[p + "post_layernorm.weight"] = Rule((h,))
        linear(p + "mlp.fc", f, h, Share.EVEN, True, spec.mlp_bias)
        linear(p + "mlp.gate", f, h, Share.EVEN, True, spec.mlp_bias)
        linear(p + "mlp.proj", h, f, Share.EVEN, False, spec.mlp_bias)
    rules[FINAL_NORM] = Rule((h,))
    linear("lm_head", spec.vocab_size, h, Share.VOCAB, True, False)
    return rules


def slopes_name(layer: int) -> str:
    return layer_name(layer, "attention.alibi_slopes")


def slopes_rule(spec: ModelSpec) -> Rule:
    return Rule((1, spec.num_heads, 1, 1), Share.HEADS, 1, spec.head_dim, optional=True)


def _linear(
    out: int,
    inputs: int,
    share: Share,
    rows: bool,
    bias: bool,
    stored: Format,
    group: int,
    prequant: bool,
) -> dict[str, Rule]:
    """Tensors of a linear layer whose outputs (``rows``) or inputs the ranks share out."""
    axis, dtypes = (0 if rows else 1), stored.value
    rules = {"weight": Rule((out, inputs), share, axis, dtypes=dtypes)}
    if bias:
        rules["bias"] = Rule((out,), share) if rows else Rule((out,))
    if stored is Format.FP8:
        rules["weights_scaling_factor"] = rules["activation_scaling_factor"] = Rule((1,))
    elif stored is Format.AWQ:
        rules["weight"] = Rule((out // 2, inputs), share, axis, 2 if rows else 1, dtypes)
        unit = 1 if rows else group
        rules["weights_scaling_factor"] = Rule((out, inputs // group), share, axis, unit)
        if prequant:
            rules["prequant_scaling_factor"] = Rule((inputs,)) if rows else Rule((inputs,), share)
    return rules


# What a rank holds ------------------------------------------------------------------------------
def held(
    name: str, rule: Rule, spec: ModelSpec, tp_size: int, rank: int, order: tuple[int, ...]
) -> Index:
    """Entries of the whole tensor's axis that a rank holds, in its order.

    Args:
        order: all KV heads of the layer, new to old.

    Raises:
        UsageError: the axis cannot be shared out so, or two heads share an entry that would have to
            be taken apart.
    """
    size = rule.shape[rule.axis] * rule.unit
    if rule.share is Share.WHOLE:
        return np.arange(rule.shape[rule.axis])
    if rule.share is Share.EVEN:
        if size % tp_size:
            raise UsageError(f"{name}: {size} elements do not divide by tp_size {tp_size}")
        elements = np.arange(rank * size // tp_size, (rank + 1) * size // tp_size)
    elif rule.share is Share.VOCAB:
        part = ceil_div(size, tp_size)
        elements = np.arange(min(rank * part, size), min((rank + 1) * part, size))
    else:
        elements = _head_elements(rule.share, spec, tp_size, rank, order)
    return _entries(name, elements, rule.unit)


def padded_part(rule: Rule, tp_size: int) -> int:
    """Entries that a rank has of an axis of ``Share.VOCAB``, padding included."""
    return ceil_div(rule.shape[rule.axis] * rule.unit, tp_size) // rule.unit


def _head_elements(
    share: Share, spec: ModelSpec, tp_size: int, rank: int, order: tuple[int, ...]
) -> Index:
    queries = query_heads(order, spec.group)
    per_rank = spec.num_heads // tp_size
    mine = queries[rank * per_rank : (rank + 1) * per_rank]
    if share is Share.HEADS:
        return _rows(mine, spec.head_dim)
    # With more ranks than KV heads, neighbours hold the same one.
    first = rank * spec.num_kv_heads // tp_size
    keys = list(order[first : first + max(1, spec.num_kv_heads // tp_size)])
    heads = [*mine]
    heads += [spec.num_heads + k for k in keys]
    heads += [spec.num_heads + spec.num_kv_heads + k for k in keys]
    return _rows(heads, spec.head_dim)


def _rows(heads: list[int], head_dim: int) -> Index:
    return (np.array(heads)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def _entries(name: str, elements: Index, unit: int) -> Index:
    """Elements of an axis as entries of ``unit`` of them each, if that comes out even."""
    if unit == 1:
        return elements
    if len(elements) % unit == 0:
        groups = elements.reshape(-1, unit)
        first = groups[:, 0]
        if not (first % unit).any() and (groups == first[:, None] + np.arange(unit)).all():
            return first // unit
    what = "two rows share a byte" if unit == 2 else f"{unit} inputs share a scale"
    raise UsageError(
        f"{name}: {what}, and not all of them would go to the same place; use fewer ranks, or "
        "quantise with a group size that divides the head size and each rank's part (Model Optimizer: "
        "awq_block_size), or to FP8"
    )
