"""HeadMap: validation names the wrong field, files survive a round trip, damage is refused."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import MAX_FILE_BYTES, HeadMap


def head_map(**changes: Any) -> HeadMap:
    fields: dict[str, Any] = {
        "model": "tiny",
        "fingerprint": "ab" * 32,
        "num_layers": 3,
        "num_kv_heads": 4,
        "retrieval_heads": ((0, 2), (), (0, 1, 2, 3)),
        "method": "combined",
        "source": "a test",
        "scores": {"echo": ((0.5, 0.0, 0.25, 1e-6),) * 3},
        "options": {"seed": 1, "share": 0.15},
    }
    return HeadMap(**{**fields, **changes})


def test_views() -> None:
    m = head_map()
    assert m.num_retrieval == 6
    assert m.share == pytest.approx(0.5, abs=0)
    assert [m.local_heads(i) for i in range(3)] == [(1, 3), (0, 1, 2, 3), ()]


def test_uniform() -> None:
    m = HeadMap.uniform("tiny", "f", 3, 4, [2, 0, 2], "test", "test")
    assert m.retrieval_heads == ((0, 2),) * 3


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"retrieval_heads": ((0,), (1,))}, "retrieval_heads: expected 3 layers"),
        (
            {"retrieval_heads": ((0,), (4,), ())},
            r"retrieval_heads\[1\]: expected KV head indices 0..3",
        ),
        ({"retrieval_heads": ((0,), (), (-1,))}, r"retrieval_heads\[2\]"),
        ({"retrieval_heads": ((1, 0), (), ())}, r"retrieval_heads\[0\]: expected ascending"),
        ({"retrieval_heads": ((), (1, 1), ())}, r"retrieval_heads\[1\]: expected ascending"),
        ({"scores": {"echo": ((0.0,) * 4,) * 2}}, r"scores\.echo: expected 3 layers"),
        (
            {"scores": {"echo": ((0.0,) * 4, (0.0,) * 3, (0.0,) * 4)}},
            r"scores\.echo\[1\]: expected 4",
        ),
        (
            {"scores": {"x": ((0.0,) * 4, (0.0,) * 4, (0.0, float("nan"), 0.0, 0.0))}},
            r"scores\.x\[2\]",
        ),
        ({"scores": {"x": ((float("inf"),) * 4,) * 3}}, r"scores\.x\[0\]: expected finite"),
        ({"scores": {"x": ((10**400, 0, 0, 0),) * 3}}, r"scores\.x\[0\]: expected finite"),
    ],
)
def test_wrong_content_names_the_field(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match=where):
        head_map(**changes)


_WRONG_JSON: list[tuple[str, Any]] = [
    ("model", 3),
    ("fingerprint", None),
    ("checkpoint", 7),
    ("num_layers", 3.0),
    ("num_layers", True),
    ("num_kv_heads", "4"),
    ("method", []),
    ("source", {}),
    ("options", []),
    ("scores", []),
    ("scores", {"echo": 1}),
    ("scores", {"echo": [[0.0] * 4, 2, [0.0] * 4]}),
    ("scores", {"echo": [[0.0, 0.0, 0.0, "1"]] * 3}),
    ("scores", {"echo": [[10**400, 0, 0, 0]] * 3}),
    ("retrieval_heads", {"0": [1]}),
    ("retrieval_heads", [[0], 1, []]),
    ("retrieval_heads", [[0], [True], []]),
    ("retrieval_heads", [[0], [1.0], []]),
    ("version", 2),
    ("version", True),
    ("version", "x" * 1000),
    ("schema", "something.else"),
]


@pytest.mark.parametrize(("field", "value"), _WRONG_JSON)
def test_wrong_json_names_file_and_field(tmp_path: Path, field: str, value: Any) -> None:
    data = {**head_map().to_json(), field: value}
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError) as e:
        HeadMap.load(path)
    message = str(e.value)
    assert message.startswith(str(path))
    assert field in message[len(str(path)) :]
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    "field",
    ["model", "fingerprint", "num_layers", "num_kv_heads", "method", "source", "retrieval_heads"],
)
def test_missing_field_is_named(field: str) -> None:
    data = head_map().to_json()
    del data[field]
    with pytest.raises(UsageError, match=f"{field}: missing"):
        HeadMap.from_json(data)


@pytest.mark.parametrize("field", ["checkpoint", "options", "scores"])
def test_optional_field_may_be_absent(field: str) -> None:
    data = head_map().to_json()
    del data[field]
    assert HeadMap.from_json(data).retrieval_heads == head_map().retrieval_heads


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[1, 2]", b'"text"', b"\xff\xfe", b"[" * 200_000, b'{"schema": 1}'],
)
def test_damaged_file_is_refused_in_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(text)
    with pytest.raises(UsageError) as e:
        HeadMap.load(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    head_map().save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError):
            HeadMap.load(path)


def test_missing_folder_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such head map file"):
        HeadMap.load(tmp_path / "absent.json")
    with pytest.raises(RazorError, match="cannot read"):
        HeadMap.load(tmp_path)
    big = tmp_path / "big.json"
    with open(big, "wb") as f:
        f.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(UsageError, match="too large"):
        HeadMap.load(big)


def test_map_of_another_model_is_refused() -> None:
    m = head_map()
    m.check_model(m.fingerprint, "tiny", "heads.json")
    with pytest.raises(
        UsageError, match=r"heads\.json: .*'tiny'.*expected 'other'.*trt-razor heads"
    ):
        m.check_model("cd" * 32, "other", "heads.json")


def test_digest_is_of_the_choice_alone() -> None:
    m = head_map()
    assert len(m.digest()) == 64
    assert m.digest() == head_map(model="b", method="x", source="y", scores={}, options={}).digest()
    assert m.digest() != head_map(fingerprint="cd" * 32).digest()
    assert m.digest() != head_map(retrieval_heads=((0, 1), (), (0, 1, 2, 3))).digest()
    # The same indices of a model with more heads are another choice.
    assert m.digest() != head_map(num_kv_heads=5, scores={}).digest()


def test_file_has_one_layer_a_line(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    head_map().save(path)
    lines = [line.strip().rstrip(",") for line in path.read_text().splitlines()]
    assert lines.count("[0, 2]") == 1
    assert lines.count("[0.5, 0, 0.25, 1e-06]") == 3


finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)


@st.composite
def head_maps(draw: st.DrawFn) -> HeadMap:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    chosen = st.sets(st.integers(0, heads - 1)).map(lambda s: tuple(sorted(s)))
    row = st.lists(finite, min_size=heads, max_size=heads).map(tuple)
    table = st.lists(row, min_size=layers, max_size=layers).map(tuple)
    return HeadMap(
        model=draw(st.text(max_size=8)),
        fingerprint=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        num_layers=layers,
        num_kv_heads=heads,
        retrieval_heads=tuple(draw(chosen) for _ in range(layers)),
        method=draw(st.text(max_size=8)),
        source=draw(st.text(max_size=8)),
        checkpoint=draw(st.none() | st.text(max_size=8)),
        scores=draw(st.dictionaries(st.text(max_size=6), table, max_size=2)),
        options=draw(st.dictionaries(st.text(max_size=6), values, max_size=3)),
    )


@settings(max_examples=60, deadline=None)
@given(head_maps())
def test_save_and_load_round_trip(m: HeadMap) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heads.json"
        m.save(path)
        back = HeadMap.load(path)
        first = path.read_bytes()
        back.save(path)
        assert path.read_bytes() == first  # rounding scores twice changes nothing
    assert back.digest() == m.digest()
    a, b = copy.copy(m.to_json()), copy.copy(back.to_json())
    scores_a, scores_b = a.pop("scores"), b.pop("scores")
    assert a == b
    assert list(scores_a) == list(scores_b)
    for name, table in scores_a.items():
        for want, got in zip(table, scores_b[name], strict=True):
            assert got == pytest.approx(want, rel=1e-5, abs=1e-320)
