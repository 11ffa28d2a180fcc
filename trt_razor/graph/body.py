"""The body of ``trt_razor::RazorAttention`` as ONNX nodes, specialised for one set of heads.

The rules are those of docs/semantics.md, the interface is that of ``graph/operator.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trt_razor.graph.clusters import Clusters
from trt_razor.graph.heavy import HeavyRows
from trt_razor.graph.nodes import MASKED, Nodes

if TYPE_CHECKING:
    from trt_razor.graph.operator import RazorAttention


class OperatorBody:
    """Writes the nodes. Shapes in comments; i64 index arithmetic throughout."""

    def __init__(self, cfg: RazorAttention) -> None:
        self.cfg = cfg
        self.n = Nodes("razor_")
        self.half = cfg.dtype != "float32"
        self.g = cfg.num_heads // cfg.num_kv_heads
        p = cfg.policy
        self.n0 = p.sink_tokens
        self.heavy, self.kept = p.heavy_hitters, p.kept_rows
        self.ring = p.ring_rows(cfg.max_seq_len)
        self.rows_cap = p.local_rows(cfg.max_seq_len)

    def build(self) -> None:
        cfg, n, d = self.cfg, self.n, self.cfg.head_dim
        hq, hkv = cfg.num_heads, cfg.num_kv_heads
        self.batch, self.seq = n.dim("qkv", 0), n.dim("qkv", 1)
        self.past = n.unsqueeze(n.cast("past", "int64"), 1)  # [B, 1]
        self.chunk = n.unsqueeze(n.cast("chunk", "int64"), 1)
        self.index = n.unsqueeze(n.arange(self.seq), 0)  # [1, S]
        # Padded tokens take the place of the last valid one: same position, same values, so that
        # whatever they write is already there.
        self.last = n.op("Max", n.sub(self.chunk, n.i64(1)), n.i64(0))  # [B, 1]
        self.source = n.op("Min", self.index, self.last)  # [B, S]
        self.time = n.add(self.past, self.source)  # [B, S] absolute positions

        x = n.reshape("qkv", 0, 0, hq + 2 * hkv, d)
        if cfg.position == "rope":
            qk, v = n.split(x, [hq + hkv, hkv], axis=2)
            q, k = n.split(self._rotate(self.float32(qk)), [hq, hkv], axis=2)
            k = self._model_dtype(k)
        else:
            q, k, v = n.split(x, [hq, hkv, hkv], axis=2)
            q = self.float32(q)
        # Scaled before the product with the keys: q·k alone can pass the end of float16, 65504.
        q = self._model_dtype(n.mul(q, n.f32(d**-0.5)))
        q, k, v = (n.transpose(t, 0, 2, 1, 3) for t in (q, k, v))  # [B, H, S, D]
        q = n.reshape(q, self.batch, hkv, -1, d)  # [B, Hkv, g S, D]

        outs = []
        if cfg.retrieval_heads:
            heads = cfg.retrieval_heads
            outs.append(self._retrieval(*(self._pick(t, heads) for t in (q, k, v))))
        if cfg.local_heads:
            heads = cfg.local_heads
            outs.append(self._local(*(self._pick(t, heads) for t in (q, k, v))))
        out = n.concat(*outs, axis=1)  # [B, Hkv, g, S, D], retrieval heads first
        order = [*cfg.retrieval_heads, *cfg.local_heads]
        if order != sorted(order):
            out = n.op("Gather", out, n.i64s([order.index(h) for h in range(hkv)]), axis=1)
        out = n.transpose(out, 0, 3, 1, 2, 4)
        n.reshape(out, self.batch, self.seq, hq * d, out="out")

    # Pieces -----------------------------------------------------------------------------------
    def _rotate(self, x: str) -> str:
        """RoPE, half rotation: x float32 [B, S, H, D]."""
        n, d = self.n, self.cfg.head_dim
        table = n.unsqueeze(n.op("Gather", "cos_sin", self.time, axis=0), 2)  # [B, S, 1, D]
        cos, sin = n.split(table, [d // 2, d // 2], axis=3)
        a, b = n.split(x, [d // 2, d // 2], axis=3)
        return n.concat(
            n.sub(n.mul(a, cos), n.mul(b, sin)), n.add(n.mul(b, cos), n.mul(a, sin)), axis=3
        )

    def float32(self, x: str) -> str:
        return self.n.cast(x, "float32") if self.half else x

    def _model_dtype(self, x: str) -> str:
        return self.n.cast(x, self.cfg.dtype) if self.half else x

    def _pick(self, x: str, heads: tuple[int, ...]) -> str:
        """Rows of axis 1 (KV heads)."""
        if len(heads) == self.cfg.num_kv_heads:
            return x
        return self.n.op("Gather", x, self.n.i64s(heads), axis=1)

    def index3(self, heads: int, rows: str, length: str = "") -> str:
        """(b, h, rows[b, s]) for GatherND and ScatterND on [B, H, rows, D]: [B, H, S, 3].

        ``length``: a [1] tensor, rows per head if not S.
        """
        n = self.n
        shape = n.shape_of(self.batch, heads, length or self.seq)
        parts = (
            n.unsqueeze(n.arange(self.batch), 1, 2),
            n.const(np.arange(heads, dtype=np.int64)[None, :, None]),
            n.unsqueeze(rows, 1),
        )
        return n.concat(*(n.unsqueeze(n.op("Expand", p, shape), 3) for p in parts), axis=3)

    def _scores(self, q: str, k: str, heads: int) -> str:
        """Logits of scaled queries, float32 [B, H, g, S, rows]."""
        s = self.float32(self.n.transposed_matmul(q, k, 4))
        return self.n.reshape(s, self.batch, heads, self.g, self.seq, -1)

    def _weighted(self, weights: str, v: str, heads: int) -> str:
        """weights [B, H, g, S, rows] · v [B, H, rows, D] → [B, H, g S, D]."""
        n = self.n
        w = n.reshape(weights, self.batch, heads, n.mul(self.seq, n.i64s([self.g])), -1)
        return n.op("MatMul", self._model_dtype(w), v)

    def _finish(self, out: str, heads: int) -> str:
        return self.n.reshape(out, self.batch, heads, self.g, self.seq, self.cfg.head_dim)

    def mask(self, visible: str) -> str:
        """0 where visible, MASKED elsewhere."""
        n = self.n
        return n.op("Where", visible, n.f32(0.0), n.f32(MASKED))

    def _alibi(self, heads: tuple[int, ...], row_pos: str) -> str:
        """−slope · (t − p): row_pos float32 [B | 1, 1 | S, rows] → [B, H, g, S, rows]."""
        n = self.n
        slopes = n.reshape("alibi_slopes", 1, self.cfg.num_kv_heads, self.g, 1, 1)
        time = n.unsqueeze(n.cast(self.time, "float32"), 2)  # [B, S, 1]
        return n.mul(self._pick(slopes, heads), n.unsqueeze(n.sub(row_pos, time), 1, 2))

    def _bias(self, scores: str, mask: str, heads: tuple[int, ...], row_pos: str) -> str:
        n = self.n
        scores = n.add(scores, mask)
        if self.cfg.position == "alibi":
            scores = n.add(scores, self._alibi(heads, n.cast(row_pos, "float32")))
        return scores

    # Retrieval heads: write, then attend to everything -------------------------------------------
    def _retrieval(self, q: str, k: str, v: str) -> str:
        n, heads = self.n, self.cfg.retrieval_heads
        r = len(heads)
        take = self.index3(r, self.source)
        put = self.index3(r, n.op("Min", self.time, n.i64(self.cfg.max_seq_len - 1)))
        end = n.op("Min", n.add(n.dim("past_span", 0), self.seq), n.i64s([self.cfg.max_seq_len]))
        rows = []
        for name, new in (("full_k", k), ("full_v", v)):
            new = n.op("GatherND", new, take)
            full = n.op("ScatterND", name, put, new, out=f"{name}_out")
            rows.append(n.slice(full, n.i64s([0]), end, axis=2))
        pos = n.unsqueeze(n.arange(end), 0, 1)  # [1, 1, rows]
        visible = n.op("LessOrEqual", pos, n.unsqueeze(self.time, 2))  # [B, S, rows]
        mask = n.unsqueeze(self.mask(visible), 1, 2)
        scores = self._bias(self._scores(q, rows[0], r), mask, heads, pos)
        weights = n.op("Softmax", scores, axis=-1)
        return self._finish(self._weighted(weights, rows[1], r), r)

    # Local heads: attend to [kept rows and ring | compensation | chunk], then update -------------
    def _dropped(self, length: str) -> str:
        """D(n) = max(0, n − N0 − max(S0, ceil(n / C)))."""
        n, p = self.n, self.cfg.policy
        window = n.i64(p.min_window)
        if p.compression is not None:
            up = n.add(length, n.i64(p.compression - 1))
            window = n.op("Max", n.div(up, n.i64(p.compression)), window)
        return n.op("Max", n.sub(n.sub(length, n.i64(self.n0)), window), n.i64(0))

    def _local(self, q: str, k: str, v: str) -> str:
        n, cfg, heads = self.n, self.cfg, self.cfg.local_heads
        lh = len(heads)
        self.d0 = self._dropped(self.past)  # [B, 1]
        self.d1 = self._dropped(n.add(self.past, self.chunk))

        # The rows in use: a prefix of [kept | ring], bounded by the longest row of the batch.
        span = n.dim("past_span", 0)
        if self.heavy:  # the ring starts behind the rows of heavy hitters, in use or not
            span = n.add(span, n.i64s([self.heavy]))
            self.h0, self.h1 = (n.op("Min", d, n.i64(self.heavy)) for d in (self.d0, self.d1))
        end = n.op("Min", span, n.i64s([self.rows_cap]))
        old_k = n.slice("local_k", n.i64s([0]), end, axis=2)
        old_v = n.slice("local_v", n.i64s([0]), end, axis=2)
        row = n.unsqueeze(n.arange(end), 0)  # [1, rows]
        # Ring row r last held position past − 1 − age, age = (past − 1 − N0 − r) mod W_cap; it is in
        # the window if that is among the last past − N0 − D tokens.
        in_order = n.sub(row, n.i64(self.heavy)) if self.heavy else row
        lag = n.sub(n.sub(self.past, n.i64(1)), in_order)  # past − 1 − N0 − ring index
        age = n.mod(lag, n.i64(self.ring))
        live = n.sub(n.sub(self.past, n.i64(self.n0)), self.d0)
        in_ring = n.op("And", n.op("GreaterOrEqual", lag, n.i64(0)), n.op("Less", age, live))
        is_kept, used = n.op("Less", row, n.i64(self.kept)), self.past
        if self.heavy:  # sinks, then the heavy hitters there are; there are none while past < N0
            used = n.op("Min", used, n.add(self.h0, n.i64(self.n0)))
        valid = n.select(is_kept, n.op("Less", row, used), in_ring)  # [B, rows]
        pos = n.op("Where", is_kept, row, n.sub(n.sub(self.past, n.i64(1)), age))

        old_mask = n.unsqueeze(self.mask(valid), 1, 2, 3)  # [B, 1, 1, 1, rows]
        parts = [self._bias(self._scores(q, old_k, lh), old_mask, heads, n.unsqueeze(pos, 1))]
        if cfg.has_comp:
            self._read_comp()
            s = n.transposed_matmul(self.float32(q), self.comp_k, 4)
            s = n.reshape(s, self.batch, lh, self.g, self.seq, -1)
            log_weight = n.unsqueeze(self.log_weight, 2, 3)
            middle = n.sub(n.cast(self.d0, "float32"), n.f32(1.0))
            middle = n.add(n.mul(middle, n.f32(0.5)), n.f32(float(self.n0)))
            parts.append(self._bias(s, log_weight, heads, n.unsqueeze(middle, 1)))
        causal = n.op("LessOrEqual", self.index, n.op("Transpose", self.index))  # [S, S]
        new_pos = n.unsqueeze(n.add(self.past, self.index), 1)
        parts.append(self._bias(self._scores(q, k, lh), self.mask(causal), heads, new_pos))

        weights = n.op("Softmax", n.concat(*parts, axis=4), axis=-1)
        values = [old_v, v]
        if cfg.has_comp:
            values.insert(1, self._model_dtype(self.comp_v))
        if cfg.has_comp or self.heavy:
            lost_k, lost_v = self._leaving(k, v, old_k, old_v, end)
            if self.heavy:
                lost_k, lost_v, self.moved = HeavyRows(self).update(
                    q, k, v, old_k, old_v, lost_k, lost_v, end
                )
            if cfg.has_comp:
                self._fold(lost_k, lost_v)
        out = self._weighted(weights, n.concat(*values, axis=2), lh)
        self._update_local(k, v, old_k, old_v)
        return self._finish(out, lh)

    def _update_local(self, k: str, v: str, old_k: str, old_v: str) -> None:
        """Write the chunk's surviving tokens to sinks and ring.

        Tokens that are dropped within the chunk, and padding, repeat the last valid token. The
        shape of the update is taken from the copy of the old rows that attention and fold read:
        so the write, which may be in place, cannot run before that copy is made.
        """
        n, lh = self.n, len(self.cfg.local_heads)
        pos = n.add(self.past, self.index)  # [B, S]
        n0 = n.i64(self.n0)
        survives = n.op(
            "Or",
            n.op("Less", pos, n0),
            n.op("GreaterOrEqual", pos, n.add(self.d1, n0)),
        )
        survives = n.op("And", survives, n.op("Less", self.index, self.chunk))
        source = n.op("Where", survives, self.index, self.last)  # [B, S]
        pos = n.add(self.past, source)
        row = self.row_of(pos)
        take, put = self.index3(lh, source), self.index3(lh, row)
        if self.heavy:
            put = n.concat(put, self.moved.index, axis=2)
        for i, (name, new, old) in enumerate((("local_k", k, old_k), ("local_v", v, old_v))):
            update = n.op("GatherND", new, take)
            if self.heavy:
                update = n.concat(update, self.moved.rows[i], axis=2)
            update = n.reshape(update, n.dim(old, 0), lh, -1, self.cfg.head_dim)
            n.op("ScatterND", name, put, update, out=f"{name}_out")

    def row_of(self, pos: str) -> str:
        """Row of a kept position: sinks in front, the window in the ring."""
        n = self.n
        n0, kept = n.i64(self.n0), n.i64(self.kept)
        ring_row = n.add(n.mod(n.op("Max", n.sub(pos, n0), n.i64(0)), n.i64(self.ring)), kept)
        return n.op("Where", n.op("Less", pos, n0), pos, ring_row)

    # Compensation -------------------------------------------------------------------------------
    def _read_comp(self) -> None:
        """Copies of the compensation state: what is written later depends on these alone."""
        n, m = self.n, self.cfg.policy.comp_tokens
        # [B, Lh, M, D] float32 each
        self.comp_k, self.comp_v = (n.op("Gather", "comp", n.i64(i), axis=3) for i in (0, 1))
        pair = n.concat("comp_log_weight", "comp_count", axis=2)
        self.log_weight, self.count = n.split(pair, [m, m], axis=2)

    def _leaving(self, k: str, v: str, old_k: str, old_v: str, end: str) -> tuple[str, str]:
        """Keys and values of positions N0 + D(t0) .. N0 + D(t1) − 1, F of S rows in use.

        [B, Lh, S, D] each. ``self.live`` marks those that are folded: all, or with heavy hitters
        those behind the first h1 − h0, which is how many more rows there are for these.
        """
        n, lh = self.n, len(self.cfg.local_heads)
        folded = n.sub(self.d1, self.d0)  # F [B, 1], at most S
        self.first, self.folded = "", folded
        pos = n.add(n.add(self.d0, n.i64(self.n0)), self.index)  # [B, S] candidates
        self.live = n.op("Less", self.index, folded)  # [B, S]
        if self.heavy:
            self.dropped, self.first = folded, n.sub(self.h1, self.h0)  # [B, 1]
            self.folded = n.sub(folded, self.first)
            moves_on = n.op("GreaterOrEqual", self.index, self.first)
            self.live = n.op("And", self.live, moves_on)
        ring_row = n.mod(n.sub(pos, n.i64(self.n0)), n.i64(self.ring))
        old_row = n.op("Min", n.add(ring_row, n.i64(self.kept)), n.sub(n.scalar(end), n.i64(1)))
        new_row = n.op("Max", n.sub(pos, self.past), n.i64(0))
        new_row = n.op("Min", new_row, n.sub(n.scalar(self.seq), n.i64(1)))
        from_old, from_new = self.index3(lh, old_row), self.index3(lh, new_row)
        is_old = n.unsqueeze(n.op("Less", pos, self.past), 1, 3)  # [B, 1, S, 1]
        keys, values = (
            n.op("Where", is_old, n.op("GatherND", old, from_old), n.op("GatherND", new, from_new))
            for old, new in ((old_k, k), (old_v, v))
        )  # [B, Lh, S, D]
        return keys, values

    def _fold(self, keys: str, values: str) -> None:
        """Fold the tokens that ``self.live`` marks into the M cluster means."""
        n, cfg, lh = self.n, self.cfg, len(self.cfg.local_heads)
        d, m = cfg.head_dim, cfg.policy.comp_tokens
        keys, values = self.float32(keys), self.float32(values)

        live4 = n.unsqueeze(self.live, 1, 3)  # [B, 1, S, 1]
        if m == 1:
            ones = n.op("Expand", n.cast(live4, "float32"), n.shape_of(self.batch, lh, self.seq, 1))
            assign = ones
        else:
            assign = n.cast(n.op("And", Clusters(self).assign(keys, live4), live4), "float32")

        both = n.concat(keys, values, axis=3)  # [B, Lh, S, 2D]
        sums = n.op("MatMul", n.transpose(assign, 0, 1, 3, 2), both)  # [B, Lh, M, 2D]
        added = n.sum(assign, 2)  # [B, Lh, M]
        count = n.op("Add", self.count, added, out="comp_count_out")
        mean = n.concat(self.comp_k, self.comp_v, axis=3)
        # mean += (sum − F·mean) / (N + F): exact for the first token, stable for millions.
        delta = n.sub(sums, n.mul(n.unsqueeze(added, 3), mean))
        delta = n.div(delta, n.unsqueeze(n.op("Max", count, n.f32(1.0)), 3))
        n.reshape(n.add(mean, delta), self.batch, lh, m, 2, d, out="comp_out")
        n.op("Log", count, out="comp_log_weight_out")
