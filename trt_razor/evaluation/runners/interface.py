"""A runner reads contexts and continues after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from trt_razor.models.tokenizer import Tokenizer


class Session(Protocol):
    """A context under one method, to be continued. Independent of its siblings after ``fork``."""

    def feed(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """One chunk: float32 logits [S, vocab]; the tokens join the cache."""
        ...

    def fork(self) -> Session:
        """An equal session that goes its own way (the first question must not tell the second)."""
        ...

    def kv_ratio(self) -> float:
        """Bits kept now / bits of a dense 16-bit cache of as many tokens."""
        ...


class Context(Protocol):
    """A context that was read."""

    def compress(self, method: Any) -> Session:
        """A session under a method; the context itself is unharmed and can be compressed again."""
        ...

    def extended(self, tokens: Sequence[int]) -> Context:
        """The context and more tokens, without reading the first part again.

        For query-aware methods: extend by the question but for its last token, compress, and feed
        that one for the first logits.
        """
        ...


class Runner(Protocol):
    """Attributes:
    label: for reports: model and dtype, or engine and backend.
    tokenizer: of the model.
    """

    label: str
    tokenizer: Tokenizer

    def read(self, tokens: Sequence[int], all_queries: bool = False) -> Context: ...
