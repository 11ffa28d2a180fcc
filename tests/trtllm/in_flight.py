"""TensorRT-LLM's in-flight batching for one rank, in Python: which requests a step runs, and what the
host tells the network about them.

As ``cache_manager``: written after the public sources around 1.0 - 1.2, beam width 1. Tokens are
numbers of positions only; what they say decides nothing here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from cache_manager import CacheManager, Ints

GRAPH_ROUND = 256
"""Captured graphs are good for all lengths up to the next multiple of this."""


@dataclass
class Request:
    """A request.

    Attributes:
        prompt: tokens to read before it generates; after a pause with those generated till then.
        max_new: tokens still to be generated, counted from ``prompt``.
        position: tokens of the prompt that were read.
        generated: tokens; the last of them is not in the cache yet.
        life: how often it has begun.
    """

    number: int
    prompt: int
    max_new: int
    position: int = 0
    generated: int = 0
    slot: int = -1
    life: int = 0

    @property
    def generating(self) -> bool:
        return self.position == self.prompt

    @property
    def started(self) -> bool:
        """Has blocks, which a pause would free."""
        return self.position > 0

    def pause(self, max_input_len: int) -> int:
        """Comes back as a new request whose prompt has the generated tokens too, as far as a prompt
        may be that long; those beyond are made again. How many are."""
        dropped = self.prompt + self.generated
        prompt = max(self.prompt, min(max_input_len, self.prompt + self.generated))
        self.max_new -= prompt - self.prompt
        self.prompt, self.position, self.generated, self.slot = prompt, 0, 0, -1
        return dropped - prompt


@dataclass(frozen=True)
class Part:
    """What a request brings to a call: tokens ``begin`` .. ``begin + tokens - 1``."""

    request: Request
    begin: int
    tokens: int
    context: bool
    life: int
    """Of the request, at the time."""
    prompt: int

    @property
    def sequence(self) -> int:
        return self.request.number

    @property
    def total(self) -> int:
        return self.begin + self.tokens


@dataclass(frozen=True)
class Batch:
    """The sequences of one enqueue, contexts first."""

    parts: tuple[Part, ...]

    @property
    def num_tokens(self) -> int:
        return sum(p.tokens for p in self.parts)

    def arrays(self) -> dict[str, Ints]:
        """Per-sequence inputs as the runtime fills them, int32 [B]."""
        columns: dict[str, list[int]] = {
            "sequence_length": [p.total for p in self.parts],
            # Of a context with this chunk, of a generation without its token.
            "host_past_key_value_lengths": [p.total if p.context else p.begin for p in self.parts],
            # Of a generation the prompt's.
            "context_lengths": [p.tokens if p.context else p.prompt for p in self.parts],
            "host_request_types": [int(not p.context) for p in self.parts],
            "slot_mapping": [p.request.slot for p in self.parts],
        }
        columns["host_context_lengths"] = columns["context_lengths"]
        return {name: np.array(values, np.int32) for name, values in columns.items()}


@dataclass
class Graphs:
    """cuda_graph_mode: the second call of a kind is captured, later ones are replayed with the host
    numbers of the capture, rounded up."""

    max_seq_len: int
    captured: set[tuple[int, int]] = field(default_factory=set)

    def apply(self, batch: Batch, arrays: dict[str, Ints]) -> bool:
        """Whether this call is a replay; ``arrays`` are those that the kernels were launched by."""
        if any(p.context for p in batch.parts):
            return False
        past = arrays["host_past_key_value_lengths"]
        rounded = min(self.max_seq_len - 1, -(-int(past.max()) // GRAPH_ROUND) * GRAPH_ROUND)
        key = len(batch.parts), rounded
        if key not in self.captured:
            self.captured.add(key)
            return False
        past[:] = rounded
        return True


class InFlightBatching:
    """Requests in, calls out.

    Args:
        evict: capacity policy MAX_UTILIZATION (pauses requests); else GUARANTEED_NO_EVICT.
        chunked: prompts may be read in chunks, of whole blocks but the last.
        fused: contexts and generations in one call; hybrid models have two.
    """

    def __init__(
        self, manager: CacheManager, max_batch: int, evict: bool, chunked: bool, fused: bool
    ) -> None:
        self.manager, self.max_batch = manager, max_batch
        self.evict, self.chunked, self.fused = evict, chunked, fused
        self.active: list[Request] = []
        self._slots = deque(range(manager.config.max_num_sequences))
        self.pauses = self.chunks = self.dropped = 0

    def submit(self, request: Request) -> None:
        config = self.manager.config
        assert request.prompt <= config.max_input_len
        assert request.prompt + request.max_new <= config.max_seq_len
        self.active.append(request)

    # Which requests fit the cache -----------------------------------------------------------------
    def _fitting(self) -> tuple[list[Request], list[Request]]:
        """Requests that may run, and those to pause."""
        return self._max_utilization() if self.evict else (self._no_evict(), [])

    def _no_evict(self) -> list[Request]:
        """Requests whose blocks up to their last token are there; those that run have them."""
        manager = self.manager
        free = [len(w.free) for w in manager.windows]
        fitting: list[Request] = []
        for request in sorted(self.active, key=lambda r: not r.started):  # stable
            needed = []
            for window in manager.windows:
                total = window.blocks_to_completion(request.prompt + request.max_new)
                total = max(total, window.prompt_blocks(request.prompt))
                needed.append(max(0, total - len(window.of.get(request.number, ()))))
            if any(n > f for n, f in zip(needed, free, strict=True)):
                assert not request.started, "a running request was promised its blocks"
                break
            free = [f - n for n, f in zip(needed, free, strict=True)]
            fitting.append(request)
        return fitting[: self.max_batch]

    def _max_utilization(self) -> tuple[list[Request], list[Request]]:
        """Requests whose blocks for the next step are there. If those of one are not, the last one
        that runs is paused."""
        manager = self.manager
        free = [len(w.free) for w in manager.windows]
        fitting: list[Request] = []
        paused: list[Request] = []
        candidates = list(self.active)
        while len(fitting) < min(len(candidates), self.max_batch):
            request = candidates[len(fitting)]
            needed = [self._next_step(w.window, request) for w in manager.windows]
            if all(n <= f for n, f in zip(needed, free, strict=True)):
                free = [f - n for n, f in zip(needed, free, strict=True)]
                fitting.append(request)
                continue
            running = [i for i in range(len(fitting), len(candidates)) if candidates[i].started]
            if not running:
                break
            victim = candidates[running[-1]]
            candidates = candidates[: running[-1]]  # nothing behind it runs in this step
            paused.append(victim)
            for i, window in enumerate(manager.windows):
                free[i] += len(window.owned(victim.number, manager.removed[victim.number]))
        return fitting, paused

    def _next_step(self, window_size: int, request: Request) -> int:
        window = next(w for w in self.manager.windows if w.window == window_size)
        if not request.started:
            return window.prompt_blocks(request.prompt)
        if not request.generating:
            return 0
        return int(window.grows(self.manager.num_tokens[request.number]))

    # Which of them run in this step ---------------------------------------------------------------
    def _chosen(
        self, fitting: Sequence[Request]
    ) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Contexts with their tokens, unfinished prompts first, and generations."""
        generations = [r for r in fitting if r.generating]
        waiting = [r for r in fitting if not r.generating]
        left = self.manager.config.max_num_tokens - len(generations)
        contexts: list[tuple[Request, int]] = []
        unit = self.manager.config.tokens_per_block
        for request in waiting:
            tokens = request.prompt - request.position
            if tokens > left:
                if not self.chunked:
                    break  # it waits, and all behind it
                tokens = left // unit * unit
            if tokens:
                contexts.append((request, tokens))
                left -= tokens
        contexts.sort(key=lambda c: c[0].position + c[1] == c[0].prompt)
        return contexts, generations

    # A step ---------------------------------------------------------------------------------------
    def step(self) -> list[Batch]:
        """The calls of the next step; ``done`` must be told when they have run."""
        fitting, paused = self._fitting()
        for request in paused:
            self._release(request)
            self.dropped += request.pause(self.manager.config.max_input_len)
            self.pauses += 1
        contexts, generations = self._chosen(fitting)
        parts: list[Part] = []
        for request, tokens in contexts:
            if not request.started:
                request.slot = self._slots.popleft()
                request.life += 1
                self.manager.add_sequence(request.number, request.prompt)
            self.chunks += request.position + tokens < request.prompt
            begin = request.position
            parts.append(Part(request, begin, tokens, True, request.life, request.prompt))
        for request in generations:
            self.manager.add_token(request.number)
            begin = request.prompt + request.generated - 1
            parts.append(Part(request, begin, 1, False, request.life, request.prompt))
        kinds = [parts] if self.fused else [parts[: len(contexts)], parts[len(contexts) :]]
        return [Batch(tuple(kind)) for kind in kinds if kind]

    def done(self, batches: Sequence[Batch]) -> list[Request]:
        """The calls have run. Requests that are finished."""
        finished = []
        for part in (p for batch in batches for p in batch.parts):
            request = part.request
            if part.context:
                request.position = part.total
            if request.generating:
                request.generated += 1
            if request.generated >= request.max_new and request.generating:
                finished.append(request)
        for request in finished:
            self._release(request)
            self.active.remove(request)
        return finished

    def _release(self, request: Request) -> None:
        self.manager.remove_sequence(request.number)
        self._slots.append(request.slot)

    def run(self, arrivals: Iterator[list[Request]]) -> Iterator[list[Batch]]:
        """Steps until nothing is left; ``arrivals``: requests that come before each step."""
        while True:
            new = next(arrivals, None)
            for request in new or ():
                self.submit(request)
            if new is None and not self.active:
                return
            batches = self.step()
            assert batches or not self.active or new is not None, "no request fits the cache"
            yield batches
            self.done(batches)
