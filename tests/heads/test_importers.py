"""Imported head lists: every format in its published form, how heads are chosen, what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from heads_helpers import tiny_spec
from import_files import duo_folder, freekv_file, headkv_file, torch_file

from trt_razor.errors import MissingExtra, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.importers import Cut, import_heads

SPEC = tiny_spec()  # 3 layers, 4 query heads, 2 KV heads
ALIBI = replace(SPEC, architecture="baichuan", position="alibi", num_kv_heads=4)
GATES = [[0.9, 0.1], [1.0, 0.60], [-0.0014, 0.55]]
LISTS = {"prefix_matching": {2: [1, 0]}, "copying": {0: [1], 2: [0]}}
RUNS = [
    [[0.0, 0.2], [0.1, 0.1], [0, 0], [0.3, 0.1]],
    [[0.9, 0.1], [0, 0], [0, 0], [0.01, 0.01]],
    [[0, 0], [0, 0], [0.7, 0.8], [0, 0]],
]


def heads_of(path: Path, **options: Any) -> tuple[tuple[int, ...], ...]:
    return import_heads(path, SPEC, **options).head_map.retrieval_heads


def refused(words: str, path: Path, spec: Any = SPEC, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        import_heads(path, spec, **options)
    text = str(error.value)
    assert words in text
    assert "\n" not in text
    assert str(path) in text
    return text


# DuoAttention -----------------------------------------------------------------------------------
def test_duoattention_takes_the_top_half_not_a_threshold(tmp_path: Path) -> None:
    found = import_heads(duo_folder(tmp_path, GATES), SPEC)
    head_map = found.head_map
    assert found.format == "duoattention"
    assert head_map.retrieval_heads == ((0,), (0, 1), ())  # 0.55 passes a threshold of 0.5
    assert head_map.scores["duoattention"] == ((0.9, 0.1), (1.0, 0.6), (0.0, 0.55))
    assert head_map.options["share"] == 0.5
    assert head_map.options["config"]["sink_size"] == 128
    assert head_map.options["per_query_head"] is False
    assert any("default --share 0.5" in note for note in found.notes)


def test_share_and_threshold(tmp_path: Path) -> None:
    folder = duo_folder(tmp_path, GATES)
    assert heads_of(folder, cut=Cut(share=1 / 6)) == ((), (0,), ())
    assert heads_of(folder, cut=Cut(threshold=0.55)) == ((0,), (0, 1), (1,))
    assert heads_of(folder, cut=Cut(share=0)) == ((), (), ())
    for share, words in ((1.0, "every KV head retrieves"), (0.0, "no KV head retrieves")):
        assert words in " ".join(import_heads(folder, SPEC, cut=Cut(share=share)).notes)
    for bad in ({"share": 1.5}, {"share": float("nan")}, {"threshold": float("nan")}):
        with pytest.raises(UsageError, match="expected"):
            Cut(**bad)
    with pytest.raises(UsageError, match="found both"):
        Cut(0.1, 0.5)


def test_ties_at_the_cut_are_told(tmp_path: Path) -> None:
    folder = duo_folder(tmp_path, [[0.5, 1], [1, 1], [1, 0]])
    found = import_heads(folder, SPEC, cut=Cut(share=0.5))
    assert found.head_map.retrieval_heads == ((1,), (0, 1), ())
    assert found.head_map.options["tied"] == [3, 4]
    (note,) = found.notes
    assert "4 heads tie at the cut (score 1), 3 of them taken" in note
    share = float(note.split("--share ")[1].split()[0])
    assert heads_of(folder, cut=Cut(share=share)) == ((1,), (0, 1), (0,))
    assert import_heads(folder, SPEC, cut=Cut(share=share)).notes == ()


def test_the_map_is_labelled_and_survives_its_file(tmp_path: Path) -> None:
    import hashlib

    path = duo_folder(tmp_path, GATES) / "full_attention_heads.tsv"
    head_map = import_heads(path, SPEC).head_map
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert head_map.method == "import"
    assert head_map.source == f"duoattention: full_attention_heads.tsv, sha256 {digest}"
    assert head_map.fingerprint == SPEC.fingerprint()
    assert head_map.checkpoint is None
    head_map.save(tmp_path / "map.json")
    again = HeadMap.load(tmp_path / "map.json")
    assert again.digest() == head_map.digest()
    assert again.options == head_map.options


# FreeKV -----------------------------------------------------------------------------------------
def test_freekv_list_with_windows_line_ends_and_empty_last_lines(tmp_path: Path) -> None:
    path = freekv_file(tmp_path / "number-14-1.tsv", [[0, 1], [0, 0], [1, 1]], "\r\n" * 5)
    found = import_heads(path, SPEC)
    assert found.format == "freekv"
    assert found.head_map.retrieval_heads == ((1,), (), (0, 1))
    assert found.notes == ()
    refused("no order to take a share", path, cut=Cut(share=0.5))


def test_freekv_table_by_query_head(tmp_path: Path) -> None:
    table = [[0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    head_map = import_heads(freekv_file(tmp_path / "number", table), SPEC).head_map
    assert head_map.retrieval_heads == ((1,), (), (0,))
    assert head_map.options["per_query_head"] is True


def test_freekv_fractions_need_the_format_and_take_its_threshold(tmp_path: Path) -> None:
    path = freekv_file(tmp_path / "manual.tsv", [[0.1, 0.5], [0.4, 1.0], [0.3, 0.0]])
    text = refused("may be duoattention, freekv", path)
    assert "--format NAME" in text
    assert heads_of(path, format="freekv") == ((1,), (1,), ())
    assert heads_of(path, format="duoattention") == ((1,), (0, 1), ())


def test_comments_of_a_table_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "list.tsv"
    path.write_text("\ufeff# layers x heads\n0\t1 # here\n\n1\t0\n0\t0\n")
    assert heads_of(path) == ((1,), (0,), ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\t1\n1\t0\n0\tnan\n", "line 3, field 2: expected a finite number, found nan"),
        ("0\t1\n1\t0\n0\t-inf\n", "expected a finite number, found -inf"),
        ("0\t1\n1\t0\n0\t1e999\n", "expected a finite number"),
        ("0\t1\n1\tx\n0\t0\n", "line 2, field 2: expected a number, found 'x'"),
        ("0\t1\n1_0\t1\n0\t0\n", "expected a number"),
        ("0\t1\n1\t0\n0\n", "line 3: expected 2 fields"),
        ("0\t1\n1\t0\n", "expected 3 x 2 (layers x KV heads) or 3 x 4 (query heads)"),
        ("0\t1\t0\n" * 3, "found 3 x 3; these are the heads of another model"),
        ("0\t1\n1\t0\n0\t7\n", "expected gates between 0 and 1"),
        ("# only\n", "no numbers"),
        ("\n \n", "the file is empty"),
        ("0\n" * 1025, "expected at most 1024 layers"),
        ("0\t" * 1024 + "0\n", "expected at most 1024 fields"),
        ("0" * 100 + "\t1\n", "expected a number"),
    ],
)
def test_damaged_tables(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "list.tsv"
    path.write_text(text)
    refused(words, path, format="freekv")


# msmodelslim ------------------------------------------------------------------------------------
def test_msmodelslim_lists(tmp_path: Path) -> None:
    found = import_heads(torch_file(tmp_path / "win.pt", LISTS), SPEC)
    assert found.format == "msmodelslim"
    assert found.head_map.retrieval_heads == ((1,), (), (0, 1))
    assert found.head_map.scores["prefix_matching"] == ((0, 0), (0, 0), (1, 1))
    assert found.head_map.scores["copying"] == ((0, 1), (0, 0), (1, 0))


def test_msmodelslim_windows_of_an_alibi_model(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "win.pt", torch.tensor([105, 5663, 3999, 4000]))
    found = import_heads(path, ALIBI)
    assert found.format == "msmodelslim"
    assert found.head_map.retrieval_heads == ((1, 3),) * 3
    assert found.head_map.options["threshold"] == 4000
    assert found.head_map.scores["window"][2] == (105, 5663, 3999, 4000)
    shared = import_heads(path, ALIBI, cut=Cut(threshold=3999)).head_map
    assert shared.retrieval_heads == ((1, 2, 3),) * 3
    refused("uses rope", path, spec=SPEC)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            {"prefix_matching": {3: [0]}, "copying": {}},
            "layer: expected 0..2, as 'tiny' has, found 3",
        ),
        ({"prefix_matching": {0: [2]}, "copying": {}}, "KV head: expected 0..1, as 'tiny' has"),
        ({"prefix_matching": {0: [-1]}, "copying": {}}, "found -1"),
        ({"prefix_matching": {0: [True]}, "copying": {}}, "found True"),
        ({"prefix_matching": {"0": [1]}, "copying": {}}, "layer: expected 0..2"),
        ({"prefix_matching": {0: [0.0]}, "copying": {}}, "KV head: expected 0..1"),
        ({"prefix_matching": {0: [0] * 9}, "copying": {}}, "found 9 of them"),
        ({"prefix_matching": {0: 1}, "copying": {}}, "expected a list of at most 2 KV heads"),
        ({"prefix_matching": [1], "copying": {}}, "expected a dict of layers, found list"),
        ({"prefix_matching": {}, "other": {}}, "expected a dict of prefix_matching and copying"),
        (torch.tensor([1, 2, 3]), "an ALiBi window for each of the 4 heads of 'tiny', found [3]"),
        (torch.tensor([1, 2, 3, -4]), "uses rope"),
    ],
)
def test_msmodelslim_of_another_model(tmp_path: Path, value: Any, words: str) -> None:
    refused(words, torch_file(tmp_path / "head.pt", value))


def test_negative_windows(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "win.pt", torch.tensor([1, 2, 3, -4]))
    refused("expected windows in tokens", path, spec=ALIBI)


# KVzip ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kvzip_scores_saved_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    scores = torch.tensor([[0.5, 0.25], [1.0, 0.125], [0.75, 0.0]], dtype=dtype)
    path = torch_file(tmp_path / "qwen2.5-7b-scbench_qa_eng-0.pt", scores, "cuda:0")
    found = import_heads(path, SPEC, cut=Cut(share=1 / 3))
    assert found.format == "kvzip"
    assert found.head_map.retrieval_heads == ((), (0,), (0,))
    assert found.head_map.scores["kvzip"][0] == (0.5, 0.25)
    assert import_heads(path, SPEC).head_map.num_retrieval == 1  # 15 % of 6


def test_kvzip_of_a_model_with_one_kv_head(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pt", torch.tensor([0.1, 0.9, 0.2]))
    spec = replace(SPEC, num_kv_heads=1)
    assert import_heads(path, spec, "kvzip").head_map.retrieval_heads == ((), (0,), ())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(4, 2), "found 4 x 2; these are the heads of another model"),
        (torch.zeros(3, 2, 1), "of none of the known forms"),
        (torch.zeros(3, 2, dtype=torch.int64), "of none of the known forms"),
        (torch.full((3, 2), float("nan")), "layer 0, KV head 0: expected a finite number"),
        (torch.full((3, 2), float("inf")), "expected a finite number, found inf"),
        ([0.1, 0.2], "of none of the known forms"),
        ({"scores": torch.zeros(3, 2)}, "expected one tensor, or a dict of lists; found both"),
    ],
)
def test_kvzip_of_another_model(tmp_path: Path, value: Any, words: str) -> None:
    refused(words, torch_file(tmp_path / "a.pt", value))


def test_nan_beside_a_larger_query_head_is_not_lost(tmp_path: Path) -> None:
    table = torch.zeros(3, 4)
    table[1, 2], table[1, 3] = float("nan"), 0.9
    refused("layer 1, KV head 1: expected a finite number", torch_file(tmp_path / "a.pt", table))


# HeadKV -----------------------------------------------------------------------------------------
def test_headkv_is_the_mean_over_runs_and_the_maximum_over_a_group(tmp_path: Path) -> None:
    found = import_heads(headkv_file(tmp_path / "a.json", RUNS), SPEC, cut=Cut(share=0.5))
    assert found.format == "headkv"
    table = np.array(found.head_map.scores["headkv"])
    np.testing.assert_allclose(table, [[0.1, 0.2], [0.5, 0.01], [0, 0.75]], atol=1e-15)
    assert found.head_map.retrieval_heads == ((1,), (0,), (1,))
    assert found.head_map.options["runs"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"1-2": None}, "'1-2' is missing (11 of 12 heads are there)"),
        ({"3-0": [1]}, "expected 3 layers of 4, as 'tiny' has, found 4 of 4"),
        ({"2-4": [1]}, "found 3 of 5; these are the heads of another model"),
        ({"0-0": []}, "'0-0': expected a list of scores, found an empty list"),
        ({"0-0": 0.5}, "'0-0': expected a list of scores, found float"),
        ({"0-0": ["1"]}, "expected numbers, found '1'"),
        ({"0-0": [True]}, "expected numbers, found True"),
        ({"0-0": [10**400]}, "expected finite numbers"),
        ({"mean": [1]}, "expected names such as '0-31' (layer-head), found 'mean'"),
        ({"00-1": [1]}, "found '00-1'"),
    ],
)
def test_headkv_of_another_model(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data = json.loads(headkv_file(tmp_path / "a.json", RUNS).read_text())
    data = {k: v for k, v in {**data, **changes}.items() if v is not None}
    path = tmp_path / "b.json"
    path.write_text(json.dumps(data))
    refused(words, path, format="headkv")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"0-0": [NaN]}', "NaN is not a number"),
        ('{"0-0": [1e999]}', "expected 3 layers"),
        ('{"0-0": [1], "0-0": [2]}', "a name occurs twice"),
        ('{"0-0": [1', "not valid JSON"),
        ("[1, 2]", "expected a JSON object, found list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"0-0": [' + "9" * 5000 + "]}", "not valid JSON"),
        ('{"a": 1}', "JSON of none of the known forms (headkv, razor)"),
    ],
)
def test_damaged_json(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    refused(words, path)


# Our own ----------------------------------------------------------------------------------------
def test_own_map_for_a_sibling_model(tmp_path: Path) -> None:
    made = HeadMap(
        "sibling",
        "another fingerprint",
        3,
        2,
        ((1,), (), (0,)),
        "combined",
        "probe",
        "ab" * 32,
        {"echo": ((0.1, 0.9), (0.0, 0.0), (0.5, 0.0))},
        {"seeds": [0]},
    )
    made.save(tmp_path / "map.json")
    found = import_heads(tmp_path / "map.json", SPEC)
    head_map = found.head_map
    assert found.format == "razor"
    assert "made for 'sibling'" in found.notes[0]
    assert (head_map.fingerprint, head_map.model) == (SPEC.fingerprint(), "tiny")
    assert (head_map.retrieval_heads, head_map.scores) == (made.retrieval_heads, made.scores)
    assert head_map.checkpoint == made.checkpoint
    assert head_map.options["from"]["method"] == "combined"
    refused("found 3 x 2 ('sibling')", tmp_path / "map.json", spec=replace(SPEC, num_kv_heads=4))


# All --------------------------------------------------------------------------------------------
def test_the_format_must_be_known_and_of_the_file(tmp_path: Path) -> None:
    path = freekv_file(tmp_path / "a.tsv", [[0, 1]] * 3)
    with pytest.raises(UsageError, match="did you mean kvzip"):
        import_heads(path, SPEC, "kvzp")
    refused("expected a file of torch.save, as kvzip is, found a table (TSV)", path, format="kvzip")
    lists = torch_file(tmp_path / "win.pt", LISTS)
    refused("expected a tensor of float scores, found dict", lists, format="kvzip")


def test_files_that_cannot_be_one(tmp_path: Path) -> None:
    import os

    refused("no such file", tmp_path / "none.tsv")
    refused("a folder without full_attention_heads.tsv", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    refused("not a plain file", tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    refused("found other bytes", tmp_path / "bytes")
    (tmp_path / "empty").write_bytes(b"")
    refused("the file is empty", tmp_path / "empty")
    with open(tmp_path / "huge.tsv", "wb") as file:
        file.truncate(1 << 40)
    refused("1099511627776 bytes, expected at most", tmp_path / "huge.tsv")
    folder = duo_folder(tmp_path / "duo", GATES, "text")
    with pytest.raises(UsageError, match=r"config\.json: expected a JSON object, found str"):
        import_heads(folder, SPEC)


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = torch_file(tmp_path / "win.pt", LISTS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"trt-razor\[torch\]"):
        import_heads(path, SPEC)
    assert heads_of(freekv_file(tmp_path / "a.tsv", [[0, 1]] * 3)) == ((1,),) * 3
