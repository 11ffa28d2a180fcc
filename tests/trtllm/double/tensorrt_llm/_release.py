"""The release that this copy of the double mirrors: (1, 0), (1, 1) or (1, 2)."""

from .version import __version__

RELEASE = tuple(int(part) for part in __version__.split(".")[:2])
