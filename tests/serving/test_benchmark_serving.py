"""benchmarks/serving.py: exports to figures, tools that fail, prompts, metrics, reports; and all of it
in small against real servers, with a load tool of the test's own."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import serving_model
from tiny_models import byte_tokenizer_json

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import serving
import serving_grid
import serving_load
import serving_probe
import serving_report
from serving_load import Load

MS = 1_000_000


def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer_json(), {}, None, (), None, "test")


def request(sent: int, times: list[int], texts: list[str]) -> dict[str, Any]:
    """As perf_analyzer 2.51 writes it; milliseconds."""
    return {
        "timestamp": sent * MS,
        "request_inputs": {"text_input": "a", "max_tokens": 3},
        "response_timestamps": [t * MS for t in times],
        "response_outputs": [{"text_output": t} for t in texts],
    }


def export(*requests: dict[str, Any]) -> dict[str, Any]:
    experiment = {"experiment": {"mode": "concurrency", "value": 2}, "requests": list(requests)}
    return {"experiments": [experiment], "version": "2.51.0", "service_kind": "triton"}


TWO = (
    # Not in the order of time; one with the server's empty end mark, one without.
    request(100, [150, 160, 180, 181], [" a", "", " c", ""]),
    request(0, [20, 30, 50], [" a", " b", " c"]),
)


# Exports ----------------------------------------------------------------------------------------
def test_figures_of_an_export() -> None:
    found = serving_load.export_figures(export(*TWO), Load(2, 3, ["x", "y"]))
    assert found["ttft_p50_s"] == pytest.approx(0.035)  # of 20 and 50 ms
    assert found["ttft_p99_s"] == pytest.approx(0.0497)
    assert found["itl_p50_s"] == pytest.approx(0.015)  # of 10, 20, 10, 20 ms
    assert found["itl_p99_s"] == pytest.approx(0.020)
    # 180 ms from the first request to the last token; the end mark at 181 ms is none.
    assert found["seconds"] == pytest.approx(0.18)
    assert found["tokens_per_s"] == pytest.approx(6 / 0.18)
    assert found["requests_per_s"] == pytest.approx(2 / 0.18)
    assert (found["requests"], found["uneven"]) == (2, 0)


def test_an_empty_last_token_is_a_token() -> None:
    """A character that never became whole: as many responses as tokens, so none is an end mark."""
    one = request(0, [20, 30, 50], [" a", " b", ""])
    found = serving_load.export_figures(export(one), Load(1, 3, ["x"]))
    assert found["seconds"] == pytest.approx(0.05)
    assert found["uneven"] == 0


def test_responses_that_are_not_one_per_token() -> None:
    """First token is then the first text, and the request is counted."""
    one = request(0, [20, 30], ["", " b c"])
    found = serving_load.export_figures(export(one), Load(1, 3, ["x"]))
    assert found["ttft_p50_s"] == pytest.approx(0.03)
    assert found["uneven"] == 1


@pytest.mark.parametrize(
    "damage, message",
    [
        ({}, "no 'experiments'"),
        ({"experiments": []}, "expected 1 experiment, found 0"),
        ({"experiments": [{"requests": [{}]}]}, "no 'timestamp'"),
        (export(TWO[0]), "expected 2 requests, found 1"),
        (export(request(0, [], []), TWO[1]), "without a response"),
        (export(request(0, [20, 21], ["", ""]), TWO[1]), "no text"),
        (export(request(0, [20], [" a", " b"]), TWO[1]), "1 times for 2 responses"),
        (export(request(0, [20, 10, 30], [" a", " b", " c"]), TWO[1]), "do not rise"),
        ([1, 2], "expected requests with times"),
    ],
)
def test_exports_that_are_refused(damage: Any, message: str) -> None:
    with pytest.raises(RazorError, match=message):
        serving_load.export_figures(damage, Load(2, 3, ["x", "y"]))


def test_unfinished_export(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    with pytest.raises(RazorError, match=r"tool: left no export\.json"):
        serving_load.read_export(path, "tool")
    text = json.dumps(export(*TWO))
    path.write_text(text[: len(text) // 2])
    with pytest.raises(RazorError, match=r"tool: export\.json: unfinished or damaged"):
        serving_load.read_export(path, "tool")
    path.write_bytes(text.replace('"a"', '"\x01\ttext"').encode() + b"\n")
    assert serving_load.read_export(path, "tool")["version"] == "2.51.0"


@pytest.mark.parametrize("good", [2, 3], ids=["second", "never"])
def test_an_export_that_was_cut_off_is_made_again_once(tmp_path: Path, good: int) -> None:
    """perf_analyzer ends now and then with status 0 and half a file."""
    whole, runs = tmp_path / "whole.json", tmp_path / "runs"
    whole.write_text(json.dumps(export(*TWO)))
    body = (
        f"echo >> {runs}; while [ $# -gt 1 ]; do shift; done\n"  # the export's path comes last
        f"if [ $(wc -l < {runs}) -ge {good} ]; then cp {whole} $1; else head -c 99 {whole} > $1; fi"
    )
    tool = serving_load.PerfAnalyzer(script(tmp_path / "tool", body), "2.51.0")
    load = Load(2, 3, ["x", "y"])
    if good == 2:
        found = tool.measure(load, "127.0.0.1:1", "ensemble", tmp_path, 30)
        assert found["requests"] == 2
    else:
        with pytest.raises(RazorError, match="unfinished or damaged"):
            tool.measure(load, "127.0.0.1:1", "ensemble", tmp_path, 30)
    assert runs.read_text().count("\n") == 2


def test_figures_of_genai_perf() -> None:
    times = {"unit": "ms", "avg": 40.0, "p50": 41.0, "p99": 59.0}
    data = {
        "time_to_first_token": times,
        "inter_token_latency": {**times, "p50": 5.0, "p99": 6.0},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 300.0},
        "request_throughput": {"unit": "requests/sec", "avg": 8.0},
        "request_count": {"unit": "count", "avg": 4.0},
    }
    found = serving_load.genai_figures(data, 4)
    assert found["ttft_p99_s"] == pytest.approx(0.059)
    assert found["itl_p50_s"] == pytest.approx(0.005)
    assert (found["tokens_per_s"], found["requests_per_s"]) == (300.0, 8.0)
    with pytest.raises(RazorError, match="expected 5 requests, found 4"):
        serving_load.genai_figures(data, 5)
    del data["inter_token_latency"]
    with pytest.raises(RazorError, match="inter_token_latency"):
        serving_load.genai_figures(data, 4)


# Tools ------------------------------------------------------------------------------------------
def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_tool_that_fails_says_why(tmp_path: Path) -> None:
    load = Load(1, 3, ["x", "y"])
    stale = tmp_path / "export.json"
    for body, message in (
        ("echo 'error: x'; echo 'Thread [0] had error: prompt refused'; echo; exit 99", "status 99: Thread .0. had error: prompt refused"),
        ("echo done", "status 0: done"),  # no export, whatever it says
    ):  # fmt: skip
        tool = serving_load.PerfAnalyzer(script(tmp_path / "tool", body), "2.51.0")
        stale.write_text(json.dumps(export(*TWO)))  # of the run before: must not count
        with pytest.raises(RazorError, match=f"perf_analyzer: exit {message}"):
            tool.measure(load, "127.0.0.1:1", "ensemble", tmp_path, 20)
    inputs = json.loads((tmp_path / "inputs.json").read_text())["data"]
    assert [i["text_input"] for i in inputs] == [["x"], ["y"]]
    assert inputs[0]["min_tokens"] == inputs[0]["max_tokens"] == [3]
    assert inputs[0]["end_id"] == [-1]


def test_a_tool_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_load, "PATIENCE", 0.2)
    body = f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/child; echo waiting; wait; sleep 60"
    tool = script(tmp_path / "tool", body)
    with pytest.raises(RazorError, match="tool: not done after 1 s: waiting"):
        serving_load.run_tool([str(tool)], os.environ, tmp_path / "log", 1)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("its child lives on")


def test_finding_perf_analyzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serving_load.TOOL_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "other" / "bin" / "python"))
    python = tmp_path / "v" / "bin" / "python"
    packages = tmp_path / "v" / "lib" / "python3.11" / "site-packages"

    def find(option: Path | None = None) -> serving_load.PerfAnalyzer:
        return serving_load.find_perf_analyzer(option, python, tmp_path / "links")

    with pytest.raises(UsageError, match=r"v/bin/perf_analyzer \(not there\).*tritonclient==2\.51"):
        find()
    # Beside the server's Python; it starts only with the libraries that nvidia-pytriton bundles.
    said = 'echo "Perf Analyzer Version 2.51.0"'
    beside = script(
        python.parent / "perf_analyzer",
        f'[ -e "${{LD_LIBRARY_PATH%%:*}}/libb64.so.0d" ] || {{ echo "no libb64" >&2; exit 127; }}; {said}',
    )
    with pytest.raises(UsageError, match="no libb64"):
        find()
    for name in ("libb64-98cb.so.0d", "libcudart-0952.so.12.6.77"):
        path = packages / "nvidia_pytriton.libs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    found = find()
    assert (found.executable, found.version) == (beside, "2.51.0")
    assert found.environment["LD_LIBRARY_PATH"].split(":")[0] == str(tmp_path / "links")
    assert (tmp_path / "links" / "libcudart.so.12").resolve() == path
    # A wrapper that hides exit codes: the program behind it.
    inner = script(packages / "perf_analyzer" / "bin" / "perf_analyzer", said)
    found = find()
    assert (found.executable, found.environment) == (inner, {})
    # What was named is taken, or nothing; a placeholder says no version.
    option = script(tmp_path / "placeholder", "exit 0")
    with pytest.raises(UsageError, match=r"placeholder \(says no version\); "):
        find(option)
    monkeypatch.setenv(serving_load.TOOL_VARIABLE, str(option))
    with pytest.raises(UsageError, match="placeholder"):
        find()


# Prompts and metrics ------------------------------------------------------------------------------
def test_prompts_have_exact_lengths() -> None:
    maker = serving_probe.PromptMaker(tokenizer(), extra=1)
    texts = [*maker.make(40, 30), *maker.make(41, 5)]
    assert len(set(texts)) == 35
    assert [len(tokenizer().encode(t)) for t in texts] == [39] * 30 + [40] * 5
    with pytest.raises(UsageError, match="cannot make 30 different ones of 2 tokens"):
        maker.make(2, 30)  # one letter


def test_prompts_of_words() -> None:
    """With a tokenizer that has words, texts are words, and the first one may take more tokens."""
    data = json.loads(byte_tokenizer_json())
    letters = "abcdefghijklmno"
    pairs = [(a, b) for a in letters for b in letters]
    merges = [*pairs, *(("Ġ", a + b) for a, b in pairs)]
    vocabulary = data["model"]["vocab"]
    for first, second in merges[len(pairs) :] + pairs[:7]:
        vocabulary[first + second] = len(vocabulary) + 2  # after <s> and </s>
    for first, second in pairs[7:]:
        vocabulary[first + second] = len(vocabulary) + 2
    data["model"]["merges"] = [list(m) for m in merges]
    words = Tokenizer(json.dumps(data), {}, None, (), None, "test")
    texts = serving_probe.PromptMaker(words).make(50, 10)
    assert {len(words.encode(t)) for t in texts} == {50}
    assert all(len(t.split(" ")) in (49, 50) for t in texts)


PAGE = """# HELP trt_razor_kv_cache_bytes_used rows
# TYPE trt_razor_kv_cache_bytes_used gauge
trt_razor_kv_cache_bytes_used{model="tensorrt_llm",version="1"} 1234
trt_razor_kv_cache_bytes_allocated{model="tensorrt_llm",version="1"} 5.5e+06
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 7
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="other",version="1"} 99
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} Nan
nv_energy{gpu="a\\"} b"} x
"""


def test_kv_gauges() -> None:
    assert serving_probe.kv_gauges(PAGE) == {
        "used_bytes": 1234.0, "allocated_bytes": 5.5e6, "used_blocks": 7.0, "max_blocks": 64.0,
    }  # fmt: skip
    assert serving_probe.kv_gauges("") == {}


# Reports ------------------------------------------------------------------------------------------
def test_summary() -> None:
    assert serving_report.summary([3.0, 1.0, 2.0]) == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "n": 3,
    }
    assert serving_report.summary([4.0, 1.0])["median"] == 2.5
    assert (
        serving_report.cell(serving_report.summary([0.0031, 0.0021]), 1e3, 1) == "2.6 (2.1 – 3.1)"
    )
    assert serving_report.cell(serving_report.summary([2.0]), digits=0) == "2"


def row(concurrency: int, kinds: tuple[str, ...] = ("dense", "razor")) -> dict[str, Any]:
    figures = {name: 0.01 * concurrency for name in serving_report.FIGURES}
    found = serving_report.summarise([{**figures, "requests": 8, "uneven": 1}] * 2)
    kv = {"used_bytes": 2.5e6 * concurrency, "allocated_bytes": 1e7, "source": "metrics"}
    each = {kind: {**found, "kv": kv} for kind in kinds}
    return {"concurrency": concurrency, "prompt": 1024, "output": 64, **each}


def report_document() -> dict[str, Any]:
    one = serving_report.summary([2.0])
    return {
        "model": "tiny", "backend": "onnxruntime", "method": "Medians.", "kinds": ["dense", "razor"],
        "machine": {"gpu": "", "driver": "", "cpu": "a CPU", "versions": "trt_razor 1"},
        "rows": [row(1), row(4, ("razor",))],
        "probe": {"razor": {
            "batching": {"streams": 8, "tokens": 64, "one": one, "many": one, "ratio": one},
            "waiting": {"long_tokens": 4096, "short_tokens": 16, "chunk": 256, "late": 0, "chunk_s": one,
                        "alone_s": one, "long_s": one, "waits_s": one, "chunks": one},
        }},
        "left_out": ["something"], "failed": ["dense, 4 at a time: refused"],
    }  # fmt: skip


def test_markdown() -> None:
    text = serving_report.markdown(report_document())
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 3
    assert table[2].startswith("| 1 | 1K | 64 | dense | 10 (10 – 10) | 10 (10 – 10) | 10.0 (")
    assert table[4].startswith("| 4 | 1K | 64 | Razor | 40 ")
    assert table[4].endswith("| 10.0 | 10.0 |")  # MB used, allocated
    assert "Razor, 8 streams at a time against one, 64 tokens each: 2.0 against 2.0" in text
    assert (
        "while one of 4K tokens is read: 2000 ms, 2.00 times one chunk of 256 tokens (2000 ms)"
        in text
    )
    assert "not one per token: 6;" in text
    assert "Left out:\n\n* something" in text
    assert "Failed:\n\n* dense, 4 at a time: refused" in text


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    serving_report.draw(report_document(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# Command line -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "line, message",
    [
        ("", "expected --dense with --razor"),
        ("--dense x", "--dense and --razor go together"),
        ("--url a:1 b:2", "--url needs --tokenizer"),
        ("--url a:1 --tokenizer x", "expected dense=HOST:PORT or razor=HOST:PORT"),
        ("--url razor=a:1 razor=b:1 --tokenizer x", "each once"),
        ("--url razor=http://a:1 --tokenizer x", "expected dense=HOST:PORT"),
        ("--model m --output 1", "--output >= 2"),
        ("--model m --concurrency 0", "expected numbers >= 1"),
        ("--model m --memory 1.5", "--memory between 0 and 1"),
    ],
)
def test_wrong_use(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        serving.main(line.split())
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def test_urls_are_dense_then_razor_or_as_named() -> None:
    args = serving.arguments(["--url", "a:8001", "b:9001", "--tokenizer", "x"])
    assert args.urls == {"dense": "a:8001", "razor": "b:9001"}
    targets = serving.at_urls(args)
    assert [(t.kind, t.metrics) for t in targets] == [("dense", "a:8002"), ("razor", "b:9002")]
    named = ["--url", "razor=a:8001", "--metrics-url", "razor=c:1"]
    args = serving.arguments([*named, "--tokenizer", "x"])
    assert args.kinds == ["razor"]
    assert serving.at_urls(args)[0].metrics == "c:1"


# All of it, in small --------------------------------------------------------------------------------
def load_tool(tmp_path: Path) -> Path:
    """The stand-in for perf_analyzer."""
    standin = Path(__file__).with_name("load_tool.py")
    return script(tmp_path / "tool", f'exec {sys.executable} {standin} "$@"')


def test_dense_beside_razor(
    triton_python: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One cell of the grid, one too large for the engines, and the probes."""
    monkeypatch.setattr(serving_grid, "PROBE_TOKENS", 16)
    size = {"max_seq_len": 512, "max_batch_size": 4, "prefill_chunk": 16}
    model = serving_model.make(tmp_path)
    for kind in ("dense", "razor"):
        model.build(tmp_path / kind, kind == "razor", **size)
    results = tmp_path / "found.json"
    # Answers so long that the watch over the metrics sees them.
    code = serving.main([
        "--dense", str(tmp_path / "dense"), "--razor", str(tmp_path / "razor"), "--python", str(triton_python),
        "--perf-analyzer", str(load_tool(tmp_path)), "--concurrency", "2", "--prompt", "40", "400",
        "--output", "200", "--requests", "1", "--rounds", "1", "--results", str(results),
    ])  # fmt: skip
    text = capsys.readouterr()
    assert code == 0, text.err
    found = json.loads(results.read_text())
    assert found["left_out"][0] == "2 at a time, prompt 400, output 200: engines take 512 tokens"
    assert (found["failed"], found["turns"]) == ([], True)
    [line] = found["rows"]
    assert (line["concurrency"], line["prompt"], line["output"]) == (2, 40, 200)
    for kind in found["kinds"]:
        one = line[kind]
        assert one["requests"] == 2  # whole waves
        assert one["uneven"] == 0  # one response per token
        assert 0 < one["ttft_p50_s"]["median"] <= one["ttft_p99_s"]["median"]
        assert 0 < one["kv"]["used_bytes"] <= one["kv"]["allocated_bytes"]
    assert line["razor"]["kv"]["allocated_bytes"] < line["dense"]["kv"]["allocated_bytes"]
    for kind, probe in found["probe"].items():
        assert probe["batching"]["ratio"]["n"] == 1
        if "waiting" in probe:
            assert probe["waiting"]["long_tokens"] == 512 - 16
            assert probe["waiting"]["chunk"] == 16
        else:  # so small a model may be too quick for it
            why = f"{kind}, short prompt beside a long one: 496 tokens are read too soon"
            assert why in found["left_out"]
    assert text.out == serving_report.markdown(found)


def test_a_server_that_refuses(
    server: Any, tmp_path: Path, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers that are longer than the server allows: each cell fails with the server's words."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    reference.tokenizer.save(folder)
    code = serving.main([
        "--url", f"razor={server.grpc}", "--metrics-url", f"razor={server.metrics}", "--tokenizer", str(folder),
        "--perf-analyzer", str(load_tool(tmp_path)), "--concurrency", "2", "--prompt", "20", "--output", "4", "1000000",
        "--requests", "2", "--rounds", "1", "--no-probe", "--no-plot", "--results", str(tmp_path / "x.json"),
    ])  # fmt: skip
    assert code == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert [r["output"] for r in found["rows"]] == [4]
    assert len(found["failed"]) == 1
    assert found["failed"][0].startswith("razor, 2 at a time, prompt 20, output 1000000, warm-up: ")
    assert "1000000" in found["failed"][0].split("had error: ")[1]
