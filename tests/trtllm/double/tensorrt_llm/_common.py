"""The network that is being defined. The same in 1.0 - 1.2 [names read from a newer version]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_current: Any = None


def default_net() -> Any:
    assert _current, "Use builder to create network first, and use `set_network` or `net_guard`"
    return _current


def default_trtnet() -> Any:
    return default_net().trt_network


def set_network(network: Any) -> None:
    global _current
    _current = network


@contextlib.contextmanager
def net_guard(network: Any) -> Iterator[None]:
    before = _current
    set_network(network)
    try:
        yield
    finally:
        set_network(before)
