"""The Python model ``postprocessing`` outside a server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from model_rig import Request, TritonModelException, arguments, install, save_tokenizer

from trt_razor.serving.models.postprocessing import TritonPythonModel

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    install(monkeypatch)
    save_tokenizer(tmp_path / "1" / "tokenizer")

    def load(**parameters: str) -> TritonPythonModel:
        model = TritonPythonModel()
        given = {"tokenizer_dir": "1/tokenizer", **parameters}
        model.initialize(arguments(tmp_path, **given))
        return model

    return load


def request(ids: Any, lengths: Any) -> Request:
    return Request(
        TOKENS_BATCH=np.array(ids, np.int32), SEQUENCE_LENGTH=np.array(lengths, np.int32)
    )


def test_every_sequence_is_a_text_of_a_flat_output(load: Load) -> None:
    t = save_tokenizer(None)
    a, b, c = t.encode("né"), t.encode("xy"), t.encode("</s>!")
    rows = [[[*a, -1], [*b, 7, 7]], [[*c, 7, 7], [7, 7, 7, 7]]]
    answers = load().execute([request(rows, [[3, 2], [2, 0]]), request([[b]], [[1]])])
    output = answers[0].arrays()["OUTPUT"]
    assert output.tolist() == ["né".encode(), b"xy", b"!", b""]
    assert output.shape == (4,)
    assert answers[1].arrays()["OUTPUT"].tolist() == [b"x"]
    kept = load(skip_special_tokens="False").execute([request([[c]], [[2]])])
    assert kept[0].arrays()["OUTPUT"].tolist() == [b"</s>!"]


@pytest.mark.parametrize(
    "ids, lengths, words",
    [
        ([[1, 2]], [[2]], r"TOKENS_BATCH: expected \[batch, beams, tokens\], found \[1, 2\]"),
        ([[[1, 2]]], [2], r"SEQUENCE_LENGTH: expected \[1, 1\], found \[1\]"),
        ([[[1, 2]]], [[3]], r"SEQUENCE_LENGTH: expected 0\.\.2, found 3\.\.3"),
        ([[[1, 2]]], [[-1]], r"SEQUENCE_LENGTH: expected 0\.\.2, found -1\.\.-1"),
    ],
)
def test_a_bad_request_fails_alone(load: Load, ids: Any, lengths: Any, words: str) -> None:
    good = request([[save_tokenizer(None).encode("ok")]], [[2]])
    bad, fine = load().execute([request(ids, lengths), good])
    assert bad.error().code() == 3
    with pytest.raises(AssertionError, match=words):
        bad.arrays()
    assert fine.arrays()["OUTPUT"].tolist() == [b"ok"]


def test_a_missing_input_is_named(load: Load) -> None:
    only = Request(TOKENS_BATCH=np.zeros((1, 1, 1), np.int32))
    assert load().execute([only])[0].error().message().startswith("SEQUENCE_LENGTH: required")


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"tokenizer_dir": ""}, "^parameter tokenizer_dir: expected the tokenizer's folder"),
        ({"tokenizer_dir": "2/tokenizer"}, "found nothing at .*2/tokenizer; write"),
        ({"skip_special_tokens": "maybe"}, "skip_special_tokens: expected true or false"),
    ],
)
def test_load_fails_with_one_line(load: Load, parameters: dict[str, str], words: str) -> None:
    with pytest.raises(TritonModelException, match=words) as e:
        load(**parameters)
    assert "\n" not in str(e.value)


def test_a_damaged_tokenizer_is_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "1" / "tokenizer" / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TritonModelException, match=r"tokenizer\.json: damaged") as e:
        load()
    assert "\n" not in str(e.value)
