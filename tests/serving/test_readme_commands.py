"""A repository as its README says: start.sh with the server of the Python package, every curl as it stands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving_rig
from serving_model import Reference
from test_repository import write

from trt_razor.engine import Engine
from trt_razor.serving.server import free_ports


@pytest.fixture
def started(
    triton_python: Path, serving_engine: Engine, tmp_path: Path
) -> Iterator[tuple[Path, subprocess.Popen[bytes], list[int]]]:
    """A repository whose start.sh runs the server of the Python package, and its ports."""
    repository = write(
        serving_engine, tmp_path / "repository", slots=2, bls_instances=1, copy_engine=True
    )
    ports = free_ports("127.0.0.1", 3)
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT")
    environment = {k: v for k, v in os.environ.items() if k != "TRITONSERVER"}
    environment |= {"TRT_RAZOR_TRITON_PYTHON": str(triton_python)}
    environment |= dict(zip(names, map(str, ports), strict=True))
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            ["bash", str(repository / "start.sh"), "--log-verbose=0"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + serving_rig.LONG
        while not _ready(ports[0]):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield repository, process, ports
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def _ready(port: int) -> bool:
    try:
        serving_rig.get(f"127.0.0.1:{port}", "/v2/health/ready", timeout=2)
    except OSError:
        return False
    return True


def commands(readme: str) -> list[str]:
    """The indented blocks that call curl."""
    blocks = re.findall(r"(?m)^    curl (?:.*\\\n)*.*$", readme)
    return [b.strip() for b in blocks]


def test_readme_against_the_real_server(
    started: tuple[Path, subprocess.Popen[bytes], list[int]], reference: Reference
) -> None:
    repository, process, ports = started
    blocks = commands((repository / "README.md").read_text())
    assert len(blocks) == 4
    answers = []
    for block in blocks:
        for usual, port in zip((8000, 8001, 8002), ports, strict=True):
            block = block.replace(f"localhost:{usual}", f"127.0.0.1:{port}")
        done = subprocess.run(
            ["bash", "-c", block], capture_output=True, timeout=serving_rig.LONG, check=True
        )
        answers.append(done.stdout.decode())
    whole, pieces, talk, metrics = answers
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    ids = reference.tokenizer.encode_chat(question)
    text = reference.run(ids, max_new_tokens=32).text
    assert json.loads(whole)["text_output"] == text
    assert json.loads(talk)["text_output"] == text
    events = [json.loads(line[6:]) for line in pieces.splitlines() if line.startswith("data: ")]
    assert len(events) > 1
    assert "".join(e["text_output"] for e in events) == text
    shown = set(re.findall(r"^(trt_razor_\w+)\{", metrics, re.M))
    readme = (repository / "README.md").read_text()
    for name in set(re.findall(r"`(trt_razor_\w+)`", readme)):
        assert shown & {name, f"{name}_bucket"}, name
    assert 'trt_razor_slots_total{model="tensorrt_llm",version="1"} 2' in metrics
    # SIGTERM ends all of it.
    process.terminate()
    assert process.wait(30) == 0
    assert not _ready(ports[0])
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_start_script_that_is_killed(
    started: tuple[Path, subprocess.Popen[bytes], list[int]],
) -> None:
    """The server does not stay behind with its ports."""
    _, process, ports = started
    process.kill()
    end = time.monotonic() + serving_rig.LONG
    while _ready(ports[0]):
        assert time.monotonic() < end
        time.sleep(0.1)
