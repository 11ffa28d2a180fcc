"""Files are whole or not there, whatever fails on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_razor import files
from trt_razor.errors import RazorError
from trt_razor.files import replace_directory, sha256_file, write_bytes_atomic, write_text_atomic


def fail(error: BaseException) -> Callable[..., None]:
    def raiser(*_: object, **__: object) -> None:
        raise error

    return raiser


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# One file ---------------------------------------------------------------------------------------
def test_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_text_atomic(path, "one")
    write_text_atomic(path, "zwei ✓")
    assert path.read_text(encoding="utf-8") == "zwei ✓"
    assert names(path.parent) == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("old", [b"old", None])
def test_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(os, call, fail(NO_SPACE))
    with pytest.raises(RazorError, match="No space left on device") as e:
        write_bytes_atomic(path, b"new")
    assert str(path) in str(e.value)
    assert names(tmp_path) == (["file"] if old is not None else [])
    if old is not None:
        assert path.read_bytes() == old


def test_write_that_stops_half_way(tmp_path: Path) -> None:
    """A real short write: the process may not write files beyond 4000 bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        from trt_razor.errors import RazorError
        from trt_razor.files import write_bytes_atomic
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            write_bytes_atomic(Path({str(path)!r}), bytes(10_000))
        except RazorError as e:
            print(e)
        """
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert run.stdout.startswith(f"{path}: cannot write: File too large"), run
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(RazorError, match="cannot write"):
        write_text_atomic(tmp_path / "plain" / "file", "x")
    monkeypatch.setattr(files.tempfile, "mkstemp", fail(DENIED))
    with pytest.raises(RazorError, match="Permission denied"):
        write_text_atomic(tmp_path / "file", "x")


def test_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    monkeypatch.setattr(files, "CHUNK", 4096)
    seen: list[int] = []
    assert sha256_file(path, seen.append) == hashlib.sha256(data).hexdigest()
    assert seen == [4096, 4096, 1808]


# A directory --------------------------------------------------------------------------------------
def engine(path: Path, text: str) -> None:
    path.mkdir()
    (path / "manifest").write_text(text)


def build(target: Path, text: str = "new", then: BaseException | None = None) -> None:
    with replace_directory(target) as staging:
        assert staging.parent == target.resolve().parent
        (staging / "manifest").write_text(text)
        (staging / "sub").mkdir()
        (staging / "sub" / "weights").write_bytes(b"w")
        if then is not None:
            raise then


def test_new_directory(tmp_path: Path) -> None:
    build(tmp_path / "deep" / "engine")
    assert (tmp_path / "deep" / "engine" / "manifest").read_text() == "new"
    assert names(tmp_path / "deep") == ["engine"]


@pytest.mark.parametrize("swap", [True, False])
def test_old_directory_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    engine(tmp_path / "engine", "old")
    (tmp_path / "engine" / "stale").write_text("gone after the swap")
    build(tmp_path / "engine")
    assert names(tmp_path / "engine") == ["manifest", "sub"]
    assert (tmp_path / "engine" / "manifest").read_text() == "new"
    assert names(tmp_path) == ["engine"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux")
def test_exchange_swaps_in_one_step(tmp_path: Path) -> None:
    engine(tmp_path / "a", "A")
    engine(tmp_path / "b", "B")
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no RENAME_EXCHANGE")
    assert (tmp_path / "a" / "manifest").read_text() == "B"
    assert (tmp_path / "b" / "manifest").read_text() == "A"


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), ValueError("bug"), DENIED])
@pytest.mark.parametrize("existing", [True, False])
def test_failing_build_changes_nothing(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    target = tmp_path / "engine"
    if existing:
        engine(target, "old")
    expected = RazorError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as e:
        build(target, then=error)
    if error is NO_SPACE:
        assert "disk full" in str(e.value)
        assert str(target) in str(e.value)
    assert names(tmp_path) == (["engine"] if existing else [])
    if existing:
        assert names(target) == ["manifest"]
        assert (target / "manifest").read_text() == "old"


@pytest.mark.parametrize("swap", [True, False])
def test_failing_rename_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    target = tmp_path / "engine"
    engine(target, "old")
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if ".partial-" in Path(a).name and not Path(a).name.endswith(".old"):
            raise NO_SPACE
        real(a, b)

    if swap:
        monkeypatch.setattr(files, "_exchange", fail(NO_SPACE))
    else:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RazorError, match="disk full"):
        build(target)
    assert names(tmp_path) == ["engine"]
    assert (target / "manifest").read_text() == "old"


def test_folder_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.tempfile, "mkdtemp", fail(DENIED))
    with pytest.raises(RazorError, match="Permission denied"):
        build(tmp_path / "engine")
    assert names(tmp_path) == []


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(RazorError, match="found a file"):
        build(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "precious"
    assert names(tmp_path) == ["notes"]


def test_mount_point_is_refused_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(tmp_path / "volume", "old")
    monkeypatch.setattr(os.path, "ismount", lambda p: Path(p).name == "volume")
    with pytest.raises(RazorError, match="mount point"):
        build(tmp_path / "volume")
    assert names(tmp_path) == ["volume"]


@pytest.mark.parametrize("existing", [True, False])
def test_symbolic_link_stays(tmp_path: Path, existing: bool) -> None:
    if existing:
        engine(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_ctrl_c_of_a_real_process(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    engine(target, "old")
    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from trt_razor.files import replace_directory
        with replace_directory(Path({str(target)!r})) as staging:
            (staging / "weights").write_bytes(bytes(1000))
            print("ready", flush=True)
            time.sleep(30)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
    assert process.returncode != 0
    assert time.monotonic() - started < 15
    assert names(tmp_path) == ["engine"]
    assert names(target) == ["manifest"]
