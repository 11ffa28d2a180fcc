"""A method turns what was read into what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trt_razor.evaluation.registry import Registry

RECENT_QUERIES = 64
"""Queries that are recorded while a context is read: those of its last tokens."""


@dataclass(frozen=True)
class ReadLayer:
    """One layer after a context of n tokens was read with full attention.

    Attributes:
        k, v: [Hkv, n, D] after RoPE, in the dtype the context was read in.
        queries: [Hq, w, D] after RoPE, of the last w tokens; w = n if the method asked for all.
        scale: logit scale s.
    """

    k: Tensor
    v: Tensor
    queries: Tensor
    scale: float

    @property
    def n(self) -> int:
        return int(self.k.shape[1])


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
    """What one layer keeps; ``reference.cache.LayerCache`` is one.

    Attributes:
        n: tokens so far, kept or not.
    """

    n: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens, q [Hq, S, D], k and v [Hkv, S, D], see what is kept and join it → [Hq, S, D]."""
        ...

    def bits(self) -> int:
        """Bits in memory if keys and values are stored in 16 bits (or the method's own format).

        Honest: scales, float32 rows and indices count. Room for more tokens does not.
        """
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
