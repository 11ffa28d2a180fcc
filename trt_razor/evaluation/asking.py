"""One sample asked under one method: its turns, its continuation, and how near that is to dense.

The last context token is not part of what was read: it is fed together with what follows, for every
method and every kind of sample. So the first answer token, too, is predicted with a compressed past.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import UsageError
from trt_razor.evaluation.metrics import metric
from trt_razor.evaluation.runners.interface import Session
from trt_razor.evaluation.samples import Sample, Turn
from trt_razor.models.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
ROWS = 64
"""Rows of logits that are worked on at once: a vocabulary of 150,000 makes each of them large."""


@dataclass
class Asked:
    """What came of a sample.

    Attributes:
        scores: of the scored turns. texts: generated answers, of all generated turns.
        logits: rows [T, vocab] that predict ``targets`` [T]: forced answers of scored turns, then the
            continuation; in pieces, so that nothing is copied.
        kv_ratio: after compression; kv_most: the largest seen.
    """

    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    kv_ratio: float = 0.0
    kv_most: float = 0.0


@dataclass(frozen=True)
class Nearness:
    """Means over T tokens.

    Attributes:
        tokens: T. nll: -ln p of the right token. kl: KL(reference ‖ this), nats, None without a
            reference; agree: share of tokens whose most probable token is the reference's.
    """

    tokens: int
    nll: float | None
    kl: float | None
    agree: float | None


def ask(
    session: Session,
    pending: Sequence[int],
    sample: Sample,
    scoring: str,
    tokenizer: Tokenizer,
    chunk: int | None = None,
) -> Asked:
    """Ask a sample of a compressed context. ``session`` itself stays as it is.

    Args:
        pending: context tokens that were not read yet: the last one; with the first prompt in front
            of the compression, that prompt's last token.
        scoring: "forced" or "generate"; a turn without ``answer`` is generated either way.
        chunk: continuation tokens fed at once; None = all.

    Raises:
        UsageError: nothing to feed before an answer, or logits that are no numbers.
    """
    kept = session.kv_ratio()
    asked = Asked(kv_ratio=kept, kv_most=kept)
    if sample.turns:
        branch, waiting = session.fork(), list(pending)
        for turn in sample.turns:
            feed = waiting + list(turn.prompt)
            if not feed:
                raise UsageError(f"sample {sample.id}: a turn with no token before its answer")
            if scoring == "forced" and turn.answer:
                waiting = _forced(branch, feed, turn, asked)
            else:
                waiting = _generated(branch, feed, turn, tokenizer, asked)
            asked.kv_most = max(asked.kv_most, branch.kv_ratio())
    if sample.continuation:
        branch = session.fork()
        following = list(sample.continuation)
        feed = [*pending, *following[:-1]]
        skip = len(feed) - len(following)
        size = len(feed) if chunk is None else chunk
        for start in range(0, len(feed), size):
            rows = branch.feed(feed[start : start + size])
            asked.logits.append(rows[max(0, skip - start) :])
            asked.kv_most = max(asked.kv_most, branch.kv_ratio())
        asked.targets += following
    for rows in asked.logits:
        if np.isnan(rows).any():
            raise UsageError(f"sample {sample.id}: the logits are no numbers (NaN)")
    return asked


def _forced(session: Session, feed: list[int], turn: Turn, asked: Asked) -> list[int]:
    """Prompt and answer in one chunk; returns what is fed with the next prompt."""
    answer = list(turn.answer)
    logits = session.feed(feed + answer[:-1])[len(feed) - 1 :]
    if turn.scored:
        asked.scores.append(float((logits.argmax(1) == np.array(answer)).all()))
        if (
            not asked.texts
        ):  # after an answer of its own a method is in another conversation than dense
            # A copy: the rows of a long prompt are not kept for the few behind it.
            asked.logits.append(logits.copy())
            asked.targets += answer
    return answer[-1:]


def _generated(
    session: Session, feed: list[int], turn: Turn, tokenizer: Tokenizer, asked: Asked
) -> list[int]:
    """Greedy decoding; what ends the answer is left to the next prompt, which has its own ending."""
    answer: list[int] = []
    text, waiting = "", feed
    while len(answer) < turn.max_new_tokens:
        token = int(session.feed(waiting)[-1].argmax())
        waiting = []
        if token in tokenizer.eos_token_ids:
            break
        answer.append(token)
        text = tokenizer.decode(answer)
        ends = [i for i in (text.find(s) for s in turn.stop if s) if i >= 0]
        if ends:
            text = text[: min(ends)]
            break
        waiting = [token]
    asked.texts.append(text)
    if turn.scored:
        asked.scores.append(float(metric(turn.metric)(text, turn.references)))
    return waiting


def nearness(
    logits: Sequence[Logits], targets: Sequence[int], reference: Sequence[Logits] | None
) -> Nearness:
    """How well ``logits`` predict ``targets``, and how near they are to the dense model's.

    Args:
        logits, reference: pieces [T_i, vocab] of the same T rows; None = there is no dense model.

    Raises:
        UsageError: the two have other shapes (an engine with another vocabulary).
    """
    count = len(targets)
    if count == 0:
        return Nearness(0, None, None, None)
    nll = kl = 0.0
    agree = done = 0
    for rows, base in _blocks(logits, reference):
        if base is not None and base.shape != rows.shape:
            raise UsageError(
                f"logits: expected {base.shape[1]} for each token, as the dense model has, found "
                f"{rows.shape[1]}"
            )
        log_q = _log_softmax(rows)
        right = np.asarray(targets[done : done + len(rows)])
        nll -= float(log_q[np.arange(len(rows)), right].sum(dtype=np.float64))
        done += len(rows)
        if base is not None:
            log_p = _log_softmax(base)
            p = np.exp(log_p)
            with np.errstate(invalid="ignore"):
                terms = np.where(p > 0, p * (log_p - log_q), 0)  # -inf: a padded vocabulary
            kl += float(terms.sum(dtype=np.float64))
            agree += int((rows.argmax(1) == base.argmax(1)).sum())
    if reference is None:
        return Nearness(count, nll / count, None, None)
    # Rounding can put it a hair below zero.
    return Nearness(count, nll / count, max(0.0, kl / count), agree / count)


def _blocks(
    logits: Sequence[Logits], reference: Sequence[Logits] | None
) -> Iterator[tuple[Logits, Logits | None]]:
    for i, rows in enumerate(logits):
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            yield rows[part], None if reference is None else reference[i][part]


def _log_softmax(rows: Logits) -> npt.NDArray[Any]:
    """[T, vocab] float32; the sum is taken in float64."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)
