"""What decides a TensorRT-LLM engine, and what a converted checkpoint says about its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.headmap import HeadMap
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.ranks import RankLayout
from trt_razor.trtllm.release import LocalCache

CONFIG = "config.json"
"""Of a checkpoint and of an engine, in their folders."""
SECTION = "razor"
"""Key of ``RazorSection`` in the config.json of a checkpoint and of an engine."""
SECTION_VERSION = 1
LOCAL_CACHE = "local_cache"
"""In the ``razor`` section: ``cyclic`` or ``slots``. Absent: as the release has it."""
PLUGIN = ("RazorGptAttention", "1", "trt_razor")
"""Name, version and namespace in TensorRT's registry."""
KV_DTYPES = ("auto", "fp8")


WEIGHT_ALGORITHMS = (None, "NO_QUANT", "FP8", "W4A16_AWQ", "W8A16", "W4A16")
"""Quantisation of weights that leaves attention layers what they are."""
KV_ALGORITHMS = {None: "auto", "NO_QUANT": "auto", "FP8": "fp8"}


def check_quantization(weights: str | None, caches: str | None, where: str = "quantization") -> str:
    """What ``quant_algo`` and ``kv_cache_quant_algo`` of a checkpoint mean for a Razor engine's cache.

    Returns:
        ``auto`` or ``fp8``.

    Raises:
        UsageError: quantisation that Razor layers are not made for.
    """
    if weights not in WEIGHT_ALGORITHMS:
        raise UsageError(
            f"{where}.quant_algo: expected {', '.join(str(a) for a in WEIGHT_ALGORITHMS[2:])} or none for a "
            f"Razor engine, found {weights}; quantise the checkpoint with one of these"
        )
    if caches not in KV_ALGORITHMS:
        raise UsageError(
            f"{where}.kv_cache_quant_algo: expected FP8 or none for a Razor engine, found {caches}"
        )
    return KV_ALGORITHMS[caches]


@dataclass(frozen=True)
class TrtLlmOptions:
    """What decides a TensorRT-LLM engine beside the options that all backends have.

    Attributes:
        tp_size, pp_size: tensor-parallel ranks, pipeline stages.
        kv_dtype: ``auto`` = the engine's dtype, or ``fp8`` (E4M3).
        tokens_per_block: of the paged pools; a power of two, 8 .. 1024.
        max_num_tokens: tokens of one step, all requests together; None = as much as the longest
            prompt read in one go needs (or ``prefill_chunk`` where prompts are read in chunks),
            and a token for each other sequence.
        local_cache: None = the release's default.
        gather_logits: build with context logits, for evaluation.
    """

    tp_size: int = 1
    pp_size: int = 1
    kv_dtype: str = "auto"
    tokens_per_block: int = 32
    max_num_tokens: int | None = None
    local_cache: LocalCache | None = None
    gather_logits: bool = False

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def mapping(self) -> dict[str, int]:
        """``mapping`` in config.json of a checkpoint; a field that a release does not know is an error."""
        return {"world_size": self.world_size, "tp_size": self.tp_size, "pp_size": self.pp_size}

    @property
    def fp8(self) -> bool:
        return self.kv_dtype == "fp8"


@dataclass(frozen=True)
class RazorSection:
    """What a converted checkpoint says about its heads: the ``razor`` object of its config.json.

    Kept small, because TensorRT-LLM prints it in a line of its log.

    Attributes:
        model: fingerprint of the model. heads: digest of its (equalised) head map.
        tp_size: ranks the heads were ordered for; an engine for another number needs a conversion.
        num_retrieval: R of a rank, per layer of the whole model.
    """

    model: str
    heads: str
    tp_size: int
    num_retrieval: tuple[int, ...]
    policy: RazorPolicy

    def to_json(self) -> dict[str, Any]:
        return {
            "version": SECTION_VERSION,
            "model": self.model,
            "heads": self.heads,
            "tp_size": self.tp_size,
            "num_retrieval": list(self.num_retrieval),
            "policy": self.policy.to_json(),
        }

    def for_cache(self, cache: LocalCache | None) -> dict[str, Any]:
        """As JSON that says where local heads live; None leaves that to the release."""
        return self.to_json() | ({} if cache is None else {LOCAL_CACHE: cache.name.lower()})

    @classmethod
    def from_json(cls, data: Any, where: str = "config.json") -> RazorSection:
        """Raises UsageError naming the wrong field."""
        prefix = f"{where}: {SECTION}"
        if not isinstance(data, Mapping):
            raise UsageError(
                f"{prefix}: expected an object, found {type(data).__name__}; convert the checkpoint "
                "with: trt-razor build --backend tensorrt-llm --razor --convert-only"
            )
        if data.get("version") != SECTION_VERSION:
            raise UsageError(
                f"{prefix}.version: expected {SECTION_VERSION}, found {data.get('version')!r:.20}; "
                "convert the checkpoint again"
            )
        for name, kind in (("model", str), ("heads", str), ("tp_size", int), ("policy", Mapping)):
            if not isinstance(data.get(name), kind) or isinstance(data.get(name), bool):
                raise UsageError(
                    f"{prefix}.{name}: expected {kind.__name__}, found {data.get(name)!r:.40}"
                )
        counts = data.get("num_retrieval")
        if not isinstance(counts, list) or not all(type(r) is int and r >= 0 for r in counts):
            raise UsageError(
                f"{prefix}.num_retrieval: expected a list of counts, found {counts!r:.40}"
            )
        policy = RazorPolicy.from_json(data["policy"], f"{prefix}.policy")
        return cls(data["model"], data["heads"], data["tp_size"], tuple(counts), policy)


def razor_section(
    spec: ModelSpec, head_map: HeadMap, layout: RankLayout, policy: RazorPolicy
) -> RazorSection:
    """The section for a checkpoint with ``layout``, made of the equalised ``head_map``."""
    return RazorSection(
        spec.fingerprint(), head_map.digest(), layout.tp_size, layout.num_retrieval, policy
    )
