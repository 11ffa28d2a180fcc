"""Tokens out of an engine: slots, chunked prefill, sampling, streaming.

``Generator`` keeps up to ``num_slots`` sequences and moves all of them on with ``step()``:
requests join and leave between steps, so the same class serves one prompt and a server.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trt_razor.backends.base import Session
from trt_razor.errors import UsageError
from trt_razor.models.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to generate (>= 1).
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: keep the smallest set of tokens whose probability reaches p (0 < p <= 1).
        seed: of this request's own random numbers; the same seed gives the same tokens whatever
            else runs beside it. None = a fresh one.
        stop: texts that end generation; they are not part of the output.
        stop_token_ids: ids that end generation, besides the model's own.
        ignore_eos: go on after the model's end token (for measurements).

    Raises:
        UsageError: naming the wrong field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1")
        t = self.temperature
        _check("temperature", t, math.isfinite(t) and 0 <= t <= 1e4, "a number >= 0")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 = all)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "0 .. 2^64 − 1")
        _check("stop", self.stop, all(self.stop), "texts that are not empty")


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name}: expected {expected}, found {value!r}")


def sample(logits: np.ndarray, params: SamplingParams, rng: np.random.Generator) -> int:
    """The next token from logits [vocab].

    Order as in common engines: temperature, top-k, top-p on what is left, then a draw.

    Raises:
        UsageError: if the logits hold no finite number (a poisoned model or cache).
    """
    if params.temperature == 0 or params.top_k == 1:
        token = int(logits.argmax())
        if not np.isfinite(logits[token]):
            raise UsageError("logits: not finite; the model's weights or its cache are damaged")
        return token
    keep = np.arange(len(logits))
    scores = logits.astype(np.float64)
    if 0 < params.top_k < len(scores):
        keep = np.argpartition(scores, -params.top_k)[-params.top_k :]
    # Most likely first; ties by token id, so that the draw does not depend on the partition.
    keep = keep[np.lexsort((keep, -scores[keep]))]
    top = float(scores[keep[0]])
    if not np.isfinite(top):
        raise UsageError("logits: not finite; the model's weights or its cache are damaged")
    p = np.exp((scores[keep] - top) / params.temperature)
    p /= p.sum()
    if params.top_p < 1:
        count = int(np.searchsorted(np.cumsum(p), params.top_p)) + 1
        keep, p = keep[:count], p[:count] / p[:count].sum()
    return int(keep[min(np.searchsorted(np.cumsum(p), rng.random()), len(keep) - 1)])


@dataclass
class Event:
    """What a step made for one request.

    Attributes:
        request: id from ``submit``.
        token: the new token, or None if only held-back text came out at the end.
        text: text newly complete (empty without a tokenizer, or while a character is incomplete).
        finished: None, or why it ended: ``stop`` (end token, stop text or id), ``length``
            (max_new_tokens), ``capacity`` (max_seq_len), ``cancelled``, ``error``.
        error: message if ``finished`` is ``error``.
    """

    request: int
    token: int | None
    text: str = ""
    finished: str | None = None
    error: str | None = None


@dataclass
class Completion:
    """A finished request."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str = ""


@dataclass
class _Sequence:
    request: int
    prompt: np.ndarray
    params: SamplingParams
    rng: np.random.Generator
    stream: TextStream | None
    stop_ids: frozenset[int]
    cached: int = 0  # tokens of prompt and output in the cache
    tokens: list[int] = field(default_factory=list)
    held: str = ""  # text not given out: it may be the start of a stop text

    @property
    def decoding(self) -> bool:
        return bool(self.tokens)


