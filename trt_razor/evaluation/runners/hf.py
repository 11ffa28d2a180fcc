"""The runner of every method: a transformers model, its attention replaced from outside.

A context is read with the model's own full attention. What a method makes of it is then carried by
Razor's attention interface (``reference.hf``), whatever the method, so that methods differ by what
they keep and by nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trt_razor.errors import UsageError
from trt_razor.evaluation.methods.interface import RECENT_QUERIES, Kept, Method, Read, ReadLayer
from trt_razor.evaluation.methods.kept import row_bits
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.policy import RazorPolicy
from trt_razor.reference import hf
from trt_razor.reference.hf.cache import RazorCache
from trt_razor.reference.hf.load import fingerprint_of

READ = "trt_razor_read"
"""``attn_implementation`` of a model that reads contexts: transformers' sdpa, queries recorded."""

_RECORDER = "_trt_razor_recorder"


class HfRunner:
    """Reads with one model, goes on with the same one or a copy of another precision.

    Args:
        model: of transformers, in eval mode (``reference.hf.load``); it has Razor's attention from
            now on, until ``close``.
        tokenizer: of the model.
        name: for reports; the model's own name unless given.
        read_dtype: of the copy that reads contexts, e.g. torch.bfloat16, which is faster; None reads
            with the model itself.

    Attributes:
        label: name and dtypes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        name: str | None = None,
        read_dtype: torch.dtype | None = None,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        self.tokenizer = tokenizer
        self.name = name or str(model.config.name_or_path or config.model_type)
        self.fingerprint = fingerprint_of(config, self.name)
        self.model, self.dtype = model, model.dtype
        self.label = f"{self.name}, transformers, {_text(self.dtype)}"
        if read_dtype not in (None, self.dtype):
            self.label += f" (contexts read in {_text(read_dtype)})"
        _register()
        # A second set of modules: attention is chosen by a model's configuration. The weights
        # themselves are shared unless they are of another precision.
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._reader = copy.deepcopy(model, shared)
        if read_dtype not in (None, self.dtype):
            self._reader = copy.deepcopy(model).to(read_dtype)
        self._reader.set_attn_implementation(READ)
        # Kernels compute LayerCaches only; every method must be computed alike.
        self.razor = hf.enable(model, None, RazorPolicy(), kernels=False)

    def read(self, tokens: Sequence[int], all_queries: bool = False) -> HfContext:
        """Full attention over a context, in one chunk.

        Args:
            tokens: its ids, at least 1.
            all_queries: record every query, for methods whose ``queries`` is "all".

        Raises:
            UsageError: no tokens, or an id outside the vocabulary.
        """
        layers = [_ReadLayer(all_queries) for _ in range(self.razor.plan.num_layers)]
        return HfContext(self, layers).extended(tokens)

    def close(self) -> None:
        """Give the model its own attention back."""
        self.razor.disable()

    def ids(self, tokens: Sequence[int]) -> Tensor:
        """[1, S] on the model's device. Raises UsageError for none, or for ids it does not have."""
        vocabulary = int(self.model.get_input_embeddings().num_embeddings)
        if len(tokens) == 0:
            raise UsageError("tokens: expected at least 1, found 0")
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise UsageError(
                f"tokens: expected ids 0..{vocabulary - 1}, found {int(ids.min())}.."
                f"{int(ids.max())}"
            )
        return ids[None].to(self.model.device)

    @torch.no_grad()
    def _run_reader(self, tokens: Sequence[int], layers: list[_ReadLayer]) -> None:
        # The decoder alone: nobody asks for the logits of a context.
        decoder = self._reader.get_decoder()
        decoder(self.ids(tokens), past_key_values=Cache(layers=layers), use_cache=True)


