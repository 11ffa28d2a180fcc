"""What a model needs on a GPU, dense and Razor, from its shape alone: before any weight is read.

The cache itself is defined in ``cache_layout``, the split over GPUs in ``sharding``, the printed
table in ``plan_table``; what the figures mean is told in docs/planning.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from trt_razor.cache_layout import (
    CacheBytes,
    CacheTensor,
    KvNeed,
    cache_bytes,
    cache_tensors,
    check_positive,
    dtype_bytes,
    head_split,
    kept_share,
    kv_at,
    layer_tensors,
    need_bytes,
    sum_bytes,
)
from trt_razor.errors import UsageError
from trt_razor.gpus import GPU, find_gpu
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.plan_table import human_bytes, render
from trt_razor.policy import RazorPolicy
from trt_razor.sharding import (
    HeadSplit,
    ceil_div,
    decode_weight_elements,
    rank_split,
    spread,
    stages,
    weight_elements,
)

__all__ = [
    "CacheBytes",
    "CacheTensor",
    "KvNeed",
    "Plan",
    "cache_bytes",
    "cache_tensors",
    "check_seq_len",
    "dtype_bytes",
    "human_bytes",
    "kept_share",
    "kv_at",
    "plan",
    "plan_to_json",
    "render",
]

MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that a plan hands out."""

RUNTIME_RESERVE = 1 << 30
"""Bytes a plan leaves for the CUDA context, libraries and workspaces."""

PREFILL_TOKENS = 8192
"""Longest prefill chunk that the activation reserve covers."""


