"""config.json of an engine: made what the plan says, and checked as TensorRT-LLM's runtime reads it.

The network is made with the model's own number of layers, but the runtime must hear of the cache
layers instead. The model classes say so while they are built; ``finish`` makes sure of it, whatever
the builder wrote. Everything that the plan hangs on stays in the file (the ``razor`` section with
``local_cache`` beside it, sizes, ranks, version), so that ``plan_of`` can make it again from an engine
alone:

    python -m trt_razor.trtllm.engine_json DIR

does that for an engine that trtllm-build made, and says what the server must be told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.files import write_text_atomic
from trt_razor.models.stored import read_json
from trt_razor.trtllm.engine_config import (
    SECTION,
    RazorPlan,
    RazorSection,
    TrtLlmOptions,
    plan_engine,
)
from trt_razor.trtllm.model_config import spec_from_trtllm_config
from trt_razor.trtllm.options import CONFIG, LOCAL_CACHE
from trt_razor.trtllm.release import LocalCache, release_of
from trt_razor.trtllm.runtime_fields import (
    STATE_SIZES,
    check_engine_json,
    check_field,
    check_rank_files,
    first_difference,
    kv_algorithm,
    require_object,
)

__all__ = [
    "check_engine_json",
    "check_rank_files",
    "checkpoint_config",
    "finish",
    "first_difference",
    "local_cache_of",
    "plan_of",
    "read_config",
    "with_local_cache",
]


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of an engine.

    Raises:
        UsageError: there is none. RazorError: unreadable, too large, or no JSON object.
    """
    return read_json(directory / CONFIG, "the config.json of a TensorRT-LLM engine")


def finish(directory: Path, plan: RazorPlan) -> dict[str, Any]:
    """Make ``config.json`` of an engine say what the plan says, and check it.

    Doing it twice changes nothing; a file that is right already is not written.

    Returns:
        the content.

    Raises:
        RazorError: the file cannot be read or written, or is not of an engine of this plan; it is
            unchanged then.
    """
    path = directory / CONFIG
    config = read_config(directory)
    for name in (f"pretrained_config.{SECTION}", "build_config.plugin_config"):
        require_object(config, name, str(path))
    build = config["build_config"]
    plugins = plan.plugin_config(build["plugin_config"])
    pretrained = plan.pretrained_config(config["pretrained_config"])
    pretrained[SECTION] = with_local_cache(pretrained[SECTION], plan.local_cache)
    done = {
        **config,
        "pretrained_config": pretrained,
        "build_config": {**build, "plugin_config": plugins},
    }
    check_engine_json(done, plan, str(path))
    if done != config:
        write_text_atomic(path, json.dumps(done, indent=4) + "\n")
    return done


# The plan of an engine ----------------------------------------------------------------------------
def plan_of(config: Mapping[str, Any], name: str, where: str = CONFIG) -> RazorPlan:
    """The plan of a Razor engine, from its config.json, before or after ``finish``.

    Args:
        name: what messages call the model.

    Raises:
        UsageError: not a Razor engine, or one that could not be planned today.
        RazorError: a field is missing or wrong.
    """
    require_object(config, "pretrained_config.mapping", where)
    require_object(config, "build_config.plugin_config", where)
    pretrained, build = config["pretrained_config"], config["build_config"]
    if pretrained.get(SECTION) is None:
        raise UsageError(
            f"{where}: pretrained_config.{SECTION}: missing: not a Razor engine; give trtllm-build a "
            "converted checkpoint and --model_cls_file (docs/tensorrt-llm.md)"
        )
    section = RazorSection.from_json(pretrained[SECTION], f"{where}: pretrained_config")
    for field in (
        "version",
        "pretrained_config.architecture",
        "pretrained_config.dtype",
        "pretrained_config.mapping.tp_size",
        "pretrained_config.mapping.pp_size",
        "pretrained_config.quantization",
        "pretrained_config.quantization.kv_cache_quant_algo",
        "build_config.max_seq_len",
        "build_config.plugin_config.tokens_per_block",
    ):
        check_field(config, field, where)
    mapping = pretrained["mapping"]
    options = TrtLlmOptions(
        tp_size=mapping["tp_size"],
        pp_size=mapping.get("pp_size") or 1,
        kv_dtype=(kv_algorithm(pretrained) or "auto").lower(),
        tokens_per_block=build["plugin_config"]["tokens_per_block"],
        local_cache=local_cache_of(pretrained, where),
    )
    spec = spec_from_trtllm_config(checkpoint_config(pretrained, section), name, where)
    release = release_of(config["version"])
    return plan_engine(spec, section, build["max_seq_len"], pretrained["dtype"], options, release)


def checkpoint_config(pretrained: Mapping[str, Any], section: RazorSection) -> dict[str, Any]:
    """``pretrained_config`` as the checkpoint had it: undoes ``RazorPlan.pretrained_config``."""
    added = ("num_kv_heads_per_layer", "runtime_defaults", "layer_types", *STATE_SIZES)
    config = {k: v for k, v in pretrained.items() if k not in added}
    config["num_hidden_layers"] = len(section.num_retrieval)
    config["architecture"] = config.pop("razor_architecture", pretrained.get("architecture"))
    return config


def with_local_cache(section: Mapping[str, Any], cache: LocalCache) -> dict[str, Any]:
    """The ``razor`` object of a config.json, saying where local heads live."""
    return {**section, LOCAL_CACHE: cache.name.lower()}


def local_cache_of(config: Mapping[str, Any], where: str = CONFIG) -> LocalCache | None:
    """Where a checkpoint or an engine wants its local heads; None = as the release has it.

    Args:
        config: of a checkpoint, or ``pretrained_config`` of an engine.

    Raises:
        UsageError: an unknown name.
    """
    section = config.get(SECTION)
    name = section.get(LOCAL_CACHE) if isinstance(section, Mapping) else None
    if name is None:
        return LocalCache.SLOTS if "razor_architecture" in config else None
    names = {cache.name.lower(): cache for cache in LocalCache}
    if not isinstance(name, str) or name not in names:
        raise UsageError(
            f"{where}: {SECTION}.{LOCAL_CACHE}: expected {' or '.join(names)}, found {name!r:.40}"
        )
    return names[name]


# Command ------------------------------------------------------------------------------------------
def main(arguments: list[str] | None = None) -> int:
    """Finish an engine of trtllm-build, and print what the server must be told."""
    # A command: what it needs of the floors above is no business of the functions here.
    from trt_razor.cli_arguments import Parser
    from trt_razor.console import guarded, out

    parser = Parser(
        prog="python -m trt_razor.trtllm.engine_json",
        description="Finish the config.json of a Razor engine that trtllm-build made.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the engine's folder")
    directory: Path = parser.parse_args(arguments).directory

    def run() -> int:
        path = directory / CONFIG
        plan = plan_of(read_config(directory), directory.resolve().name, str(path))
        finish(directory, plan)
        check_rank_files(directory, plan.tp_size * plan.pp_size)
        out.print(f"{path}: {len(plan.layer_types)} cache layers", markup=False)
        windows = ",".join(map(str, plan.window_list()))
        out.print(f"max_attention_window_size: {windows}", markup=False)
        sinks = plan.sink_token_length or "leave unset"
        out.print(f"sink_token_length: {sinks}", markup=False)
        return 0

    return guarded(run)


if __name__ == "__main__":
    raise SystemExit(main())
