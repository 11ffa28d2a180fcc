"""What a task asks of a model: a context, and what comes after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One question of a conversation and its answer.

    Attributes:
        prompt: tokens fed after the context and the earlier turns, ending where the answer begins.
        references: right answers as texts; any of them counts.
        answer: the answer as tokens, as the model would write it; empty if there are several ways.
            With it a turn can be *forced*: prompt and answer are fed in one chunk, and the answer is
            right if every token of it is the most probable one, which is greedy decoding without
            its cost.
        max_new_tokens: where a generated answer is cut.
        metric: name in ``metrics.METRICS``.
        stop: texts that end a generated answer.
        scored: False for a turn that only moves the conversation on.
    """

    prompt: tuple[int, ...]
    references: tuple[str, ...]
    answer: tuple[int, ...] = ()
    max_new_tokens: int = 16
    metric: str = "contains"
    stop: tuple[str, ...] = ()
    scored: bool = True


@dataclass(frozen=True)
class Sample:
    """A context that is read and compressed, and then questions or a text that follows.

    What follows is not known to a method when it compresses (unless it says so).

    Attributes:
        id: unique in a task, and the same for the same options and seed.
        context_id: samples with equal ones have equal ``context``; it is read once for all of them.
        group: row of the report, e.g. the length ("4096").
        context: its tokens.
        turns: asked one after another in one conversation.
        continuation: text to predict after the context: perplexity, and KL to the dense model.
        meta: depth, length, seed ...: what pictures and tables need; JSON values only.
    """

    id: str
    context_id: str
    group: str
    context: tuple[int, ...]
    turns: tuple[Turn, ...] = ()
    continuation: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
