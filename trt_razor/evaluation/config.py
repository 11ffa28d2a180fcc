"""One YAML file a run: which model, which tasks, which methods. Strict: no field is guessed.

    name: quick
    model: smollm2-135m            # or a checkpoint's folder; and/or  engine: DIR
    tasks:
      - needle: {lengths: [1024, 2048]}
    methods:                       # ``dense`` always runs first
      - razor: {policy: paper}
        label: paper
        trials: 20                 # only the first 20 samples of each group
        groups: [4096]             # and only these groups

docs/fidelity.md explains every field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

from trt_razor.errors import UsageError, did_you_mean
from trt_razor.evaluation.methods.interface import METHODS, Method
from trt_razor.evaluation.tasks.interface import TASKS, Task
from trt_razor.evaluation.yaml_file import load_yaml
from trt_razor.files import sha256_file

SCORINGS = ("forced", "generate")
DTYPES = ("float64", "float32", "float16", "bfloat16")
ENGINE = "engine"
"""Label of the engine among the methods."""
DENSE = "dense"
_NO_PART_OF_RESULTS = ("threads", "compare")
_TASK_KEYS = ("label",)
METHOD_KEYS = ("label", "trials", "groups")


@dataclass(frozen=True)
class TaskEntry:
    """A task of a run. ``options``: all of them, as plain JSON values."""

    label: str
    name: str
    task: Task
    options: Mapping[str, Any]


@dataclass(frozen=True)
class MethodEntry:
    """A method of a run.

    Attributes:
        trials: only the first so many samples of each group; None = all.
        groups: only these groups, a context's length for most tasks; None = all.
    """

    label: str
    name: str
    method: Method
    options: Mapping[str, Any]
    trials: int | None = None
    groups: tuple[str, ...] | None = None

    def asks(self, group: str, number: int) -> bool:
        """Whether it is asked sample ``number``, from 0, of a group."""
        wanted = self.groups is None or group in self.groups
        return wanted and (self.trials is None or number < self.trials)


@dataclass(frozen=True)
class RunConfig:
    """A run.

    Attributes:
        name: of the run, and of its default output folder.
        model: zoo name or checkpoint folder that transformers computes; None = only the engine.
        engine: folder of a built engine, evaluated as it is under the label ``engine``.
        dtype, device: of the model's computation.
        read_dtype: dtype contexts are read in; None = ``dtype``.
        threads: CPU threads; None = as the library likes. Changes the time, not the results.
        seed: of the tasks.
        scoring: "forced" (an answer is right if each of its tokens is the most probable one) or
            "generate" (greedy decoding, the task's metric).
        chunk: tokens of a continuation fed at once; None = all of them.
        tasks, methods: in the file's order; ``dense`` is the first method unless there is no model.
        compare: pairs of method labels whose ratios the report shows.
    """

    name: str
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...] = ()
    model: str | None = None
    engine: str | None = None
    dtype: str = "float32"
    read_dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    scoring: str = "forced"
    chunk: int | None = None
    compare: tuple[tuple[str, str], ...] = field(default=())

    @property
    def labels(self) -> list[str]:
        """Of all methods, in the order of the report."""
        return [m.label for m in self.methods] + [ENGINE] * (self.engine is not None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, options with their defaults."""
        out: dict[str, Any] = {
            f.name: plain(getattr(self, f.name), f.name)
            for f in fields(self)
            if f.name not in ("tasks", "methods")
        }
        out["tasks"] = [{t.name: dict(t.options), "label": t.label} for t in self.tasks]
        out["methods"] = [
            {
                m.name: dict(m.options),
                "label": m.label,
                "trials": m.trials,
                **({} if m.groups is None else {"groups": list(m.groups)}),
            }
            for m in self.methods
        ]
        return out

    def hash(self) -> str:
        """What results belong together: equal for equal settings and equal files they name.

        ``threads`` and ``compare`` are left out; a file counts by its content.
        """
        settings = {k: v for k, v in self.to_json().items() if k not in _NO_PART_OF_RESULTS}
        named: dict[str, str] = {}
        _digest_files(settings, named)
        if self.engine is not None:
            manifest = Path(self.engine) / "manifest.json"
            if manifest.is_file():
                named[str(manifest)] = sha256_file(manifest)
        text = json.dumps([settings, named], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def load_config(path: Path, override: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML.

    Args:
        override: fields that replace the file's, from the command line.

    Raises:
        UsageError: not YAML, or a wrong field; the message names file and place.
    """
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}: expected a mapping with name, model, tasks …, found {_kind(data)}"
        )
    try:
        return parse_config({**data, **(override or {})})
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from None


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """A run from a mapping as the YAML gives it.

    Raises:
        UsageError: unknown, missing or wrong field, by its place.
    """
    known = [f.name for f in fields(RunConfig)]
    for key in data:
        if key not in known:
            raise UsageError(f"{key}: {did_you_mean(str(key), known)}")
    name = _text(data, "name")
    if name is None:
        raise UsageError("name: missing")
    if not name.replace("-", "a").replace("_", "a").replace(".", "a").isalnum() or name[0] == ".":
        raise UsageError(f"name: expected letters, digits, '-', '_' and '.', found {name!r}")
    model, engine = _text(data, "model"), _text(data, "engine")
    if model is None and engine is None:
        raise UsageError("model: missing; give model (a zoo name or a folder) or engine (a folder)")
    if model is None and data.get("methods"):
        raise UsageError(
            "methods: an engine is evaluated as it is; leave them out, or name the model to compare"
        )
    scoring = _text(data, "scoring") or "forced"
    if scoring not in SCORINGS:
        raise UsageError(f"scoring: {did_you_mean(scoring, SCORINGS)}")
    for key in ("dtype", "read_dtype"):
        dtype = _text(data, key)
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"{key}: {did_you_mean(dtype, DTYPES)}")
    methods = _methods(data.get("methods")) if model is not None else ()
    config = RunConfig(
        name=name,
        tasks=_tasks(data.get("tasks")),
        methods=methods,
        model=model,
        engine=engine,
        dtype=_text(data, "dtype") or "float32",
        read_dtype=_text(data, "read_dtype"),
        device=_text(data, "device") or "cpu",
        threads=_whole(data.get("threads"), "threads", 1),
        seed=_whole(data.get("seed"), "seed", 0) or 0,
        scoring=scoring,
        chunk=_whole(data.get("chunk"), "chunk", 1),
    )
    labels = config.labels
    if len(set(labels)) < len(labels):
        raise UsageError(f"methods: the label '{ENGINE}' is the engine's; give another one")
    return _with_compare(config, data.get("compare"))


def plain(value: Any, where: str) -> Any:
    """JSON values of an option; floats that JSON cannot hold are refused.

    Raises:
        UsageError: a value that is none.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{where}: expected a finite number, found {value}")
        return value
    if isinstance(value, PurePath):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (Sequence, frozenset)) and not isinstance(value, bytes):
        items = sorted(value) if isinstance(value, frozenset) else value
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(items)]
    raise UsageError(f"{where}: expected text, numbers, lists or mappings, found {_kind(value)}")


# Entries ------------------------------------------------------------------------------------------
def _tasks(entries: Any) -> tuple[TaskEntry, ...]:
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"tasks: expected a list of tasks, found {_kind(entries)}")
    made = []
    for i, entry in enumerate(entries):
        where = f"tasks[{i}]"
        name, options, more = _entry(entry, where, _TASK_KEYS)
        task = TASKS.make(name, options, f"{where}.{name}")
        label = _label(more, where) or name
        made.append(TaskEntry(label, name, task, _options(task, f"{where}.{name}")))
    _check_labels([t.label for t in made], "tasks")
    return tuple(made)


