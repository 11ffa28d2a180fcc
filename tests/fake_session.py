"""A scripted session, and what requests must give over it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trt_razor.generate import SamplingParams, sample

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
