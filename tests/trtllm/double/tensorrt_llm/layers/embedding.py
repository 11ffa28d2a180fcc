"""``Embedding`` of token ids; the table is whole on every rank (use_parallel_embedding false)."""

from __future__ import annotations

from typing import Any

from ..functional import Tensor, embedding
from ..module import Module
from ..parameter import Parameter


class Embedding(Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: str | None = None,
        tp_size: int = 1,
        tp_group: Any = None,
        sharding_dim: int = 0,
        tp_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.weight = Parameter(shape=(num_embeddings, embedding_dim), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return embedding(x, self.weight.value)
