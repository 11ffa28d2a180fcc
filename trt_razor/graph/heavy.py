"""Heavy hitters in the body of ``trt_razor::RazorAttention``: dropped tokens that keep a row.

The rule is in docs/semantics.md. With n tokens cached, rows N0 .. N0 + h(n) − 1 of a local head are
in use. As long as there is room, tokens are copied to the next unused rows; afterwards each chunk
chooses anew, in a branch of its own: before, no step pays for it. What does not depend on keys and
queries stands in front of the branch, where all layers share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from trt_razor.graph.nodes import DTYPES, Nodes
from trt_razor.policy import SELECT_QUERIES

if TYPE_CHECKING:
    from trt_razor.graph.body import OperatorBody

LOWEST_SCORE = -1e30
"""Score of a value of zeros (its logarithm is −∞)."""

NO_CANDIDATE = -3e38
"""Score of a row without a token: below every token's."""

BEHIND = 1 << 23
"""Added to an index, as float32, to sort it behind all others; more than rows and tokens."""


@dataclass(frozen=True)
class Moved:
    """Tokens for rows of heavy hitters: U = min(S, H) a head, repeated where fewer move.

    Attributes:
        rows: keys and values, [B, Lh, U, D] each.
        index: (b, h, row) for ScatterND, [B, Lh, U, 3].
    """

    rows: tuple[str, str]
    index: str


