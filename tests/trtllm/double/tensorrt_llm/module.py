"""``Module`` and ``ModuleList`` with their dictionaries of children and weights.

Read: ``_modules``, ``_parameters``; assignment puts a Module or Parameter there in place, anything else
(None too) into ``__dict__``, where it SHADOWS an entry that still yields its weights;
``register_parameter(name, None)``; ``named_parameters`` and ``named_modules`` give every object once,
under its first name; names of layers are fixed at the first top-level call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._common import default_net
from .parameter import Parameter


class Module:
    def __init__(self) -> None:
        self._modules: dict[str, Module] = {}
        self._parameters: dict[str, Parameter | None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network = default_net()
        if network._module_names is None:
            network._module_names = {id(m): name for name, m in self.named_modules()}
        network._module_stack.append(self)
        try:
            return self.forward(*args, **kwargs)
        finally:
            network._module_stack.pop()

    def __getattr__(self, name: str) -> Any:
        for place in ("_parameters", "_modules"):
            entries = self.__dict__.get(place, {})
            if name in entries:
                return entries[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Parameter | Module):
            self.__dict__.pop(name, None)  # inferred: a plain attribute such as None goes
        if isinstance(value, Parameter):
            value.local_name = name
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        else:
            object.__setattr__(self, name, value)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        if param is not None:
            param.local_name = name
        self._parameters[name] = param

    def named_modules(
        self, memo: set[int] | None = None, prefix: str = ""
    ) -> Iterator[tuple[str, Module]]:
        seen = set() if memo is None else memo
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        dotted = f"{prefix}." if prefix else ""
        for name, child in self._modules.items():
            yield from child.named_modules(seen, dotted + name)

    def named_modules_with_parent(self) -> Iterator[tuple[str, str, Module, Module]]:
        """(full name, name in the parent, child, parent) of every module but this one."""
        for prefix, parent in list(self.named_modules()):
            for name, child in list(parent._modules.items()):
                yield (f"{prefix}.{name}" if prefix else name), name, child, parent

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        first: dict[int, tuple[str, Parameter]] = {}
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    full = f"{prefix}.{name}" if prefix else name
                    first.setdefault(id(parameter), (full, parameter))
        yield from first.values()

    def parameters(self) -> Iterator[Parameter]:
        return (parameter for _, parameter in self.named_parameters())


class ModuleList(Module):
    def __init__(self, modules: Any) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self._modules[str(i)] = module

    def _key(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range")
        return str(index % len(self))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ModuleList(list(self._modules.values())[index])
        return self._modules[self._key(index)]

    def __setitem__(self, index: int, module: Module) -> None:
        setattr(self, self._key(index), module)

    def __len__(self) -> int:
        return len(self._modules)
