"""Temporary folders of servers. What a killed process left is removed when the next one is made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

from trt_razor.errors import UsageError

SAFE = re.compile(r"[A-Za-z0-9_./@%+=:,-]+")
"""Paths that survive the shell through which the server starts the processes of Python models."""
_REGIONS = re.compile(r"trt_razor_\d+_[0-9a-f]{8}_")
_NOTE = "shared_memory"
"""File of a folder: how its server's regions of shared memory are called."""
_SHARED_MEMORY = Path("/dev/shm")


class Folder:
    """A folder for as long as this process lives, or one that was given ``lock``.

    Args:
        kind: part of its name.
        regions: how the names of its server's regions of shared memory begin; removed with it.

    Attributes:
        path: the folder. lock: descriptor for processes that may need it longer than this one.
    """

    def __init__(self, kind: str, regions: str = "") -> None:
        place = safe_temporary()
        prefix = f"trt_razor_{kind}-{re.sub('[^A-Za-z0-9]', '_', platform.node())[:32]}-"
        for left in Path(place).glob(f"{prefix}*"):
            _remove_if_left(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
            self.lock = os.open(self.path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self.lock, fcntl.LOCK_EX)
            # Another process may have taken it for one that was left, before it was locked.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.lock), os.stat(self.path)):
                    break
            os.close(self.lock)
        with contextlib.suppress(OSError):  # a full disk will be told by who needs more of it
            (self.path / _NOTE).write_text(regions)

    def remove(self) -> None:
        """Remove it and its regions of shared memory. Once."""
        _remove(self.path)
        os.close(self.lock)


def safe_temporary() -> str:
    """Where temporary folders for a server may lie.

    Raises:
        UsageError: the usual place has a path that Triton cannot take, and there is no other.
    """
    usual = tempfile.gettempdir()
    if SAFE.fullmatch(usual):
        return usual
    for folder in ("/tmp", "/var/tmp"):
        if os.access(folder, os.W_OK):
            return folder
    raise UsageError(
        f"{usual}: Triton needs a folder for temporary files whose path has plain letters only; name one "
        "with TMPDIR"
    )


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else's, or gone
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is in use
            if os.fstat(lock).st_uid == os.getuid():
                _remove(path)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        regions = (folder / _NOTE).read_text()
        for region in _SHARED_MEMORY.glob(f"{regions}*") if _REGIONS.fullmatch(regions) else ():
            with contextlib.suppress(OSError):
                region.unlink()
    shutil.rmtree(folder, ignore_errors=True)
