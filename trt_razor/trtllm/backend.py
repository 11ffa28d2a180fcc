"""TensorRT-LLM as a backend: convert the checkpoint, build one engine per rank, describe the result.

The folder that comes out is what TensorRT-LLM's executor and Triton's ``tensorrtllm`` backend open
(``config.json``, ``rank{N}.engine``), and an engine directory of ours at the same time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_razor.backends import gpu_capability
from trt_razor.backends.base import EngineOptions, Progress, Session
from trt_razor.cache_layout import CacheTensor
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import sha256_file, write_text_atomic
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.models.stored import read_json
from trt_razor.trtllm.checkpoint import convert_checkpoint, trtllm_config
from trt_razor.trtllm.engine_config import (
    SECTION,
    BuildArguments,
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    build_arguments,
    check_engine,
    check_policy,
    plan_engine,
    razor_section,
)
from trt_razor.trtllm.options import CONFIG
from trt_razor.trtllm.quantized import TrtLlmCheckpoint, permute_checkpoint
from trt_razor.trtllm.ranks import dense_layout, equalise, rank_layout
from trt_razor.trtllm.release import Release, installed_release

if TYPE_CHECKING:
    from trt_razor.graph.options import GraphOptions

HEADS = "heads.json"
"""Where a conversion puts its head map, as engines do."""
PRELOAD = "libtrt_razor_preload_trt{major}.so"


@dataclass(frozen=True)
class TensorRtLlmBackend:
    """See the module. Building needs an NGC image with TensorRT-LLM, our plugin and a GPU.

    Attributes:
        options: ranks, cache type, sizes.
        release: of TensorRT-LLM; None = the installed one.
        razor: a Razor engine is asked for, even while its heads are not known yet.
        random_weights: let TensorRT-LLM make the weights up, as its ``--model_config`` does.
        convert_only: only ``convert`` will be called, on any machine.
    """

    options: TrtLlmOptions = field(default_factory=TrtLlmOptions)
    release: Release | None = None
    razor: bool = False
    random_weights: bool = False
    convert_only: bool = False

    name = "tensorrt-llm"

    def the_release(self) -> Release:
        """``release``, or the installed one. Raises NoTensorRtLlm without either."""
        return self.release or installed_release()

    def check(self, spec: ModelSpec, options: EngineOptions) -> None:
        """See ``Backend.check``: with a head map, all that depends on the heads, too."""
        release = self.the_release()
        options.validate(spec)
        graph, chunk = options.graph, options.prefill_chunk
        razor = self.razor or graph.head_map is not None
        check_engine(
            spec, graph.max_seq_len, graph.dtype, self.options, release, razor, prefill_chunk=chunk
        )
        self.arguments(options)
        if razor:
            check_policy(
                spec, graph.policy, graph.max_seq_len, graph.dtype, self.options, release, chunk
            )
        if graph.head_map is not None:
            self.plan(spec, options)
        if self.convert_only:
            return
        if gpu_capability() is None:
            raise UsageError(
                "--backend tensorrt-llm builds on a GPU, nvidia-smi found none here; build where the "
                "engine shall run, or convert only: --convert-only"
            )
        if razor:
            _plugin()

    def heads(self, head_map: HeadMap) -> HeadMap:
        """The head map that is built: every rank has equally many retrieval heads of a layer, and with
        pipeline stages every layer as many as the others."""
        return equalise(head_map, self.options.tp_size, every_layer=self.options.pp_size > 1)

    def plan(self, spec: ModelSpec, options: EngineOptions) -> RazorPlan | None:
        """The plan of a Razor engine, its head map being one of ``heads``; None for a dense one."""
        graph = options.graph
        if graph.head_map is None:
            return None
        return plan_engine(
            spec,
            self._section(spec, graph),
            graph.max_seq_len,
            graph.dtype,
            self.options,
            self.the_release(),
            options.prefill_chunk,
        )

    def arguments(self, options: EngineOptions) -> BuildArguments:
        """What TensorRT-LLM's builder is told."""
        length, batch = options.graph.max_seq_len, options.max_batch_size
        return build_arguments(length, batch, self.options, options.prefill_chunk)

    def describe(self, spec: ModelSpec, options: EngineOptions) -> str | None:
        """One line for people about the caches of a Razor engine; None for a dense one."""
        plan = self.plan(spec, options)
        if plan is None:
            return None
        caches = plan.describe(plan.temporary_rows(self.arguments(options)))
        return f"TensorRT-LLM {self.the_release().version}: {caches}"

    def convert(
        self,
        checkpoint: Checkpoint | TrtLlmCheckpoint,
        options: EngineOptions,
        directory: Path,
        progress: Progress,
    ) -> None:
        """Write the TensorRT-LLM checkpoint of an engine: heads in order, a file for each rank."""
        spec, graph = checkpoint.spec, options.graph
        layout, section = dense_layout(spec, self.options.tp_size), None
        if graph.head_map is not None:
            layout = rank_layout(graph.head_map, self.options.tp_size)
            section = self._section(spec, graph)
        if isinstance(checkpoint, TrtLlmCheckpoint):
            _check_original(checkpoint, section, self.options)
            permute_checkpoint(checkpoint, layout, section, self.options, directory, progress)
        else:
            convert_checkpoint(
                checkpoint, layout, graph.dtype, self.options, section, directory, progress
            )

    def build(
        self,
        checkpoint: Checkpoint | TrtLlmCheckpoint,
        options: EngineOptions,
        staging: Path,
        progress: Progress,
    ) -> dict[str, str]:
        """See ``Backend.build``. Writes ``config.json`` and ``rank{N}.engine``."""
        from trt_razor.trtllm.driver import build_engines

        spec, graph = checkpoint.spec, options.graph
        plan, arguments = self.plan(spec, options), self.arguments(options)
        scratch = staging / "checkpoint"
        scratch.mkdir()
        try:
            weights: Path | None = scratch
            if self.random_weights:
                weights = None
                section = self._section(spec, graph) if plan is not None else None
                config = trtllm_config(spec, graph.dtype, self.options, section)
                write_text_atomic(scratch / CONFIG, json.dumps(config, indent=1) + "\n")
            elif isinstance(checkpoint, TrtLlmCheckpoint) and self._is_ordered(checkpoint, graph):
                weights = Path(checkpoint.location)
            else:
                self.convert(checkpoint, options, scratch, progress)
            config_path = (weights or scratch) / CONFIG
            facts = build_engines(config_path, weights, staging, arguments, plan, progress)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        facts |= {
            "tp_size": str(self.options.tp_size),
            "pp_size": str(self.options.pp_size),
            "kv_dtype": "fp8" if self.options.fp8 else graph.dtype,
            "tokens_per_block": str(self.options.tokens_per_block),
            "max_num_tokens": str(arguments.max_num_tokens),
            "chunked_context": str(arguments.chunked).lower(),
        }
        return facts if plan is None else facts | _serving_facts(plan, arguments)

    def open(
        self, directory: Path, caches: Sequence[CacheTensor], num_slots: int, max_seq_len: int
    ) -> Session:
        """Engines of this backend are run by TensorRT-LLM's executor. Raises UsageError."""
        raise UsageError(
            f"{directory}: a TensorRT-LLM engine is run by TensorRT-LLM's executor or by Triton, not by "
            "trt-razor generate; see docs/ngc.md"
        )

    def _section(self, spec: ModelSpec, graph: GraphOptions) -> RazorSection:
        if graph.head_map is None:
            raise RazorError("head map: missing; a Razor engine needs one")
        layout = rank_layout(graph.head_map, self.options.tp_size)
        return razor_section(spec, graph.head_map, layout, graph.policy)

    def _is_ordered(self, checkpoint: TrtLlmCheckpoint, graph: GraphOptions) -> bool:
        """Whether a checkpoint is already what ``convert`` would write."""
        if (checkpoint.tp_size, checkpoint.pp_size) != (self.options.tp_size, self.options.pp_size):
            return False
        found = section_of(Path(checkpoint.location))
        if graph.head_map is None or found is None:
            return graph.head_map is None and found is None
        return found == self._section(checkpoint.spec, graph)


