"""Finding, starting and stopping a server; what the real one adds is in the tests of serving."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

from trt_razor.errors import RazorError, UsageError
from trt_razor.serving import binary as binaries
from trt_razor.serving import server_log
from trt_razor.serving.binary import ServerBinary, check_models_run, find_server, python_facts
from trt_razor.serving.config import ModelConfig
from trt_razor.serving.ports import check_ports, free_ports
from trt_razor.serving.server import ScriptServer, TritonServer

HERE = Path(__file__).parent


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A ``tritonserver`` with a folder of backends beside it."""
    path = tmp_path / "opt" / "bin" / "tritonserver"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "fake_server.py"}" "$@"\n')
    path.chmod(0o755)
    (tmp_path / "opt" / "backends" / "python").mkdir(parents=True)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server anywhere, but python3 on PATH."""
    for name in (binaries.SERVER_ENV, binaries.PYTHON_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(binaries, "IMAGE", tmp_path / "no-image")
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "python3").symlink_to(sys.executable)
    (folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    facts = dataclasses.replace(python_facts(Path(sys.executable)), pytriton=None)
    monkeypatch.setattr(binaries, "python_facts", lambda path: facts)


def gone(pid: int) -> bool:
    """Ends within seconds; one that nobody has waited for yet has no command line."""
    for _ in range(100):
        try:
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# Which server ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("nothing")
def test_no_server_says_where_it_looked() -> None:
    with pytest.raises(UsageError) as e:
        find_server()
    for part in (
        "TRITONSERVER (not set)",
        "TRT_RAZOR_TRITON_PYTHON (not set)",
        "no-image/bin/tritonserver",
        "tritonserver on PATH",
        f"nvidia-pytriton in {sys.executable}",
        "pip install 'trt-razor[serve]'",
        "numpy < 2",
        "nvcr.io/nvidia/tritonserver",
    ):
        assert part in str(e.value)


@pytest.mark.usefixtures("nothing")
def test_order(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRITONSERVER, then the image, then PATH."""
    shutil.copy(program, Path(os.environ["PATH"]) / "tritonserver")
    assert find_server().source.endswith("(PATH)")
    monkeypatch.setattr(binaries, "IMAGE", program.parent.parent)
    assert find_server().source == str(program)
    named = program.with_name("other")
    shutil.copy(program, named)
    monkeypatch.setenv(binaries.SERVER_ENV, str(named))
    found = find_server()
    assert found.executable == named
    assert found.backends == program.parent.parent / "backends"
    assert found.stub is None
    named.chmod(0o644)
    with pytest.raises(UsageError, match=f"TRITONSERVER={named}: expected the executable"):
        find_server()


def test_a_python_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a Python 3, and it cannot be run: No such file"):
        python_facts(tmp_path / "none")
    liar = tmp_path / "python3"
    liar.write_text("#!/bin/sh\necho no such thing >&2; exit 3\n")
    liar.chmod(0o755)
    with pytest.raises(UsageError, match="and it answers: no such thing"):
        python_facts(liar)


def test_packaged_server(triton_python: Path) -> None:
    found = find_server(triton_python)
    assert found.stub is not None
    assert found.stub.is_file()
    assert found.environment["PATH"].split(":")[0] == str(triton_python.parent)
    check_models_run(found, "onnxruntime")
    assert found.python is not None

    def having(**changes: object) -> ServerBinary:
        return dataclasses.replace(found, python=dataclasses.replace(found.python, **changes))  # type: ignore[arg-type, type-var]

    with pytest.raises(UsageError, match=r"lacks onnxruntime; install with: .* -m pip install"):
        check_models_run(having(modules=found.python.modules - {"onnxruntime"}), "onnxruntime")
    with pytest.raises(UsageError, match=r"has numpy 2\.1\.0, with which"):
        check_models_run(having(numpy="2.1.0"), "onnxruntime")
    with pytest.raises(UsageError, match="no python3 on PATH"):
        check_models_run(dataclasses.replace(found, python=None), "onnxruntime")
    new = dataclasses.replace(found.python, version=(3, 99))
    with pytest.raises(
        UsageError, match=r"is Python 3\.99; this server has stubs for 3\.10, 3\.11"
    ):
        binaries._packaged(new)


# Ports ----------------------------------------------------------------------------------------------
def test_ports() -> None:
    ports = free_ports("127.0.0.1", 3)
    assert len(set(ports)) == 3
    check_ports("127.0.0.1", {"--a": ports[0], "--b": ports[1]})
    with pytest.raises(UsageError, match=f"--b {ports[0]}: --a has the same"):
        check_ports("127.0.0.1", {"--a": ports[0], "--b": ports[0]})
    with pytest.raises(UsageError, match=r"--a 65536: expected 1 \.\. 65535"):
        check_ports("127.0.0.1", {"--a": 65536})
    with pytest.raises(UsageError, match=r"--address 192\.0\.2\.1: expected an address of this"):
        check_ports("192.0.2.1", {"--a": ports[0]})
    listening = socket.create_server(("127.0.0.1", ports[2]))
    with listening, pytest.raises(UsageError, match=f"--a {ports[2]}: taken by another program"):
        check_ports("127.0.0.1", {"--a": ports[2]})
    check_ports("127.0.0.1", {"--a": ports[2]})


