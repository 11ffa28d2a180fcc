"""The engine runner: what it feeds is what the engine computes; and real engines against transformers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra [onnxruntime]")
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_models import POLICY, TinyModel

from trt_razor.build import BuildRequest, build_engine
from trt_razor.cache_layout import kv_at
from trt_razor.engine import Engine
from trt_razor.errors import UsageError
from trt_razor.evaluation.runners.engine import EngineRunner, EngineSession
from trt_razor.generate import Generator, SamplingParams
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.policy import RazorPolicy

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "engines" / "recipes" / "smollm2-135m.heads.json"
PROMPT = [int(x) for x in np.random.default_rng(3).integers(0, 256, 27)]


@pytest.fixture
def runner(razor_engine: Engine) -> EngineRunner:
    return EngineRunner(razor_engine.directory)


def fresh(engine: Engine, chunks: list[list[int]]) -> np.ndarray:
    """Logits of the last chunk's tokens, straight from a session: [S, vocab]."""
    session, past = engine.open(1), 0
    for chunk in chunks:
        logits = session.forward(
            0,
            np.array([chunk], np.int32),
            np.array([past], np.int32),
            np.array([len(chunk)], np.int32),
            np.arange(len(chunk), dtype=np.int32)[None],
        )
        past += len(chunk)
    return logits[0]


def in_chunks(tokens: list[int], size: int = 5) -> list[list[int]]:
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def greedy(session: EngineSession, token: int, count: int) -> list[int]:
    out = []
    for _ in range(count):
        token = int(session.feed([token])[-1].argmax())
        out.append(token)
    return out


def test_feed_gives_the_logits_of_every_token(runner: EngineRunner, razor_engine: Engine) -> None:
    session = runner.read(PROMPT[:22]).compress()
    logits = session.feed(PROMPT[22:26])
    assert logits.dtype == np.float32
    expected = fresh(razor_engine, [*in_chunks(PROMPT[:22]), PROMPT[22:26]])
    np.testing.assert_array_equal(logits, expected)
    # Longer than the engine takes at once: in its chunks.
    long = runner.read(PROMPT[:4]).compress().feed(PROMPT[4:])
    chunks = [PROMPT[:4], *in_chunks(PROMPT[4:])]
    for end in range(2, len(chunks) + 1):
        start = sum(map(len, chunks[1 : end - 1]))
        part = long[start : start + len(chunks[end - 1])]
        np.testing.assert_array_equal(part, fresh(razor_engine, chunks[:end]))


def test_greedy_tokens_are_the_generators(runner: EngineRunner, razor_engine: Engine) -> None:
    generator = Generator(razor_engine.open(1), 5, (), None)
    expected = generator.run([PROMPT[:21]], SamplingParams(max_new_tokens=12))[0].tokens
    assert greedy(runner.read(PROMPT[:20]).compress(), PROMPT[20], 12) == expected


