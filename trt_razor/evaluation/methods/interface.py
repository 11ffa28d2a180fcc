"""A method turns what was read into what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from trt_razor.evaluation.registry import Registry
from trt_razor.policy import SELECT_QUERIES

RECENT_QUERIES = SELECT_QUERIES
"""Queries that are recorded while a context is read: those of its last tokens, as many as Razor asks."""


@dataclass(frozen=True)
class ReadLayer:
    """One layer after a context of n tokens was read with full attention.

    Attributes:
        k, v: [Hkv, n, D] after RoPE, in the dtype that sessions compute in (a context may have been
            read in a narrower one). Shared by all methods and never written to.
        queries: [Hq, w, D] after RoPE, of the last w tokens; w = n if the method asked for all. In
            the dtype the context was read in.
        scale: logit scale s.
        memo: what one method computed of this layer and another can use again.
    """

    k: Tensor
    v: Tensor
    queries: Tensor
    scale: float
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def n(self) -> int:
        return int(self.k.shape[1])

    def of_heads(self, heads: Sequence[int]) -> ReadLayer:
        """Some KV heads of it, with the query heads that share them, as a layer of their own."""
        mine = list(heads)
        q = self.queries.unflatten(0, (len(self.k), -1))[mine].flatten(0, 1)
        return ReadLayer(self.k[mine], self.v[mine], q, self.scale)


@dataclass(frozen=True)
class Read:
    """A context that was read: its layers, and the model they belong to.

    Attributes:
        model: name and shape for head maps: layers and KV heads are ``len(layers)`` and Hkv.
        fingerprint: ``ModelSpec.fingerprint``, None for a model that ModelSpec does not know.
    """

    model: str
    fingerprint: str | None
    layers: Sequence[ReadLayer]


class Kept(Protocol):
    """What one layer keeps (``methods.kept`` has those that methods need)."""

    @property
    def n(self) -> int:
        """Tokens so far, kept or not."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens, q [Hq, S, D], k and v [Hkv, S, D], see what is kept and join it → [Hq, S, D]."""
        ...

    def bits(self) -> int:
        """Bits in memory if keys and values are stored in 16 bits (or the method's own format).

        Honest: scales, float32 rows and indices count. Room for more tokens does not.
        """
        ...

    def fork(self) -> Kept:
        """An equal one that goes its own way; what never changes is shared, not copied."""
        ...


class Method(Protocol):
    """Options are the fields of the class; ``name`` is set by the registry.

    Attributes:
        queries: "recent" (the last RECENT_QUERIES) or "all": what ``ReadLayer.queries`` must hold.
        query_aware: True if the first turn's prompt is read before compression. Such a result is no
            answer to "what if the question comes later" and the report marks it.
    """

    name: str
    queries: str
    query_aware: bool

    def compress(self, read: Read) -> list[Kept]:
        """One Kept a layer. ``read`` is shared with other methods and must not be changed."""
        ...


METHODS: Registry[Method] = Registry("method", "trt_razor.evaluation.methods")
