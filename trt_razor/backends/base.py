"""What every backend gives: how to build an engine's files and how to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import UsageError
from trt_razor.graph.options import GraphOptions
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): total 0 = unknown."""


@dataclass(frozen=True)
class EngineOptions:
    """Everything that decides an engine, the weights apart.

    Attributes:
        graph: policy, head map, capacity and dtype.
        max_batch_size: slots, sequences cached at the same time (>= 1).
        prefill_chunk: tokens a prompt is read in at once; 0 = the whole prompt (the paper's way).
    """

    graph: GraphOptions
    max_batch_size: int = 1
    prefill_chunk: int = 2048

    @property
    def max_chunk(self) -> int:
        """Longest chunk the engine must take."""
        return min(self.prefill_chunk or self.graph.max_seq_len, self.graph.max_seq_len)

    def validate(self, spec: ModelSpec) -> None:
        """Raises UsageError naming the wrong option."""
        self.graph.validate(spec)
        if not 1 <= self.max_batch_size <= 4096:
            raise UsageError(f"max_batch_size: expected 1..4096, found {self.max_batch_size}")
        if self.prefill_chunk < 0:
            raise UsageError(
                f"prefill_chunk: expected a number of tokens, or 0 for whole prompts, "
                f"found {self.prefill_chunk}"
            )


def check_pass(
    session: Session,
    first_slot: int,
    tokens: np.ndarray,
    past: np.ndarray,
    chunk: np.ndarray,
    logits_index: np.ndarray,
) -> None:
    """Refuse a pass that would read or write outside its rows; sessions call it first.

    Raises:
        UsageError: naming the argument, what was expected and what was found.
    """

    def need(ok: object, name: str, expected: str, found: object) -> None:
        if not ok:
            raise UsageError(f"{name}: expected {expected}, found {found}")

    need(tokens.ndim == 2 and tokens.size > 0, "tokens", "shape [b, S]", list(tokens.shape))
    rows, seq = tokens.shape
    slots = session.num_slots
    last = first_slot + rows
    need(first_slot >= 0 and last <= slots, "slots", f"0..{slots - 1}", f"{first_slot}..{last - 1}")
    for name, x in (("past", past), ("chunk", chunk)):
        need(x.shape == (rows,), name, f"shape [{rows}]", list(x.shape))
    shape = list(logits_index.shape)
    need(len(shape) == 2 and shape[0] == rows, "logits_index", f"shape [{rows}, T]", shape)
    low, high = int(tokens.min()), int(tokens.max())
    vocab = session.vocab_size
    need(low >= 0 and high < vocab, "tokens", f"ids 0..{vocab - 1}", f"{low}..{high}")
    need(chunk.min() >= 0 and chunk.max() <= seq, "chunk", f"0..{seq}", chunk.tolist())
    # An idle row still has a place behind its last token (graph/operator.py).
    end, limit = past + np.maximum(chunk, 1), session.max_seq_len
    need(
        past.min() >= 0 and end.max() <= limit,
        "past + chunk",
        f"at most max_seq_len {limit} (past below it in idle rows)",
        f"past {past.tolist()}, chunk {chunk.tolist()}",
    )
    inside = logits_index.size > 0 and logits_index.min() >= 0 and logits_index.max() < seq
    need(inside, "logits_index", f"places 0..{seq - 1}", logits_index.tolist()[:2])


class Session(Protocol):
    """A loaded engine with its caches: slots in, logits out."""

    num_slots: int
    max_seq_len: int
    vocab_size: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of all cache tensors as allocated."""
        ...

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence: its next chunk must have ``past`` 0."""
        ...

    def forward(
        self,
        first_slot: int,
        tokens: np.ndarray,
        past: np.ndarray,
        chunk: np.ndarray,
        logits_index: np.ndarray,
    ) -> np.ndarray:
        """One chunk for the neighbouring slots from ``first_slot`` on; updates their caches.

        Args:
            tokens: [b, S] int32, right padded with any valid id.
            past, chunk: [b] int32, cached tokens and new tokens of each row (chunk 0 = idle).
            logits_index: [b, T] int32, places in the chunk whose logits are wanted.

        Returns:
            logits [b, T, vocab] float32.

        Raises:
            UsageError: a shape, id, length or place out of bounds (``check_pass``), or beyond what
                the engine was built for.
        """
        ...


class Backend(Protocol):
    """One way to build and run an engine."""

    name: str

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """Raises UsageError for what this backend cannot build, before anything long starts."""
        ...

    def build(
        self, checkpoint: Checkpoint, options: EngineOptions, staging: Path, progress: Progress
    ) -> dict[str, str]:
        """Write the engine's files into ``staging``; returns facts for the manifest (versions …)."""
        ...

    def open(
        self, directory: Path, caches: Sequence[CacheTensor], num_slots: int, max_seq_len: int
    ) -> Session:
        """Load the files for running, with ``num_slots`` empty slots."""
        ...
