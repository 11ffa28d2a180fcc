"""Switching Razor on for a model that is already loaded, and off again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.kernels import RazorKernels
from trt_razor.policy import RazorPolicy
from trt_razor.reference.hf import attention
from trt_razor.reference.hf.cache import KvBytes, RazorCache, Row
from trt_razor.reference.hf.gpu import KernelChoice
from trt_razor.reference.hf.load import fingerprint_of
from trt_razor.reference.hf.plan import Plan

Heads = HeadMap | Sequence[Sequence[int]]
"""Retrieval heads, with or without their history."""

_LAYER_TYPES = ("full_attention", "sliding_attention")
_HANDLE = "_trt_razor"


class Razor:
    """Razor, switched on for a model by :func:`enable`. As a context manager it ends with the block.

    Attributes:
        model: the model.
        plan: heads and policy of its caches.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        self.model, self.plan = model, plan
        decoder = _decoder(model)
        self._before: str = decoder.config._attn_implementation
        self._names = list(inspect.signature(decoder.forward).parameters)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        if decoder.config._attn_implementation != attention.NAME:
            model.set_attn_implementation(self._before)
            raise UsageError(
                f"{plan.model}: {type(model).__name__} does not call transformers' attention "
                f"interface; Razor cannot be put in"
            )
        self._hook: Any = decoder.register_forward_pre_hook(self._prepare, with_kwargs=True)
        setattr(model, _HANDLE, self)

    def new_cache(self, n_max: int | None = None) -> RazorCache:
        """An empty cache, for ``past_key_values``.

        Args:
            n_max: longest sequence in tokens, allocated at once; None grows with the tokens.
        """
        return RazorCache(self.plan, n_max)

    def cache_of(self, rows: Sequence[Row]) -> RazorCache:
        """A cache of one sequence that is there already: what each layer keeps of it.

        ``LayerCache`` is one such row; another kind (a baseline's) joins in attention all the same,
        but has no ``kv_bytes``, and no kernels.

        Raises:
            UsageError: not one row a layer, or rows that have seen different numbers of tokens.
        """
        return RazorCache.of_rows(self.plan, rows)

    def kv_bytes(self, cache: Cache) -> KvBytes:
        """Bytes of a cache: allocated, needed, and what dense attention would hold.

        Raises:
            UsageError: it is not a Razor cache.
        """
        if not isinstance(cache, RazorCache):
            raise UsageError(f"cache: expected a RazorCache, found {type(cache).__name__}")
        return cache.kv_bytes()

    def disable(self) -> None:
        """Give the model its attention back. Caches made so far are of no use to it then."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.model.set_attn_implementation(self._before)
            delattr(self.model, _HANDLE)

    def __enter__(self) -> Razor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disable()

    def _prepare(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder runs: its cache must be a Razor cache of this model."""
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", True)
        if not use_cache:
            raise UsageError(
                "use_cache: expected True, found False: Razor is what a cache keeps (some training "
                "settings leave model.config.use_cache off)"
            )
        if kwargs.get("output_attentions"):
            raise UsageError("output_attentions: Razor attention has no maps to give out")
        cache = kwargs.get("past_key_values")
        # generate() brings an empty cache of the default kind along and takes ours from the output.
        if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0):
            kwargs["past_key_values"] = self.new_cache()
        elif not isinstance(cache, RazorCache):
            raise UsageError(
                f"past_key_values: expected a cache of razor.new_cache(), found "
                f"{type(cache).__name__} (leave cache_implementation out)"
            )
        elif cache.plan is not self.plan:
            raise UsageError(
                "past_key_values: this Razor cache was made for another model, head map or policy"
            )
        return (), kwargs


def enable(
    model: Any,
    head_map: Heads | None,
    policy: RazorPolicy,
    *,
    kernels: bool | str | RazorKernels = "auto",
) -> Razor:
    """Switch Razor on: from now on ``model(...)`` and ``model.generate(...)`` use it.

    Args:
        model: a causal ``transformers`` decoder (llama, mistral, qwen2, qwen3 ...), on any device,
            in float64, float32, float16 or bfloat16.
        head_map: its retrieval heads: a HeadMap, or per layer their KV head indices; None = all of
            them, which is dense attention.
        policy: what the other heads keep.
        kernels: the CUDA kernels: "auto" where they fit, True or an error, False never.

    Returns:
        the handle: ``new_cache``, ``kv_bytes``, ``disable``.

    Raises:
        UsageError: a model that this cannot serve (encoder-decoder, layers without attention, an
            attention of its own ...), heads of another model, or Razor is on already.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"model: expected a transformers model, found {type(model).__name__}")
    if getattr(model, _HANDLE, None) is not None:
        raise UsageError("model: Razor is on already; call disable() of the first handle before")
    config = model.config.get_text_config(decoder=True)
    name = str(getattr(model.config, "name_or_path", "") or config.model_type)
    _check_kind(model, config, name)
    layers = int(config.num_hidden_layers)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    chosen = _heads(head_map, config, name, layers, heads)
    return Razor(model, Plan(name, heads, chosen, policy, KernelChoice(kernels)))


def _decoder(model: Any) -> Any:
    """The module that runs the layers and takes ``past_key_values``."""
    decoder = model.get_decoder()
    return model if decoder is None else decoder


def _check_kind(model: Any, config: Any, name: str) -> None:
    if model.config.is_encoder_decoder:
        raise UsageError(f"{name}: expected a decoder, found an encoder-decoder model")
    if getattr(config, "is_causal", True) is False:
        raise UsageError(f"{name}: expected causal attention, found is_causal=False")
    other = set(getattr(config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if other:
        raise UsageError(f"{name}: layers of type {', '.join(sorted(other))} are not supported")
    if getattr(config, "num_kv_shared_layers", 0):
        raise UsageError(f"{name}: layers that share keys and values are not supported")


def _heads(
    head_map: Heads | None, config: Any, name: str, layers: int, heads: int
) -> tuple[tuple[int, ...], ...]:
    """Per layer the retrieval heads, checked against the model."""
    if head_map is None:
        return (tuple(range(heads)),) * layers
    if isinstance(head_map, HeadMap):
        fingerprint = fingerprint_of(config, name)
        if fingerprint is not None:
            head_map.check_model(fingerprint, name, "head map")
        if head_map.num_kv_heads != heads:
            raise UsageError(
                f"head map: expected {heads} KV heads a layer, found {head_map.num_kv_heads}"
            )
        rows: Sequence[Sequence[int]] = head_map.retrieval_heads
    else:
        rows = head_map
    if len(rows) != layers:
        raise UsageError(f"head map: expected {layers} layers, found {len(rows)}")
    for i, row in enumerate(rows):
        if any(not 0 <= h < heads for h in row):
            raise UsageError(
                f"head map: layer {i}: expected KV heads 0..{heads - 1}, found {list(row)}"
            )
    return tuple(tuple(sorted(set(row))) for row in rows)
