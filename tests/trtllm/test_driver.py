"""Engines of all ranks, each built in a child: on the double of TensorRT-LLM, and on ones that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import doubles
import pytest
from razor_models import MAX_BATCH, MAX_SEQ_LEN, Case, caches
from runtime_config import parse

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import random_checkpoint
from trt_razor.trtllm import build_rank, driver
from trt_razor.trtllm.arguments import BuildArguments, build_arguments
from trt_razor.trtllm.checkpoint import convert_checkpoint
from trt_razor.trtllm.driver import build_engines
from trt_razor.trtllm.engine_config import RazorPlan, TrtLlmOptions
from trt_razor.trtllm.engine_json import plan_of
from trt_razor.trtllm.ranks import dense_layout, rank_layout
from trt_razor.trtllm.release import LocalCache

ROOT = Path(__file__).parents[2]
RETRIEVAL = ((0, 3), (0, 1, 2, 3), (), (1, 2))


def quiet(stage: str, done: int, total: int) -> None:
    pass


class Calls:
    """A progress callback that remembers."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.made.append((stage, done, total))


def case(tp_size: int = 1, cache: LocalCache | None = None, kind: str = "qwen2") -> Case:
    counts = tuple(len(heads) // tp_size for heads in RETRIEVAL)
    return Case(kind, TrtLlmOptions(tp_size=tp_size, local_cache=cache), counts)


def arguments(
    options: TrtLlmOptions, max_seq_len: int = MAX_SEQ_LEN, chunk: int = 0
) -> BuildArguments:
    return build_arguments(max_seq_len, MAX_BATCH, options, chunk)


def converted(folder: Path, one: Case, razor: bool = True) -> Path:
    """A checkpoint with random weights, as our conversion writes it."""
    layout = dense_layout(one.spec, one.options.tp_size)
    section = None
    if razor:
        heads = HeadMap(one.kind, one.spec.fingerprint(), 4, 4, RETRIEVAL, "test", "by hand")
        layout, section = rank_layout(heads, one.options.tp_size), one.section
    folder.mkdir()
    weights = random_checkpoint(one.spec, dtype="float16")
    convert_checkpoint(weights, layout, "float16", one.options, section, folder, quiet)
    return folder


def staging(folder: Path) -> Path:
    """An output folder with something in it that is not the driver's."""
    folder.mkdir()
    (folder / "heads.json").write_text("{}")
    (folder / "checkpoint").mkdir()
    return folder


UNTOUCHED = ["checkpoint", "heads.json"]


# On the double ------------------------------------------------------------------------------------
@pytest.mark.parametrize("tp_size", [1, 2])
def test_razor_engines_of_every_design(
    trtllm: doubles.Double, tp_size: int, tmp_path: Path
) -> None:
    for i, cache in enumerate(caches(trtllm.release)):
        one = case(tp_size, cache)
        plan = one.plan(trtllm.release)
        checkpoint = converted(tmp_path / f"checkpoint{i}", one)
        output = staging(tmp_path / f"out{i}")
        calls = Calls()
        facts = build_engines(
            checkpoint / "config.json",
            checkpoint,
            output,
            arguments(one.options),
            plan,
            calls,
        )
        ranks = [f"rank{rank}.engine" for rank in range(tp_size)]
        assert sorted(os.listdir(output)) == sorted([*UNTOUCHED, "config.json", *ranks])
        assert calls.made == [("engine", rank, tp_size) for rank in range(tp_size + 1)]
        size = sum((output / name).stat().st_size for name in ranks)
        assert facts == {
            "tensorrt_llm": trtllm.release,
            "tensorrt": doubles.RELEASES[trtllm.release],
            "engine_bytes": str(size),
        }
        text = (output / "config.json").read_text()
        model = parse(text)
        model.check_in_flight()
        assert model.layer_types == plan.layer_types
        assert model.windows() == list(plan.windows)
        assert plan_of(json.loads(text), "qwen2") == plan
        assert model.max_num_tokens == arguments(one.options).max_num_tokens
        for name in ranks:
            network = doubles.network(output / name)
            plugins = [p for p in network["plugins"] if p["type"] == "RazorGptAttention"]
            assert len(plugins) == 4
            states = {n for pair in model.state_inputs() for n in pair}
            assert states == {n for n in network["inputs"] if "_state_ptr_" in n}


def test_dense_engines_are_tensorrt_llms_own(trtllm: doubles.Double, tmp_path: Path) -> None:
    one = case(2)
    checkpoint = converted(tmp_path / "checkpoint", one, razor=False)
    output = staging(tmp_path / "out")
    chunked = arguments(one.options, chunk=128)
    build_engines(checkpoint / "config.json", checkpoint, output, chunked, None, quiet)
    model = parse((output / "config.json").read_text())
    model.check_in_flight()
    assert (model.variant, model.kv_heads, model.chunked_context()) == ("gpt", (2,) * 4, True)
    for rank in range(2):
        types = {p["type"] for p in doubles.network(output / f"rank{rank}.engine")["plugins"]}
        assert "GPTAttention" in types
        assert "RazorGptAttention" not in types


@pytest.mark.parametrize("kind", ["llama", "baichuan-13b"])
def test_weights_made_up_by_tensorrt_llm(trtllm: doubles.Double, kind: str, tmp_path: Path) -> None:
    """Only a config.json: no checkpoint folder."""
    one = Case(kind, counts=(1,) * 4)
    plan = one.plan(trtllm.release)
    (tmp_path / "config.json").write_text(json.dumps(one.config_json()))
    output = staging(tmp_path / "out")
    build_engines(tmp_path / "config.json", None, output, arguments(one.options), plan, quiet)
    assert parse((output / "config.json").read_text()).layer_types == plan.layer_types


def test_a_rank_that_fails_leaves_nothing(trtllm: doubles.Double, tmp_path: Path) -> None:
    one = case(2)
    checkpoint = converted(tmp_path / "checkpoint", one)
    (checkpoint / "rank1.safetensors").unlink()
    output = staging(tmp_path / "out")
    plan = one.plan(trtllm.release)
    with pytest.raises(RazorError, match=r"^rank 1: TensorRT-LLM's builder failed: ") as e:
        build_engines(
            checkpoint / "config.json", checkpoint, output, arguments(one.options), plan, quiet
        )
    assert "rank1.safetensors" in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(os.listdir(output)) == UNTOUCHED


def test_a_model_with_another_plan_is_refused(trtllm: doubles.Double, tmp_path: Path) -> None:
    one = case()
    (tmp_path / "config.json").write_text(json.dumps(one.config_json()))
    output = staging(tmp_path / "out")
    other = one.plan(trtllm.release, MAX_SEQ_LEN - 128)
    with pytest.raises(
        RazorError, match=r"^rank 0: runtime_defaults: planned .*896.* built with .*1024"
    ):
        build_engines(tmp_path / "config.json", None, output, arguments(one.options), other, quiet)
    assert sorted(os.listdir(output)) == UNTOUCHED


def test_a_config_json_that_fails_its_check_leaves_nothing(
    trtllm: doubles.Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(directory: Path, plan: RazorPlan) -> None:
        assert (directory / "rank0.engine").stat().st_size > 0
        raise RazorError("config.json: not as planned")

    monkeypatch.setattr(driver, "finish", fail)
    one = case()
    (tmp_path / "config.json").write_text(json.dumps(one.config_json()))
    output = staging(tmp_path / "out")
    plan = one.plan(trtllm.release)
    with pytest.raises(RazorError, match=r"^config\.json: not as planned"):
        build_engines(tmp_path / "config.json", None, output, arguments(one.options), plan, quiet)
    assert sorted(os.listdir(output)) == UNTOUCHED


def test_what_the_model_refuses_is_wrong_use(trtllm: doubles.Double, tmp_path: Path) -> None:
    one = case(cache=LocalCache.SLOTS)
    plan = one.plan(trtllm.release)
    (tmp_path / "config.json").write_text(json.dumps(one.config_json()))
    output = staging(tmp_path / "out")
    chunked = arguments(one.options, chunk=128)
    with pytest.raises(UsageError, match=r"^use_paged_context_fmha: .*one go"):
        build_engines(tmp_path / "config.json", None, output, chunked, plan, quiet)
    assert sorted(os.listdir(output)) == UNTOUCHED


# Before a child is started ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (None, "mapping: expected tp_size and pp_size, found None"),
        ({"tp_size": 0}, "mapping: expected tp_size"),
        ({"tp_size": "2"}, "mapping: expected tp_size"),
        ({"tp_size": 2, "pp_size": 1}, "expected tp_size 1 and pp_size 1, found 2 and 1; convert"),
        ({"tp_size": 1, "pp_size": 4}, "expected tp_size 1 and pp_size 1, found 1 and 4"),
    ],
)
def test_ranks_that_do_not_fit(mapping: Any, message: str, tmp_path: Path) -> None:
    one = case()
    config = {**one.config_json(), "mapping": mapping}
    (tmp_path / "config.json").write_text(json.dumps(config))
    output = staging(tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        build_engines(
            tmp_path / "config.json", None, output, arguments(one.options), one.plan("1.0.0"), quiet
        )
    assert sorted(os.listdir(output)) == UNTOUCHED


# TensorRT-LLMs that fail ----------------------------------------------------------------------------
def broken(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``tensorrt_llm`` that does what ``code`` says when it is imported, first on the path."""
    (folder / "tensorrt_llm").mkdir()
    (folder / "tensorrt_llm/__init__.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(folder))  # handed on to the child


def attempt(folder: Path) -> Path:
    """Build a dense engine; returns the output folder's path if that fails as it should."""
    one = case()
    (folder / "config.json").write_text(json.dumps(one.config_json(razor=False)))
    output = staging(folder / "out")
    try:
        build_engines(folder / "config.json", None, output, arguments(one.options), None, quiet)
    finally:
        assert sorted(os.listdir(output)) == UNTOUCHED
    return output


FAILURES = {
    "no driver": (
        "raise ImportError('libcuda.so.1: cannot open shared object file')",
        r"^tensorrt_llm: cannot be imported: libcuda\.so\.1: cannot open",
    ),
    "no library": (
        "raise OSError('libnvinfer_plugin_tensorrt_llm.so: not found')",
        "^tensorrt_llm: cannot be imported: libnvinfer_plugin",
    ),
    "an exception of several lines": (
        "raise RuntimeError('cannot\\n  allocate')",
        "^rank 0: TensorRT-LLM's builder failed: RuntimeError: cannot allocate$",
    ),
    "the first error line": (
        """
        print("[11/22/2026-10:00:00] [TRT-LLM] [I] starting", flush=True)
        print("[11/22/2026-10:00:01] [TRT] [W] [E] is no error", flush=True)
        print("[11/22/2026-10:00:02] [TRT] [E] Error Code 2: out of memory", flush=True)
        print("[TensorRT-LLM][ERROR] and then this", flush=True)
        raise AssertionError("Engine building failed, please check the error log.")
        """,
        "^rank 0: TensorRT-LLM's builder failed: Error Code 2: out of memory - AssertionError: Engine "
        r"building failed, please check the error log\.$",
    ),
    "an error line of C++": (
        """
        import os
        os.write(1, b'{"tensorrt": 1}\\n[TensorRT-LLM][ERROR] CUDA: no device\\n')
        raise ValueError
        """,
        "builder failed: CUDA: no device - ValueError:$",
    ),
    "death": (
        "import os, sys\nprint('bad layer', file=sys.stderr, flush=True)\nos.abort()",
        r"^rank 0: TensorRT-LLM's builder died \(exit status -6\): bad layer$",
    ),
    "a kill": (
        "import os, signal\nprint('Loading weights', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)",
        r"died \(exit status -9\): killed: host out of memory\? It last said: Loading weights$",
    ),
    "a kill without a word": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        r"died \(exit status -9\): killed: host out of memory\? It last said: nothing$",
    ),
    "an end too early": (
        "print('[TRT] [E] unhappy', flush=True)\nraise SystemExit(3)",
        r"builder died \(exit status 3\): unhappy$",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_and_leave_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = FAILURES[name]
    broken(tmp_path, code, monkeypatch)
    with pytest.raises(RazorError, match=message) as e:
        attempt(tmp_path)
    assert "\n" not in str(e.value)


def test_what_tensorrt_llm_drops_is_not_left_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(tmp_path, "open('model.cache', 'w').close()\nraise RuntimeError('no')", monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RazorError, match=r"RuntimeError: no$"):
        attempt(tmp_path)
    assert os.listdir(tmp_path / "here") == []


def test_all_that_was_printed_for_those_who_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(tmp_path, "print('chatter')\nraise RuntimeError('no')", monkeypatch)
    with pytest.raises(RazorError, match=r"RuntimeError: no$"):
        attempt(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TRT_RAZOR_TRACEBACK", "1")
    (tmp_path / "out/heads.json").unlink()
    (tmp_path / "out/checkpoint").rmdir()
    (tmp_path / "out").rmdir()
    with pytest.raises(RazorError, match=r"RuntimeError: no$"):
        attempt(tmp_path)
    shown = capsys.readouterr().err
    assert "chatter" in shown
    assert "Traceback" in shown


SLEEPS = """
import subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({pids!r} + ".new", "w") as f:
    f.write(f"{{__import__('os').getpid()}} {{daemon.pid}}")
__import__("os").rename({pids!r} + ".new", {pids!r})
time.sleep(600)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_build_ends_with_its_parent(stop: signal.Signals, tmp_path: Path) -> None:
    """In a process of its own: Ctrl-C, and a parent that is killed. The child has a child, too."""
    pids = tmp_path / "pids"
    (tmp_path / "tensorrt_llm").mkdir()
    (tmp_path / "tensorrt_llm/__init__.py").write_text(SLEEPS.format(pids=str(pids)))
    script = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]
from test_driver import attempt
try:
    attempt(Path({str(tmp_path)!r}))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    started: list[int] = []
    try:
        wait_for(lambda: pids.exists() or parent.poll() is not None)
        started = [int(pid) for pid in pids.read_text().split()]
        parent.send_signal(stop)
        out, _ = parent.communicate(timeout=30)
        wait_for(lambda: not any(alive(pid) for pid in started))
    finally:
        parent.kill()
        parent.wait()
        for pid in filter(alive, started):
            os.kill(pid, signal.SIGKILL)
    if stop is signal.SIGINT:
        assert (out, parent.returncode) == ("interrupted\n", 0)
        assert sorted(os.listdir(tmp_path / "out")) == UNTOUCHED


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Not gone, and no zombie that waits for a parent which is not ours."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# What a release knows --------------------------------------------------------------------------------
class Known:
    def __init__(self, max_batch_size: int = 1, input_timing_cache: str | None = None) -> None: ...


class Older:
    def __init__(self, max_batch_size: int = 1) -> None: ...


def test_later_ranks_use_the_times_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = {"max_batch_size": 4}
    assert build_rank.build_config(Known, wanted, rank=1) == wanted  # rank 0 left none
    (tmp_path / build_rank.TIMING_CACHE).write_bytes(b"times")
    assert build_rank.build_config(Known, wanted, rank=0) == wanted
    cached = {"max_batch_size": 4, "input_timing_cache": "model.cache"}
    assert build_rank.build_config(Known, wanted, rank=1) == cached
    assert build_rank.build_config(Older, wanted, rank=1) == wanted
    with pytest.raises(RazorError, match="BuildConfig: expected 'max_beam_width'"):
        build_rank.build_config(Older, {"max_beam_width": 1}, rank=0)


class Plugins:
    __slots__ = ("context_fmha", "tokens_per_block")

    def __init__(self) -> None:
        self.context_fmha, self.tokens_per_block = False, 32


def test_plugins_that_a_release_lacks_may_only_be_off() -> None:
    wanted = {"context_fmha": True, "tokens_per_block": 64, "user_buffer": False}
    found = build_rank.plugin_config(Plugins(), {"plugin_config": wanted})
    assert (found.context_fmha, found.tokens_per_block) == (True, 64)
    with pytest.raises(RazorError, match="PluginConfig: expected 'user_buffer'"):
        build_rank.plugin_config(Plugins(), {"plugin_config": {"user_buffer": True}})
