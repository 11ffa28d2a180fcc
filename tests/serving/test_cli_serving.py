"""``trt-razor triton`` and ``trt-razor serve`` as a user has them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from serving_rig import stubs

from trt_razor.cli import main
from trt_razor.engine import Engine
from trt_razor.serving.repository import RepositoryOptions, write_repository

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
Serve = Callable[..., contextlib.AbstractContextManager["Serving"]]


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


# triton ---------------------------------------------------------------------------------------------
def test_triton_writes_and_checks(serving_engine: Engine, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tritonclient.grpc")
    output = tmp_path / "models"
    told = ["--slots", 1, "--queue", 3, "--max-input-tokens", 9, "--copy", "--echo"]
    assert run("triton", serving_engine.directory, "--output", output, *told) == 0
    said = capsys.readouterr().out
    assert f"trt-razor serve {output}" in said
    config = (output / "tensorrt_llm" / "config.pbtxt").read_text()
    values = {
        "slots": "1",
        "max_queue_size": "3",
        "max_input_tokens": "9",
        "gpt_model_path": "1/engine",
        "exclude_input_in_output": "false",
        "verify": "true",
    }
    flat = " ".join(config.split())
    for key, value in values.items():
        assert f'key: "{key}" value {{ string_value: "{value}" }}' in flat.replace(": {", " {")
    assert run("triton", "--check", output) == 0
    assert "nothing wrong" in capsys.readouterr().out
    (output / "ensemble" / "config.pbtxt").write_text("name: 3")
    assert run("triton", "--check", output) == 1
    done = capsys.readouterr()
    assert "ensemble" in done.out
    assert "wrong with this repository" in done.err


def test_triton_defaults_are_the_repository_s(serving_engine: Engine, tmp_path: Path) -> None:
    """An option that was not given changes nothing."""
    assert run("triton", serving_engine.directory, "--output", tmp_path / "a") == 0
    write_repository(serving_engine.directory, tmp_path / "b", RepositoryOptions())
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.pbtxt"))
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "expected ENGINE and --output DIR (or --check DIR)"),
        (["ENGINE"], "expected ENGINE and --output DIR (or --check DIR)"),
        (["ENGINE", "--check", "x"], "--check: takes the repository alone"),
        (["--check", "/no/repository"], "/no/repository: expected the folder of a model"),
        (["/no/engine", "--output", "x"], "/no/engine: no such engine directory"),
        (["ENGINE", "--output", "OUT", "--slots", "99"], "slots: expected 1.."),
        (["ENGINE", "--output", "OUT", "--gpu-device-ids", "0"], "gpu_device_ids: does not apply"),
        (["ENGINE", "--output", "OUT", "--no-decoupled"], "decoupled: does not apply"),
    ],
)
def test_triton_usage(
    argv: list[str], message: str, serving_engine: Engine, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("tritonclient.grpc")
    names = {"ENGINE": str(serving_engine.directory), "OUT": str(tmp_path / "out")}
    assert run("triton", *(names.get(a, a) for a in argv)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_script(serving_engine: Engine, tmp_path: Path) -> None:
    script = ROOT / "build_scripts" / "make_triton_repository.py"
    command = [sys.executable, script, serving_engine.directory, "--output", tmp_path / "m"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "m" / "ensemble" / "config.pbtxt").is_file()


# serve: what is told before a server is started ---------------------------------------------------
def test_serve_usage(
    serving_engine: Engine, repository: Path, tmp_path: Path, capsys: Capture
) -> None:
    def told(*argv: object) -> str:
        assert run("serve", *argv) == 2
        return capsys.readouterr().err

    assert "expected an engine directory or a model repository, found none" in told("/no/folder")
    assert "found neither's description there" in told(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert run("serve", tmp_path) == 1
    assert "damaged manifest" in capsys.readouterr().err
    assert "--force: is about --repository" in told(serving_engine.directory, "--force")
    assert "which has its settings; leave --slots out" in told(repository, "--slots", 1)
    assert "leave --queue out" in told(repository, "--queue", 1)
    assert "leave --no-verify out" in told(repository, "--no-verify")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--http-port {port}: taken" in told(serving_engine.directory, "--http-port", port)


FREE = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def test_serve_explains_a_missing_server(
    serving_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    from trt_razor.serving import binary

    for name in (binary.SERVER_ENV, binary.PYTHON_ENV):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(binary, "IMAGE", tmp_path / "no-image")
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = binary.python_facts(Path(sys.executable))
    if facts.pytriton is not None:
        pytest.skip("this Python has a server")
    assert run("serve", serving_engine.directory, *FREE) == 2
    assert "no Triton server on this machine: looked for" in capsys.readouterr().err


# serve: the real server ------------------------------------------------------------------------------
@dataclass
class Serving:
    """``trt-razor serve`` as a process of its own, once it is ready."""

    process: subprocess.Popen[str]
    said: str

    def end(self, timeout: float = 30) -> tuple[int, str]:
        """Exit code, and what it said on standard error in the end."""
        assert self.process.stderr is not None
        text = self.process.stderr.read()
        return self.process.wait(timeout), text

    @property
    def server(self) -> int:
        """Process id of tritonserver."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return int(Path(children).read_text().split()[0])