def _check_original(
    checkpoint: TrtLlmCheckpoint, wanted: RazorSection | None, options: TrtLlmOptions
) -> None:
    """Heads are told by their place in the original model: what has been ordered cannot be again.

    Raises:
        UsageError: naming what the checkpoint was converted for and what is asked for instead.
    """
    found = section_of(Path(checkpoint.location))
    if found is None:
        return
    prefix = f"{checkpoint.location}: its heads are in order already, for tp_size {found.tp_size}"
    way_out = "convert the original checkpoint again"
    if wanted is None:
        raise UsageError(f"{prefix}; for a dense engine {way_out}, or add --razor")
    pairs: dict[str, tuple[Any, Any]] = {
        "tp_size": (found.tp_size, wanted.tp_size),
        "pp_size": (checkpoint.pp_size, options.pp_size),
        "model": (found.model[:12], wanted.model[:12]),
        "policy": (found.policy.to_json(), wanted.policy.to_json()),
        "digest of the head map": (found.heads[:12], wanted.heads[:12]),
        "num_retrieval": (list(found.num_retrieval), list(wanted.num_retrieval)),
    }
    changed = [f"{k}: {mine}, found {its}" for k, (mine, its) in pairs.items() if mine != its]
    if not changed:
        raise UsageError(f"{prefix}; build with it as it is, or {way_out}")
    raise UsageError(f"{prefix}; expected its {changed[0]}; build with exactly that, or {way_out}")