class HeavyRows:
    """Writes the nodes that choose heavy hitters among those there are and the tokens that leave.

    Candidates are the H rows, h(t0) in use, then S tokens, F in use: C = H + S places a head.
    """

    def __init__(self, body: OperatorBody) -> None:
        self.body = body
        self.outer = body.n
        self.lh = len(body.cfg.local_heads)
        self.h = body.heavy
        n = body.n
        self.count = n.op("Min", body.seq, n.i64s([self.h]))  # U [1]
        self.to_rows = self._grid(self.lh, self.count)

    def update(
        self, q: str, k: str, v: str, old_k: str, old_v: str, keys: str, values: str, end: str
    ) -> tuple[str, str, Moved]:
        """Who stays, and who goes on to the clusters.

        Args:
            q: scaled queries [B, Lh, g S, D]. k, v: the chunk [B, Lh, S, D].
            old_k, old_v: rows in use before the chunk, ``end`` ([1]) a head.
            keys, values: tokens that leave the window, [B, Lh, S, D], the first F in use.

        Returns:
            keys and values as given, with losers where ``body.live`` is set; what to write.
        """
        b, n, lh, count = self.body, self.outer, self.lh, self.count
        leaving = n.concat(keys, values, axis=3)  # [B, Lh, S, 2D]
        # As long as there is room nobody has to go: the first tokens that leave take the next rows.
        slot = n.unsqueeze(n.arange(count), 0)  # [1, U]
        moves = n.op("Less", slot, b.first)  # [B, U]
        # The other slots write the chunk's last token once more where it is written anyway.
        home = b.row_of(n.add(b.past, b.last))  # [B, 1]
        row = n.op("Where", moves, n.add(slot, n.add(b.h0, n.i64(b.n0))), home)  # [B, U]
        row = n.op("Expand", n.unsqueeze(row, 1), n.shape_of(b.batch, lh, count))
        take_last = b.index3(lh, b.last, n.i64s([1]))
        newest = n.concat(*(n.op("GatherND", x, take_last) for x in (k, v)), axis=3)
        first_ones = n.slice(leaving, n.i64s([0]), count, 2)
        moved = n.op("Where", n.unsqueeze(moves, 1, 3), first_ones, newest)  # [B, Lh, U, 2D]

        self.judges = n.op("Greater", n.add(b.h0, b.dropped), n.i64(self.h))  # [B, 1]
        any_judges = n.op("ReduceMax", n.cast(self.judges, "int64"), n.i64s([0, 1]), keepdims=0)
        any_judges = n.op("Greater", any_judges, n.i64(0))
        simple = [moved, row] + [leaving] * b.cfg.has_comp
        self._before_the_branch(end)
        b.n = Nodes(f"{n.prefix}choose_")
        chosen = self._choose(q, old_k, old_v, keys, values, simple)
        then_branch = self._branch(b.n, "choose", chosen)
        b.n = n
        keep = Nodes(f"{n.prefix}first_")
        same = [keep.op("Identity", x) for x in simple]
        else_branch = self._branch(keep, "first_come", same)
        moved, row, *rest = n.multi(
            "If", [any_judges], len(simple), then_branch=then_branch, else_branch=else_branch
        )
        d = b.cfg.head_dim
        if rest:
            keys, values = n.split(rest[0], [d, d], axis=3)
        moved_k, moved_v = n.split(moved, [d, d], axis=3)
        return keys, values, Moved((moved_k, moved_v), self._index(n, self.to_rows, row))

    def _branch(self, nodes: Nodes, name: str, outs: list[str]) -> onnx.GraphProto:
        dtype = DTYPES[self.body.cfg.dtype]
        types = [dtype, DTYPES["int64"], dtype]
        info = [
            helper.make_tensor_value_info(x, t, None) for x, t in zip(outs, types, strict=False)
        ]
        return helper.make_graph(nodes.list, name, [], info)

    # Index arithmetic ---------------------------------------------------------------------------
    def _grid(self, heads: int, length: str) -> tuple[str, str]:
        """b and h of (b, h, row) for GatherND and ScatterND, [B, heads, length, 1] each."""
        b, n = self.body, self.outer
        shape = n.shape_of(b.batch, heads, length)
        slots = n.unsqueeze(n.arange(b.batch), 1, 2)
        every = n.const(np.arange(heads, dtype=np.int64)[None, :, None])
        first, second = (n.unsqueeze(n.op("Expand", x, shape), 3) for x in (slots, every))
        return first, second

    def _index(self, n: Nodes, grid: tuple[str, str], rows: str) -> str:
        return n.concat(*grid, n.unsqueeze(rows, 3), axis=3)

    def _before_the_branch(self, end: str) -> None:
        b, n, lh, h = self.body, self.outer, self.lh, self.h
        places = n.const(b.n0 + np.arange(h, dtype=np.int64))
        self.places = n.op("Min", places, n.sub(n.scalar(end), n.i64(1)))  # of the H rows
        total = n.add(b.seq, n.i64s([h]))  # C [1]
        self.cand = n.unsqueeze(n.arange(total), 0, 1)  # [1, 1, C]
        h0, dropped = n.unsqueeze(b.h0, 2), n.unsqueeze(b.dropped, 2)  # [B, 1, 1]
        self.in_use = n.select(
            n.op("GreaterOrEqual", self.cand, n.i64(h)),
            n.op("Less", self.cand, n.add(dropped, n.i64(h))),
            n.op("Less", self.cand, h0),
        )  # [B, 1, C]
        shape = n.shape_of(b.batch, lh, total)
        self.every = n.op("Expand", self.cand, shape)
        self.none = n.op("Expand", n.f32(0.0), shape)
        self.ones = n.op("Expand", n.f32(1.0), n.shape_of(b.batch, lh, h))
        self.to_tokens = self._grid(lh, b.seq)
        self.first3, self.folded3 = n.unsqueeze(b.first, 2), n.unsqueeze(b.folded, 2)
        self.judges3 = n.unsqueeze(self.judges, 2)
        self.judges4 = n.unsqueeze(self.judges3, 3)
        # The chunk's last W = min(S, 64) tokens; in a batch one may have fewer than another.
        self.w = w = n.op("Min", b.seq, n.i64s([SELECT_QUERIES]))
        token = n.add(n.unsqueeze(n.sub(n.arange(w), w), 0), b.chunk)  # [B, W]
        self.queries = b.index3(lh * b.g, n.op("Max", token, n.i64(0)), w)
        is_query = n.op("GreaterOrEqual", token, n.i64(0))
        self.query_mask = n.unsqueeze(b.mask(is_query), 1, 2, 4)

    # A chunk that judges --------------------------------------------------------------------------
    def _choose(
        self, q: str, old_k: str, old_v: str, keys: str, values: str, simple: list[str]
    ) -> list[str]:
        """The values of ``simple``, replaced in the rows of the batch that judge."""
        b, n, h = self.body, self.body.n, self.h
        cand_k, cand_v = (
            n.concat(n.op("Gather", old, self.places, axis=2), new, axis=2)
            for old, new in ((old_k, keys), (old_v, values))
        )  # [B, Lh, C, D]
        candidates = n.concat(cand_k, cand_v, axis=3)
        score = n.op("Max", self._scores(q, cand_k, cand_v), n.f32(LOWEST_SCORE))
        score = n.op("Where", self.in_use, score, n.f32(NO_CANDIDATE))
        _, winner = n.topk(score, h)  # [B, Lh, H]; where a row judges, H candidates are in use
        won = n.op("ScatterElements", self.none, winner, self.ones, axis=2)  # [B, Lh, C]

        # Winners with the tokens in front, rows with the free ones in front, both ascending: so a
        # token that wins meets a free row, and a heavy hitter that wins meets its own.
        stays = n.cast(n.op("Less", winner, n.i64(h)), "float32")
        source = self._ascending(n.cast(winner, "float32"), stays)
        held = n.slice(won, n.i64s([0]), n.i64s([h]), 2)
        number = n.const(np.arange(h, dtype=np.float32))
        row = n.add(self._ascending(number, held), n.i64(b.n0))
        moved = n.op("GatherND", candidates, self._index(n, self.to_rows, source))
        out = [
            n.op("Where", self.judges4, moved, simple[0]),
            n.op("Where", self.judges3, row, simple[1]),
        ]
        if b.cfg.has_comp:
            source = self._losers(n.op("And", self.in_use, n.op("Less", won, n.f32(0.5))))
            lost = n.op("GatherND", candidates, self._index(n, self.to_tokens, source))
            out.append(n.op("Where", self.judges4, lost, simple[2]))
        return out

    def _scores(self, q: str, k: str, v: str) -> str:
        """ln ‖v‖ + ln Σ exp(s·q·k), the sum over the chunk's last queries and the group: [B, Lh, C]."""
        b, n, lh = self.body, self.body.n, self.lh
        q = n.reshape(q, b.batch, lh * b.g, b.seq, b.cfg.head_dim)
        q = n.op("GatherND", q, self.queries)
        q = n.reshape(q, b.batch, lh, -1, b.cfg.head_dim)
        logits = n.transposed_matmul(b.float32(q), b.float32(k), 4)
        logits = n.reshape(logits, b.batch, lh, b.g, self.w, -1)
        logits = n.add(logits, self.query_mask)
        # By hand: an executor's ReduceLogSumExp need not subtract the largest first.
        both = n.i64s([2, 3])
        top = n.op("ReduceMax", logits, both, keepdims=1)
        spread = n.op("ReduceSum", n.op("Exp", n.sub(logits, top)), both, keepdims=0)
        attention = n.add(n.op("Log", spread), n.op("Squeeze", top, both))
        v = b.float32(v)
        length = n.mul(n.op("Log", n.sum(n.mul(v, v), 3)), n.f32(0.5))
        return n.add(attention, length)

    def _ascending(self, index: str, behind: str) -> str:
        """The first U of H indices in order, those with ``behind`` = 1 after the others: int64."""
        n = self.body.n
        key = n.add(index, n.mul(behind, n.f32(float(BEHIND))))
        found, _ = n.topk(key, self.h, largest=0)
        found = n.cast(n.slice(found, n.i64s([0]), self.count, 2), "int64")
        return n.mod(found, n.i64(BEHIND))

    def _losers(self, lost: str) -> str:
        """Which candidate each of the S places of tokens to fold gets: int64 [B, Lh, S].

        The losers in candidate order at places ``first`` .. F − 1, which is where ``body.live`` is
        set; in the others something that nobody reads.
        """
        b, n = self.body, self.body.n
        before = n.op("CumSum", n.cast(lost, "int64"), n.i64(2), exclusive=1)
        # Every candidate gets a place of its own, so no two are written to one.
        rest = n.sub(self.cand, before)
        in_front = n.op("Less", rest, self.first3)
        rest = n.add(rest, n.op("Where", in_front, n.i64(0), self.folded3))
        place = n.op("Where", lost, n.add(before, self.first3), rest)
        source = n.op("ScatterElements", self.every, place, self.every, axis=2)
        return n.slice(source, n.i64s([0]), b.seq, 2)
