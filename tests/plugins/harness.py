"""One layer, many calls: the kernels against trt_razor.reference, memory compared byte by byte.

A Rig owns the caches of a layer and the sequences in them. Every call it makes checks

* the outputs, per sequence and query head, against the float64 reference fed with inputs that
  are rounded exactly as the kernels round them;
* every byte of the caches: a row that a kept token took holds exactly its key and value, the rows
  of heavy hitters hold the tokens that the reference chose, every other byte is what it was before (buffers begin as 0xff, NaN in every type used here);
* the compensation tokens: means, counts, log-weights;
* that inputs are as they were and nothing was written outside a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from razor_layers import Layer, TieError, Tokens, as_bytes, draw_tokens, no_ties, stored
from razor_memory import Buffer, Place, Store, contiguous_store
from torch import Tensor

from trt_razor.kernels import Limits, RazorKernels
from trt_razor.reference import LayerCache

OUTPUT_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""‖out − reference‖ / ‖reference‖ of one query head of one sequence.

Two units of roundoff of each dtype (2^-11, 2^-8). Softmax weights are rounded to it before they
multiply the values, compensation tokens before they are multiplied, and the output; these are
random and average out over rows and elements, so that a third of this is what is seen."""

MAX_ABS_FACTOR = 4
"""No element is off by more than this many tolerances of the largest one of its head."""

COMP_TOLERANCE = 2e-5
"""Of means, relative to 1 + |mean|: sums of hundreds of numbers of size 1 in float32."""

LOG_TOLERANCE = 2e-6
"""Of log-weights, relative to 1 + |w|: one float32 logarithm."""

_NONSENSE = -7  # a number that must not be read


@dataclass(frozen=True)
class Call:
    """One call: which sequences bring how many tokens.

    Attributes:
        contexts, generations: (sequence, tokens); generations bring 1 or 0.
        packed: chunks follow one another. Padded calls have contexts or generations, not both.
        use_total: the device is given ``total`` instead of ``past``.
        one_each: generations bring a token each and the device is not asked.
        slack: host bounds (and padded rows) beyond what the call needs.
        lies: batch index → (past, chunk) that the device is given instead of the truth, out of
            bounds: the sequence must come out idle.
    """

    contexts: Sequence[tuple[int, int]] = ()
    generations: Sequence[tuple[int, int]] = ()
    packed: bool = False
    use_total: bool = False
    one_each: bool = False
    slack: int = 0
    lies: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@dataclass
class _Sequence:
    tokens: Tokens
    cache: LayerCache


