"""What protobuf does not see: whether the models of a repository fit together.

Works on ``ModelConfig``, before a file is written and on files that were read back. Every finding
is one line: which model, where in it, what was expected, what is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trt_razor.errors import did_you_mean
from trt_razor.serving.config import ModelConfig, Step
from trt_razor.serving.interface import DATA_TYPES, PUBLIC, Tensor
from trt_razor.serving.parameters import PARAMETERS, problems

_OPEN_TYPES = {
    "LOGITS": ("FP32", "FP16"),
    "PROMPT_TABLE": ("FP16", "BF16", "FP32"),
    "ENCODER_FEATURES": ("FP16", "BF16", "FP32"),
}


def check_models(configs: Sequence[ModelConfig]) -> list[str]:
    """Everything that is wrong with the models of one repository; empty = they fit together."""
    findings = [f"model {name!r} is there twice" for name in _twice(c.name for c in configs)]
    models = {c.name: c for c in configs}
    for config in configs:
        findings += check_model(config)
        findings += [f"model {config.name!r}: {text}" for text in _references(config, models)]
        findings += [f"model {config.name!r}: {text}" for text in _ensemble(config, models)]
    findings += _bls(models)
    return findings


def check_model(config: ModelConfig) -> list[str]:
    """What is wrong with one model, whatever stands beside it."""
    checks = (_kind(config), _tensors(config), _batching(config), _public(config))
    found = [text for check in checks for text in check]
    found += [
        f"parameter {name!r} is there twice" for name in _twice(k for k, _ in config.parameters)
    ]
    if config.name in PUBLIC:
        found += problems(config.name, is_own(config), dict(config.parameters))
    return [f"model {config.name!r}: {text}" for text in found]


def is_own(config: ModelConfig) -> bool:
    """Whether ``tensorrt_llm`` is our Python model and not the stock backend."""
    return config.backend == "python"


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


# One model ----------------------------------------------------------------------------------------
def _kind(config: ModelConfig) -> Iterator[str]:
    if bool(config.backend) == bool(config.platform):
        found = "both" if config.backend else "none"
        yield f"expected a backend or a platform, found {found}"
    if config.platform == "ensemble":
        if not config.steps:
            yield "expected the steps of an ensemble, found none"
        if config.instances:
            yield "an ensemble has no instance_group; remove it"
        if config.dynamic_batching is not None:
            yield "an ensemble has no dynamic_batching; remove it"
    elif config.steps:
        yield "only an ensemble has steps; remove ensemble_scheduling"
    elif config.instances < 1 and config.name in PUBLIC:
        yield f"expected an instance_group with a count of at least 1, found {config.instances}"
    if config.name == "tensorrt_llm" and config.instances > 1:
        yield f"expected one instance (a stop request must reach it), found {config.instances}"


def _tensors(config: ModelConfig) -> Iterator[str]:
    for what, tensors in (("input", config.inputs), ("output", config.outputs)):
        if not tensors:
            yield f"expected at least one {what}, found none"
        for name in _twice(t.name for t in tensors):
            yield f"{what} {name!r} is there twice"
        for t in tensors:
            if t.data_type not in DATA_TYPES:
                yield f"{what} {t.name!r}: expected a data type, found {t.data_type!r}"
            if not t.dims:
                yield f"{what} {t.name!r}: dims are missing"
            if any(d < 1 and d != -1 for d in t.dims):
                yield f"{what} {t.name!r}: expected dims of -1 or at least 1, found {list(t.dims)}"
            if t.scalar and any(d != 1 for d in t.dims):
                yield f"{what} {t.name!r}: reshape to a scalar needs dims [1], found {list(t.dims)}"
            if t.ragged and config.max_batch_size == 0:
                yield f"{what} {t.name!r}: allow_ragged_batch needs a max_batch_size above 0"


def _batching(config: ModelConfig) -> Iterator[str]:
    most = config.max_batch_size
    if most < 0:
        yield f"max_batch_size: expected at least 0, found {most}"
    if config.dynamic_batching is None:
        return
    if most == 0:
        yield "dynamic_batching needs a max_batch_size above 0"
        return
    for size in config.dynamic_batching.preferred_batch_sizes:
        if not 1 <= size <= most:
            yield f"preferred_batch_size: expected 1 to {most} (max_batch_size), found {size}"


def _public(config: ModelConfig) -> Iterator[str]:
    """Existing clients name the public tensors: none may be missing or look different."""
    interface = PUBLIC.get(config.name)
    if interface is None:
        return
    for what, public, here in (
        ("input", interface.inputs, config.inputs),
        ("output", interface.outputs, config.outputs),
    ):
        found = {t.name: t for t in here}
        for t in public:
            other = found.get(t.name)
            if other is None:
                yield f"public {what} {t.name!r} is missing"
                continue
            if other.data_type not in _OPEN_TYPES.get(t.data_type, (t.data_type,)):
                types = " or ".join(_OPEN_TYPES.get(t.data_type, (t.data_type,)))
                yield f"public {what} {t.name!r}: expected {types}, found {other.data_type}"
            for field in ("dims", "optional", "scalar", "ragged"):
                expected, value = getattr(t, field), getattr(other, field)
                if expected != value:
                    yield (
                        f"public {what} {t.name!r}: expected {field} {_shown(expected)}, "
                        f"found {_shown(value)}"
                    )
        names = {t.name for t in public}
        if what == "input":
            for t in here:
                if t.name not in names and not t.optional:
                    yield f"input {t.name!r} is ours and must be optional: clients do not know it"


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value).lower()


# Beside each other --------------------------------------------------------------------------------
def _references(config: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """Parameters that name a model."""
    table = PARAMETERS[is_own(config)].get(config.name, {})
    for name, value in config.parameters:
        if name in table and table[name].kind == "model" and value and value not in models:
            yield f"parameter {name!r}: unknown model {value!r}; {did_you_mean(value, models)}"


def _bls(models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """``tensorrt_llm_bls`` answers as often as the engine does, and may take its text."""
    bls = models.get("tensorrt_llm_bls")
    if bls is None:
        return
    engine = models.get(bls.parameter("tensorrt_llm_model_name") or "tensorrt_llm")
    if engine is None:
        return  # a finding of _references
    if bool(bls.decoupled) != bool(engine.decoupled):
        yield (
            f"model {bls.name!r}: expected decoupled {_shown(bool(engine.decoupled))} as "
            f"{engine.name!r} has, found {_shown(bool(bls.decoupled))}"
        )
    echo = "exclude_input_in_output"
    if bls.parameter(echo) != engine.parameter(echo):
        yield (
            f"model {bls.name!r}: parameter {echo!r}: expected {engine.parameter(echo)!r} as "
            f"{engine.name!r} has, found {bls.parameter(echo)!r}"
        )
    text = any(t.name == "text_output" for t in engine.outputs)
    if bls.parameter("text_from_engine") == "true" and not text:
        yield (
            f"model {bls.name!r}: parameter 'text_from_engine': expected false, as {engine.name!r} "
            "has no output 'text_output'; found 'true'"
        )


# Ensembles ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _End:
    """One end of an ensemble's tensor: a tensor of a step, or the ensemble's own."""

    where: str
    tensor: Tensor
    batched: bool

    @property
    def dims(self) -> list[int]:
        return [-1, *self.tensor.dims] if self.batched else list(self.tensor.dims)


def _ensemble(config: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    if not config.steps:
        return
    batched = config.max_batch_size > 0
    sources: dict[str, list[_End]] = {
        t.name: [_End(f"ensemble input {t.name!r}", t, batched)] for t in config.inputs
    }
    uses: list[tuple[str, _End]] = []
    for number, step in enumerate(config.steps, 1):
        where = f"step {number} ({step.model})"
        yield from _step_alone(step, where)
        model = models.get(step.model)
        if model is None:
            yield f"{where}: unknown model {step.model!r}; {did_you_mean(step.model, models)}"
            continue
        if model is config:
            yield f"{where}: an ensemble cannot be a step of itself"
            continue
        if model.max_batch_size < config.max_batch_size:
            yield (
                f"{where}: expected a max_batch_size of at least {config.max_batch_size} "
                f"(the ensemble's), found {model.max_batch_size}"
            )
        yield from _step_inputs(step, where, model, uses)
        outputs = {t.name: t for t in model.outputs}
        for name, tensor in step.outputs:
            if name in outputs:
                end = _End(f"{where} output {name!r}", outputs[name], model.max_batch_size > 0)
                sources.setdefault(tensor, []).append(end)
            else:
                yield f"{where}: unknown output {name!r}; {did_you_mean(name, outputs)}"
    yield from _connected(config, sources, uses)
    yield from _cycle(config.steps)
    yield from _answers_alike(config, models)


def _step_alone(step: Step, where: str) -> Iterator[str]:
    if step.version < 1 and step.version != -1:
        yield f"{where}: expected model_version -1 or at least 1, found {step.version}"
    for title, entries in (("input_map", step.inputs), ("output_map", step.outputs)):
        if not entries:
            yield f"{where}: {title} is empty"
        for name in _twice(k for k, _ in entries):
            yield f"{where}: {name!r} is twice in {title}"


def _step_inputs(
    step: Step, where: str, model: ModelConfig, uses: list[tuple[str, _End]]
) -> Iterator[str]:
    inputs = {t.name: t for t in model.inputs}
    for name, tensor in step.inputs:
        if name in inputs:
            end = _End(f"{where} input {name!r}", inputs[name], model.max_batch_size > 0)
            uses.append((tensor, end))
        else:
            yield f"{where}: unknown input {name!r}; {did_you_mean(name, inputs)}"
    mapped = {name for name, _ in step.inputs}
    for t in model.inputs:
        if not t.optional and t.name not in mapped:
            yield f"{where}: required input {t.name!r} is not mapped"


def _connected(
    config: ModelConfig, sources: Mapping[str, list[_End]], uses: list[tuple[str, _End]]
) -> Iterator[str]:
    """Every tensor has one source, and its ends agree. Steps may stand in any order."""
    used = {tensor for tensor, _ in uses}
    asked = {t.name for t in config.outputs}
    batched = config.max_batch_size > 0
    for tensor, ends in sources.items():
        if len(ends) > 1:
            where = " and ".join(end.where for end in ends)
            yield f"tensor {tensor!r}: expected one source, found {where}"
        if tensor not in used and tensor not in asked:
            yield f"{ends[0].where}: nothing uses tensor {tensor!r}"
    for t in config.outputs:
        made = [end for end in sources.get(t.name, []) if not end.where.startswith("ensemble")]
        if not made:
            yield f"ensemble output {t.name!r} is produced by no step"
        else:
            yield from _agree(made[0], _End(f"ensemble output {t.name!r}", t, batched))
    for tensor, end in uses:
        if tensor not in sources:
            yield f"{end.where}: nothing produces tensor {tensor!r}; {did_you_mean(tensor, sources)}"
            continue
        source = sources[tensor][0]
        yield from _agree(source, end)
        if source.tensor.optional and not end.tensor.optional:
            yield f"{end.where} is required, but {source.where} is optional"


def _agree(source: _End, end: _End) -> Iterator[str]:
    if source.tensor.data_type != end.tensor.data_type:
        yield (
            f"{end.where}: expected {end.tensor.data_type}, "
            f"found {source.tensor.data_type} of {source.where}"
        )
    a, b = source.dims, end.dims
    if len(a) != len(b) or any(x != y and -1 not in (x, y) for x, y in zip(a, b, strict=True)):
        yield f"{end.where}: expected dims {b} with the batch axis, found {a} of {source.where}"


def _cycle(steps: Sequence[Step]) -> Iterator[str]:
    """Steps that wait for each other never run."""
    makers = {tensor: i for i, step in enumerate(steps) for _, tensor in step.outputs}
    needs = [{makers[tensor] for _, tensor in step.inputs if tensor in makers} for step in steps]
    waiting = set(range(len(steps)))
    while ready := {i for i in waiting if not needs[i] & waiting}:
        waiting -= ready
    if waiting:
        names = ", ".join(f"step {i + 1} ({steps[i].model})" for i in sorted(waiting))
        yield f"these steps wait for each other or for one that does: {names}"


def _answers_alike(config: ModelConfig, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """Behind a decoupled step, tensors come once a response: what meets must come equally often."""
    origin: dict[str, int] = {}  # tensor -> the decoupled step that says how often; -1 = request
    for _ in config.steps:  # steps may stand in any order
        for number, step in enumerate(config.steps):
            model = models.get(step.model)
            often = max((origin.get(tensor, -1) for _, tensor in step.inputs), default=-1)
            if model is not None and model.decoupled:
                often = number
            origin.update((tensor, often) for _, tensor in step.outputs)

    def how_often(tensor: str) -> str:
        made_by = origin.get(tensor, -1)
        return "request" if made_by < 0 else f"response of {config.steps[made_by].model!r}"

    meetings = [
        (f"step {number} ({step.model})", [tensor for _, tensor in step.inputs])
        for number, step in enumerate(config.steps, 1)
    ]
    known = {*origin, *(t.name for t in config.inputs)}  # the others have findings of their own
    for where, names in (*meetings, ("ensemble outputs", [t.name for t in config.outputs])):
        tensors = [name for name in names if name in known]
        for tensor in tensors[1:]:
            if how_often(tensor) != how_often(tensors[0]):
                yield (
                    f"{where}: tensor {tensors[0]!r} comes once a {how_often(tensors[0])}, "
                    f"but {tensor!r} once a {how_often(tensor)}"
                )
                break
