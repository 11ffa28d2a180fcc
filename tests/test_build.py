"""Builds that must be refused, that fail on the way, and that are interrupted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import POLICY, TinyModel, write_model

from trt_razor import files, recipes
from trt_razor.backends.onnxruntime import OnnxRuntimeBackend
from trt_razor.build import BuildRequest, build_engine, default_output, model_spec, safe_name
from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import replace_directory, sha256_file
from trt_razor.headmap import HeadMap
from trt_razor.models.zoo import zoo_spec

ROOT = Path(__file__).resolve().parent.parent
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail(error: BaseException) -> Callable[..., Any]:
    def raiser(*_: object, **__: object) -> None:
        raise error

    return raiser


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(request: BuildRequest, words: str, code: int = 2) -> None:
    with pytest.raises(RazorError, match=words) as e:
        build_engine(request)
    assert e.value.exit_code == code, str(e.value)
    assert "\n" not in str(e.value)
    if request.output is not None and request.output.parent.is_dir():
        assert not [p for p in request.output.parent.iterdir() if ".partial-" in p.name]


# Requests that make no sense ------------------------------------------------------------------
@pytest.mark.parametrize("changes, words", [
    ({"checkpoint": None}, r"no model: name one with --model NAME \(known: baichuan2-13b"),
    ({"checkpoint": None, "model": "qwen72b"}, r"model 'qwen72b' is unknown; did you mean qwen"),
    ({"checkpoint": None, "model": "qwen-72b", "heads": "auto", "max_seq_len": None},
     "no weights at hand; supply them with: --checkpoint DIR"),
    ({"random_weights": True}, "--random-weights and --checkpoint exclude each other"),
    ({"model": "llama3-8b"}, "not the model llama3-8b: num_layers: expected 32, found 2"),
    ({"backend": "tensorrtx"}, "backend 'tensorrtx': unknown; did you mean tensorrt"),
    ({"backend": "tensorrt-llm"}, "tensorrt_llm: not installed; engines are built inside an NGC image"),
    ({"dtype": "int8"}, "dtype: expected float32"),
    ({"dtype": "bfloat16"}, "no bfloat16 matrix product"),
    ({"max_seq_len": 129}, r"max_seq_len: expected at most 128, the positions of 'tiny-llama'"),
    ({"max_seq_len": 0}, "max_seq_len: expected at least 2"),
    ({"max_seq_len": -7}, "max_seq_len: expected at least 2"),
    ({"max_batch_size": 0}, r"max_batch_size: expected 1\.\.4096, found 0"),
    ({"max_batch_size": 10**9}, r"max_batch_size: expected 1\.\.4096"),
    ({"prefill_chunk": -1}, "prefill_chunk: expected a number of tokens"),
    ({"razor": False}, "--heads: a dense engine has no use"),
    ({"heads": "/nonexistent.json"}, "/nonexistent.json: no such head map file"),
])  # fmt: skip
def test_refused_requests(
    tiny_model: TinyModel, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    refused(replace(tiny_model.request(tmp_path / "e"), **changes), words)
    assert list(tmp_path.iterdir()) == []


def test_heads_of_another_model_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    other = HeadMap.uniform("other", "f" * 64, 2, 2, [0], "test", "test")
    other.save(tmp_path / "other.json")
    request = tiny_model.request(tmp_path / "e", heads=str(tmp_path / "other.json"))
    refused(request, r"other\.json: this head map is of model 'other'.*expected 'tiny-llama'")
    (tmp_path / "bad.json").write_text("{]")
    refused(replace(request, heads=str(tmp_path / "bad.json")), "not valid JSON")
    refused(replace(request, heads=str(tmp_path)), "cannot read the head map", 1)


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("model.norm.weight"), "1 missing: model.norm.weight"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), "1 unexpected: extra"),
    (lambda t: t.update({"lm_head.weight": np.zeros((264, 31), np.float32)}),
     r"1 mis-shaped: lm_head.weight \(expected \[264, 32\], found \[264, 31\]\)"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    from safetensors.numpy import load_file, save_file

    write_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    request = BuildRequest(checkpoint=tmp_path / "model", output=tmp_path / "e")
    refused(replace(request, backend="onnxruntime"), words)
    assert not (tmp_path / "e").exists()


def test_damaged_checkpoints(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    request = BuildRequest(
        checkpoint=tmp_path / "model", output=tmp_path / "e", backend="onnxruntime"
    )
    weights = tmp_path / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    refused(request, "model.safetensors: damaged", 1)
    weights.write_bytes(data)
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    refused(request, "tokenizer.json: damaged", 1)
    (tmp_path / "model" / "config.json").write_text("{")
    refused(request, "config.json: damaged", 1)
    shutil.rmtree(tmp_path / "model")
    refused(request, "no such checkpoint")


def test_weights_that_do_not_fit_the_dtype(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    request = BuildRequest(checkpoint=tmp_path / "model", output=tmp_path / "e", dtype="float16")
    refused(replace(request, backend="onnxruntime"), "do not fit into float16", 1)
    assert not (tmp_path / "e").exists()


# What is planned and named --------------------------------------------------------------------
def test_model_spec_needs_no_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    assert model_spec(BuildRequest(model="Qwen-72B")) == zoo_spec("qwen-72b")
    shutil.copytree(tiny_model.folder, tmp_path / "tiny-llama")
    (tmp_path / "tiny-llama" / "model.safetensors").unlink()
    assert model_spec(BuildRequest(checkpoint=tmp_path / "tiny-llama")) == tiny_model.spec
    with pytest.raises(UsageError, match="not the model qwen-7b"):
        model_spec(BuildRequest(model="qwen-7b", checkpoint=tiny_model.folder))


@pytest.mark.parametrize("name, safe", [
    ("qwen2.5-7b", "qwen2.5-7b"), ("My Model (v2)/x", "My-Model--v2--x"), ("../../etc", "etc"),
    (".hidden", "hidden"), ("", "model"), ("--", "model"), ("模型", "模型"), ("a\0b\n", "a-b-"),
    ("\udcff", "model"), ("é" * 90, "é" * 40),
])  # fmt: skip
def test_names_of_models_are_safe_as_files(name: str, safe: str) -> None:
    found = safe_name(name)
    assert found == safe
    spec = replace(zoo_spec("qwen-7b"), name=name)
    path = default_output(spec, True, "onnxruntime", "float32")
    assert path == Path("engines") / f"{safe}-razor-onnxruntime-float32"


def test_checkpoint_folder_with_an_odd_name(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path(shutil.copytree(tiny_model.folder, tmp_path / "-rf $(x); 'q' \"é\"\n"))
    engine = build_engine(BuildRequest(checkpoint=odd, backend="onnxruntime", max_seq_len=16))
    assert engine.directory.parent == Path("engines")
    assert engine.directory.name == "rf---x----q---é---dense-onnxruntime-float32"
    assert Engine.load(engine.directory).manifest.spec.name == odd.name


def test_recipe_is_for_the_model_not_for_its_name(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(recipes.RECIPES_ENV, str(tmp_path))
    shutil.copy(tiny_model.heads, tmp_path / "published-name.heads.json")
    said: list[str] = []
    request = tiny_model.request(tmp_path / "e", heads="auto")
    build_engine(request, said.append)
    assert "heads: recipe published-name.heads.json (test)" in said
    # Another model in a folder of the same name gets heads of its own.
    write_model(tmp_path / "other" / "tiny-llama", rope_theta=5e5)
    monkeypatch.setattr("trt_razor.heads.find.find_heads", fail(RazorError("searching")))
    said.clear()
    request = replace(request, checkpoint=tmp_path / "other" / "tiny-llama", force=True)
    with pytest.raises(RazorError, match="searching"):
        build_engine(request, said.append)
    assert any("no recipe for tiny-llama" in s for s in said)


def test_a_wheel_brings_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed: no source tree; the recipes are data files, wherever the installer puts them."""
    site, share = tmp_path / "lib" / "site-packages", tmp_path / "share" / "trt_razor" / "recipes"
    info = site / "trt_razor-9.dist-info"
    info.mkdir(parents=True)
    share.mkdir(parents=True)
    shutil.copy(ROOT / "engines" / "recipes" / "smollm2-135m.heads.json", share)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trt-razor\nVersion: 9\n")
    recipe = "../../share/trt_razor/recipes/smollm2-135m.heads.json"
    (info / "RECORD").write_text(f"{recipe},,\ntrt_razor/build.py,,\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setattr(recipes, "__file__", str(site / "trt_razor" / "recipes.py"))
    monkeypatch.delenv(recipes.RECIPES_ENV, raising=False)
    found = recipes.recipe_heads(zoo_spec("smollm2-135m"))
    assert found is not None
    assert found[0].resolve() == share / "smollm2-135m.heads.json"
    assert recipes.recipe_heads(zoo_spec("qwen-7b")) is None


def test_what_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[str, int, int]] = []
    build_engine(tiny_model.request(tmp_path / "e"), said.append, lambda *args: seen.append(args))
    assert said[0] == "backend: onnxruntime (as asked)"
    assert said[1].startswith("model: tiny-llama (llama, ")
    assert said[2] == f"heads: {tiny_model.heads} (test)"
    for stage in ("weights", "checksums"):
        steps = [(done, total) for s, done, total in seen if s == stage]
        assert steps[-1][0] == steps[-1][1] > 0
    without = shutil.copytree(tiny_model.folder, tmp_path / "no-tokenizer")
    (without / "tokenizer.json").unlink()
    said.clear()
    request = tiny_model.request(tmp_path / "e2", checkpoint=without)
    engine = build_engine(request, said.append)
    assert "note: the checkpoint has no tokenizer; this engine takes token ids only" in said
    assert engine.tokenizer() is None


