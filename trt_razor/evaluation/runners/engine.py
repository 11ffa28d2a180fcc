"""A built engine, evaluated as it is: it compresses by itself while it reads.

The engine's own rule decides: a context is read in chunks of its ``prefill_chunk`` tokens (0: in one
piece, the paper's way), and every chunk is compressed when the next one comes. So there is nothing
to choose when a context is "compressed": only the engine's own method is accepted.

One slot is used. What a session has cached is copied out of it when another session needs the slot,
as far as the backend gives its cache away (ONNX Runtime); else the tokens are read again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.backends.onnxruntime import OrtSession
from trt_razor.cache_layout import kv_at
from trt_razor.engine import Engine
from trt_razor.errors import UsageError

OWN = "engine"
"""The method of an engine: whatever it was built with."""


@dataclass(frozen=True, eq=False)
class _State:
    """The cache of one sequence, copied out of the slot."""

    arrays: dict[str, np.ndarray]


class EngineRunner:
    """Runs the tasks on an engine directory (see ``runners.interface.Runner``).

    Args:
        directory: of the engine.
        verify: check the sha256 of its files first.

    Attributes:
        engine: what it was built with.
        label: backend, dtype, Razor or dense, and in which pieces it reads.

    Raises:
        UsageError: no engine there, one without a tokenizer, or a backend that is not here.
        RazorError: a damaged engine.
    """

    def __init__(self, directory: Path, verify: bool = True) -> None:
        self.engine = Engine.load(directory, verify)
        tokenizer = self.engine.tokenizer()
        if tokenizer is None:
            raise UsageError(
                f"{directory}: this engine has no tokenizer; build it from a checkpoint that has one"
            )
        self.tokenizer = tokenizer
        manifest = self.engine.manifest
        self.session = self.engine.open(1)
        # Most tokens of a pass, and most whose logits come back: TensorRT profiles end somewhere.
        self.max_chunk = self.engine.options.max_chunk
        self.max_logits = int(getattr(self.session, "max_logits", self.max_chunk))
        pieces = f"chunks of {manifest.prefill_chunk}" if manifest.prefill_chunk else "one piece"
        kind = "Razor" if manifest.razor else "dense"
        self.label = (
            f"{manifest.spec.name}, {kind} engine, {manifest.backend} {manifest.dtype}, reads in "
            f"{pieces}"
        )
        self._active: weakref.ref[EngineSession] | None = None
        self._holds: _State | None = None  # the copy that equals the slot, if there is one

    def read(self, tokens: Sequence[int], all_queries: bool = False) -> EngineContext:
        """Read a context in the engine's own chunks.

        Raises:
            UsageError: more tokens than the engine's ``max_seq_len``, ids outside the vocabulary,
                or ``all_queries``: an engine keeps no queries.
        """
        if all_queries:
            raise UsageError("an engine keeps no queries; methods that look at them need a model")
        session = EngineSession(self, ())
        session.read(tokens)
        return EngineContext(self, session)

    # The slot ---------------------------------------------------------------------------------
    def _enter(self, session: EngineSession) -> None:
        """Make the slot hold what a session has read."""
        active = self._active() if self._active is not None else None
        if active is session:
            return
        if active is not None and active.state is None:
            active.state = self._copy(active.n)
        if session.state is None:
            self.session.reset(0)
            past = 0
            for chunk in session.chunks:
                self._pass(np.array(chunk, np.int32), past, [len(chunk) - 1])
                past += len(chunk)
        elif session.state is not self._holds:
            self._restore(session.state)
        self._holds = session.state
        self._active = weakref.ref(session)

    def _pass(self, tokens: np.ndarray, past: int, wanted: Sequence[int]) -> np.ndarray:
        """One chunk of the slot's sequence → logits [len(wanted), vocab] float32."""
        self._holds = None
        return self.session.forward(
            0,
            tokens[None],
            np.array([past], np.int32),
            np.array([len(tokens)], np.int32),
            np.array([wanted], np.int32),
        )[0]

    def _copy(self, n: int) -> _State | None:
        """The slot's cache after ``n`` tokens; None where the backend keeps it to itself."""
        session = self.session
        if n == 0 or not isinstance(session, OrtSession):
            return None
        self._holds = _State(
            {
                t.name: session.cache(t.name)[0, :, : _rows(t.kind, n)].copy()
                for t in self.engine.caches()
            }
        )
        return self._holds

    def _restore(self, state: _State) -> None:
        assert isinstance(self.session, OrtSession)  # no other gave a copy
        for name, array in state.arrays.items():
            self.session.cache(name)[0, :, : array.shape[1]] = array


