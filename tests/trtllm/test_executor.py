"""Running engine directories through the double of TensorRT-LLM's executor bindings."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doubles
import numpy as np
import pytest
from engine_folders import MAX_SEQ_LEN, engine_folder

from trt_razor.errors import RazorError, UsageError
from trt_razor.trtllm.cache_settings import (
    blocks_in_log,
    clamp_in_log,
    gib_in_log,
    pool_report,
    read_settings,
)
from trt_razor.trtllm.executor import Request, TrtLlmExecutor, open_executor

PROMPTS = [[5, 6, 7], [11] * 40, list(range(90)), [3]]


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """``open_executor(log=…)`` sets it for the process."""
    os.environ.pop("TLLM_LOG_LEVEL", None)
    yield
    os.environ.pop("TLLM_LOG_LEVEL", None)


def expected(prompt: list[int], count: int, api: Any) -> tuple[int, ...]:
    """What the made-up model of the double says."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(api.next_token(tokens, 1000))
    return tuple(tokens[len(prompt) :])


def bindings(double: doubles.Double) -> Any:
    return double.load("tensorrt_llm.bindings.executor")


# Settings -------------------------------------------------------------------------------------
@pytest.mark.parametrize("release", ["1.0.0", "1.1.0"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_settings_weigh_what_the_plan_weighs(
    release: str, tp_size: int, fp8: bool, tmp_path: Path
) -> None:
    """Two ways to the same bytes: the plan of the build, and what the runtime is told."""
    folder = engine_folder(tmp_path / "engine", release, tp_size=tp_size, fp8=fp8)
    settings, plan = read_settings(folder.path), folder.plan
    assert plan is not None
    assert settings.razor
    assert settings.bubble == plan.bubble
    assert settings.slot_bytes == plan.slot_bytes()
    assert settings.sink_tokens == plan.sink_token_length == (4 if release == "1.0.0" else 0)
    for tokens in (1, 31, 32, 33, 68, 69, 100, 200, MAX_SEQ_LEN):
        assert settings.pool_bytes(tokens) == plan.pool_bytes(tokens)
        assert settings.sequence_bytes(tokens) == plan.sequence_bytes(tokens)


def test_settings_of_a_dense_engine(tmp_path: Path) -> None:
    settings = read_settings(engine_folder(tmp_path / "engine", razor=False, tp_size=2).path)
    assert not settings.razor
    assert settings.heads == (4, 4, 4, 4)
    assert settings.windows == (MAX_SEQ_LEN,) * 4
    assert settings.window_list == ()
    assert settings.slot_bytes == 0
    # 4 layers x keys and values x 4 heads x 32 tokens x 64 x float16
    assert settings.block_bytes(MAX_SEQ_LEN) == 4 * 2 * 4 * 32 * 64 * 2
    assert settings.pool_bytes(65) == 3 * settings.block_bytes(MAX_SEQ_LEN)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pretrained_config.mapping.tp_size", 0, "mapping.tp_size: expected an integer >= 1"),
        ("pretrained_config.num_attention_heads", None, "num_attention_heads: missing"),
        ("pretrained_config.dtype", "int3", "dtype"),
        ("pretrained_config.num_kv_heads_per_layer", [1], "expected 6 numbers"),
        ("pretrained_config.num_kv_heads_per_layer", ["a"], "expected a list of numbers"),
        ("build_config.max_seq_len", True, "max_seq_len: expected an integer"),
        ("build_config.plugin_config.tokens_per_block", None, "tokens_per_block: missing"),
    ],
)
def test_a_damaged_config_is_named(name: str, value: Any, message: str, tmp_path: Path) -> None:
    path = engine_folder(tmp_path / "engine").path / "config.json"
    config = json.loads(path.read_text())
    *parents, last = name.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    path.write_text(json.dumps(config))
    with pytest.raises(RazorError, match=message):
        read_settings(path.parent)


def test_no_engine_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not an engine directory of TensorRT-LLM"):
        read_settings(tmp_path)


def test_log_lines_of_both_kinds() -> None:
    text = textwrap.dedent("""\
        [TensorRT-LLM][INFO] Blocks per window size:
        [TensorRT-LLM][INFO] [windowSize=68] {.primaryBlocks=120, .secondayBlocks=0}
        [TensorRT-LLM][INFO] [windowSize=256] {.primaryBlocks=77, .secondaryBlocks=3}
        [TensorRT-LLM][INFO] [MemUsageChange] Allocated 1.25 GiB for max tokens in paged KV cache (6304).
    """)
    assert blocks_in_log(text) == {68: 120, 256: 77}
    assert gib_in_log(text) == 1.25
    assert clamp_in_log(text) is None
    warning = "[W] maxAttentionWindowVec too large to fit at least one sequence in kvCache. Old: 9"
    assert clamp_in_log(warning + "\nmore") == warning[4:]
    assert blocks_in_log("") == {}
    assert gib_in_log("") is None


