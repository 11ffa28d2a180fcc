"""``start.sh`` of TensorRT-LLM repositories, run for real: with and without mpirun, one rank and two."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import serving_rig as rig
import trtllm_rig
from serving_server import guarded
from standin_tokens import reply

from trt_razor.models.tokenizer import Tokenizer
from trt_razor.serving.server import find_server, free_ports

HERE = Path(__file__).parent
FEW = {"bls_instances": 1}  # processes, which Triton stops one after the other


@dataclass
class Started:
    """A server that start.sh has started. ``commands``: of each rank, as mpirun got them."""

    http: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def commands(self) -> list[list[str]]:
        return list(json.loads((self.folder / "commands.json").read_text()))

    def record(self, rank: int) -> dict[str, object]:
        return dict(json.loads((self.folder / f"rank{rank}.json").read_text()))


@contextlib.contextmanager
def started(
    repository: Path, python: Path, folder: Path, preload: Path | None, **variables: str
) -> Iterator[Started]:
    """start.sh, ready; ended with SIGTERM, which must leave nothing behind."""
    binary = find_server(python)
    backends, environment = trtllm_rig.backends_folder(folder / "backends", binary)
    mpirun = folder / "mpirun"
    mpirun.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE}/fake_mpirun.py" "$@"\n')
    mpirun.chmod(0o755)
    http, grpc, metrics = free_ports("127.0.0.1", 3)
    environment |= {
        "TRITONSERVER": str(binary.executable),
        "TRITON_BACKENDS": str(backends),
        "TRT_RAZOR_TRITON_PYTHON": str(python),
        "HTTP_PORT": str(http),
        "GRPC_PORT": str(grpc),
        "METRICS_PORT": str(metrics),
        "MPIRUN": str(mpirun),
        "FAKE_MPIRUN_RECORD": str(folder / "commands.json"),
        "TRT_RAZOR_STANDIN_RECORD": str(folder),
        **({} if preload is None else {"RAZOR_PRELOAD": str(preload)}),
        **variables,
    }
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["bash", str(repository / "start.sh"), "--allow-gpu-metrics=false"],
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    try:
        with guarded(process.pid):
            url = f"127.0.0.1:{http}"
            rig.wait_until(lambda: _ready(url, process, log), "ready", rig.LONG)
            yield Started(url, folder, process)
            regions = _regions(process.pid)
            assert len(regions) >= 4, regions
            process.send_signal(signal.SIGTERM)
            assert process.wait(rig.LONG) == 0, log.read_text()[-2000:]
            rig.wait_until(lambda: not _group(process.pid), "all processes ended")
            assert not [r for r in regions if r.exists()]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-3000:]
    try:
        return rig.get(url, "/v2/health/ready") == ""
    except OSError:
        return False


def _group(group: int) -> list[int]:
    """Processes of a group that are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, of_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state != "Z":
                found.append(int(folder.name))
    return found


def _regions(group: int) -> set[Path]:
    """Shared memory of the Python models of a group, which are started with its names."""
    found = set()
    for pid in _group(group):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "triton_python_backend_stub" in words[0]:
                paths = [Path("/dev/shm") / w for w in words if w and "/" not in w]
                found |= {path for path in paths if path.exists()}
    return found


def check_answers(server: Started, engine: Path) -> None:
    tokenizer = Tokenizer.load(engine / "tokenizer")
    body = {"text_input": "one two ", "max_tokens": 12}
    wanted = tokenizer.decode(list(reply(tokenizer.encode("one two "), 12)))
    for model in ("ensemble", "tensorrt_llm_bls"):
        assert rig.generate(server.http, model, body)["text_output"] == wanted


def test_dense_engine_without_mpirun(
    triton_python: Path, trtllm_engines: trtllm_rig.Engines, tmp_path: Path
) -> None:
    engine = trtllm_engines("dense")
    repository = trtllm_rig.repository_of(engine, tmp_path / "models", **FEW)
    with started(repository, triton_python, tmp_path, None, NO_MPI="1") as server:
        check_answers(server, engine)
        assert not (tmp_path / "commands.json").exists()
        assert server.record(0)["preloaded"] == ""


def test_razor_engine_moved_with_its_repository(
    triton_python: Path, trtllm_engines: trtllm_rig.Engines, tmp_path: Path
) -> None:
    """TensorRT-LLM 1.1; the server finds the plugin preloaded, mpirun and the script do not have it."""
    engine = trtllm_engines("slots-1.1")
    repository = trtllm_rig.repository_of(
        engine, tmp_path / "models", copy_engine=True, mounted_at=str(tmp_path / "elsewhere"), **FEW
    )
    repository = repository.rename(tmp_path / "elsewhere")
    preload = trtllm_engines.preload("slots-1.1")
    with started(repository, triton_python, tmp_path, preload) as server:
        check_answers(server, engine)
        assert server.record(0)["preloaded"] == str(preload)
        (command,) = server.commands
        assert command[:2] == ["env", f"LD_PRELOAD={preload}"]
        maps = Path(f"/proc/{server.process.pid}/environ").read_bytes()
        assert b"LD_PRELOAD" not in maps


def test_two_ranks(triton_python: Path, trtllm_engines: trtllm_rig.Engines, tmp_path: Path) -> None:
    engine = trtllm_engines("two-ranks")
    repository = trtllm_rig.repository_of(engine, tmp_path / "models", **FEW)
    preload = trtllm_engines.preload("two-ranks")
    with started(repository, triton_python, tmp_path, preload) as server:
        check_answers(server, engine)
        for rank in range(2):
            record = server.record(rank)
            assert (record["rank"], record["world_size"]) == (rank, 2)
            assert record["preloaded"] == str(preload)
        leader, other = server.commands
        assert "--load-model=tensorrt_llm" in other
        assert "--load-model=tensorrt_llm" not in leader
        # Shared memory of two servers on one machine must not meet.
        names = [a.partition("shm-region-prefix-name=")[2] for c in (leader, other) for a in c]
        assert len({n for n in names if n}) == 2


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preload", "libtrt_razor_preload_trt10.so: not found"),
        ("plugin", "libtrt_razor_plugins_trt10.so: not found"),
        ("rank", "expected rank0.engine, found none"),
    ],
)
def test_what_is_missing_is_said(
    missing: str,
    message: str,
    triton_python: Path,
    trtllm_engines: trtllm_rig.Engines,
    tmp_path: Path,
) -> None:
    engine = Path(shutil.copytree(trtllm_engines("cyclic"), tmp_path / "engine"))
    library = Path(shutil.copytree(trtllm_engines.preload("cyclic").parent, tmp_path / "library"))
    preload = library / trtllm_engines.preload("cyclic").name
    repository = trtllm_rig.repository_of(engine, tmp_path / "models")
    if missing == "preload":
        preload.unlink()
    elif missing == "plugin":
        next(library.glob("*plugins*")).unlink()
    else:
        (engine / "rank0.engine").unlink()
    binary = find_server(triton_python)
    (tmp_path / "backends" / "tensorrtllm").mkdir(parents=True)
    variables = {
        **binary.environment,
        "TRITONSERVER": str(binary.executable),
        "TRITON_BACKENDS": str(tmp_path / "backends"),
        "TRT_RAZOR_TRITON_PYTHON": str(triton_python),
        "RAZOR_PRELOAD": str(preload),
        "MPIRUN": "false",
    }
    done = subprocess.run(
        ["bash", str(repository / "start.sh")],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line
