"""Slots, chunked prefill, sampling and streaming over a scripted session; then over real engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from fake_session import INF, NAN, VOCAB, FakeSession, alone, mixed
from tiny_models import POLICY, TinyModel

from trt_razor.engine import Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.generate import Event, Generator, SamplingParams

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
    lengths = [6, 1, 6]
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


def test_short_prompts_are_read_together_and_a_step_stays_short() -> None:
    session = FakeSession(6)
    generator = Generator(session, prefill_chunk=8)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8], [9], [10] * 9]
    params = SamplingParams(max_new_tokens=3)
    first: dict[int, int] = {}
    ids = [generator.submit(p, params) for p in prompts]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    for step in range(8):
        before = len(session.calls)
        for e in generator.step():
            first.setdefault(e.request, step)
            tokens[e.request] += [] if e.token is None else [e.token]
        read = [c for slot, c in session.calls[before:] if len(c) == 1 and c != [1]]
        assert sum(c[0] for c in read) <= 8
    assert [first[i] for i in ids] == [0, 0, 1, 0, 3]
    for i, prompt in zip(ids, prompts, strict=True):
        assert tokens[i] == alone(prompt, params)


@pytest.mark.parametrize("others", [1, 3])
@pytest.mark.parametrize("read", range(6))
def test_a_short_prompt_does_not_wait_for_a_long_one(read: int, others: int) -> None:
    session = FakeSession(others + 1, 400)
    generator = Generator(session, prefill_chunk=8)
    params = SamplingParams(max_new_tokens=2)
    long = [generator.submit([i] * 320, params) for i in range(others)]
    for _ in range(read):
        generator.step()
    before = len(session.calls)
    short = generator.submit([3, 1, 2], params)
    while short not in [e.request for e in generator.step()]:
        pass
    assert len(session.calls) - before < 4
    seen: set[int] = set()
    for _ in range(41 * others):
        seen.update(e.request for e in generator.step())
    assert seen >= set(long)


def test_a_long_prompt_ends_while_short_ones_keep_coming() -> None:
    session = FakeSession(3, 200)
    generator = Generator(session, prefill_chunk=4)
    one = SamplingParams(max_new_tokens=1)
    long = generator.submit([1] * 40, one)
    for _ in range(4 * 10):
        generator.submit([2, 3, 4], one)
        if long in [e.request for e in generator.step()]:
            break
    else:
        pytest.fail("the long prompt never got its turn")


def test_a_slot_that_cannot_be_cleared_ends_one_request_only() -> None:
    class Broken(FakeSession):
        def reset(self, slot: int) -> None:
            if slot == 0 and not self.calls:
                raise RazorError("slot 0: cannot be cleared")
            super().reset(slot)

    generator = Generator(Broken(2))
    results = generator.run([[1], [2], [3]], SamplingParams(max_new_tokens=3))
    assert [(r.finished, r.error) for r in results] == [
        ("error", "slot 0: cannot be cleared"), ("length", None), ("length", None),
    ]  # fmt: skip
    assert results[2].tokens == alone([3], SamplingParams(max_new_tokens=3))


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


def test_logprobs_are_those_of_the_model_whatever_is_sampled() -> None:
    params = SamplingParams(
        max_new_tokens=8, temperature=0.5, top_k=5, seed=4, repetition_penalty=1.5, logprobs=True
    )
    events: list[Event] = []
    generator = Generator(FakeSession(2))
    result = generator.run([[5, 6]], params, lambda i, e: events.append(e))[0]
    sequence = [5, 6]
    for event, token in zip(events, result.tokens, strict=True):
        x = mixed(sequence).astype(float)
        assert event.logprob == pytest.approx(x[token] - np.log(np.exp(x).sum()), abs=1e-9)
        sequence.append(token)


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
