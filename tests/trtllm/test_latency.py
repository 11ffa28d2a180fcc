"""benchmarks/latency.py: on the double of TensorRT-LLM, and for real on our own engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doubles
import pytest
from engine_folders import engine_folder

from trt_razor.cli_arguments import Parser, build_arguments
from trt_razor.engine import Engine
from trt_razor.errors import RazorError
from trt_razor.trtllm.cache_settings import read_settings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import latency
import latency_report
import latency_worker


@pytest.fixture(params=["1.0.0", "1.2.1"])
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A release whose double the workers find."""
    folder = doubles.make(tmp_path / "double", request.param)
    for name, value in doubles.environment(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRT_RAZOR_DOUBLE_STEP", "0.001")
    return str(request.param)


def run(*arguments: object) -> int:
    return latency.main([str(a) for a in arguments])


def test_dense_beside_razor(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = engine_folder(tmp_path / "dense", release, razor=False)
    razor = engine_folder(tmp_path / "razor", release)
    output = tmp_path / "out.json"
    code = run(
        "--dense", dense.path, "--razor", razor.path, "--lengths", 64, 200, 300, "--batch", 1, 3, 5,
        "--new-tokens", 8, "--rounds", 2, "--output", output,
    )  # fmt: skip
    table = capsys.readouterr().out
    assert code == 0
    document = json.loads(output.read_text())
    assert [(r["length"], r["batch"]) for r in document["rows"]] == [
        (64, 1), (64, 3), (200, 1), (200, 3),
    ]  # fmt: skip
    for row in document["rows"]:
        for kind in ("dense", "razor"):
            found = row[kind]
            assert found["rounds"] == 2
            assert found["ttft_s"]["n"] == 2 * row["batch"]
            # The double takes a millisecond for a step at least.
            assert 1e-3 <= found["tpot_s"]["p10"] <= found["tpot_s"]["median"] < 1
            assert found["tpot_s"]["n"] >= 2 * 7 * row["batch"]
            # Blocks that the executor counted are those of the settings, for this many tokens.
            settings = read_settings((dense if kind == "dense" else razor).path)
            tokens = row["length"] + 8
            assert found["blocks"] >= row["batch"] * settings.sequence_blocks(tokens - 1)
    memory = {row["length"]: row for row in document["memory"]}
    assert razor.plan is not None
    assert memory[200]["razor"]["sequence_bytes"] == razor.plan.sequence_bytes(200)
    assert memory[200]["dense"]["sequence_bytes"] == razor.plan.dense_bytes(200)
    assert document["engines"]["razor"]["policy"]["min_window"] == 40
    assert document["engines"]["dense"]["policy"] is None
    assert document["engines"]["dense"]["facts"]["tensorrt_llm"] == release
    left = "\n".join(document["left_out"])
    assert "200 tokens × batch 5: sequences that fit: dense 4, razor 4" in left
    assert "300 tokens × batch 1: engines take 256 tokens" in left
    assert "| 200 | 3 |" in table
    assert "Left out:" in table
    picture = output.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_two_ranks(release: str, tmp_path: Path) -> None:
    """The launcher starts a process for each rank; the leading one answers."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import os, subprocess, sys\n"
        "count, command = int(sys.argv[2]), sys.argv[3:]\n"
        "assert sys.argv[1] == '-n'\n"
        "print('ranks', count, flush=True)\n"
        "ranks = [subprocess.Popen(command, env={**os.environ, 'OMPI_COMM_WORLD_RANK': str(r),\n"
        "    'OMPI_COMM_WORLD_SIZE': str(count)}) for r in range(count)]\n"
        "sys.exit(max(r.wait() for r in ranks))\n"
    )
    folders = {
        kind: engine_folder(tmp_path / kind, release, razor=kind == "razor", tp_size=2)
        for kind in ("dense", "razor")
    }
    output = tmp_path / "out.json"
    code = run(
        "--dense", folders["dense"].path, "--razor", folders["razor"].path, "--lengths", 100,
        "--batch", 2, "--new-tokens", 4, "--rounds", 1, "--output", output, "--no-plot",
        "--mpirun", f"{sys.executable} {launcher}",
    )  # fmt: skip
    assert code == 0
    document = json.loads(output.read_text())
    assert len(document["rows"]) == 1
    plan = folders["razor"].plan
    assert plan is not None
    assert document["memory"][0]["razor"]["sequence_bytes"] == 2 * plan.sequence_bytes(100)
    assert not output.with_suffix(".png").exists()


def test_a_worker_that_fails_is_quoted(
    release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = engine_folder(tmp_path / "dense", release, razor=False).path
    razor = engine_folder(tmp_path / "razor", release, facts={"plugin_sha256": "0" * 64}).path
    output = tmp_path / "out.json"
    assert run("--dense", dense, "--razor", razor, "--lengths", 64, "--output", output) == 1
    error = capsys.readouterr().err
    assert "razor worker did not open its engine: error: " in error
    assert "the plugin that" in error
    assert not output.exists()


def test_pairs_that_do_not_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = engine_folder(tmp_path / "dense", razor=False).path
    razor = engine_folder(tmp_path / "razor").path
    for arguments, message in (
        (("--dense", razor, "--razor", dense), "expected a dense one as --dense"),
        (("--dense", dense, "--razor", dense), "expected a dense one as --dense"),
        (("--dense", dense, "--razor", razor, "--backend", "onnxruntime"), "found tensorrt-llm"),
        (("--dense", dense, "--razor", tmp_path / "none"), "no such engine directory"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    for arguments, message in (
        (("--dense", dense), "--dense and --razor go together"),
        ((), "expected --model"),
        (("--model", "x", "--batch", "0"), "expected >= 1"),
        (("--model", "x", "--memory", "1"), "a share between 0 and 1"),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err


def test_our_own_engines_for_real(
    dense_engine: Engine, razor_engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    code = run(
        "--backend", "onnxruntime", "--dense", dense_engine.directory, "--razor",
        razor_engine.directory, "--lengths", 16, 24, "--batch", 1, 2, "--new-tokens", 6, "--rounds", 2,
        "--output", output,
    )  # fmt: skip
    assert code == 0
    document = json.loads(output.read_text())
    assert [(r["length"], r["batch"]) for r in document["rows"]] == [
        (16, 1), (16, 2), (24, 1), (24, 2),
    ]  # fmt: skip
    for row in document["rows"]:
        assert row["razor"]["tpot_s"]["n"] >= 2 * 5 * row["batch"]
        assert 0 < row["dense"]["tpot_s"]["median"] < row["dense"]["ttft_s"]["p90"] + 1
    kv = {kind: document["memory"][0][kind]["sequence_bytes"] for kind in ("dense", "razor")}
    assert kv["dense"] == dense_engine.manifest.kv_bytes_per_slot
    assert kv["razor"] == razor_engine.manifest.kv_bytes_per_slot
    assert "| 24 | 2 |" in capsys.readouterr().out


# Pieces ---------------------------------------------------------------------------------------
def test_the_gaps_counted_are_those_of_a_whole_batch() -> None:
    clock = latency_worker.Clock(2)
    clock.times = [[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 3.5, 4.5, 9.0]]
    found = clock.result()
    assert found["ttft"] == [1.0, 3.0]
    # From 3.0, the last first token, to 5.0, the end of the first one.
    assert found["tpot"] == [1.0, 1.0, 0.5, 1.0]
    assert found["tokens"] == 9
    assert found["seconds"] == 9.0


def test_earlier_requests_get_more_tokens() -> None:
    args = SimpleNamespace(new_tokens=10, prefill_chunk=100, lengths=[250], batch=[1, 3])
    assert latency.new_tokens(args, 250, 3, 10_000) == [16, 13, 10]  # 3 chunks each
    assert latency.new_tokens(args, 250, 3, 263) == [13, 13, 10]
    assert latency.capacity(args) == 266
    args.prefill_chunk = 0
    assert latency.new_tokens(args, 250, 3, 10_000) == [12, 11, 10]


def test_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, len(commands) // 3, "x\nerror: no GPU\n")

    monkeypatch.setattr(latency.subprocess, "run", record)
    args = latency.arguments(
        [
            "--model",
            "qwen-7b",
            "--random-weights",
            "--dtype",
            "bfloat16",
            "--tp-size",
            "2",
            "--kv-dtype",
            "fp8",
            "--lengths",
            "1000",
            "--batch",
            "1",
            "4",
            "--new-tokens",
            "50",
            "--min-window",
            "128",
            "--compression",
            "none",
            "--heads",
            "h.json",
        ]
    )
    for kind in ("dense", "razor"):
        assert latency.build(args, kind, tmp_path / kind) == tmp_path / kind
    dense, razor = (" ".join(c) for c in commands)
    for command in (dense, razor):
        for part in (
            "-m trt_razor build --backend tensorrt-llm",
            "--model qwen-7b",
            "--random-weights",
            "--dtype bfloat16",
            "--tp-size 2 --kv-dtype fp8",
            "--max-seq-len 1053",  # the first of four prompts waits for three others
            "--max-batch-size 4",
            "--prefill-chunk 0",
        ):
            assert part in command
    assert "--razor --heads h.json --min-window 128 --compression none" in razor
    assert "--razor" not in dense
    for found in commands:  # every option is one that the command line has
        parser = Parser()
        build_arguments(parser)
        assert parser.parse_args(found[4:]).tp_size == 2
    with pytest.raises(RazorError, match="razor: no GPU"):
        latency.build(args, "razor", tmp_path / "razor")


def test_tables() -> None:
    def figures(ms: float) -> dict[str, Any]:
        values = [ms * f / 1e3 for f in (1, 2, 3)]
        trial = {"ttft": values, "tpot": values, "tokens": 10, "seconds": ms, "blocks": 7}
        return latency_report.summarise([trial, trial])

    document = {
        "model": "m", "backend": "tensorrt-llm", "method": "M.",
        "machine": {"gpu": "H100", "driver": "580", "cpu": "cpu", "versions": "v 1"},
        "pools": {"dense": 2e9, "razor": 1e9},
        "rows": [{"length": 8192, "batch": 2, "dense": figures(20), "razor": figures(10)}],
        "memory": [
            {
                "length": 8192,
                "dense": {"sequence_bytes": 3_000_000, "fit": 4, "fit_in_pools": 12},
                "razor": {"sequence_bytes": 1_000_000, "fit": 4, "fit_in_pools": 36},
            }
        ],
        "left_out": [],
    }  # fmt: skip
    lines = latency_report.markdown(document).splitlines()
    assert lines[0] == "m, tensorrt-llm, on H100, driver 580, cpu; v 1. M."
    assert lines[4] == (
        "| 8K | 2 | 40.0 (20.0 – 60.0) | 20.0 (10.0 – 30.0) | 40.00 (20.00 – 60.00) | "
        "20.00 (10.00 – 30.00) | 2.00 | 0.5 (0.5 – 0.5) | 1.0 (1.0 – 1.0) |"
    )
    assert lines[8] == "| 8K | 3.0 | 1.0 | 3.00 | 12 | 36 |"
    assert lines[-1] == "KV memory set aside: dense 2,000 MB, Razor 1,000 MB."
    document["machine"]["gpu"] = ""  # type: ignore[index]
    assert latency_report.markdown(document).startswith("m, tensorrt-llm, on cpu; v 1.")


def test_no_workers_are_left(release: str, tmp_path: Path) -> None:
    """Also those of an engine that opened while the other one failed."""
    dense = engine_folder(tmp_path / "dense", release, razor=False).path
    razor = engine_folder(tmp_path / "razor", release, facts={"plugin_sha256": "0" * 64}).path
    assert run("--dense", dense, "--razor", razor, "--lengths", 64) == 1
    mine = str(tmp_path)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            assert "latency_worker" not in command or mine not in command