def section_of(folder: Path) -> RazorSection | None:
    """The Razor section of a TensorRT-LLM checkpoint, if its heads have been ordered already.

    Raises:
        UsageError: a wrong section, or none where a conversion has left its head map.
    """
    config = read_json(folder / CONFIG, "a TensorRT-LLM checkpoint's config.json")
    if SECTION not in config:
        if (folder / HEADS).exists():
            raise UsageError(
                f"{folder / CONFIG}: expected the object '{SECTION}', as {HEADS} lies beside it: its heads "
                f"have been moved, and without it nobody knows how; convert the original checkpoint again"
            )
        return None
    return RazorSection.from_json(config[SECTION], str(folder / CONFIG))


def _plugin() -> tuple[Path, Path]:
    """The plugin library and the one that servers preload, for the installed TensorRT."""
    from trt_razor.backends.tensorrt import TENSORRT, find_plugin, version_of
    from trt_razor.backends.trt_engine import import_module

    trt = import_module(TENSORRT, "building a TensorRT-LLM engine")
    plugin = find_plugin(trt)
    return plugin, plugin.with_name(PRELOAD.format(major=version_of(trt)[0]))


def _serving_facts(plan: RazorPlan, arguments: BuildArguments) -> dict[str, str]:
    """What a server of a Razor engine must be told, and what its caches take."""
    plugin, preload = _plugin()
    kv = plan.sequence_bytes(plan.max_seq_len, plan.temporary_rows(arguments))
    return {
        "local_cache": plan.local_cache.name.lower(),
        "max_attention_window_size": ",".join(map(str, plan.window_list())),
        "sink_token_length": str(plan.sink_token_length),
        "kv_bytes_per_sequence_per_rank": str(kv),
        "dense_kv_bytes_per_sequence_per_rank": str(plan.dense_bytes(plan.max_seq_len)),
        "plugin": plugin.name,
        "plugin_sha256": sha256_file(plugin),
        "preload": preload.name,
    }
