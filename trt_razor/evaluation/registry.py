"""Names of tasks and methods, as a run's YAML spells them.

A task or a method is a frozen dataclass whose fields are its options; the registry makes one out of
a mapping and names the wrong field if it cannot.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from trt_razor.errors import UsageError, did_you_mean

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: what they are, for messages: "task" or "method".
        package: its modules are imported before the first lookup, so that each registers itself.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._classes: dict[str, Any] = {}

    def add(self, name: str) -> Callable[[C], C]:
        """Class decorator: ``@TASKS.add("needle")`` over a frozen dataclass."""

        def register(cls: C) -> C:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return register

    def names(self) -> list[str]:
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> Any:
        """The class of that name. Raises UsageError with the nearest name that exists."""
        self._load()
        if name not in self._classes:
            raise UsageError(f"{self.kind} '{name}': {did_you_mean(name, self._classes)}")
        return self._classes[name]

    def make(self, name: str, options: Mapping[str, Any], where: str) -> T:
        """An instance with these options.

        Args:
            where: place in the YAML, for messages.

        Raises:
            UsageError: unknown name, unknown or missing option, or one the class refuses.
        """
        cls = self.get(name)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in options:
            if key not in known:
                raise UsageError(f"{where}.{key}: {did_you_mean(str(key), known)}")
        for key, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and key not in options:
                raise UsageError(f"{where}.{key}: missing")
        try:
            made: T = cls(**options)
        except UsageError as e:
            raise UsageError(f"{where}: {e}") from None
        except (TypeError, ValueError) as e:
            raise UsageError(f"{where}: {e}") from None
        return made

    def _load(self) -> None:
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