# The plan --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """What a model needs on a GPU. Bytes; "per GPU" is the busiest GPU of the group.

    Attributes:
        parameters: of the model; ``weight_bytes`` = parameters in ``weight_dtype``.
        retrieval_share: retrieval heads / KV heads as asked for or as in the head map.
        rank_share: the same on the busiest GPU after rounding up to equal counts on every rank.
        kv_full_bytes, kv_razor_bytes: cache capacity per sequence of ``max_seq_len``, whole model.
        kv_full_bytes_per_gpu, kv_razor_bytes_per_gpu: the same on one GPU.
        attention_speedup: KV bytes that a decode step reads at ``max_seq_len``, dense / Razor, per
            GPU: an expectation from bytes, not a measurement.
        compression_starts: number of cached tokens at which the first one has no row of its own any
            more (None: never).
        kv_budget_bytes_per_gpu: memory left for KV, or None without a GPU (may be negative).
        max_batch_full, max_batch_razor: sequences of ``max_seq_len`` that fit, None without a GPU.
        batch: the batch asked for, or None.
        tokens_s_full, tokens_s_razor: upper bound of decoded tokens per second at ``batch``, or at
            the largest batch, if every step read weights and KV at full memory bandwidth; None
            without a GPU, with pipeline stages, or if that batch does not fit.
        assumptions, warnings: one line each, for people.
    """

    model: str
    parameters: int
    max_seq_len: int
    tp_size: int
    pp_size: int
    weight_dtype: str
    kv_dtype: str
    policy: RazorPolicy
    retrieval_share: float
    rank_share: float
    weight_bytes: int
    weight_bytes_per_gpu: int
    kv_full_bytes: int
    kv_razor_bytes: int
    kv_full_bytes_per_gpu: int
    kv_razor_bytes_per_gpu: int
    attention_speedup: float
    compression_starts: int | None
    gpu: GPU | None
    activation_bytes_per_gpu: int
    kv_budget_bytes_per_gpu: int | None
    max_batch_full: int | None
    max_batch_razor: int | None
    batch: int | None
    tokens_s_full: float | None
    tokens_s_razor: float | None
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def kv_ratio(self) -> float:
        """Cache capacity per sequence and GPU, dense / Razor."""
        return self.kv_full_bytes_per_gpu / self.kv_razor_bytes_per_gpu


def plan(
    spec: ModelSpec,
    policy: RazorPolicy,
    max_seq_len: int,
    gpu: GPU | str | None = None,
    tp_size: int = 1,
    head_map: HeadMap | None = None,
    retrieval_share: float = 0.15,
    kv_dtype: str = "float16",
    weight_dtype: str = "float16",
    batch: int | None = None,
    pp_size: int = 1,
) -> Plan:
    """Weights, KV, largest batch and expected decode speed-up, dense and Razor.

    Without ``head_map``, ``retrieval_share`` of the KV heads is spread evenly over the layers.

    Raises:
        UsageError: a size that is not possible for this model, a head map of another model, or an
            unknown GPU or dtype. A length beyond the model's positions is a warning: the bytes are
            right, but no engine is built for it.
    """
    check_positive("max_seq_len", max_seq_len)
    _check_parallel(spec, tp_size, pp_size)
    if batch is not None:
        check_positive("batch", batch)
    if spec.position == "alibi" and policy.comp_tokens > 1:
        raise UsageError(
            f"policy.comp_tokens: expected 0 or 1 for '{spec.name}', an ALiBi model, found "
            f"{policy.comp_tokens}"
        )
    if spec.position == "alibi" and policy.heavy_hitters:
        raise UsageError(
            f"policy.heavy_hitters: expected 0 for '{spec.name}', an ALiBi model, found "
            f"{policy.heavy_hitters}"
        )
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    if head_map is not None:
        head_map.check_model(spec.fingerprint(), spec.name, "head map")
        split = head_split(spec, head_map)
    else:
        split = spread(retrieval_share, spec.num_layers, spec.num_kv_heads)
    razor = rank_split(split, tp_size)
    dense = [(r + local, 0) for r, local in razor]

    parts = stages(spec.num_layers, pp_size)
    weights = [
        weight_elements(spec, tp_size, first, last) * dtype_bytes(weight_dtype)
        for first, last in parts
    ]

    def capacity(heads: HeadSplit) -> int:
        tensors = layer_tensors(heads, spec.head_dim, policy, max_seq_len, kv_dtype)
        return sum_bytes(tensors, 1).per_slot

    def reads(heads: HeadSplit) -> int:
        r, local = (sum(x) for x in zip(*heads, strict=True))
        return need_bytes(r, local, spec.head_dim, policy, max_seq_len, kv_dtype)

    kv_full = [capacity(dense[a:b]) for a, b in parts]
    kv_razor = [capacity(razor[a:b]) for a, b in parts]
    activations = _activation_bytes(spec, max_seq_len, tp_size, dtype_bytes(weight_dtype))
    budget = max_full = max_razor = speed_full = speed_razor = None
    if gpu is not None:
        free = int(gpu.memory_bytes * MEMORY_FRACTION) - activations
        budget = free - max(weights)
        max_full = min(max(0, free - w) // kv for w, kv in zip(weights, kv_full, strict=True))
        max_razor = min(max(0, free - w) // kv for w, kv in zip(weights, kv_razor, strict=True))
        if pp_size == 1:
            read = decode_weight_elements(spec, tp_size) * dtype_bytes(weight_dtype)
            speed_full = _tokens_s(gpu, batch, max_full, read, reads(dense))
            speed_razor = _tokens_s(gpu, batch, max_razor, read, reads(razor))

    heads = spec.num_layers * spec.num_kv_heads
    rank_heads = sum(r + local for r, local in razor)
    result = Plan(
        model=spec.name,
        parameters=spec.num_parameters(),
        max_seq_len=max_seq_len,
        tp_size=tp_size,
        pp_size=pp_size,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        policy=policy,
        retrieval_share=sum(r for r, _ in split) / heads,
        rank_share=sum(r for r, _ in razor) / rank_heads,
        weight_bytes=spec.num_parameters() * dtype_bytes(weight_dtype),
        weight_bytes_per_gpu=max(weights),
        kv_full_bytes=capacity([(spec.num_kv_heads, 0)] * spec.num_layers),
        kv_razor_bytes=capacity(split),
        kv_full_bytes_per_gpu=max(kv_full),
        kv_razor_bytes_per_gpu=max(kv_razor),
        attention_speedup=reads(dense) / reads(razor),
        compression_starts=_compression_starts(policy),
        gpu=gpu,
        activation_bytes_per_gpu=activations,
        kv_budget_bytes_per_gpu=budget,
        max_batch_full=max_full,
        max_batch_razor=max_razor,
        batch=batch,
        tokens_s_full=speed_full,
        tokens_s_razor=speed_razor,
        assumptions=tuple(_assumptions(head_map, tp_size, gpu)),
        warnings=(),
    )
    return replace(result, warnings=tuple(_warnings(spec, result, split)))


def plan_to_json(result: Plan) -> dict[str, Any]:
    """The plan as JSON values; the policy and the GPU are objects of their own."""
    data = asdict(result)
    data["assumptions"], data["warnings"] = list(result.assumptions), list(result.warnings)
    data["kv_ratio"] = result.kv_ratio
    return data


def check_seq_len(spec: ModelSpec, max_seq_len: int) -> None:
    """Raises UsageError if ``max_seq_len`` is below 1 or beyond the model's positions."""
    check_positive("max_seq_len", max_seq_len)
    if max_seq_len > spec.max_positions:
        hint = (
            "a longer context needs a config.json with rope_scaling (linear, llama3 or yarn) and "
            "max_position_embeddings to match"
            if spec.position == "rope"
            else "the model was not made for more"
        )
        raise UsageError(
            f"max_seq_len: expected at most {spec.max_positions}, the positions of '{spec.name}', "
            f"found {max_seq_len}; {hint}"
        )


