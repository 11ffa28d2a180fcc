"""RazorGptAttention over pools and state slots, driven by a fake host and compared with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from drivers import CYCLIC, STATE, GptDriver, gpt_fields, state_store
from fake_host import RUNTIME, Host, Tensor
from harness import Call, Rig, check
from pages import bubble, cyclic_store
from razor_layers import Layer
from razor_memory import LayerStore

from trt_razor.policy import RazorPolicy

GROUPED = Layer(
    num_kv_heads=3,
    group=2,
    retrieval=(0,),
    n_max=72,
    table="pairs",
    policy=RazorPolicy(4, 11, None, 1),
)


def cyclic(layer: Layer, tokens_per_block: int) -> Layer:
    """With a bubble behind its sinks and a ring of whole blocks."""
    layer = replace(layer, bubble=bubble(layer.policy.sink_tokens, tokens_per_block))
    return replace(layer, spare_rows=-layer.ring_rows % tokens_per_block)


# design, tokens_per_block, layer
CASES = {
    "cyclic": (CYCLIC, 8, GROUPED),
    "cyclic-128": (CYCLIC, 32, replace(GROUPED, head_dim=128, group=8, dtype=torch.bfloat16)),
    "cyclic-clusters": (CYCLIC, 32, replace(GROUPED, policy=RazorPolicy(4, 23, None, 5), group=4)),
    "cyclic-no-compensation": (CYCLIC, 8, replace(GROUPED, policy=RazorPolicy(8, 11, None, 0))),
    "cyclic-local-only": (CYCLIC, 8, replace(GROUPED, retrieval=())),
    "cyclic-dense": (CYCLIC, 8, replace(GROUPED, retrieval=(0, 1, 2))),
    "cyclic-growing": (CYCLIC, 16, replace(GROUPED, policy=RazorPolicy(4, 5, 3, 1))),
    "cyclic-alibi": (CYCLIC, 32, replace(GROUPED, position="alibi", head_dim=96)),
    "cyclic-fp8": (CYCLIC, 32, replace(GROUPED, fp8=True, k_scale=0.0625, v_scale=0.0625, group=4)),
    "cyclic-interleaved": (CYCLIC, 8, replace(GROUPED, position="interleaved", rotary_dim=48)),
    "state": (STATE, 8, GROUPED),
    "state-clusters": (STATE, 32, replace(GROUPED, policy=RazorPolicy(4, 23, None, 5), group=4)),
    "state-local-only": (STATE, 8, replace(GROUPED, retrieval=(), dtype=torch.bfloat16)),
    "state-dense": (STATE, 8, replace(GROUPED, retrieval=(0, 1, 2))),
    "state-no-compensation": (STATE, 8, replace(GROUPED, policy=RazorPolicy(4, 11, None, 0))),
    "state-fp8": (STATE, 16, replace(GROUPED, fp8=True, k_scale=0.25, v_scale=0.25)),
    "state-no-position": (
        STATE,
        8,
        replace(GROUPED, position="none", policy=RazorPolicy(0, 9, 4, 1)),
    ),
}


def _contexts(*contexts: tuple[int, int]) -> Call:
    return Call(contexts=contexts, packed=True, use_total=True, one_each=True)


def _tokens(*sequences: int) -> Call:
    return Call(generations=[(s, 1) for s in sequences], packed=True, use_total=True, one_each=True)


PROMPTS = [
    _contexts((0, 31)),
    replace(_contexts((1, 3), (2, 9)), generations=[(0, 1)]),
    *[_tokens(2, 0, 1)] * 12,
]
CHUNK = [
    replace(_contexts((1, 14)), generations=[(2, 1), (0, 1)]),  # a prompt in chunks
    *[_tokens(0, 1, 2)] * 3,
]


def _takes_chunks(design: int, layer: Layer) -> bool:
    """May a context begin past its sequence's first token?"""
    return not layer.local or (design == CYCLIC and layer.bubble > 0)


