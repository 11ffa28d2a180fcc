"""Files that are whole or not there: atomic writes, hashes, directory swaps."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

from trt_razor.errors import RazorError

CHUNK = 4 << 20
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""What a user or a system sends to end a command."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What renameat2 answers where it, or the swap, does not exist: old kernels, seccomp, NFS, FUSE.
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new one."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, flushed, then renamed.

    Raises:
        RazorError: if the folder cannot be written or the disk is full; ``path`` is unchanged.
    """
    tmp: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
        tmp = None
    except OSError as e:
        raise RazorError(f"{path}: cannot write: {e.strerror or e}") from None
    finally:
        if tmp is not None:
            with contextlib.suppress(OSError):
                os.unlink(tmp)


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes; ``progress`` is called with the bytes read since the last call.

    Raises:
        RazorError: the file cannot be read.
    """
    h = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as f:
            while block := f.read(CHUNK):
                h.update(block)
                if progress is not None:
                    progress(len(block))
    except OSError as e:
        raise RazorError(f"{path}: cannot read: {e.strerror or e}") from None
    return h.hexdigest()


@contextlib.contextmanager
def replace_directory(target: Path, what: str = "engine") -> Iterator[Path]:
    """Build a directory beside ``target`` and put it in place only when the block succeeds.

    Yields the staging folder. On any error or Ctrl-C it is removed and ``target`` is untouched;
    on success an existing ``target`` is swapped out in one step and then deleted. A symbolic link
    stays: the folder it points to is replaced. Staging folders of processes that were killed on
    this machine are removed first.

    Args:
        what: is written, for messages.

    Raises:
        RazorError: the target is a file or a mount point, the disk cannot take the new folder, or
            the block raised OSError (the message names the file and the reason).
    """
    target = Path(os.path.realpath(target))
    try:
        if target.exists() and not target.is_dir():
            raise RazorError(
                f"{target}: expected a folder or nothing, found a file; give another path"
            )
        if os.path.ismount(target):
            raise RazorError(
                f"{target}: is a mount point and cannot be swapped; give a folder inside it"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        staging, lock = _new_staging(target)
    except OSError as e:
        raise RazorError(
            f"{target.parent}: cannot create the folder of the {what}: {e.strerror or e}"
        ) from None
    try:
        yield staging
        with _interrupts_held_back():
            _put_in_place(staging, target)
    except OSError as e:
        raise RazorError(
            f"{target}: writing the {what} failed: {_reason(e)}; nothing was changed there"
        ) from None
    finally:
        with _interrupts_held_back():  # a second Ctrl-C must not leave half of it
            _remove_staging(staging)
            if lock is not None:
                os.close(lock)


def _reason(e: OSError) -> str:
    if e.errno in _DISK_FULL:
        return "disk full: free some space or choose a folder on another disk"
    what = e.strerror or str(e)
    return f"{os.fsdecode(e.filename)}: {what}" if isinstance(e.filename, (str, bytes)) else what


# The swap ---------------------------------------------------------------------------------------
def _put_in_place(staging: Path, target: Path) -> None:
    """``staging`` becomes ``target``; what was there waits under a staging name."""
    _flush_folder(staging)
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        # No atomic swap on this system. Killed between the two: _remove_stale undoes the first.
        old = _old_of(staging)
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
    # Before the old folder is deleted, the new one must be on the disk under its name.
    _flush_folder(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2 RENAME_EXCHANGE). False if not available."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    rc = call(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange)
    if rc == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _flush_folder(folder: Path) -> None:
    """Names in a folder to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C and its kin act after the block: between its steps they would leave rubbish."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    arrived: list[int] = []

    def remember(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)

    before = {}
    for s in STOP_SIGNALS:
        if signal.getsignal(s) is not None:  # None: set by C code, cannot be put back
            before[s] = signal.signal(s, remember)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
        if arrived:
            signal.raise_signal(arrived[0])


# Staging folders ----------------------------------------------------------------------------------
# ``.NAME.partial-HOST-RANDOM``, locked by the process that fills it. A folder of this host that
# nobody locks belongs to a process that was killed. Locks of other hosts may be invisible here.
def _staging_prefix(target: Path) -> str:
    host = re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:32]
    name = target.name
    if len(name) > 40:  # file systems take 255 bytes
        name = f"{name[:32]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}.partial-{host}-"


def _old_of(staging: Path) -> Path:
    return staging.with_name(staging.name + ".old")


def _new_staging(target: Path) -> tuple[Path, int | None]:
    """A new staging folder and the descriptor that holds its lock (None: no locks here)."""
    while True:
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_staging_prefix(target)))
        os.chmod(staging, 0o755)
        if fcntl is None:
            return staging, None
        lock = os.open(staging, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have taken it for a stale one before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(staging)):
                return staging, lock
        os.close(lock)


def _remove_staging(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(_old_of(staging), ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove what killed processes left; a folder they had moved aside is put back."""
    if fcntl is None:
        return
    for path in target.parent.glob(glob.escape(_staging_prefix(target)) + "*"):
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while it is in use
                if _old_of(path).exists() and not target.exists():
                    os.rename(_old_of(path), target)
                if target.exists() or not path.name.endswith(".old"):
                    _remove_staging(path)
            finally:
                os.close(lock)
