"""One sample asked under one method: its turns, its continuation, and how near that is to dense.

The last context token is not part of what was read: it is fed together with what follows, for every
method and every kind of sample. So the first answer token, too, is predicted with a compressed past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trt_razor.errors import UsageError
from trt_razor.evaluation.metrics import metric
from trt_razor.evaluation.nearness import Logits
from trt_razor.evaluation.runners.interface import Session
from trt_razor.evaluation.samples import Sample, Turn
from trt_razor.models.tokenizer import Tokenizer

Follow = Callable[[Logits, Sequence[int]], None]


@dataclass
class Asked:
    """What came of a sample.

    Attributes:
        sample: its id.
        scores: of the scored turns. texts: generated answers, of all generated turns.
        logits: rows [T, vocab] that predict ``targets`` [T]: forced answers of scored turns, then the
            continuation; in pieces, so that nothing is copied. None of them with ``follow``.
        kv_ratio: after compression; kv_most: the largest seen.
        follow: see ``ask``.
    """

    sample: str
    scores: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logits: list[Logits] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    kv_ratio: float = 0.0
    kv_most: float = 0.0
    follow: Follow | None = None

    def add(self, rows: Logits, targets: Sequence[int]) -> None:
        """Rows [T, vocab] that predict ``targets``. Raises UsageError if they are no numbers."""
        if np.isnan(rows).any():
            raise UsageError(f"sample {self.sample}: the logits are no numbers (NaN)")
        self.targets += targets
        if self.follow is not None:
            self.follow(rows, targets)
        else:
            self.logits.append(rows)


def ask(
    session: Session,
    pending: Sequence[int],
    sample: Sample,
    scoring: str,
    tokenizer: Tokenizer,
    chunk: int | None = None,
    follow: Follow | None = None,
) -> Asked:
    """Ask a sample of a compressed context. ``session`` itself stays as it is.

    Args:
        pending: context tokens that were not read yet: the last one; with the first prompt in front
            of the compression, that prompt's last token.
        scoring: "forced" or "generate"; a turn without ``answer`` is generated either way.
        chunk: continuation tokens fed at once; None = all.
        follow: gets each piece of logits and its targets at once. Pieces are then not kept: those of
            a long continuation under several methods would not fit into memory.

    Raises:
        UsageError: nothing to feed before an answer, or logits that are no numbers.
    """
    kept = session.kv_ratio()
    asked = Asked(sample.id, kv_ratio=kept, kv_most=kept, follow=follow)
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
        skip, before = len(feed) - len(following), len(asked.targets)
        size = len(feed) if chunk is None else chunk
        for start in range(0, len(feed), size):
            rows = branch.feed(feed[start : start + size])
            rows = rows[max(0, skip - start) :]
            asked.add(rows, following[len(asked.targets) - before :][: len(rows)])
            asked.kv_most = max(asked.kv_most, branch.kv_ratio())
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
            asked.add(logits.copy(), answer)
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
