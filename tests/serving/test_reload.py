"""Models that are loaded, unloaded, damaged and killed while the server runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import serving_rig as rig
import serving_server
from serving_model import Reference
from serving_server import Server

from trt_razor.engine import Engine
from trt_razor.errors import RazorError

GONE = r"unknown model|no available versions|not ready|not found|unavailable|UNAVAILABLE|unloading"


@pytest.fixture(scope="module")
def copied(serving_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the engine in it."""
    output = tmp_path_factory.mktemp("copied") / "models"
    return serving_server.write(serving_engine, output, copy_engine=True, bls_instances=1)


@pytest.fixture(scope="module")
def explicit(copied: Path, start_server: Callable[..., object]) -> Iterator[Server]:
    """A server whose models are loaded and unloaded by requests; none at first."""
    with start_server(copied, models=()) as server:  # type: ignore[attr-defined]
        yield server


@pytest.fixture
def loaded(explicit: Server, reference: Reference) -> Server:
    for model in ("ensemble", "tensorrt_llm_bls"):
        load(explicit, model)
    explicit.check_good(reference)
    return explicit


def load(server: Server, model: str) -> None:
    rig.post(server.http, f"/v2/repository/models/{model}/load", {})


def unload(server: Server, model: str) -> None:
    rig.post(server.http, f"/v2/repository/models/{model}/unload", {})
    rig.wait_until(lambda: state(server, model)[0] != "UNLOADING", f"{model} is unloaded", 30)


def state(server: Server, model: str) -> tuple[str, str]:
    """(state, reason) of a model."""
    index = json.loads(rig.post(server.http, "/v2/repository/index", {}))
    (found,) = [m for m in index if m["name"] == model]
    return found.get("state", ""), found.get("reason", "")


def damage_weights(engine: Path) -> str:
    """Another byte in the middle of the weights."""
    path = max(engine.glob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    return path.name


def cut_graph(engine: Path) -> str:
    path = engine / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])
    return path.name


def no_manifest(engine: Path) -> str:
    (engine / "manifest.json").unlink()
    return "manifest.json"


def no_tokenizer(engine: Path) -> str:
    shutil.rmtree(engine / "tokenizer")
    return "tokenizer"


def folder_gone(engine: Path) -> str:
    shutil.rmtree(engine)
    return "engine"


def test_damaged_engine(
    explicit: Server, copied: Path, reference: Reference, tmp_path: Path
) -> None:
    """The error names the file; the server and its other models live; repaired, it loads."""
    if state(explicit, "tensorrt_llm")[0] == "READY":
        unload(explicit, "tensorrt_llm")
    engine = copied / "tensorrt_llm" / "1" / "engine"
    shutil.copytree(engine, tmp_path / "whole")
    for damage in (damage_weights, cut_graph, no_manifest, no_tokenizer, folder_gone):
        try:
            name = damage(engine)
            with pytest.raises(rig.ServerError, match=name):
                load(explicit, "tensorrt_llm")
            status, reason = state(explicit, "tensorrt_llm")
            assert status == "UNAVAILABLE"
            assert name in reason
        finally:
            shutil.rmtree(engine, ignore_errors=True)
            shutil.copytree(tmp_path / "whole", engine)
    load(explicit, "preprocessing")
    assert state(explicit, "preprocessing")[0] == "READY"
    load(explicit, "ensemble")
    explicit.check_good(reference)


def test_damaged_engine_at_start(
    copied: Path, start_server: Callable[..., object], tmp_path: Path
) -> None:
    """A server that is to load all its models ends, and says which file is wrong."""
    repository = shutil.copytree(copied, tmp_path / "models")
    name = damage_weights(repository / "tensorrt_llm" / "1" / "engine")
    with pytest.raises(RazorError, match=name), start_server(repository):  # type: ignore[attr-defined]
        pass


def test_reload_under_load(loaded: Server, reference: Reference) -> None:
    """Running requests end right, those in between are told, those after are right."""
    expected = reference.run("under load", max_new_tokens=60, ignore_eos=True)
    body = {"text_input": "under load", "max_tokens": 60, "end_id": -1}
    stop = threading.Event()
    processes = len(loaded.stubs())

    def client(i: int) -> tuple[int, int]:
        right = told = 0
        while not stop.is_set():
            try:
                answer = rig.generate(loaded.http, ("ensemble", "tensorrt_llm_bls")[i % 2], body)
                assert answer["text_output"] == expected.text
                right += 1
            except rig.ServerError as e:
                if not re.search(GONE, e.text):
                    raise
                told += 1
                time.sleep(0.02)
        return right, told

    long = reference.run("long", max_new_tokens=1500, ignore_eos=True)
    stream = rig.Stream(
        loaded.grpc, "tensorrt_llm", rig.direct(long.prompt, 1500, end_id=-1, streaming=True)
    )
    first, _ = stream.next()

    def reload() -> None:
        try:
            for model in ("tensorrt_llm", "preprocessing"):
                for _ in range(2):
                    time.sleep(0.3)
                    rig.post(loaded.http, f"/v2/repository/models/{model}/unload", {})
                    time.sleep(0.2)
                    load(loaded, model)
        finally:
            time.sleep(0.5)
            stop.set()

    thread = threading.Thread(target=reload)
    thread.start()
    counts = rig.in_parallel(6, client)
    thread.join()
    assert sum(right for right, _ in counts) > 20
    assert sum(told for _, told in counts) > 0
    assert rig.ids_of([first, *stream]) == long.tokens
    for model in ("ensemble", "tensorrt_llm_bls"):
        load(loaded, model)
    for i in range(5):
        loaded.check_good(reference, "after", i)
    rig.wait_idle(loaded.metrics)
    rig.wait_until(lambda: len(loaded.stubs()) == processes, "the old models' processes ended")


def test_killed_model(loaded: Server, reference: Reference) -> None:
    """Its requests are told so, the server lives, and loading it again brings it back."""
    (pid,) = loaded.stubs("tensorrt_llm")
    os.kill(pid, signal.SIGKILL)
    for model in ("ensemble", "tensorrt_llm_bls"):
        with pytest.raises(rig.ServerError, match="not healthy"):
            rig.generate(loaded.http, model, {"text_input": "x", "max_tokens": 2}, timeout=20)
    assert rig.get(loaded.http, "/v2/health/live") == ""
    # What is left of it never finishes unloading; the new one does not wait for that.
    rig.post(loaded.http, "/v2/repository/models/tensorrt_llm/unload", {})
    load(loaded, "tensorrt_llm")
    load(loaded, "ensemble")
    loaded.check_good(reference)
    rig.wait_idle(loaded.metrics)