class HfContext:
    """A context that was read.

    Attributes:
        read: what methods get.
    """

    def __init__(self, runner: HfRunner, layers: list[_ReadLayer]) -> None:
        self.runner, self._layers = runner, layers
        self._read: Read | None = None

    @property
    def read(self) -> Read:
        if self._read is None:
            runner = self.runner
            layers = [x.done(runner.dtype) for x in self._layers]
            self._read = Read(runner.name, runner.fingerprint, layers)
        return self._read

    @torch.no_grad()
    def compress(self, method: Method) -> HfSession:
        """See ``Context.compress``.

        Raises:
            UsageError: the method needs all queries and only the last ones were recorded, or it
                cannot be used here (a budget that is too small ...).
        """
        layer = self.read.layers[0]
        if method.queries == "all" and layer.queries.shape[1] < layer.n:
            raise UsageError(
                f"{method.name}: needs the queries of all {layer.n} tokens, found the last "
                f"{layer.queries.shape[1]}; read the context with all_queries=True"
            )
        return HfSession(self.runner, method.compress(self.read))

    def extended(self, tokens: Sequence[int]) -> HfContext:
        """See ``Context.extended``."""
        layers = [x.fork() for x in self._layers]
        self.runner._run_reader(tokens, layers)
        return HfContext(self.runner, layers)


class HfSession:
    """A context under one method, to be continued.

    Attributes:
        kept: what each layer keeps.
    """

    def __init__(self, runner: HfRunner, kept: Sequence[Kept]) -> None:
        self.runner, self.kept = runner, list(kept)
        self._cache: RazorCache = runner.razor.cache_of(self.kept)

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        """See ``Session.feed``. Raises UsageError for no tokens or ids out of range."""
        ids = self.runner.ids(tokens)
        out = self.runner.model(ids, past_key_values=self._cache, use_cache=True)
        logits: np.ndarray[Any, Any] = out.logits[0].float().cpu().numpy()
        return logits

    def fork(self) -> HfSession:
        """See ``Session.fork``."""
        return HfSession(self.runner, [kept.fork() for kept in self.kept])

    def kv_ratio(self) -> float:
        """See ``Session.kv_ratio``."""
        plan, config = self.runner.razor.plan, self.runner.model.config
        config = config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        dense = self.kept[0].n * plan.num_kv_heads * row_bits(dim) * plan.num_layers
        return sum(kept.bits() for kept in self.kept) / dense


class _ReadLayer(DynamicLayer):
    """A layer of transformers' own cache that remembers queries as well."""

    def __init__(self, all_queries: bool) -> None:
        super().__init__()
        self.all_queries = all_queries
        self.queries: Tensor | None = None
        self.scale = 0.0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = super().update(*args, **kwargs)
        # The attention function gets the keys; it is to find this layer by them. A new object of
        # the same memory: no cycle of references keeps a context alive.
        marked = k.view_as(k)
        setattr(marked, _RECORDER, self)
        return marked, v

    def record(self, q: Tensor, scale: float) -> None:
        """q [1, Hq, S, D] of the newest tokens."""
        new = q[0] if self.queries is None else torch.cat([self.queries, q[0]], dim=1)
        if not self.all_queries:
            new = new[:, -RECENT_QUERIES:]
        self.queries, self.scale = new.contiguous(), scale

    def fork(self) -> _ReadLayer:
        """An equal layer: its tensors are never written to, so they are shared."""
        return copy.copy(self)

    def done(self, dtype: torch.dtype) -> ReadLayer:
        assert self.queries is not None
        k, v = (t[0].to(dtype).contiguous() for t in (self.keys, self.values))
        return ReadLayer(k, v, self.queries, self.scale)


def _read_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """transformers' sdpa, after the layer of the cache has seen the queries."""
    recorder: _ReadLayer = getattr(key, _RECORDER)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    recorder.record(query, scale)
    out: tuple[Tensor, Any] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out


def _register() -> None:
    AttentionInterface.register(READ, _read_attention)
    AttentionMaskInterface.register(READ, sdpa_mask)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