@pytest.mark.parametrize("copies", [True, False])
def test_forks_go_their_own_way(
    runner: EngineRunner, razor_engine: Engine, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copies:  # a backend that keeps its cache to itself: tokens are read again
        monkeypatch.setattr(runner, "_copy", lambda n: None)
    context = runner.read(PROMPT[:17])
    first, second = context.compress("engine"), context.compress()
    a1 = first.feed(PROMPT[17:19])
    b1 = second.feed(PROMPT[20:23])
    third = first.fork()
    a2, b2 = first.feed([7]), second.feed([9])
    c2 = third.feed([8])
    other = runner.read(PROMPT[3:9]).compress().feed([1])  # another context in the same slot
    a3 = first.feed([3])
    head = in_chunks(PROMPT[:17])
    a = [*head, PROMPT[17:19]]
    b = [*head, PROMPT[20:23]]
    for got, chunks in (
        (a1, a),
        (b1, b),
        (a2, [*a, [7]]),
        (b2, [*b, [9]]),
        (c2, [*a, [8]]),
        (other, [*in_chunks(PROMPT[3:9]), [1]]),
        (a3, [*a, [7], [3]]),
    ):
        np.testing.assert_array_equal(got, fresh(razor_engine, chunks))
    extended = context.extended(PROMPT[17:24]).compress().feed([2])
    more = [*head, *in_chunks(PROMPT[17:24]), [2]]
    np.testing.assert_array_equal(extended, fresh(razor_engine, more))


def test_copies_are_not_made_without_need(
    runner: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    copy = runner._copy
    monkeypatch.setattr(runner, "_copy", lambda n: made.append(n) or copy(n))
    context = runner.read(PROMPT[:12])
    for token in (1, 2, 3):  # questions one after another, each session dropped after its answer
        context.compress().feed([token])
    assert made == [12]


def test_kv_ratio_is_the_need(runner: EngineRunner, razor_engine: Engine) -> None:
    session = runner.read(PROMPT).compress()
    manifest, heads = razor_engine.manifest, razor_engine.head_map
    assert heads is not None
    need = kv_at(manifest.spec, heads, POLICY, len(PROMPT), "float16")
    assert session.kv_ratio() == need.razor_bytes / need.full_bytes
    session.feed([1, 2, 3])
    need = kv_at(manifest.spec, heads, POLICY, len(PROMPT) + 3, "float16")
    assert session.kv_ratio() == need.razor_bytes / need.full_bytes
    assert runner.read([]).compress().kv_ratio() == 1


def test_dense_engine(dense_engine: Engine) -> None:
    runner = EngineRunner(dense_engine.directory)
    assert "dense engine, onnxruntime float32, reads in chunks of 5" in runner.label
    session = runner.read(PROMPT).compress("dense")
    assert session.kv_ratio() == 1
    np.testing.assert_array_equal(session.feed([4]), fresh(dense_engine, [*in_chunks(PROMPT), [4]]))


def test_refusals(runner: EngineRunner) -> None:
    context = runner.read(PROMPT)
    with pytest.raises(UsageError, match="method 'dense': expected the engine's own"):
        context.compress("dense")
    with pytest.raises(UsageError, match="an engine keeps no queries"):
        runner.read(PROMPT, all_queries=True)
    with pytest.raises(UsageError, match="65 tokens do not fit max_seq_len 64 of this engine"):
        runner.read([1] * 65)
    session = context.compress()
    with pytest.raises(UsageError, match=r"expected ids 0\.\.263, found 3\.\.264"):
        session.feed([3, 264])
    # Nothing happened to it.
    assert session.n == len(PROMPT)
    np.testing.assert_array_equal(session.feed([5]), context.compress().feed([5]))


def test_engine_without_a_tokenizer(tiny_model: TinyModel, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model.folder, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    engine = tiny_model.build(tmp_path / "engine", checkpoint=folder)
    with pytest.raises(UsageError, match="this engine has no tokenizer"):
        EngineRunner(engine.directory)


# Engines against the Hugging Face path ----------------------------------------------------------
def test_comparison_finds_another_policy(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from trt_razor.evaluation.agreement import compare
    from trt_razor.reference.hf.load import checkpoint_model

    model = checkpoint_model(tiny_model.checkpoint())
    prompts = [PROMPT[:21], PROMPT[2:27]]
    runner = EngineRunner(tiny_model.build(tmp_path / "a").directory)
    same = compare(runner, model, prompts, 10, "tiny")
    assert (same.steps, same.equal, same.free_equal) == (20, 20, 20)
    assert same.largest_error < 1e-4
    assert same.differences == ()
    # The same engine, said to drop other tokens than it does.
    wrong = POLICY.with_(comp_tokens=0)
    manifest = runner.engine.manifest
    object.__setattr__(manifest, "policy", wrong)
    other = compare(runner, model, prompts, 10, "tiny")
    assert other.largest_error > 100 * same.largest_error
    for d in other.differences:
        assert d.expected != d.found
        assert 0 <= d.margin <= 2 * d.error
    assert other.equal == other.steps - len(other.differences)
    with pytest.raises(UsageError, match=r"each of 1 to 55 tokens .*found \[56\]"):
        compare(runner, model, [[1] * 56], 10, "tiny")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Single tokens are faster so, and much faster where others compute, too."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_engine_reproduces_the_hugging_face_path(smollm2: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from trt_razor.evaluation.agreement import AgreementOptions, measure

    build_engine(
        BuildRequest(
            model="smollm2-135m",
            razor=True,
            heads=str(RECIPE),
            backend="onnxruntime",
            output=tmp_path / "engine",
            policy=RazorPolicy(min_window=64),
            max_seq_len=640,
            prefill_chunk=256,
        )
    )
    options = AgreementOptions(
        tmp_path / "engine", "smollm2-135m", prompts=2, prompt_tokens=590, new_tokens=50
    )
    found = measure(options)
    assert found.steps == 100
    assert found.share >= 0.99
    assert found.free_share >= 0.9  # one difference changes all that follows
    assert all(d.margin <= 2 * d.error for d in found.differences)  # ties, decided by rounding
    assert found.largest_error < 1e-2
    assert f"| {found.share:.2%} |" in found.markdown()
