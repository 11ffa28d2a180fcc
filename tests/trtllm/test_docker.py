"""Dockerfile, .dockerignore and docker/install.py, as far as that goes without a container engine."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from trt_razor.backends.tensorrt import PLUGIN_VARIABLE, plugin_name
from trt_razor.trtllm.release import NoTensorRtLlm, release_of

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "tests" / "plugins" / "tensorrt" / "fake_trt"  # a stand-in for TensorRT's


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str  # lines joined, comments gone


@dataclass(frozen=True)
class Stage:
    base: str
    name: str | None
    instructions: tuple[Instruction, ...]

    def all(self, word: str) -> list[str]:
        return [i.rest for i in self.instructions if i.word == word]


def instructions(text: str) -> list[Instruction]:
    """As Docker's classic parser reads them: no here-documents."""
    found, current = [], ""
    for line in text.splitlines():
        if line.lstrip().startswith("#") or (not current and not line.strip()):
            continue
        assert line.strip(), "an empty line within an instruction"
        current += line.rstrip()
        if current.endswith("\\"):
            current = current[:-1]
            continue
        word, _, rest = current.partition(" ")
        found.append(Instruction(word, rest.strip()))
        current = ""
    assert not current, "the last line goes on"
    return found


def parse() -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage with their defaults, and the stages."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    body: list[Instruction] = []
    for i in instructions((ROOT / "Dockerfile").read_text()):
        if i.word == "FROM":
            words = i.rest.split()
            assert len(words) in (1, 3)
            assert len(words) == 1 or words[1] == "AS"
            body = []
            stages.append(Stage(words[0], words[2] if len(words) == 3 else None, ()))
        elif not stages:
            assert i.word == "ARG"
            name, _, default = i.rest.partition("=")
            arguments[name] = default
        else:
            body.append(i)
            stages[-1] = Stage(stages[-1].base, stages[-1].name, tuple(body))
    return arguments, stages


