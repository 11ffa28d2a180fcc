"""Tests on real TensorRT-LLM engines: `make test-ngc` inside an NGC image (docs/ngc.md).

Everywhere else they are skipped, with the reason. run.sh sets TRT_RAZOR_NGC=1: then a run in which nothing
passed is a failure.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ngc_model import FAMILIES, NgcModel, Oracle, write_model
from ngc_rig import Engines, Outcome, Runs, build_engine, call, gpus, missing, read_outcome

from trt_razor.trtllm.executor import Request
from trt_razor.trtllm.release import Release, installed_release

HERE = Path(__file__).resolve().parent
REQUIRED = "TRT_RAZOR_NGC"
RUN_SECONDS = 900
MPIRUN = os.environ.get("TRT_RAZOR_MPIRUN", "mpirun --allow-run-as-root --oversubscribe").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    reason = missing() if mine else None
    if reason is not None:
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing passed is no success, where it was asked for."""
    if os.environ.get(REQUIRED) != "1" or session.exitstatus != 0:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    if not reporter.stats.get("passed"):
        reporter.write_line(f"\nerror: no test ran: {missing() or 'all were left out'}", red=True)
        session.exitstatus = 1


@pytest.fixture(scope="session")
def release() -> Release:
    return installed_release()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NgcModel]:
    """The checkpoint of a family; made once."""
    made: dict[str, NgcModel] = {}

    def model(family: str) -> NgcModel:
        if family not in made:
            made[family] = write_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return model


@pytest.fixture(scope="session")
def oracles(models: Callable[[str], NgcModel]) -> Callable[[str], Oracle]:
    """The reference of a family."""
    made: dict[str, Oracle] = {}
    return lambda family: made.setdefault(family, Oracle(models(family)))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1, 2])
def tp_size(request: pytest.FixtureRequest) -> int:
    """Tensor-parallel ranks; those that this machine has no GPUs for are skipped."""
    size, found = int(request.param), len(gpus())
    if size > found:
        pytest.skip(f"NOT TESTED: tensor parallelism of {size} needs {size} GPUs, found {found}")
    return size


@pytest.fixture(scope="session")
def engines(models: Callable[[str], NgcModel], tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """``engines(family, razor, tp_size, *flags)``: an engine directory built by the command line, once."""
    built: dict[tuple[Any, ...], Path] = {}

    def build(family: str, razor: bool, tp_size: int = 1, *flags: str) -> Path:
        key = (family, razor, tp_size, *flags)
        if key not in built:
            folder = tmp_path_factory.mktemp("engines") / "engine"
            build_engine(models(family), folder, razor, tp_size, flags)
            built[key] = folder
        return built[key]

    return build


@pytest.fixture
def run_engine(tmp_path: Path) -> Runs:
    """``run_engine(engine, requests, …)``: in processes of their own, one for each rank."""

    def run(
        engine: Path,
        requests: Sequence[Request],
        *,
        tp_size: int = 1,
        logits: bool = True,
        stream: bool = False,
        memory: float = 0.5,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        number = len(list(tmp_path.glob("job-*.json")))
        job, out = tmp_path / f"job-{number}.json", tmp_path / f"out-{number}"
        settings = {"engine": str(engine), "logits": logits, "stream": stream, "memory": memory}
        job.write_text(json.dumps({**settings, "requests": [asdict(r) for r in requests]}))
        command = [sys.executable, str(HERE / "ngc_job.py"), str(job), str(out)]
        if tp_size > 1:
            command = [*MPIRUN, "-n", str(tp_size), *command]
        call(command, RUN_SECONDS, {"TLLM_LOG_LEVEL": "INFO", **(environment or {})})
        return read_outcome(out)

    return run