def _assumptions(head_map: HeadMap | None, tp_size: int, gpu: GPU | None) -> Iterable[str]:
    if head_map is None:
        yield "no head map: the retrieval heads are taken as spread evenly over the layers"
    if tp_size > 1:
        yield "every rank holds equally many retrieval heads of a layer (rounded up)"
    if gpu is not None:
        yield (
            f"{MEMORY_FRACTION:.0%} of the data-sheet memory is used; activations of "
            f"{PREFILL_TOKENS}-token prefill chunks and 1 GiB for the runtime are set aside"
        )
    yield "speed-ups are expected from the bytes read per decode step, not measured"


def _warnings(spec: ModelSpec, p: Plan, split: HeadSplit) -> Iterable[str]:
    kv_rank = ceil_div(spec.num_kv_heads, p.tp_size)
    if p.max_seq_len > spec.max_positions:
        yield (
            f"{p.max_seq_len} tokens are beyond the {spec.max_positions} positions of "
            f"'{spec.name}': the bytes are right, but a build will refuse this length without a "
            "config.json that extends them (rope_scaling)"
        )
    if p.compression_starts is None:
        yield "Razor saves nothing: compression = 1 keeps every token"
    elif p.max_seq_len < p.compression_starts:
        rows = "sinks, window and heavy hitters" if p.policy.heavy_hitters else "sinks and window"
        yield (
            f"Razor saves nothing at {p.max_seq_len} tokens: {rows} cover them all; the "
            f"first token is dropped at {p.compression_starts}; lower min_window or raise max_seq_len"
        )
    elif p.kv_razor_bytes_per_gpu >= p.kv_full_bytes_per_gpu:
        yield (
            "Razor saves no memory here: its cache per GPU is not smaller than the dense one "
            f"({p.rank_share:.0%} retrieval heads, {p.policy.comp_tokens} compensation tokens"
            + (f", {p.policy.heavy_hitters} heavy hitters)" if p.policy.heavy_hitters else ")")
        )
    if kv_rank == 1 and any(r and local for r, local in split):
        yield (
            f"tp_size {p.tp_size} leaves one KV head per rank, which cannot mix retrieval and local "
            "heads: such layers count as full; TensorRT-LLM builds refuse this; use a smaller tp_size"
        )
    elif p.rank_share > p.retrieval_share + 0.005:
        yield (
            f"equal counts on every rank raise the retrieval heads from {p.retrieval_share:.1%} to "
            f"{p.rank_share:.1%}"
        )
    if spec.num_kv_heads % p.tp_size and p.tp_size % spec.num_kv_heads:
        yield (
            f"{spec.num_kv_heads} KV heads do not divide evenly over {p.tp_size} ranks; "
            "TensorRT-LLM builds refuse this"
        )
    elif p.tp_size > spec.num_kv_heads:
        copies = p.tp_size // spec.num_kv_heads
        yield f"{spec.num_kv_heads} KV heads on {p.tp_size} ranks: each is stored {copies} times"
    if p.pp_size > 1 and len({r for r, _ in split}) > 1:
        yield (
            "layers differ in retrieval heads; TensorRT-LLM builds with pp_size > 1 need the same "
            "number in every layer"
        )
    if p.gpu is None:
        return
    if p.max_batch_razor == 0 and p.max_batch_full == 0:
        budget = p.gpu.memory_bytes * MEMORY_FRACTION
        need = p.weight_bytes_per_gpu + p.activation_bytes_per_gpu + p.kv_razor_bytes_per_gpu
        sizes = range(p.tp_size + 1, spec.num_heads + 1)
        enough = (tp for tp in sizes if _one_sequence_bytes(spec, p, split, tp) <= budget)
        tp = next(enough, None) if p.pp_size == 1 else None
        yield (
            f"not one sequence fits: {human_bytes(need)} needed per GPU, {human_bytes(budget)} to "
            f"hand out on {p.gpu.name}; "
            + (f"it fits with tp_size {tp}" if tp else "use more GPUs or a smaller max_seq_len")
        )
    elif p.batch is not None and p.max_batch_razor is not None and p.batch > p.max_batch_razor:
        yield f"batch {p.batch} does not fit: Razor holds {p.max_batch_razor} sequences"