def _make(host: Host, name: str) -> tuple[GptDriver, Layer, LayerStore]:
    design, tokens_per_block, layer = CASES[name]
    if design == CYCLIC:
        layer = cyclic(layer, tokens_per_block)
    driver = GptDriver(host, layer, tokens_per_block, design)
    make = cyclic_store if design == CYCLIC else state_store
    return driver, layer, make(layer, tokens_per_block, 3, 5)


@pytest.mark.parametrize("name", CASES)
def test_every_call(host: Host, name: str) -> None:
    driver, layer, _ = _make(host, name)
    chunk = CHUNK if _takes_chunks(driver.design, layer) else [_tokens(0, 1, 2)] * 4
    check(driver, layer, PROMPTS + chunk, store=lambda: _make(host, name)[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cyclic", "state"])
def test_slots_pass_from_one_request_to_the_next(host: Host, name: str) -> None:
    """Memory is not cleaned in between."""
    driver, layer, store = _make(host, name)
    rig = Rig(driver, layer, store, seed=3)  # type: ignore[arg-type]
    for request in range(3):
        rig.run([_contexts((request, 20)), *[_tokens(request)] * 3])
        rig.finish(request)


def test_plugin_describes_itself(host: Host) -> None:
    driver, layer, _ = _make(host, "cyclic-fp8")
    inputs = driver.tensors(2, 9, 8, {})
    assert driver.builder.identity == "RazorGptAttention 1 trt_razor"
    assert driver.builder.output_types(inputs) == ["float16"]
    assert driver.builder.output_shapes(inputs) == [[9, layer.num_heads * 64]]
    assert driver.builder.aliased_input(0) == -1
    assert "window=" in driver.builder.metadata
    plain = dict(driver.builder.serialise())
    assert sorted(plain) == sorted(["plan_version", *host.field_names("RazorGptAttention")])
    assert plain["ring_slot_bytes"].dtype == np.int64


def test_building_touches_nothing(host: Host) -> None:
    """TensorRT times plugins on memory of its own: no host arrays, no pools."""
    driver, _, _ = _make(host, "cyclic")
    inputs = driver.tensors(2, 9, 8, {})
    outputs = driver.outputs(inputs, 0)
    assert driver.builder.enqueue(inputs, outputs, 0)
    assert driver.builder.clone().attach().enqueue(inputs, outputs, 0)
    assert driver.host.log() == ""


# Fields -------------------------------------------------------------------------------------------

# name of the case, field, value, reason
FIELDS = [
    ("cyclic", "num_heads", 5, "num_heads: expected a multiple of 3 KV heads"),
    ("cyclic", "num_kv_heads", 999, "num_kv_heads: expected an integer in 1..256, found 999"),
    ("cyclic", "head_dim", 80, "head_dim: expected 64, 96, 128 or 256, found 80"),
    ("cyclic", "num_retrieval", 4, "num_retrieval: expected an integer in 0..3, found 4"),
    ("cyclic", "position", 5, "position: expected an integer in 1..4, found 5"),
    ("cyclic", "rotary_dim", 33, "rotary_dim: expected an even number of at most 64 elements"),
    ("cyclic", "rotary_dim", 0, "rotary_dim: expected an integer in 2..64, found 0"),
    ("cyclic-alibi", "rotary_dim", 96, "rotary_dim: expected 0, found 96"),
    ("cyclic", "max_seq_len", -3, "max_seq_len: expected an integer >= 1, found -3"),
    ("cyclic", "sink_tokens", -1, "sink_tokens: expected an integer >= 0, found -1"),
    ("cyclic", "min_window", 0, "min_window: expected an integer >= 1, found 0"),
    ("cyclic", "compression", -1, "compression: expected an integer >= 0, found -1"),
    (
        "cyclic",
        "comp_tokens",
        2,
        "comp_tokens: expected at most 1 in the 4 rows between sink_tokens = 4",
    ),
    ("cyclic-alibi", "comp_tokens", 2, "comp_tokens: expected 0 or 1 with ALiBi, found 2"),
    ("cyclic", "heavy_hitters", 1, "heavy_hitters: expected 0, found 1"),
    ("cyclic", "scale", float("nan"), "scale: expected a finite number > 0, found nan"),
    ("cyclic", "kv_cache_fp8", 2, "kv_cache_fp8: expected an integer in 0..1, found 2"),
    ("cyclic", "tokens_per_block", 24, "tokens_per_block: expected a power of two, found 24"),
    ("cyclic", "tokens_per_block", 4, "tokens_per_block: expected an integer in 8..1024, found 4"),
    ("cyclic", "local_cache", 3, "local_cache: expected an integer in 1..2, found 3"),
    ("cyclic", "layer_full", -1, "layer_full: expected an integer >= 0, found -1"),
    ("cyclic-local-only", "layer_full", 2, "layer_full: expected -1, found 2"),
    ("cyclic", "layer_local", -1, "layer_local: expected an integer >= 0, found -1"),
    ("cyclic-dense", "layer_local", 7, "layer_local: expected -1, found 7"),
    ("state", "layer_local", 7, "layer_local: expected -1, found 7"),
    ("cyclic", "window", 15, "window: expected an integer >= 16, found 15"),
    (
        "cyclic",
        "window",
        21,
        "window: expected sink_tokens = 4 plus a multiple of tokens_per_block = 8, found 21",
    ),
    ("state", "window", 20, "window: expected 0, found 20"),
    ("cyclic", "ring_slot_bytes", 16, "ring_slot_bytes: expected 0, found 16"),
    ("state", "ring_slot_bytes", 8176, "ring_slot_bytes: expected an integer >= 8192, found 8176"),
    ("state", "ring_slot_bytes", 8200, "ring_slot_bytes: expected a multiple of 16, found 8200"),
    ("cyclic", "comp_slot_bytes", 16, "comp_slot_bytes: expected 0, found 16"),
    ("state", "comp_slot_bytes", 1024, "comp_slot_bytes: expected an integer >= 1040, found 1024"),
]


@pytest.mark.parametrize("name, field, value, reason", FIELDS)
def test_every_field_is_checked(
    host: Host, name: str, field: str, value: float, reason: str
) -> None:
    design, tokens_per_block, layer = CASES[name]
    if design == CYCLIC:
        layer = cyclic(layer, tokens_per_block)
    good = gpt_fields(layer, tokens_per_block, design)
    assert {f for _, f, _, _ in FIELDS} == set(good) == set(host.field_names("RazorGptAttention"))
    assert host.create("RazorGptAttention", good) is not None
    assert host.create("RazorGptAttention", good | {field: value}) is None
    log = host.log()
    assert reason in log
    assert log.startswith("1 [trt_razor] RazorGptAttention 'layer.7': ")
    assert host.create("RazorGptAttention", {k: v for k, v in good.items() if k != field}) is None
    assert f"field {field}: missing" in host.log()


def test_sinks_of_several_blocks_leave_no_place_for_compensation(host: Host) -> None:
    """A prompt of 3 tokens has the first of the two blocks of 12 sinks; the bubble is in the second."""
    fields = gpt_fields(cyclic(GROUPED, 8), 8, CYCLIC) | {"sink_tokens": 12, "window": 28}
    assert host.create("RazorGptAttention", fields | {"comp_tokens": 0}) is not None
    assert host.create("RazorGptAttention", fields) is None
    reason = "field sink_tokens: expected at most tokens_per_block = 8 with compensation tokens "
    assert reason in host.log()


def test_unknown_fields_and_other_plans(host: Host) -> None:
    driver, _, _ = _make(host, "state")
    assert host.create("RazorGptAttention", driver.fields | {"beam_width": 1}) is None
    assert "field beam_width: unknown; known: num_heads, " in host.log()
    plan = dict(driver.builder.serialise())
    assert host.create("RazorGptAttention", plan | {"plan_version": 7}, RUNTIME) is None
    assert "field plan_version: expected 1, found 7" in host.log()
    assert host.create("RazorGptAttention", driver.fields, RUNTIME) is None
    assert "field plan_version: missing" in host.log()


# Inputs -------------------------------------------------------------------------------------------

SHAPES = [
    ("cyclic", "qkv", [9, 100], "input qkv: expected shape [?, 768], found [9, 100]"),
    ("cyclic", "host_past_key_value_lengths", [3], "expected shape [2], found [3]"),
    ("cyclic", "host_sink_token_length", [2], "expected shape [1], found [2]"),
    ("cyclic", "context_lengths", [1], "expected shape [2], found [1]"),
    (
        "cyclic",
        "cache_indirection",
        [2, 4, 72],
        "expected a beam width of 1, found shape [2, 4, 72]",
    ),
    ("cyclic", "host_request_types", [1], "expected shape [2], found [1]"),
    ("cyclic", "kv_cache_block_offsets", [2, 2, 8], "expected shape [?, 2, 2, ?], found [2, 2, 8]"),
    ("cyclic", "host_kv_cache_pool_pointers", [2, 3], "expected shape [?, 2], found [2, 3]"),
    ("cyclic", "host_kv_cache_pool_mapping", [10], "expected shape [?, 2], found [10]"),
    ("cyclic-fp8", "kv_quant_orig_scale", [3], "expected shape [1], found [3]"),
    ("cyclic", "rotary_cos_sin", [1, 71 * 64], "for at least max_seq_len = 72 positions"),
    ("cyclic-alibi", "alibi_slopes", [5], "expected shape [6], found [5]"),
    ("cyclic", "host_context_lengths", [3], "expected shape [2], found [3]"),
    ("state", "slot_mapping", [3], "expected shape [2], found [3]"),
    ("state", "conv_state_ptr", [2], "expected shape [1], found [2]"),
    ("state", "rnn_state_ptr", [0], "expected shape [1], found [0]"),
]


@pytest.mark.parametrize("case, name, shape, reason", SHAPES)
def test_every_shape_is_checked(
    host: Host, case: str, name: str, shape: list[int], reason: str
) -> None:
    driver, _, _ = _make(host, case)
    inputs = driver.tensors(2, 9, 8, {})
    outputs = driver.outputs(inputs, 0)
    inputs[driver.input_names.index(name)].shape = shape
    assert not driver.runtime.shape_change(inputs, outputs)
    log = driver.host.log()
    assert f"input {name}: " in log
    assert reason in log
    assert driver.builder.output_shapes(inputs) is None
    assert driver.host.log() == log


@pytest.mark.parametrize(
    "case, name, dtype",
    [
        ("cyclic", "qkv", "float32"),
        ("cyclic", "sequence_length", "int64"),
        ("cyclic", "host_kv_cache_pool_pointers", "int32"),
        ("cyclic", "rotary_cos_sin", "float16"),
        ("cyclic-alibi", "alibi_slopes", "float16"),
        ("cyclic-fp8", "kv_quant_orig_scale", "float16"),
        ("state", "slot_mapping", "int64"),
        ("state", "conv_state_ptr", "int32"),
    ],
)
def test_types_are_checked(host: Host, case: str, name: str, dtype: str) -> None:
    driver, _, _ = _make(host, case)
    inputs = driver.tensors(2, 9, 8, {})
    outputs = driver.outputs(inputs, 0)
    place = driver.input_names.index(name)
    inputs[place].dtype = dtype
    assert driver.builder.refused_format(inputs, outputs) == place
    assert driver.builder.output_types(inputs) is None
    assert f"input {name}: found {dtype}; expected " in driver.host.log()


# What the server says -----------------------------------------------------------------------------


def _ints(values: object, dtype: type = np.int32) -> np.ndarray:
    return np.ascontiguousarray(values, dtype)


# case, input, what it says, reason. The call: a chunk of 9 tokens (31 cached), two tokens.
SERVER = [
    (
        "cyclic",
        "host_max_attention_window_sizes",
        _ints([72, 12] * 5),
        "input host_max_attention_window_sizes[7] (local heads): expected the planned window 20, found 12; "
        "give the server the windows that the engine's manifest.json or config.json",
    ),
    (
        "cyclic",
        "host_max_attention_window_sizes",
        _ints([72, 28] * 5),
        "expected the planned window 20, found 28",
    ),
    (
        "cyclic",
        "host_max_attention_window_sizes",
        _ints([64, 20] * 5),
        "input host_max_attention_window_sizes[6] (retrieval heads): expected at least max_seq_len = 72, found 64",
    ),
    (
        "state",
        "host_max_attention_window_sizes",
        _ints([64] * 10),
        "expected at least max_seq_len = 72, found 64; give the server the windows",
    ),
    (
        "cyclic",
        "host_max_attention_window_sizes",
        _ints([72, 20] * 3),
        "expected a window for cache layer 6, found 6 windows",
    ),
    (
        "cyclic",
        "host_sink_token_length",
        _ints([0]),
        "input host_sink_token_length: expected 4, found 0; set sink_token_length to 4",
    ),
    (
        "state",
        "host_sink_token_length",
        _ints([4]),
        "input host_sink_token_length: expected 0, found 4",
    ),
    (
        "cyclic",
        "host_request_types",
        _ints([1, 0, 1]),
        "host_request_types[1]: expected contexts before",
    ),
    (
        "cyclic",
        "host_request_types",
        _ints([0, 2, 1]),
        "host_request_types[1]: expected 0 (context) or 1",
    ),
    (
        "cyclic",
        "host_request_types",
        _ints([1, 1, 1]),
        "input qkv: expected 3 tokens (0 of contexts, one of each of 3 generations), found 11",
    ),
    (
        "cyclic",
        "host_context_lengths",
        _ints([0, 5, 5]),
        "host_context_lengths[0]: expected at least 1 token",
    ),
    (
        "cyclic",
        "host_past_key_value_lengths",
        _ints([8, 3, 3]),
        "host_past_key_value_lengths[0]: expected at least the 9 tokens of this chunk, found 8",
    ),
    (
        "cyclic",
        "host_past_key_value_lengths",
        _ints([9, 3, 73]),
        "host_past_key_value_lengths[2]: expected 0..max_seq_len = 72 tokens, found 73",
    ),
    (
        "cyclic",
        "host_kv_cache_pool_mapping",
        _ints([[0, 0]] * 5),
        "input host_kv_cache_pool_mapping: expected a row 6, found 5 rows",
    ),
    (
        "cyclic",
        "host_kv_cache_pool_mapping",
        _ints([[2, 0]] * 10),
        "input host_kv_cache_pool_mapping[6]: expected one of 2 pools and a layer in it, found 2, 0",
    ),
    (
        "cyclic",
        "host_kv_cache_pool_pointers",
        _ints([[0, 0]] * 2, np.int64),
        "input host_kv_cache_pool_pointers[0]: expected an address, found 0",
    ),
    (
        "cyclic",
        "host_kv_cache_pool_pointers",
        _ints([[4096, 0]], np.int64),
        "input host_kv_cache_pool_pointers: expected 2 pools, as kv_cache_block_offsets has, found 1",
    ),
    (
        "state",
        "host_past_key_value_lengths",
        _ints([17, 3, 3]),
        "host_past_key_value_lengths[0]: expected the tokens of the prompt alone, found 8 before them: a "
        "reused prefix or a later chunk, whose local heads are in no state slot; disable KV cache reuse",
    ),
    (
        "cyclic-no-compensation",
        "host_past_key_value_lengths",
        _ints([17, 3, 3]),
        "host_past_key_value_lengths[0]: expected the tokens of the prompt alone, found 8 before them: with "
        "sink_tokens = 8, whole blocks of 8, a later chunk cannot be told from a reused prefix",
    ),
    (
        "state",
        "conv_state_ptr",
        _ints([0], np.int64),
        "input conv_state_ptr: expected an address, found 0",
    ),
    (
        "state",
        "rnn_state_ptr",
        _ints([0], np.int64),
        "input rnn_state_ptr: expected an address, found 0",
    ),
]


@pytest.mark.parametrize(
    "case, name, values, reason",
    SERVER,
    ids=[f"{c}-{n}-{i}" for i, (c, n, _, _) in enumerate(SERVER)],
)
def test_a_server_with_other_settings_is_refused(
    host: Host, case: str, name: str, values: np.ndarray, reason: str
) -> None:
    driver, layer, store = _make(host, case)
    rig = Rig(driver, layer, store, seed=3)  # type: ignore[arg-type]
    rig.run([_contexts((1, 3), (2, 3))])
    caches = [b.array.copy() for b in store.buffers]
    driver.change = {name: Tensor(str(values.dtype), values.shape, values.ctypes.data)}
    with pytest.raises(AssertionError, match="trt_razor") as caught:
        rig.call(replace(_contexts((0, 9)), generations=[(1, 1), (2, 1)]))
    assert reason in str(caught.value)
    for buffer, before in zip(store.buffers, caches, strict=True):
        assert np.array_equal(buffer.array, before), f"{buffer.name} was written"


def test_one_block_short(host: Host) -> None:
    """A server that does not count the bubble."""
    driver, _, _ = _make(host, "cyclic")
    types, mapping = np.array([1], np.int32), np.zeros((10, 2), np.int32)
    windows, sinks = np.array([72, 20] * 5, np.int32), np.array([4], np.int32)
    past, pools = np.array([7], np.int32), np.full((2, 2), 4096, np.int64)
    data = {
        "host_request_types": types,
        "host_kv_cache_pool_mapping": mapping,
        "host_max_attention_window_sizes": windows,
        "host_sink_token_length": sinks,
        "host_past_key_value_lengths": past,
        "host_context_lengths": past,
        "host_kv_cache_pool_pointers": pools,
    }
    inputs = driver.tensors(1, 1, 9, {k: v.ctypes.data for k, v in data.items()})
    assert not driver.runtime.enqueue(inputs, driver.outputs(inputs, 0), 0)
    reason = "expected at least 10 blocks a sequence for 76 rows of cache layer 6, found 9"
    assert reason in driver.host.log()


# What TensorRT-LLM does with profiles and graphs --------------------------------------------------


@pytest.mark.parametrize("name", ["cyclic", "state", "cyclic-fp8"])
def test_profiles_range_over_numbers_of_pools(host: Host, name: str) -> None:
    """An engine accepts any number of pools; how many there are is known when it runs."""
    driver, _, _ = _make(host, name)
    least, most = driver.tensors(1, 1, 1, {}, pools=1), driver.tensors(8, 64, 10, {}, pools=10)
    # TensorRT-LLM may give the pointers another upper end than the offsets.
    most[driver.input_names.index("host_kv_cache_pool_pointers")].shape = [5, 2]
    inputs = [
        replace(
            small,
            shape=[m if m == n else -1 for m, n in zip(small.shape, large.shape, strict=True)],
        )
        for small, large in zip(least, most, strict=True)
    ]
    for tensor, small, large in zip(inputs, least, most, strict=True):
        tensor.least, tensor.most = small.shape, large.shape
    outputs = [replace(driver.outputs(least, 0)[0], most=[64, driver.layer.num_heads * 64])]
    assert driver.builder.output_shapes(inputs) is not None, driver.host.log()
    assert driver.builder.configure(inputs, outputs), driver.host.log()
    assert driver.builder.workspace_size(inputs, outputs) > 0


@pytest.mark.parametrize("name", ["cyclic", "cyclic-clusters", "state", "state-fp8"])
@pytest.mark.parametrize("rounded", [64, 71])
def test_a_captured_graph_has_lengths_rounded_up(host: Host, name: str, rounded: int) -> None:
    """The host's lengths of generations are upper bounds only; the device knows the true ones."""

    def calls(rig: Rig) -> Iterator[Call]:
        driver.change = {}
        yield _contexts((0, 31), (1, 5), (2, 12))
        past = _ints([rounded] * 3)
        driver.change = {"host_past_key_value_lengths": Tensor("int32", [3], past.ctypes.data)}
        yield from [_tokens(2, 0, 1)] * 14

    driver, layer, _ = _make(host, name)
    check(driver, layer, calls, store=lambda: _make(host, name)[2])  # type: ignore[arg-type]
