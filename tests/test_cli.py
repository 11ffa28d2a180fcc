"""The command line: one clear line, the right exit code, never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TinyModel

from trt_razor import console
from trt_razor.cli import build_main, main
from trt_razor.engine import Engine
from trt_razor.generate import Generator, SamplingParams
from trt_razor.models.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


def run(*argv: object) -> int:
    """Exit code of ``trt-razor``, whichever way it leaves."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as e:
        return int(e.code or 0)


def refused(capsys: Capture, code: int, words: str, *argv: object) -> None:
    """The command must end with this code and one error line, its last, that matches ``words``."""
    capsys.readouterr()
    assert run(*argv) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, err
    assert lines[-1].startswith("error: ")
    assert re.search(words, lines[-1]), lines[-1]


def process(*argv: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    env.pop("PYTHONUNBUFFERED", None)  # it would hide what fails in the last flush
    return subprocess.run(
        [sys.executable, "-m", "trt_razor.cli", *map(str, argv)],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        timeout=60,
        env=env,
        **kwargs,
    )


# Wrong use ------------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, words", [
    ([], "required: COMMAND; see trt-razor --help"),
    (["bild"], "invalid choice: 'bild'"),
    (["build", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    (["build", "--max-seq", "5", "--model", "x"], "unrecognized arguments"),  # no abbreviations
    (["build", "--max-seq-len", "many"], "--max-seq-len: invalid int value: 'many'"),
    (["build"], "no model: name one with --model NAME .*smollm2-135m.* or give --checkpoint"),
    (["plan"], "no model: name one"),
    (["build", "--model", "smollm"], "model 'smollm' is unknown; did you mean .*smollm2-135m"),
    (["plan", "--model", "quen-72b"], "did you mean qwen-72b"),
    (["build", "--model", "qwen-72b", "--razor"], "no weights at hand; supply them with"),
    (["build", "--model", "qwen-7b", "--min-window", "9"], "--min-window: .*add --razor"),
    (["build", "--model", "qwen-7b", "--preset", "paper"], "--preset: .*add --razor"),
    (["build", "--model", "qwen-7b", "--heads", "f"], "--heads: .*add --razor"),
    (["build", "--model", "qwen-7b", "--tp-size", "2"], "tp_size 2.*--plan"),
    (["build", "--model", "qwen-7b", "--razor", "--sinks", "-1"], "policy.sink_tokens: expected"),
    (["build", "--model", "qwen-7b", "--razor", "--compression", "x"], "expected an integer or"),
    (["build", "--model", "qwen-7b", "--razor", "--compression", "0"], "policy.compression"),
    (["build", "--model", "qwen-7b", "--razor", "--comp-tokens", "999"], "policy.comp_tokens"),
    (["build", "--model", "qwen-7b", "--razor", "--heavy-hitters", "1025"], "policy.heavy_hitters"),
    (["build", "--model", "qwen-7b", "--heavy-hitters", "8"], "--heavy-hitters: .*add --razor"),
    (["build", "--model", "qwen-7b", "--backend", "cuda"], "backend 'cuda': unknown"),
    (["build", "--model", "qwen-7b", "--max-seq-len", "0"], "max_seq_len: expected at least 2"),
    (["build", "--model", "qwen-7b", "--max-seq-len", "40000"], "max_seq_len: expected at most"),
    (["build", "--model", "qwen-7b", "--random-weights", "--checkpoint", "x"], "exclude each other"),
    (["plan", "--model", "qwen-7b", "--max-seq-len", "0"], "max_seq_len: expected an integer >= 1"),
    (["plan", "--model", "qwen-7b", "--retrieval-share", "1.5"], r"expected 0\.\.1, found 1\.5"),
    (["plan", "--model", "qwen-7b", "--retrieval-share", "nan"], r"expected 0\.\.1, found nan"),
    (["plan", "--model", "qwen-7b", "--gpu", "h100-90gb"], "did you mean h100-80gb"),
    (["heads"], "no model"),
    (["heads", "--model", "smollm2-135m", "--echo-share", "-0.1"], "echo_share"),
    (["heads", "--model", "smollm2-135m", "--induction-share", "1.2"], "induction_share"),
    (["heads", "--model", "smollm2-135m", "--seeds", "0"], "seeds: expected"),
    (["generate", "/no/engine", "--prompt", "x"], "/no/engine: no such engine directory"),
    (["inspect", "/no/engine"], "/no/engine: no such engine directory"),
])  # fmt: skip
def test_wrong_use(capsys: Capture, argv: list[str], words: str) -> None:
    refused(capsys, 2, words, *argv)


def test_wrong_use_of_an_engine(capsys: Capture, razor_engine: Engine, tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    for argv, words in [
        ([], "no prompt: give --prompt TEXT"),
        (["--token-ids", "1,two"], "--token-ids: expected numbers with commas between"),
        (["--token-ids", ""], "--token-ids: expected numbers"),
        (["--token-ids", "1,264"], r"prompt: expected token ids 0\.\.263, found 1\.\.264"),
        (["--token-ids=-1"], r"prompt: expected token ids"),
        (["--token-ids", "9" * 40], r"prompt: expected a list of token ids 0\.\.263"),
        (["--token-ids", ",".join("1" * 65)], "65 tokens do not fit max_seq_len 64"),
        (["--prompt", "", "--raw"], "expected at least 1 token, found an empty prompt"),
        (["--prompt", "x" * 65, "--raw"], "65 tokens do not fit max_seq_len 64"),
        (["--prompt", "x", "--prompt", "y" * 65, "--raw"], "prompt 2 of 2: .*65 tokens"),
        (["--prompt-file", str(tmp_path / "none")], "none: cannot read the prompt: No such file"),
        (["--prompt-file", str(tmp_path)], "cannot read the prompt: Is a directory"),
        (["--prompt-file", str(latin)], r"latin\.txt: the prompt is not UTF-8 text \(byte 3\)"),
        (["--prompt", "a\udcff"], "lone surrogate"),
        (["--prompt", "x", "--system", "y", "--raw"], "--system: needs the chat template"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens: expected"),
        (["--prompt", "x", "--temperature", "nan"], "temperature: expected"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: expected"),
        (["--prompt", "x", "--top-p", "0"], "top_p: expected"),
        (["--prompt", "x", "--top-k", "-1"], "top_k: expected"),
        (["--prompt", "x", "--seed", "-1"], "seed: expected"),
        (["--prompt", "x", "--seed", str(2**64)], "seed: expected"),
        (["--prompt", "x", "--stop", ""], "stop: expected texts that are not empty"),
        (["--prompt", "x", "--min-tokens", "-1"], r"min_tokens: expected 0 \.\. max_new_tokens"),
        (["--prompt", "x", "--max-new-tokens", "2", "--min-tokens", "3"], r"min_tokens: .*\(2\)"),
        (["--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty: expected"),
        (["--prompt", "x", "--presence-penalty", "nan"], "presence_penalty: expected"),
        (["--prompt", "x", "--frequency-penalty", "-101"], "frequency_penalty: expected"),
        (["--prompt", "x", "--slots", "0"], r"slots: expected 1\.\.3"),
        (["--prompt", "x", "--slots", "4"], r"slots: expected 1\.\.3"),
    ]:
        refused(capsys, 2, words, "generate", razor_engine.directory, *argv)


def test_a_damaged_engine_is_a_failure(
    capsys: Capture, razor_engine: Engine, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(razor_engine.directory, tmp_path / "e"))
    with open(copy / "model.onnx", "ab") as f:
        f.write(b"x")
    for argv in (["inspect", copy], ["generate", copy, "--prompt", "x"]):
        refused(capsys, 1, r"model\.onnx: size: expected \d+ bytes.*rebuild it", *argv)


def test_an_engine_without_a_tokenizer(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model.folder, tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    engine = tiny_model.build(tmp_path / "e", checkpoint=folder).directory
    refused(capsys, 2, "has no tokenizer.*--token-ids", "generate", engine, "--prompt", "x")
    refused(
        capsys, 2, "stop: texts need a tokenizer", "generate", engine, "--token-ids", "1",
        "--stop", "x",
    )  # fmt: skip
    capsys.readouterr()
    assert run("generate", engine, "--token-ids", "1,2", "--max-new-tokens", 4, "--ignore-eos") == 0
    assert re.fullmatch(r"(\d+ ){4}\n", capsys.readouterr().out)


# The commands ---------------------------------------------------------------------------------
def build_argv(model: TinyModel, output: Path, *more: object) -> list[str]:
    argv = ["--checkpoint", model.folder, "--razor", "--heads", model.heads, "--output", output,
            "--backend", "onnxruntime", "--max-seq-len", 64, "--min-window", 8, *more]  # fmt: skip
    return [str(a) for a in argv]


def test_build_generate_inspect(capsys: Capture, tiny_model: TinyModel, tmp_path: Path) -> None:
    engine = tmp_path / "e"
    assert build_main(build_argv(tiny_model, engine, "--max-batch-size", 2)) == 0
    captured = capsys.readouterr()
    m = Engine.load(engine).manifest
    share = m.kv_bytes_per_slot / m.dense_kv_bytes_per_slot
    assert f"{m.kv_bytes_per_slot:,} bytes, {share:.1%} of dense" in captured.out
    assert str(engine) in captured.out
    assert captured.err.startswith("backend: onnxruntime (as asked)\nmodel: tiny-llama")
    assert "weights …\nweights done in" in captured.err
    assert "compensation token" in captured.err  # the plan's table

    argv = ["generate", engine, "--max-new-tokens", 6, "--ignore-eos", "--prompt", "hi"]
    assert run(*argv) == 0
    one = capsys.readouterr()
    assert one.out.endswith("\n")
    assert "ended by length" in one.err
    assert f"KV cache allocated: {m.kv_bytes_per_slot:,} bytes for 1 × 64 tokens" in one.err
    saved = m.dense_kv_bytes_per_slot - m.kv_bytes_per_slot
    assert f"{saved:,} bytes saved" in one.err
    assert run(*argv, "--quiet") == 0
    quiet = capsys.readouterr()
    assert (quiet.out, "ended by" in quiet.err) == (one.out, False)
    assert run(*argv, "--prompt", "ho", "--prompt", "hi") == 0
    several = capsys.readouterr()
    assert several.out.startswith(f"[1] {one.out}")
    assert several.out.endswith(f"[3] {one.out}")
    assert f"{2 * saved:,} bytes saved" in several.err

    assert run("inspect", engine) == 0
    shown = capsys.readouterr().out
    for words in ("tiny-llama: 2 layers, 4 heads, 2 KV heads", "1 retrieve (25.0%), test", "ok"):
        assert words in shown
    assert run("inspect", engine, "--json") == 0
    assert json.loads(capsys.readouterr().out) == m.to_json()

    refused(capsys, 2, "--force rebuilds it", "build", *build_argv(tiny_model, engine))
    assert run("build", *build_argv(tiny_model, engine, "--force")) == 0
    assert Engine.load(engine).manifest.max_batch_size == 1


def test_prompts_go_through_the_chat_template_unless_raw(
    capsys: Capture, razor_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], str]] = []
    real = Tokenizer.encode

    def encode(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        ids = real(self, text, **kwargs)
        seen.append((ids, text))
        return ids

    monkeypatch.setattr(Tokenizer, "encode", encode)
    base = ["generate", razor_engine.directory, "--max-new-tokens", 1]
    assert run(*base, "--prompt", "</s>", "--raw") == 0
    assert seen.pop()[0] == [27, 14, 82, 29]  # characters, not the end token
    assert run(*base, "--prompt", "hi", "--system", "be") == 0
    ids, text = seen.pop()
    assert text == "<s>system: be</s><s>user: hi</s><s>assistant: "
    assert ids.count(256) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run(*base, "--prompt-file", "-", "--raw") == 0
    assert seen.pop()[1] == "from a pipe"


def test_a_seed_repeats_and_a_failed_request_fails_the_command(
    capsys: Capture, razor_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["generate", razor_engine.directory, "--prompt", "hi", "--temperature", 2, "--quiet"]
    texts = []
    for seed in (2**64 - 1, 2**64 - 1, 3):
        assert run(*argv, "--seed", seed, "--ignore-eos") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    from trt_razor.backends.onnxruntime import OrtSession

    real = OrtSession.forward

    def poisoned(self: OrtSession, *args: Any) -> Any:
        logits = real(self, *args)
        if args[1].shape[1] == 1 and args[1].shape[0] == 2:
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(OrtSession, "forward", poisoned)
    refused(
        capsys, 1, "prompt 2: logits: not finite", *argv[:2], "--raw", "--prompt", "a",
        "--prompt", "b", "--max-new-tokens", 5, "--ignore-eos",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--repetition-penalty", 3.0, "repetition_penalty"),
        ("--presence-penalty", 2.0, "presence_penalty"),
        ("--frequency-penalty", 1.5, "frequency_penalty"),
    ],
)
def test_penalties(
    option: str, value: float, field: str, capsys: Capture, razor_engine: Engine
) -> None:
    """Other tokens than without, and those of the Python interface."""
    argv = ["generate", razor_engine.directory, "--token-ids", "5,6,7", "--max-new-tokens", 20]
    texts = []
    for more in ([option, value], []):
        assert run(*argv, "--ignore-eos", "--quiet", *more) == 0
        texts.append(capsys.readouterr().out)
    given: dict[str, Any] = {field: value}
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, **given)
    m, tokenizer = razor_engine.manifest, razor_engine.tokenizer()
    generator = Generator(razor_engine.open(), m.prefill_chunk, (), tokenizer)
    assert texts[0] == generator.run([[5, 6, 7]], params)[0].text + "\n" != texts[1]


def test_min_tokens(capsys: Capture, razor_engine: Engine) -> None:
    """A stop text counts only behind so many tokens."""
    argv = [
        "generate",
        razor_engine.directory,
        "--prompt",
        "hi",
        "--raw",
        "--ignore-eos",
        "--quiet",
    ]
    argv += ["--max-new-tokens", "12"]
    assert run(*argv) == 0
    whole = capsys.readouterr().out
    first = next(c for c in whole if c.isalnum())
    assert run(*argv, "--stop", first) == 0
    assert len(short := capsys.readouterr().out) < len(whole)
    assert run(*argv, "--stop", first, "--min-tokens", 12) == 0
    assert capsys.readouterr().out == whole != short


def test_plan_and_build_plan_say_the_same(capsys: Capture, tmp_path: Path) -> None:
    common = ["--model", "qwen-72b", "--tp-size", "8", "--max-seq-len", "131072"]
    assert run("plan", *common, "--batch", 1) == 0
    planned = capsys.readouterr().out
    assert run("build", *common, "--plan", "--razor") == 0
    assert capsys.readouterr().out == planned
    assert "will refuse this length" in planned.replace("\n", " ")  # a warning, not an error
    assert run("plan", *common, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tp_size"] == 8
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_folder_needs_its_config_alone(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copy(tiny_model.folder / "config.json", tmp_path / "config.json")
    argv = ["plan", "--checkpoint", tmp_path, "--heads", tiny_model.heads, "--json"]
    assert run(*argv) == 0
    assert json.loads(capsys.readouterr().out)["retrieval_share"] == 0.25


def test_heads_refuses_a_folder_as_output_before_the_search(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trt_razor.heads.find.examine_heads", lambda *a: 1 / 0)
    argv = ["heads", "--checkpoint", tiny_model.folder, "--output", tmp_path]
    refused(capsys, 2, "is a folder; expected the name of a file", *argv)


def test_help_and_version(capsys: Capture) -> None:
    for command in ("heads", "plan", "build", "generate", "inspect"):
        assert run(command, "--help") == 0
        assert f"usage: trt-razor {command}" in capsys.readouterr().out
    assert run("--version") == 0
    script = subprocess.run(
        [sys.executable, ROOT / "build_scripts" / "build_engine.py", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert script.returncode == 0
    assert "build_engine.py --model smollm2-135m --razor" in script.stdout


# Whatever happens -----------------------------------------------------------------------------
@pytest.mark.parametrize("error, code, words", [
    (MemoryError(), 1, "error: out of memory"),
    (OSError(28, "No space left on device", "/x/y"), 1, "error: /x/y: No space left on device"),
    (OSError("odd"), 1, "error: odd"),
    (ZeroDivisionError("a\nb"), 1, "error: a bug in trt-razor: ZeroDivisionError: a b; please"),
    (KeyboardInterrupt(), 130, "interrupted; nothing half-made was left"),
])  # fmt: skip
def test_whatever_happens_is_one_line(
    capsys: Capture, error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_forget_stdout", lambda: None)

    def run_it() -> int:
        raise error

    assert console.guarded(run_it) == code
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1


def test_messages_are_one_line_whatever_names_hold(capsys: Capture) -> None:
    console.fail("a\nb\x1b[31mred [bold]not markup[/bold]\x07")
    assert capsys.readouterr().err == "error: a b [31mred [bold]not markup[/bold] \n"


def test_a_bug_can_be_located(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.TRACEBACK_ENV, "1")
    with pytest.raises(ZeroDivisionError):
        console.guarded(lambda: 1 // 0)


def test_progress_without_a_terminal_is_few_lines(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.Bars() as bars:
        for i in range(1001):
            now[0] = i / 10
            bars("weights", i, 1000)
        bars("search", 1, 0)
        bars("search", 2, 0)
    assert capsys.readouterr().err.splitlines() == [
        "weights …",
        "weights 30%, about 70 s left",
        "weights 60%, about 40 s left",
        "weights 90%, about 10 s left",
        "weights done in 100.0 s",
        "search …",
    ]


def test_the_reader_of_a_pipe_may_leave(razor_engine: Engine) -> None:
    for argv in (["inspect", razor_engine.directory, "--json"], ["plan", "--model", "qwen-7b"]):
        read, write = os.pipe()
        os.close(read)
        done = process(*argv, stdout=write)
        os.close(write)
        assert (done.returncode, "Exception" in done.stderr, "error" in done.stderr) == (
            0, False, False,
        )  # fmt: skip


def test_nobody_reads_the_messages(tiny_model: TinyModel, tmp_path: Path) -> None:
    """build 2>&1 | head -1: the build goes on to its end."""
    argv = ["build", *build_argv(tiny_model, tmp_path / "e")]
    done = subprocess.run(
        f"{sys.executable} -m trt_razor.cli {' '.join(argv)} 2>&1 | head -c 1; "
        'exit "${PIPESTATUS[0]}"',
        shell=True,
        executable=shutil.which("bash"),
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == b"b"
    Engine.load(tmp_path / "e")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_written(razor_engine: Engine) -> None:
    with open("/dev/full", "w") as full:
        done = process("inspect", razor_engine.directory, stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: No space left on device"


def test_a_terminal_without_unicode(razor_engine: Engine) -> None:
    argv = ["generate", razor_engine.directory, "--prompt", "hi", "--max-new-tokens", 30]
    env = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = process(*argv, stdout=subprocess.PIPE, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
