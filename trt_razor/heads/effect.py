"""Selection by measured effect: how much harder an answer gets when one KV head becomes local.

Two estimators of the same number, the growth of the loss on the answer's tokens (nats a token):

* :func:`ablation_effect`: the answer is computed once for every KV head, with that head local;
* :func:`gradient_effect`: a gate a_h in 0..1 for every KV head mixes what its queries get from the
  full and from the local cache, and the score is -d loss / d a_h, at a = 1 or averaged over
  several a on the way from all local to all full (integrated gradients along that diagonal:
  their sum over heads is then the loss of all local heads less that of dense attention). One
  backward pass whatever the number of heads.

Contexts are read with dense attention; only what the answer sees differs. Memory is linear in n.
:class:`GatedContext` is one context with its gates, for :mod:`trt_razor.heads.greedy` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trt_razor.heads.answers import AnswerProbe
from trt_razor.heads.layer_memo import LayerMemo
from trt_razor.heads.scores import causal_attention
from trt_razor.models.checkpoint import WeightSource
from trt_razor.policy import SELECT_QUERIES, RazorPolicy
from trt_razor.reference.attention import CachedRows, group_queries
from trt_razor.reference.cache import LocalHeadsCache
from trt_razor.reference.decoder import ReferenceDecoder

SLAB_BYTES = 32 << 20
"""About the size of one temporary of attention logits, and of output logits."""

Step = Callable[[], None]


def ablation_effect(
    checkpoint: WeightSource,
    probes: Sequence[AnswerProbe],
    policy: RazorPolicy,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    step: Step | None = None,
) -> np.ndarray:
    """Growth of the answer's loss if one KV head is local, float64 [probes, layers, KV heads].

    All probes go through a layer before the next one is read, so the model may be larger than
    memory. The answer's states fan out: behind layer l there is the dense one and one for each
    head up to l, [1 + heads, S, hidden] a probe.

    Args:
        policy: what a local head keeps of the context.
        step: called after every probe of every layer.
    """
    spec, scale = checkpoint.spec, checkpoint.spec.head_dim**-0.5
    decoder = ReferenceDecoder(LayerMemo(checkpoint), dtype, device, keep_weights=False)
    with torch.inference_mode():
        contexts = [decoder.embed(_tensor(p.context, decoder)) for p in probes]
        answers = [decoder.embed(_tensor(p.chunk[:-1], decoder))[None] for p in probes]
        for layer in range(spec.num_layers):
            for i, probe in enumerate(probes):
                read, contexts[i] = _read(decoder, layer, contexts[i], scale)
                full, local = _full(read, dtype), _local(read, policy, dtype, scale)
                x = answers[i]
                q, k, v = _project(decoder, layer, x, len(probe.context))
                out = _attend(q, full, k, v, scale)
                alone = _attend(q[:, :, :1], local, k[:, :1], v[:, :1], scale)
                # One more variant for each KV head here: the dense one with that head local.
                fanned = out[:, :, :1].repeat(1, 1, spec.num_kv_heads, 1, 1)
                for h in range(spec.num_kv_heads):
                    fanned[h, :, h] = alone[h, :, 0]
                out = torch.cat([out, fanned], dim=2)
                x = torch.cat([x, x[:1].expand(spec.num_kv_heads, -1, -1)])
                answers[i] = _finish(decoder, layer, x, out)
                if step is not None:
                    step()
        losses = [_losses(decoder, x, p) for x, p in zip(answers, probes, strict=True)]
    shape = (spec.num_layers, spec.num_kv_heads)
    return np.stack([(loss[1:] - loss[0]).reshape(shape) for loss in losses])


def gradient_effect(
    checkpoint: WeightSource,
    probes: Sequence[AnswerProbe],
    policy: RazorPolicy,
    points: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    step: Step | None = None,
) -> np.ndarray:
    """-d loss / d gate of every KV head, float64 [probes, layers, KV heads].

    The weights are held (float32 or float64), and the keys and values of one context.

    Args:
        points: 1 = the gradient at a = 1, where attention is dense. More: the mean over so many a,
            the midpoints of equal pieces of 0..1; all gates move together.
        policy, step: as in :func:`ablation_effect`.
    """
    spec = checkpoint.spec
    decoder = ReferenceDecoder(checkpoint, dtype, device)
    shape = (spec.num_layers, spec.num_kv_heads)
    out = np.zeros((len(probes), *shape))
    places = [1.0] if points == 1 else [(p + 0.5) / points for p in range(points)]
    for i, probe in enumerate(probes):
        context = GatedContext(decoder, probe.context, policy, step=step)
        for place in places:
            out[i] += context.slope(probe, np.full(shape, place))[1] / len(places)
    return out


class GatedContext:
    """A context that was read with dense attention, and answers about it at any gates.

    Holds every layer's keys and values, in ``read_dtype``, and what local heads keep of them.

    Args:
        decoder: keeps its weights; answers are computed in its dtype.
        context: int64 [n].
        policy: what a local head keeps.
        read_dtype: of the context's matrix products, e.g. torch.bfloat16 where that is fast; None =
            the decoder's dtype.
        step: called after every layer.
    """

    def __init__(
        self,
        decoder: ReferenceDecoder,
        context: np.ndarray,
        policy: RazorPolicy,
        read_dtype: torch.dtype | None = None,
        step: Step | None = None,
    ) -> None:
        self._decoder = decoder
        self._scale = scale = decoder.spec.head_dim**-0.5
        self._kept: list[tuple[_ReadRows, CachedRows]] = []
        narrow = read_dtype is not None and read_dtype != decoder.dtype
        with torch.no_grad():
            x = decoder.embed(_tensor(context, decoder))
            for layer in range(decoder.spec.num_layers):
                # The residual stream, norms and softmax stay in the decoder's dtype.
                with torch.autocast(decoder.device.type, read_dtype, enabled=narrow):
                    read, x = _read(decoder, layer, x, scale)
                if narrow:
                    read = _ReadRows(read.k.to(read_dtype), read.v.to(read_dtype), read.queries)
                local = _local(read, policy, decoder.dtype, scale)
                self._kept.append((_ReadRows(read.k, read.v, None), local))
                if step is not None:
                    step()

    def predicted(self, probe: AnswerProbe, gates: np.ndarray | None = None) -> Tensor:
        """Log probabilities of the answer's tokens, [A, vocab].

        Args:
            gates: [layers, KV heads], 1 full, 0 local; None = all full, which is dense attention.
        """
        spec = self._decoder.spec
        at = np.ones((spec.num_layers, spec.num_kv_heads)) if gates is None else gates
        with torch.no_grad():
            x = self._forward(probe, self._gates(at))[-1]
            return _log_probs(self._decoder, x[0], probe)

    def loss(self, probe: AnswerProbe, gates: np.ndarray, dense: Tensor | None = None) -> float:
        """Mean loss of the answer's tokens, nats; see :meth:`slope`."""
        return float(_loss(self.predicted(probe, gates), probe, dense))

    def slope(
        self, probe: AnswerProbe, gates: np.ndarray, dense: Tensor | None = None
    ) -> tuple[float, np.ndarray]:
        """The loss and -d loss / d gate at these gates, float64 [layers, KV heads].

        Args:
            gates: [layers, KV heads], 1 full, 0 local.
            dense: ``predicted`` by dense attention: the loss is KL(dense ‖ these gates). None: the
                loss is the negative log likelihood of the answer.

        Forward without a graph, keeping the residual stream between layers; then backward layer by
        layer, each computed once more: one layer's graph is in memory at a time.
        """
        decoder, at = self._decoder, self._gates(gates)
        with torch.no_grad():
            states = self._forward(probe, at)
        with torch.enable_grad():
            last = states.pop().detach().requires_grad_()
            loss = _loss(_log_probs(decoder, last[0], probe), probe, dense)
            (slope,) = torch.autograd.grad(loss, last)
            gradient = np.zeros(gates.shape)
            for layer in reversed(range(decoder.spec.num_layers)):
                x = states.pop().detach().requires_grad_()
                mine = at[layer].clone().requires_grad_()
                out = self._layer(probe, layer, x, mine)
                slope, by_gate = torch.autograd.grad(out, (x, mine), slope)
                gradient[layer] = -by_gate.double().cpu().numpy()
        return float(loss.detach()), gradient

    def _gates(self, gates: np.ndarray) -> Tensor:
        return torch.from_numpy(gates).to(self._decoder.device, self._decoder.dtype)

    def _forward(self, probe: AnswerProbe, gates: Tensor) -> list[Tensor]:
        """The residual stream before every layer and behind the last one, [1, S, hidden]."""
        states = [self._decoder.embed(_tensor(probe.chunk[:-1], self._decoder))[None]]
        for layer in range(self._decoder.spec.num_layers):
            states.append(self._layer(probe, layer, states[-1], gates[layer]))
        return states

    def _layer(self, probe: AnswerProbe, layer: int, x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = _project(self._decoder, layer, x, len(probe.context))
        read, local = self._kept[layer]
        far = _attend(q, _full(read, self._decoder.dtype), k, v, self._scale)
        near = _attend(q, local, k, v, self._scale)
        wide = gate[:, None, None, None, None]
        return _finish(self._decoder, layer, x, wide * far + (1 - wide) * near)


# Pieces ---------------------------------------------------------------------------------------
def _tensor(tokens: np.ndarray, decoder: ReferenceDecoder) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens)).to(decoder.device)


