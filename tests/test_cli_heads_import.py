"""``trt-razor heads import``: the command beside ``trt-razor heads``, from a file to an engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TinyModel

from trt_razor.cli import heads_main, main
from trt_razor.generate import Generator, SamplingParams
from trt_razor.headmap import HeadMap

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent
GATES = "0.9\t0.2\n0.1\t0.8\n"  # the tiny model: 2 layers x 2 KV heads


def run(*argv: object) -> int:
    try:
        return main([str(a) for a in argv])
    except SystemExit as e:
        return int(e.code or 0)


def refused(capsys: Capture, words: str, *argv: object) -> None:
    capsys.readouterr()
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text(GATES)
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 64, "recent_size": 256}))
    return path


def test_from_a_file_to_an_engine_that_generates(
    capsys: Capture, tiny_model: TinyModel, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "duo.json"
    argv = ["heads", "import", table, "--checkpoint", tiny_model.folder, "--output", output]
    assert run(*argv) == 0
    printed = capsys.readouterr()
    assert f"2 of 4 KV heads retrieve (50.0%, imported from duoattention): {output}" in printed.out
    assert "format: duoattention" in printed.err
    assert (tmp_path / "duo.png").read_bytes().startswith(b"\x89PNG")
    head_map = HeadMap.load(output)
    assert head_map.retrieval_heads == ((0,), (1,))
    engine = tiny_model.build(tmp_path / "engine", heads=str(output))
    assert engine.head_map == head_map
    assert engine.manifest.heads is not None
    assert engine.manifest.heads.source == head_map.source
    by_hand = HeadMap(
        head_map.model, head_map.fingerprint, 2, 2, ((0,), (1,)), "test", "chosen by hand"
    )
    by_hand.save(tmp_path / "hand.json")
    other = tiny_model.build(tmp_path / "other", heads=str(tmp_path / "hand.json"))
    prompt = np.random.default_rng(0).integers(0, 256, 40).tolist()
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    answers = [Generator(e.open(1), 5).run([prompt], params)[0].tokens for e in (engine, other)]
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]


def test_share_format_and_no_plot(tiny_model: TinyModel, table: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    argv = ["heads", "import", table, "--checkpoint", tiny_model.folder, "--output", output]
    assert run(*argv, "--share", "0.25", "--no-plot") == 0
    assert HeadMap.load(output).retrieval_heads == ((0,), ())
    assert not output.with_suffix(".png").exists()
    assert (
        run(*argv, "--threshold", "0.15", "--format", "freekv", "--plot", tmp_path / "b.png") == 0
    )
    assert HeadMap.load(output).retrieval_heads == ((0, 1), (1,))
    assert HeadMap.load(output).options["format"] == "freekv"
    assert (tmp_path / "b.png").exists()


def test_a_config_alone_is_enough_and_the_default_name(
    tiny_model: TinyModel, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    shutil.copy(tiny_model.folder / "config.json", folder)
    monkeypatch.chdir(tmp_path)
    # Shared options may stand before the word.
    assert run("heads", "--checkpoint", folder, "--no-plot", "import", table) == 0
    head_map = HeadMap.load(tmp_path / "engines" / "tiny-llama.duoattention.heads.json")
    assert head_map.fingerprint == tiny_model.spec.fingerprint()
    assert not list((tmp_path / "engines").glob("*.png"))


def test_refusals(capsys: Capture, tiny_model: TinyModel, table: Path, tmp_path: Path) -> None:
    argv = ["heads", "import", table, "--checkpoint", tiny_model.folder]
    refused(capsys, "no model", "heads", "import", table)
    refused(capsys, "these are the heads of another model", *argv[:3], "--model", "qwen-72b")
    refused(capsys, "as 'qwen-72b' has", "heads", "--model", "qwen-72b", "import", table)
    refused(capsys, "expected one of them, found both", *argv, "--share", "1", "--threshold", "1")
    refused(capsys, "share: expected a share", *argv, "--share", "2")
    refused(capsys, "threshold: expected a finite number", *argv, "--threshold", "nan")
    refused(capsys, "did you mean duoattention", *argv, "--format", "duoatention")
    refused(capsys, "is a folder", *argv, "--output", tmp_path)
    refused(capsys, "name ending in .png", *argv, "--plot", tmp_path / "a.jpg")
    refused(capsys, "required: FILE", "heads", "import")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", table.name]


@pytest.mark.parametrize(
    "option",
    [["--seeds", "3"], ["--method", "echo"], ["--echo-share", "0.2"], ["--device", "cuda"]],
)
def test_options_of_the_search_do_not_go_with_it(
    capsys: Capture, tiny_model: TinyModel, table: Path, option: list[str]
) -> None:
    argv = ["heads", *option, "import", table, "--checkpoint", tiny_model.folder]
    refused(capsys, f"{option[0]}: for finding heads", *argv)


def test_heads_without_import_still_finds(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path
) -> None:
    argv = ["heads", "--checkpoint", tiny_model.folder, "--probe-length", "20", "--no-plot"]
    assert run(*argv, "--output", tmp_path / "a.json") == 0
    assert HeadMap.load(tmp_path / "a.json").method == "paper"
    assert heads_main([str(a) for a in argv[1:]] + ["--output", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    refused(capsys, "invalid choice: 'imprt'", "heads", "imprt", "x.tsv")


def test_the_script_imports_too(tiny_model: TinyModel, table: Path, tmp_path: Path) -> None:
    script = ROOT / "build_scripts" / "find_heads.py"
    output = tmp_path / "a.json"
    argv = ["import", table, "--checkpoint", tiny_model.folder, "--output", output, "--no-plot"]
    done = subprocess.run(
        [sys.executable, script, *argv], capture_output=True, text=True, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert HeadMap.load(output).num_retrieval == 2


def test_help_names_every_format(capsys: Capture) -> None:
    from trt_razor.heads.importers import IMPORTERS

    assert run("heads", "import", "--help") == 0
    text = capsys.readouterr().out
    assert "usage: trt-razor heads import" in text
    for name in IMPORTERS:
        assert f"\n  {name} " in text
