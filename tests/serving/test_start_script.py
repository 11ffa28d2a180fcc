"""``start.sh``: what it starts, with what environment, and what it says when something is missing.

Stand-ins for ``tritonserver``, ``mpirun`` and ``nvidia-smi`` record how they were called. Real servers:
test_readme_commands.py and test_trtllm_start.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "trtllm"))
from engine_folders import engine_folder
from test_repository import write
from test_trtllm_repository import with_tokenizer

from trt_razor.engine import Engine
from trt_razor.serving.start_script import TEMPLATES

PLUGIN = b"plugin"
PRELOAD_NAME, PLUGIN_NAME = "libtrt_razor_preload_trt10.so", "libtrt_razor_plugins_trt10.so"
FACTS = {
    "preload": PRELOAD_NAME,
    "plugin": PLUGIN_NAME,
    "plugin_sha256": hashlib.sha256(PLUGIN).hexdigest(),
}
RECORD = """#!{python} -ISE
import json, os, sys
name = os.path.basename(sys.argv[0])
with open({record!r}, "a") as f:
    f.write(json.dumps([name, sys.argv[1:], dict(os.environ)]) + "\\n")
"""
# As mpirun: each part between ":" is a program, here one after another.
MPIRUN = """
import subprocess
part = sys.argv[1:]
while part and part[0] != "-n":
    part.pop(0)
while part:
    end = part.index(":") if ":" in part else len(part)
    assert part[:2] == ["-n", "1"], part
    subprocess.run(part[2:end], check=True, stderr=subprocess.DEVNULL)
    part = part[end + 1 :]
"""


@dataclass
class Call:
    """One call of a stand-in."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


