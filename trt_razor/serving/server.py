"""Start a Triton server on a model repository, wait until it is ready, stop it without leftovers."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from trt_razor.errors import RazorError, UsageError
from trt_razor.serving import server_log
from trt_razor.serving.binary import ServerBinary, check_models_run, find_server
from trt_razor.serving.ports import check_ports, free_ports
from trt_razor.serving.temporary import SAFE, Folder

__all__ = [
    "ScriptServer",
    "ServerBinary",
    "TritonServer",
    "check_models_run",
    "check_ports",
    "find_server",
    "free_ports",
]

_EXIT_SECONDS = 8
"""How long the server itself waits for requests that are running when it is told to stop, and a
second more for each instance of a model: it ends their processes one after another."""
_COUNT = re.compile(r"\bcount:\s*(\d+)")
_INSTANCE = re.compile(r"([^/]+)_\d+_\d+")
_AUTO = "--disable-auto-complete-config"


class TritonServer:
    """One server process with its Python models; a context manager that starts and stops it.

    Args:
        repository: model repository.
        binary: what to start; None = ``find_server()``.
        http_port, grpc_port, metrics_port: 0 = a free one, chosen here.
        address: to listen on, all three.
        backends: folder with more backends, by name, beside the server's own.
        extra: more arguments of ``tritonserver``.
        log: file for what the server says; None = a temporary one.
        inherit: the server writes where this process does, and ``log`` is not used.
        die_with_us: also if this process is killed (Linux; start it from the main thread).
        models: start in explicit mode with these models only; () = with none; None = all of the
            repository, and a model that cannot be loaded ends the server.

    Raises:
        UsageError: a port is taken, or the repository or a backends folder is not there.
    """

    def __init__(
        self,
        repository: Path,
        binary: ServerBinary | None = None,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        address: str = "127.0.0.1",
        backends: Path | None = None,
        extra: Sequence[str] = (),
        log: Path | None = None,
        inherit: bool = False,
        die_with_us: bool = False,
        models: Sequence[str] | None = None,
    ) -> None:
        for folder in (repository, backends):
            if folder is not None and not folder.is_dir():
                raise UsageError(f"{folder}: expected a folder, found none")
        self.repository = repository.absolute()
        self.binary = find_server() if binary is None else binary
        self.address = address
        names = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        check_ports(address, {f"--{n}-port": p for n, p in names.items() if p})
        free = iter(free_ports(address, 3))
        self._ports = {n: p or next(free) for n, p in names.items()}
        self._more_backends = backends
        self._extra = list(extra)
        self._exit_seconds = _EXIT_SECONDS + _instances(repository)
        self._models = models
        self._log = log
        self._inherit = inherit
        self._die_with_us = die_with_us
        self._folder: Folder | None = None
        self._said: Path | None = None
        self._last = ""
        self._shared = f"trt_razor_{os.getpid()}_{secrets.token_hex(4)}_"
        self.process: subprocess.Popen[bytes] | None = None

    # Where it answers ------------------------------------------------------------------------
    @property
    def http(self) -> str:
        """``host:port`` of HTTP."""
        return self._at("http")

    @property
    def grpc(self) -> str:
        """``host:port`` of gRPC."""
        return self._at("grpc")

    @property
    def metrics(self) -> str:
        """``host:port`` of the metrics."""
        return self._at("metrics")

    def _at(self, name: str) -> str:
        return f"{self.host}:{self._ports[name]}"

    @property
    def host(self) -> str:
        """The address that clients on this machine use."""
        if self.address == "0.0.0.0":
            return "127.0.0.1"
        return f"[{self.address}]" if ":" in self.address else self.address

    # Life --------------------------------------------------------------------------------------
    def __enter__(self) -> TritonServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; it is not ready yet.

        Raises:
            RazorError: it cannot be started.
        """
        if self.process is not None:
            raise RazorError("the server was started already")
        self._folder = Folder("server", self._shared)
        try:
            self._launch(self._folder)
        except BaseException:
            self._tidy()
            raise

    def _launch(self, place: Folder) -> None:
        folder = place.path
        if not self._inherit:
            self._said = self._log or folder / "server.log"
            self._said.parent.mkdir(parents=True, exist_ok=True)
        try:
            command, environment = self._command(folder), self._environment(folder)
        except OSError as e:
            raise RazorError(
                f"{folder}: cannot write what the server needs: {e.strerror or e}; TMPDIR names another place"
            ) from None
        try:
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(open(self._said, "wb")) if self._said else None
                # A group of its own: Ctrl-C in the terminal is for us, who then stop it in order.
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(place.lock,),  # it may outlive this process
                    preexec_fn=_die_with_parent() if self._die_with_us else None,
                )
        except OSError as e:
            raise RazorError(f"{command[0]}: cannot be started: {e.strerror or e}") from None

    def wait_ready(
        self, timeout: float = 120.0, progress: Callable[[float], None] = lambda seconds: None
    ) -> None:
        """Wait until all models are loaded and the server answers.

        Args:
            timeout: seconds. progress: called now and then with the seconds so far.

        Raises:
            RazorError: it ended (with the lines of its log that say why) or is not ready in time.
        """
        start = time.monotonic()
        while not self.ready():
            passed = time.monotonic() - start
            if not self.alive:
                code = self.stop()
                raise RazorError(f"the Triton server ended with exit code {code}: {self.reason()}")
            if passed > timeout:
                self.stop()
                raise RazorError(
                    f"the Triton server was not ready after {timeout:.0f} s: {self.reason()}"
                )
            progress(passed)
            time.sleep(0.1)

    def ready(self) -> bool:
        """Whether all models are loaded and requests are taken."""
        return self.alive and self.get("/v2/health/ready", timeout=5.0)[0] == 200

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stubs(self) -> dict[int, str]:
        """Processes that run the Python models: pid to the name of the model."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().decode("utf-8", "replace").split("\0")
                # After what it runs comes its region of shared memory.
                if any(w.startswith(self._shared) for w in words[1:]):
                    names = (_INSTANCE.fullmatch(w) for w in words)
                    found[int(entry.parent.name)] = next((n[1] for n in names if n), "a model")
        return found

    def get(self, path: str, timeout: float = 10.0, metrics: bool = False) -> tuple[int, str]:
        """Status and text of ``GET path``; (0, "") if nobody answers.

        Args:
            metrics: ask the metrics port.
        """
        at = self.metrics if metrics else self.http
        connection = http.client.HTTPConnection(at, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    def stop(self, timeout: float | None = None) -> int | None:
        """Stop the server and its models and remove what they leave. May be called again.

        Args:
            timeout: seconds until the processes are killed; None = somewhat more than the server
                gives itself.

        Returns:
            The server's exit code (negative = killed by a signal), None = never started.
        """
        process = self.process
        if process is None:
            return None
        timeout = self._exit_seconds + 6.0 if timeout is None else timeout
        try:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout)
        finally:
            # Stubs outlive a server that was killed, and they are in its group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            self._tidy()
        return code

    def _tidy(self) -> None:
        self._last = self.log_text()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    # What it says --------------------------------------------------------------------------------
    def log_text(self) -> str:
        """All that the server said, also after it has ended (the last megabyte of it)."""
        if self._said is None or not self._said.exists():
            return self._last
        with open(self._said, "rb") as f:
            f.seek(max(0, self._said.stat().st_size - (1 << 20)))
            return f.read().decode("utf-8", "replace")

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that matter: warnings, errors, and what models printed."""
        return "\n".join(server_log.telling(self.log_text().splitlines())[-lines:])

    def reason(self) -> str:
        """One line: why it ended, as far as its log tells."""
        if self._inherit:
            return "see its messages above"
        return server_log.reason(self.log_text().splitlines())

    # How it is started -----------------------------------------------------------------------------
    def _command(self, folder: Path) -> list[str]:
        repository = self.repository
        if not SAFE.fullmatch(str(repository)):
            repository = folder / "repository"
            repository.symlink_to(self.repository)
        command = [str(self.binary.executable), f"--model-repository={repository}"]
        for name, port in self._ports.items():
            command += [f"--{name}-address={self.address}", f"--{name}-port={port}"]
        if _AUTO not in self._extra:  # the configurations are complete; asking takes a second more
            command.append(_AUTO)
        command += [
            f"--exit-timeout-secs={self._exit_seconds}",
            # Ours to recognise and to remove.
            f"--backend-config=python,shm-region-prefix-name={self._shared}",
        ]
        if not Path("/dev/nvidiactl").exists():
            command.append("--allow-gpu-metrics=false")
        if self.binary.stub is not None or self._more_backends is not None:
            command.append(f"--backend-directory={self._backends(folder)}")
        if self._models is not None:
            command.append("--model-control-mode=explicit")
            command += [f"--load-model={name}" for name in self._models]
        return command + self._extra

    def _backends(self, folder: Path) -> Path:
        """A folder with links to all backends: what is installed stays as it is."""
        ours = folder / "backends"
        ours.mkdir()
        for source in (self._more_backends, self.binary.backends):  # the first of a name counts
            for backend in sorted(source.iterdir()) if source is not None else ():
                if backend.is_dir() and not (ours / backend.name).exists():
                    _link_files(backend, ours / backend.name)
        if self.binary.stub is not None:
            stub = ours / "python" / self.binary.stub.name
            stub.unlink(missing_ok=True)
            stub.symlink_to(self.binary.stub)
        return ours

    def _environment(self, folder: Path) -> dict[str, str]:
        environment = dict(self.binary.environment)
        libraries = _search_path(self._libpython(folder), environment.get("LD_LIBRARY_PATH", ""))
        if libraries:
            environment["LD_LIBRARY_PATH"] = libraries
        return environment

    def _libpython(self, folder: Path) -> Path | None:
        """A folder with the Python's library alone: beside it may lie others that do harm."""
        python = self.binary.python
        if self.binary.stub is None or python is None or python.library is None:
            return None
        libraries = folder / "lib"
        libraries.mkdir()
        (libraries / python.library.name).symlink_to(python.library)
        return libraries


