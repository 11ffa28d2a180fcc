"""Slots, chunked prefill, sampling and streaming over a scripted session; then over real engines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import POLICY, TEMPLATE, TinyModel, byte_tokenizer_json

from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Completion, Event, Generator, SamplingParams, sample
from trt_razor.models.tokenizer import Tokenizer

VOCAB = 24
NAN, INF = float("nan"), float("inf")


def mixed(sequence: list[int]) -> np.ndarray:
    """Logits [VOCAB] that depend on every token of a sequence."""
    return 3 * np.random.default_rng([9, *sequence]).standard_normal(VOCAB).astype(np.float32)


class FakeSession:
    """A session that knows what every slot was told, and refuses what a real one would garble."""

    def __init__(
        self,
        num_slots: int = 1,
        max_seq_len: int = 64,
        logits: Callable[[list[int]], np.ndarray] = mixed,
        vocab_size: int = VOCAB,
    ) -> None:
        self.num_slots, self.max_seq_len, self.vocab_size = num_slots, max_seq_len, vocab_size
        self.logits = logits
        self.cached: list[list[int]] = [[] for _ in range(num_slots)]
        self.calls: list[tuple[int, list[int]]] = []  # first slot, chunk of each row
        self.kv_bytes = 0
        self.idle_rows_are_taken = False  # by prompts half read, whose caches must stay whole

    def reset(self, slot: int) -> None:
        self.cached[slot] = []

    def forward(
        self,
        first_slot: int,
        tokens: np.ndarray,
        past: np.ndarray,
        chunk: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        self.calls.append((first_slot, chunk.tolist()))
        rows, width = tokens.shape
        assert {a.dtype for a in (tokens, past, chunk, logits_index)} == {np.dtype(np.int32)}
        assert past.shape == chunk.shape == (rows,)
        assert first_slot + rows <= self.num_slots
        out = np.full((rows, logits_index.shape[1], self.vocab_size), NAN, np.float32)
        for row in range(rows):
            sequence, n = self.cached[first_slot + row], int(chunk[row])
            assert n <= width
            if n == 0:
                assert past[row] == len(sequence) or not self.idle_rows_are_taken
                continue
            assert past[row] == len(sequence)
            sequence += tokens[row, :n].tolist()
            assert len(sequence) <= self.max_seq_len
            for i, at in enumerate(logits_index[row]):
                assert at < n
                out[row, i] = self.logits(sequence[: int(past[row]) + int(at) + 1])
        return out


def alone(prompt: list[int], params: SamplingParams, max_seq_len: int = 64) -> list[int]:
    """What a request must give, from the definition: no slots, no chunks."""
    sequence, tokens = list(prompt), []
    rng = np.random.default_rng(params.seed)
    while len(tokens) < params.max_new_tokens and len(sequence) <= max_seq_len:
        token = sample(mixed(sequence), params, rng)
        if token in params.stop_token_ids:
            break
        tokens.append(token)
        sequence.append(token)
    return tokens


# Slots ----------------------------------------------------------------------------------------
REQUEST = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.builds(
        SamplingParams,
        max_new_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        seed=st.integers(0, 5),
        stop_token_ids=st.sampled_from([(), (3, 7, 11)]),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(REQUEST, min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([0, 1, 3, 8]),
    st.sampled_from([64, 24]),
)
def test_a_request_gives_the_same_whatever_runs_beside_it(
    requests: list[tuple[list[int], SamplingParams]], slots: int, chunk: int, capacity: int
) -> None:
    generator = Generator(FakeSession(slots, capacity), chunk)
    results = generator.run([r[0] for r in requests], [r[1] for r in requests])
    for (prompt, params), result in zip(requests, results, strict=True):
        assert result.tokens == alone(prompt, params, capacity)
        assert result.prompt_tokens == len(prompt)
    assert (generator.active, generator.waiting) == (0, 0)


def test_every_step_moves_decoding_rows_by_one_while_a_prompt_is_read_in_chunks() -> None:
    session = FakeSession(2)
    generator = Generator(session, prefill_chunk=4)
    first = generator.submit([1, 2], SamplingParams(max_new_tokens=20))
    assert [e.request for e in generator.step()] == [first]
    second = generator.submit(list(range(10)), SamplingParams(max_new_tokens=3))
    events = [[e.request for e in generator.step()] for _ in range(4)]
    # Two chunks of 4 say nothing; the last one of 2 gives the first token; then both decode.
    assert events == [[first], [first], [second, first], [first, second]]
    assert session.calls[1:] == [
        (1, [4]), (0, [1]),
        (1, [4]), (0, [1]),
        (1, [2]), (0, [1]),
        (0, [1, 1]),
    ]  # fmt: skip


def test_a_hole_between_active_slots_is_idle() -> None:
    session = FakeSession(3)
    generator = Generator(session)
    lengths = [6, 1, 4]
    params = [SamplingParams(max_new_tokens=n) for n in lengths]
    results = generator.run([[1], [2], [3]], params)
    assert [len(r.tokens) for r in results] == lengths
    assert session.calls[-1] == (0, [1, 0, 1])


def test_a_prompt_half_read_between_decoding_rows_keeps_its_cache() -> None:
    session = FakeSession(3)
    generator = Generator(session, prefill_chunk=2)
    many = SamplingParams(max_new_tokens=12)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8, 9, 10], [11]]
    # The outer two first, then the slot between them is filled in chunks.
    a, gone, c = (generator.submit(p, many) for p in ([1], [0], [11]))
    for _ in range(3):
        generator.step()
    assert generator.cancel(gone)
    session.idle_rows_are_taken = True
    b = generator.submit(prompts[1], many)
    tokens: dict[int, list[int]] = {a: [], b: [], c: []}
    for _ in range(40):
        for e in generator.step():
            tokens[e.request] += [] if e.token is None else [e.token]
    assert tokens[b] == alone(prompts[1], many)
    assert (0, [1, 0, 1]) in session.calls


def test_waiting_requests_take_free_slots_in_order() -> None:
    generator = Generator(FakeSession(2))
    order = [generator.submit([i], SamplingParams(max_new_tokens=2)) for i in range(5)]
    assert (generator.active, generator.waiting) == (0, 5)
    first_seen: list[int] = []
    while generator.active or generator.waiting:
        for e in generator.step():
            if e.request not in first_seen:
                first_seen.append(e.request)
        assert generator.active <= 2
    assert first_seen == order


def test_cancel_a_request_that_waits_reads_or_decodes() -> None:
    session = FakeSession(2)
    generator = Generator(session, prefill_chunk=2)
    many = SamplingParams(max_new_tokens=30)
    decoding = generator.submit([1], many)
    reading = generator.submit([2] * 9, many)
    waiting, other = generator.submit([3], many), generator.submit([4], many)
    generator.step()
    generator.step()
    assert (generator.active, generator.waiting) == (2, 2)
    assert [generator.cancel(r) for r in (waiting, reading, decoding)] == [True] * 3
    assert [generator.cancel(r) for r in (waiting, reading, decoding, 99)] == [False] * 4
    seen: list[int] = []
    while generator.active or generator.waiting:
        for e in generator.step():
            assert e.request == other
            seen += [] if e.token is None else [e.token]
    assert seen == alone([4], many)


def test_an_interrupted_run_frees_its_slots() -> None:
    generator = Generator(FakeSession(2))

    def stop(index: int, event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.run([[1], [2], [3]], SamplingParams(), stop)
    assert (generator.active, generator.waiting) == (0, 0)
    with pytest.raises(UsageError, match=r"prompt 2 of 2: prompt: expected at least 1 token"):
        generator.run([[1], []], SamplingParams())
    assert (generator.active, generator.waiting) == (0, 0)
    assert generator.run([[5]], SamplingParams(max_new_tokens=3))[0].tokens == alone(
        [5], SamplingParams(max_new_tokens=3)
    )


def test_run_does_not_swallow_the_events_of_others() -> None:
    generator = Generator(FakeSession(2))
    generator.submit([1], SamplingParams())
    with pytest.raises(UsageError, match="other requests"):
        generator.run([[2]], SamplingParams())


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_poisoned_logits_end_one_request_only(poison: float, temperature: float) -> None:
    def logits(sequence: list[int]) -> np.ndarray:
        out = mixed(sequence)
        if sequence[0] == 13 and len(sequence) == 4:
            out[5] = poison
        return out

    params = SamplingParams(max_new_tokens=6, temperature=temperature, seed=1)
    prompts = [[1, 2], [13], [3, 4, 5], [6]]
    generator = Generator(FakeSession(2, logits=logits))
    results = generator.run(prompts, params)
    assert [r.finished for r in results] == ["length", "error", "length", "length"]
    assert "not finite" in (results[1].error or "")
    assert results[1].tokens == alone([13], params)[:3]
    for i in (0, 2, 3):
        assert results[i].tokens == alone(prompts[i], params)
        assert results[i].error is None


def test_length_and_capacity() -> None:
    generator = Generator(FakeSession(max_seq_len=8), 3)
    many = SamplingParams(max_new_tokens=99)
    full = generator.run([[1] * 8], many)[0]
    # The token after a full cache is known; there is no room to go on from it.
    assert (len(full.tokens), full.finished) == (1, "capacity")
    part = generator.run([[1] * 5], many)[0]
    assert (len(part.tokens), part.finished) == (4, "capacity")
    assert generator.run([[1] * 5], SamplingParams(max_new_tokens=4))[0].finished == "length"
    with pytest.raises(UsageError, match=r"9 tokens do not fit max_seq_len 8.*--max-seq-len"):
        generator.submit([1] * 9, many)


@pytest.mark.parametrize(
    "prompt", [[], [-1], [VOCAB], [2**70], [1.5], ["a"], [[1], [1, 2]], [[1, 2]], [None], [True]]
)
def test_prompts_that_are_none(prompt: list[Any]) -> None:
    generator = Generator(FakeSession())
    with pytest.raises(UsageError, match="prompt: expected"):
        generator.submit(prompt, SamplingParams())
    assert generator.waiting == 0


@pytest.mark.parametrize(
    "field, values",
    [
        ("max_new_tokens", [0, -1, 1.5, True]),
        ("temperature", [NAN, INF, -0.1, 1e9, "1"]),
        ("top_k", [-1, 2.0]),
        ("top_p", [0, -0.5, 1.01, NAN]),
        ("seed", [-1, 2**64, 0.5]),
        ("stop", ["text", ("",), (3,)]),
        ("stop_token_ids", [("x",)]),
    ],
)
def test_sampling_params_name_the_wrong_field(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{field}: expected"):
            SamplingParams(**{field: value})


# Sampling -------------------------------------------------------------------------------------
def plain_distribution(logits: np.ndarray, t: float, k: int, p: float) -> np.ndarray:
    """Probabilities [vocab] of temperature, top-k, top-p in this order, the slow way."""
    weights = {i: np.exp((float(x) - float(logits.max())) / t) for i, x in enumerate(logits)}
    ranked = sorted(weights, key=lambda i: (-logits[i], i))[: k or None]
    total = sum(weights[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        kept.append(i)
        mass += weights[i] / total
        if mass >= p:
            break
    out = np.zeros(len(logits))
    out[kept] = [weights[i] for i in kept]
    return out / out.sum()


class Uniform:
    """Stands for a random generator: the midpoints of n equal parts of 0..1."""

    def __init__(self, n: int) -> None:
        self.values: Iterator[float] = iter([(i + 0.5) / n for i in range(n)])

    def random(self) -> float:
        return next(self.values)


@pytest.mark.parametrize("t, k, p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 4, 1.0), (1.0, 0, 0.6), (1.5, 6, 0.7), (1.0, 3, 0.2),
    (1.0, 99, 0.999), (1e-300, 0, 1.0), (1e4, 0, 0.5),
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_probabilities_are_the_definition(t: float, k: int, p: float, seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    logits[[2, 5, 9]] = logits[4]  # ties
    logits[7] = -np.inf
    n = 2000
    rng: Any = Uniform(n)
    params = SamplingParams(temperature=t, top_k=k, top_p=p)
    drawn = np.bincount([sample(logits, params, rng) for _ in range(n)], minlength=12)
    expected = plain_distribution(logits, t, k, p)
    assert np.abs(drawn / n - expected).max() <= 1.5 / n
    assert (drawn[expected == 0] == 0).all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    rng, n = np.random.default_rng(4), 4000
    params = SamplingParams(temperature=0.8, top_k=6, top_p=0.9)
    drawn = np.bincount([sample(logits, params, rng) for _ in range(n)], minlength=8)
    p = plain_distribution(logits, 0.8, 6, 0.9)
    sigma = np.sqrt(n * p * (1 - p))
    assert (np.abs(drawn - n * p) <= 4 * sigma).all()


def test_what_cannot_come_does_not_come_for_the_smallest_draw() -> None:
    class Zero:
        def random(self) -> float:
            return 0.0

    rng: Any = Zero()
    assert sample(np.float32([-INF, 1, 1]), SamplingParams(temperature=1.0), rng) == 1


def test_greedy_is_the_first_largest() -> None:
    rng = np.random.default_rng(0)
    logits = np.array([1, 5, 5, -INF], np.float32)
    assert sample(logits, SamplingParams(), rng) == 1
    assert sample(logits, SamplingParams(temperature=2.0, top_k=1), rng) == 1


@pytest.mark.parametrize("logits", [[NAN, 1], [1, NAN], [INF, 1], [-INF, -INF], [NAN, NAN]])
@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_logits_without_a_meaning(logits: list[float], k: int, t: float) -> None:
    with pytest.raises(RazorError, match="not finite") as e:
        sample(np.float32(logits), SamplingParams(temperature=t, top_k=k), np.random.default_rng(0))
    assert e.value.exit_code == 1


# Text -----------------------------------------------------------------------------------------
TOKENIZER = Tokenizer(
    byte_tokenizer_json(), {"bos_token": "<s>", "eos_token": "</s>"}, 256, (257,), TEMPLATE, "test"
)


def say_text(text: str, then: int | None = 257, **params: Any) -> tuple[Completion, list[str]]:
    """Generate with a model that says a text byte by byte; (result, texts of the events)."""
    script = TOKENIZER.encode(text) + ([] if then is None else [then])

    def logits(sequence: list[int]) -> np.ndarray:
        return np.eye(264, dtype=np.float32)[script[min(len(sequence) - 1, len(script) - 1)]]

    generator = Generator(FakeSession(1, 200, logits, 264), 0, [257], TOKENIZER)
    events: list[Event] = []
    given = SamplingParams(**{"max_new_tokens": len(script), **params})
    result = generator.run([[256]], given, lambda i, e: events.append(e))[0]
    assert "".join(e.text for e in events) == result.text
    assert [e.token for e in events if e.token is not None] == result.tokens
    assert [e.finished for e in events if e.finished] == [result.finished]
    return result, [e.text for e in events]


def test_text_streams_in_whole_characters_until_the_end_token() -> None:
    result, pieces = say_text("né 🎉!")
    assert result.text == "né 🎉!"
    assert (result.finished, len(result.tokens)) == ("stop", len("né 🎉!".encode()))
    assert [p for p in pieces if p] == ["n", "é", " ", "🎉", "!"]


def test_ignore_eos_and_stop_token_ids() -> None:
    stopped, _ = say_text("ab", stop_token_ids=(TOKENIZER.encode("b")[0],))
    assert (stopped.text, stopped.finished, len(stopped.tokens)) == ("a", "stop", 1)
    going_on, _ = say_text("ab", ignore_eos=True)
    assert (going_on.text, going_on.finished) == ("ab", "length")
    assert going_on.tokens[-1] == 257


@pytest.mark.parametrize("text, stop, expected", [
    ("hello STOP world", ("STOP",), "hello "),
    ("hello STOP world", ("world", "STOP"), "hello "),
    ("aab", ("ab",), "a"),
    ("ababac!", ("abac",), "ab"),
    ("x", ("x",), ""),
    ("né🎉 ok", ("🎉",), "né"),
    ("abcd", ("bcd", "abcde"), "a"),
])  # fmt: skip
def test_stop_text_over_several_tokens(text: str, stop: tuple[str, ...], expected: str) -> None:
    result, pieces = say_text(text, stop=stop)
    assert (result.text, result.finished) == (expected, "stop")
    # Never given out and taken back: what is out is always a beginning of the result.
    assert all(expected.startswith("".join(pieces[: i + 1])) for i in range(len(pieces)))


@pytest.mark.parametrize("then", [257, None])
def test_text_that_only_begins_like_a_stop_comes_out_at_the_end(then: int | None) -> None:
    result, pieces = say_text("so STO", then, stop=("STOP",))
    assert result.text == "so STO"
    assert result.finished == ("stop" if then else "length")
    assert pieces[-1] == "STO"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    result, _ = say_text("a🎉", None, max_new_tokens=3)
    assert (result.text, result.finished) == ("a\ufffd", "length")


def test_held_text_comes_out_with_an_error() -> None:
    def logits(sequence: list[int]) -> np.ndarray:
        if len(sequence) == 3:
            return np.full(264, NAN, np.float32)
        return np.eye(264, dtype=np.float32)[TOKENIZER.encode("ST")[len(sequence) - 1]]

    generator = Generator(FakeSession(1, 20, logits, 264), 0, (), TOKENIZER)
    result = generator.run([[256]], SamplingParams(stop=("STOP",)))[0]
    assert (result.text, result.finished) == ("ST", "error")


def test_stop_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="stop: texts need a tokenizer"):
        Generator(FakeSession()).submit([1], SamplingParams(stop=("x",)))


# Real engines ---------------------------------------------------------------------------------
@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads cost more than they give on a model this small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_greedy(model: TinyModel, engine: Engine, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the reference, with the chunks the engine reads."""
    from trt_razor.reference.decoder import ReferenceDecoder

    decoder = ReferenceDecoder(model.checkpoint())
    policy = engine.manifest.policy
    cache = decoder.new_cache(policy, engine.head_map, engine.manifest.max_seq_len)
    chunk = engine.manifest.prefill_chunk or len(prompt)
    for start in range(0, len(prompt), chunk):
        logits = decoder.forward(prompt[start : start + chunk], cache, last_only=True)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(decoder.forward(tokens[-1:], cache, last_only=True)[-1].argmax()))
    return tokens


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("kind", ["razor_engine", "dense_engine", "whole prompts", "clusters"])
def test_greedy_generation_is_the_reference_token_for_token(
    kind: str,
    slots: int,
    tiny_model: TinyModel,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "whole prompts":
        engine = tiny_model.build(tmp_path / "e", prefill_chunk=0)
    elif kind == "clusters":
        engine = tiny_model.build(tmp_path / "e", policy=replace(POLICY, comp_tokens=4))
    else:
        engine = request.getfixturevalue(kind)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 264, n).tolist() for n in (31, 1, 9, 24)]
    counts = [20, 30, 12, 5]
    generator = Generator(engine.open(slots), engine.manifest.prefill_chunk)
    params = [SamplingParams(max_new_tokens=n) for n in counts]
    results = generator.run(prompts, params)
    for prompt, count, result in zip(prompts, counts, results, strict=True):
        assert result.tokens == reference_greedy(tiny_model, engine, prompt, count)
        assert result.finished == "length"


def test_a_full_slot_ends_with_capacity(razor_engine: Engine) -> None:
    generator = Generator(razor_engine.open(1), 5)
    result = generator.run([[7] * 60], SamplingParams(max_new_tokens=99))[0]
    assert (len(result.tokens), result.finished) == (5, "capacity")
