"""``trtllm-build`` (``python -m tensorrt_llm.commands.build``): the options that our documents name.

Read (1.1 - 1.2 age): model_cls_file is loaded as a module called ``models``, the config class comes from
the architecture, without a checkpoint the model gets dummy weights, the assertion on streamingllm
(1.1 and newer), one process for all ranks with ``--workers 1``. Left out: more workers, other options.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from .._release import RELEASE
from ..builder import BuildConfig, Engine, build
from ..models import MODEL_MAP, PretrainedConfig
from ..plugin import PluginConfig
from ..plugin.plugin import DEFAULTS

_NUMBERS = ("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width", "max_num_tokens")
_NO_OPTION = ("dtype", "paged_kv_cache", "manage_weights")
"""Settings of PluginConfig that are no options of the command."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trtllm-build")
    for name in ("checkpoint_dir", "model_config", "model_cls_file", "model_cls_name"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--output_dir", default="engine_outputs")
    for name in (*_NUMBERS, "opt_num_tokens", "workers"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--gather_context_logits", action="store_true")
    parser.add_argument("--log_level", default="info")
    for name, default in DEFAULTS.items():
        if name not in _NO_OPTION:
            parser.add_argument(f"--{name}", type=int if type(default) is int else str)
    return parser.parse_args(argv)


def _load_model_class(file: str, name: str) -> Any:
    loader = SourceFileLoader("models", file)
    spec = spec_from_loader("models", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["models"] = module
    loader.exec_module(module)
    return getattr(module, name)


def build_model(
    build_config: BuildConfig, rank: int, ckpt_dir: str | None, model_config: Any, model_cls: Any
) -> Engine:
    config = copy.deepcopy(model_config)
    if RELEASE >= (1, 1):
        assert not build_config.plugin_config.streamingllm, "streamingllm"
    config.set_rank(rank)
    model_cls = model_cls or MODEL_MAP[config.architecture]
    if ckpt_dir is None:
        model = model_cls(config)
    else:
        model = model_cls.from_checkpoint(ckpt_dir, config=config)
    return build(model, build_config)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model_cls = None
    if args.model_cls_file is not None:
        assert args.model_cls_name is not None
        model_cls = _load_model_class(args.model_cls_file, args.model_cls_name)
    checkpoint = args.checkpoint_dir
    config_path = args.model_config or f"{checkpoint}/config.json"
    if checkpoint is not None and checkpoint.lower().endswith(".json"):
        config_path, checkpoint = checkpoint, None
    config = PretrainedConfig.from_json_file(config_path)
    values = {n: getattr(args, n) for n in (*_NUMBERS, "opt_num_tokens") if getattr(args, n)}
    build_config = BuildConfig(
        **values,
        gather_context_logits=args.gather_context_logits,
        plugin_config=PluginConfig.from_arguments(args),
    )
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    for rank in range(config.mapping.world_size):
        engine = build_model(build_config, rank, checkpoint, config, model_cls)
        engine.save(args.output_dir)


if __name__ == "__main__":
    main()
