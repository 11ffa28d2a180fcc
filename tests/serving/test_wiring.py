"""Every wiring check: a good repository is damaged in one way and the finding is exactly that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from trt_razor.serving.config import DynamicBatching, ModelConfig, Step, pairs
from trt_razor.serving.interface import Tensor
from trt_razor.serving.wiring import check_models

replace = dataclasses.replace
Models = dict[str, ModelConfig]
A, B, WHOLE = "a", "b", "whole"


def small() -> Models:
    """Two models and an ensemble with one internal tensor; names are not those of the five."""
    a = ModelConfig(
        A,
        8,
        (Tensor("IN", "STRING", (1,)), Tensor("MORE", "FP32", (-1,), optional=True)),
        (Tensor("IDS", "INT32", (-1,)), Tensor("LEN", "INT32", (1,))),
        backend="python",
        instances=1,
        parameters=pairs({"x": "1", "y": "2"}),
    )
    b = ModelConfig(
        B,
        8,
        (
            Tensor("ids", "INT32", (-1,), ragged=True),
            Tensor("len", "INT32", (1,), scalar=True),
            Tensor("seed", "UINT64", (1,), optional=True),
        ),
        (Tensor("out", "STRING", (-1,)),),
        backend="python",
        instances=1,
        decoupled=True,
        dynamic_batching=DynamicBatching((8,)),
    )
    whole = ModelConfig(
        WHOLE,
        8,
        (
            Tensor("text", "STRING", (1,)),
            Tensor("more", "FP32", (-1,), optional=True),
            Tensor("seed", "UINT64", (1,), optional=True),
        ),
        (Tensor("answer", "STRING", (-1,)),),
        platform="ensemble",
        steps=(
            Step(A, (("IN", "text"), ("MORE", "more")), (("IDS", "_ids"), ("LEN", "_len"))),
            Step(B, (("ids", "_ids"), ("len", "_len"), ("seed", "seed")), (("out", "answer"),)),
        ),
    )
    return {A: a, B: b, WHOLE: whole}


def tensor(models: Models, model: str, kind: str, name: str, **change: Any) -> None:
    """Change one tensor of a model."""
    tensors = getattr(models[model], kind)
    assert name in [t.name for t in tensors]
    changed = tuple(replace(t, **change) if t.name == name else t for t in tensors)
    models[model] = replace(models[model], **{kind: changed})


def add(models: Models, model: str, kind: str, *tensors: Tensor) -> None:
    models[model] = replace(models[model], **{kind: getattr(models[model], kind) + tensors})


def model(models: Models, name: str, **change: Any) -> None:
    models[name] = replace(models[name], **change)


def step(models: Models, index: int, **change: Any) -> None:
    steps = list(models[WHOLE].steps)
    steps[index] = replace(steps[index], **change)
    models[WHOLE] = replace(models[WHOLE], steps=tuple(steps))


FIRST, SECOND = small()[WHOLE].steps
X = Tensor("x", "INT32", (1,), optional=True)

DAMAGES: dict[str, tuple[Callable[[Models], Any], list[str]]] = {
    # One model
    "input twice": (
        lambda m: add(m, A, "inputs", m[A].inputs[1]),
        ["model 'a': input 'MORE' is there twice"],
    ),
    "output twice": (
        lambda m: add(m, A, "outputs", m[A].outputs[0]),
        ["model 'a': output 'IDS' is there twice"],
    ),
    "parameter twice": (
        lambda m: model(m, A, parameters=(("x", "1"), ("y", "2"), ("x", "1"))),
        ["model 'a': parameter 'x' is there twice"],
    ),
    "dims missing": (
        lambda m: add(m, A, "inputs", replace(X, dims=())),
        ["model 'a': input 'x': dims are missing"],
    ),
    "dims 0": (
        lambda m: add(m, A, "inputs", replace(X, dims=(1, 0))),
        ["model 'a': input 'x': expected dims of -1 or at least 1, found [1, 0]"],
    ),
    "dims -2": (
        lambda m: add(m, A, "inputs", replace(X, dims=(-2,))),
        ["model 'a': input 'x': expected dims of -1 or at least 1, found [-2]"],
    ),
    "data type": (
        lambda m: add(m, A, "inputs", replace(X, data_type="INVALID")),
        ["model 'a': input 'x': expected a data type, found 'INVALID'"],
    ),
    "scalar of two": (
        lambda m: add(m, A, "inputs", replace(X, dims=(2,), scalar=True)),
        ["model 'a': input 'x': reshape to a scalar needs dims [1], found [2]"],
    ),
    "no inputs": (
        lambda m: m.update(c=replace(m[A], name="c", inputs=())),
        ["model 'c': expected at least one input, found none"],
    ),
    "no outputs": (
        lambda m: m.update(c=replace(m[A], name="c", outputs=())),
        ["model 'c': expected at least one output, found none"],
    ),
    "ragged without batches": (
        lambda m: m.update(c=replace(m[B], name="c", max_batch_size=0, dynamic_batching=None)),
        ["model 'c': input 'ids': allow_ragged_batch needs a max_batch_size above 0"],
    ),
    "batching without batches": (
        lambda m: m.update(
            c=replace(m[A], name="c", max_batch_size=0, dynamic_batching=DynamicBatching())
        ),
        ["model 'c': dynamic_batching needs a max_batch_size above 0"],
    ),
    "preferred size": (
        lambda m: model(m, B, dynamic_batching=DynamicBatching((8, 9))),
        ["model 'b': preferred_batch_size: expected 1 to 8 (max_batch_size), found 9"],
    ),
    "preferred size 0": (
        lambda m: model(m, B, dynamic_batching=DynamicBatching((1, 0))),
        ["model 'b': preferred_batch_size: expected 1 to 8 (max_batch_size), found 0"],
    ),
    "negative batch size": (
        lambda m: m.update(c=replace(m[A], name="c", max_batch_size=-1)),
        ["model 'c': max_batch_size: expected at least 0, found -1"],
    ),
    "no backend": (
        lambda m: model(m, A, backend=""),
        ["model 'a': expected a backend or a platform, found none"],
    ),
    "backend and platform": (
        lambda m: model(m, WHOLE, backend="python"),
        ["model 'whole': expected a backend or a platform, found both"],
    ),
    "steps of a model": (
        lambda m: m.update(c=replace(m[WHOLE], name="c", platform="", backend="python")),
        ["model 'c': only an ensemble has steps; remove ensemble_scheduling"],
    ),
    "no steps": (
        lambda m: model(m, WHOLE, steps=()),
        ["model 'whole': expected the steps of an ensemble, found none"],
    ),
    "instances of an ensemble": (
        lambda m: model(m, WHOLE, instances=1),
        ["model 'whole': an ensemble has no instance_group; remove it"],
    ),
    "queue of an ensemble": (
        lambda m: model(m, WHOLE, dynamic_batching=DynamicBatching()),
        ["model 'whole': an ensemble has no dynamic_batching; remove it"],
    ),
    # An ensemble's steps
    "unknown model": (
        lambda m: step(m, 0, model="aa"),
        [
            "model 'whole': step 1 (aa): unknown model 'aa'; did you mean a?",
            "model 'whole': ensemble input 'text': nothing uses tensor 'text'",
            "model 'whole': ensemble input 'more': nothing uses tensor 'more'",
            "model 'whole': step 2 (b) input 'ids': nothing produces tensor '_ids'; known: answer, "
            "more, seed, text",
            "model 'whole': step 2 (b) input 'len': nothing produces tensor '_len'; known: answer, "
            "more, seed, text",
        ],
    ),
    "itself": (
        lambda m: model(m, WHOLE, steps=(*m[WHOLE].steps, Step(WHOLE, (("t", "text"),), (("a", "z"),)))),
        ["model 'whole': step 3 (whole): an ensemble cannot be a step of itself"],
    ),
    "unknown input": (
        lambda m: step(m, 0, inputs=(*FIRST.inputs, ("MOORE", "more"))),
        ["model 'whole': step 1 (a): unknown input 'MOORE'; known: IN, MORE"],
    ),
    "unknown output": (
        lambda m: step(m, 1, outputs=(*SECOND.outputs, ("log", "_log"))),
        ["model 'whole': step 2 (b): unknown output 'log'; known: out"],
    ),
    "input map twice": (
        lambda m: step(m, 0, inputs=(*FIRST.inputs, ("MORE", "more"))),
        ["model 'whole': step 1 (a): 'MORE' is twice in input_map"],
    ),
    "output map twice": (
        lambda m: (
            add(m, WHOLE, "outputs", replace(m[WHOLE].outputs[0], name="again")),
            step(m, 1, outputs=(("out", "answer"), ("out", "again"))),
        ),
        ["model 'whole': step 2 (b): 'out' is twice in output_map"],
    ),
    "input map empty": (
        lambda m: (
            add(m, WHOLE, "outputs", Tensor("n", "INT32", (1,))),
            m.update(c=replace(m[B], name="c", inputs=(X,), outputs=(replace(X, optional=False),))),
            model(m, WHOLE, steps=(*m[WHOLE].steps, Step("c", (), (("x", "n"),)))),
            model(m, "c", decoupled=None),
            model(m, B, decoupled=None),
        ),
        ["model 'whole': step 3 (c): input_map is empty"],
    ),
    "output map empty": (
        lambda m: model(m, WHOLE, steps=(*m[WHOLE].steps, Step(A, FIRST.inputs, ()))),
        ["model 'whole': step 3 (a): output_map is empty"],
    ),
    "version": (
        lambda m: step(m, 1, version=0),
        ["model 'whole': step 2 (b): expected model_version -1 or at least 1, found 0"],
    ),
    "required input not mapped": (
        lambda m: step(m, 0, inputs=(("MORE", "more"), ("IN", "text"))[:1]),
        [
            "model 'whole': step 1 (a): required input 'IN' is not mapped",
            "model 'whole': ensemble input 'text': nothing uses tensor 'text'",
        ],
    ),
    "optional to required": (
        lambda m: tensor(m, WHOLE, "inputs", "text", optional=True),
        ["model 'whole': step 1 (a) input 'IN' is required, but ensemble input 'text' is optional"],
    ),
    # An ensemble's tensors
    "nothing produces": (
        lambda m: step(m, 1, inputs=(*SECOND.inputs[:2], ("seed", "sed"))),
        [
            "model 'whole': ensemble input 'seed': nothing uses tensor 'seed'",
            "model 'whole': step 2 (b) input 'seed': nothing produces tensor 'sed'; did you mean seed?",
        ],
    ),
    "two produce": (
        lambda m: model(
            m, WHOLE, steps=(*m[WHOLE].steps, Step(B, SECOND.inputs, SECOND.outputs))
        ),
        [
            "model 'whole': tensor 'answer': expected one source, found step 2 (b) output 'out' and "
            "step 3 (b) output 'out'",
        ],
    ),
    "input produced too": (
        lambda m: step(m, 0, outputs=(("IDS", "_ids"), ("LEN", "_len"), ("IDS", "more"))),
        [
            "model 'whole': step 1 (a): 'IDS' is twice in output_map",
            "model 'whole': tensor 'more': expected one source, found ensemble input 'more' and "
            "step 1 (a) output 'IDS'",
            "model 'whole': these steps wait for each other or for one that does: step 1 (a), step 2 (b)",
        ],
    ),
    "produced for nobody": (
        lambda m: (add(m, B, "outputs", X), step(m, 1, outputs=(*SECOND.outputs, ("x", "_x")))),
        ["model 'whole': step 2 (b) output 'x': nothing uses tensor '_x'"],
    ),
    "input for nobody": (
        lambda m: add(m, WHOLE, "inputs", X),
        ["model 'whole': ensemble input 'x': nothing uses tensor 'x'"],
    ),
    "output not produced": (
        lambda m: add(m, WHOLE, "outputs", Tensor("score", "FP32", (1,))),
        ["model 'whole': ensemble output 'score' is produced by no step"],
    ),
    "output is an input": (
        lambda m: (model(m, B, decoupled=None), add(m, WHOLE, "outputs", Tensor("text", "STRING", (1,)))),
        ["model 'whole': ensemble output 'text' is produced by no step"],
    ),
    "type between steps": (
        lambda m: tensor(m, A, "outputs", "IDS", data_type="INT64"),
        [
            "model 'whole': step 2 (b) input 'ids': expected INT32, found INT64 of step 1 (a) output 'IDS'"
        ],
    ),
    "type of an input": (
        lambda m: tensor(m, WHOLE, "inputs", "seed", data_type="INT64"),
        [
            "model 'whole': step 2 (b) input 'seed': expected UINT64, found INT64 of ensemble input 'seed'"
        ],
    ),
    "type of an output": (
        lambda m: tensor(m, WHOLE, "outputs", "answer", data_type="UINT8"),
        [
            "model 'whole': ensemble output 'answer': expected UINT8, found STRING of step 2 (b) "
            "output 'out'"
        ],
    ),
    "dims between steps": (
        lambda m: tensor(m, A, "outputs", "LEN", dims=(2,)),
        [
            "model 'whole': step 2 (b) input 'len': expected dims [-1, 1] with the batch axis, found "
            "[-1, 2] of step 1 (a) output 'LEN'"
        ],
    ),
    "rank between steps": (
        lambda m: tensor(m, A, "outputs", "IDS", dims=(-1, -1)),
        [
            "model 'whole': step 2 (b) input 'ids': expected dims [-1, -1] with the batch axis, found "
            "[-1, -1, -1] of step 1 (a) output 'IDS'"
        ],
    ),
    "dims of an input": (
        lambda m: tensor(m, WHOLE, "inputs", "seed", dims=(3,)),
        [
            "model 'whole': step 2 (b) input 'seed': expected dims [-1, 1] with the batch axis, found "
            "[-1, 3] of ensemble input 'seed'"
        ],
    ),
    "dims of an output": (
        lambda m: tensor(m, WHOLE, "outputs", "answer", dims=(1, -1)),
        [
            "model 'whole': ensemble output 'answer': expected dims [-1, 1, -1] with the batch axis, "
            "found [-1, -1] of step 2 (b) output 'out'"
        ],
    ),
    "smaller batches": (
        lambda m: model(m, A, max_batch_size=7),
        [
            "model 'whole': step 1 (a): expected a max_batch_size of at least 8 (the ensemble's), found 7"
        ],
    ),
    "no batches": (
        lambda m: model(
            m,
            A,
            max_batch_size=0,
            inputs=tuple(replace(t, dims=(-1, *t.dims)) for t in m[A].inputs),
            outputs=tuple(replace(t, dims=(-1, *t.dims)) for t in m[A].outputs),
        ),
        [
            "model 'whole': step 1 (a): expected a max_batch_size of at least 8 (the ensemble's), found 0"
        ],
    ),
    "batch axis": (
        lambda m: model(m, WHOLE, max_batch_size=0),
        [
            "model 'whole': ensemble output 'answer': expected dims [-1] with the batch axis, found "
            "[-1, -1] of step 2 (b) output 'out'",
            "model 'whole': step 1 (a) input 'IN': expected dims [-1, 1] with the batch axis, found "
            "[1] of ensemble input 'text'",
            "model 'whole': step 1 (a) input 'MORE': expected dims [-1, -1] with the batch axis, found "
            "[-1] of ensemble input 'more'",
            "model 'whole': step 2 (b) input 'seed': expected dims [-1, 1] with the batch axis, found "
            "[1] of ensemble input 'seed'",
        ],
    ),
    "cycle": (
        lambda m: (
            model(m, B, decoupled=None),
            add(m, A, "inputs", Tensor("BACK", "STRING", (-1,), optional=True)),
            step(m, 0, inputs=(*FIRST.inputs, ("BACK", "answer"))),
        ),
        ["model 'whole': these steps wait for each other or for one that does: step 1 (a), step 2 (b)"],
    ),
    "stream and single": (
        lambda m: model(m, A, decoupled=True),
        [
            "model 'whole': step 2 (b): tensor '_ids' comes once a response of 'a', but 'seed' once a "
            "request"
        ],
    ),
    "single output of a stream": (
        lambda m: (
            add(m, WHOLE, "outputs", Tensor("_len", "INT32", (1,))),
        ),
        [
            "model 'whole': ensemble outputs: tensor 'answer' comes once a response of 'b', but '_len' "
            "once a request"
        ],
    ),
    "model twice": (
        lambda m: m.update(again=m[A]),
        ["model 'a' is there twice"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damage_and_its_finding(damage: str) -> None:
    change, expected = DAMAGES[damage]
    models = small()
    change(models)
    assert check_models(list(models.values())) == expected


GOOD: dict[str, Callable[[Models], Any]] = {
    "as it is": lambda m: None,
    "steps in another order": lambda m: model(m, WHOLE, steps=m[WHOLE].steps[::-1]),
    "larger batches of a step": lambda m: model(m, A, max_batch_size=9),
    "-1 meets a size": lambda m: tensor(m, A, "outputs", "LEN", dims=(-1,)),
    "optional input not mapped": lambda m: (
        step(m, 1, inputs=SECOND.inputs[:2]),
        model(m, WHOLE, inputs=m[WHOLE].inputs[:2]),
    ),
    "one input for two steps": lambda m: (
        add(m, B, "inputs", Tensor("text", "STRING", (1,))),
        step(m, 1, inputs=(*SECOND.inputs, ("text", "text"))),
    ),
    "same name in and out": lambda m: add(m, A, "outputs", Tensor("MORE", "FP32", (1,))),
    "an output that is not mapped": lambda m: add(m, B, "outputs", X),
    "an internal tensor is an output too": lambda m: (
        model(m, B, decoupled=None),
        add(m, WHOLE, "outputs", Tensor("_len", "INT32", (1,))),
    ),
    "two steps of a stream": lambda m: (
        m.update(c=replace(m[A], name="c", inputs=(Tensor("T", "STRING", (-1,)),))),
        add(m, WHOLE, "outputs", Tensor("n", "INT32", (1,))),
        model(
            m, WHOLE, steps=(*m[WHOLE].steps, Step("c", (("T", "answer"),), (("LEN", "n"),)))
        ),
    ),
    "no instance group": lambda m: model(m, A, instances=0),
    "batches of one": lambda m: [
        model(m, name, max_batch_size=1, dynamic_batching=None) for name in list(m)
    ],
    "two instances": lambda m: model(m, A, instances=2),
    "preferred sizes": lambda m: model(m, B, dynamic_batching=DynamicBatching((1, 8))),
    "the first version": lambda m: step(m, 0, version=1),
}  # fmt: skip


@pytest.mark.parametrize("variant", GOOD)
def test_good_variants(variant: str) -> None:
    models = small()
    GOOD[variant](models)
    assert check_models(list(models.values())) == []