def test_other_windows_than_planned_are_refused(tmp_path: Path) -> None:
    settings = read_settings(engine_folder(tmp_path / "engine", "1.0.0").path)
    with pytest.raises(RazorError, match=r"expected the windows \{.*256\}, found \{64, 256\}"):
        pool_report(settings, {64: 10, 256: 10}, 4, "log")


# Generation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("razor", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_tokens_and_logits(
    razor: bool, stream: bool, trtllm: doubles.Double, tmp_path: Path
) -> None:
    api = bindings(trtllm)
    folder = engine_folder(tmp_path / "engine", trtllm.release, razor)
    seen: list[tuple[int, int]] = []
    with open_executor(folder.path, logits=True) as executor:
        requests = [Request(p, 3 + i) for i, p in enumerate(PROMPTS)]
        results = executor.run(
            requests, stream=stream, logits=True, on_token=lambda i, t: seen.append((i, t))
        )
    for i, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        assert result.tokens == expected(prompt, 3 + i, api)
        assert result.logits is not None
        # The padding of the vocabulary, larger than any logit in the double, must be gone.
        assert result.logits.shape == (3 + i, 1000)
        assert tuple(result.logits.argmax(1)) == result.tokens
        assert [t for j, t in seen if j == i] == list(result.tokens)
        assert result.finished == "LENGTH"
        assert len(result.arrivals) == 3 + i
        assert list(result.arrivals) == sorted(result.arrivals)
        assert result.time_to_first_token == result.arrivals[0] - result.sent > 0
        assert len(set(result.arrivals)) == (3 + i if stream else 1)
        assert result.first_token_s is not None
    assert api.opened[-1].shut_down


def test_more_requests_than_slots_and_late_arrivals(trtllm: doubles.Double, tmp_path: Path) -> None:
    api = bindings(trtllm)
    folder = engine_folder(tmp_path / "engine", trtllm.release, batch=2)
    requests = [Request(p, 6, after_tokens=4 * i) for i, p in enumerate(PROMPTS)]
    order: list[int] = []
    with open_executor(folder.path) as executor:
        results = executor.run(requests, on_token=lambda i, t: order.append(i))
        iterations = executor.iterations()
        assert executor.iterations() == []
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == expected(prompt, 6, api)
        assert result.logits is None
    # The second request begins once 4 tokens came, while the first one is still at it.
    assert order.index(1) >= 4
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)
    assert max(s.contexts + s.generations for s in iterations) == 2
    assert sum(s.contexts for s in iterations) == len(PROMPTS)
    assert max(s.used_blocks for s in iterations) <= iterations[0].max_blocks


def test_a_gap_in_the_schedule_does_not_hang(trtllm: doubles.Double, tmp_path: Path) -> None:
    """The second request would wait for tokens that will never come."""
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    with open_executor(folder.path) as executor:
        results = executor.run([Request([1], 2), Request([2], 2, after_tokens=99)], timeout=20)
    assert [len(r.tokens) for r in results] == [2, 2]


def test_end_id(trtllm: doubles.Double, tmp_path: Path) -> None:
    tokens = expected([5, 6, 7], 3, bindings(trtllm))
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    with open_executor(folder.path, logits=True) as executor:
        for stream in (True, False):
            result = executor.run(
                [Request([5, 6, 7], 9, end_id=tokens[2])], stream=stream, logits=True
            )[0]
            assert result.tokens == tokens
            assert result.finished == "END_ID"
            assert result.logits is not None
            assert result.logits.shape == (3, 1000)


def test_defaults_of_the_engine_are_accepted(trtllm: doubles.Double, tmp_path: Path) -> None:
    """As TensorRT-LLM's Python entry points pass them on: a number of sinks must be positive."""
    api = bindings(trtllm)
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    config = json.loads((folder.path / "config.json").read_text())["pretrained_config"]
    told = api.KvCacheConfig(runtime_defaults=api.RuntimeDefaults(**config["runtime_defaults"]))
    cyclic = trtllm.release == "1.0.0"
    assert told.max_attention_window == ([256, 68] if cyclic else [256])
    assert told.sink_token_length == (4 if cyclic else None)
    with pytest.raises(RuntimeError, match="sinkTokenLength > 0"):
        api.KvCacheConfig(sink_token_length=0)


