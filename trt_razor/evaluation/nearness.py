"""How well logits predict a text, and how near they are to the dense model's: token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import UsageError

Logits = npt.NDArray[np.float32]
ROWS = 64
"""Rows of logits that are worked on at once: a vocabulary of 150,000 makes each of them large."""
SPAN = 512
"""Tokens of a span: of a longer continuation each span has means of its own."""


@dataclass(frozen=True)
class Nearness:
    """Means over T tokens.

    Attributes:
        tokens: T. nll: -ln p of the right token. kl: KL(reference ‖ this), nats, None without a
            reference; agree: share of tokens whose most probable token is the reference's.
        nll_curve, kl_curve: the same for each whole span of the continuation, in order; empty if it
            has fewer than two, and without a reference.
    """

    tokens: int
    nll: float | None
    kl: float | None
    agree: float | None
    nll_curve: tuple[float, ...] = ()
    kl_curve: tuple[float, ...] = ()


class Meter:
    """Takes logits piece by piece and keeps numbers of each token only.

    Args:
        reference: the dense model's logits in the same pieces; None = there is no dense model.
    """

    def __init__(self, reference: Sequence[Logits] | None) -> None:
        self._reference = reference
        self._pieces = 0
        self._nll: list[npt.NDArray[np.float64]] = []
        self._kl: list[npt.NDArray[np.float64]] = []
        self._agree = 0

    def add(self, rows: Logits, targets: Sequence[int]) -> None:
        """The next piece, [T, vocab], and the T tokens it should predict.

        Raises:
            UsageError: the reference has another shape (an engine with another vocabulary).
        """
        base = None if self._reference is None else self._reference[self._pieces]
        self._pieces += 1
        if base is not None and base.shape != rows.shape:
            raise UsageError(
                f"logits: expected {base.shape[1]} for each token, as the dense model has, found "
                f"{rows.shape[1]}"
            )
        for part in _blocks(len(rows)):
            log_q, right = _log_softmax(rows[part]), np.asarray(targets[part])
            self._nll.append(-log_q[np.arange(len(right)), right].astype(np.float64))
            if base is not None:
                log_p = _log_softmax(base[part])
                p = np.exp(log_p)
                with np.errstate(invalid="ignore"):
                    terms = np.where(p > 0, p * (log_p - log_q), 0)  # -inf: a padded vocabulary
                self._kl.append(terms.sum(axis=1, dtype=np.float64))
                self._agree += int((rows[part].argmax(1) == base[part].argmax(1)).sum())

    def result(self, following: int = 0) -> Nearness:
        """Means over everything so far.

        Args:
            following: so many of the last tokens are the continuation, of which curves are made.
        """
        if not self._nll:
            return Nearness(0, None, None, None)
        nll = np.concatenate(self._nll)
        if self._reference is None:
            return Nearness(len(nll), float(nll.mean()), None, None)
        kl = np.concatenate(self._kl)
        return Nearness(
            len(nll),
            float(nll.mean()),
            max(0.0, float(kl.mean())),  # rounding can put it a hair below zero
            self._agree / len(nll),
            _curve(nll, following),
            tuple(max(0.0, v) for v in _curve(kl, following)),
        )


def nearness(
    logits: Sequence[Logits],
    targets: Sequence[int],
    reference: Sequence[Logits] | None,
    following: int = 0,
) -> Nearness:
    """The same of logits that are all there.

    Args:
        logits, reference: pieces [T_i, vocab] of the same T rows; None = there is no dense model.
        following: see ``Meter.result``.

    Raises:
        UsageError: the two have other shapes.
    """
    meter, done = Meter(reference), 0
    for rows in logits:
        meter.add(rows, targets[done : done + len(rows)])
        done += len(rows)
    return meter.result(following)


def _curve(values: npt.NDArray[np.float64], following: int) -> tuple[float, ...]:
    """Means of the whole spans of the last ``following`` values."""
    spans = following // SPAN
    if spans < 2:
        return ()
    start = len(values) - following
    whole = values[start : start + spans * SPAN].reshape(spans, SPAN)
    return tuple(float(v) for v in whole.mean(axis=1))


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, start + ROWS)


def _log_softmax(rows: Logits) -> npt.NDArray[Any]:
    """[T, vocab] float32; the sum is taken in float64."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    return shifted - np.log(total).astype(np.float32)