class Rig:
    """The caches of one layer and the sequences in them.

    Args:
        store: contiguous, a slot a sequence, unless given.
        seed: of all random numbers.
        loud: see ``draw_tokens``.
    """

    def __init__(
        self,
        kernels: RazorKernels,
        layer: Layer,
        store: Store | None = None,
        slots: int = 4,
        seed: int = 0,
        loud: float = 1.0,
    ) -> None:
        self.kernels, self.layer, self.seed, self.loud = kernels, layer, seed, loud
        self.config = layer.config()
        self.store: Store = store or contiguous_store(layer, slots)
        self.sequences: dict[int, _Sequence] = {}
        self.worst = 0.0  # largest output error so far, in tolerances
        self._started = 0
        self._constants: dict[str, Buffer] = {}
        slopes = layer.slopes()
        for name, numbers in (
            ("cos_sin", layer.cos_sin() if layer.position in ("half", "interleaved") else None),
            ("alibi_slopes", None if slopes is None else slopes.numpy()),
            ("k_scale", layer.k_scale),
            ("v_scale", layer.v_scale),
        ):
            if numbers is not None:
                content = np.atleast_1d(np.asarray(numbers, np.float32))
                self._constants[name] = Buffer(name, content.nbytes, content)
        self._constant_tensors = {
            name: b.tensor(torch.float32).view(layer.n_max, -1)
            if name == "cos_sin"
            else b.tensor(torch.float32)
            for name, b in self._constants.items()
        }

    # Sequences ------------------------------------------------------------------------------------
    def n(self, sequence: int) -> int:
        """Tokens cached."""
        return self.sequences[sequence].cache.n if sequence in self.sequences else 0

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self.sequences:
            layer = self.layer
            self._started += 1
            cache = LayerCache(
                layer.policy,
                layer.retrieval,
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                layer.n_max,
                torch.float64,
                slopes=layer.slopes(),
                scale=layer.logit_scale,
            )
            tokens = draw_tokens(layer, self.seed * 1000 + self._started, loud=self.loud)
            self.sequences[sequence] = _Sequence(tokens, cache)
        return self.sequences[sequence]

    def finish(self, sequence: int) -> None:
        """The sequence ends; another may take its number and its memory."""
        self.sequences.pop(sequence, None)
        self.store.finish(sequence)

    # A call ---------------------------------------------------------------------------------------
    def call(self, call: Call, twice: bool = False) -> Tensor:
        """Run a call and check everything.

        Args:
            twice: also run it again from the same state; every byte must be the same.

        Returns:
            the output rows.

        Raises:
            TieError: the data leaves a decision to rounding; another seed is needed.
        """
        plan = _Plan(self, call)
        expected = self._expect(plan)
        before = [b.array.copy() for b in self.store.buffers]
        out = self._run(plan)
        if twice:
            after = [b.array.copy() for b in self.store.buffers]
            for b, content in zip(self.store.buffers, before, strict=True):
                b.array[:] = content
            again = self._run(plan)
            for b, content in zip(self.store.buffers, after, strict=True):
                assert np.array_equal(b.array, content), f"{b.name}: differs from run to run"
            same = torch.equal(out.view(torch.int16), again.view(torch.int16))
            assert same, "out: differs from run to run"
        self._check_outputs(plan, out, expected)
        self._check_caches(plan)
        return out

    def run(self, calls: Iterable[Call], twice: bool = False) -> None:
        """Calls one after another; a failure says which one it was."""
        for i, call in enumerate(calls):
            try:
                self.call(call, twice)
            except TieError:
                raise
            except Exception as error:
                raise AssertionError(f"call {i} of {self.layer}: {call}: {error}") from error

    def _expect(self, plan: _Plan) -> dict[int, Tensor]:
        """Reference outputs of the active sequences by batch index, and expected bytes."""
        layer, outputs = self.layer, {}
        for b, (sequence, chunk) in enumerate(plan.batch):
            if b not in plan.active:
                continue
            state = self._of(sequence)
            past, tokens = state.cache.n, state.tokens
            part = slice(past, past + chunk)
            with no_ties():
                outputs[b] = state.cache.attend(
                    tokens.ref_q[:, part], tokens.ref_k[:, part], tokens.ref_v[:, part]
                )
            self.store.grow(sequence, past + chunk)
            for kind, heads in (("full", layer.retrieval), ("local", layer.local)):
                for head, kv in enumerate(heads):
                    for p in range(past, past + chunk):
                        if kind == "local" and not layer.kept(p, past + chunk):
                            continue
                        k, v = self.store.row(kind, sequence, head, layer.row(kind, p))
                        k.expect(tokens.k_bytes[kv, p])
                        v.expect(tokens.v_bytes[kv, p])
            self._expect_heavy(sequence, state.cache)
        return outputs

    def _expect_heavy(self, sequence: int, cache: LayerCache) -> None:
        """The rows of heavy hitters are those of the reference, number by number."""
        local, layer = cache.local, self.layer
        if local is None or not layer.policy.heavy(cache.n):
            return
        for head in range(len(layer.local)):
            for row in local.heavy_rows().tolist():
                places = self.store.row("local", sequence, head, row)
                for place, rows, scale in zip(
                    places,
                    (local.local_k, local.local_v),
                    (layer.k_scale, layer.v_scale),
                    strict=True,
                ):
                    place.expect(as_bytes(stored(rows[head, row], layer, scale)))

    def _run(self, plan: _Plan) -> Tensor:
        layer, call = self.layer, plan.call
        workspace_bytes = self.kernels.workspace_size(self.config, plan.limits)
        buffers = {
            "qkv": Buffer("qkv", plan.qkv.nbytes, plan.qkv),
            "lengths": Buffer("past or total", plan.lengths.nbytes, plan.lengths),
            "out": Buffer("out", plan.rows * layer.num_heads * layer.head_dim * 2),
            "workspace": Buffer("workspace", workspace_bytes),
        }
        if plan.chunks is not None:
            buffers["chunk"] = Buffer("chunk", plan.chunks.nbytes, plan.chunks)
        qkv, out = (buffers[x].tensor(layer.dtype).view(*plan.shape, -1) for x in ("qkv", "out"))
        lengths = buffers["lengths"].tensor(torch.int32)
        self.kernels.attention(
            self.config,
            qkv,
            self.store.caches([s for s, _ in plan.batch]),
            past=None if call.use_total else lengths,
            total=lengths if call.use_total else None,
            chunk=buffers["chunk"].tensor(torch.int32) if plan.chunks is not None else None,
            num_contexts=len(call.contexts),
            max_chunk=plan.limits.max_chunk,
            max_past=plan.limits.max_past,
            generation_chunk_is_one=call.one_each,
            out=out,
            workspace=buffers["workspace"].tensor(torch.uint8),
            **self._constant_tensors,
        )
        for name, b in [*buffers.items(), *self._constants.items()]:
            if name in ("out", "workspace"):
                b.check_guards()
            else:
                b.check()
        return out.reshape(plan.rows, layer.num_heads, layer.head_dim).clone()

    def _check_outputs(self, plan: _Plan, out: Tensor, expected: Mapping[int, Tensor]) -> None:
        tolerance = OUTPUT_TOLERANCE[self.layer.dtype]
        for b, (_, chunk) in enumerate(plan.batch):
            first = plan.first_row[b]
            if b in expected:
                found = out[first : first + chunk].transpose(0, 1).double()
                reference = expected[b]
                where = f"batch index {b}"
                assert bool(torch.isfinite(found).all()), (
                    f"{where}: out is not finite in query heads "
                    f"{(~torch.isfinite(found)).flatten(1).any(1).nonzero().flatten().tolist()}"
                )
                difference = found - reference
                error = difference.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
                largest = difference.abs().amax((1, 2)) / reference.abs().amax((1, 2))
                measure = torch.maximum(error, largest / MAX_ABS_FACTOR) / tolerance
                self.worst = max(self.worst, float(measure.max()))
                assert bool((measure <= 1).all()), (
                    f"{where}: error of each query head {[f'{e:.1e}' for e in error.tolist()]}, largest "
                    f"element {[f'{e:.1e}' for e in largest.tolist()]}; tolerance {tolerance}"
                )
            if not plan.call.packed:  # rows behind a chunk, or all rows of an idle sequence
                behind = first + (chunk if b in expected else 0)
                rest = out[behind : first + plan.shape[1]]
                assert bool((rest == 0).all()), f"batch index {b}: rows behind the chunk are not 0"

    def _check_caches(self, plan: _Plan) -> None:
        layer = self.layer
        ignore = {id(b): np.zeros(b.nbytes, bool) for b in self.store.buffers}
        adopted: list[Place] = []
        for b in plan.active if layer.policy.comp_tokens else ():
            sequence = plan.batch[b][0]
            local = self._of(sequence).cache.local
            for head in range(len(layer.local)):
                assert local is not None
                places = self.store.comp(sequence, head)
                where = f"batch index {b}, local head {head}"
                k, v = (np.stack([p.floats() for p in x]) for x in (places.k, places.v))
                reference = local.comp[head].numpy()
                _close(f"{where}: mean keys", k, reference[:, 0], COMP_TOLERANCE)
                _close(f"{where}: mean values", v, reference[:, 1], COMP_TOLERANCE)
                _close(f"{where}: counts", places.count.floats(), local.comp_count[head].numpy(), 0)
                log_weight = local.comp_log_weight[head].numpy()
                _close(
                    f"{where}: log-weights", places.log_weight.floats(), log_weight, LOG_TOLERANCE
                )
                adopted += places.all()
        for place in adopted:
            place.adopt()
            ignore[id(place.buffer)][place.part] = True
        for buffer in self.store.buffers:
            buffer.check(ignore[id(buffer)])


