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
import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from trt_razor import __version__
from trt_razor.build_request import check_space
from trt_razor.engine import MANIFEST, TOKENIZER_DIR, Engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import CHUNK, replace_directory, write_text_atomic
from trt_razor.models.stored import read_json
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.config import ModelConfig
from trt_razor.serving.flavours import OwnSettings, TrtllmSettings, own_configs, trtllm_configs
from trt_razor.serving.interface import DataTypes
from trt_razor.serving.readme import README, ReadmeFacts, readme
from trt_razor.serving.start_script import START_SCRIPT, PythonNeeds, own_script, trtllm_script
from trt_razor.serving.trtllm_repository import TrtLlmFacts, trtllm_facts, trtllm_parameters
from trt_razor.serving.wiring import check_models

MARKER = "trt_razor.json"
SCHEMA = "trt_razor.repository"
SCHEMA_VERSION = 1
TRTLLM = "tensorrt-llm"
SAFE_PATH = re.compile(r"[A-Za-z0-9_./,:=+@%~#-]+")
"""Paths of Python models: Triton hands them to a shell, unquoted, and to a Python that knows ASCII only."""
ENGINE_DIR = "1/engine"
"""Where a copied engine lies in the folder of its model."""
MODULES = {
    "tensorrt_llm": "trt_razor.serving.models.engine",
    "preprocessing": "trt_razor.serving.models.preprocessing",
    "postprocessing": "trt_razor.serving.models.postprocessing",
    "tensorrt_llm_bls": "trt_razor.serving.models.bls",
}
"""Python models: the module that has their ``TritonPythonModel``."""
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

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); total 0 = unknown. ``console.Bars`` is one."""


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
        max_batch_size: rows of a request, and with TensorRT-LLM sequences at a time; at most the
            engine's.
        max_queue_size: requests that may wait for a slot. 0 with TensorRT-LLM = its own default.
        preprocessing_instances, postprocessing_instances, bls_instances: copies of each model.
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
    bls_instances: int = 1
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
    options: RepositoryOptions = RepositoryOptions(),  # noqa: B008 (frozen)
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
    _check_output(output, engine, options.force)
    loaded = Engine.load(
        engine, options.verify, lambda done, total: progress("verify", done, total)
    )
    plan = _plan(loaded, output, options)
    if options.copy_engine:
        check_space(output, sum(f.size for f in loaded.manifest.files))
    with replace_directory(output, "repository") as staging:
        for config in plan.configs:
            _write_model(staging / config.name, config, loaded)
        if options.copy_engine:
            _copy_engine(loaded, staging / "tensorrt_llm" / ENGINE_DIR, progress)
        write_text_atomic(staging / README, plan.readme)
        write_text_atomic(staging / START_SCRIPT, plan.script)
        os.chmod(staging / START_SCRIPT, 0o755)
        write_text_atomic(staging / MARKER, _marker(staging, loaded, options))
        _check_output(output, engine, options.force)  # something may have come there meanwhile
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
        queue=options.max_queue_size or 0,
    )
    needs = _python_needs(engine, tokenizer, own)
    if own:
        settings = _own_settings(engine, options, shared)
        configs = own_configs(settings)
        threads = max(160, settings.slots + settings.max_queue_size + 32)
        script = own_script(where, needs, threads, gpu=engine.manifest.backend != "onnxruntime")
        facts = dataclasses.replace(
            facts,
            queue=settings.max_queue_size,
            slots=settings.slots,
            max_input=settings.max_input_tokens,
            max_output=settings.max_output_tokens,
        )
    else:
        served = trtllm_facts(engine)
        configs = trtllm_configs(_trtllm_settings(served, options, shared))
        threads = max(160, engine.manifest.max_batch_size + (options.max_queue_size or 0) + 32)
        script = trtllm_script(where, needs, threads, served.ranks)
        facts = dataclasses.replace(
            facts,
            decoupled=options.decoupled,
            world_size=served.settings.world_size,
            state_slots=served.state_slots,
            fraction=_parameter(configs, "kv_cache_free_gpu_mem_fraction"),
            windows=served.windows,
            sinks=served.sinks,
        )
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


def _parameter(configs: Sequence[ModelConfig], name: str) -> str:
    return next(c for c in configs if c.name == "tensorrt_llm").parameter(name) or ""


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


def _own_settings(
    engine: Engine, options: RepositoryOptions, shared: dict[str, Any]
) -> OwnSettings:
    m = engine.manifest
    return OwnSettings(
        **shared,
        slots=m.max_batch_size if options.slots is None else options.slots,
        max_queue_size=64 if options.max_queue_size is None else options.max_queue_size,
        max_input_tokens=options.max_input_tokens or m.max_seq_len,
        max_output_tokens=options.max_output_tokens or m.max_seq_len,
        verify=options.verify,
    )


def _trtllm_settings(
    served: TrtLlmFacts, options: RepositoryOptions, shared: dict[str, Any]
) -> TrtllmSettings:
    given = {n: v for n in _TRTLLM_ONLY if (v := getattr(options, n)) is not None}
    return TrtllmSettings(
        **shared,
        max_queue_size=options.max_queue_size or 0,
        decoupled=options.decoupled,
        data_types=DataTypes(logits=served.logits),
        parameters=trtllm_parameters(served, **given),
    )


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


# Files --------------------------------------------------------------------------------------------
def _write_model(folder: Path, config: ModelConfig, engine: Engine) -> None:
    write_text_atomic(folder / "config.pbtxt", config.text())
    version = folder / "1"
    version.mkdir()
    if config.backend == "python":
        write_text_atomic(version / "model.py", _shim(config.name, engine))
    else:
        # A version must be there, and some ways of copying leave empty folders out.
        write_text_atomic(version / ".keep", "")
    if config.parameter("tokenizer_dir") == f"1/{TOKENIZER_DIR}":
        for record in engine.manifest.files:
            if record.path.startswith(f"{TOKENIZER_DIR}/"):
                target = version / record.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(engine.directory / record.path, target)
        Tokenizer.load(version / TOKENIZER_DIR)


def _shim(name: str, engine: Engine) -> str:
    """``model.py``: the model itself is in the installed package."""
    backend = engine.manifest.backend
    extra = backend if name == "tensorrt_llm" else "models"
    return f'''"""Triton model {name}, written by trt-razor; the model itself is in the package trt_razor."""

import sys

try:
    from {MODULES[name]} import TritonPythonModel
except ImportError as e:
    raise ImportError(
        f"model {name}: {{e}}; Python {{sys.version.split()[0]}} of {{sys.prefix}} runs it: install there "
        "with: pip install 'trt-razor[{extra}]'"
    ) from None

__all__ = ["TritonPythonModel"]
'''


def _copy_engine(engine: Engine, target: Path, progress: Progress) -> None:
    """A copy of its own: neither hard links nor what lies in the folder beside the engine's files.

    Raises:
        RazorError: a file cannot be read, or is not what the manifest says any more.
    """
    files = engine.manifest.files
    total, done = sum(f.size for f in files), 0
    progress("copy", 0, total)
    for record in files:
        path = target / record.path
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 0
        with open(engine.directory / record.path, "rb") as source, open(path, "wb") as sink:
            while block := source.read(CHUNK):
                sink.write(block)
                size += len(block)
                done += len(block)
                progress("copy", done, total)
            sink.flush()
            os.fsync(sink.fileno())
        if size != record.size:
            raise RazorError(
                f"{engine.directory / record.path}: size: expected {record.size} bytes, found {size}; it "
                "was changed while it was copied, try again"
            )
    shutil.copyfile(engine.directory / MANIFEST, target / MANIFEST)
    if Engine.load(target, verify=False).manifest != engine.manifest:
        raise RazorError(f"{engine.directory}: was replaced while it was copied; try again")


# What is there already ----------------------------------------------------------------------------
def _marker(folder: Path, engine: Engine, options: RepositoryOptions) -> str:
    m = engine.manifest
    data = {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "trt_razor": __version__,
        "flavour": "tensorrtllm" if m.backend == TRTLLM else "python",
        "model": m.spec.name,
        "models": sorted(p.name for p in folder.iterdir() if p.is_dir()),
        "engine": {
            "backend": m.backend,
            "digest": m.to_json()["digest"],
            "path": None if options.copy_engine else str(engine.directory),
        },
        "files": _files_of(folder),
    }
    return json.dumps(data, indent=1) + "\n"


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What a repository of ours says about itself; None for any other folder."""
    try:
        data = read_json(folder / MARKER, "the repository's description")
    except RazorError:
        return None
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else None


