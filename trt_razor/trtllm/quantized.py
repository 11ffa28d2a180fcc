"""TensorRT-LLM checkpoints as a source: quantised weights whose heads are put in order.

NVIDIA's quantisation tool and TensorRT-LLM's converters write ``config.json`` and
``rank{N}.safetensors`` for some number of ranks. Here the ranks are put together again, heads are
moved, and the result is split for the ranks that are wanted. No weight is rounded anew: bytes and
their scales move together, so the permuted model is the quantised one.
"""

from __future__ import annotations

import copy
import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.backends.base import Progress
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import write_text_atomic
from trt_razor.models.positions import alibi_slopes
from trt_razor.models.spec import ModelSpec
from trt_razor.sharding import stages
from trt_razor.trtllm.options import CONFIG, SECTION, RazorSection, TrtLlmOptions
from trt_razor.trtllm.rank_files import RankFile, rank_path
from trt_razor.trtllm.rank_source import rank_shape, written_dtype
from trt_razor.trtllm.rank_tensors import (
    EMBEDDING,
    HEAD,
    LAYER,
    Rule,
    Share,
    held,
    layer_name,
    slopes_name,
    slopes_rule,
)
from trt_razor.trtllm.ranks import RankLayout, check_ranks
from trt_razor.trtllm.source import (
    KV_PAIR,
    KV_SCALE,
    TrtLlmCheckpoint,
    is_trtllm_checkpoint,
    open_trtllm_checkpoint,
)

__all__ = [
    "TrtLlmCheckpoint",
    "is_trtllm_checkpoint",
    "open_trtllm_checkpoint",
    "permute_checkpoint",
]

Array = npt.NDArray[Any]

_QUANTIZATION = (
    "quant_algo",
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "use_meta_recipe",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
)
"""Fields of the section that every release knows; an unknown one is an error when it is read."""


def permute_checkpoint(
    source: TrtLlmCheckpoint,
    layout: RankLayout,
    section: RazorSection | None,
    options: TrtLlmOptions,
    directory: Path,
    progress: Progress,
) -> None:
    """Write ``rank{pp_rank * tp_size + tp_rank}.safetensors`` and, when all are whole, ``config.json``.

    Every tensor is read once and held alone. What else the source's config.json says stays, so that
    TensorRT-LLM makes the same layers of it. RoPE tables are left out: TensorRT-LLM computes them from
    config.json, and a table in the file would win over it. ALiBi slopes go with their heads. Without
    scales in the source, an FP8 cache gets scales of 1; of separate ones for keys and values, the
    larger, as TensorRT-LLM takes.

    Args:
        layout: of the heads; ``ranks.dense_layout`` leaves them where they are.
        section: None = a dense engine.
        options: ranks, pipeline stages and dtype of the cache.
        directory: an existing folder other than the source's; what is left in it after an error is of
            no use.
        progress: stage ``convert`` in bytes written.

    Raises:
        UsageError: a format or ranks with which heads cannot be moved, heads that are in a Razor
            order already, or caches of another dtype than asked for.
        RazorError: a layout of another model or other ranks, or damaged files.
    """
    source.check_permutable()
    _check_wanted(source, layout, section, options, directory)
    spec, tp_size = source.spec, options.tp_size
    targets = _targets(source, options)
    parts = stages(spec.num_layers, options.pp_size)
    where = {name: _stage(name, parts) for name in targets}
    with ExitStack() as stack:
        files = []
        for rank in range(options.world_size):
            stage, tp_rank = divmod(rank, tp_size)
            tensors = {
                local: (dtype, rank_shape(name, rule, spec, tp_size, tp_rank, _order(layout, name)))
                for name, (rule, dtype) in targets.items()
                for at, local in [where[name]]
                if at == stage
            }
            files.append((rank_path(directory, rank), tensors))
        # All shapes are right: now files are made.
        ranks = [stack.enter_context(RankFile(path, tensors)) for path, tensors in files]
        done, total = 0, sum(file.nbytes for file in ranks)
        for name, (rule, _) in targets.items():
            value = _value(source, name)
            stage, local = where[name]
            for tp_rank in range(tp_size):
                part = _part(value, name, rule, spec, tp_size, tp_rank, _order(layout, name))
                ranks[stage * tp_size + tp_rank].add(local, part)
                done += part.nbytes
            del value
            progress("convert", done, total)
    text = json.dumps(_config(source, section, options), indent=1)
    write_text_atomic(directory / CONFIG, text + "\n")


