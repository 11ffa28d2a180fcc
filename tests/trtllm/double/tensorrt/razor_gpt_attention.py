"""What RazorGptAttention takes, PARSED from the tables of its README, so that both cannot drift apart.

``doubles.make`` puts a copy of plugins/tensorrt/razor_gpt_attention/README.md beside this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ContractError, require
from .types import DataType, PluginFieldType

_DTYPES = {
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "float32": DataType.FLOAT,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
}
_FIELD_TYPES = {
    False: {PluginFieldType.INT32: np.int32, PluginFieldType.INT64: np.int64},
    True: {PluginFieldType.FLOAT32: np.float32},
}
_SOURCES = {
    # Inputs that are weights of TensorRT-LLM's model: the ends of their names there.
    "kv_orig_quant_scale": "kv_cache_rcp_scaling_factor",
    "kv_quant_orig_scale": "kv_cache_scaling_factor",
    "rotary_inv_freq": "rotary_inv_freq",
    "rotary_cos_sin": "embed_positions_for_gpt_attention",
    "alibi_slopes": "alibi_slopes",
}
_STATE = ("conv_state_ptr", "rnn_state_ptr")
"""The engine has one of each per layer, with the layer's number behind."""


@dataclass(frozen=True)
class Input:
    """A row of the table of inputs; ``dims`` None where it says no shape."""

    name: str
    dtypes: tuple[DataType, ...]
    dims: tuple[str, ...] | None
    condition: str


@dataclass(frozen=True)
class Field:
    name: str
    is_float: bool
    range: str


@dataclass(frozen=True)
class Table:
    inputs: tuple[Input, ...]
    fields: dict[str, Field]
    positions: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Table:
        text = path.read_text(encoding="utf-8")
        fields: dict[str, Field] = {}
        positions: tuple[str, ...] = ()
        for names, limits, comment in _rows(text, "Fields"):
            for name in _quoted(names):
                fields[name] = Field(name, "(float)" in names, limits)
                if name == "position":
                    positions = tuple(re.sub(r"\([^)]*\)", "", comment).split(", "))
        require(len(fields) > 10 and len(positions) == 4, f"{path}: its tables are not understood")
        return cls(tuple(_inputs(text)), fields, positions)

    def check_fields(self, collection: Any) -> dict[str, int | float]:
        """Names, type and length of fields, ranges; their values by name."""
        names = [field.name for field in collection]
        require(len(set(names)) == len(names), f"RazorGptAttention: a field twice in {names}")
        missing, extra = set(self.fields) - set(names), set(names) - set(self.fields)
        require(not missing and not extra, f"fields missing: {missing}, unknown: {extra}")
        values: dict[str, int | float] = {}
        for field in collection:
            types = _FIELD_TYPES[self.fields[field.name].is_float]
            require(field.type in types, f"field {field.name}: {field.type.name}")
            require(field.size == 1, f"field {field.name}: {field.size} elements")
            values[field.name] = field.data.reshape(-1)[0].item()
        for name, value in values.items():
            limits = self.fields[name].range
            require(_in_range(value, limits, values), f"field {name}: {value}, not {limits}")
        _check_layers(values)
        return values

    def expected(self, fields: dict[str, int | float]) -> list[Input]:
        """The inputs that a plugin with these fields has, in order."""
        return [row for row in self.inputs if self._holds(row.condition, fields)]

    def check_inputs(self, fields: dict[str, int | float], tensors: list[Any]) -> None:
        expected = self.expected(fields)
        found = [tensor.origin for tensor in tensors]
        names = [row.name for row in expected]
        require(len(found) == len(names), f"inputs: expected {names}, found {found}")
        numbers = {
            "Hq": fields["num_heads"],
            "Hkv": fields["num_kv_heads"],
            "D": fields["head_dim"],
        }
        sizes: dict[str, int] = {}
        for i, (row, tensor) in enumerate(zip(expected, tensors, strict=True)):
            where = f"input {i}, {row.name}"
            require(_comes_from(row.name, tensor), f"{where}: found {tensor.origin!r} in {found}")
            require(tensor.dtype in row.dtypes, f"{where}: dtype {tensor.dtype.name}")
            if row.dims is None:
                continue
            require(
                len(tensor.shape) == len(row.dims), f"{where}: shape {tensor.shape}, not {row.dims}"
            )
            for dim, size in zip(row.dims, tensor.shape, strict=True):
                wanted = _evaluate(dim, numbers)
                if wanted is None and size != -1:
                    wanted = sizes.setdefault(dim, size)
                require(wanted in (None, size), f"{where}: shape {tensor.shape}: {dim} is {wanted}")
        ends = {t.origin.rsplit("_", 1)[-1] for t in tensors if t.origin.startswith(_STATE)}
        require(len(ends) <= 1, f"states of different layers: {found[-2:]}")

    def _holds(self, condition: str, fields: dict[str, int | float]) -> bool:
        if not condition:
            return True
        if condition.startswith("with "):
            kind = condition.removeprefix("with ")
            return self.positions[int(fields["position"]) - 1].startswith(kind)
        match = re.fullmatch(r"if `(\w+)`(?: = (\d+))?", condition)
        if match is None:
            raise ContractError(f"README: condition {condition!r} is not understood")
        value = fields[match[1]]
        return value == int(match[2]) if match[2] else bool(value)


