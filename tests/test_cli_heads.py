"""``trt-razor heads``: choosing anew, comparing, and what is refused before anything is measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TinyModel

from trt_razor.cli import main
from trt_razor.headmap import HeadMap

Capture = pytest.CaptureFixture[str]
EFFECT = ((0.5, -0.1), (0.2, 0.9))


def run(*argv: object) -> int:
    try:
        return main([str(a) for a in argv])
    except SystemExit as e:
        return int(e.code or 0)


@pytest.fixture
def scored(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A map of the tiny model (2 layers x 2 KV heads) with scores."""
    path = tmp_path / "scored.json"
    head_map = dataclasses.replace(
        HeadMap.load(tiny_model.heads),
        scores={"effect": EFFECT},
        options={"seeds": [0], "auto": {}},
    )
    head_map.save(path)
    return path


def test_choosing_anew_measures_nothing(
    capsys: Capture, tiny_model: TinyModel, scored: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new.json"
    argv = ["heads", "--checkpoint", tiny_model.folder, "--from", scored, "--method", "effect"]
    assert run(*argv, "--effect-share", 0.5, "--output", output, "--no-plot", "--by-layer") == 0
    text = capsys.readouterr().out
    assert "2 of 4 KV heads retrieve (50.0%, effect)" in text
    assert "    0  █ 1\n    1  █ 1\n" in text
    made = HeadMap.load(output)
    assert made.retrieval_heads == ((0,), (1,))
    assert made.scores == {"effect": EFFECT}
    assert dict(made.options) == {"seeds": [0], "effect_share": 0.5}

    capsys.readouterr()
    assert run(*argv, "--seeds", 3, "--no-plot") == 2
    assert "--seeds: --from takes scores as they are" in capsys.readouterr().err
    assert run(*argv[:-1], "gradient", "--no-plot") == 1
    assert "scores.gradient: missing" in capsys.readouterr().err


def test_effect_of_a_checkpoint_without_a_tokenizer(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path
) -> None:
    output = tmp_path / "effect.json"
    argv = ["heads", "--checkpoint", tiny_model.folder, "--method", "gradient", "--no-plot"]
    argv += ["--probe-length", 20, "--repeats", 2, "--effect-trials", 2, "--effect-length", 100]
    argv += ["--effect-window", 8, "--seeds", 2, "--effect-answers", "random", "--output", output]
    assert run(*argv) == 0
    made = HeadMap.load(output)
    assert set(made.scores) == {"echo", "induction", "gradient"}
    assert made.method == "gradient"
    assert made.num_retrieval == 1  # 15 % of 4
    layer, head = np.unravel_index(np.argmax(made.scores["gradient"]), (2, 2))
    assert made.retrieval_heads[layer] == (head,)
    assert made.options["answers"] == "random"
    assert made.options["effect"] == {"trials": 2, "length": 100, "window": 8, "points": 5}
    assert "mean_jaccard" in made.options["stability"]


def test_greedy_choice_and_a_shorter_one(
    capsys: Capture, tiny_model: TinyModel, tmp_path: Path
) -> None:
    output = tmp_path / "greedy.json"
    argv = ["heads", "--checkpoint", tiny_model.folder, "--method", "greedy", "--no-plot"]
    argv += ["--output", output]
    chosen = [*argv, "--probe-length", 20, "--repeats", 2, "--effect-share", 0.75]
    chosen += ["--greedy-start", 0.25, "--greedy-step", 1, "--greedy-contexts", 2]
    chosen += ["--greedy-length", 120, "--min-window", 8, "--comp-tokens", 2]
    chosen += ["--compression", "none", "--effect-answers", "random"]
    assert run(*chosen) == 0
    assert "3 of 4 KV heads retrieve (75.0%, greedy)" in capsys.readouterr().out
    made = HeadMap.load(output)
    told = made.options["greedy"]
    assert told["policy"]["min_window"] == 8
    assert [r["heads"] for r in told["rounds"]] == [1, 2, 3]
    order = np.argsort(-np.array(made.scores["greedy"]).ravel())[:3]
    joined = [2 * layer + head for r in told["rounds"] for layer, head, _ in r["added"]]
    assert order.tolist()[1:] == joined

    # A smaller share is the beginning of the same order.
    assert run(*argv[:-2], "--from", output, "--effect-share", 0.5, "--output", output) == 0
    again = HeadMap.load(output)
    assert {2 * i + h for i, row in enumerate(again.retrieval_heads) for h in row} == set(order[:2])

    capsys.readouterr()
    assert run(*argv, "--from", output, "--greedy-step", 1) == 2
    assert "--greedy-step: --from takes scores as they are" in capsys.readouterr().err
    assert run(*chosen, "--greedy-wordings", "code") == 2
    assert "--greedy-wordings: only with needles" in capsys.readouterr().err
    assert run(*argv, "--greedy-wordings", "room") == 2
    assert "wording 'room': held out for tests" in capsys.readouterr().err


def test_comparing_two_maps(capsys: Capture, scored: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    dataclasses.replace(HeadMap.load(scored), retrieval_heads=((0, 1), (0, 1))).save(other)
    assert run("heads", "compare", scored, other) == 0
    text = capsys.readouterr().out
    assert "overlap (Jaccard)" in text
    assert "only B (layer.head):" in text
    assert run("heads", "compare", scored, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rank_correlation"] == [["effect", "effect", 1.0]]
    assert run("heads", "compare", scored, tmp_path / "none.json") == 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--auto-trials", 5], "--auto-trials: only with --auto"),
        (["--target", "kept=1"], "--target: only with --auto"),
        (["--min-window", 64], "--min-window: only with --auto"),
        (["--auto", "--target", "kepd=1"], "did you mean kept"),
        (["--auto", "--target", "kl=low"], "--target kl: expected a number, found 'low'"),
        (["--auto", "--target", "kept=nan"], "--target kept: expected a number"),
        (["--auto", "--preset", "paper"], "drop nothing of 2048 tokens"),
        (["--auto", "--method", "alibi-scope"], "alibi-scope has a window instead"),
        (["--effect-trials", 0], "effect trials: expected 1.."),
        (["--greedy-step", 1], "--greedy-step: only with --method greedy"),
        (["--method", "greedy", "--greedy-step", 0], "greedy step: expected 1.."),
        (["--method", "greedy", "--preset", "paper"], "drop nothing of 2048 tokens"),
        (["--method", "greedy", "--greedy-start", 0.2], "expected at most the share"),
        (["--method", "effct"], "invalid choice"),
    ],
)
def test_wrong_use_is_named_at_once(
    capsys: Capture, tiny_model: TinyModel, argv: list[object], words: str
) -> None:
    assert run("heads", "--checkpoint", tiny_model.folder, *argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