@dataclass
class Machine:
    """A folder of stand-ins as the PATH of start.sh. The folder has a space in its name."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bin = self.root / "tools of mine" / "bin"
        self.bin.mkdir(parents=True)
        (self.root / "tools of mine" / "backends" / "tensorrtllm").mkdir(parents=True)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.root),
            "TRT_RAZOR_TRITON_PYTHON": sys.executable,
        }
        for name, more in (("tritonserver", ""), ("mpirun", MPIRUN)):
            self.add(name, RECORD.format(python=sys.executable, record=str(self.record)) + more)

    @property
    def record(self) -> Path:
        return self.root / "record"

    def add(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def gpus(self, count: int) -> None:
        lines = "".join(f"GPU {i}: NVIDIA (UUID: GPU-{i})\\n" for i in range(count))
        self.add("nvidia-smi", f"#!/bin/sh\nprintf '{lines}'\n")

    def plugins(self, folder: str = "plugins") -> Path:
        """Our two libraries; returns the one to preload."""
        place = self.root / folder
        place.mkdir(exist_ok=True)
        (place / PLUGIN_NAME).write_bytes(PLUGIN)
        (place / PRELOAD_NAME).write_bytes(b"")
        return place / PRELOAD_NAME

    def start(self, repository: Path, *arguments: str, **environment: str) -> list[Call]:
        """Run start.sh, which must succeed; the stand-ins' calls in order."""
        done = self.run(repository, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return [Call(*json.loads(line)) for line in self.record.read_text().splitlines()]

    def fail(self, repository: Path, **environment: str) -> str:
        """Run start.sh, which must fail with one line and start nothing; that line."""
        done = self.run(repository, **environment)
        assert done.returncode == 1, done
        assert not self.record.exists()
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("start.sh: error: ")
        return lines[0].removeprefix("start.sh: error: ")

    def run(
        self, repository: Path, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(repository / "start.sh"), *arguments],
            capture_output=True,
            text=True,
            env={**self.environment, **environment},
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture
def own(razor_engine: Engine, tmp_path: Path) -> Path:
    return write(razor_engine, tmp_path / "own")


@pytest.fixture
def two_ranks(tmp_path: Path) -> Path:
    folder = engine_folder(tmp_path / "an engine", tp_size=2, facts=FACTS)
    return write(folder.path, tmp_path / "two ranks")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = engine_folder(tmp_path / "dense-engine", razor=False)
    return write(folder.path, tmp_path / "dense")


# Our own engines ----------------------------------------------------------------------------------
def test_own_engine(machine: Machine, own: Path) -> None:
    (call,) = machine.start(own, "--log-verbose=1", "--model-control-mode=none x", HTTP_PORT="9000")
    assert call.name == "tritonserver"
    assert f"--model-repository={own}" in call.arguments
    assert "--http-port=9000" in call.arguments
    assert "--grpc-port=8001" in call.arguments
    assert "--metrics-port=8002" in call.arguments
    assert {a for a in call.arguments if "-address=" in a} == {
        f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")
    }
    assert call.arguments[-2:] == ["--log-verbose=1", "--model-control-mode=none x"]
    assert "LD_PRELOAD" not in call.environment
    # The first python3 of PATH runs the models.
    assert call.environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_server_that_is_named(machine: Machine, own: Path) -> None:
    other = shutil.move(machine.bin / "tritonserver", machine.bin / "my server")
    (call,) = machine.start(own, TRITONSERVER=str(other), ADDRESS="::1")
    assert call.name == "my server"
    assert "--grpc-address=::1" in call.arguments
    machine.record.unlink()
    assert "$TRITONSERVER: expected the program" in machine.fail(own, TRITONSERVER="/nowhere")


def test_copied_engine_moves_along(machine: Machine, razor_engine: Engine, tmp_path: Path) -> None:
    output = write(razor_engine, tmp_path / "r", copy_engine=True)
    moved = output.rename(tmp_path / "elsewhere")
    (call,) = machine.start(moved)
    assert f"--model-repository={moved}" in call.arguments


@pytest.mark.parametrize("name", ["a b", "a$b", "é", "a'b", 'a"b', "a;b"])
def test_place_that_triton_cannot_load_from(machine: Machine, own: Path, name: str) -> None:
    link = own.with_name("link")
    link.symlink_to(own.with_name(name))
    assert "loads no Python models from such a path" in machine.fail(
        own.rename(own.with_name(name))
    )


def test_own_engine_that_is_gone(machine: Machine, razor_engine: Engine, tmp_path: Path) -> None:
    output = write(razor_engine, tmp_path / "r", mounted_at="/mnt/engine")
    assert machine.fail(output).startswith("/mnt/engine: expected the engine directory")


def test_python_without_packages(machine: Machine, own: Path) -> None:
    bare = machine.add("python3", f'#!/bin/sh\nexec "{sys.executable}" -ISE "$@"\n')
    said = machine.fail(own, TRT_RAZOR_TRITON_PYTHON=str(bare))
    assert said.startswith(f"{bare}: has no trt_razor, ")
    assert "onnxruntime" in said
    assert f"{bare} -m pip install 'trt-razor[models,onnxruntime]'" in said
    assert "found none" in machine.fail(own, TRT_RAZOR_TRITON_PYTHON="/nowhere/python")
    odd = machine.root / "python"  # Triton would take another one
    odd.symlink_to(sys.executable)
    said = machine.fail(own, TRT_RAZOR_TRITON_PYTHON=str(odd))
    assert f"{machine.root}: expected a python3 beside python" in said


def test_package_that_only_the_working_folder_has(machine: Machine, own: Path) -> None:
    """Triton's Python models do not see what PYTHONPATH or the working folder have."""
    bare = machine.add("python3", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    done = subprocess.run(
        ["bash", str(own / "start.sh")],
        cwd=Path(__file__).resolve().parents[2],
        env={
            **machine.environment,
            "TRT_RAZOR_TRITON_PYTHON": str(bare),
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "has no trt_razor" in done.stderr


def test_no_server_at_all(machine: Machine, own: Path) -> None:
    (machine.bin / "tritonserver").unlink()
    if Path("/opt/tritonserver").exists():
        pytest.skip("there is a server in /opt")
    done = machine.run(own)
    assert done.returncode == 2
    assert "nvidia-pytriton" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# TensorRT-LLM -------------------------------------------------------------------------------------
def test_ranks(machine: Machine, two_ranks: Path) -> None:
    machine.gpus(2)
    preload = machine.plugins()
    mpirun, *servers = machine.start(
        two_ranks, "--log-verbose=1", RAZOR_PRELOAD=str(preload), ADDRESS="0.0.0.0"
    )
    assert mpirun.name == "mpirun"
    assert mpirun.arguments[:3] == ["--allow-run-as-root", "-n", "1"]
    assert mpirun.arguments.count(":") == 1
    assert "LD_PRELOAD" not in mpirun.environment  # only for what loads engines
    assert [s.name for s in servers] == ["tritonserver"] * 2
    for rank, server in enumerate(servers):
        assert server.environment["LD_PRELOAD"] == str(preload)
        assert server.environment["TRT_RAZOR_PLUGIN"] == str(preload.with_name(PLUGIN_NAME))
        assert f"--model-repository={two_ranks}" in server.arguments
        assert f"--backend-config=python,shm-region-prefix-name=prefix{rank}_" in server.arguments
        assert f"--backend-directory={machine.bin.parent}/backends" in server.arguments
        assert "--http-address=0.0.0.0" in server.arguments
        assert server.arguments[-1] == "--log-verbose=1"
        others = {"--model-control-mode=explicit", "--load-model=tensorrt_llm"}
        assert others & set(server.arguments) == (others if rank else set())


def test_one_dense_rank_preloads_nothing(machine: Machine, dense: Path) -> None:
    mpirun, server = machine.start(dense)
    assert (mpirun.name, server.name) == ("mpirun", "tritonserver")
    assert "LD_PRELOAD" not in server.environment
    machine.record.unlink()
    (alone,) = machine.start(dense, NO_MPI="1")
    assert alone.name == "tritonserver"
    assert f"--model-repository={dense}" in alone.arguments


def test_options_of_mpirun(machine: Machine, two_ranks: Path) -> None:
    machine.gpus(1)  # the other one is elsewhere
    other = shutil.copy(machine.bin / "mpirun", machine.bin / "mpiexec")
    (machine.bin / "mpirun").unlink()
    mpirun, *servers = machine.start(
        two_ranks,
        MPIRUN=str(other),
        MPI_ARGS="--host a:1,b:1  -x NCCL_DEBUG",
        RAZOR_PRELOAD=str(machine.plugins()),
    )
    assert mpirun.name == "mpiexec"
    assert mpirun.arguments[1:5] == ["--host", "a:1,b:1", "-x", "NCCL_DEBUG"]
    assert len(servers) == 2


def test_where_the_preload_library_is_found(machine: Machine, two_ranks: Path) -> None:
    preload = machine.plugins()
    plugin = str(preload.with_name(PLUGIN_NAME))
    *_, server = machine.start(two_ranks, TRT_RAZOR_PLUGIN=plugin, LD_PRELOAD="")
    assert server.environment["LD_PRELOAD"] == str(preload)


def test_five_models_need_python(machine: Machine, razor_engine: Engine, tmp_path: Path) -> None:
    folder = engine_folder(tmp_path / "engine", razor=False).path
    with_tokenizer(folder, razor_engine.directory / "tokenizer")
    output = write(folder, tmp_path / "r")
    bare = machine.add("python3", f'#!/bin/sh\nexec "{sys.executable}" -ISE "$@"\n')
    said = machine.fail(output, TRT_RAZOR_TRITON_PYTHON=str(bare))
    assert "pip install 'trt-razor[models]'" in said
    _, server = machine.start(output)
    assert server.name == "tritonserver"


@pytest.mark.parametrize(
    "break_it, message",
    [
        ("engine", "expected rank1.engine, found none"),
        ("server", "tritonserver: not found"),
        ("backend", "expected Triton's TensorRT-LLM backend, found none"),
        ("gpus", "GPUs: expected 2, one for each rank, found 1"),
        ("driver", "GPUs: expected 2, one for each rank, found 0"),
        ("visible", "GPUs: expected 2, one for each rank, found 1"),
        ("mpirun", "mpirun: not found"),
        ("preload", f"{PRELOAD_NAME}: not found"),
        ("plugin", f"{PLUGIN_NAME}: not found"),
        ("other plugin", "sha256: expected "),
        ("path", "LD_PRELOAD takes no path with spaces or colons"),
    ],
)
def test_what_is_missing(
    machine: Machine, two_ranks: Path, tmp_path: Path, break_it: str, message: str
) -> None:
    machine.gpus(2)
    preload = machine.plugins()
    environment = {"RAZOR_PRELOAD": str(preload)}
    if break_it == "engine":
        (tmp_path / "an engine" / "rank1.engine").unlink()
    elif break_it in ("server", "mpirun"):
        (machine.bin / {"server": "tritonserver", "mpirun": "mpirun"}[break_it]).unlink()
        if shutil.which("mpirun", path="/usr/bin:/bin") or Path("/opt/tritonserver").exists():
            pytest.skip("this machine has one")
    elif break_it == "backend":
        (machine.bin.parent / "backends" / "tensorrtllm").rmdir()
    elif break_it == "gpus":
        machine.gpus(1)
    elif break_it == "driver":
        machine.add("nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 9\n")
    elif break_it == "visible":
        environment["CUDA_VISIBLE_DEVICES"] = "1"
    elif break_it == "preload":
        preload.unlink()
    elif break_it == "plugin":
        preload.with_name(PLUGIN_NAME).unlink()
    elif break_it == "other plugin":
        preload.with_name(PLUGIN_NAME).write_bytes(b"another build")
    elif break_it == "path":
        environment["RAZOR_PRELOAD"] = str(machine.plugins("plug ins"))
    assert message in machine.fail(two_ranks, **environment)


# The scripts themselves ---------------------------------------------------------------------------
def test_templates_are_in_the_package() -> None:
    assert {p.name for p in TEMPLATES.glob("*.sh")} == {
        "start_common.sh",
        "start_own.sh",
        "start_trtllm.sh",
    }


@pytest.mark.parametrize("name", ["own", "two_ranks", "dense"])
def test_syntax(name: str, request: pytest.FixtureRequest) -> None:
    script = request.getfixturevalue(name) / "start.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


def test_mode_bits(own: Path) -> None:
    assert stat.S_IMODE((own / "start.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((own / "README.md").stat().st_mode) == 0o644
