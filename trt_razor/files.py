"""Files that are whole or not there: atomic writes, hashes, directory swaps."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trt_razor.errors import RazorError

CHUNK = 4 << 20


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
    """sha256 of a file's bytes; ``progress`` is called with the bytes read since the last call."""
    h = hashlib.sha256()
    with open(path, "rb", buffering=0) as f:
        while block := f.read(CHUNK):
            h.update(block)
            if progress is not None:
                progress(len(block))
    return h.hexdigest()


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
    if ctypes.get_errno() in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))


@contextlib.contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """Build a directory beside ``target`` and put it in place only when the block succeeds.

    Yields the staging folder. On any error or Ctrl-C it is removed and ``target`` is untouched;
    on success an existing ``target`` is swapped out in one step and then deleted. A symbolic link
    stays: the folder it points to is replaced.

    Raises:
        RazorError: the target is a file or a mount point, or the disk cannot take the new folder.
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
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        os.chmod(staging, 0o755)
    except OSError as e:
        raise RazorError(
            f"{target.parent}: cannot create the engine folder: {e.strerror}"
        ) from None
    try:
        yield staging
        if not target.exists():
            os.rename(staging, target)
            return
        if not _exchange(staging, target):
            # No atomic swap on this system: the old engine waits under the staging name.
            old = staging.with_name(staging.name + ".old")
            os.rename(target, old)
            try:
                os.rename(staging, target)
            except BaseException:
                os.rename(old, target)
                raise
            staging = old
    except OSError as e:
        what = "disk full" if e.errno in (errno.ENOSPC, errno.EDQUOT) else (e.strerror or str(e))
        raise RazorError(
            f"{target}: writing the engine failed: {what}; nothing was changed there"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