def test_what_the_bindings_are_told(trtllm: doubles.Double, tmp_path: Path) -> None:
    api = bindings(trtllm)
    folder = engine_folder(tmp_path / "engine", trtllm.release, batch=4)
    with open_executor(
        folder.path, max_batch_size=3, free_gpu_memory_fraction=0.5, max_tokens=4096
    ):
        config = api.opened[-1].config
    kv, cyclic = config.kv_cache_config, trtllm.release == "1.0.0"
    assert kv.enable_block_reuse is False
    assert kv.max_attention_window == ([256, 68] if cyclic else [256])
    assert kv.sink_token_length == (4 if cyclic else None)
    assert kv.free_gpu_memory_fraction == 0.5
    assert kv.max_tokens == 4096
    assert config.enable_chunked_context is False
    assert config.max_batch_size == 3
    assert config.max_beam_width == 1
    assert config.gather_generation_logits is False
    assert config.iter_stats_max_iterations > 1000
    assert config.parallel_config.communication_mode is api.CommunicationMode.LEADER
    if trtllm.release != "1.0.0":
        assert config.fail_fast_on_attention_window_too_large is True


def test_dense_engines_get_no_windows(trtllm: doubles.Double, tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release, razor=False, chunk=64)
    with open_executor(folder.path):
        config = bindings(trtllm).opened[-1].config
        registry = trtllm.load("tensorrt").get_plugin_registry()
        assert config.kv_cache_config.max_attention_window is None
        assert config.kv_cache_config.enable_block_reuse is False
        assert config.enable_chunked_context is True  # built for it
        assert registry.libraries == []  # nor our plugin