# Checks and small sums -----------------------------------------------------------------------
def _compression_starts(policy: RazorPolicy) -> int | None:
    """Smallest n with D(n) = H + 1."""
    if policy.compression == 1:
        return None
    n = policy.first_drop()
    while policy.dropped(n) <= policy.heavy_hitters:
        n += policy.heavy_hitters + 1 - policy.dropped(n)  # D grows by at most 1 a token
    return n


def _check_parallel(spec: ModelSpec, tp_size: int, pp_size: int) -> None:
    check_positive("tp_size", tp_size)
    check_positive("pp_size", pp_size)
    if spec.num_heads % tp_size:
        raise UsageError(
            f"tp_size: expected a divisor of the {spec.num_heads} attention heads of "
            f"'{spec.name}', found {tp_size}"
        )
    if pp_size > spec.num_layers:
        raise UsageError(
            f"pp_size: expected at most {spec.num_layers}, the layers of '{spec.name}', "
            f"found {pp_size}"
        )


def _one_sequence_bytes(spec: ModelSpec, p: Plan, split: HeadSplit, tp_size: int) -> float:
    """Bytes per GPU for one Razor sequence with ``tp_size`` ranks; infinite if it cannot be."""
    if spec.num_heads % tp_size:
        return math.inf
    element = dtype_bytes(p.weight_dtype)
    weights = weight_elements(spec, tp_size, 0, spec.num_layers) * element
    heads = rank_split(split, tp_size)
    kv = sum_bytes(layer_tensors(heads, spec.head_dim, p.policy, p.max_seq_len, p.kv_dtype), 1)
    return weights + _activation_bytes(spec, p.max_seq_len, tp_size, element) + kv.per_slot


def _activation_bytes(spec: ModelSpec, max_seq_len: int, tp_size: int, element: int) -> int:
    """Reserve per GPU: residual, norm and output, qkv, attention output, gate and up; runtime."""
    heads = 2 * spec.num_heads // tp_size + 2 * ceil_div(spec.num_kv_heads, tp_size)
    per_token = 3 * spec.hidden_size + heads * spec.head_dim
    per_token += 2 * ceil_div(spec.intermediate_size, tp_size)
    return RUNTIME_RESERVE + min(max_seq_len, PREFILL_TOKENS) * per_token * element


def _tokens_s(gpu: GPU, batch: int | None, fits: int, weights: int, kv: int) -> float | None:
    size = fits if batch is None else batch
    if not 0 < size <= fits:
        return None
    return size * gpu.bandwidth_bytes_s / (weights + size * kv)
