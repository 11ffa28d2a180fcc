"""The network that is being defined. The same in 1.0 - 1.2 [names read from a newer version]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_defined: list[Any] = []
"""Networks whose ``net_guard`` is open; the innermost one is the network of the moment."""


def default_net() -> Any:
    assert _defined, "no network is being defined: enter net_guard(network)"
    return _defined[-1]


def default_trtnet() -> Any:
    return default_net().trt_network


@contextlib.contextmanager
def net_guard(network: Any) -> Iterator[None]:
    _defined.append(network)
    try:
        yield
    finally:
        _defined.pop()


def keep(target: Any, arguments: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Double only: arguments of a constructor (its ``locals()``) become attributes of their names.

    Args:
        names: of those that the real class keeps; None = all.
    """
    for name in arguments if names is None else names:
        if name not in ("self", "kwargs", "__class__"):
            setattr(target, name, arguments[name])