def _rows(kind: str, n: int) -> int | None:
    """Rows that a sequence of n tokens has written; None = all, a ring may have gone round."""
    return n if kind.startswith("full_") else None


class EngineContext:
    """A context that the engine has read (see ``runners.interface.Context``)."""

    def __init__(self, runner: EngineRunner, session: EngineSession) -> None:
        self.runner, self._session = runner, session

    def compress(self, method: Any = None) -> EngineSession:
        """A session as the engine has compressed it.

        Args:
            method: None, "engine" or a method of that name; "dense" for a dense engine.

        Raises:
            UsageError: another method: an engine has only its own.
        """
        name = method if method is None or isinstance(method, str) else method.name
        dense = not self.runner.engine.manifest.razor
        if name in (None, OWN) or (dense and name == "dense"):
            return self._session.fork()
        raise UsageError(
            f"method '{name}': expected the engine's own ('{OWN}'): an engine compresses as it was "
            f"built; evaluate other methods with a model"
        )

    def extended(self, tokens: Sequence[int]) -> EngineContext:
        """The context and more tokens, in the engine's chunks counted from here."""
        session = self._session.fork()
        session.read(tokens)
        return EngineContext(self.runner, session)


class EngineSession:
    """A sequence in the engine (see ``runners.interface.Session``).

    Attributes:
        n: tokens so far.
        chunks: the same tokens, in the chunks they were computed in.
        state: copy of its cache, shared with forks; None while the slot holds it, or without copies.
    """

    def __init__(
        self,
        runner: EngineRunner,
        chunks: Sequence[tuple[int, ...]],
        state: _State | None = None,
    ) -> None:
        self.runner, self.chunks, self.state = runner, list(chunks), state
        self.n = sum(map(len, chunks))

    def read(self, tokens: Sequence[int]) -> None:
        """More tokens in the engine's chunks, without their logits. Raises as ``feed``."""
        ids = self._ids(tokens)
        for start in range(0, len(ids), self.runner.max_chunk):
            part = ids[start : start + self.runner.max_chunk]
            self._run(part, [len(part) - 1])

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """See ``Session.feed``: logits of all tokens, [S, vocab] float32.

        It is one chunk if the engine takes so many at once (TensorRT gives few logits a pass), else
        as few as it takes.

        Raises:
            UsageError: no room for them in the engine, or ids outside its vocabulary.
        """
        ids = self._ids(tokens)
        size = min(self.runner.max_chunk, self.runner.max_logits)
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        if not parts:
            return np.empty((0, self.runner.session.vocab_size), np.float32)
        return np.concatenate([self._run(part, range(len(part))) for part in parts])

    def fork(self) -> EngineSession:
        """See ``Session.fork``: a copy of the cache, or the tokens to read them again."""
        if self.state is None and self.n:
            self.runner._enter(self)
            self.state = self.runner._copy(self.n)
        return EngineSession(self.runner, self.chunks, self.state)

    def kv_ratio(self) -> float:
        """Bits that the tokens need / bits of a dense cache of as many, keys and values in 16 bits.

        Need, not the capacity the engine has allocated; compensation tokens in 32 bits.
        """
        manifest, head_map = self.runner.engine.manifest, self.runner.engine.head_map
        if head_map is None or manifest.policy is None or self.n == 0:
            return 1.0
        need = kv_at(manifest.spec, head_map, manifest.policy, self.n, "float16")
        return need.razor_bytes / need.full_bytes

    def _run(self, tokens: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
        self.runner._enter(self)
        logits = self.runner._pass(tokens, self.n, wanted)
        self.state = None
        self.chunks.append(tuple(tokens.tolist()))
        self.n += len(tokens)
        return logits

    def _ids(self, tokens: Sequence[int]) -> np.ndarray:
        """Checked before anything is computed: a session is never left half fed."""
        limit, vocab = self.runner.session.max_seq_len, self.runner.session.vocab_size
        if self.n + len(tokens) > limit:
            raise UsageError(
                f"{self.n + len(tokens)} tokens do not fit max_seq_len {limit} of this engine; "
                f"shorten them, or build with a larger --max-seq-len"
            )
        ids = np.array(tokens, np.int64)
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
            raise UsageError(
                f"tokens: expected ids 0..{vocab - 1}, found {ids.min()}..{ids.max()}; is this the "
                f"tokenizer of the engine?"
            )
        return ids.astype(np.int32)
