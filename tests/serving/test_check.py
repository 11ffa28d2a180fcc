"""The offline check: files on the disk damaged in one way each, and exactly that finding."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.serving import check
from trt_razor.serving.check import check_repository
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs

pytest.importorskip("google.protobuf")
pytest.importorskip("tritonclient.grpc")

MODEL = "class TritonPythonModel:\n    pass\n"
ENGINE = 'with a "quote" and \\ and ü'


def write(root: Path, own: bool, **settings: Any) -> Path:
    """A repository whose files are there, with nothing in them that runs."""
    tokenizer = {"tokenizer_dir": "1/tokenizer", **settings}
    if own:
        configs = own_configs(OwnSettings(f"1/{ENGINE}", **tokenizer))
        (root / "tensorrt_llm" / "1" / ENGINE).mkdir(parents=True)
    else:
        engine = root.parent / ENGINE
        engine.mkdir()
        configs = trtllm_configs(TrtllmSettings(str(engine), **tokenizer))
    for config in configs:
        version = root / config.name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (root / config.name / "config.pbtxt").write_text(config.text())
        if config.backend == "python":
            (version / "model.py").write_text(MODEL)
    for name in ("preprocessing", "postprocessing"):
        (root / name / "1" / "tokenizer").mkdir()
    (root / "README.md").write_text("not a model")
    (root / ".hidden").mkdir()
    return root


@pytest.fixture(params=["own", "trtllm"])
def any_repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "models", request.param == "own")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write(tmp_path / "models", True)


@pytest.fixture
def trtllm(tmp_path: Path) -> Path:
    return write(tmp_path / "models", False)


def edit(root: Path, model: str, old: str, new: str) -> None:
    path = root / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_good_repository_has_no_findings(any_repository: Path) -> None:
    assert check_repository(any_repository) == []


def test_a_repository_through_a_link(own: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(own)
    assert check_repository(tmp_path / "link") == []


def test_what_the_parser_reads_is_what_was_written(any_repository: Path) -> None:
    """The way back: a file is the same ``ModelConfig`` again."""
    is_own = (any_repository / "tensorrt_llm" / "1" / ENGINE).is_dir()
    engine = f"1/{ENGINE}" if is_own else str(any_repository.parent / ENGINE)
    configs = own_configs(OwnSettings(engine)) if is_own else trtllm_configs(TrtllmSettings(engine))
    for config in configs:
        found, problems = check._read(any_repository, config.name, check._schema())
        assert problems == []
        assert found == config


TEXT: dict[str, tuple[str, str, str, list[str]]] = {
    # label: model, what is in its config.pbtxt, what comes there instead, findings
    "placeholder": (
        "ensemble",
        "name: ",
        "# ${engine_dir}\nname: ",
        ["model 'ensemble': config.pbtxt: a placeholder (${…}) is left in line 2"],
    ),
    "unknown field": (
        "ensemble",
        "max_batch_size: 8",
        "max_batch_sise: 8",
        [
            "model 'ensemble': config.pbtxt: cannot be parsed: 4:1: Message type "
            '"inference.ModelConfig" has no field named "max_batch_sise".'
        ],
    ),
    "a field twice": (
        "ensemble",
        "max_batch_size: 8",
        "max_batch_size: 8 max_batch_size: 8",
        [
            "model 'ensemble': config.pbtxt: cannot be parsed: 4:35: Message type "
            '"inference.ModelConfig" should not have multiple "max_batch_size" fields.'
        ],
    ),
    "bad enum": (
        "postprocessing",
        "TYPE_STRING",
        "TYPE_TEXT",
        [
            "model 'postprocessing': config.pbtxt: cannot be parsed: 14:31: Enum type "
            '"inference.DataType" has no value named TYPE_TEXT.'
        ],
    ),
    "not filled in": (
        "postprocessing",
        "max_batch_size: 8",
        "max_batch_size: ${triton_max_batch_size}",
        [
            "model 'postprocessing': config.pbtxt: a placeholder (${…}) is left in line 4",
            "model 'postprocessing': config.pbtxt: cannot be parsed: 4:17: Couldn't parse integer: $",
        ],
    ),
    "another name": (
        "postprocessing",
        'name: "postprocessing"',
        'name: "post"',
        [
            "model 'postprocessing': config.pbtxt: expected name 'postprocessing' as the folder's, "
            "found 'post'",
            "model 'ensemble': step 3 (postprocessing): unknown model 'postprocessing'; did you mean "
            "preprocessing or post?",
        ],
    ),
    "no name": (
        "postprocessing",
        'name: "postprocessing"\n',
        "",
        [
            "model 'postprocessing': config.pbtxt: expected name 'postprocessing' as the folder's, "
            "found ''"
        ],
    ),
    "parameter twice": (
        "postprocessing",
        'parameters { key: "skip',
        'parameters { key: "skip_special_tokens" value { string_value: "false" } }\n'
        'parameters { key: "skip',
        ["model 'postprocessing': parameter 'skip_special_tokens' is there twice"],
    ),
    "map entry twice": (
        "ensemble",
        'input_map { key: "END_ID"',
        'input_map { key: "END_ID" value: "pad_id" }\n    input_map { key: "END_ID"',
        ["model 'ensemble': step 1 (preprocessing): 'END_ID' is twice in input_map"],
    ),
    "output twice": (
        "ensemble",
        '  { name: "batch_index"',
        '  { name: "batch_index" data_type: TYPE_INT32 dims: [ 1 ] },\n  { name: "batch_index"',
        ["model 'ensemble': output 'batch_index' is there twice"],
    ),
    "dims missing": (
        "postprocessing",
        '"OUTPUT" data_type: TYPE_STRING dims: [ -1 ]',
        '"OUTPUT" data_type: TYPE_STRING',
        [
            "model 'postprocessing': output 'OUTPUT': dims are missing",
            "model 'postprocessing': public output 'OUTPUT': expected dims [-1], found []",
        ],
    ),
    "reshape to a vector": (
        "tensorrt_llm",
        "reshape { shape: [ ] }",
        "reshape { shape: [ 1 ] }",
        [
            "model 'tensorrt_llm': public input 'encoder_output_lengths': expected scalar true, found "
            "false"
        ],
    ),
    "value not read": (
        "tensorrt_llm",
        '"num_nodes" value { string_value: "1" }',
        '"num_nodes" value { string_value: "one" }',
        [],  # by flavour, below
    ),
}


@pytest.mark.parametrize("damage", [d for d in TEXT if TEXT[d][3]])
def test_one_damage_of_a_file(damage: str, own: Path) -> None:
    model, old, new, expected = TEXT[damage]
    edit(own, model, old, new)
    found = check_repository(own)
    if damage == "another name":  # our own ensemble has no postprocessing
        expected = expected[:1]
    assert found == expected


def test_values_are_checked_as_each_flavour_reads_them(own: Path, tmp_path: Path) -> None:
    model, old, new, _ = TEXT["value not read"]
    edit(own, model, old, new)
    assert check_repository(own) == [
        "model 'tensorrt_llm': parameter 'num_nodes': expected 1, found 'one'"
    ]
    (tmp_path / "stock").mkdir()
    stock = write(tmp_path / "stock" / "models", False)
    edit(stock, model, old, new)
    assert check_repository(stock) == [
        "model 'tensorrt_llm': parameter 'num_nodes': expected a whole number from 1 to 2147483647, "
        "or nothing, found 'one'"
    ]


def test_official_ensemble_has_an_output_twice(trtllm: Path) -> None:
    """The public template has this one twice; protobuf and the server take it."""
    old = '  { name: "kv_cache_alloc_total_blocks" data_type: TYPE_INT32 dims: [ 1 ] },\n'
    edit(trtllm, "ensemble", old, old + old)
    assert check_repository(trtllm) == [
        "model 'ensemble': output 'kv_cache_alloc_total_blocks' is there twice"
    ]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap(path: Path, target: Path) -> None:
    """Move a file or folder away and link to it."""
    shutil.move(path, target)
    path.symlink_to(target)


PRE = "preprocessing"
FILES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "model missing": (
        lambda r: shutil.rmtree(r / "postprocessing"),
        ["model 'postprocessing' is missing"],
    ),
    "a folder that is no model": (
        lambda r: (r / "tokenizer").mkdir(),
        ["model 'tokenizer': config.pbtxt: is missing"],
    ),
    "config missing": (
        lambda r: (r / "postprocessing" / "config.pbtxt").unlink(),
        ["model 'postprocessing': config.pbtxt: is missing"],
    ),
    "config is a folder": (
        lambda r: ((r / "postprocessing" / "config.pbtxt").unlink(), (r / "postprocessing" / "config.pbtxt").mkdir()),
        ["model 'postprocessing': config.pbtxt: cannot read: Is a directory"],
    ),
    "config is a pipe": (
        lambda r: pipe(r / "postprocessing" / "config.pbtxt"),
        ["model 'postprocessing': config.pbtxt: expected a file, found something else"],
    ),
    "config too large": (
        lambda r: (r / "postprocessing" / "config.pbtxt").write_text("#" * (1 << 20) + "\n"),
        [
            "model 'postprocessing': config.pbtxt: expected at most 1048576 bytes, found 1048577"
        ],
    ),
    "config is not UTF-8": (
        lambda r: (r / "postprocessing" / "config.pbtxt").write_bytes(b"name: \"\xff\""),
        ["model 'postprocessing': config.pbtxt: expected UTF-8 text, found byte 0xff at 7"],
    ),
    "config elsewhere": (
        lambda r: swap(r / "postprocessing" / "config.pbtxt", r.parent / "c"),
        ["model 'postprocessing': config.pbtxt: leads out of the repository, to {parent}/c"],
    ),
    "no version": (
        lambda r: shutil.rmtree(r / "ensemble" / "1"),
        ["model 'ensemble': expected a version folder such as '1', found none"],
    ),
    "version 0": (
        lambda r: (r / "ensemble" / "1").rename(r / "ensemble" / "0"),
        ["model 'ensemble': version folder '0': expected a number of at least 1"],
    ),
    "model.py missing": (
        lambda r: (r / PRE / "1" / "model.py").unlink(),
        ["model 'preprocessing': 1/model.py: is missing"],
    ),
    "model.py missing in the second version": (
        lambda r: (r / PRE / "2").mkdir(),
        ["model 'preprocessing': 2/model.py: is missing"],
    ),
    "model.py broken": (
        lambda r: (r / PRE / "1" / "model.py").write_text("x = 1\nclass TritonPythonModel\n"),
        ["model 'preprocessing': 1/model.py: not Python: expected ':' in line 2"],
    ),
    "model.py empty": (
        lambda r: (r / PRE / "1" / "model.py").write_text(""),
        ["model 'preprocessing': 1/model.py: expected a TritonPythonModel, found none"],
    ),
    "model.py too large": (
        lambda r: (r / PRE / "1" / "model.py").write_text("#" * (1 << 20) + "\n"),
        [
            "model 'preprocessing': 1/model.py: expected at most 1048576 bytes, found 1048577"
        ],
    ),
    "model.py elsewhere": (
        lambda r: swap(r / PRE / "1" / "model.py", r.parent / "m"),
        ["model 'preprocessing': 1/model.py: leads out of the repository, to {parent}/m"],
    ),
    "engine missing": (
        lambda r: (r / "tensorrt_llm" / "1" / ENGINE).rmdir(),
        [
            "model 'tensorrt_llm': parameter 'gpt_model_path': expected a folder at {engine!r}, found "
            "nothing"
        ],
    ),
    "engine is a file": (
        lambda r: (
            (r / "tensorrt_llm" / "1" / ENGINE).rmdir(),
            (r / "tensorrt_llm" / "1" / ENGINE).touch(),
        ),
        [
            "model 'tensorrt_llm': parameter 'gpt_model_path': expected a folder at {engine!r}, found "
            "something else"
        ],
    ),
    "tokenizer missing": (
        lambda r: (r / PRE / "1" / "tokenizer").rmdir(),
        [
            "model 'preprocessing': parameter 'tokenizer_dir': expected a folder at '1/tokenizer', "
            "found nothing",
            "model 'tensorrt_llm_bls': parameter 'tokenizer_dir': expected a folder at "
            "'../preprocessing/1/tokenizer', found nothing",
        ],
    ),
    "tokenizer elsewhere": (
        lambda r: swap(r / "postprocessing" / "1" / "tokenizer", r.parent / "t"),
        [
            "model 'postprocessing': parameter 'tokenizer_dir': '1/tokenizer' leads out of the "
            "repository, to {parent}/t"
        ],
    ),
    "a path out of the repository": (
        lambda r: edit(r, "postprocessing", '"1/tokenizer"', '"../../secret"'),
        [
            "model 'postprocessing': parameter 'tokenizer_dir': '../../secret' leads out of the "
            "repository, to {parent}/secret"
        ],
    ),
    "a path with a NUL": (
        lambda r: edit(r, "postprocessing", '"1/tokenizer"', '"1/tok\\000"'),
        [
            "model 'postprocessing': parameter 'tokenizer_dir': expected a path of a folder, found "
            "'1/tok\\x00'"
        ],
    ),
    "environment missing": (
        lambda r: edit(
            r,
            PRE,
            "parameters {",
            'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/no/such" } }\nparameters {',
        ),
        ["model 'preprocessing': parameter 'EXECUTION_ENV_PATH': '/no/such' does not exist"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", FILES)
def test_one_damage_of_the_folders(damage: str, own: Path) -> None:
    change, expected = FILES[damage]
    change(own)
    values = {"parent": os.path.realpath(own.parent), "engine": f"1/{ENGINE}"}
    assert check_repository(own) == [text.format(**values) for text in expected]


def test_engine_of_the_stock_backend_missing(trtllm: Path) -> None:
    engine = trtllm.parent / ENGINE
    engine.rmdir()
    finding = (
        "model 'tensorrt_llm': parameter 'gpt_model_path': expected a folder at "
        f"{str(engine)!r}, found nothing"
    )
    assert check_repository(trtllm) == [finding]
    # The folder of a container is not here; its neighbour with the same beginning is not it.
    assert check_repository(trtllm, elsewhere=str(trtllm.parent)) == []
    assert check_repository(trtllm, elsewhere=str(engine)) == []
    assert check_repository(trtllm, elsewhere=str(engine)[:-1]) == [finding]


def test_largest_source(own: Path) -> None:
    (own / PRE / "1" / "model.py").write_text(MODEL + "#" * ((1 << 20) - len(MODEL)))
    assert check_repository(own) == []


def test_too_many_folders(own: Path) -> None:
    for i in range(95):
        (own / f"m{i}").mkdir()
    assert len(check_repository(own)) == 95
    (own / "m95").mkdir()
    assert check_repository(own) == [f"{own}: expected at most 100 models, found 101 folders"]


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as e:
        check_repository(tmp_path / "none")
    assert str(e.value) == (
        f"{tmp_path / 'none'}: expected the folder of a model repository, found none"
    )


def test_the_engine_alone_is_whole(any_repository: Path) -> None:
    """Ids in, ids out: what an engine without a tokenizer gets."""
    others = ("preprocessing", "postprocessing", "ensemble", "tensorrt_llm_bls")
    for name in others:
        shutil.rmtree(any_repository / name)
    assert check_repository(any_repository) == []
    shutil.rmtree(any_repository / "tensorrt_llm")
    assert check_repository(any_repository) == [
        f"model {name!r} is missing"
        for name in (
            "preprocessing",
            "tensorrt_llm",
            "postprocessing",
            "ensemble",
            "tensorrt_llm_bls",
        )
    ]


def test_a_folder_that_cannot_be_listed(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: Path) -> Any:
        if Path(path).name == "ensemble":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(RazorError) as e:
        check_repository(own)
    real = os.path.realpath(own)
    assert str(e.value) == f"{real}/ensemble: cannot be listed: Permission denied"


@pytest.mark.parametrize(
    ("module", "package"),
    [("google.protobuf", "protobuf"), ("tritonclient.grpc", "tritonclient[grpc]")],
)
def test_without_the_packages(
    module: str, package: str, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check._schema.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra) as e:
        check_repository(own)
    assert str(e.value) == (
        f"the offline check of a model repository needs the Python package '{package}', which is "
        "not installed; install it with: pip install 'trt-razor[triton]'"
    )
    check._schema.cache_clear()


def test_deep_nesting_and_rubbish_are_findings(own: Path) -> None:
    path = own / "ensemble" / "config.pbtxt"
    for text in ("{" * 100_000, 'name: "', "\0", "parameters { " * 50_000, "]]]", "a: b" * 1000):
        path.write_text(text)
        found = check_repository(own)
        assert found[0].startswith("model 'ensemble': config.pbtxt: cannot be parsed: ")
        assert all("\n" not in line and len(line) < 400 for line in found)
