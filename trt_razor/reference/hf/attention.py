"""What transformers calls when ``attn_implementation`` is Razor's: the attention and its mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from trt_razor.errors import RazorError, UsageError
from trt_razor.reference.hf.cache import ChunkMask, layer_of

NAME = "trt_razor"
"""``attn_implementation`` of a model with Razor."""

# Arguments of attention functions that change nothing of the result.
_HARMLESS = {
    "cache_position",
    "is_causal",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",  # razor_mask refuses sequences that are longer
    "use_cache",
}


def razor_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ChunkMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q [B, Hq, S, D], k and v [B, Hkv, S, D] → ([B, S, Hq, D], None).

    Raises:
        UsageError: something that Razor does not compute: gradients, dropout, attention maps, a mask
            of another kind, logit caps, attention sinks ...
    """
    layer = layer_of(key)
    if layer is None:
        raise UsageError(
            "Razor attention: the keys do not come from a Razor cache; call the model itself with "
            "use_cache=True and let it make its cache, or give one of razor.new_cache()"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise UsageError(
            "Razor attention has no gradient; call the model inside torch.no_grad(), or switch it "
            "off with razor.disable()"
        )
    if attention_mask is not None and not isinstance(attention_mask, ChunkMask):
        raise UsageError(
            f"attention_mask: expected [batch, tokens] with padding at the left, found a mask of "
            f"shape {list(attention_mask.shape)}"
        )
    if dropout:
        raise UsageError(f"dropout: expected 0, found {dropout}; call model.eval() first")
    if kwargs.get("is_causal") is False:
        raise UsageError("is_causal: expected a causal layer, found False")
    for name, found in kwargs.items():
        if found is not None and found is not False and name not in _HARMLESS:
            raise UsageError(f"Razor attention: argument '{name}' of this model is not supported")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
    return layer.attend(query, key, value, scale, attention_mask), None


def razor_mask(
    batch_size: int,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    q_length: int | None = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> ChunkMask | None:
    """The mask function: no mask at all, only where each sequence begins.

    Args:
        kv_length: cached and new places together.
        attention_mask: bool [B, kv_length], False where there is padding.
        local_size: of a sliding window.
        q_length, cache_position: new places, as transformers 5 and 4 say it.

    Raises:
        UsageError: padding elsewhere than at the left, or a mask that is not causal.
        RazorError: more tokens than the model's sliding window.
    """
    if local_size is not None and kv_length > local_size:
        raise RazorError(
            f"{kv_length} tokens exceed the model's sliding window of {local_size}; Razor decides "
            f"for whole sequences and supports such a model up to its window only"
        )
    causal = mask_function is causal_mask_function or local_size is not None
    if not causal or not allow_is_causal_skip:
        raise UsageError(
            "attention mask: expected plain causal attention, one sequence a row; found packed "
            "sequences, bidirectional blocks or a mask of the model's own"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise UsageError(
            f"attention_mask: expected [{batch_size}, {kv_length}] (cached and new tokens), "
            f"found {list(attention_mask.shape)}"
        )
    new = q_length if cache_position is None else len(cache_position)
    real = attention_mask.bool()
    chunk = real[:, kv_length - (new or 0) :].int()
    if bool((chunk.diff(dim=1) < 0).any()):
        raise UsageError(
            "attention_mask: expected padding at the left only (tokenizer.padding_side = 'left'), "
            "found zeros behind ones"
        )
    numbers = torch.stack([(chunk == 0).sum(1), real.sum(1)])
    padding, tokens = numbers.tolist()
    return ChunkMask(tuple(padding), tuple(tokens))


def register() -> None:
    """Make both known to transformers; again does no harm."""
    AttentionInterface.register(NAME, razor_attention)
    AttentionMaskInterface.register(NAME, razor_mask)