class _Plan:
    """A call in numbers."""

    def __init__(self, rig: Rig, call: Call) -> None:
        layer, self.call = rig.layer, call
        self.batch = [*call.contexts, *call.generations]
        contexts, size = len(call.contexts), len(self.batch)
        self.active = [b for b, (_, chunk) in enumerate(self.batch) if chunk and b not in call.lies]
        past = [rig.n(s) for s, _ in self.batch]
        chunk = [c for _, c in self.batch]
        longest = max([c for _, c in call.contexts], default=1)
        max_chunk = max(1, longest) + (call.slack if contexts else 0)
        max_chunk = min(max_chunk, layer.n_max)
        if call.packed and contexts:
            max_chunk = min(max_chunk, sum(chunk[:contexts]))

        if call.packed:
            starts = np.cumsum([0, *chunk[:contexts]]).tolist()
            self.first_row = starts[:contexts] + [starts[-1] + i for i in range(size - contexts)]
            self.rows = starts[-1] + size - contexts
            self.shape: tuple[int, ...] = (self.rows,)
            context_rows = starts[-1]
        else:
            assert not (call.contexts and call.generations), "padded: contexts or generations"
            self.first_row = [b * max_chunk for b in range(size)]
            self.rows = size * max_chunk
            self.shape = (size, max_chunk)
            context_rows = self.rows if contexts else 0
        self.limits = Limits(
            max_batch=size,
            max_context_tokens=context_rows,
            max_chunk=max_chunk,
            max_past=min(max(past) + call.slack, layer.n_max),
        )

        heads, kv, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
        qkv = torch.full((self.rows, (heads + 2 * kv) * dim), torch.nan, dtype=layer.dtype)
        for b in self.active:
            tokens, part = rig._of(self.batch[b][0]).tokens, slice(past[b], past[b] + chunk[b])
            rows = torch.cat([x[:, part] for x in (tokens.q, tokens.k, tokens.v)])
            qkv[self.first_row[b] : self.first_row[b] + chunk[b]] = rows.transpose(0, 1).flatten(1)
        self.qkv = qkv.view(torch.int16).numpy()

        for b, (false_past, false_chunk) in call.lies.items():
            past[b], chunk[b] = false_past, false_chunk
        totals = [p + c for p, c in zip(past, chunk, strict=True)]
        self.lengths = np.array(totals if call.use_total else past, np.int32)
        self.chunks: np.ndarray | None = None
        if call.one_each:
            assert all(c == 1 for _, c in call.generations), "one_each: a token each"
            chunk[contexts:] = [_NONSENSE] * (size - contexts)
        if not (call.one_each and not contexts):
            self.chunks = np.array(chunk, np.int32)


