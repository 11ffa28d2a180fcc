"""Model repositories of our own engines: what is written, what is refused, what is left behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel

from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.serving import repository_files
from trt_razor.serving.interface import MODELS, public_and_extra
from trt_razor.serving.repository import (
    RepositoryOptions,
    read_marker,
    write_repository,
)

needs_protobuf = pytest.mark.skipif(
    importlib.util.find_spec("tritonclient") is None, reason="needs the extra triton"
)


def write(engine: Engine | Path, output: Path, **options: Any) -> Path:
    folder = engine.directory if isinstance(engine, Engine) else engine
    return write_repository(folder, output, RepositoryOptions(**options))


def parameters(repository: Path, model: str = "tensorrt_llm") -> dict[str, str]:
    """As the config.pbtxt has them."""
    text = (repository / model / "config.pbtxt").read_text()
    pattern = r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}'
    return dict(re.findall(pattern, text))


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def only(folder: Path, *names: str) -> None:
    """Nothing else was left there."""
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.fixture
def ids_engine(tiny_model: TinyModel, tmp_path: Path) -> Engine:
    """An engine of a checkpoint without a tokenizer."""
    folder = shutil.copytree(tiny_model.folder, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return TinyModel(folder, tiny_model.spec, tiny_model.heads).build(tmp_path / "ids-engine")


# What is written ----------------------------------------------------------------------------------
TOKENIZER = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES = [
    *(f"{m}/config.pbtxt" for m in MODELS),
    *(f"{m}/1/model.py" for m in MODELS if m != "ensemble"),
    "ensemble/1/.keep",
    *(f"{m}/1/tokenizer/{n}" for m in ("preprocessing", "postprocessing") for n in TOKENIZER),
    "README.md",
    "start.sh",
    "trt_razor.json",
]


def test_files(razor_engine: Engine, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    output = write_repository(
        razor_engine.directory,
        tmp_path / "repository",
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert output == tmp_path / "repository"
    assert files(output) == sorted(FILES)
    assert os.access(output / "start.sh", os.X_OK)
    only(tmp_path, "repository")
    assert {stage for stage, _, _ in seen} == {"verify"}
    assert seen[-1][1] == seen[-1][2]
    marker = read_marker(output)
    assert marker is not None
    assert marker["flavour"] == "python"
    assert marker["engine"]["digest"] == razor_engine.manifest.to_json()["digest"]
    assert marker["models"] == sorted(MODELS)
    assert sorted([*marker["files"], "trt_razor.json"]) == sorted(FILES)
    for name in TOKENIZER:
        copied = (output / "preprocessing" / "1" / "tokenizer" / name).read_bytes()
        assert copied == (razor_engine.directory / "tokenizer" / name).read_bytes()


@needs_protobuf
@pytest.mark.parametrize("options", [{}, {"copy_engine": True}, {"prompt_format": "chat"}])
def test_passes_the_offline_check(
    razor_engine: Engine, tmp_path: Path, options: dict[str, Any]
) -> None:
    from trt_razor.serving.check import check_repository

    assert check_repository(write(razor_engine, tmp_path / "r", **options)) == []


def test_defaults_are_the_engines(razor_engine: Engine, tmp_path: Path) -> None:
    found = parameters(write(razor_engine, tmp_path / "r"))
    expected = {
        "gpt_model_path": str(razor_engine.directory),
        "slots": "3",
        "max_queue_size": "64",
        "max_input_tokens": "64",
        "max_output_tokens": "64",
        "verify": "true",
        "exclude_input_in_output": "true",
    }
    assert {k: found[k] for k in expected} == expected
    assert parameters(tmp_path / "r", "preprocessing")["prompt_format"] == "raw"


def test_options_reach_the_configs(razor_engine: Engine, tmp_path: Path) -> None:
    output = write(
        razor_engine,
        tmp_path / "r",
        slots=2,
        max_queue_size=0,
        max_input_tokens=40,
        max_output_tokens=9,
        max_batch_size=2,
        verify=False,
        prompt_format="chat",
        exclude_input_in_output=False,
        add_special_tokens=False,
        skip_special_tokens=False,
        accumulate_tokens=True,
        bls_instances=2,
    )
    found = parameters(output)
    assert [found[k] for k in ("slots", "max_queue_size")] == ["2", "0"]
    assert [found[k] for k in ("max_input_tokens", "max_output_tokens")] == ["40", "9"]
    assert [found[k] for k in ("verify", "exclude_input_in_output")] == ["false", "false"]
    pre, post = (parameters(output, m) for m in ("preprocessing", "postprocessing"))
    assert (pre["prompt_format"], pre["add_special_tokens"]) == ("chat", "false")
    assert post["skip_special_tokens"] == "false"
    assert parameters(output, "tensorrt_llm_bls")["accumulate_tokens"] == "true"
    assert "count: 2" in (output / "tensorrt_llm_bls" / "config.pbtxt").read_text()
    assert "max_batch_size: 2" in (output / "ensemble" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    "options, path",
    [
        ({"mounted_at": "/models/tiny/"}, "/models/tiny"),
        ({"copy_engine": True}, "1/engine"),
        ({"copy_engine": True, "mounted_at": "/repository"}, "1/engine"),
    ],
)
def test_where_the_server_sees_the_engine(
    razor_engine: Engine, tmp_path: Path, options: dict[str, Any], path: str
) -> None:
    output = write(razor_engine, tmp_path / "r", **options)
    assert parameters(output)["gpt_model_path"] == path
    script = (output / "start.sh").read_text()
    assert f"\nengine={path}\n" in script or f'\nengine="$here"/tensorrt_llm/{path}\n' in script


def test_check_tells_lost_files(razor_engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc")
    from trt_razor.serving.check import check_repository

    output = write(razor_engine, tmp_path / "repository", copy_engine=True)
    lost = [
        "start.sh",
        "preprocessing/1/tokenizer/tokenizer.json",
        "tensorrt_llm/1/engine/manifest.json",
    ]
    for name in lost:
        (output / name).unlink()
    assert sorted(check_repository(output)) == sorted(f"{name}: is missing" for name in lost)


def test_engine_without_tokenizer(ids_engine: Engine, tmp_path: Path) -> None:
    output = write(ids_engine, tmp_path / "r")
    assert sorted(p.name for p in output.iterdir() if p.is_dir()) == ["tensorrt_llm"]
    assert "no tokenizer" in (output / "README.md").read_text()
    if importlib.util.find_spec("tritonclient") is not None:
        from trt_razor.serving.check import check_repository

        assert check_repository(output) == []
    with pytest.raises(UsageError, match="chat template"):
        write(ids_engine, tmp_path / "chat", prompt_format="chat")


# The copy -----------------------------------------------------------------------------------------
def test_copy_is_a_whole_engine(razor_engine: Engine, tmp_path: Path) -> None:
    source = shutil.copytree(razor_engine.directory, tmp_path / "engine")
    (source / "notes.txt").write_text("not the engine's")
    output = write(source, tmp_path / "r", copy_engine=True)
    copied = output / "tensorrt_llm" / "1" / "engine"
    assert Engine.load(copied).manifest == razor_engine.manifest
    assert files(copied) == sorted(p for p in files(source) if p != "notes.txt")
    shutil.rmtree(source)  # nothing of it is needed, and no file was shared with it
    assert Engine.load(copied).manifest == razor_engine.manifest


def fail_in(stage: str, error: BaseException) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, total: int) -> None:
        if now == stage and done:
            raise error

    return progress


@pytest.mark.parametrize(
    "error, shown",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_copy_that_fails_leaves_nothing(
    razor_engine: Engine, tmp_path: Path, error: BaseException, shown: str | None
) -> None:
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RazorError
    with pytest.raises(expected, match=shown):
        write_repository(
            razor_engine.directory,
            tmp_path / "r",
            RepositoryOptions(copy_engine=True),
            fail_in("copy", error),
        )
    only(tmp_path)


def test_engine_that_changes_while_it_is_copied(razor_engine: Engine, tmp_path: Path) -> None:
    source = shutil.copytree(razor_engine.directory, tmp_path / "engine")

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "copy" and done == 0:
            os.truncate(source / "model.onnx.data", 100)

    with pytest.raises(RazorError, match=r"model\.onnx\.data: size: expected \d+ bytes, found 100"):
        write_repository(source, tmp_path / "r", RepositoryOptions(copy_engine=True), progress)
    only(tmp_path, "engine")


def test_too_little_space(
    razor_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RazorError, match="disk full"):
        write(razor_engine, tmp_path / "r", copy_engine=True)
    only(tmp_path)
    write(razor_engine, tmp_path / "by-path")  # needs next to nothing


# What is refused ----------------------------------------------------------------------------------
def test_damaged_engine(razor_engine: Engine, tmp_path: Path) -> None:
    source = shutil.copytree(razor_engine.directory, tmp_path / "engine")
    data = bytearray((source / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (source / "model.onnx.data").write_bytes(data)
    for copied in (False, True):
        with pytest.raises(RazorError, match=r"model\.onnx\.data: sha256.*damaged"):
            write(source, tmp_path / "r", copy_engine=copied)
        only(tmp_path, "engine")
    assert parameters(write(source, tmp_path / "r", verify=False))["verify"] == "false"


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such engine directory"):
        write(tmp_path / "nothing", tmp_path / "r")
    only(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"slots": 4}, r"slots: expected 1\.\.3"),
        ({"slots": 0}, r"slots: expected 1\.\.3"),
        ({"max_batch_size": 4}, r"max_batch_size: expected 1\.\.3"),
        ({"max_input_tokens": 65}, r"max_input_tokens: expected 1\.\.64"),
        ({"max_output_tokens": 0}, r"max_output_tokens: expected 1\.\.64"),
        ({"max_queue_size": -1}, "max_queue_size"),
        ({"bls_instances": 0}, "bls_instances"),
        ({"prompt_format": "html"}, "prompt_format: expected raw, chat or messages"),
        ({"mounted_at": "models"}, "mounted_at: expected an absolute path"),
        ({"mounted_at": "/m/${x}"}, "mounted_at: expected an absolute path"),
        ({"mounted_at": "/models\n"}, "mounted_at: expected an absolute path"),
        ({"mounted_at": "/mödels"}, "beyond ASCII"),
        ({"mounted_at": "/a b", "copy_engine": True}, "loads no Python models from"),
        ({"decoupled": False}, "decoupled: does not apply"),
        ({"kv_cache_free_gpu_mem_fraction": 0.5}, "kv_cache_free_gpu_mem_fraction: does not apply"),
        ({"gpu_device_ids": "0"}, "gpu_device_ids: does not apply"),
    ],
)
def test_wrong_options(
    razor_engine: Engine, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as found:
        write_repository(
            razor_engine.directory,
            tmp_path / "r",
            RepositoryOptions(**options),
            lambda stage, done, total: pytest.fail("refused after minutes of reading"),
        )
    assert "\n" not in str(found.value)
    only(tmp_path)


@pytest.mark.parametrize("name", ["a b", "a$HOME", "a;b", 'a"b', "a'b", "a(b)", "a\\b", "é", "a&b"])
def test_paths_that_triton_cannot_load_from(
    razor_engine: Engine, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match="loads no Python models from a path"):
        write(razor_engine, tmp_path / name)
    only(tmp_path)
    write(razor_engine, tmp_path / name, mounted_at="/engines/tiny")  # moved there, elsewhere


# What is there already ----------------------------------------------------------------------------
def test_a_repository_is_replaced_only_when_told(razor_engine: Engine, tmp_path: Path) -> None:
    output = write(razor_engine, tmp_path / "r")
    with pytest.raises(UsageError, match="already there; --force replaces it"):
        write(razor_engine, output, slots=1)
    assert parameters(output)["slots"] == "3"
    cache = output / "tensorrt_llm" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-311.pyc").write_bytes(b"")  # a server ran from it
    write(razor_engine, output, slots=1, force=True)
    assert parameters(output)["slots"] == "1"
    only(tmp_path, "r")


def test_other_files_are_not_replaced(razor_engine: Engine, tmp_path: Path) -> None:
    output = write(razor_engine, tmp_path / "r")
    (output / "resnet").mkdir()
    (output / "resnet" / "config.pbtxt").write_text("mine")
    with pytest.raises(UsageError, match=r"resnet/config\.pbtxt: is not of the repository there"):
        write(razor_engine, output, force=True)
    assert (output / "resnet" / "config.pbtxt").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", [None, "{}", "[", '{"schema": "other"}'])
def test_folders_that_are_not_ours(
    razor_engine: Engine, tmp_path: Path, content: str | None, force: bool
) -> None:
    output = tmp_path / "r"
    output.mkdir()
    (output / "precious.txt").write_text("x")
    if content is not None:
        (output / "trt_razor.json").write_text(content)
    with pytest.raises(UsageError, match="not a model repository of ours"):
        write(razor_engine, output, force=force)
    assert (output / "precious.txt").read_text() == "x"


def test_output_that_cannot_be_one(
    razor_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write(razor_engine, tmp_path / "file", force=True)
    source = shutil.copytree(razor_engine.directory, tmp_path / "outer" / "engine")
    for output in (source, source / "repository", tmp_path / "outer"):
        with pytest.raises(UsageError, match="lie in one another"):
            write(source, output, force=True)
    assert Engine.load(source).manifest == razor_engine.manifest
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="current folder"):
        write(razor_engine, Path("."))
    (tmp_path / "empty").mkdir()
    write(razor_engine, Path("../empty"))
    assert (tmp_path / "empty" / "trt_razor.json").exists()


# The texts ----------------------------------------------------------------------------------------
def test_models_say_what_is_missing(razor_engine: Engine, tmp_path: Path) -> None:
    shim = write(razor_engine, tmp_path / "r") / "preprocessing" / "1" / "model.py"
    text = shim.read_text().replace("trt_razor.serving", "trt_razor_that_is_absent")
    with pytest.raises(ImportError, match=r"model preprocessing: No module .*pip install") as found:
        exec(compile(text, str(shim), "exec"), {})
    assert sys.prefix in str(found.value)


def bodies(readme: str) -> list[tuple[str, dict[str, Any]]]:
    """(model, JSON) of the curl commands."""
    found = re.findall(r"models/(\w+)/generate\S* \\\n\s+-d '(.*)'", readme)
    return [(model, json.loads(body)) for model, body in found]


@pytest.mark.parametrize("prompt_format", ["raw", "chat", "messages"])
def test_readme_is_of_this_engine(razor_engine: Engine, tmp_path: Path, prompt_format: str) -> None:
    text = (
        write(razor_engine, tmp_path / "r", prompt_format=prompt_format) / "README.md"
    ).read_text()
    m = razor_engine.manifest
    assert f"{3 * m.kv_bytes_per_slot:,} bytes for 3 sequences of 64 tokens" in text
    assert f"dense attention: {3 * m.dense_kv_bytes_per_slot:,}" in text
    assert "1 of 4 KV heads" in text
    assert f"Default: `{prompt_format}`" in text
    requests = bodies(text)
    assert len(requests) == 3
    for model, body in requests:
        inputs = {t.name for t in public_and_extra(model, own=True).inputs}
        assert set(body) <= inputs
        # A plain question must never be read as a JSON list of messages, nor the other way round.
        kind = body.get("prompt_format", prompt_format)
        assert (kind == "messages") == body["text_input"].startswith("[")


def test_readme_of_a_dense_engine(dense_engine: Engine, tmp_path: Path) -> None:
    text = (write(dense_engine, tmp_path / "r") / "README.md").read_text()
    assert "dense attention |" in text
    assert "KV heads keep" not in text


def test_shims_name_modules_that_exist() -> None:
    for module in repository_files.MODULES.values():
        assert importlib.util.find_spec(module) is not None