def _check_output(output: Path, engine: Path, force: bool) -> None:
    """Never touch what is not a repository of ours, nor one without being told to."""
    real, source = Path(os.path.realpath(output)), Path(os.path.realpath(engine))
    for inner, outer in ((real, source), (source, real)):
        if inner == outer or outer in inner.parents:
            raise UsageError(
                f"{output}: the engine {engine} and the repository lie in one another; choose another "
                "--output"
            )
    if real == Path(os.path.realpath(os.curdir)):
        raise UsageError(f"{output}: is the current folder; give a folder in it as --output")
    try:
        if not os.path.lexists(output):
            return
        if not output.is_dir():
            raise UsageError(f"{output}: is a file; choose another --output")
        if not any(output.iterdir()):
            return
    except OSError as e:
        raise RazorError(f"{output}: cannot use it as --output: {e.strerror or e}") from None
    marker = read_marker(output)
    if marker is None:
        raise UsageError(
            f"{output}: exists and is not a model repository of ours, so it will not be touched; choose "
            "another --output, or delete it yourself"
        )
    if not force:
        raise UsageError(f"{output}: a model repository is already there; --force replaces it")
    listed = marker.get("files")
    known = {MARKER, *(listed if isinstance(listed, list) else [])}
    foreign = [f for f in _files_of(output) if f not in known]
    if foreign:
        others = f" (nor are {len(foreign) - 1} others)" if len(foreign) > 1 else ""
        raise UsageError(
            f"{output / foreign[0]}: is not of the repository there{others}, so it will not be replaced; "
            "move it away, or choose another --output"
        )


def _files_of(folder: Path) -> list[str]:
    """POSIX paths of all files below a folder, sorted; what Python leaves beside models is nobody's."""
    found = []
    for at, _, names in os.walk(folder):
        relative = [(Path(at) / n).relative_to(folder) for n in names]
        found += [PurePosixPath(r).as_posix() for r in relative if "__pycache__" not in r.parts]
    return sorted(found)