# Life -----------------------------------------------------------------------------------------------
def start(
    program: Path, folder: Path, kind: type[TritonServer] = TritonServer, **options: object
) -> TritonServer:
    environment = {
        **os.environ,
        "FAKE_RECORD": str(folder.parent / "record.json"),
        "FAKE_SERVER": str(options.pop("mode", "")),
    }
    found = ServerBinary(program, program.parent.parent / "backends", environment, "a test")
    return kind(folder, found, **options)  # type: ignore[arg-type]


def record(models: Path) -> dict[str, object]:
    path = models.parent / "record.json"
    for _ in range(100):
        if path.exists() and path.read_text():
            break
        time.sleep(0.05)
    return dict(json.loads(path.read_text()))


def test_start_and_stop(program: Path, models: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    (more / "tensorrtllm").mkdir(parents=True)
    log = tmp_path / "logs" / "server.log"
    with start(program, models, backends=more, models=["a"], extra=["--x=1"], log=log) as server:
        told = record(models)
        assert server.alive
        assert server.get("/v2/health/ready") == (200, "")
        assert server.get("/nothing")[0] == 404
        folder = next(a for a in told["argv"] if a.startswith("--backend-directory="))  # type: ignore[attr-defined]
    assert server.stop() == 0  # again
    assert not server.alive
    assert server.get("/v2/health/ready") == (0, "")
    assert gone(int(str(told["child"])))
    assert not Path(folder.split("=")[1]).parent.exists()
    assert log.exists()
    assert told["backends"] == ["python", "tensorrtllm"]
    port = server.http.split(":")[1]
    for argument in (
        f"--model-repository={models}",
        f"--http-port={port}",
        "--http-address=127.0.0.1",
        "--model-control-mode=explicit",
        "--load-model=a",
        "--x=1",
    ):
        assert argument in told["argv"]  # type: ignore[operator]


def test_one_that_refuses(program: Path, models: Path) -> None:
    server = start(program, models, mode="refuses")
    with pytest.raises(RazorError) as e, server:
        pass
    assert str(e.value) == (
        "the Triton server ended with exit code 1: model tensorrt_llm: /e/model.onnx: expected 5 "
        "bytes, found 4"
    )
    assert "creating server" in server.log_tail()
    assert "loading:" not in server.log_tail()


def test_one_that_is_never_ready(program: Path, models: Path) -> None:
    server = start(program, models, mode="silent")
    server.start()
    child = int(str(record(models)["child"]))
    with pytest.raises(RazorError, match="not ready after 0 s: it said nothing"):
        server.wait_ready(timeout=0.2)
    assert not server.alive
    assert gone(child)


def test_one_that_does_not_stop(program: Path, models: Path) -> None:
    """It is killed, with its group."""
    with start(program, models, mode="stubborn") as server:
        child = int(str(record(models)["child"]))
        assert server.stop(timeout=0.3) == -9
    assert gone(child)


def test_more_instances_have_more_time_to_stop(program: Path, models: Path) -> None:
    """Triton ends their processes one after another, a second each."""
    for name, count in (("one", 12), ("other", 3)):
        (models / name).mkdir()
        text = ModelConfig(name, 8, (), (), backend="python", instances=count).text()
        (models / name / "config.pbtxt").write_text(text)
    with start(program, models):
        assert "--exit-timeout-secs=23" in record(models)["argv"]  # type: ignore[operator]


def test_failed_start_leaves_nothing(
    program: Path, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    (program.parent.parent / "backends" / "python" / "libtriton_python.so").touch()
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(RazorError, match=r"temporary/.*cannot write .*No space left.*TMPDIR"):
        start(program, models, backends=program.parent.parent / "backends").start()
    assert not any(place.iterdir())


def test_taken_port_is_told_before_the_start(program: Path, models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--grpc-port {port}: taken"):
            start(program, models, grpc_port=port)
    with pytest.raises(UsageError, match="expected a folder, found none"):
        start(program, models / "none")


def test_start_script(program: Path, models: Path) -> None:
    """What start.sh is told about ports, address and server."""
    fake = HERE / "fake_server.py"
    (models / "start.sh").write_text(f'exec "{sys.executable}" "{fake}" "$@"\n')
    with start(program, models, ScriptServer) as server:
        told = record(models)
    assert told["argv"] == []
    assert told["environment"] == {
        "ADDRESS": "127.0.0.1",
        "HTTP_PORT": server.http.split(":")[1],
        "GRPC_PORT": server.grpc.split(":")[1],
        "METRICS_PORT": server.metrics.split(":")[1],
        "TRITONSERVER": str(program),
    }


def test_what_matters_in_a_log() -> None:
    taken = (
        'W1122 13:45:00.1 7 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, '
        'pinned memory pool will not be available"\n'
        'E1122 13:45:01.2 7 main.cc:235] "failed to start GRPC service: Unavailable - Socket '
        "'127.0.0.1:18101' already in use\"\n+---+\n| a |\n"
    )
    said = "\"failed to start GRPC service: Unavailable - Socket '127.0.0.1:18101' already in use\""
    assert server_log.reason(taken.splitlines()) == said
    assert len(server_log.telling(taken.splitlines())) == 1
    assert server_log.reason(['I1122 1 2 a.cc] "fine"']) == "it said nothing"
    assert server_log.reason(["a model printed this"]) == "a model printed this"
