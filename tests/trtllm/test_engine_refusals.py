"""Engines and sections of checkpoints that are refused, and how they are told from others."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from engine_plans import NEW, OLD, POLICY, SPEC, WIDE, plan, section

from trt_razor.errors import UsageError
from trt_razor.models.spec import ModelSpec, RopeSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import (
    RazorSection,
    TrtLlmOptions,
    check_engine,
    check_policy,
    plan_engine,
)
from trt_razor.trtllm.release import LocalCache

# What is refused ----------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no retrieval heads": (
        {"counts": (0,) * 4},
        "head map: no retrieval heads at all.*at least one",
    ),
    "only retrieval heads": (
        {"counts": (4,) * 4},
        r"every KV head retrieves .*on 1 ranks.*build without --razor",
    ),
    "nothing dropped": (
        {"policy": POLICY.with_(min_window=4000)},
        "1000 tokens all fit.*--min-window",
    ),
    "compression 1": ({"policy": POLICY.with_(compression=1)}, "1000 tokens all fit"),
    "too few counts": (
        {"counts": (1, 1, 1)},
        r"num_retrieval: expected 4 counts of 0..4, found \[1, 1, 1\]",
    ),
    "too many heads": ({"counts": (1, 1, 1, 5)}, "num_retrieval: expected 4 counts of 0..4"),
    "positions": ({"max_seq_len": 4097}, "max_seq_len: expected at most 4096.*found 4097"),
    "no length": ({"max_seq_len": 0}, "max_seq_len: expected an integer >= 1, found 0"),
    "float32": ({"dtype": "float32"}, "dtype: expected float16 or bfloat16 .* found float32"),
    "int8 caches": ({"kv_dtype": "int8"}, "kv_dtype: expected auto or fp8, found 'int8'"),
    "block of 4": ({"tokens_per_block": 4}, r"tokens_per_block: .*8..1024, found 4"),
    "block of 48": ({"tokens_per_block": 48}, "tokens_per_block: expected a power of two"),
    "block of 2048": ({"tokens_per_block": 2048}, r"8..1024, found 2048"),
    "no tokens": ({"max_num_tokens": 0}, "max_num_tokens: expected >= 1, found 0"),
    "yarn": (
        {"spec": dataclasses.replace(SPEC, rope=RopeSpec(scaling="yarn", factor=2.0))},
        "rope scaling 'yarn'.*use --backend",
    ),
    "head_dim": (
        {"spec": dataclasses.replace(SPEC, head_dim=80)},
        "head_dim: the plugin has kernels for 64, 96, 128, 256, found 80",
    ),
    "no stage": ({"pp_size": 0}, "pp_size: expected >= 1, found 0"),
    "uneven stages": ({"pp_size": 3}, "pp_size: expected a divisor of the 4 layers"),
    "unequal layers": ({"pp_size": 2}, r"pp_size: 2 needs the same number.*found 0..4 of 4"),
    "stages without retrieval": (
        {"pp_size": 2, "counts": (0, 1, 0, 1)},
        "pp_size: 2 needs the same number",
    ),
    "stages of baichuan": (
        {"pp_size": 2, "spec": dataclasses.replace(SPEC, architecture="baichuan")},
        "Baichuan has no pipeline parallelism",
    ),
    "fp8 in chunks": ({"kv_dtype": "fp8", "chunk": 64}, "prefill_chunk: .*FP8.*--prefill-chunk 0"),
    "ranks": ({"tp_size": 3}, "tp_size: expected a divisor of the 8 attention heads"),
    "one head on a rank": ({"tp_size": 4}, "leaves each rank one of the 4 KV heads"),
    "shared heads": ({"tp_size": 8}, "ranks that share a KV head"),
    "alibi": (
        {
            "spec": dataclasses.replace(SPEC, position="alibi"),
            "policy": POLICY.with_(comp_tokens=2),
        },
        "comp_tokens: 2 with ALiBi.*--comp-tokens 1",
    ),
    "heavy hitters": (
        {"policy": POLICY.with_(heavy_hitters=8)},
        "heavy_hitters: 8: .* no rows for them.*--heavy-hitters 0",
    ),
}
REFUSED_SLOTS: dict[str, tuple[dict[str, Any], str]] = {
    "cyclic": (
        {"local_cache": LocalCache.CYCLIC},
        r"local_cache: TensorRT-LLM 1\.2\.1 has no cyclic cache.*leave --local-cache out",
    ),
    "stages": (
        {"pp_size": 2, "counts": (1,) * 4},
        "pp_size: 2 with local heads in state slots.*--tp-size, or TensorRT-LLM 1.0",
    ),
    "chunks": (
        {"chunk": 512},
        "prefill_chunk: 512 with local heads in state slots.*--prefill-chunk 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_every_release(case: str) -> None:
    changes, message = REFUSED[case]
    for version in ("1.0.0", "1.1.0"):
        if version == "1.1.0" and changes.get("pp_size") == 2:
            continue  # refused for another reason there
        with pytest.raises(UsageError, match=message) as e:
            plan(version, **changes)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("case", REFUSED_SLOTS)
def test_refused_with_state_slots(case: str) -> None:
    changes, message = REFUSED_SLOTS[case]
    with pytest.raises(UsageError, match=message):
        plan("1.2.1", **changes)
    assert plan("1.0.0", **changes).local_cache is LocalCache.CYCLIC


def test_refused_for_a_checkpoint_of_another_model_or_number_of_ranks() -> None:
    other = section(spec=WIDE)
    with pytest.raises(UsageError, match="ordered for another model than 'tiny'; convert it again"):
        plan_engine(SPEC, other, 1000, "float16", TrtLlmOptions(), OLD)
    for tp_size in (1, 2):
        found = section((1, 1, 1, 1), tp_size=3 - tp_size)
        options = TrtLlmOptions(tp_size=tp_size)
        match = (
            f"tp_size: the checkpoint's heads are ordered for {3 - tp_size} ranks, found {tp_size}"
        )
        with pytest.raises(UsageError, match=match):
            plan_engine(SPEC, found, 1000, "float16", options, OLD)


def test_refused_for_slots_beyond_what_the_runtime_can_count() -> None:
    long = dataclasses.replace(SPEC, max_positions=1 << 24)
    limit = (1 << 31) // (2 * 3 * 128) - 4 - 1  # rows of 3 local heads; one more is a row too many
    fits = RazorPolicy(4, limit - 1, None, 1)
    p = plan("1.2.1", counts=(1,) * 4, spec=long, max_seq_len=1 << 23, policy=fits)
    assert p.state_config()["rnn_conv_dim_size"] <= (1 << 31) - 1
    with pytest.raises(
        UsageError, match=r"max_seq_len: the window of 3 local heads takes [\d,]+ bytes"
    ):
        plan(
            "1.2.1",
            counts=(1,) * 4,
            spec=long,
            max_seq_len=1 << 23,
            policy=fits.with_(min_window=limit + 1),
        )


def test_pipeline_stages_with_equal_layers_number_their_rows_from_0() -> None:
    p = plan(counts=(1, 1, 1, 1), pp_size=2)
    assert (p.pp_size, len(p.kv_heads)) == (2, 8)
    fields = [p.plugin_fields(i, first_layer=2 * (i // 2), attention={}) for i in range(4)]
    assert [(f["layer_full"], f["layer_local"]) for f in fields] == [(0, 1), (2, 3)] * 2
    # A GPU has the caches of its own stage only.
    whole = plan(counts=(1, 1, 1, 1))
    for tokens in (10, 1000):
        assert 2 * p.sequence_bytes(tokens) == whole.sequence_bytes(tokens)
        assert 2 * p.dense_bytes(tokens) == whole.dense_bytes(tokens)


def test_a_dense_engine_may_have_what_a_razor_engine_may_not() -> None:
    def check(spec: ModelSpec = SPEC, chunk: int = 0, **options: Any) -> None:
        check_engine(spec, 1000, "bfloat16", TrtLlmOptions(**options), NEW, False, chunk)

    check(dataclasses.replace(SPEC, head_dim=80))
    check(tp_size=4)
    check(tp_size=8)
    check(chunk=512)
    check(pp_size=2)
    for changes, message in (
        ({"tp_size": 3}, "tp_size"),
        ({"pp_size": 3}, "pp_size"),
        ({"kv_dtype": "int8"}, "kv_dtype"),
        ({"kv_dtype": "fp8", "chunk": 4}, "prefill_chunk"),
        ({"spec": dataclasses.replace(SPEC, rope=RopeSpec(scaling="yarn"))}, "yarn"),
    ):
        with pytest.raises(UsageError, match=message):
            check(**changes)


# The section of a checkpoint ----------------------------------------------------------------------
def test_a_section_survives_json() -> None:
    for policy in (POLICY, RazorPolicy(), POLICY.with_(comp_tokens=32, compression=7)):
        one = section(policy=policy, tp_size=2)
        text = json.dumps(one.to_json())
        assert RazorSection.from_json(json.loads(text)) == one
    assert len(json.dumps(section((3,) * 80).to_json())) < 700  # a line of a log


DAMAGED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "razor: expected an object, found NoneType; convert"),
    "a list": ([1], "razor: expected an object, found list"),
    "version": (
        {"version": 2},
        r"razor\.version: expected 1, found 2; convert the checkpoint again",
    ),
    "no version": ({"version": None}, r"razor\.version: expected 1, found None"),
    "model": ({"model": 5}, r"razor\.model: expected str, found 5"),
    "heads": ({"heads": None}, r"razor\.heads: expected str, found None"),
    "tp_size": ({"tp_size": "2"}, r"razor\.tp_size: expected int, found '2'"),
    "true is no number": ({"tp_size": True}, r"razor\.tp_size: expected int, found True"),
    "policy": ({"policy": [4]}, r"razor\.policy: expected Mapping, found \[4\]"),
    "counts": ({"num_retrieval": 3}, r"razor\.num_retrieval: expected a list of counts, found 3"),
    "negative": ({"num_retrieval": [1, -1]}, r"razor\.num_retrieval: .*found \[1, -1\]"),
    "fraction": ({"num_retrieval": [1.0]}, r"razor\.num_retrieval: .*found \[1\.0\]"),
    "flag": ({"num_retrieval": [True]}, r"razor\.num_retrieval"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_section_is_named(case: str) -> None:
    change, message = DAMAGED[case]
    data = {**section().to_json(), **change} if isinstance(change, dict) else change
    with pytest.raises(UsageError, match=f"^a/config.json: {message}"):
        RazorSection.from_json(data, "a/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_tokens": -1}, r"sink_tokens: expected >= 0, found -1"),
        ({"comp_tokens": 1000}, r"comp_tokens: expected 0..256"),
        ({"more": 1}, r"razor\.policy\.more: unknown field"),
        ({"min_window": "63"}, "min_window: expected an integer"),
    ],
)
def test_a_damaged_policy_is_named(change: dict[str, Any], message: str) -> None:
    data = section().to_json()
    data["policy"] = {**data["policy"], **change}
    with pytest.raises(UsageError, match=message):
        RazorSection.from_json(data)
    del data["policy"]["min_window"]
    data["policy"].pop("more", None)
    with pytest.raises(UsageError, match=r"razor\.policy\.min_window: missing"):
        RazorSection.from_json(data)


@pytest.mark.parametrize("name", ["model", "heads", "tp_size", "num_retrieval", "policy"])
def test_a_section_without_a_field_is_refused(name: str) -> None:
    data = section().to_json()
    del data[name]
    with pytest.raises(UsageError, match=rf"razor\.{name}: expected"):
        RazorSection.from_json(data)


def test_chunks_without_a_bubble_are_refused() -> None:
    """Only the bubble keeps TensorRT-LLM from reusing blocks when paged context attention is on."""
    policy = RazorPolicy(32, 100, None, 0)
    options = TrtLlmOptions(local_cache=LocalCache.CYCLIC)
    asked = SPEC, policy, 4096, "float16", options, OLD
    check_policy(*asked)
    with pytest.raises(UsageError, match=r"prefill_chunk: 512 with 32 sinks, whole blocks of 32"):
        check_policy(*asked, prefill_chunk=512)
    check_policy(SPEC, policy.with_(sink_tokens=4), *asked[2:], prefill_chunk=512)