# Plugin ---------------------------------------------------------------------------------------
def test_the_plugin_is_loaded_once(trtllm: doubles.Double, tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    for _ in range(2):  # the double's registry refuses a second load
        open_executor(folder.path).close()
    assert len(trtllm.load("tensorrt").get_plugin_registry().libraries) == 1


def test_another_plugin_than_the_engines(trtllm: doubles.Double, tmp_path: Path) -> None:
    facts = {"plugin_sha256": "0" * 64}
    folder = engine_folder(tmp_path / "engine", trtllm.release, facts=facts)
    with pytest.raises(RazorError, match=r"sha256: expected 000000000000…, .*TRT_RAZOR_PLUGIN"):
        open_executor(folder.path)


# Pools ----------------------------------------------------------------------------------------
def test_pools_by_event_and_by_log(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    log = tmp_path / "load.log"
    with open_executor(folder.path, max_batch_size=2, log=log) as executor:
        report = executor.kv_pool_report()
        executor._pools = None
        monkeypatch.setattr(executor._executor, "_events", None)
        by_log = executor.kv_pool_report()
        assert executor.kv_pool_report() is by_log
    assert report.source == "events"
    assert by_log == dataclasses.replace(report, source="log")
    assert "windowSize=256" in capfd.readouterr().err  # the log is shown, too
    assert folder.plan is not None
    assert report.slot_bytes == 2 * folder.plan.slot_bytes()
    gib = gib_in_log(log.read_text())
    assert gib == pytest.approx(report.pool_bytes / 2**30, abs=0.006)
    assert report.sequences(1) >= report.sequences(MAX_SEQ_LEN) >= 1
    full = report.windows[-1]
    assert report.sequences(MAX_SEQ_LEN) <= full.blocks // 8


def test_no_sizes_reported(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    monkeypatch.setattr(bindings(trtllm).Executor, "get_kv_cache_event_manager", lambda self: None)
    with pytest.raises(RazorError, match=r"reported no pool sizes; open the engine with log=FILE"):
        open_executor(folder.path)
    assert bindings(trtllm).opened[-1].shut_down


def test_a_clamped_window_is_refused(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the binding can fail by itself (1.1 on) or only warns (1.0)."""
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    monkeypatch.setattr(bindings(trtllm), "MEMORY", 900_000)
    with pytest.raises(RazorError) as e:
        open_executor(folder.path)
    if trtllm.release == "1.0.0":
        assert "expected the windows {68, 256}" in str(e.value)
    else:
        assert "a window does not fit" in str(e.value)
    assert "0x7f" not in str(e.value)  # the stack trace stays out
    if trtllm.release == "1.0.0":
        with pytest.raises(RazorError, match=r"too small: maxAttentionWindowVec too large"):
            open_executor(folder.path, log=tmp_path / "log")


def test_too_few_blocks_for_one_sequence(tmp_path: Path) -> None:
    settings = read_settings(engine_folder(tmp_path / "engine", "1.1.0").path)
    report = pool_report(settings, {256: 7}, 4, "events")
    assert report.sequences(224) == 1
    assert report.sequences(225) == 0
    with pytest.raises(RazorError, match="expected at least 8 blocks for one sequence of 256"):
        report.check()
    pool_report(settings, {256: 8}, 4, "events").check()


# Refusals -------------------------------------------------------------------------------------
def test_refusals(trtllm: doubles.Double, tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release, batch=2).path
    for changes, message in (
        ({"max_batch_size": 3}, r"max_batch_size: expected 1\.\.2"),
        ({"max_batch_size": 0}, r"max_batch_size: expected 1\.\.2"),
        ({"chunked": True}, "build with --prefill-chunk"),
    ):
        with pytest.raises(UsageError, match=message):
            open_executor(folder, **changes)  # type: ignore[arg-type]
    with open_executor(folder) as executor:
        for request, message in (
            (Request([], 1), "request 1 of 1: expected a prompt"),
            (Request([1], 0), "at least 1 new token"),
            (Request([1] * 250, 7), r"250 \+ 7 tokens do not fit max_seq_len 256"),
        ):
            with pytest.raises(UsageError, match=message):
                executor.run([request])
        with pytest.raises(UsageError, match="open the engine with logits=True"):
            executor.run([Request([1], 1)], logits=True)
    (folder / "rank0.engine").unlink()
    with pytest.raises(RazorError, match=r"cannot load it: .*rank0\.engine$"):
        open_executor(folder)


def test_an_error_of_one_request_cancels_the_others(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    with open_executor(folder.path) as executor:
        double = bindings(trtllm).opened[-1]
        double._build["max_num_tokens"] = 50
        with pytest.raises(RazorError, match=r"request 2: prompt longer than max_num_tokens$"):
            executor.run([Request([1] * 9, 9), Request([1] * 60, 9)])
        assert double._active == double._waiting == []
        assert len(executor.run([Request([1], 2)])[0].tokens) == 2
        monkeypatch.setattr(double, "await_responses", lambda timeout: [])
        with pytest.raises(RazorError, match=r"no answer to 1 requests within 0\.05 s"):
            executor.run([Request([1], 2)], timeout=0.05)


def test_missing_logits_are_an_error(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_folder(tmp_path / "engine", trtllm.release)
    with open_executor(folder.path, logits=True) as executor:
        double = bindings(trtllm).opened[-1]
        step = double._step

        def without(sequence: Any) -> list[Any]:
            responses: list[Any] = step(sequence)
            for r in responses:
                r.result.generation_logits = None
            return responses

        monkeypatch.setattr(double, "_step", without)
        with pytest.raises(RazorError, match="expected logits of 2 tokens, found 0"):
            executor.run([Request([1], 2)], logits=True)


# Ranks ----------------------------------------------------------------------------------------
def test_ranks_must_match(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = engine_folder(tmp_path / "two", trtllm.release, tp_size=2).path
    one = engine_folder(tmp_path / "one", trtllm.release).path
    with pytest.raises(UsageError, match=r"expected 2 processes .*, found 1; .*mpirun -n 2"):
        open_executor(two)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="expected 1 processes for this engine, found 2"):
        open_executor(one)
    with open_executor(two) as leader:
        assert leader.leads
        assert len(leader.run([Request([1], 4)])[0].tokens) == 4
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with open_executor(two) as worker:
        double = bindings(trtllm).opened[-1]
        assert not worker.leads
        assert not double.shut_down
        with pytest.raises(UsageError, match="this rank has no requests to send"):
            worker.run([Request([1], 4)])
    assert double.shut_down  # where the real one waits for the leader


def test_close_twice(trtllm: doubles.Double, tmp_path: Path) -> None:
    executor: TrtLlmExecutor = open_executor(engine_folder(tmp_path / "e", trtllm.release).path)
    ends: list[bool] = []
    bindings(trtllm).opened[-1].shutdown = lambda: ends.append(True)
    executor.close()
    executor.close()
    assert ends == [True]


# Without TensorRT-LLM -------------------------------------------------------------------------
def test_without_tensorrt_llm(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_llm") is not None:
        pytest.skip("TensorRT-LLM is installed here")
    folder = engine_folder(tmp_path / "engine")
    with pytest.raises(UsageError, match="tensorrt_llm: not installed"):
        open_executor(folder.path)


def test_importing_needs_no_big_package() -> None:
    code = (
        "import sys, trt_razor.trtllm.executor; "
        "print(sorted({'torch', 'tensorrt', 'tensorrt_llm', 'safetensors'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_double_checks_keywords(trtllm: doubles.Double) -> None:
    """The double must be strict where the bindings are, or these tests prove nothing."""
    api = bindings(trtllm)
    with pytest.raises(TypeError):
        api.ExecutorConfig(max_attention_window=[3])
    with pytest.raises(TypeError):
        api.KvCacheConfig(kv_cache_reuse=False)
    with pytest.raises(TypeError):
        api.Request([1], 2, True)
    with pytest.raises(TypeError):
        api.Request(np.array([1]), 2)
    config = api.ExecutorConfig()
    config.misspelt = 3  # the bindings take any attribute: keywords only, in our code
    assert hasattr(api.ExecutorConfig, "fail_fast_on_attention_window_too_large") == (
        trtllm.release != "1.0.0"
    )
