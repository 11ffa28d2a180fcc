"""A Triton model repository for an engine: complete, checked, and ready to start.

Layout::

    preprocessing/  tensorrt_llm/  postprocessing/  ensemble/  tensorrt_llm_bls/
        config.pbtxt
        1/                model.py, tokenizer/; of tensorrt_llm also engine/ if it was copied
    start.sh  README.md
    trt_razor.json        what the repository is, and its files: written last
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_razor.build_request import check_space
from trt_razor.engine import TOKENIZER_DIR, Engine
from trt_razor.errors import UsageError
from trt_razor.files import replace_directory, write_text_atomic
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.config import ModelConfig
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.interface import DataTypes
from trt_razor.serving.readme import README, ReadmeFacts, readme
from trt_razor.serving.repository_files import (
    ENGINE_DIR,
    MARKER,
    TRTLLM,
    Progress,
    check_output,
    copy_engine,
    marker_text,
    read_marker,
    write_model,
)
from trt_razor.serving.start_script import START_SCRIPT, PythonNeeds, own_script, trtllm_script
from trt_razor.serving.trtllm_repository import FRACTION, trtllm_facts, trtllm_parameters
from trt_razor.serving.wiring import check_models

__all__ = [
    "MARKER",
    "SAFE_PATH",
    "Progress",
    "RepositoryOptions",
    "read_marker",
    "write_repository",
]

SAFE_PATH = re.compile(r"[A-Za-z0-9_./,:=+@%~#-]+")
"""Paths of Python models: Triton hands them to a shell, unquoted, and to a Python that knows ASCII only."""
RUNTIMES = {
    "onnxruntime": ("onnxruntime",),
    "tensorrt": ("tensorrt", "cuda"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda"),
    TRTLLM: (),
}
"""What a backend's Python model imports."""
_TRTLLM_ONLY = (
    "kv_cache_free_gpu_mem_fraction",
    "max_tokens_in_paged_kv_cache",
    "batch_scheduler_policy",
    "gpu_device_ids",
)
_OWN_ONLY = ("slots", "max_input_tokens", "max_output_tokens")


@dataclass(frozen=True)
class RepositoryOptions:
    """What decides a repository. None = as the engine has it.

    Attributes:
        copy_engine: the engine goes into the repository (``tensorrt_llm/1/engine``); otherwise the
            repository names its path.
        mounted_at: absolute path under which the server will see the engine, or with
            ``copy_engine`` the repository; for containers. None = the same as here.
        force: replace a repository of ours that is there already.
        verify: check the engine's sha256 sums now, and have our own model check them at each load.
        prompt_format: default of ``prompt_format``: ``raw``, ``chat`` or ``messages``.
        exclude_input_in_output: default for requests that do not say.
        add_special_tokens, skip_special_tokens: of preprocessing and postprocessing.
        accumulate_tokens: ``tensorrt_llm_bls`` streams the whole text so far, not pieces.
        max_batch_size: rows of a request; at most the engine's.
        max_queue_size: requests that may wait for a slot. 0 with TensorRT-LLM = its own default.
        preprocessing_instances, postprocessing_instances, bls_instances: processes of each model;
            one of ``tensorrt_llm_bls`` answers one request at a time.
        slots, max_input_tokens, max_output_tokens: own engines only: sequences at a time and limits
            of a request.
        decoupled: TensorRT-LLM engines only (own engines always are): stream answers.
        kv_cache_free_gpu_mem_fraction: TensorRT-LLM only: share of the free memory for KV pools.
        max_tokens_in_paged_kv_cache, batch_scheduler_policy, gpu_device_ids: TensorRT-LLM only, as
            its backend has them.
    """

    copy_engine: bool = False
    mounted_at: str | None = None
    force: bool = False
    verify: bool = True
    prompt_format: str = "raw"
    exclude_input_in_output: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    accumulate_tokens: bool = False
    max_batch_size: int | None = None
    max_queue_size: int | None = None
    preprocessing_instances: int = 1
    postprocessing_instances: int = 1
    bls_instances: int = 4
    slots: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    decoupled: bool = True
    kv_cache_free_gpu_mem_fraction: float | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    batch_scheduler_policy: str | None = None
    gpu_device_ids: str | None = None