def _check_wanted(
    source: TrtLlmCheckpoint,
    layout: RankLayout,
    section: RazorSection | None,
    options: TrtLlmOptions,
    directory: Path,
) -> None:
    spec = source.spec
    check_ranks(spec, options.tp_size, section is not None)
    found = layout.tp_size, len(layout.order), len(layout.order[0])
    expected = options.tp_size, spec.num_layers, spec.num_kv_heads
    if found != expected:
        raise RazorError(
            f"head layout: expected {expected[0]} ranks, {expected[1]} layers and {expected[2]} KV heads "
            f"of '{spec.name}', found {found[0]}, {found[1]} and {found[2]}"
        )
    if not 1 <= options.pp_size <= spec.num_layers:
        raise UsageError(
            f"pp_size: expected 1..{spec.num_layers}, the layers of '{spec.name}', found "
            f"{options.pp_size}"
        )
    if SECTION in source.config:
        raise UsageError(
            f"{source.location}: its heads are in a Razor order already; give the checkpoint that it was "
            "converted from"
        )
    if source.kv_cache_quant_algo and not options.fp8:
        raise UsageError(
            f"{source.location}: its scales are for an FP8 cache, found kv_dtype '{options.kv_dtype}'; add "
            "--kv-dtype fp8"
        )
    quantization = source.config.get("quantization") or {}
    excluded = quantization.get("exclude_modules") or []
    if options.pp_size != source.pp_size and re.search(r"layers\.\W*\d", json.dumps(excluded)):
        raise UsageError(
            f"pp_size: {options.pp_size}: {source.location} excludes single layers from quantisation by "
            f"their numbers in {source.pp_size} stages; use --pp-size {source.pp_size}"
        )
    if directory.resolve() == Path(source.location).resolve():
        raise UsageError(f"{directory}: is the checkpoint itself; give another folder")


def _targets(source: TrtLlmCheckpoint, options: TrtLlmOptions) -> dict[str, tuple[Rule, str]]:
    """Tensors to write: name → (rule, dtype)."""
    spec, tensors = source.spec, source.tensors
    out = {
        name: (rule, written_dtype(tensors.dtype(name)))
        for name, rule in source.rules.items()
        if name in tensors and not name.endswith((*KV_PAIR, KV_SCALE))
    }
    if HEAD not in tensors:  # tied: TensorRT-LLM wants it in the last stage's file
        out[HEAD] = source.rules[HEAD], written_dtype(tensors.dtype(EMBEDDING))
    for i in range(spec.num_layers):
        if spec.position == "alibi":
            out[slopes_name(i)] = slopes_rule(spec), "float32"
        if options.fp8:
            out[layer_name(i, KV_SCALE)] = Rule((1,)), "float32"
    return out


def _value(source: TrtLlmCheckpoint, name: str) -> Array:
    """The whole model's tensor, heads where they were."""
    tensors, rules = source.tensors, source.rules
    if name.endswith(".alibi_slopes"):
        slopes = alibi_slopes(source.spec.num_heads).reshape(slopes_rule(source.spec).shape)
        if name in tensors and not np.allclose(
            tensors.whole(name, rules[name]), slopes, rtol=1e-2, atol=0
        ):
            raise UsageError(
                f"{source.location}: {name}: not the slopes of ALiBi for {source.spec.num_heads} heads in "
                "order; convert the model again"
            )
        return slopes
    if name.endswith(KV_SCALE):
        prefix = name.removesuffix(KV_SCALE)
        given = [n for n in (name, *(prefix + k for k in KV_PAIR)) if n in rules]
        scales = [np.asarray(tensors.whole(n, rules[n]), np.float32) for n in given]
        return np.maximum.reduce(scales) if scales else np.ones(1, np.float32)
    if name not in tensors:  # a tied output head
        return tensors.whole(EMBEDDING, rules[EMBEDDING])
    return tensors.whole(name, rules[name])


def _part(
    value: Array,
    name: str,
    rule: Rule,
    spec: ModelSpec,
    tp_size: int,
    tp_rank: int,
    order: tuple[int, ...],
) -> Array:
    """What a rank holds of a tensor."""
    if rule.share is Share.WHOLE:
        return value
    index = held(name, rule, spec, tp_size, tp_rank, order)
    if len(index) and index[-1] - index[0] == len(index) - 1 and (np.diff(index) == 1).all():
        part = value[(slice(None),) * rule.axis + (slice(index[0], index[-1] + 1),)]
    else:
        part = np.take(value, index, rule.axis)
    if rule.share is Share.VOCAB:
        missing = rank_shape(name, rule, spec, tp_size, tp_rank, order)[0] - len(index)
        if missing:
            fill = np.zeros((missing, *value.shape[1:]), value.dtype)
            part = np.concatenate([part, fill])
    return part


def _order(layout: RankLayout, name: str) -> tuple[int, ...]:
    """KV heads of the layer that a tensor belongs to; of others any order will do."""
    return layout.order[int(name.split(".")[2]) if name.startswith(LAYER) else 0]


def _stage(name: str, parts: list[tuple[int, int]]) -> tuple[int, str]:
    """Pipeline stage of a tensor, and its name there."""
    if name.startswith(LAYER):
        number, rest = name.removeprefix(LAYER).split(".", 1)
        layer = int(number)
        stage = next(i for i, (first, end) in enumerate(parts) if first <= layer < end)
        return stage, layer_name(layer - parts[stage][0], rest)
    return (0 if name == EMBEDDING else len(parts) - 1), name


def _config(
    source: TrtLlmCheckpoint, section: RazorSection | None, options: TrtLlmOptions
) -> dict[str, Any]:
    """The source's config.json for other ranks."""
    config = copy.deepcopy(dict(source.config))
    config["tie_word_embeddings"] = source.spec.tie_embeddings
    config["mapping"] = options.mapping()
    quantization = config.get("quantization") or {}
    config["quantization"] = {
        "quant_algo": None,
        **{name: quantization[name] for name in _QUANTIZATION if name in quantization},
        "kv_cache_quant_algo": "FP8" if options.fp8 else None,
    }
    if section is not None:
        config[SECTION] = section.for_cache(options.local_cache)
    return config
