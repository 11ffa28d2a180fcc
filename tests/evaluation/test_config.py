"""A run's YAML: every wrong field is named with its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trt_razor.cli_eval import RUNS
from trt_razor.errors import UsageError
from trt_razor.evaluation.config import RunConfig, load_config, parse_config
from trt_razor.evaluation.yaml_file import MAX_BYTES, load_yaml, parse_yaml

GOOD: dict[str, Any] = {
    "name": "run",
    "model": "smollm2-135m",
    "tasks": [{"needle": {"lengths": [512]}}],
    "methods": [{"streaming": {"budget": 0.3}}, {"razor": None, "label": "paper", "trials": 5}],
}


def test_defaults_and_order() -> None:
    made = parse_config(GOOD)
    assert made.labels == ["dense", "streaming", "paper"]
    assert [m.trials for m in made.methods] == [None, None, 5]
    assert made.tasks[0].label == "needle"
    assert made.tasks[0].options["trials"] == 20  # the task's own default is part of the settings
    assert made.tasks[0].task.lengths == (512,)  # type: ignore[attr-defined]
    assert (made.seed, made.scoring, made.dtype) == (0, "forced", "float32")
    assert parse_config({**GOOD, "methods": ["dense", "razor"]}).labels == ["dense", "razor"]
    assert parse_config({**GOOD, "methods": [{"razor": {}}, "dense"]}).labels == ["dense", "razor"]
    engine = parse_config({"name": "e", "engine": "engines/demo", "tasks": GOOD["tasks"]})
    assert engine.labels == ["engine"]
    assert parse_config({**GOOD, "engine": "x"}).labels == ["dense", "streaming", "paper", "engine"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"nmae": "x"}, "nmae: did you mean name?"),
        ({"name": None}, "name: missing"),
        ({"name": "../up"}, "name: expected letters"),
        ({"name": ".hidden"}, "name: expected letters"),
        ({"name": 5}, "name: expected text, found 5"),
        ({"model": None}, "model: missing; give model"),
        ({"model": None, "engine": "x"}, "methods: an engine is evaluated as it is"),
        ({"dtype": "float31"}, "dtype: did you mean float32"),
        ({"read_dtype": "bf16"}, "read_dtype: did you mean bfloat16"),
        ({"scoring": "force"}, "scoring: did you mean forced?"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, found -1"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"threads": 0}, "threads: expected a whole number of at least 1"),
        ({"chunk": 1.5}, "chunk: expected a whole number"),
        ({"tasks": None}, "tasks: expected a list of tasks, found nothing"),
        ({"tasks": []}, "tasks: expected a list of tasks"),
        ({"tasks": {"needle": {}}}, "tasks: expected a list of tasks, found a mapping"),
        ({"tasks": ["nedle"]}, "task 'nedle': did you mean needle?"),
        ({"tasks": [7]}, r"tasks\[0\]: expected NAME: OPTIONS, found 7"),
        (
            {"tasks": [{"needle": {}, "passkey": {}}]},
            r"tasks\[0\]: expected one name .* found needle, passkey",
        ),
        ({"tasks": [{"label": "x"}]}, r"tasks\[0\]: expected one name .* found none"),
        (
            {"tasks": [{"needle": [1]}]},
            r"tasks\[0\]\.needle: expected options as a mapping, found a list",
        ),
        (
            {"tasks": [{"needle": {"length": 3}}]},
            r"tasks\[0\]\.needle\.length: did you mean lengths?",
        ),
        ({"tasks": ["needle", {"needle": {"trials": 3}}]}, "tasks: 'needle' is there twice"),
        ({"tasks": [{"needle": {}, "label": "a|b"}]}, r"tasks\[0\]\.label: expected 1 to 60"),
        ({"methods": [{"streaming": {}}]}, r"methods\[0\]\.streaming\.budget: missing"),
        ({"methods": [{"streaming": {"budget": 7}}]}, r"methods\[0\]\.streaming: budget"),
        ({"methods": [{"razor": {}, "trials": 0}]}, r"methods\[0\]\.trials: expected"),
        ({"methods": [{"razor": {}, "groups": 4096}]}, r"methods\[0\]\.groups: expected a list"),
        ({"methods": [{"razor": {}, "groups": []}]}, r"methods\[0\]\.groups: expected a list"),
        ({"methods": [{"razor": {}, "groups": [True]}]}, r"methods\[0\]\.groups: expected a list"),
        ({"methods": [{"dense": {}, "groups": [1]}]}, r"methods\[0\]: dense runs on every sample"),
        ({"methods": ["razor", "razor"]}, "methods: 'razor' is there twice; give each a label"),
        ({"methods": [{"dense": {}, "label": "all"}]}, r"methods\[0\]: dense runs on every sample"),
        ({"methods": [{"razor": {}, "label": "dense"}]}, "'dense' is there twice"),
        (
            {"engine": "x", "methods": [{"razor": {}, "label": "engine"}]},
            "label 'engine' is the engine's",
        ),
        ({"compare": [["paper"]]}, r"compare\[0\]: expected \[label, label\]"),
        ({"compare": [["paper", "steaming"]]}, r"compare\[0\]: did you mean streaming"),
    ],
)
def test_wrong_fields(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_config({**GOOD, **change})


def test_equal_settings_have_equal_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(**change: Any) -> str:
        return parse_config({**GOOD, **change}).hash()

    same = hashed()
    assert same == hashed(threads=2) == hashed(compare=[["paper", "streaming"]])
    assert same == hashed(tasks=[{"needle": {"trials": 20, "lengths": [512]}}])
    others = {
        hashed(seed=1),
        hashed(dtype="bfloat16"),
        hashed(tasks=[{"needle": {"lengths": [513]}}]),
        hashed(methods=GOOD["methods"][:1]),
        hashed(chunk=1),
    }
    assert len(others | {same}) == 6
    # A file is known by its content.
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "text.txt"

    def with_file() -> str:
        return hashed(tasks=[{"needle": {"text": "text.txt"}}])

    file.write_text("one")
    first = with_file()
    assert with_file() == first
    file.write_text("two")
    assert with_file() != first


# YAML ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: [", "line 2: not YAML"),
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is there twice"),
        ("a: {b: {c: 1, c: 2}}", "line 1: 'c' is there twice"),
        ("a: !!python/object/apply:os.system [x]", "not YAML: could not determine a constructor"),
        ("a: 2024-01-01", "a: expected text, a number, a list or a mapping, found date .* quotes"),
        ("a: {1: 2}", "a: expected names as keys, found 1"),
        ("? [1]\n: 2", "not YAML"),
        ("a: \x00", "not YAML"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("a: &a [x, *a]", "expected at most .* deep"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "expected at most 100,000 values",
        ),
    ],
)
def test_hostile_yaml(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"^here: .*{words}"):
        parse_yaml(text, "here")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(UsageError, match="cannot read: No such file"):
        load_yaml(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_yaml(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="at most 1 MiB"):
        load_yaml(path)
    path.write_text("- a")
    with pytest.raises(UsageError, match=r"expected a mapping .* found a list"):
        load_config(path)
    path.write_text("name: a\nmodel: m\ntasks: [needle]\nsede: 1")
    with pytest.raises(UsageError, match=re.escape(f"{path}: sede: did you mean seed?")):
        load_config(path)


@pytest.mark.parametrize("path", sorted(RUNS.glob("*.yaml")), ids=lambda p: p.stem)
def test_bundled_runs_are_right(path: Path) -> None:
    made = load_config(path)
    assert isinstance(made, RunConfig)
    assert made.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")  # what --list prints
