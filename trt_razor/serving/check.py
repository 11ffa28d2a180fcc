"""Offline check of a model repository: what a server would refuse, and what it would not notice.

Nothing of the repository runs. Reads every ``config.pbtxt`` with protobuf's own parser (extra
``triton``), then looks at the files beside it and at how the models fit together (``wiring``).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.serving.config import DynamicBatching, ModelConfig, Step
from trt_razor.serving.interface import MODELS, Tensor
from trt_razor.serving.parameters import ENVIRONMENT, PARAMETERS
from trt_razor.serving.repository_files import read_marker
from trt_razor.serving.wiring import check_models, is_own

MAX_MODELS = 100
MAX_CONFIG_BYTES = 1 << 20
MAX_SOURCE_BYTES = 1 << 20
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


def check_repository(folder: Path, elsewhere: str | None = None) -> list[str]:
    """What is wrong with a repository of ours, one line each; empty = nothing.

    Args:
        elsewhere: absolute paths that begin with this folder are those of another machine (of a
            container): they are not looked for here.

    Raises:
        UsageError: no such folder.
        RazorError: a folder that cannot be listed.
        MissingExtra: without the packages of the extra ``triton``.
    """
    schema = _schema()
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected the folder of a model repository, found none")
    root = Path(os.path.realpath(folder))
    names = [name for name in _folders(root) if not name.startswith(".")]
    if len(names) > MAX_MODELS:
        return [f"{folder}: expected at most {MAX_MODELS} models, found {len(names)} folders"]
    # tensorrt_llm alone is whole too: ids in, ids out, for an engine without a tokenizer.
    wanted = () if names == ["tensorrt_llm"] else MODELS
    findings = [f"model {name!r} is missing" for name in wanted if name not in names]
    configs = []
    for name in names:
        config, problems = _read(root, name, schema)
        if config is not None:
            configs.append(config)
            problems += _files(root, name, config, elsewhere)
        findings += [f"model {name!r}: {text}" for text in problems]
    return [*findings, *_lost_files(root), *check_models(configs)]


# Files --------------------------------------------------------------------------------------------
def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    except OSError as e:
        raise RazorError(f"{path}: cannot be listed: {e.strerror or e}") from None


def _lost_files(root: Path) -> Iterator[str]:
    """Files that were written with the repository and are gone; others tell of models and folders."""
    listed = (read_marker(root) or {}).get("files")
    for name in listed if isinstance(listed, list) else ():
        path = os.path.join(root, str(name))
        told = os.path.basename(path) in ("config.pbtxt", "model.py")
        if not told and os.path.isdir(os.path.dirname(path)) and not os.path.exists(path):
            yield f"{name}: is missing"


def _inside(root: Path, path: Path) -> str | None:
    """Why ``path`` is not something of this repository, or None."""
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != str(root):
        return f"leads out of the repository, to {real}"
    return None


def _text(root: Path, path: Path, most: int) -> tuple[str, str | None]:
    """A file's text, or why it cannot be had."""
    if (problem := _inside(root, path)) is not None:
        return "", problem
    try:
        with open(path, "rb", opener=_opener) as f:
            info = os.fstat(f.fileno())
            if not stat.S_ISREG(info.st_mode):
                return "", "expected a file, found something else"
            if info.st_size > most:
                return "", f"expected at most {most} bytes, found {info.st_size}"
            data = f.read(most + 1)
        return data.decode("utf-8"), None
    except FileNotFoundError:
        return "", "is missing"
    except OSError as e:
        return "", f"cannot read: {e.strerror or e}"
    except UnicodeDecodeError as e:
        return "", f"expected UTF-8 text, found byte 0x{data[e.start]:02x} at {e.start}"


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe must not block the check


def _files(root: Path, name: str, config: ModelConfig, elsewhere: str | None) -> list[str]:
    model = root / name
    return [*_versions(root, model, config), *_named_files(root, model, config, elsewhere)]


def _versions(root: Path, model: Path, config: ModelConfig) -> Iterator[str]:
    versions = [name for name in _folders(model) if name.isdigit()]
    if not versions:
        yield "expected a version folder such as '1', found none"
    for version in versions:
        if not _VERSION.fullmatch(version):
            yield f"version folder {version!r}: expected a number of at least 1"
        if config.backend != "python":
            continue
        source, problem = _text(root, model / version / "model.py", MAX_SOURCE_BYTES)
        if problem is None:
            problem = _not_python(source)
        if problem is not None:
            yield f"{version}/model.py: {problem}"


