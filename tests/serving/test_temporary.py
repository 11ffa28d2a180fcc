"""Temporary folders of servers: what a killed process left goes, what is in use stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trt_razor.serving import temporary
from trt_razor.serving.temporary import Folder

LEAVES = """
import os, signal, subprocess, sys
from trt_razor.serving.temporary import Folder
folder = Folder("server", "trt_razor_1_0123abcd_")
child = [sys.executable, "-c", "import sys; sys.stdin.read()"]
if sys.argv[1:]:
    subprocess.Popen(child, pass_fds=(folder.lock,), stdout=subprocess.DEVNULL)
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for regions; temporary folders lie elsewhere below ``tmp_path``."""
    place, shared = tmp_path / "temporary", tmp_path / "shm"
    place.mkdir()
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setattr(temporary, "_SHARED_MEMORY", shared)
    return shared


def killed(*argv: str, stdin: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[str], Path]:
    """A process that was killed, and the folder that it left."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES, *argv], stdin=stdin, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert process.wait(30) == -9
    assert path.is_dir()
    return process, path


def test_what_was_left_is_removed(shared_memory: Path) -> None:
    region, other = shared_memory / "trt_razor_1_0123abcd_r", shared_memory / "trt_razor_1_9_r"
    region.touch()
    other.touch()
    _, path = killed()
    mine = Folder("server")
    assert not path.exists()
    assert not region.exists()
    assert other.exists()
    again = Folder("server")
    assert mine.path.is_dir()
    again.remove()
    mine.remove()
    assert not any(mine.path.parent.iterdir())


def test_what_a_child_still_uses_stays() -> None:
    """A server may go on after who started it was killed."""
    process, path = killed("child", stdin=subprocess.PIPE)
    Folder("server").remove()
    assert path.is_dir()
    assert process.stdin is not None
    process.stdin.close()  # the child ends
    for _ in range(200):
        Folder("server").remove()
        if not path.exists():
            break
    assert not path.exists()


def test_other_things_stay(shared_memory: Path) -> None:
    """Links, and names of regions that are not of ours."""
    mine = Folder("server", "../")
    name = f"{mine.path.name}x"
    place, kept = mine.path.parent, shared_memory.parent / "kept"
    kept.mkdir()
    (place / name).symlink_to(kept)
    (shared_memory / "x").touch()
    Folder("server").remove()
    mine.remove()
    assert kept.is_dir()
    assert (shared_memory / "x").exists()
    assert not mine.path.exists()