def _methods(entries: Any) -> tuple[MethodEntry, ...]:
    if entries is None:
        entries = []
    if not isinstance(entries, list):
        raise UsageError(f"methods: expected a list of methods, found {_kind(entries)}")
    made = []
    for i, entry in enumerate(entries):
        where = f"methods[{i}]"
        name, options, more = _entry(entry, where, METHOD_KEYS)
        method = METHODS.make(name, options, f"{where}.{name}")
        label = _label(more, where) or name
        trials = _whole(more.get("trials"), f"{where}.trials", 1)
        groups = _groups(more.get("groups"), where)
        if name == DENSE and (label != DENSE or trials is not None or groups is not None):
            raise UsageError(f"{where}: dense runs on every sample under its own name")
        told = _options(method, f"{where}.{name}")
        made.append(MethodEntry(label, name, method, told, trials, groups))
    if not any(m.name == DENSE for m in made):
        dense = METHODS.make(DENSE, {}, DENSE)
        made.append(MethodEntry(DENSE, DENSE, dense, _options(dense, DENSE)))
    made.sort(key=lambda m: m.name != DENSE)
    _check_labels([m.label for m in made], "methods")
    return tuple(made)


def _entry(
    entry: Any, where: str, more_keys: Sequence[str]
) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """(name, options, the keys beside the name) of ``{name: options, label: …}`` or ``name``."""
    if isinstance(entry, str):
        return entry, {}, {}
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: expected NAME: OPTIONS, found {_kind(entry)}")
    names = [k for k in entry if k not in more_keys]
    if len(names) != 1:
        found = ", ".join(map(str, names)) if names else "none"
        raise UsageError(
            f"{where}: expected one name (beside {', '.join(more_keys)}), found {found}"
        )
    name = str(names[0])
    options = entry[names[0]]
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise UsageError(f"{where}.{name}: expected options as a mapping, found {_kind(options)}")
    return name, {k: _frozen(v) for k, v in options.items()}, entry


