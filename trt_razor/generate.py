"""Tokens out of an engine: slots, chunked prefill, sampling, streaming.

``Generator`` keeps up to ``num_slots`` sequences and moves all of them on with ``step()``:
requests join and leave between steps, so the same class serves one prompt and a server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trt_razor.backends.base import Session
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import TextStream, Tokenizer
from trt_razor.sampling import History, SamplingParams, ends_with, log_prob, sample

OLDEST_EVERY = 4
"""Every so many prefill chunks go to the oldest prompt, whatever its length."""

__all__ = ["Completion", "Event", "Generator", "SamplingParams", "sample"]


@dataclass
class Event:
    """What a step made for one request.

    Attributes:
        request: id from ``submit``.
        token: the new token, or None if only held-back text came out at the end.
        text: text newly complete (empty without a tokenizer, or while a character is incomplete).
        finished: None, or why it ended: ``stop`` (end token, stop text, id or sequence),
            ``length`` (max_new_tokens), ``capacity`` (max_seq_len), ``error``.
        error: message if ``finished`` is ``error``.
        logprob: of the token, if its request asked for them.
    """

    request: int
    token: int | None
    text: str = ""
    finished: str | None = None
    error: str | None = None
    logprob: float | None = None


@dataclass
class Completion:
    """A finished request.

    Attributes:
        tokens: ids generated, the end token not among them.
        text: their text up to a stop text (empty without a tokenizer).
        finished: as in ``Event``. error: the message if that is ``error``.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str = ""
    error: str | None = None


