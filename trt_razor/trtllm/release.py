"""Which TensorRT-LLM is here, and how its cache manager is used."""

from __future__ import annotations

import enum
import importlib.metadata
import re
from dataclasses import dataclass

from trt_razor.errors import UsageError


class LocalCache(enum.Enum):
    """Where local heads live; the values are those of the plugin's field ``local_cache``.

    CYCLIC: a cache layer of their own whose window wraps around behind the sinks (1.0).
    SLOTS: the state slots of hybrid models (1.0 - 1.2; the only way from 1.1 on, whose cache
    manager knows no sinks).
    """

    CYCLIC = 1
    SLOTS = 2


@dataclass(frozen=True)
class Release:
    """A TensorRT-LLM release that engines can be built with."""

    version: str
    local_caches: tuple[LocalCache, ...]

    @property
    def default_cache(self) -> LocalCache:
        return self.local_caches[0]


_CACHES = {
    (1, 0): (LocalCache.CYCLIC, LocalCache.SLOTS),
    (1, 1): (LocalCache.SLOTS,),
    (1, 2): (LocalCache.SLOTS,),
}
SUPPORTED = "1.0, 1.1 and 1.2"


def release_of(version: str) -> Release:
    """The release of a version such as ``1.0.0`` or ``1.2.0rc6``.

    Raises:
        UsageError: not a version, or one that our network changes do not fit.
    """
    match = re.match(r"(\d+)\.(\d+)(?:\D|$)", version)
    caches = _CACHES.get((int(match[1]), int(match[2]))) if match else None
    if caches is None:
        raise UsageError(
            f"TensorRT-LLM: expected {SUPPORTED}, found {version[:40]!r}; use an NGC image with one of "
            "these (docs/ngc.md)"
        )
    return Release(version, caches)


def installed_release() -> Release:
    """The installed release, from its package's metadata: nothing is imported.

    Raises:
        NoTensorRtLlm: TensorRT-LLM is not installed. UsageError: an unsupported version.
    """
    try:
        version = importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        raise NoTensorRtLlm from None
    return release_of(version)


class NoTensorRtLlm(UsageError):
    """TensorRT-LLM is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "tensorrt_llm: not installed; engines are built inside an NGC image that has "
            f"TensorRT-LLM {SUPPORTED} (docs/ngc.md); --convert-only and --plan work without it"
        )
