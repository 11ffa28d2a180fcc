"""Selection by measured effect: how much harder an answer gets when one KV head becomes local.

Two estimators of the same number, the growth of the loss on the answer's tokens (nats a token):

* :func:`ablation_effect`: the answer is computed once for every KV head, with that head local;
* :func:`gradient_effect`: a gate a_h in 0..1 for every KV head mixes what its queries get from the
  full and from the local cache, and the score is -d loss / d a_h, at a = 1 or averaged over
  several a on the way from all local to all full (integrated gradients along that diagonal:
  their sum over heads is then the loss of all local heads less that of dense attention). One
  backward pass whatever the number of heads.

Contexts are read with dense attention; only what the answer sees differs. Memory is linear in n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trt_razor.heads.answers import AnswerProbe
from trt_razor.heads.layer_memo import LayerMemo
from trt_razor.heads.scores import causal_attention
from trt_razor.models.checkpoint import WeightSource
from trt_razor.policy import RazorPolicy
from trt_razor.reference.attention import CachedRows
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
                k, v, contexts[i] = _read(decoder, layer, contexts[i], scale)
                full, local = _rows(k, v, policy, dtype)
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
    spec, scale = checkpoint.spec, checkpoint.spec.head_dim**-0.5
    decoder = ReferenceDecoder(checkpoint, dtype, device)
    out = np.zeros((len(probes), spec.num_layers, spec.num_kv_heads))
    places = [1.0] if points == 1 else [(p + 0.5) / points for p in range(points)]
    for i, probe in enumerate(probes):
        kept = []
        with torch.no_grad():
            x = decoder.embed(_tensor(probe.context, decoder))
            for layer in range(spec.num_layers):
                k, v, x = _read(decoder, layer, x, scale)
                kept.append(_rows(k, v, policy, dtype))
                if step is not None:
                    step()
        for place in places:
            out[i] += _gate_gradient(decoder, probe, kept, place, scale) / len(places)
    return out


def _gate_gradient(
    decoder: ReferenceDecoder,
    probe: AnswerProbe,
    kept: Sequence[tuple[CachedRows, CachedRows]],
    place: float,
    scale: float,
) -> np.ndarray:
    """-d loss / d gate at gates = place, [layers, KV heads].

    Forward without a graph, keeping the residual stream between layers; then backward layer by
    layer, each computed once more: one layer's graph is in memory at a time.
    """
    spec = decoder.spec

    def run(layer: int, x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = _project(decoder, layer, x, len(probe.context))
        full, local = (_attend(q, rows, k, v, scale) for rows in kept[layer])
        wide = gate[:, None, None, None, None]
        return _finish(decoder, layer, x, wide * full + (1 - wide) * local)

    gate = torch.full((spec.num_kv_heads,), place, dtype=decoder.dtype, device=decoder.device)
    with torch.no_grad():
        states = [decoder.embed(_tensor(probe.chunk[:-1], decoder))[None]]
        for layer in range(spec.num_layers):
            states.append(run(layer, states[-1], gate))
    with torch.enable_grad():
        last = states.pop().detach().requires_grad_()
        (slope,) = torch.autograd.grad(_loss(decoder, last[0], probe), last)
        gradient = np.zeros((spec.num_layers, spec.num_kv_heads))
        for layer in reversed(range(spec.num_layers)):
            x = states.pop().detach().requires_grad_()
            mine = gate.clone().requires_grad_()
            slope, by_gate = torch.autograd.grad(run(layer, x, mine), (x, mine), slope)
            gradient[layer] = -by_gate.double().cpu().numpy()
    return gradient


# Pieces ---------------------------------------------------------------------------------------
def _tensor(tokens: np.ndarray, decoder: ReferenceDecoder) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens)).to(decoder.device)


def _read(
    decoder: ReferenceDecoder, layer: int, x: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A context goes through a layer with dense attention: its k, v [Hkv, n, D], the next x."""
    q, k, v = decoder.qkv(layer, x, torch.arange(len(x), device=x.device))
    if layer + 1 == decoder.spec.num_layers:
        return k, v, x  # nothing reads what would come out
    return k, v, decoder.finish(layer, x, causal_attention(q, k, v, scale)[0].to(x.dtype))


def _rows(
    k: Tensor, v: Tensor, policy: RazorPolicy, dtype: torch.dtype
) -> tuple[CachedRows, CachedRows]:
    """What a full and what a local head keep of a context: k, v [Hkv, n, D]."""
    heads, n, dim = k.shape
    position = torch.arange(n, device=k.device, dtype=torch.float64)
    full = CachedRows(k, v, k.new_zeros(heads, n), position)
    local = LocalHeadsCache(policy, heads, dim, n, dtype, k.device)
    local.update(k, v)
    return full, local.rows()


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


def _loss(decoder: ReferenceDecoder, x: Tensor, probe: AnswerProbe) -> Tensor:
    """Mean loss of the answer's tokens, nats. x: [S, hidden] behind the last layer."""
    logits = decoder.logits(x[probe.first - 1 :])
    return torch.nn.functional.cross_entropy(logits, _tensor(probe.answer, decoder))


def _losses(decoder: ReferenceDecoder, x: Tensor, probe: AnswerProbe) -> np.ndarray[Any, Any]:
    """:func:`_loss` of every variant, x [V, S, hidden] → float64 [V]."""
    return np.array([float(_loss(decoder, one, probe)) for one in x])
