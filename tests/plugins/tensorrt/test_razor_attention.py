"""RazorAttention, driven through its whole life by a fake host and compared with the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drivers import AttentionDriver, dense_store
from fake_host import RUNTIME, FieldValue, Host, Tensor
from harness import Call, check
from razor_layers import Layer

from trt_razor.policy import RazorPolicy

GROUPED = Layer(num_kv_heads=3, group=2, retrieval=(1,), n_max=64)
POLICY = GROUPED.policy

CASES = {
    "grouped": GROUPED,
    "no-retrieval-heads": replace(GROUPED, retrieval=()),
    "dense": replace(GROUPED, retrieval=(0, 1, 2)),
    "no-compensation": replace(GROUPED, policy=POLICY.with_(comp_tokens=0)),
    "clusters": replace(GROUPED, policy=POLICY.with_(comp_tokens=5), group=4),
    "growing-window": replace(GROUPED, policy=RazorPolicy(4, 3, 3, 1), head_dim=128),
    "alibi": replace(GROUPED, position="alibi", head_dim=96, dtype=torch.bfloat16),
    "fp8": replace(GROUPED, fp8=True, group=8, dtype=torch.bfloat16),
    "heavy-hitters": replace(GROUPED, policy=POLICY.with_(heavy_hitters=4, comp_tokens=2)),
    "heavy-hitters-alone": replace(GROUPED, policy=POLICY.with_(heavy_hitters=9, comp_tokens=0)),
}

SCHEDULE = [
    Call(contexts=[(0, 5), (1, 3), (2, 0)], slack=1),  # nothing dropped yet, a slot is idle
    Call(contexts=[(0, 14), (1, 2), (2, 1)]),
    *[Call(generations=[(0, 1), (1, 1), (2, 0)])] * 4,
    Call(contexts=[(0, 3), (1, 0), (2, 17)]),
    *[Call(generations=[(0, 1), (1, 0), (2, 1)])] * 3,
]


@pytest.mark.parametrize("name", CASES)
def test_every_call(host: Host, name: str) -> None:
    driver, layer = AttentionDriver(host, CASES[name]), CASES[name]
    check(driver, layer, SCHEDULE, store=lambda: dense_store(layer, 3))  # type: ignore[arg-type]


def test_plugin_describes_itself(host: Host) -> None:
    driver = AttentionDriver(host, GROUPED)
    plugin = driver.builder
    assert plugin.identity == "RazorAttention 1 trt_razor"
    inputs = driver.tensors(3, 7, 20)
    for i in (0, 1, 2, 3):
        # The batch, the tokens of a chunk and the length of past_span are known at run time.
        inputs[i].least, inputs[i].most = [1] * len(inputs[i].shape), list(inputs[i].shape)
        inputs[i].least[2:] = inputs[i].shape[2:]
    assert plugin.output_types(inputs) == ["float16", *(t.dtype for t in inputs[5:])]
    expected = [[3, 7, 6 * 64], *(list(t.shape) for t in inputs[5:])]
    assert plugin.output_shapes(inputs) == expected
    assert [plugin.aliased_input(i) for i in range(8)] == [-1, 5, 6, 7, 8, 9, 10, 11]
    assert plugin.format_limit == 4
    assert "num_kv_heads=3" in plugin.metadata
    assert "retrieval_mask=0,1,0" in plugin.metadata
    assert plugin.timing_id.startswith(plugin.metadata)
    other = AttentionDriver(host, replace(GROUPED, retrieval=(2,))).builder
    assert other.timing_id != plugin.timing_id


def test_workspace_holds_smaller_calls(host: Host) -> None:
    """TensorRT makes it once, for the largest shapes of the profiles."""
    driver = AttentionDriver(host, GROUPED)
    sizes = []
    for batch, chunk, past in ((1, 1, 1), (3, 1, 1), (3, 9, 1), (3, 9, 60), (3, 40, 60)):
        inputs = driver.tensors(batch, chunk, past)
        sizes.append(driver.builder.workspace_size(inputs, driver.outputs(inputs, 0)))
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


# Fields -------------------------------------------------------------------------------------------

FIELDS = {
    "num_heads": (7, "num_heads: expected a multiple of 3 KV heads, at most 16384, found 7"),
    "num_kv_heads": (0, "field num_kv_heads: expected an integer in 1..256, found 0"),
    "head_dim": (80, "head_dim: expected 64, 96, 128 or 256, found 80"),
    "retrieval_heads": (
        [2, 1],
        "field retrieval_heads: expected ascending KV heads, found 1 after 2",
    ),
    "max_seq_len": (0, "field max_seq_len: expected an integer >= 1, found 0"),
    "sink_tokens": (-1, "field sink_tokens: expected an integer >= 0, found -1"),
    "min_window": (0, "field min_window: expected an integer >= 1, found 0"),
    "compression": (-2, "field compression: expected an integer >= 0, found -2"),
    "comp_tokens": (257, "field comp_tokens: expected an integer in 0..256, found 257"),
    "heavy_hitters": (1025, "field heavy_hitters: expected an integer in 0..1024, found 1025"),
    "scale": (0.0, "field scale: expected a finite number > 0, found 0.000000"),
}


def _refusal(host: Host, fields: object, phase: int = 0) -> str:
    assert host.create("RazorAttention", fields, phase) is None  # type: ignore[arg-type]
    log = host.log()
    assert log.startswith("1 [trt_razor] RazorAttention 'layer.7': ")
    assert log.count("\n") == 1
    return log


def _good(host: Host) -> dict[str, FieldValue]:
    return dict(AttentionDriver(host, GROUPED).fields)


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_checked(host: Host, name: str) -> None:
    good = _good(host)
    assert set(FIELDS) == set(good)
    value, reason = FIELDS[name]
    assert reason in _refusal(host, good | {name: value})
    del good[name]
    assert f"field {name}: missing" in _refusal(host, good)


def test_field_types(host: Host) -> None:
    good = _good(host)
    wide = {
        n: np.asarray(v, np.float64 if n == "scale" else np.int64).reshape(-1)
        for n, v in good.items()
    }
    assert host.create("RazorAttention", wide) is not None
    assert "field num_heads: expected type INT32 or INT64, found FLOAT32" in _refusal(
        host, good | {"num_heads": 6.0}
    )
    assert "field scale: expected type FLOAT32 or FLOAT64, found INT32" in _refusal(
        host, good | {"scale": 1}
    )
    assert "field head_dim: expected one integer, found 2" in _refusal(
        host, good | {"head_dim": [64, 64]}
    )
    assert "field head_dim: expected one value, found the field twice" in _refusal(
        host, [*good.items(), ("head_dim", 64)]
    )
    assert "field windows: unknown; known: num_heads, " in _refusal(host, good | {"windows": 3})
    assert "fields: expected a collection, found none" in _refusal(host, None)


def test_a_plan_of_another_version_is_refused(host: Host) -> None:
    plan = dict(AttentionDriver(host, GROUPED).builder.serialise())
    assert host.create("RazorAttention", plan, RUNTIME) is not None
    reason = _refusal(host, plan | {"plan_version": 2}, RUNTIME)
    assert "plan_version: expected 1, found 2; the engine was built with another version" in reason
    del plan["plan_version"]
    assert "plan_version: missing" in _refusal(host, plan, RUNTIME)
    # Fields of a node are no plan, and the other way round.
    assert "plan_version: missing" in _refusal(host, _good(host), RUNTIME)
    assert "retrieval_heads: missing" in _refusal(host, plan)


# Tensors ------------------------------------------------------------------------------------------

SHAPES = {
    "qkv": ([3, 7, 700], "input qkv: expected shape [?, ?, 768], found [3, 7, 700]"),
    "past": ([2], "input past: expected shape [3], found [2]"),
    "chunk": ([3, 1], "input chunk: expected shape [3], found [3, 1]"),
    "past_span": ([0], "input past_span: expected a length >= 1, found 0"),
    "cos_sin": ([63, 64], "input cos_sin: expected at least max_seq_len = 64 positions, found 63"),
    "full_k": ([3, 1, 63, 64], "input full_k: expected shape [3, 1, 64, 64], found [3, 1, 63, 64]"),
    "full_v": ([3, 2, 64, 64], "input full_v: expected shape [3, 1, 64, 64]"),
    "local_k": (
        [3, 2, 64, 64],
        "input local_k: expected shape [3, 2, 9, 64], found [3, 2, 64, 64]",
    ),
    "local_v": ([2, 2, 9, 64], "input local_v: expected shape [3, 2, 9, 64]"),
    "comp": ([3, 2, 1, 64, 2], "input comp: expected shape [3, 2, 1, 2, 64]"),
    "comp_log_weight": ([3, 2, 2], "input comp_log_weight: expected shape [3, 2, 1]"),
    "comp_count": ([3, 1, 1], "input comp_count: expected shape [3, 2, 1]"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_checked(host: Host, name: str) -> None:
    """When the network is made, for both ends of a profile, and at run time."""
    driver = AttentionDriver(host, GROUPED)
    inputs = driver.tensors(3, 7, 20)
    outputs = driver.outputs(inputs, 0)
    place = driver.input_names.index(name)
    shape, reason = SHAPES[name]
    inputs[place].shape = shape
    for refuses in (
        lambda: driver.builder.output_shapes(inputs) is None,
        lambda: not driver.builder.configure(inputs, outputs),
        lambda: not driver.runtime.shape_change(inputs, outputs),
        lambda: not driver.runtime.enqueue(inputs, outputs, 0),
    ):
        assert refuses()
        assert reason in driver.host.log()


TYPES = [
    ("qkv", "float32"),
    ("qkv", "int32"),
    ("past", "int64"),
    ("chunk", "float16"),
    ("past_span", "int32"),
    ("cos_sin", "float16"),
    ("full_k", "bfloat16"),
    ("full_v", "float8_e4m3fn"),  # and full_k is not
    ("local_v", "float32"),
    ("comp", "float16"),
    ("comp_count", "int32"),
]


@pytest.mark.parametrize("name, dtype", TYPES)
def test_every_type_is_checked(host: Host, name: str, dtype: str) -> None:
    driver = AttentionDriver(host, GROUPED)
    inputs = driver.tensors(3, 7, 20)
    outputs = driver.outputs(inputs, 0)
    place = driver.input_names.index(name)
    inputs[place].dtype = dtype
    assert driver.builder.refused_format(inputs, outputs) == place
    assert driver.host.log() == ""  # TensorRT tries everything
    assert driver.builder.output_types(inputs) is None
    shown = "cos_sin or alibi_slopes" if name == "cos_sin" else name
    shown_type = dtype.removesuffix("fn")
    assert f"input {shown}: found {shown_type}; expected qkv in float16" in driver.host.log()


def test_only_linear_tensors(host: Host) -> None:
    driver = AttentionDriver(host, GROUPED)
    inputs = driver.tensors(3, 7, 20)
    outputs = driver.outputs(inputs, 0)
    outputs[2].linear = False
    assert driver.builder.refused_format(inputs, outputs) == len(inputs) + 2
    outputs[2] = Tensor("float32", outputs[2].shape)
    assert driver.builder.refused_format(inputs, outputs) == len(inputs) + 2


def test_number_of_tensors(host: Host) -> None:
    driver = AttentionDriver(host, GROUPED)
    inputs = driver.tensors(3, 7, 20)[:-1]
    assert driver.builder.output_types(inputs) is None
    reason = "expected 12 inputs (qkv, past, chunk, past_span, cos_sin or alibi_slopes, full_k, "
    assert reason in driver.host.log()


def test_clusters_have_no_position(host: Host) -> None:
    layer = replace(GROUPED, policy=POLICY.with_(comp_tokens=2))
    driver = AttentionDriver(host, layer)
    inputs = driver.tensors(3, 7, 20)
    inputs[4] = Tensor("float32", [layer.num_heads])
    assert driver.builder.output_shapes(inputs) is None
    assert "field comp_tokens: expected 0 or 1 with alibi_slopes, found 2" in driver.host.log()


def test_heavy_hitters_have_no_position(host: Host) -> None:
    layer = replace(GROUPED, policy=POLICY.with_(heavy_hitters=2))
    driver = AttentionDriver(host, layer)
    inputs = driver.tensors(3, 7, 20)
    inputs[4] = Tensor("float32", [layer.num_heads])
    assert driver.builder.output_shapes(inputs) is None
    assert "field heavy_hitters: expected 0 with alibi_slopes, found 2" in driver.host.log()


def test_caches_must_be_updated_in_place(host: Host) -> None:
    driver = AttentionDriver(host, GROUPED)
    names = driver.input_names
    inputs = driver.tensors(3, 7, 20, {n: 4096 * (i + 1) for i, n in enumerate(names)})
    outputs = driver.outputs(inputs, 1 << 20)
    outputs[3].data += 256
    assert not driver.runtime.enqueue(inputs, outputs, 0)
    assert "output local_k_out: expected the memory of its input" in driver.host.log()


def test_timing_on_any_memory_while_building(host: Host) -> None:
    """Buffers of the builder's own, full of noise: nothing is refused, and nothing else is touched."""
    driver = AttentionDriver(host, GROUPED)
    rng = np.random.default_rng(0)
    memory: list[np.ndarray] = []

    def buffer(tensor: Tensor) -> None:
        size = int(np.prod(tensor.shape)) * 4  # enough for any type
        memory.append(rng.integers(0, 256, size + 512, np.uint8))
        tensor.data = memory[-1].ctypes.data + -memory[-1].ctypes.data % 256

    inputs = driver.tensors(3, 7, 20)
    outputs = driver.outputs(inputs, 0)
    workspace = np.zeros(driver.builder.workspace_size(inputs, outputs) + 256, np.uint8)
    for tensor in [*inputs, *outputs]:
        buffer(tensor)
    assert driver.builder.configure(inputs, outputs), driver.host.log()
    assert driver.builder.enqueue(inputs, outputs, workspace.ctypes.data), driver.host.log()
