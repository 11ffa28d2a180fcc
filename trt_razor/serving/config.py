"""A model's ``config.pbtxt`` as dataclasses, and its text.

The text is protobuf's text format of Triton's ``ModelConfig``: one tensor, parameter or map entry
a line, always in the same order, so that two repositories can be compared with ``diff``.
Placeholders (``${…}``) never reach a file: the server would read some as unset and some as a path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from trt_razor.errors import UsageError
from trt_razor.serving.interface import DATA_TYPES, Tensor

Pairs = tuple[tuple[str, str], ...]
"""A map in the order of the file; pairs, because a damaged file may have a key twice."""

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def pairs(mapping: Mapping[str, str]) -> Pairs:
    """A mapping as ``Pairs``, in its own order."""
    return tuple(mapping.items())


@dataclass(frozen=True)
class Step:
    """One model of an ensemble.

    Attributes:
        inputs: (input of the model, tensor of the ensemble) pairs.
        outputs: (output of the model, tensor of the ensemble) pairs.
        version: of the model; -1 = the newest.
    """

    model: str
    inputs: Pairs
    outputs: Pairs
    version: int = -1


@dataclass(frozen=True)
class DynamicBatching:
    """How the server's own queue hands requests to a model; ``max_queue_size`` 0 = no limit."""

    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    max_queue_size: int | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a ``config.pbtxt`` of ours says. Exactly one of backend and platform is set.

    Attributes:
        max_batch_size: rows of the largest request; 0 = the tensors have no batch axis.
        decoupled: answers come as a stream of any number of responses. None = not said.
        instances: copies of the model that run at a time (on the CPU side); 0 = not said.
        comment: lines at the head of the file.
    """

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    backend: str = ""
    platform: str = ""
    decoupled: bool | None = None
    dynamic_batching: DynamicBatching | None = None
    instances: int = 0
    parameters: Pairs = ()
    steps: tuple[Step, ...] = ()
    comment: str = field(default="", compare=False)

    def parameter(self, name: str) -> str | None:
        """The value of a parameter, or None."""
        return dict(self.parameters).get(name)

    def text(self) -> str:
        """The file's content: UTF-8 text, the same for the same config.

        Raises:
            UsageError: a name, number or string that the file cannot have; says which.
        """
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterable[str]:
        where = f"config of model {self.name!r}"
        for line in self.comment.splitlines():
            yield f"# {line}".rstrip()
        yield f"name: {_name(self.name, where)}"
        for key in ("backend", "platform"):
            if getattr(self, key):
                yield f"{key}: {_name(getattr(self, key), where)}"
        yield f"max_batch_size: {_integer(self.max_batch_size, 'max_batch_size', where)}"
        if self.decoupled is not None:
            if not isinstance(self.decoupled, bool):
                raise UsageError(
                    f"{where}: decoupled: expected true or false, found {self.decoupled!r}"
                )
            yield f"model_transaction_policy {{ decoupled: {_boolean(self.decoupled)} }}"
        if self.dynamic_batching is not None:
            yield from _batching(self.dynamic_batching, where)
        if self.instances:
            count = _integer(self.instances, "instances", where)
            yield f"instance_group [ {{ count: {count} kind: KIND_CPU }} ]"
        for title, tensors in (("input", self.inputs), ("output", self.outputs)):
            yield ""
            yield f"{title} ["
            yield ",\n".join(f"  {{ {_tensor(t, where)} }}" for t in tensors)
            yield "]"
        if self.parameters:
            yield ""
        for key, value in self.parameters:
            place = f"{where}: parameter {key!r}"
            yield (
                f"parameters {{ key: {_string(key, place)} "
                f"value {{ string_value: {_string(value, place)} }} }}"
            )
        if self.steps:
            yield ""
            yield "ensemble_scheduling {"
            for step in self.steps:
                yield from _step(step, where)
            yield "}"


def _batching(batching: DynamicBatching, where: str) -> Iterable[str]:
    if batching == DynamicBatching():
        yield "dynamic_batching { }"
        return
    yield "dynamic_batching {"
    if batching.preferred_batch_sizes:
        sizes = [_integer(n, "preferred_batch_size", where) for n in batching.preferred_batch_sizes]
        yield f"  preferred_batch_size: [ {', '.join(sizes)} ]"
    delay = batching.max_queue_delay_microseconds
    key = "max_queue_delay_microseconds"
    yield f"  {key}: {_integer(delay, key, where, _INT64)}"
    if batching.max_queue_size is not None:
        size = _integer(batching.max_queue_size, "max_queue_size", where)
        yield f"  default_queue_policy {{ max_queue_size: {size} }}"
    yield "}"


def _tensor(t: Tensor, where: str) -> str:
    if t.data_type not in DATA_TYPES:
        raise UsageError(
            f"{where}: tensor {t.name!r}: expected a data type of {', '.join(DATA_TYPES)}; "
            f"found {t.data_type!r}"
        )
    dims = ", ".join(_integer(d, f"dims of tensor {t.name!r}", where, _INT64, -1) for d in t.dims)
    parts = [
        f"name: {_name(t.name, where)}",
        f"data_type: TYPE_{t.data_type}",
        f"dims: [ {dims} ]",
    ]
    if t.scalar:
        parts.append("reshape { shape: [ ] }")
    if t.ragged:
        parts.append("allow_ragged_batch: true")
    if t.optional:
        parts.append("optional: true")
    return " ".join(parts)


def _step(step: Step, where: str) -> Iterable[str]:
    yield "  step {"
    yield f"    model_name: {_name(step.model, where)}"
    yield f"    model_version: {_integer(step.version, 'model_version', where, _INT64, -1)}"
    for title, entries in (("input_map", step.inputs), ("output_map", step.outputs)):
        for tensor, ensemble_tensor in entries:
            yield (
                f"    {title} {{ key: {_name(tensor, where)} "
                f"value: {_name(ensemble_tensor, where)} }}"
            )
    yield "  }"


# Scalars ------------------------------------------------------------------------------------------
def _name(name: str, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: expected a name of letters, digits, '_', '-' and '.'; found {name!r}"
        )
    return f'"{name}"'


def _integer(value: int, what: str, where: str, most: int = _INT32, least: int = 0) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(
            f"{where}: {what}: expected a whole number from {least} to {most}, found {value!r}"
        )
    return str(value)


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _string(value: str, where: str) -> str:
    """A protobuf string literal. Text beyond ASCII stays as it is; protobuf reads UTF-8."""
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected a string, found {value!r}")
    if "${" in value:
        raise UsageError(f"{where}: {value!r} has a placeholder that was not filled in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"{where}: {value!r} cannot be written as UTF-8; rename the file or folder"
        ) from None
    if "\0" in value:
        raise UsageError(f"{where}: {value!r} has a NUL character")
    return '"' + "".join(_escaped(c) for c in value) + '"'


def _escaped(c: str) -> str:
    if c in _ESCAPES:
        return _ESCAPES[c]
    # Other control characters, and the separators that Python and editors take for line ends.
    if ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029":
        return "".join(f"\\{byte:03o}" for byte in c.encode("utf-8"))
    return c
