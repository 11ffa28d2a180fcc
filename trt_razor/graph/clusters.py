"""Which cluster each folded token joins, in the body of ``trt_razor::RazorAttention``.

The rule is that of docs/semantics.md, "Fold".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from trt_razor.graph.nodes import MASKED, Nodes

if TYPE_CHECKING:
    from trt_razor.graph.body import OperatorBody

LLOYD_ROUNDS = 4


class Clusters:
    """Writes the nodes that assign keys to the M >= 2 clusters of a head."""

    def __init__(self, body: OperatorBody) -> None:
        self.body = body

    def assign(self, keys: str, live4: str) -> str:
        """Which cluster each candidate joins: bool [B, Lh, S, M]; undefined where not live."""
        b = self.body
        n, lh, m = b.n, len(b.cfg.local_heads), b.cfg.policy.comp_tokens
        clusters = n.const(np.arange(m, dtype=np.int64))
        # A later fold: the first min(U, F) keys open the unused clusters in order, every other key
        # joins the nearest cluster that was in use before the fold. Heavy hitters need no shift
        # here: once something is folded all their rows are taken, so the keys start at place 0.
        unused = n.op("Less", b.count, n.f32(0.5))  # [B, Lh, M]
        unused_f = n.cast(unused, "float32")
        before = n.const(np.triu(np.ones((m, m), np.float32), 1))
        rank = n.cast(n.op("MatMul", unused_f, before), "int64")  # unused clusters before this one
        token = n.unsqueeze(b.index, 1, 3)  # [1, 1, S, 1]
        opens = n.op("And", n.op("Equal", n.unsqueeze(rank, 2), token), n.unsqueeze(unused, 2))
        num_unused = n.unsqueeze(n.cast(n.sum(unused_f, 2, keepdims=1), "int64"), 2)
        penalty = n.unsqueeze(n.mul(unused_f, n.f32(-MASKED)), 2)
        nearest = self._nearest(keys, b.comp_k, penalty, clusters)
        later = n.select(n.op("Less", token, num_unused), opens, nearest)

        # The first fold of a sequence (nothing folded before): Lloyd's algorithm. It is rare, so it
        # runs under a condition.
        seeding = n.op(
            "And",
            n.op("LessOrEqual", b.d0, n.i64(b.heavy)) if b.heavy else n.op("Equal", b.d0, n.i64(0)),
            n.op("Greater", b.folded, n.i64(0)),
        )  # [B, 1]
        any_seed = n.op(
            "Greater",
            n.op("ReduceMax", n.cast(seeding, "int64"), n.i64s([0, 1]), keepdims=0),
            n.i64(0),
        )
        outer, b.n = n, Nodes(f"{n.prefix}seed_")
        seeded = self._lloyd(keys, live4, lh, m)
        then_nodes, b.n = b.n.list, outer
        idle = Nodes(f"{n.prefix}noseed_")
        no = idle.op("Identity", later)
        bool_type = onnx.TensorProto.BOOL
        seed = n.op(
            "If",
            any_seed,
            then_branch=helper.make_graph(
                then_nodes, "seed", [], [helper.make_tensor_value_info(seeded, bool_type, None)]
            ),
            else_branch=helper.make_graph(
                idle.list, "keep", [], [helper.make_tensor_value_info(no, bool_type, None)]
            ),
        )
        return n.select(n.unsqueeze(seeding, 2, 3), seed, later)

    def _nearest(self, keys: str, centroids: str, penalty: str, clusters: str) -> str:
        """One-hot of the nearest centroid, ties to the lower index: bool [B, Lh, S, M]."""
        n = self.body.n
        norm = n.unsqueeze(n.sum(n.mul(centroids, centroids), 3), 2)  # [B, Lh, 1, M]
        cross = n.transposed_matmul(keys, centroids, 4)
        distance = n.add(n.sub(norm, n.mul(cross, n.f32(2.0))), penalty)  # + |k|², dropped
        return n.op("Equal", n.op("ArgMin", distance, axis=3, keepdims=1), clusters)

    def _lloyd(self, keys: str, live4: str, lh: int, m: int) -> str:
        """Seeds at floor((i + 1/2) F / M'), then 4 Lloyd rounds; the last assignment."""
        b, n = self.body, self.body.n
        clusters = n.const(np.arange(m, dtype=np.int64))
        odd = n.const(2 * np.arange(m, dtype=np.int64)[None] + 1)  # 2 i + 1
        used = n.op("Max", n.op("Min", b.folded, n.i64(m)), n.i64(1))  # M' [B, 1]
        seed = n.div(n.mul(odd, b.folded), n.mul(used, n.i64(2)))  # [B, M]
        if b.heavy:
            seed = n.add(seed, b.first)
        seed = n.op("Min", seed, n.sub(n.scalar(b.seq), n.i64(1)))
        spare = n.op("GreaterOrEqual", clusters, used)  # [B, M]
        penalty = n.mul(n.unsqueeze(n.cast(spare, "float32"), 1, 2), n.f32(-MASKED))
        shape = n.shape_of(b.batch, lh, m)
        parts = (
            n.unsqueeze(n.arange(b.batch), 1, 2),
            n.const(np.arange(lh, dtype=np.int64)[None, :, None]),
            n.unsqueeze(seed, 1),
        )
        index = n.concat(*(n.unsqueeze(n.op("Expand", p, shape), 3) for p in parts), axis=3)
        centroids = n.op("GatherND", keys, index)  # [B, Lh, M, D]
        assign = ""
        for round_ in range(LLOYD_ROUNDS):
            assign = n.op("And", self._nearest(keys, centroids, penalty, clusters), live4)
            if round_ + 1 == LLOYD_ROUNDS:
                break  # the caller takes the means of this assignment
            ones = n.cast(assign, "float32")
            size = n.unsqueeze(n.sum(ones, 2), 3)  # [B, Lh, M, 1]
            total = n.op("MatMul", n.transpose(ones, 0, 1, 3, 2), keys)
            mean = n.div(total, n.op("Max", size, n.f32(1.0)))
            centroids = n.op("Where", n.op("Greater", size, n.f32(0.5)), mean, centroids)
        return assign
