"""Inlining and merging: fewer nodes, the same results in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper, parser  # noqa: E402

from trt_razor.graph.decoder import export_decoder  # noqa: E402
from trt_razor.graph.inline import inline_graph, node_count  # noqa: E402
from trt_razor.graph.options import GraphOptions  # noqa: E402
from trt_razor.headmap import HeadMap  # noqa: E402
from trt_razor.models.checkpoint import random_checkpoint  # noqa: E402
from trt_razor.models.spec import ModelSpec  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402

SPEC = ModelSpec("tiny", "llama", 3, 24, 40, 6, 3, 8, 61, 128, 1e-5)
HEADS = ((1,), (0, 2), ())


def run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    # Nothing merged by the executor itself: what we compare is our own doing.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def from_text(text: str) -> onnx.ModelProto:
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 21, "f" : 1]>\n' + text)
    onnx.checker.check_model(model)
    return model


def op_types(model: onnx.ModelProto) -> list[str]:
    return sorted(n.op_type for n in model.graph.node)


def decoder_feeds(model: onnx.ModelProto, past: int, seq: int) -> dict[str, np.ndarray]:
    """Random feeds for two rows, the second right padded; caches with plausible content."""
    rng = np.random.default_rng(7)
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, SPEC.vocab_size, (2, seq)).astype(np.int32),
        "past": np.array([past, past // 2], np.int32),
        "chunk": np.array([seq, max(1, seq - 2)], np.int32),
        "past_span": np.zeros(max(1, past), np.int8),
        "logits_index": np.zeros((2, 1), np.int32),
    }
    for value in model.graph.input:
        if value.name not in feeds:
            shape = (2, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:]))
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
            if value.name.startswith(("comp_count", "comp_log_weight")):
                feeds[value.name][:] = 0.0  # one token in each cluster: ln 1 = 0
                if value.name.startswith("comp_count"):
                    feeds[value.name][:] = 1.0
    return feeds


@pytest.mark.parametrize(
    "comp_tokens, position", [(0, "rope"), (1, "rope"), (4, "rope"), (0, "alibi"), (1, "alibi")]
)
def test_decoder_gives_the_same_with_fewer_nodes(
    tmp_path: Path, comp_tokens: int, position: str, needs_overloads: Callable[[], None]
) -> None:
    needs_overloads()
    spec = dataclasses.replace(SPEC, position=position)
    heads = HeadMap("tiny", spec.fingerprint(), 3, 3, HEADS, "test", "test")
    options = GraphOptions(RazorPolicy(2, 5, 3, comp_tokens), heads, 64)
    path = export_decoder(random_checkpoint(spec), options, tmp_path)
    model = onnx.load(path, load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    flat = inline_graph(model)
    assert model.SerializeToString(deterministic=True) == before
    assert not flat.functions
    assert {o.domain for o in flat.opset_import} == {""}
    plain = onnx.inliner.inline_local_functions(model)
    assert node_count(flat.graph) < 0.7 * node_count(plain.graph)
    out = tmp_path / "flat.onnx"
    onnx.save(flat, out)
    onnx.checker.check_model(str(out), full_check=True)
    # (0, 12): the first fold happens inside the chunk, so the If of M > 1 takes both branches.
    for past, seq in ((0, 12), (20, 1), (20, 5)):
        feeds = decoder_feeds(model, past, seq)
        if past == 0:
            feeds.update({k: np.zeros_like(v) for k, v in feeds.items() if k.startswith("comp_c")})
            feeds.update(
                {k: np.full_like(v, -np.inf) for k, v in feeds.items() if k.startswith("comp_l")}
            )
        want, got = run(path, feeds), run(out, feeds)
        assert want.keys() == got.keys()
        assert np.isfinite(want["logits"]).all()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("heavy", [0, 3])
def test_layers_share_their_index_arithmetic(tmp_path: Path, heavy: int) -> None:
    """A further layer with heads that were seen before adds only what depends on its activations."""
    counts = []
    for layers in (2, 3):
        spec = dataclasses.replace(SPEC, num_layers=layers)
        heads = HeadMap("tiny", spec.fingerprint(), layers, 3, ((1,),) * layers, "test", "test")
        folder = tmp_path / str(layers)
        folder.mkdir()
        path = export_decoder(
            random_checkpoint(spec), GraphOptions(RazorPolicy(2, 5, 3, 1, heavy), heads, 64), folder
        )
        flat = inline_graph(onnx.load(path, load_external_data=False))
        counts.append([n.op_type for n in flat.graph.node])
    for op in ("Range", "Shape", "Less", "Constant"):
        # Shape: of the two sliced local caches, whose dimensions inference does not follow.
        assert counts[1].count(op) - counts[0].count(op) <= (2 if op == "Shape" else 0), op


def test_node_names_are_unique(tmp_path: Path) -> None:
    heads = HeadMap("tiny", SPEC.fingerprint(), 3, 3, HEADS, "test", "test")
    options = GraphOptions(RazorPolicy(2, 5, 3, 4, 3), heads, 64)
    path = export_decoder(random_checkpoint(SPEC), options, tmp_path)
    names: list[str] = []

    def collect(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            names.append(node.name)
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    collect(attribute.g)

    collect(inline_graph(onnx.load(path, load_external_data=False)).graph)
    assert all(names)
    assert len(names) == len(set(names))


def test_overloads_are_kept_apart() -> None:
    def function(overload: str, factor: float) -> onnx.FunctionProto:
        nodes = [
            helper.make_node("Constant", [], ["c"], value_float=factor),
            helper.make_node("Mul", ["x", "c"], ["y"]),
        ]
        opset = [helper.make_opsetid("", 21)]
        return helper.make_function("f", "Scale", ["x"], ["y"], nodes, opset, overload=overload)

    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Scale", ["x"], ["a"], domain="f", overload="two"),
        helper.make_node("Scale", ["a"], ["y"], domain="f", overload="three"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [2])],
        [info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(
        graph,
        functions=[function("two", 2.0), function("three", 3.0)],
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("f", 1)],
        ir_version=10,
    )
    got = run(inline_graph(model), {"x": np.array([1.0, -1.0], np.float32)})
    np.testing.assert_array_equal(got["y"], [6.0, -6.0])


def test_merging_is_transitive_and_keeps_outputs() -> None:
    model = from_text(
        """g (float[n] x) => (float[n] y, float[n] z, float[n] w) {
            a = Neg(x)
            b = Neg(x)
            c = Exp(a)
            d = Exp(b)
            y = Add(c, d)
            z = Add(d, c)
            w = Add(c, d)
        }"""
    )
    flat = inline_graph(model)
    # Neg and Exp once; the three outputs keep nodes of their own.
    assert op_types(flat) == ["Add", "Add", "Add", "Exp", "Neg"]
    x = np.array([0.5, -2.0], np.float32)
    got = run(flat, {"x": x})
    for name in ("y", "z", "w"):
        np.testing.assert_allclose(got[name], 2 * np.exp(-x), rtol=1e-6)


def test_attributes_and_constants_decide_equality() -> None:
    model = from_text(
        """g (float[n, m] x) => (float[k, l] y) {
            one = Constant <value: tensor = float one {1}> ()
            uno = Constant <value: tensor = float uno {1}> ()
            two = Constant <value: tensor = float two {2}> ()
            a = Softmax <axis: int = 0> (x)
            b = Softmax <axis: int = 1> (x)
            c = Mul(a, one)
            d = Mul(a, uno)
            e = Mul(b, two)
            f = Sub(c, e)
            y = Sub(f, d)
        }"""
    )
    flat = inline_graph(model)
    assert op_types(flat).count("Softmax") == 2  # another axis is another value
    assert op_types(flat).count("Constant") == 2  # the tensor's name is not part of its value
    assert op_types(flat).count("Mul") == 2
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_allclose(run(flat, {"x": x})["y"], run(model, {"x": x})["y"], atol=1e-6)


def test_random_numbers_are_not_merged() -> None:
    model = from_text(
        """g (float[n] x) => (float[n] y) {
            a = RandomNormalLike(x)
            b = RandomNormalLike(x)
            y = Sub(a, b)
        }"""
    )
    got = run(inline_graph(model), {"x": np.zeros(64, np.float32)})["y"]
    assert np.abs(got).max() > 0.1


@pytest.mark.parametrize("cond", [True, False])
def test_conditions_capture_renamed_values(cond: bool) -> None:
    """b is merged into a; both bodies refer to it, and one repeats a computation made outside."""
    info = helper.make_tensor_value_info
    then_branch = helper.make_graph(
        [
            helper.make_node("Neg", ["x"], ["inner"]),  # the same as a
            helper.make_node("Exp", ["b"], ["inner_exp"]),
            helper.make_node("Add", ["inner", "inner_exp"], ["then_out"]),
        ],
        "then",
        [],
        [info("then_out", TensorProto.FLOAT, ["n"])],
    )
    else_branch = helper.make_graph(
        [
            helper.make_node("Exp", ["b"], ["inner_exp2"]),
            helper.make_node("Mul", ["inner_exp2", "only_inside"], ["else_out"]),
        ],
        "else",
        [],
        [info("else_out", TensorProto.FLOAT, ["n"])],
    )
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Neg", ["x"], ["b"]),
        helper.make_node("Sqrt", ["unused"], ["dead"]),
        helper.make_node("If", ["c"], ["i"], then_branch=then_branch, else_branch=else_branch),
        # The Exp of the bodies must not serve here: it may not have run.
        helper.make_node("Exp", ["a"], ["outer_exp"]),
        helper.make_node("Add", ["i", "outer_exp"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, ["n"]), info("c", TensorProto.BOOL, [])],
        [info("y", TensorProto.FLOAT, ["n"])],
        [
            numpy_helper.from_array(np.array([3.0], np.float32), "only_inside"),
            numpy_helper.from_array(np.array([3.0], np.float32), "unused"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    flat = inline_graph(model)
    onnx.checker.check_model(flat)
    assert op_types(flat) == ["Add", "Exp", "If", "Neg"]
    assert [i.name for i in flat.graph.initializer] == ["only_inside"]
    bodies = {a.name: [n.op_type for n in a.g.node] for a in flat.graph.node[1].attribute}
    assert bodies == {"then_branch": ["Exp", "Add"], "else_branch": ["Exp", "Mul"]}
    x = np.array([0.5, -1.0], np.float32)
    got = run(flat, {"x": x, "c": np.array(cond)})["y"]
    want = (-x + np.exp(-x) if cond else 3 * np.exp(-x)) + np.exp(-x)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_named_dimensions_come_from_inputs() -> None:
    model = from_text(
        """g (float[batch, seq, 4] x, float[batch, 2] other) => (int64[k] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            seq = Shape <start: int = 0, end: int = 1> (t)
            same = Shape <start: int = 1, end: int = 2> (x)
            batch = Shape <start: int = 0, end: int = 1> (other)
            whole = Shape (t)
            y = Concat <axis: int = 0> (seq, same, batch, whole)
        }"""
    )
    flat = inline_graph(model)
    assert op_types(flat).count("Shape") == 3
    feeds = {"x": np.zeros((2, 3, 4), np.float32), "other": np.zeros((2, 2), np.float32)}
    np.testing.assert_array_equal(run(flat, feeds)["y"], [3, 3, 2, 3, 2, 4])