def write_repository(
    engine: Path,
    output: Path,
    options: RepositoryOptions = RepositoryOptions(),
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Write the model repository of an engine directory; whole or not at all.

    Args:
        output: new, empty, or with ``force`` a repository of ours.

    Returns:
        ``output``, absolute.

    Raises:
        UsageError: not an engine, a folder there that is not ours to replace, or a wrong option.
        RazorError: a damaged engine, or a disk that cannot take the repository.
    """
    engine, output = Path(os.path.abspath(engine)), Path(os.path.abspath(output))
    check_output(output, engine, options.force)
    loaded = Engine.load(engine, verify=False)
    plan = _plan(loaded, output, options)  # before minutes of reading, not after them
    if options.copy_engine:
        check_space(output, sum(f.size for f in loaded.manifest.files))
    elif options.verify:
        loaded = Engine.load(engine, True, lambda done, total: progress("verify", done, total))
    with replace_directory(output, "repository") as staging:
        for config in plan.configs:
            write_model(staging / config.name, config, loaded)
        if options.copy_engine:
            copy_engine(loaded, staging / "tensorrt_llm" / ENGINE_DIR, options.verify, progress)
        write_text_atomic(staging / README, plan.readme)
        write_text_atomic(staging / START_SCRIPT, plan.script)
        os.chmod(staging / START_SCRIPT, 0o755)
        write_text_atomic(staging / MARKER, marker_text(staging, loaded, options.copy_engine))
        check_output(output, engine, options.force)  # something may have come there meanwhile
    return output


# What will be written -----------------------------------------------------------------------------
@dataclass(frozen=True)
class _Plan:
    configs: Sequence[ModelConfig]
    script: str
    readme: str


def _plan(engine: Engine, output: Path, options: RepositoryOptions) -> _Plan:
    """Everything of a repository but the engine, so that nothing is refused after the copying.

    Raises:
        UsageError: an option that this engine cannot have. RazorError: a damaged engine.
    """
    own = engine.manifest.backend != TRTLLM
    tokenizer = engine.tokenizer()
    _check_options(engine, options, own, tokenizer)
    where = _engine_path(engine, output, options, own)
    rows = options.max_batch_size
    rows = engine.manifest.max_batch_size if rows is None else rows
    shared: dict[str, Any] = {
        "engine_dir": where,
        "tokenizer_dir": f"1/{TOKENIZER_DIR}",
        "vocab_size": engine.manifest.spec.vocab_size,
        "max_input_tokens": options.max_input_tokens or engine.manifest.max_seq_len,
        "max_batch_size": rows,
        "prompt_format": options.prompt_format,
        "add_special_tokens": options.add_special_tokens,
        "skip_special_tokens": options.skip_special_tokens,
        "exclude_input_in_output": options.exclude_input_in_output,
        "accumulate_tokens": options.accumulate_tokens,
        "preprocessing_instances": options.preprocessing_instances,
        "postprocessing_instances": options.postprocessing_instances,
        "bls_instances": options.bls_instances,
    }
    facts = ReadmeFacts(
        head_map=engine.head_map,
        engine=where,
        tokenizer=tokenizer is not None,
        template=tokenizer is not None and tokenizer.chat_template is not None,
        prompt_format=options.prompt_format,
        echo=not options.exclude_input_in_output,
        rows=rows,
        queue=0,
    )
    needs = _python_needs(engine, tokenizer, own)
    if own:
        configs, script, facts = _own(engine, options, shared, needs, facts)
    else:
        configs, script, facts = _trtllm(engine, options, shared, needs, facts)
    if tokenizer is None:  # the other models are about texts
        configs = [c for c in configs if c.name == "tensorrt_llm"]
    for problem in check_models(configs):
        raise UsageError(problem)
    if any(c.backend == "python" for c in configs):
        _check_path(output, options, own, where)
    return _Plan(configs, script, readme(engine.manifest, facts))


def _check_path(output: Path, options: RepositoryOptions, own: bool, engine: str) -> None:
    """Refuse a place that Triton's Python models cannot be loaded from; it would hang."""
    seen = str(output) if options.mounted_at is None else ""
    if options.copy_engine and options.mounted_at is not None:
        seen = options.mounted_at
    if seen and not SAFE_PATH.fullmatch(seen):
        raise UsageError(
            f"{seen}: Triton loads no Python models from a path with spaces, quotes, other signs of a "
            "shell or letters beyond ASCII; choose another --output (or --mounted-at)"
        )
    if own and not engine.isascii():
        raise UsageError(
            f"{engine}: Triton's Python models find no path with letters beyond ASCII; rename the engine's "
            "folder, or copy the engine into the repository"
        )


def _check_options(
    engine: Engine, options: RepositoryOptions, own: bool, tokenizer: Tokenizer | None
) -> None:
    m = engine.manifest
    flavour = f"an engine of the backend {m.backend}"
    wrong = [n for n in (_TRTLLM_ONLY if own else _OWN_ONLY) if getattr(options, n) is not None]
    if own and not options.decoupled:
        wrong.append("decoupled")
    if wrong:
        raise UsageError(f"{wrong[0]}: does not apply to {flavour}; leave it out")
    for name in ("max_batch_size", "slots"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= m.max_batch_size:
            raise UsageError(
                f"{name}: expected 1..{m.max_batch_size}, the max_batch_size of this engine, found {value}"
            )
    for name in ("max_input_tokens", "max_output_tokens"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= m.max_seq_len:
            raise UsageError(
                f"{name}: expected 1..{m.max_seq_len}, the max_seq_len of this engine, found {value}"
            )
    if options.prompt_format not in ("raw", "chat", "messages"):
        raise UsageError(
            f"prompt_format: expected raw, chat or messages, found {options.prompt_format!r}"
        )
    if options.prompt_format != "raw" and (tokenizer is None or tokenizer.chat_template is None):
        raise UsageError(
            f"prompt_format: {options.prompt_format} needs a chat template, and this engine has none; "
            "use raw"
        )


def _engine_path(engine: Engine, output: Path, options: RepositoryOptions, own: bool) -> str:
    """``gpt_model_path``: as the server will see the engine.

    Python models take a path relative to their folder, so their repository may be moved with its
    engine; the stock backend of TensorRT-LLM takes an absolute one only.
    """
    mounted = options.mounted_at
    if mounted is not None:
        if not mounted.startswith("/") or not mounted.isprintable() or "${" in mounted:
            raise UsageError(
                f"mounted_at: expected an absolute path as the server will see it, found {mounted!r}"
            )
        mounted = posixpath.normpath(mounted)
    if not options.copy_engine:
        return mounted or str(engine.directory)
    if own:
        return ENGINE_DIR
    return f"{(mounted or str(output)).rstrip('/')}/tensorrt_llm/{ENGINE_DIR}"


def _own(
    engine: Engine,
    options: RepositoryOptions,
    shared: dict[str, Any],
    needs: PythonNeeds,
    facts: ReadmeFacts,
) -> tuple[list[ModelConfig], str, ReadmeFacts]:
    """Configs, start script and facts for an engine of our own."""
    m = engine.manifest
    slots = m.max_batch_size if options.slots is None else options.slots
    queue = 64 if options.max_queue_size is None else options.max_queue_size
    longest = options.max_input_tokens or m.max_seq_len
    most = options.max_output_tokens or m.max_seq_len
    settings = OwnSettings(
        **shared,
        slots=slots,
        max_queue_size=queue,
        max_output_tokens=most,
        verify=options.verify,
    )
    script = own_script(shared["engine_dir"], needs, gpu=m.backend != "onnxruntime")
    facts = dataclasses.replace(facts, queue=queue, slots=slots, max_input=longest, max_output=most)
    return own_configs(settings), script, facts


def _trtllm(
    engine: Engine,
    options: RepositoryOptions,
    shared: dict[str, Any],
    needs: PythonNeeds,
    facts: ReadmeFacts,
) -> tuple[list[ModelConfig], str, ReadmeFacts]:
    """Configs, start script and facts for an engine of TensorRT-LLM."""
    served = trtllm_facts(engine)
    queue = options.max_queue_size or 0
    given = {n: v for n in _TRTLLM_ONLY if (v := getattr(options, n)) is not None}
    settings = TrtllmSettings(
        **shared,
        max_queue_size=queue,
        decoupled=options.decoupled,
        data_types=DataTypes(logits=served.logits),
        parameters=trtllm_parameters(served, **given),
    )
    script = trtllm_script(shared["engine_dir"], needs, served.ranks)
    fraction = given.get("kv_cache_free_gpu_mem_fraction", FRACTION)
    facts = dataclasses.replace(
        facts,
        decoupled=options.decoupled,
        world_size=served.settings.world_size,
        state_slots=served.state_slots,
        fraction=str(fraction),
        windows=served.windows,
        sinks=served.sinks,
    )
    return trtllm_configs(settings), script, facts


def _python_needs(engine: Engine, tokenizer: Tokenizer | None, own: bool) -> PythonNeeds:
    """What the repository's Python models import."""
    modules, extras = ["trt_razor", "numpy"], []
    if tokenizer is not None:
        modules.append("tokenizers")
        extras.append("models")
        if tokenizer.chat_template is not None:
            modules.append("jinja2")
    elif not own:
        return PythonNeeds((), ())
    if own:
        modules += RUNTIMES[engine.manifest.backend]
        extras.append(engine.manifest.backend)
    return PythonNeeds(modules, [f"trt-razor[{','.join(extras)}]"])