# Where it goes --------------------------------------------------------------------------------
def test_output_that_is_not_an_engine_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("precious")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text('{"schema": "trt_razor.eng')
    before = content(tmp_path)
    for force in (False, True):
        for name, words in [
            ("file", "is a file"),
            ("file/inside", "file: is a file, not a folder"),
            ("folder", "not an engine of ours"),
            ("damaged", "not an engine of ours"),
        ]:
            refused(tiny_model.request(tmp_path / name, force=force), words)
    assert content(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["damaged", "file", "folder"]


def test_output_that_is_the_current_folder(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for output in (Path("."), Path(""), tmp_path):
        refused(tiny_model.request(output), "is the current folder")


def test_unwritable_folder(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by permissions: tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    refused(tiny_model.request(tmp_path / "new" / "e"), f"{tmp_path}: cannot write there", 1)
    assert list(tmp_path.iterdir()) == []
    if Path("/proc/self").exists():
        monkeypatch.undo()
        refused(tiny_model.request(Path("/proc/self/e")), "/proc/", 1)


def test_an_empty_folder_and_a_link_are_fine(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_model.build(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    refused(tiny_model.request(tmp_path / "link"), "--force rebuilds it")
    tiny_model.build(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["empty", "link"]


def test_force_replaces_an_engine_and_nothing_else(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "e")
    before = content(tmp_path / "e")
    refused(tiny_model.request(tmp_path / "e"), "an engine is already there; --force rebuilds it")
    (tmp_path / "e" / "notes.txt").write_text("precious")
    refused(tiny_model.request(tmp_path / "e", force=True), r"notes\.txt: not a file of the engine")
    (tmp_path / "e" / "notes.txt").unlink()
    assert content(tmp_path / "e") == before
    engine = tiny_model.build(tmp_path / "e", razor=False, force=True)
    assert not engine.manifest.razor
    assert not (tmp_path / "e" / "heads.json").exists()
    assert os.listdir(tmp_path) == ["e"]


def test_damaged_files_of_an_engine_do_not_stop_a_rebuild(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    engine = tiny_model.build(tmp_path / "e")
    (engine.directory / "model.onnx").write_bytes(b"damaged")
    (engine.directory / "heads.json").unlink()
    Engine.load(tiny_model.build(tmp_path / "e", force=True).directory)


def test_something_that_came_meanwhile_is_not_overwritten(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnnxRuntimeBackend.build

    def slow(self: OnnxRuntimeBackend, *args: Any) -> dict[str, str]:
        (tmp_path / "e").mkdir()
        (tmp_path / "e" / "thesis.tex").write_text("precious")
        return real(self, *args)

    monkeypatch.setattr(OnnxRuntimeBackend, "build", slow)
    refused(tiny_model.request(tmp_path / "e"), "not an engine of ours")
    assert content(tmp_path) == {"e/thesis.tex": b"precious"}


# Failing on the way ---------------------------------------------------------------------------
STAGES = {
    "weights": "trt_razor.graph.weights.WeightFile.add",
    "graph": "trt_razor.graph.decoder.write_bytes_atomic",
    "heads": "trt_razor.headmap.HeadMap.save",
    "tokenizer": "trt_razor.models.tokenizer.Tokenizer.save",
    "checksums": "trt_razor.engine.sha256_file",
    "manifest": "trt_razor.engine.write_text_atomic",
    "swap": "trt_razor.files._put_in_place",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), RazorError("no")])
def test_a_failed_build_leaves_what_was_there(
    tiny_model: TinyModel,
    razor_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
) -> None:
    shutil.copytree(razor_engine.directory, tmp_path / "old")
    before = content(tmp_path / "old")
    monkeypatch.setattr(STAGES[stage], fail(error))
    for name in ("old", "new"):
        expected = RazorError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as e:
            tiny_model.build(tmp_path / name, force=True)
        if error is NO_SPACE:
            assert "disk full" in str(e.value)
            assert str(tmp_path / name) in str(e.value)
            assert e.value.exit_code == 1  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == ["old"]
    assert content(tmp_path / "old") == before
    monkeypatch.undo()
    Engine.load(tmp_path / "old")


def test_a_disk_that_is_too_small_is_seen_before_the_work(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage._replace(free=1000))
    monkeypatch.setattr(OnnxRuntimeBackend, "build", fail(AssertionError("too late")))
    refused(tiny_model.request(tmp_path / "e"), r"disk full: the weights need .* 1000 B are", 1)


def test_errors_of_reading_name_the_file_that_was_read(tmp_path: Path) -> None:
    missing = tmp_path / "checkpoint" / "shard"
    with pytest.raises(RazorError) as e, replace_directory(tmp_path / "e"):
        missing.read_bytes()
    assert f"{missing}: No such file or directory" in str(e.value)
    assert str(tmp_path / "e") in str(e.value)
    with pytest.raises(RazorError, match=r"shard: cannot read: No such file"):
        sha256_file(missing)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP])
def test_without_an_atomic_swap_two_renames_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(files.ctypes, "get_errno", lambda: code)

    class Libc:
        @staticmethod
        def renameat2(*args: object) -> int:
            return -1

    monkeypatch.setattr(files.ctypes, "CDLL", lambda *a, **k: Libc)
    monkeypatch.setattr(files.sys, "platform", "linux")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f").write_text("old")
    with replace_directory(tmp_path / "e") as staging:
        (staging / "f").write_text("new")
    assert content(tmp_path) == {"e/f": b"new"}
    assert os.listdir(tmp_path) == ["e"]


def test_ctrl_c_between_the_steps_of_a_swap_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    real = os.rename

    def rename(a: Any, b: Any) -> None:
        real(a, b)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "f").write_text("old")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), replace_directory(tmp_path / "e") as staging:
        (staging / "f").write_text("new")
    assert content(tmp_path) == {"e/f": b"new"}
    assert os.listdir(tmp_path) == ["e"]
    assert signal.getsignal(signal.SIGINT) is handler


# Real processes -------------------------------------------------------------------------------
SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import trt_razor.{module} as module
real = getattr(module{owner}, {name!r})
def slow(*args, **kwargs):
    print("here", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)
    return real(*args, **kwargs)
setattr(module{owner}, {name!r}, slow)
from trt_razor.cli import main
sys.exit(main({argv!r}))
"""
POINTS = {
    "weights": ("graph.weights", ".WeightFile", "add"),
    "checksums": ("engine", "", "sha256_file"),
    "manifest": ("engine", "", "write_text_atomic"),
}


def arguments(model: TinyModel, output: Path) -> list[str]:
    return [
        "build", "--checkpoint", str(model.folder), "--razor", "--heads", str(model.heads),
        "--backend", "onnxruntime", "--output", str(output), "--max-seq-len", "64", "--force",
        "--min-window", "8",
    ]  # fmt: skip


def start(model: TinyModel, output: Path, stage: str) -> subprocess.Popen[str]:
    """A build that stops for a minute at a stage, once it is there."""
    module, owner, name = POINTS[stage]
    code = SCRIPT.format(
        root=str(ROOT), tests=str(ROOT / "tests"), module=module, owner=owner, name=name,
        argv=arguments(model, output),
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n", process.communicate(timeout=10)
    return process


@pytest.mark.parametrize("stage, number", [
    ("weights", signal.SIGINT), ("checksums", signal.SIGTERM), ("manifest", signal.SIGHUP),
])  # fmt: skip
def test_an_interrupted_process_leaves_the_good_engine(
    tiny_model: TinyModel, razor_engine: Engine, tmp_path: Path, stage: str, number: int
) -> None:
    shutil.copytree(razor_engine.directory, tmp_path / "e")
    before = content(tmp_path / "e")
    with start(tiny_model, tmp_path / "e", stage) as process:
        assert len([p for p in os.listdir(tmp_path) if ".partial-" in p]) == 1
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; nothing half-made was left"
    assert os.listdir(tmp_path) == ["e"]
    assert content(tmp_path / "e") == before
    Engine.load(tmp_path / "e")


def test_a_killed_process_is_cleaned_up_after_and_a_living_one_is_not(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    killed = start(tiny_model, tmp_path / "e", "weights")
    with killed:
        killed.kill()
        killed.communicate(timeout=20)
    left = [p for p in os.listdir(tmp_path) if ".partial-" in p]
    assert len(left) == 1
    assert not (tmp_path / "e").exists()
    with pytest.raises(UsageError):
        Engine.load(tmp_path / left[0])
    # Of another host: its locks may not be visible here, so it is left alone.
    other = tmp_path / ".e.partial-elsewhere-abc"
    other.mkdir()
    with start(tiny_model, tmp_path / "e", "weights") as living:
        busy = [p for p in os.listdir(tmp_path) if ".partial-" in p and p != other.name]
        assert len(busy) == 1
        assert busy != left
        tiny_model.build(tmp_path / "e")
        assert sorted(os.listdir(tmp_path)) == sorted([*busy, other.name, "e"])
        living.kill()
        living.communicate(timeout=20)


def test_an_engine_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    prefix = files._staging_prefix(tmp_path / "e")
    (tmp_path / f"{prefix}abc").mkdir()
    (tmp_path / f"{prefix}abc.old").mkdir()
    (tmp_path / f"{prefix}abc.old" / "f").write_text("good")
    with pytest.raises(ValueError, match="bug"), replace_directory(tmp_path / "e"):
        raise ValueError("bug")
    assert content(tmp_path) == {"e/f": b"good"}
    assert os.listdir(tmp_path) == ["e"]


def test_a_name_as_long_as_a_file_system_takes(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    for text in ("one", "two"):
        with replace_directory(target) as staging:
            (staging / "f").write_text(text)
    assert (target / "f").read_text() == "two"
    assert len(os.listdir(tmp_path)) == 1


def test_two_builds_at_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    with start(tiny_model, tmp_path / "e", "checksums") as process:
        engine = tiny_model.build(tmp_path / "e")
        process.terminate()
        process.communicate(timeout=20)
    assert os.listdir(tmp_path) == ["e"]
    assert Engine.load(tmp_path / "e").manifest == engine.manifest


def test_manifest_is_plain_json(razor_engine: Engine) -> None:
    data = json.loads((razor_engine.directory / "manifest.json").read_text("utf-8"))
    assert (data["schema"], data["version"]) == ("trt_razor.engine", 1)
    assert data["policy"] == POLICY.to_json()
    assert time.strptime(data["created"], "%Y-%m-%dT%H:%M:%S%z").tm_year >= 2024