def _rows(text: str, section: str) -> list[list[str]]:
    """Cells of the first table of a section, without its head."""
    body = re.split(r"^## ", text, flags=re.M)
    part = next(p for p in body if p.startswith(section + "\n"))
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _inputs(text: str) -> list[Input]:
    rows: list[Input] = []
    for names, shape, _ in _rows(text, "Inputs"):
        condition = re.search(r"(with \w+|if `\w+`(?: = \d+)?)", shape)
        dims = re.search(r"\[(.*?)\]", shape)
        dtypes = tuple(
            _DTYPES[d] for d in re.findall(r"\b(bfloat16|float16|float32|int64)\b", shape)
        )
        sizes = tuple(d.strip() for d in dims[1].split(",")) if dims else None
        if shape.startswith("the same"):
            sizes, dtypes = rows[-1].dims, rows[-1].dtypes
        for name in _quoted(names):
            text_of = condition[1] if condition else ""
            rows.append(Input(name, dtypes or (DataType.INT32,), sizes, text_of))
    return rows


def _evaluate(dim: str, numbers: dict[str, Any]) -> int | None:
    """Size of a dimension such as ``(Hq + 2 Hkv) D``; None if it is not made of known numbers."""
    words = set(re.findall(r"[A-Za-z]\w*", dim))
    if not words <= set(numbers):
        return None
    product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", dim)
    return int(eval(product, {"__builtins__": {}}, dict(numbers)))


def _in_range(value: float, limits: str, values: dict[str, Any]) -> bool:
    """Whether ``limits``, as far as they are a list or an interval, admit the value."""
    limits = limits.replace("−", "-")
    if re.fullmatch(r"-?\d+(, -?\d+)+", limits):
        return value in [int(v) for v in limits.split(", ")]
    interval = re.search(r"(\d+) … (\d+|Hkv|head_dim)", limits)
    if interval:
        names = {"Hkv": values["num_kv_heads"], "head_dim": values["head_dim"]}
        high = names[interval[2]] if interval[2] in names else int(interval[2])
        exception = limits.startswith("2 …") and value == 0  # "0 without RoPE", checked below
        return exception or int(interval[1]) <= value <= high
    bound = re.match(r"([≥>]) (-?\d+)", limits)
    if bound:
        exceptions = [int(v) for v in re.findall(r"; (-?\d+) if", limits)]
        above = value >= int(bound[2]) if bound[1] == "≥" else value > int(bound[2])
        return above or value in exceptions
    return True


def _check_layers(v: dict[str, Any]) -> None:
    """Rules between fields, as the README's table words them."""
    local, cyclic = v["num_kv_heads"] - v["num_retrieval"], v["local_cache"] == 1
    pool, slots = local > 0 and cyclic, local > 0 and not cyclic
    block = v["tokens_per_block"]
    require(v["num_heads"] % v["num_kv_heads"] == 0, "num_heads: a multiple of num_kv_heads")
    require(block & (block - 1) == 0, f"tokens_per_block: a power of two, found {block}")
    require((v["rotary_dim"] > 0) == (v["position"] in (1, 2)), "rotary_dim: 0 without RoPE only")
    require((v["layer_full"] < 0) == (v["num_retrieval"] == 0), "layer_full: -1 if R = 0")
    require((v["layer_local"] < 0) == (not pool), "layer_local: -1 without a local cache layer")
    window = v["window"]
    require((window > 0) == pool, "window: 0 where layer_local = -1")
    require(not pool or (window - v["sink_tokens"]) % block == 0, f"window: {window}")
    for name in ("ring_slot_bytes", "comp_slot_bytes"):
        require(v[name] % 16 == 0, f"{name}: a multiple of 16, found {v[name]}")
    require((v["ring_slot_bytes"] > 0) == slots, "ring_slot_bytes: 0 without state slots")
    least = 4 * local * v["comp_tokens"] * (2 * v["head_dim"] + 2) if slots else 0
    require(v["comp_slot_bytes"] >= least, f"comp_slot_bytes: at least {least}")
    require(slots or v["comp_slot_bytes"] == 0, "comp_slot_bytes: 0 without state slots")


def _comes_from(name: str, tensor: Any) -> bool:
    """Whether a tensor is what the input of that name shall be."""
    origin = tensor.origin
    if name == "qkv":
        return origin.startswith("<")
    if name in _SOURCES:
        own_constant = name == "alibi_slopes" and origin == "<constant>"
        return own_constant or origin.rsplit(".", 1)[-1] == _SOURCES[name]
    if name in _STATE:
        return re.fullmatch(rf"{name}_\d+", origin) is not None
    return tensor.is_network_input and origin == name