def _frozen(value: Any) -> Any:
    """Lists as tuples: options are fields of frozen dataclasses."""
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value


def _options(made: Any, where: str) -> dict[str, Any]:
    return {f.name: plain(getattr(made, f.name), f"{where}.{f.name}") for f in fields(made)}


def _label(entry: Mapping[str, Any], where: str) -> str | None:
    label = entry.get("label")
    if label is None:
        return None
    if not isinstance(label, str) or not label.strip() or len(label) > 60 or "|" in label:
        raise UsageError(
            f"{where}.label: expected 1 to 60 characters without '|', found {label!r:.80}"
        )
    if not label.isprintable():
        raise UsageError(f"{where}.label: expected printable characters, found {label!r}")
    return label


def _groups(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or any(type(g) not in (int, str) for g in value):
        raise UsageError(f"{where}.groups: expected a list of groups, found {value!r:.80}")
    return tuple(map(str, value))


def _check_labels(labels: Sequence[str], where: str) -> None:
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise UsageError(f"{where}: '{label}' is there twice; give each a label of its own")


def _with_compare(config: RunConfig, pairs: Any) -> RunConfig:
    if pairs is None:
        return config
    if not isinstance(pairs, list):
        raise UsageError(f"compare: expected a list of pairs of labels, found {_kind(pairs)}")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(f"compare[{i}]: expected [label, label], found {pair!r:.80}")
        for label in pair:
            if label not in config.labels:
                raise UsageError(f"compare[{i}]: {did_you_mean(str(label), config.labels)}")
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return RunConfig(**{**values, "compare": tuple((a, b) for a, b in pairs)})


# Values -------------------------------------------------------------------------------------------
def _text(data: Mapping[str, Any], key: str) -> str | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or not value.isprintable():
        raise UsageError(f"{key}: expected text, found {value!r:.80}")
    return value


def _whole(value: Any, where: str, least: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 32:
        raise UsageError(
            f"{where}: expected a whole number of at least {least}, found {value!r:.80}"
        )
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {dict: "a mapping", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), f"{value!r:.80}")


def _digest_files(value: Any, named: dict[str, str]) -> None:
    """sha256 of each file that a text among the settings names (it must look like a file's name)."""
    if isinstance(value, dict):
        for v in value.values():
            _digest_files(v, named)
    elif isinstance(value, list):
        for v in value:
            _digest_files(v, named)
    elif isinstance(value, str) and len(value) < 4096 and Path(value).suffix:
        try:
            if Path(value).is_file():
                named[value] = sha256_file(Path(value))
        except (OSError, ValueError):  # no name a file can have
            return