@dataclass(frozen=True)
class _ReadRows:
    """A layer of a context: k, v [Hkv, n, D], and its last queries [Hkv, g, W, D]."""

    k: Tensor
    v: Tensor
    queries: Tensor | None


def _read(
    decoder: ReferenceDecoder, layer: int, x: Tensor, scale: float
) -> tuple[_ReadRows, Tensor]:
    """A context goes through a layer with dense attention: its rows, the next x."""
    q, k, v = decoder.qkv(layer, x, torch.arange(len(x), device=x.device))
    rows = _ReadRows(k, v, group_queries(q[:, -SELECT_QUERIES:], len(k)))
    if layer + 1 == decoder.spec.num_layers:
        return rows, x  # nothing reads what would come out
    return rows, decoder.finish(layer, x, causal_attention(q, k, v, scale)[0].to(x.dtype))


def _full(read: _ReadRows, dtype: torch.dtype) -> CachedRows:
    """What a full head keeps of a context."""
    heads, n, _ = read.k.shape
    position = torch.arange(n, device=read.k.device, dtype=torch.float64)
    k, v = read.k.to(dtype), read.v.to(dtype)
    return CachedRows(k, v, k.new_zeros(heads, n), position)


def _local(read: _ReadRows, policy: RazorPolicy, dtype: torch.dtype, scale: float) -> CachedRows:
    """What a local head keeps of a context, which comes as one chunk."""
    heads, n, dim = read.k.shape
    local = LocalHeadsCache(policy, heads, dim, n, dtype, read.k.device, scale=scale)
    queries = None if read.queries is None else read.queries.to(dtype)
    local.update(read.k.to(dtype), read.v.to(dtype), queries)
    return local.rows()