@dataclass(eq=False)
class _Sequence:
    request: int
    prompt: np.ndarray
    params: SamplingParams
    rng: np.random.Generator
    stream: TextStream | None
    stop_ids: frozenset[int]
    history: History
    cached: int = 0  # tokens of prompt and output in the cache
    tokens: list[int] = field(default_factory=list)
    held: str = ""  # text not given out: it may be the start of a stop text

    @property
    def decoding(self) -> bool:
        return bool(self.tokens)

    @property
    def unread(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return len(self.prompt) - self.cached


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
        self._chunks = 0  # prefill chunks so far

    @property
    def active(self) -> int:
        """Requests in slots."""
        return sum(s is not None for s in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def cached_tokens(self) -> list[int]:
        """Tokens in the cache of every request in a slot."""
        return [s.cached for s in self._slots if s is not None]

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a prompt of token ids; returns the request's id.

        Raises:
            UsageError: empty or too long a prompt, an id outside the vocabulary, or stop texts
                without a tokenizer.
        """
        ids = self._ids(prompt)
        limit = self.session.max_seq_len
        if len(ids) > limit:
            raise UsageError(
                f"prompt: {len(ids)} tokens do not fit max_seq_len {limit} of this engine; shorten "
                f"it, or build with a larger --max-seq-len"
            )
        if params.stop and self.tokenizer is None:
            raise UsageError("stop: texts need a tokenizer, and this engine has none")
        request, self._next = self._next, self._next + 1
        eos = frozenset() if params.ignore_eos else self._eos
        stop_ids = eos | set(params.stop_token_ids)
        self._waiting.append(
            _Sequence(
                request,
                ids,
                params,
                np.random.default_rng(params.seed),
                self.tokenizer.stream() if self.tokenizer else None,
                stop_ids,
                History(params, ids, self.session.vocab_size, stop_ids),
            )
        )
        return request

    def _ids(self, prompt: Sequence[int]) -> np.ndarray:
        """A prompt as int32 [tokens], checked."""
        if len(prompt) == 0:
            raise UsageError("prompt: expected at least 1 token, found an empty prompt")
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of unequal length
            ids = np.empty(0, object)
        vocab = self.session.vocab_size
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UsageError(f"prompt: expected a list of token ids 0..{vocab - 1}")
        if ids.min() < 0 or ids.max() >= vocab:
            raise UsageError(
                f"prompt: expected token ids 0..{vocab - 1}, found {ids.min()}..{ids.max()}"
            )
        return ids.astype(np.int32)

    def cancel(self, request: int) -> bool:
        """Drop a request wherever it is, without an event; False if it is not (any more) here."""
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
        """A chunk of a prompt that is not read yet, or several short ones of ``prefill_chunk``
        tokens together, then one token for every sequence that decodes. Returns what came out,
        nothing for a chunk that ends inside its prompt; ``active`` and ``waiting`` say whether
        anything is left to do.

        What the session refuses ends the requests that were in that pass, with an ``error`` event;
        the others go on.
        """
        events = self._admit()
        # Those that decode were there before the prompts below join them.
        decoding = [i for i, s in enumerate(self._slots) if s is not None and s.decoding]
        events += self._prefill_step()
        if decoding:
            events += self._decode_step(decoding)
        return events

    def _admit(self) -> list[Event]:
        """Waiting requests take free slots."""
        events: list[Event] = []
        for slot, sequence in enumerate(self._slots):
            if sequence is None and self._waiting:
                self._slots[slot] = self._waiting.popleft()
                try:
                    self.session.reset(slot)
                except RazorError as e:
                    events.append(self._fail(slot, e))
        return events

    def _next_to_read(self) -> int | None:
        """The slot whose prompt is read on: the one with least left, so that a short prompt does
        not wait for all of a long one; every few chunks the oldest, so that the long one ends."""
        reading = [
            (s.unread, s.request, i)
            for i, s in enumerate(self._slots)
            if s is not None and not s.decoding
        ]
        if not reading:
            return None
        if self._chunks % OLDEST_EVERY == OLDEST_EVERY - 1:
            return min(reading, key=lambda x: x[1])[2]
        return min(reading)[2]

    def _prefill_step(self) -> list[Event]:
        """Chunks of prompts, ``prefill_chunk`` tokens at most: where a prompt is cut does not
        depend on the others, and a step is never longer than with one full chunk."""
        events: list[Event] = []
        room = self.prefill_chunk
        while (slot := self._next_to_read()) is not None:
            s = self._slots[slot]
            assert s is not None
            size = min(s.unread, self.prefill_chunk)
            if size > room:
                break
            room -= size
            self._chunks += 1
            events += self._read(slot, s.prompt[s.cached : s.cached + size])
        return events

    def _read(self, slot: int, tokens: np.ndarray) -> list[Event]:
        """A chunk of a prompt; its first token if that was the last chunk."""
        s = self._slots[slot]
        assert s is not None
        try:
            logits = self.session.forward(
                slot,
                tokens[None],
                np.array([s.cached], np.int32),
                np.array([len(tokens)], np.int32),
                np.array([[len(tokens) - 1]], np.int32),
            )
        except RazorError as e:
            return [self._fail(slot, e)]
        s.cached += len(tokens)
        return [] if s.cached < len(s.prompt) else [self._take(slot, logits[0, 0])]

    def _decode_step(self, slots: list[int]) -> list[Event]:
        lo, hi = slots[0], slots[-1] + 1
        wanted = set(slots)
        tokens = np.zeros((hi - lo, 1), np.int32)
        past, chunk = np.zeros(hi - lo, np.int32), np.zeros(hi - lo, np.int32)
        for slot in range(lo, hi):
            s = self._slots[slot]
            if s is not None:
                # A row between two prefill chunks is idle here, but its cache must stay whole.
                past[slot - lo] = s.cached
                if slot in wanted:
                    tokens[slot - lo], chunk[slot - lo] = s.tokens[-1], 1
        try:
            logits = self.session.forward(lo, tokens, past, chunk, np.zeros((hi - lo, 1), np.int32))
        except RazorError as e:
            return [self._fail(slot, e) for slot in slots]
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
            token = sample(s.history.adjust(logits), s.params, s.rng)
        except RazorError as e:
            return self._fail(slot, e)
        if token in s.stop_ids:
            self._slots[slot] = None
            return Event(s.request, None, self._flush(s), "stop")
        s.tokens.append(token)
        s.history.add(token)
        text, stopped = self._text(s, token)
        finished = None
        if stopped or (self._may_stop(s) and self._at_stop_sequence(s)):
            finished = "stop"
        elif len(s.tokens) >= s.params.max_new_tokens:
            finished = "length"
        elif s.cached >= self.session.max_seq_len:
            finished = "capacity"  # no room to cache the token just chosen
        if finished:
            self._slots[slot] = None
            if not stopped:
                text += self._flush(s)
        logprob = log_prob(logits, token) if s.params.logprobs else None
        return Event(s.request, token, text, finished, logprob=logprob)

    def _fail(self, slot: int, e: RazorError) -> Event:
        s = self._slots[slot]
        assert s is not None
        self._slots[slot] = None
        return Event(s.request, None, self._flush(s), "error", str(e))

    @staticmethod
    def _may_stop(s: _Sequence) -> bool:
        return len(s.tokens) >= s.params.min_tokens

    @staticmethod
    def _at_stop_sequence(s: _Sequence) -> bool:
        return any(ends_with(s.tokens, x) for x in s.params.stop_sequences)

    def _text(self, s: _Sequence, token: int) -> tuple[str, bool]:
        """(text to give out, whether a stop text ended it)."""
        if s.stream is None:
            return "", False
        more = s.stream.step(token)
        return self._cut(s, more) if self._may_stop(s) else (more, False)

    def _cut(self, s: _Sequence, more: str) -> tuple[str, bool]:
        text = s.held + more
        ends = [i for i in (text.find(x) for x in s.params.stop) if i >= 0]
        if ends:
            s.held = ""
            return text[: min(ends)], True
        # Hold back the longest end of the text that could begin a stop text.
        hold = max(
            (
                n
                for x in s.params.stop
                for n in range(1, min(len(x), len(text) + 1))
                if text.endswith(x[:n])
            ),
            default=0,
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

        A request that fails does not end the others: look at ``Completion.error``.

        Args:
            params: one for all, or one for each prompt.
            on_event: called with (index of the prompt, event) as tokens come.

        Raises:
            UsageError: as ``submit``, or requests submitted before are still here.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"params: expected {len(prompts)}, found {len(each)}")
        if self.active or self.waiting:
            raise UsageError("run: other requests are not finished yet; move them on with step()")
        index: dict[int, int] = {}
        try:
            for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
                index[self._submit_numbered(prompt, p, i, len(prompts))] = i
            results = [Completion(len(prompt)) for prompt in prompts]
            while self.active or self.waiting:
                for event in self.step():
                    result = results[index[event.request]]
                    if event.token is not None:
                        result.tokens.append(event.token)
                    result.text += event.text
                    if event.finished:
                        result.finished, result.error = event.finished, event.error
                    if on_event:
                        on_event(index[event.request], event)
            return results
        finally:
            for request in index:
                self.cancel(request)

    def _submit_numbered(
        self, prompt: Sequence[int], params: SamplingParams, i: int, count: int
    ) -> int:
        try:
            return self.submit(prompt, params)
        except UsageError as e:
            raise e if count == 1 else UsageError(f"prompt {i + 1} of {count}: {e}") from None
