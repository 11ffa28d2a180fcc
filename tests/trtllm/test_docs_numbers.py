"""The numbers in docs/ngc.md and docs/tensorrt-llm.md: sizes, windows, defaults."""

from __future__ import annotations

import re

import pytest
from doc_pages import DESIGN, NGC, PROSE, commands, parser_of, plan_of, table

from trt_razor import cli_arguments
from trt_razor.errors import UsageError
from trt_razor.heads.selection import uniform_share
from trt_razor.models.zoo import zoo_spec
from trt_razor.policy import PRESETS
from trt_razor.recipes import recipe_heads
from trt_razor.trtllm.arguments import build_arguments
from trt_razor.trtllm.engine_config import TrtLlmOptions, plan_engine, razor_section
from trt_razor.trtllm.ranks import equalise, rank_layout
from trt_razor.trtllm.release import LocalCache, release_of

OLD, NEW = release_of("1.0.0"), release_of("1.2.1")


def test_memory_table() -> None:
    rows = table(DESIGN, "model | ranks")
    assert len(rows) >= 5
    for model, ranks, tokens, windows, dense, cyclic, slots, reserved in rows:
        n = int(tokens.replace(",", ""))
        old = plan_of(model, int(ranks), n)
        new = plan_of(model, int(ranks), n, "1.2.1")
        assert windows == ",".join(map(str, old.window_list()))
        assert new.window_list() == [n]
        assert dense == f"{old.dense_bytes(n):,}"
        for cell, plan in ((cyclic, old), (slots, new)):
            kv = plan.sequence_bytes(n)
            assert cell == f"{kv:,} ({kv / plan.dense_bytes(n):.1%})".replace("%", " %")
        assert reserved == f"{new.slot_bytes():,}"


def test_formulas() -> None:
    """Those of the page, spelled out again, against the plan."""
    for tokens in (1, 31, 33, 5000, 7000, 32768):
        old, new = plan_of("qwen-72b", 8), plan_of("qwen-72b", 8, version="1.2.1")
        t, d, b, n0 = 32, 128, 2, 4
        ring = min(max(4000, -(-32768 // 5)) + 1, 32768 - n0)
        window = n0 + -(-ring // t) * t
        bubble = -n0 % t
        r, lh = 2, 6

        def block(heads: int) -> int:
            return 2 * heads * t * d * b  # noqa: B023

        assert old.dense_bytes(tokens) == 80 * -(-tokens // t) * block(r + lh)
        assert old.pool_bytes(tokens) == 80 * (
            -(-(tokens + bubble) // t) * block(r)
            + -(-(min(tokens, window) + bubble) // t) * block(lh)
        )
        slot = sum(-(-x // 16) * 16 for x in (2 * lh * (n0 + ring) * d * b, 4 * lh * (2 * d + 2)))
        assert new.sequence_bytes(tokens) == 80 * (-(-tokens // t) * block(r) + slot)
        assert old.slot_bytes() == 0
        assert (old.window, old.bubble) == (window, bubble)


def test_numbers_in_the_text() -> None:
    said = re.search(r"blocks of 32 and `D = 128` that is (\d+), or (\d+) in FP8", PROSE)
    assert said is not None
    for most, kv_dtype in ((int(said[1]), "auto"), (int(said[2]), "fp8")):
        fits = PRESETS["paper"].with_(comp_tokens=most)
        plan_of("qwen-7b", policy=fits, kv_dtype=kv_dtype)
        with pytest.raises(UsageError, match=f"at most {most} fit"):
            plan_of("qwen-7b", policy=fits.with_(comp_tokens=most + 1), kv_dtype=kv_dtype)
    with pytest.raises(UsageError, match=r"heavy_hitters: 64: .*--heavy-hitters 0"):
        plan_of("qwen-7b", policy=PRESETS["tight"])
    tight = PRESETS["tight"].with_(heavy_hitters=0)
    with pytest.raises(UsageError, match="comp_tokens"):
        plan_of("qwen-7b", policy=tight)
    assert "`--tokens-per-block 64`" in PROSE
    plan_of("qwen-7b", policy=tight, tokens_per_block=64)
    assert f"{plan_of('qwen-7b').bubble} rows with the defaults" in PROSE
    reserved = 16 * plan_of("qwen-72b", 8, version="1.2.1").slot_bytes()
    assert f"reserve {reserved / 1e9:.1f} GB of each GPU" in PROSE
    share = equalise(uniform_share(zoo_spec("qwen-72b"), 0.15), 8).share
    assert f"which is {share:.0%}".replace("%", " %") in PROSE


def test_settings_are_the_plans() -> None:
    (row,) = [r for r in table(NGC, "executor, YAML") if r[0] == "`max_attention_window`"]
    old, new = plan_of("qwen-72b", 8), plan_of("qwen-72b", 8, version="1.2.1")
    assert f"`cyclic`: `{','.join(map(str, old.window_list()))}`" in row[2]
    assert f"`slots`: `{','.join(map(str, new.window_list()))}`" in row[2]
    assert f"max_attention_window: {old.window_list()}" in NGC
    assert f"sink_token_length: {old.sink_token_length}" in NGC
    assert new.sink_token_length == 0
    assert f"window {old.window}, found" in NGC


def test_defaults_that_are_told() -> None:
    from trt_razor.build import DEFAULT_SEQ_LEN, DEFAULT_SERVER_BATCH

    assert f"({DEFAULT_SEQ_LEN}, or the model's positions; {DEFAULT_SERVER_BATCH})" in PROSE
    assert f"limits ({DEFAULT_SEQ_LEN}, {DEFAULT_SERVER_BATCH})" in NGC
    whole = build_arguments(32768, 16, TrtLlmOptions(), 0)
    assert (whole.max_num_tokens, whole.max_input_len) == (32783, 32767)
    chunked = build_arguments(32768, 16, TrtLlmOptions(), 4096)
    assert (chunked.max_num_tokens, chunked.max_input_len) == (4111, 32767)
    assert build_arguments(32768, 16, TrtLlmOptions(max_num_tokens=8192), 0).max_input_len == 8192
    off = {name for name, value in whole.plugin_config().items() if value is False}
    (line,) = re.findall(r"^5\. Switched off.*?(?=\n\n)", DESIGN, re.M | re.S)
    for name in off - {"use_paged_context_fmha", "multiple_profiles"}:
        assert f"`{name}`" in line
    assert OLD.default_cache is LocalCache.CYCLIC
    assert NEW.local_caches == (LocalCache.SLOTS,)


def test_the_first_model_is_shipped_and_fits() -> None:
    """smollm2-135m: a recipe, and the build that step 4 gives, for every release."""
    (words,) = [w for w in commands(NGC) if "smollm2-135m" in w]
    args = parser_of(cli_arguments.build_arguments).parse_args(words[2:])
    spec = zoo_spec("smollm2-135m")
    found = recipe_heads(spec)
    assert found is not None
    heads = equalise(found[1], 1)
    section = razor_section(spec, heads, rank_layout(heads, 1), cli_arguments.policy(args))
    for release in (OLD, NEW):
        plan = plan_engine(spec, section, args.max_seq_len, "float16", TrtLlmOptions(), release)
        assert plan.sequence_bytes(4096) < 0.4 * plan.dense_bytes(4096)