def _not_python(source: str) -> str | None:
    try:
        compile(source, "model.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        line = getattr(e, "lineno", None)
        return f"not Python: {getattr(e, 'msg', e)}" + (f" in line {line}" if line else "")
    if "TritonPythonModel" not in source:
        return "expected a TritonPythonModel, found none"
    return None


def _named_files(
    root: Path, model: Path, config: ModelConfig, elsewhere: str | None
) -> Iterator[str]:
    """Files and folders that parameters name."""
    table = PARAMETERS[is_own(config)].get(config.name, {})
    for name, value in config.parameters:
        kind = "environment" if name == ENVIRONMENT else table[name].kind if name in table else ""
        if kind not in ("folder", "place", "file", "environment") or "\0" in value:
            continue
        if os.path.isabs(value):
            if elsewhere is not None and Path(value).is_relative_to(elsewhere):
                continue
            path = Path(value)
        else:
            if kind != "folder":
                continue  # the value itself is already a finding
            path = model / value
            if (problem := _inside(root, path)) is not None:
                yield f"parameter {name!r}: {value!r} {problem}"
                continue
        if kind == "environment":
            if not path.exists():
                yield f"parameter {name!r}: {value!r} does not exist"
        elif not (path.is_file() if kind == "file" else path.is_dir()):
            wanted = "file" if kind == "file" else "folder"
            found = "something else" if path.exists() else "nothing"
            yield f"parameter {name!r}: expected a {wanted} at {value!r}, found {found}"


# config.pbtxt -------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _schema() -> tuple[Any, Any]:
    """text_format, and Triton's ModelConfig with lists for maps: a key that is there twice is lost
    in a map."""
    why = "the offline check of a model repository"
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
    except ImportError:
        raise MissingExtra("protobuf", "triton", why) from None
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise MissingExtra("tritonclient[grpc]", "triton", why) from None
    file = descriptor_pb2.FileDescriptorProto()
    model_config_pb2.DESCRIPTOR.CopyToProto(file)
    waiting = list(file.message_type)
    while waiting:
        message = waiting.pop()
        waiting.extend(message.nested_type)
        if message.options.map_entry:
            message.ClearField("options")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    listed = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format, listed


def _read(root: Path, name: str, schema: tuple[Any, Any]) -> tuple[ModelConfig | None, list[str]]:
    text_format, message_class = schema
    text, problem = _text(root, root / name / "config.pbtxt", MAX_CONFIG_BYTES)
    if problem is not None:
        return None, [f"config.pbtxt: {problem}"]
    findings = []
    if "${" in text:
        line = text[: text.index("${")].count("\n") + 1
        findings.append(f"config.pbtxt: a placeholder (${{…}}) is left in line {line}")
    try:
        message = text_format.Parse(text, message_class())
    except text_format.ParseError as e:
        return None, [*findings, f"config.pbtxt: cannot be parsed: {_reason(e)}"]
    config = from_message(message)
    if config.name != name:
        findings.append(
            f"config.pbtxt: expected name {name!r} as the folder's, found {config.name!r}"
        )
    return config, findings


def _reason(e: Exception) -> str:
    """The parser's reason and place, without the line of the file that it repeats."""
    place, _, text = " ".join(str(e).split()).partition(" : ")
    reason = text.split("': ", 1)[-1]
    return f"{place}: {reason}"[:200]


def from_message(message: Any) -> ModelConfig:
    """A ``ModelConfig`` message (of the schema with lists for maps) as our dataclass.

    Fields that we never write are left out.
    """
    batching = None
    if message.HasField("dynamic_batching"):
        given = message.dynamic_batching
        policy = given.HasField("default_queue_policy")
        batching = DynamicBatching(
            tuple(given.preferred_batch_size),
            given.max_queue_delay_microseconds,
            given.default_queue_policy.max_queue_size if policy else None,
        )
    decoupled = None
    if message.HasField("model_transaction_policy"):
        decoupled = message.model_transaction_policy.decoupled
    return ModelConfig(
        name=message.name,
        max_batch_size=message.max_batch_size,
        inputs=tuple(_tensor(t) for t in message.input),
        outputs=tuple(_tensor(t) for t in message.output),
        backend=message.backend,
        platform=message.platform,
        decoupled=decoupled,
        dynamic_batching=batching,
        instances=sum(group.count for group in message.instance_group),
        parameters=tuple((p.key, p.value.string_value) for p in message.parameters),
        steps=tuple(
            Step(
                s.model_name,
                tuple((e.key, e.value) for e in s.input_map),
                tuple((e.key, e.value) for e in s.output_map),
                s.model_version,
            )
            for s in message.ensemble_scheduling.step
        ),
    )


def _tensor(message: Any) -> Tensor:
    """ModelOutput has no ``optional`` and no ``allow_ragged_batch``."""
    data_type = message.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    return Tensor(
        message.name,
        data_type[message.data_type].name.removeprefix("TYPE_"),
        tuple(message.dims),
        optional=getattr(message, "optional", False),
        scalar=message.HasField("reshape") and not message.reshape.shape,
        ragged=getattr(message, "allow_ragged_batch", False),
    )
