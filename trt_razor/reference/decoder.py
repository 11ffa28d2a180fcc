"""A decoder-only model in plain PyTorch over the reference cache: the oracle of engines.

Architectures: llama, mistral, qwen2, qwen3, baichuan (``ModelSpec``). One sequence at a time,
float32 or float64, no tricks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trt_razor.errors import RazorError, UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import WeightSource
from trt_razor.models.positions import rope_table
from trt_razor.policy import RazorPolicy
from trt_razor.reference.attention import rotate
from trt_razor.reference.cache import LayerCache, new_layer_caches

MLP_ROWS = 2048
"""Rows of the MLP computed at once: its inner activations are several times the residual's."""


class ReferenceDecoder:
    """The model of a checkpoint, layer by layer.

    Args:
        checkpoint: gives ``spec`` and ``tensor(name)``.
        dtype: of all arithmetic, torch.float32 or torch.float64.
        device: where weights and activations live.
        keep_weights: hold every converted weight after its first use. False reads each one when
            it is needed and drops it: a model larger than memory can still be run.

    Raises:
        UsageError: another dtype.
    """

    def __init__(
        self,
        checkpoint: WeightSource,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        keep_weights: bool = True,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"dtype: expected float32 or float64, found {dtype}")
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.device = torch.device(device)
        self.keep_weights = keep_weights
        self._shapes = self.spec.tensors()
        self._weights: dict[str, Tensor] = {}
        self._cos_sin = torch.empty(0, self.spec.head_dim, dtype=dtype, device=self.device)

    # Pieces of a layer ------------------------------------------------------------------------
    @torch.no_grad()
    def embed(self, tokens: Sequence[int] | Tensor) -> Tensor:
        """Token ids [S] → [S, hidden]. Raises UsageError for an id outside the vocabulary."""
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.device)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.spec.vocab_size:
            raise UsageError(
                f"tokens: expected ids 0..{self.spec.vocab_size - 1}, "
                f"found {int(ids.min())}..{int(ids.max())}"
            )
        name = "model.embed_tokens.weight"
        if self.keep_weights:
            return self._weight(name)[ids]
        return self._convert(self._raw(name)[ids.cpu().numpy()])  # no need to convert them all

    def qkv(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer, ready for attention.

        Input norm, projections, biases, QK-norm (qwen3), RoPE at ``positions``.

        Args:
            x: [S, hidden] residual stream before the layer.
            positions: [S] int64 absolute positions.

        Returns:
            q [Hq, S, D], k [Hkv, S, D], v [Hkv, S, D].
        """
        spec, prefix = self.spec, f"model.layers.{layer}.self_attn."
        x = self._norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            self._linear(x, f"{prefix}{name}_proj", spec.qkv_bias)
            .unflatten(-1, (-1, spec.head_dim))
            .transpose(0, 1)
            for name in "qkv"
        )
        if spec.qk_norm:
            q = self._norm(q, prefix + "q_norm.weight")
            k = self._norm(k, prefix + "k_norm.weight")
        if spec.position == "rope":
            cos_sin = self._cos_sin_rows(positions)
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        return q, k, v

    def finish(self, layer: int, x: Tensor, attention: Tensor) -> Tensor:
        """The rest of a layer: output projection, residual, MLP (SwiGLU), residual.

        Args:
            x: [S, hidden] residual stream before the layer.
            attention: [Hq, S, D] outputs of its attention.

        Returns:
            [S, hidden] residual stream after the layer.
        """
        spec, prefix = self.spec, f"model.layers.{layer}."
        heads = attention.to(self.dtype).transpose(0, 1).flatten(1)
        x = x + self._linear(heads, prefix + "self_attn.o_proj", spec.o_bias)
        normed = self._norm(x, prefix + "post_attention_layernorm.weight")
        gate, up, down = (
            (
                self._weight(f"{prefix}mlp.{name}_proj.weight"),
                self._weight(f"{prefix}mlp.{name}_proj.bias") if spec.mlp_bias else None,
            )
            for name in ("gate", "up", "down")
        )
        parts = [
            F.linear(F.silu(F.linear(rows, *gate)) * F.linear(rows, *up), *down)
            for rows in normed.split(MLP_ROWS)
        ]
        return x + torch.cat(parts)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output projection: [S, hidden] → [S, vocab]."""
        x = self._norm(x, "model.norm.weight")
        tied = self.spec.tie_embeddings
        return F.linear(x, self._weight("model.embed_tokens.weight" if tied else "lm_head.weight"))

    # Whole model ------------------------------------------------------------------------------
    def new_cache(
        self,
        policy: RazorPolicy | None = None,
        head_map: HeadMap | None = None,
        n_max: int | None = None,
    ) -> list[LayerCache]:
        """An empty cache for one sequence of up to ``n_max`` tokens (the model's, unless given).

        ``head_map = None`` is dense attention; then the policy plays no part.

        Raises:
            UsageError: a head map without a policy or of another model, or ALiBi with M > 1.
        """
        if head_map is not None and policy is None:
            raise UsageError(
                "policy: missing; a head map says which heads, a policy what they keep"
            )
        return new_layer_caches(
            self.spec,
            policy or RazorPolicy(),
            head_map,
            self.spec.max_positions if n_max is None else n_max,
            self.dtype,
            self.device,
        )

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[int] | Tensor, cache: list[LayerCache], last_only: bool = False
    ) -> Tensor:
        """One chunk: attends, updates the cache, returns logits [S, vocab] (or [1, vocab]).

        Args:
            tokens: [S] ids that follow the ``cache[0].n`` tokens of the cache, S >= 1.
            last_only: logits of the last row alone.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, or a cache of another depth.
            RazorError: the sequence would grow past the cache's ``n_max``.
        """
        if len(cache) != self.spec.num_layers:
            raise UsageError(f"cache: expected {self.spec.num_layers} layers, found {len(cache)}")
        if len(tokens) == 0:
            raise UsageError("tokens: expected at least 1, found 0")
        x = self.embed(tokens)
        start = cache[0].n
        positions = torch.arange(start, start + len(x), device=self.device)
        for layer, layer_cache in enumerate(cache):
            q, k, v = self.qkv(layer, x, positions)
            x = self.finish(layer, x, layer_cache.attend(q, k, v))
        return self.logits(x[-1:] if last_only else x)

    def prefill(
        self,
        tokens: Sequence[int] | Tensor,
        cache: list[LayerCache],
        chunk: int | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Run a prompt through :meth:`forward` whole (``chunk=None``, the paper) or in chunks.

        Returns:
            logits of all rows [S, vocab], or of the last one [1, vocab].

        Raises:
            UsageError: chunk < 1; see :meth:`forward` for the rest.
        """
        size = len(tokens) if chunk is None else chunk
        if chunk is not None and chunk < 1:
            raise UsageError(f"chunk: expected >= 1 token, found {chunk}")
        if len(tokens) == 0:
            raise UsageError("tokens: expected at least 1, found 0")
        rows = [
            self.forward(tokens[start : start + size], cache, last_only)
            for start in range(0, len(tokens), size)
        ]
        return rows[-1] if last_only else torch.cat(rows)

    # Weights ----------------------------------------------------------------------------------
    def _raw(self, name: str) -> np.ndarray[Any, Any]:
        array = self.checkpoint.tensor(name)
        if array.shape != self._shapes[name]:
            raise RazorError(
                f"{self.spec.name}: {name}: expected shape {list(self._shapes[name])}, "
                f"found {list(array.shape)}"
            )
        return array

    def _convert(self, array: np.ndarray[Any, Any]) -> Tensor:
        if array.dtype.name == "bfloat16":  # NumPy has no bfloat16 of its own: pass the bits
            bits = np.ascontiguousarray(array).view(np.int16)
            return torch.tensor(bits).view(torch.bfloat16).to(self.device, self.dtype)
        return torch.tensor(array).to(self.device, self.dtype)

    def _weight(self, name: str) -> Tensor:
        if name in self._weights:
            return self._weights[name]
        weight = self._convert(self._raw(name))
        if self.keep_weights:
            self._weights[name] = weight
        return weight

    # Arithmetic -------------------------------------------------------------------------------
    def _linear(self, x: Tensor, name: str, bias: bool) -> Tensor:
        return F.linear(
            x, self._weight(name + ".weight"), self._weight(name + ".bias") if bias else None
        )

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm over the last dimension."""
        mean_square = x.square().mean(-1, keepdim=True)
        return self._weight(name) * (x * torch.rsqrt(mean_square + self.spec.rms_norm_eps))

    def _cos_sin_rows(self, positions: Tensor) -> Tensor:
        need = int(positions.max()) + 1 if len(positions) else 0
        if need > len(self._cos_sin):  # grow in powers of two: decoding asks for one more a step
            table = rope_table(self.spec, max(256, 1 << (need - 1).bit_length()))
            self._cos_sin = torch.from_numpy(table).to(self.device, self.dtype)
        return self._cos_sin[positions]
