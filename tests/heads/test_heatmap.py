from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.heads.heatmap import OTHER, OWN, chosen_by, draw_heatmap, save_heatmap
from trt_razor.heads.selection import SelectionOptions, select

PNG = b"\x89PNG\r\n\x1a\n"


def some_map(layers: int, heads: int, method: str = "paper") -> HeadMap:
    rng = np.random.default_rng(1)
    scores = {
        name: tuple(tuple(float(f"{x:.6g}") for x in row) for row in rng.random((layers, heads)))
        for name in ("echo", "induction")
    }
    options = SelectionOptions(method)
    choice = select({k: np.array(v) for k, v in scores.items()}, options)
    return HeadMap(
        "some-model",
        "f" * 64,
        layers,
        heads,
        choice.heads,
        method,
        "test",
        scores=scores,
        options=options.to_json(),
    )


def frames(head_map: HeadMap) -> list[list[tuple[int, int, str]]]:
    """(layer, head, colour) of every frame, for each panel."""
    from matplotlib.colors import to_hex

    out = []
    for ax in draw_heatmap(head_map).axes[: max(1, len(head_map.scores))]:
        out.append(
            sorted(
                (round(p.get_y() + 0.42), round(p.get_x() + 0.42), to_hex(p.get_edgecolor()))
                for p in ax.patches
            )
        )
    return out


@pytest.mark.parametrize("layers, heads", [(30, 3), (80, 8), (32, 32), (1, 1)])
def test_png_of_any_shape(tmp_path: Path, layers: int, heads: int) -> None:
    path = tmp_path / "map.png"
    save_heatmap(some_map(layers, heads), path)
    data = path.read_bytes()
    assert data[:8] == PNG
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert 500 <= width <= 2400
    assert 400 <= height <= 2400
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def test_the_same_map_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_heatmap(some_map(6, 4), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("method", ["paper", "combined"])
def test_frames_mark_the_chosen_heads_and_what_chose_them(method: str) -> None:
    head_map = some_map(10, 4, method)
    choice = chosen_by(head_map)
    assert choice is not None
    for panel, own in zip(frames(head_map), (choice.by_echo, choice.by_induction), strict=True):
        want = [
            (layer, head, OWN if head in own[layer] else OTHER)
            for layer, row in enumerate(head_map.retrieval_heads)
            for head in row
        ]
        assert panel == want
        assert {colour for *_, colour in panel} == {OWN, OTHER}


def test_title_names_share_and_method() -> None:
    title = draw_heatmap(some_map(30, 3)).get_suptitle()
    assert "some-model: 1" in title
    assert "of 90 KV heads retrieve" in title
    assert "method paper, induction 14%, echo 1%, at least 4 echo heads" in title


def test_an_edited_map_is_not_explained_wrongly() -> None:
    head_map = some_map(10, 4)
    edited = dataclasses.replace(head_map, retrieval_heads=((),) * 9 + ((0,),))
    assert chosen_by(edited) is None
    assert frames(edited) == [[(9, 0, OWN)], [(9, 0, OWN)]]


@pytest.mark.parametrize("options", [{"echo_share": "much"}, {"min_echo": "x"}, {"echo_share": 7}])
def test_damaged_options_do_not_break_the_picture(options: dict[str, object]) -> None:
    assert chosen_by(dataclasses.replace(some_map(4, 2), options=options)) is None


def test_maps_without_scores_and_scopes(tmp_path: Path) -> None:
    plain = HeadMap.uniform("m", "f" * 64, 3, 4, [1, 2], "dense", "test")
    assert frames(plain) == [[(layer, head, OWN) for layer in range(3) for head in (1, 2)]]
    scopes = ((10.0, 1e6), (200.0, 3e3))
    scoped = dataclasses.replace(
        HeadMap.uniform("m", "f" * 64, 2, 2, [1], "alibi-scope", "test"),
        scores={"scope": scopes},
        options={"window": 1000},
    )
    assert frames(scoped) == [[(0, 1, OWN), (1, 1, OWN)]]
    save_heatmap(scoped, tmp_path / "scope.png")


def test_only_png() -> None:
    with pytest.raises(UsageError, match=r"expected a name ending in \.png"):
        save_heatmap(some_map(2, 2), Path("map.pdf"))


def test_interrupting_the_write_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_heatmap(some_map(2, 2), path)
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]
    assert path.read_bytes() == b"old"


def test_bars_count_the_chosen_heads_of_each_layer() -> None:
    head_map = some_map(10, 4)
    bars = draw_heatmap(head_map).axes[len(head_map.scores)]
    assert [p.get_width() for p in bars.patches] == [len(r) for r in head_map.retrieval_heads]
    assert bars.get_ylim() == (9.5, -0.5)  # as the panels beside it