@pytest.fixture
def serve(triton_python: Path, tmp_path: Path) -> Serve:
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    @contextlib.contextmanager
    def started(target: Path, *argv: str) -> Iterator[Serving]:
        command = [sys.executable, "-m", "trt_razor", "serve", str(target), *FREE, *argv]
        environment = {
            **os.environ,
            "TRT_RAZOR_TRITON_PYTHON": str(triton_python),
            "TMPDIR": str(temporary),
        }
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            said = ""
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if "generate_stream" in line:
                    break
            yield Serving(process, said)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.communicate(timeout=60)
        assert not list(temporary.glob("trt_razor*"))
        assert not list(Path("/dev/shm").glob(f"trt_razor_{process.pid}_*"))

    return started


def ask(command: str) -> dict[str, object]:
    """What a printed curl command answers."""
    words = shlex.split(command)
    url, body = next(w for w in words if w.startswith("http:")), words[words.index("-d") + 1]
    with urllib.request.urlopen(url, body.encode(), timeout=60) as answer:
        return dict(json.loads(answer.read()))


def test_serve_answers_and_stops(serve: Serve, serving_engine: Engine, tmp_path: Path) -> None:
    """The command it prints answers, its metrics are there, SIGTERM ends it with 0."""
    named = tmp_path / "mein Gerät"  # Triton's own Python finds no such path
    shutil.copytree(serving_engine.directory, named)
    few = ("--slots", "1", "--bls-instances", "1")
    with serve(named, *few, "--prompt-format", "raw") as serving:
        lines = serving.said.splitlines()
        answer = ask(next(line for line in lines if "curl -s " in line))
        assert isinstance(answer["text_output"], str)
        assert answer["finish_reason"] in ("stop", "length", "capacity")
        metrics = lines[0].split("metrics ")[1]
        with urllib.request.urlopen(metrics, timeout=10) as page:
            assert b'trt_razor_slots_total{model="tensorrt_llm",version="1"} 1' in page.read()
        serving.process.send_signal(signal.SIGTERM)
        code, said = serving.end()
    assert code == 0
    assert said.splitlines()[-2:] == ["stopping … (once more: at once)", "stopped"]


def test_serve_tells_why_it_ended(serve: Serve, repository: Path, tmp_path: Path) -> None:
    """The server is killed; then, in another, a model's process: a server that looks ready is none."""
    with serve(repository) as serving:
        os.kill(serving.server, signal.SIGKILL)
        code, said = serving.end()
    assert code == 1
    assert "error: the Triton server ended with exit code -9" in said
    # Triton's own start of a model's process would break at the space.
    spaced = tmp_path / "my models"
    spaced.symlink_to(repository)
    with serve(spaced) as serving:
        os.kill(dict(stubs(serving.server))["tensorrt_llm"], signal.SIGKILL)
        code, said = serving.end()
    assert code == 1
    assert "error: the process of model tensorrt_llm ended" in said