def test_only_what_every_builder_knows() -> None:
    """Plain `docker build`, without BuildKit: no mounts, here-documents, or modes; SHELL is lost in OCI images."""
    text = (ROOT / "Dockerfile").read_text()
    words = {i.word for i in instructions(text)}
    assert words <= {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENV"}
    assert not re.search(r"<<|--mount|--chmod|--link|^# *syntax", text, re.M)


def test_stages_and_arguments() -> None:
    arguments, stages = parse()
    known = {"server", "plugins"}
    assert [s.name for s in stages] == ["server", "plugins", None]
    for stage in stages:
        variables = re.findall(r"\$\{(\w+)\}", stage.base)
        assert stage.base in known or (len(variables) == 1 and variables[0] in arguments)
        own = {a.partition("=")[0] for a in stage.all("ARG")}
        for line in stage.all("COPY"):
            source = re.match(r"--from=(\S+)", line)
            assert source is None or source[1] in known  # a name: variables are not expanded there
        for script in stage.all("RUN"):
            used = set(re.findall(r"\$\{(\w+)", script))
            assert used <= own, "an argument is known only in the stage that declares it"
    assert all(arguments.values()), "every image has a default"


def test_the_final_image_is_the_server() -> None:
    arguments, stages = parse()
    assert stages[0].base == "${IMAGE}"
    assert stages[-1].base == "server"
    assert re.fullmatch(
        r"nvcr\.io/nvidia/tritonserver:\d\d\.\d\d-trtllm-python-py3", arguments["IMAGE"]
    )


def test_comment_on_releases_is_of_supported_ones() -> None:
    text = (ROOT / "Dockerfile").read_text()
    versions = re.findall(r"(\d+\.\d+\.\d+): \d\d\.\d\d", text)
    assert versions == ["1.0.0", "1.1.0", "1.2.1"]
    for version in versions:
        assert release_of(version).version == version


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_every_command_parses(shell: str) -> None:
    for stage in parse()[1]:
        for script in stage.all("RUN"):
            done = subprocess.run([shell, "-n", "-c", script], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file of the build context out: the last pattern that matches counts."""
    out = False
    parts = path.split("/")
    ancestors = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep = pattern.startswith("!")
        pattern = pattern.lstrip("!").rstrip("/")
        if any(_matches(a, pattern) for a in ancestors):
            out = not keep
    return out


def _matches(path: str, pattern: str) -> bool:
    """A star stays within a folder; `**/` is any number of folders."""
    here, there = path.split("/"), pattern.split("/")
    if there[0] == "**":
        return any(_matches("/".join(here[i:]), "/".join(there[1:])) for i in range(len(here)))
    return len(here) == len(there) and all(map(fnmatch.fnmatchcase, here, there))


def copies(stage: Stage) -> list[tuple[list[str], str]]:
    """Sources and target of each COPY from the build context."""
    found = []
    for line in stage.all("COPY"):
        if not line.startswith("--from="):
            *sources, target = line.split()
            found.append((sources, target))
    return found


def test_what_is_copied_exists_and_is_sent() -> None:
    for stage in parse()[1]:
        for sources, target in copies(stage):
            assert len(sources) == 1 or target.endswith("/")
            for source in sources:
                assert (ROOT / source).exists()
                assert source == "." or not ignored(source)


def test_context_has_all_that_is_needed_and_no_leftovers() -> None:
    for kept in (
        "docker/install.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "trt_razor/trtllm/models.py",
        "build_scripts/build_engine.py",
        "engines/recipes/smollm2-135m.heads.json",
        "tests/ngc/test_pools.py",
        "benchmarks/latency.py",
        "plugins/kernels/decode.cu",
    ):
        assert not ignored(kept), kept
    for left in (
        ".git/config",
        "build/release/librazor.so",
        "trt_razor/kernels/librazor.so",
        "trt_razor/__pycache__/cli.cpython-312.pyc",
        "trt_razor.egg-info/PKG-INFO",
        ".venv/bin/python",
        "engines/qwen-razor/rank0.engine",
        "benchmarks/results/x.partial.json",
        ".hypothesis/examples/a",
    ):
        assert ignored(left), left


def test_ignore_file_has_what_git_ignores() -> None:
    ours = {
        line.removeprefix("**/").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
    }
    for line in (ROOT / ".gitignore").read_text().splitlines():
        if line and not line.startswith("#"):
            assert line.rstrip("/") in ours


def test_environment_names_the_libraries_where_they_are() -> None:
    _, stages = parse()
    final = stages[-1]
    (folder,) = final.all("WORKDIR")
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(final.all("ENV"))))
    assert "LD_PRELOAD" not in variables
    assert variables[PLUGIN_VARIABLE] == f"{folder}/trt_razor/kernels/{plugin_name(10)}"
    install = load_installer()
    assert variables["RAZOR_PRELOAD"] == f"{folder}/trt_razor/kernels/{install.PRELOAD}"
    assert plugin_name(10) == install.PLUGINS
    (made,) = [line for line in final.all("COPY") if line.startswith("--from=plugins")]
    (source,) = stages[1].all("WORKDIR")
    assert made.split()[1:] == [f"{source}/trt_razor/kernels/", "trt_razor/kernels/"]


def test_plugin_stage_has_all_that_cmake_reads(tmp_path: Path) -> None:
    """Configures what the stage copies, with headers that stand in for TensorRT's."""
    cmake = shutil.which("cmake")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=_compiler_path())
    if cmake is None or nvcc is None:
        pytest.skip("needs cmake and nvcc")
    _, stages = parse()
    for sources, target in copies(stages[1]):
        for source in sources:
            here, there = ROOT / source, tmp_path / target
            if here.is_dir():
                shutil.copytree(here, there)
            else:
                there.mkdir(parents=True, exist_ok=True)
                shutil.copy(here, there)
    arguments = [f"-DTENSORRT_ROOT={HEADERS}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    arguments.append("-DCMAKE_CUDA_ARCHITECTURES=90-real")
    done = subprocess.run(
        [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "TensorRT plugins: for TensorRT 10" in done.stdout
    (make,) = [script for script in stages[1].all("RUN") if script.startswith("make ")]
    dry = subprocess.run(
        ["make", "-n", *re.findall(r"^make (plugin) (TENSORRT_ROOT=\S+)", make)[0], "JOBS=2"],
        cwd=tmp_path,
        env={**os.environ, "CUDACXX": nvcc},
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0, dry.stderr
    assert "-DTENSORRT_ROOT=/usr/local/tensorrt" in dry.stdout


def _compiler_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin:{ROOT}/.venv/cuda/nvidia/cu13/bin"


# docker/install.py ------------------------------------------------------------------------------
def load_installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "razor_docker_install", ROOT / "docker" / "install.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


needs_toml = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="images have Python 3.12; tomllib came with 3.11"
)


@needs_toml
def test_requirements_are_those_of_the_package_without_torch() -> None:
    import tomllib

    install = load_installer()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w.-]+", r)[0] for r in install.requirements(project)]  # type: ignore[index]
    assert len(names) == len(set(names))
    assert {"numpy", "rich", "safetensors", "tokenizers", "gguf", "matplotlib", "pytest"} <= {
        *names
    }
    assert not {"torch", "trt-razor", "tensorrt", "onnxruntime"} & {*names}


def test_every_installed_package_is_pinned_that_pip_can_read() -> None:
    install = load_installer()
    found = {"torch": "2.8.0a0+5228986c39.nv25.6", "numpy": "1.26.4", "distro": "1.7-ubuntu2"}
    assert install.constraints(found) == "numpy==1.26.4\ntorch==2.8.0a0+5228986c39.nv25.6\n"
    assert install.installed()["trt-razor"]


def test_a_package_that_changed_or_went_is_seen() -> None:
    install = load_installer()
    before = {"torch": "2.8", "numpy": "1.26.4", "flash": "2"}
    after = {"torch": "2.9", "numpy": "1.26.4", "rich": "15"}
    assert install.changes(before, after) == ["torch 2.8 -> 2.9", "flash 2 -> gone"]
    assert install.changes(before, {**before, "rich": "15"}) == []


@needs_toml
def test_pip_may_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of pip, and that a changed package fails the build of the image."""
    install = load_installer()
    calls: list[tuple[str, ...]] = []
    pins = []

    def pip(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "--constraint":
            pins.append(Path(arguments[1]).read_text())

    states = iter([{"numpy": "1.26.4"}, {"numpy": "2.0", "rich": "15"}])
    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "installed", lambda: next(states))
    with pytest.raises(SystemExit, match=r"found numpy 1\.26\.4 -> 2\.0"):
        install.install()
    assert pins == ["numpy==1.26.4\n"]
    assert "rich>=13.8" in calls[0]
    assert calls[1] == ("--no-deps", "--editable", str(ROOT))


def test_an_image_without_tensorrt_llm_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = load_installer()

    def missing() -> None:
        raise NoTensorRtLlm

    monkeypatch.setattr("trt_razor.trtllm.release.installed_release", missing)
    with pytest.raises(SystemExit, match="tensorrt_llm: not installed"):
        install.check(tmp_path)


def test_an_image_without_the_libraries_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = load_installer()
    monkeypatch.setattr("trt_razor.trtllm.release.installed_release", lambda: release_of("1.0.0"))
    with pytest.raises(SystemExit, match=r"librazor\.so"):
        install.check(tmp_path)


def test_an_image_with_another_tensorrt_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install = load_installer()
    monkeypatch.setattr("trt_razor.trtllm.release.installed_release", lambda: release_of("1.2.1"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "11.0.0")
    with pytest.raises(SystemExit, match=r"tensorrt: expected version 10, found 11\.0\.0"):
        install.check(tmp_path)