def _project(
    decoder: ReferenceDecoder, layer: int, x: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Variants of a chunk, x [V, S, hidden] → q [Hkv, g, V, S, D], k and v [Hkv, V, S, D]."""
    variants, tokens, _ = x.shape
    positions = torch.arange(start, start + tokens, device=x.device).repeat(variants)
    q, k, v = (
        y.unflatten(1, (variants, tokens)) for y in decoder.qkv(layer, x.flatten(0, 1), positions)
    )
    return q.unflatten(0, (decoder.spec.num_kv_heads, -1)), k, v


def _attend(q: Tensor, past: CachedRows, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every variant sees the same past rows, and its own chunk causally.

    Args:
        q: [Hkv, g, V, S, D]. k, v: [Hkv, V, S, D].

    Returns:
        [Hkv, g, V, S, D].
    """
    heads, group, variants, tokens, _ = q.shape
    rows = past.k.shape[1]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    at_once = max(1, SLAB_BYTES // (group * tokens * (rows + tokens) * q.element_size()))
    out = []
    for h in range(heads):
        parts = []
        for first in range(0, variants, at_once):
            mine = slice(first, first + at_once)
            queries = q[h, :, mine] * scale  # [g, V', S, D]
            there = queries @ past.k[h].T + past.log_weight[h]
            own = (queries @ k[h, mine].mT).masked_fill(future, -torch.inf)
            weights = torch.cat([there, own], dim=-1).softmax(-1)
            parts.append(weights[..., :rows] @ past.v[h] + weights[..., rows:] @ v[h, mine])
        out.append(torch.cat(parts, dim=1))
    return torch.stack(out)


def _finish(decoder: ReferenceDecoder, layer: int, x: Tensor, out: Tensor) -> Tensor:
    """x [V, S, hidden] and attention [Hkv, g, V, S, D] → the residual stream behind the layer."""
    flat: Tensor = decoder.finish(layer, x.flatten(0, 1), out.flatten(0, 1).flatten(1, 2))
    return flat.view_as(x)


def _log_probs(decoder: ReferenceDecoder, x: Tensor, probe: AnswerProbe) -> Tensor:
    """Of the answer's tokens, [A, vocab]. x: [S, hidden] behind the last layer."""
    return decoder.logits(x[probe.first - 1 :]).log_softmax(-1)


def _loss(log_probs: Tensor, probe: AnswerProbe, dense: Tensor | None) -> Tensor:
    """Mean over the answer's tokens, nats: KL(dense ‖ ·), or without ``dense`` -ln p."""
    if dense is not None:
        terms = dense.exp() * (dense - log_probs)
        # A token that dense attention excludes (-inf: a padded vocabulary) counts for nothing.
        return terms.masked_fill(dense == -torch.inf, 0).sum(-1).mean()
    answer = torch.from_numpy(np.ascontiguousarray(probe.answer)).to(log_probs.device)
    return torch.nn.functional.nll_loss(log_probs, answer)


def _losses(decoder: ReferenceDecoder, x: Tensor, probe: AnswerProbe) -> np.ndarray[Any, Any]:
    """:func:`_loss` of every variant, x [V, S, hidden] → float64 [V]."""
    return np.array([float(_loss(_log_probs(decoder, one, probe), probe, None)) for one in x])
