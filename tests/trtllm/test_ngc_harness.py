"""What tests/ngc stands on, as far as that can be run without TensorRT-LLM: the model, the comparison with
the reference, the process that runs an engine, and that a run without TensorRT-LLM fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import doubles
import numpy as np
import pytest
import torch
from engine_folders import engine_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "ngc"))
import ngc_rig
from ngc_model import (
    FAMILIES,
    MAX_SEQ_LEN,
    POLICY,
    NgcModel,
    Oracle,
    distance,
    prompts,
    write_model,
    wrong_tokens,
)
from ngc_rig import LIMIT, Outcome, check, read_outcome

from trt_razor.cli_arguments import Parser, build_arguments, policy
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.cache_settings import read_settings

NGC = Path(__file__).resolve().parents[1] / "ngc"
PROMPT, COUNT = prompts(1, [140])[0], 5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NgcModel:
    return write_model(tmp_path_factory.mktemp("ngc") / request.param, request.param)


@pytest.fixture(scope="module")
def oracle(model: NgcModel) -> Oracle:
    return Oracle(model)


def outcome(tokens: list[int], logits: np.ndarray | None) -> Outcome:
    return Outcome([tokens], [logits], {}, {}, None, 0, False, [])


def test_mistakes_show(model: NgcModel, oracle: Oracle) -> None:
    """Each mistake that an engine could make moves logits far beyond what is allowed."""
    head_map = model.head_map(1)
    tokens, right = oracle.greedy(PROMPT, COUNT, head_map)
    decoder = oracle.decoder

    def logits(policy: RazorPolicy | None, heads: object, chunk: int | None = None) -> np.ndarray:
        cache = decoder.new_cache(policy, heads, MAX_SEQ_LEN)  # type: ignore[arg-type]
        rows = [decoder.prefill(PROMPT, cache, chunk, last_only=True)]
        rows += [decoder.forward([t], cache) for t in tokens[:-1]]
        return np.concatenate([row.numpy() for row in rows])

    other = dataclasses.replace(head_map, retrieval_heads=((0, 4), *head_map.retrieval_heads[1:]))
    wrong = {
        "dense": logits(None, None),
        "one other head": logits(POLICY, other),
        "heads of two ranks": logits(POLICY, model.head_map(2)),
        "no sinks": logits(POLICY.with_(sink_tokens=0), head_map),
        "no compensation": logits(POLICY.with_(comp_tokens=0), head_map),
        "window one shorter": logits(POLICY.with_(min_window=63), head_map),
        "prompt in chunks": logits(POLICY, head_map, 100),
    }
    found = {name: distance(x, right) for name, x in wrong.items()}
    assert min(found.values()) > 2 * LIMIT, found
    assert found["dense"] > 10 * LIMIT
    assert distance(right, oracle.logits(PROMPT, tokens, head_map)) < 1e-3


def test_what_the_comparison_accepts(model: NgcModel, oracle: Oracle) -> None:
    head_map = model.head_map(1)
    tokens, right = oracle.greedy(PROMPT, COUNT, head_map)
    noise = np.random.default_rng(0).uniform(-1, 1, right.shape) * right.std() * LIMIT / 2
    near = (right + noise).astype(np.float32)
    follows = [int(t) for t in near.argmax(1)]
    if follows == tokens:  # else the reference goes another way from there on
        assert 0 < check(outcome(tokens, near), [PROMPT], oracle, head_map, LIMIT) < LIMIT
    assert check(outcome(tokens, right), [PROMPT], oracle, head_map, LIMIT) < 1e-3

    def refused(tokens: list[int], logits: np.ndarray | None) -> None:
        with pytest.raises(AssertionError):
            check(outcome(tokens, logits), [PROMPT], oracle, head_map, LIMIT)

    refused(tokens, None)
    if model.family != FAMILIES[0]:
        return  # the rest is the same for all, and takes time
    refused(tokens, right[:-1])
    refused([*tokens[:-1], (tokens[-1] + 1) % 1000], right)  # not greedy
    far = right.copy()
    far[3, 17] += 2 * LIMIT * right.std()
    refused(tokens, far)
    with pytest.raises(AssertionError):
        check(outcome(tokens, right), [PROMPT], oracle, None, LIMIT)


def test_the_build_command(
    model: NgcModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option is one that the command line has; the policy is that of the reference."""
    commands: list[list[str]] = []
    monkeypatch.setattr(ngc_rig, "call", lambda command, *rest: commands.append(list(command)))
    for razor in (False, True):
        ngc_rig.build_engine(model, tmp_path, razor, 2, ["--kv-dtype", "fp8"])
    for razor, command in enumerate(commands):
        parser = Parser()
        build_arguments(parser)
        args = parser.parse_args(command[command.index("build") + 1 :])
        assert (args.tp_size, args.kv_dtype, args.prefill_chunk) == (2, "fp8", 0)
        assert args.max_seq_len == MAX_SEQ_LEN
        assert args.razor == bool(razor)
        if razor:
            assert policy(args) == POLICY
            assert model.heads == Path(args.heads)


def test_wrong_tokens() -> None:
    reference = np.array([[0.0, 1.0, 0.99], [5.0, 0.0, 1.0], [0.0, 0.5, 4.0]])
    assert wrong_tokens([1, 0, 2], reference, 0.01) == []
    assert wrong_tokens([2, 0, 2], reference, 0.01) == []  # a near tie
    assert wrong_tokens([2, 0, 2], reference, 0.001) == [0]
    assert wrong_tokens([1, 2, 1], reference, 0.01) == [1, 2]


@pytest.mark.parametrize("release", ["1.0.0", "1.2.1"])
def test_the_process_that_runs_an_engine(release: str, tmp_path: Path) -> None:
    double = doubles.make(tmp_path / "double", release)
    folder = engine_folder(tmp_path / "engine", release)
    job, out = tmp_path / "job.json", tmp_path / "out"
    asked = [{"tokens": [1, 2, 3], "max_new_tokens": 5}, {"tokens": [9] * 70, "max_new_tokens": 2}]
    settings = {"engine": str(folder.path), "logits": True, "stream": True, "memory": 0.5}
    job.write_text(json.dumps({**settings, "requests": asked}))
    environment = {**os.environ, **doubles.environment(double), "TLLM_LOG_LEVEL": "INFO"}
    command = [sys.executable, str(NGC / "ngc_job.py"), str(job), str(out)]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    found = read_outcome(out)
    assert [len(t) for t in found.tokens] == [5, 2]
    for tokens, logits in zip(found.tokens, found.logits, strict=True):
        assert logits is not None
        assert list(logits.argmax(1)) == tokens
    assert {w: blocks for w, (blocks, _) in found.windows.items()} == found.log_windows
    assert sorted(found.windows) == list(read_settings(folder.path).distinct_windows)
    assert found.log_gib is not None
    assert found.sequences_that_fit > 1
    assert not found.preloaded
    assert found.iterations[0]["contexts"] == 2


def test_nothing_ran_is_a_failure() -> None:
    """The command of docs/ngc.md, outside an NGC image."""
    if importlib.util.find_spec("tensorrt_llm") is not None:
        pytest.skip("TensorRT-LLM is installed here")
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(NGC / "run.sh"), "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert "error: no test ran: TensorRT-LLM is not installed" in found.stdout
    assert "error" not in found.stderr.lower()
    # Without run.sh, as in the whole suite, they are skipped.
    environment.pop("TRT_RAZOR_NGC", None)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(NGC)]
    found = subprocess.run(
        command, cwd=NGC.parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout
    assert "failed" not in found.stdout