def _instances(repository: Path) -> int:
    """Instances of models that a repository asks for, as far as its files say."""
    count = 0
    for config in repository.glob("*/config.pbtxt"):
        with contextlib.suppress(OSError):
            text = config.read_text(encoding="utf-8", errors="replace")
            count += sum(min(int(n[:6]), 1000) for n in _COUNT.findall(text))
    return count


def _link_files(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".so":  # the server wants the library itself inside of the folder
            shutil.copy2(path, target / path.name)
        else:
            (target / path.name).symlink_to(path.absolute())


def _search_path(folder: Path | None, rest: str) -> str:
    return os.pathsep.join(x for x in (str(folder or ""), rest) if x)


class ScriptServer(TritonServer):
    """A server that the repository's own ``start.sh`` starts: TensorRT-LLM, one process a GPU."""

    def _command(self, folder: Path) -> list[str]:
        return ["bash", str(self.repository / "start.sh"), *self._extra]

    def _environment(self, folder: Path) -> dict[str, str]:
        ports = {f"{name.upper()}_PORT": str(port) for name, port in self._ports.items()}
        found = {"TRITONSERVER": str(self.binary.executable), "ADDRESS": self.address}
        return {**self.binary.environment, **found, **ports}


def _die_with_parent() -> Callable[[], object] | None:
    """For the child: a SIGTERM when the thread that started it ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: the child must not load anything
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