def _close(what: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Infinities are equal, numbers within tolerance · (1 + |expected|)."""
    finite = np.isfinite(expected)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - np.where(finite, expected, 0)) / (
            1 + np.where(finite, abs(expected), 0)
        )
    wrong = np.where(finite, ~(error <= tolerance), found != expected)
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} differ, first at {np.argwhere(wrong)[0].tolist()}: found "
        f"{found[wrong][:4]}, expected {expected[wrong][:4]}"
    )


def check(
    kernels: RazorKernels,
    layer: Layer,
    calls: Sequence[Call] | Callable[[Rig], Iterable[Call]],
    seed: int = 0,
    twice: bool = False,
    store: Callable[[], Store] | None = None,
    slots: int = 4,
    loud: float = 1.0,
) -> Rig:
    """Run calls on fresh caches, with the first seed whose data has no ties.

    Args:
        calls: or what makes them for a Rig, as it goes.
        store: what makes the caches; contiguous unless given.
        twice, slots, loud: see Rig.
    """
    for attempt in range(10):
        rig = Rig(kernels, layer, store() if store else None, slots, seed + 7919 * attempt, loud)
        try:
            rig.run(calls(rig) if callable(calls) else calls, twice)
        except TieError:
            continue
        return rig
    raise AssertionError(f"{layer}: no data without ties in 10 attempts")