class Generator:
    """Continuous generation over the slots of one session.

    Args:
        session: an open engine; this object owns its slots.
        prefill_chunk: tokens a prompt is read in at once; 0 = the whole prompt.
        eos_token_ids: ids that end a sequence.
        tokenizer: None = ids only; then ``stop`` texts are refused.
    """

    def __init__(
        self,
        session: Session,
        prefill_chunk: int = 0,
        eos_token_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.session = session
        self.prefill_chunk = prefill_chunk or session.max_seq_len
        self.tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._slots: list[_Sequence | None] = [None] * session.num_slots
        self._waiting: deque[_Sequence] = deque()
        self._next = 0

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(s is not None for s in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids; returns the request's id.

        Raises:
            UsageError: empty or too long a prompt, an id outside the vocabulary, or stop texts
                without a tokenizer.
        """
        ids = np.asarray(prompt, dtype=np.int64).reshape(-1)
        limit = self.session.max_seq_len
        if len(ids) == 0:
            raise UsageError("prompt: expected at least 1 token, found an empty prompt")
        if len(ids) > limit:
            raise UsageError(
                f"prompt: {len(ids)} tokens do not fit max_seq_len {limit} of this engine; shorten "
                f"it, or build with a larger --max-seq-len"
            )
        if ids.min() < 0 or ids.max() >= self.session.vocab_size:
            raise UsageError(
                f"prompt: expected token ids 0..{self.session.vocab_size - 1}, "
                f"found {ids.min()}..{ids.max()}"
            )
        if params.stop and self.tokenizer is None:
            raise UsageError("stop: texts need a tokenizer, and this engine has none")
        request, self._next = self._next, self._next + 1
        eos = frozenset() if params.ignore_eos else self._eos
        self._waiting.append(
            _Sequence(
                request,
                ids.astype(np.int32),
                params,
                np.random.default_rng(params.seed),
                self.tokenizer.stream() if self.tokenizer else None,
                eos | set(params.stop_token_ids),
            )
        )
        return request

    def cancel(self, request: int) -> bool:
        """Drop a request wherever it is; False if it is not (or no longer) here."""
        for s in self._waiting:
            if s.request == request:
                self._waiting.remove(s)
                return True
        for slot, sequence in enumerate(self._slots):
            if sequence is not None and sequence.request == request:
                self._slots[slot] = None
                return True
        return False

    def step(self) -> list[Event]:
        """One prefill chunk for the oldest prompt that is not read yet, then one token for every
        sequence that decodes. Returns what came out; empty if nothing is left to do."""
        for slot, sequence in enumerate(self._slots):
            if sequence is None and self._waiting:
                self.session.reset(slot)
                self._slots[slot] = self._waiting.popleft()
        # Those that decode were there before the prompt below joins them.
        decoding = [i for i, s in enumerate(self._slots) if s is not None and s.decoding]
        events = self._prefill_step()
        if decoding:
            events += self._decode_step(decoding)
        return events

    def _prefill_step(self) -> list[Event]:
        reading = [
            (s.request, i) for i, s in enumerate(self._slots) if s is not None and not s.decoding
        ]
        if not reading:
            return []
        slot = min(reading)[1]
        s = self._slots[slot]
        assert s is not None
        tokens = s.prompt[s.cached : s.cached + self.prefill_chunk]
        logits = self.session.forward(
            slot,
            tokens[None],
            np.array([s.cached]),
            np.array([len(tokens)]),
            np.array([[len(tokens) - 1]]),
        )
        s.cached += len(tokens)
        return [] if s.cached < len(s.prompt) else [self._take(slot, logits[0, 0])]

    def _decode_step(self, slots: list[int]) -> list[Event]:
        lo, hi = slots[0], slots[-1] + 1
        tokens = np.zeros((hi - lo, 1), np.int32)
        past, chunk = np.zeros(hi - lo, np.int32), np.zeros(hi - lo, np.int32)
        for slot in range(lo, hi):
            s = self._slots[slot]
            if s is not None:
                # A row between two prefill chunks is idle here, but its cache must stay whole.
                past[slot - lo] = s.cached
                if slot in slots:
                    tokens[slot - lo], chunk[slot - lo] = s.tokens[-1], 1
        logits = self.session.forward(lo, tokens, past, chunk, np.zeros((hi - lo, 1), np.int32))
        events = []
        for slot in slots:
            s = self._slots[slot]
            assert s is not None
            s.cached += 1
            events.append(self._take(slot, logits[slot - lo, 0]))
        return events

    def _take(self, slot: int, logits: np.ndarray) -> Event:
        """Choose the next token of a slot from its logits and say what that makes."""
        s = self._slots[slot]
        assert s is not None
        try:
            token = sample(logits, s.params, s.rng)
        except UsageError as e:
            self._slots[slot] = None
            return Event(s.request, None, "", "error", str(e))
        if token in s.stop_ids:
            self._slots[slot] = None
            return Event(s.request, None, self._flush(s), "stop")
        s.tokens.append(token)
        text, stopped = self._text(s, token)
        finished = None
        if stopped:
            finished = "stop"
        elif len(s.tokens) >= s.params.max_new_tokens:
            finished = "length"
        elif s.cached >= self.session.max_seq_len:
            finished = "capacity"  # no room to cache the token just chosen
        if finished:
            self._slots[slot] = None
            if not stopped:
                text += self._flush(s)
        return Event(s.request, token, text, finished)

    def _text(self, s: _Sequence, token: int) -> tuple[str, bool]:
        """(text to give out, whether a stop text ended it)."""
        if s.stream is None:
            return "", False
        return self._cut(s, s.stream.step(token))

    def _cut(self, s: _Sequence, more: str) -> tuple[str, bool]:
        text = s.held + more
        ends = [i for i in (text.find(x) for x in s.params.stop) if i >= 0]
        if ends:
            s.held = ""
            return text[: min(ends)], True
        # Hold back the longest end of the text that could begin a stop text.
        hold = max(
            (n for x in s.params.stop for n in range(1, len(x)) if text.endswith(x[:n])), default=0
        )
        s.held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def _flush(self, s: _Sequence) -> str:
        if s.stream is None:
            return ""
        text, stopped = self._cut(s, s.stream.finish())
        return text if stopped else text + s.held

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[Completion]:
        """Generate for all prompts, as many at a time as there are slots.

        Args:
            params: one for all, or one for each prompt.
            on_event: called with (index of the prompt, event) as tokens come.

        Raises:
            UsageError: as ``submit``, or if a request ended in an error.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"params: expected {len(prompts)}, found {len(each)}")
        index = {}
        try:
            for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
                index[self.submit(prompt, p)] = i
            results = [Completion(len(prompt)) for prompt in prompts]
            left = len(prompts)
            while left:
                for event in self.step():
                    i = index[event.request]
                    if event.error:
                        raise UsageError(event.error)
                    if event.token is not None:
                        results[i].tokens.append(event.token)
                    results[i].text += event.text
                    if event.finished:
                        results[i].finished, left = event.finished, left - 1
                    if on_event:
                        on_event(i, event)
            return results
        finally:
            for request in index:
                self.cancel(request)
