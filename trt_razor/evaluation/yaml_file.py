"""YAML from outside: plain values only, no key twice, nothing that grows when it is unfolded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trt_razor.errors import MissingExtra, UsageError

MAX_BYTES = 1 << 20
MAX_VALUES = 100_000
MAX_DEPTH = 20


def load_yaml(path: Path) -> Any:
    """The values of a YAML file: mappings with text keys, lists, text, numbers, booleans, None.

    Raises:
        UsageError: cannot be read, too large, not YAML, a key twice, or other kinds of values.
        MissingExtra: PyYAML is not installed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: expected a YAML file of at most {MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{path}: cannot read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: not UTF-8 text (byte {e.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """``load_yaml`` of a text; ``where`` names it in messages."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise MissingExtra("PyYAML", "eval", "a run's YAML file") from None

    # Made here, where yaml is there; safe_load with one more check: YAML's own loader takes the last of
    # two equal keys.
    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in getattr(node, "value", ()):
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise UsageError(f"{where}: line {line}: '{key.value}' is there twice")
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{where}: {line}not YAML: {e.problem or e.context}") from None
    except (yaml.YAMLError, ValueError) as e:
        raise UsageError(f"{where}: not YAML: {' '.join(str(e).split())[:200]}") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply") from None
    _Check(where).value(data, "", 0)
    return data


class _Check:
    """Anchors make a small file large once it is unfolded; so its values are counted."""

    def __init__(self, where: str) -> None:
        self.where, self.count = where, 0

    def value(self, value: Any, place: str, depth: int) -> None:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise UsageError(
                f"{self.where}: expected at most {MAX_VALUES:,} values, {MAX_DEPTH} deep"
            )
        if isinstance(value, dict):
            for key, v in value.items():
                if not isinstance(key, str):
                    raise UsageError(
                        f"{self.where}: {place or 'top'}: expected names as keys, found {key!r:.80}"
                    )
                self.value(v, f"{place}.{key}" if place else key, depth + 1)
        elif isinstance(value, list):
            for i, v in enumerate(value):
                self.value(v, f"{place}[{i}]", depth + 1)
        elif value is not None and not isinstance(value, (str, bool, int, float)):
            raise UsageError(
                f"{self.where}: {place}: expected text, a number, a list or a mapping, found "
                f"{type(value).__name__} {str(value)!r:.80}; put it in quotes"
            )
