"""Public load tools: found, run, and what they export turned into figures.

``PerfAnalyzer`` gives the time of every response, from which all figures are computed here;
``GenaiPerf`` gives figures of its own (see ``genai_figures``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError

TOOL_VARIABLE = "TRT_RAZOR_PERF_ANALYZER"
PATIENCE = 5.0
"""Seconds that a tool has to end when it is told to."""
BUNDLED = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What perf_analyzer 2.51 links to, and under which names the package nvidia-pytriton has them."""
HOW_TO_GET = (
    "with glibc < 2.38 it is in the wheel tritonclient==2.51.0 (pip install --no-deps, in a virtual "
    "environment of its own), else pip install perf-analyzer==2.60.0; NGC's …-py3-sdk images have it"
)


@dataclass(frozen=True)
class Load:
    """What is sent: ``prompts`` (distinct, one for each request), ``concurrency`` at a time, each
    answered with exactly ``output_tokens`` tokens."""

    concurrency: int
    output_tokens: int
    prompts: Sequence[str]

    def inputs(self) -> list[dict[str, Any]]:
        """Tensors of each request: greedy, no end token, so that the length is fixed."""
        n = self.output_tokens
        return [
            {"text_input": [p], "max_tokens": [n], "min_tokens": [n], "end_id": [-1], "stream": [True]}
            for p in self.prompts
        ]  # fmt: skip


# Figures ----------------------------------------------------------------------------------------
def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """``NAME_p50_s`` and ``NAME_p99_s``."""
    p50, p99 = np.percentile(seconds, (50, 99))
    return {f"{name}_p50_s": float(p50), f"{name}_p99_s": float(p99)}


def read_export(path: Path, what: str) -> Any:
    """A tool's JSON. Raises RazorError if it is not there or was not finished."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise RazorError(f"{what}: left no {path.name}") from None
    try:
        # Texts are repeated there, control characters included.
        return json.loads(text, strict=False)
    except ValueError as e:
        raise RazorError(f"{what}: {path.name}: unfinished or damaged: {e}") from None


def export_figures(export: Any, load: Load) -> dict[str, float]:
    """Figures of one run from perf_analyzer's profile export.

    Time to first token is the first response after the request was sent; gaps between tokens are
    those between successive responses, all requests together. The duration is from the first
    request sent to the last token. An empty last response beyond the number of tokens is the
    server's end mark and no token. ``uneven`` counts requests whose responses are not one per
    token: their first token is then the first response with text.

    Raises:
        RazorError: another form than expected, or not as many answered requests as were sent.
    """
    try:
        experiments = export["experiments"]
        if len(experiments) != 1:
            raise ValueError(f"expected 1 experiment, found {len(experiments)}")
        found = [_answer(r, load.output_tokens) for r in experiments[0]["requests"]]
    except (KeyError, TypeError, ValueError, IndexError) as e:
        reason = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise RazorError(
            f"perf_analyzer's export: expected requests with times: {reason}"
        ) from None
    if len(found) != len(load.prompts):
        raise RazorError(
            f"perf_analyzer's export: expected {len(load.prompts)} requests, found {len(found)}"
        )
    start = min(answer.sent for answer in found)
    seconds = (max(answer.times[-1] for answer in found) - start) / 1e9
    gaps = [float(g) / 1e9 for answer in found for g in np.diff(answer.times)]
    if seconds <= 0 or not gaps or min(gaps) < 0:
        raise RazorError("perf_analyzer's export: times that do not rise, or one token only")
    tokens = load.output_tokens * len(found)
    return {
        **percentiles("ttft", [(a.times[a.first] - a.sent) / 1e9 for a in found]),
        **percentiles("itl", gaps),
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(found) / seconds,
        "seconds": seconds,
        "requests": len(found),
        "uneven": sum(answer.uneven for answer in found),
    }


@dataclass
class _Answer:
    sent: int
    times: list[int]
    first: int
    uneven: bool


def _answer(request: Mapping[str, Any], tokens: int) -> _Answer:
    sent, times = int(request["timestamp"]), [int(t) for t in request["response_timestamps"]]
    texts = [str(o.get("text_output", "")) for o in request["response_outputs"]]
    if len(times) != len(texts):
        raise ValueError(f"{len(times)} times for {len(texts)} responses")
    if len(times) > tokens and not texts[-1]:
        times, texts = times[:-1], texts[:-1]
    if not times:
        raise ValueError("a request without a response")
    if len(times) == tokens:
        return _Answer(sent, times, 0, False)
    first = next((i for i, text in enumerate(texts) if text), None)
    if first is None:
        raise ValueError(f"a request of {tokens} tokens with {len(times)} responses and no text")
    return _Answer(sent, times, first, True)


def genai_figures(export: Any, requests: int) -> dict[str, float]:
    """genai-perf's own figures from its profile_export_genai_perf.json, in seconds.

    Its tokens are the answers' texts tokenised again, and its time between tokens is an average
    for each request, of which it gives percentiles: not comparable with ``export_figures``.

    Raises:
        RazorError: another form than expected, or requests are missing.
    """
    try:
        figures = {
            f"{ours}_{p}_s": float(export[theirs][p]) / 1e3
            for ours, theirs in (("ttft", "time_to_first_token"), ("itl", "inter_token_latency"))
            for p in ("p50", "p99")
        }
        figures["tokens_per_s"] = float(export["output_token_throughput"]["avg"])
        figures["requests_per_s"] = float(export["request_throughput"]["avg"])
        figures["requests"] = int(export["request_count"]["avg"])
    except (KeyError, TypeError, ValueError) as e:
        raise RazorError(f"genai-perf's export: expected its figures: {e!r}") from None
    if figures["requests"] != requests:
        raise RazorError(
            f"genai-perf's export: expected {requests} requests, found {figures['requests']:.0f}"
        )
    figures["seconds"] = requests / figures["requests_per_s"]
    figures["uneven"] = 0
    return figures


# Running ----------------------------------------------------------------------------------------
def run_tool(
    command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float
) -> int:
    """Run a tool in a process group of its own; returns its exit status.

    Raises:
        RazorError: not done after ``limit`` seconds. However this is left, no process is.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True, env=dict(environment),
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            name = Path(command[0]).name
            raise RazorError(f"{name}: not done after {limit:.0f} s: {reason(log)}") from None
        finally:
            # SIGINT would let perf_analyzer finish all its requests first.
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                    break


def reason(log: Path) -> str:
    """The line of a tool's output that says why it failed."""
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    for pattern in (r"had error:", r"^error:", r"(?i)\berror\b", ""):
        for line in reversed(lines):
            if re.search(pattern, line):
                return " ".join(line.split())[:400]
    return "no output"


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that runs here. ``environment`` is what it needs beyond ours."""

    executable: Path
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = "perf_analyzer"

    def measure(
        self, load: Load, url: str, model: str, folder: Path, limit: float
    ) -> dict[str, float]:
        """Figures of one run against the gRPC address ``url``.

        Raises:
            RazorError: the tool failed, in one line.
        """
        inputs, export, log = (folder / n for n in ("inputs.json", "export.json", "tool.log"))
        inputs.write_text(json.dumps({"data": load.inputs()}))
        export.unlink(missing_ok=True)
        command = [str(self.executable), "-m", model, "-u", url, "-i", "grpc", "--async"]
        command += ["--streaming", "--input-data", str(inputs)]
        command += ["--concurrency-range", str(load.concurrency)]
        command += ["--request-count", str(len(load.prompts)), "--profile-export-file", str(export)]
        for last in (False, True):
            status = run_tool(command, {**os.environ, **self.environment}, log, limit)
            if status != 0 or not export.exists():
                raise RazorError(f"perf_analyzer: exit status {status}: {reason(log)}")
            try:
                found = read_export(export, "perf_analyzer")
                break
            except RazorError:  # now and then it ends before all of the file is written
                if last:
                    raise
        return export_figures(found, load)


@dataclass(frozen=True)
class GenaiPerf:
    """genai-perf around a perf_analyzer; it needs a tokenizer's folder."""

    executable: Path
    version: str
    inner: PerfAnalyzer
    tokenizer: Path
    name: str = "genai-perf"

    def measure(
        self, load: Load, url: str, model: str, folder: Path, limit: float
    ) -> dict[str, float]:
        """As ``PerfAnalyzer.measure``, with genai-perf's own figures."""
        place, artifacts, log = (folder / n for n in ("genai", "artifacts", "tool.log"))
        for path in (place, artifacts):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        inputs = place / "inputs.jsonl"
        inputs.write_text("".join(json.dumps({"text": p}) + "\n" for p in load.prompts))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        environment["COLUMNS"] = "2000"  # messages in one line
        environment["PATH"] = f"{self._wrapper(place)}{os.pathsep}{os.environ.get('PATH', '')}"
        command = [str(self.executable), "profile", "-m", model, "--backend", "tensorrtllm"]
        command += ["--endpoint-type", "kserve", "--streaming", "-u", url]
        command += ["--tokenizer", str(self._tokenizer(place)), "--input-file", str(inputs)]
        command += ["--concurrency", str(load.concurrency), "--warmup-request-count", "0"]
        command += ["--request-count", str(len(load.prompts))]
        n = load.output_tokens
        # No end_id: genai-perf takes a negative number for a text. min_tokens keeps the length.
        for extra in (f"max_tokens:{n}", f"min_tokens:{n}"):
            command += ["--extra-inputs", extra]
        command += ["--artifact-dir", str(artifacts)]
        status = run_tool(command, environment, log, limit)
        exports = sorted(artifacts.rglob("*genai_perf.json"))
        if status != 0 or not exports:
            raise RazorError(f"genai-perf: exit status {status}: {reason(log)}")
        return genai_figures(read_export(exports[0], "genai-perf"), len(load.prompts))

    def _wrapper(self, place: Path) -> Path:
        """A folder for PATH whose perf_analyzer has its libraries."""
        folder = place / "bin"
        folder.mkdir()
        script = folder / "perf_analyzer"
        values = [f"{k}={shlex.quote(v)}" for k, v in self.inner.environment.items()]
        line = " ".join([*values, "exec", shlex.quote(str(self.inner.executable)), '"$@"'])
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)
        return folder

    def _tokenizer(self, place: Path) -> Path:
        """The tokenizer in a form that transformers reads without the model's config."""
        folder = place / "tokenizer"
        folder.mkdir()
        shutil.copy(self.tokenizer / "tokenizer.json", folder)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder


# Finding ----------------------------------------------------------------------------------------
def find_perf_analyzer(option: Path | None, python: Path | None, folder: Path) -> PerfAnalyzer:
    """The first of ``option``, the environment variable, the one beside the server's ``python``,
    beside this Python, on PATH, that says its version.

    Args:
        folder: libraries that it needs from the package nvidia-pytriton are linked there.

    Raises:
        UsageError: none runs; says what was tried and how to get one.
    """
    variable = os.environ.get(TOOL_VARIABLE)
    pythons = [p for p in (python, Path(sys.executable)) if p is not None]
    on_path = shutil.which("perf_analyzer")
    places = [p.parent / "perf_analyzer" for p in pythons] + ([Path(on_path)] if on_path else [])
    if option or variable:  # what was asked for, or nothing
        places = [option or Path(str(variable))]
    libraries = _link_libraries(pythons, folder)
    tried = []
    for place in dict.fromkeys(_inner(p) for p in places):
        for environment in ({}, libraries):
            version, why = _version(place, environment)
            if version:
                return PerfAnalyzer(place.resolve(), version, environment)
        tried.append(f"{place} ({why})")
    raise UsageError(f"perf_analyzer: none that runs: {'; '.join(tried)}; {HOW_TO_GET}")


def find_genai_perf(
    option: Path | None, python: Path | None, inner: PerfAnalyzer, tokenizer: Path
) -> GenaiPerf:
    """genai-perf given, beside the server's Python, beside this one, or on PATH. Raises UsageError."""
    found = [p.parent / "genai-perf" for p in (python, Path(sys.executable)) if p is not None]
    on_path = shutil.which("genai-perf")
    found += [Path(on_path)] if on_path else []
    place = option or next((p for p in found if p.exists()), None)
    if place is None or not os.access(place, os.X_OK):
        raise UsageError(
            f"genai-perf: not found ({place or 'not on PATH'}); pip install genai-perf"
        )
    try:
        said = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as e:
        raise UsageError(f"{place}: does not run: {e}") from None
    version = re.search(r"\d+\.\d+\S*", said.stdout + said.stderr)
    return GenaiPerf(place.absolute(), version[0] if version else "?", inner, tokenizer)


def _inner(place: Path) -> Path:
    """The program behind the console script of perf-analyzer 2.60, which hides exit status and
    signals; any other place as it is."""
    pattern = "lib/python3*/site-packages/perf_analyzer/bin/perf_analyzer"
    try:
        script = place.open("rb").read(2) == b"#!"
    except OSError:
        return place
    inner = sorted(place.parent.parent.glob(pattern)) if script else []
    return inner[0] if inner else place


def _version(place: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    """(version, "") of a perf_analyzer, or ("", why it does not run here)."""
    if not place.is_file():
        return "", "not there"
    try:
        said = subprocess.run(
            [place, "--version"], capture_output=True, text=True, timeout=10,
            env={**os.environ, **environment},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as e:
        return "", str(getattr(e, "strerror", None) or "no answer in 10 s")
    # Not by its exit status: a wrapper of 2.60 always says 0.
    found = re.search(r"Perf Analyzer Version (\S+)", said.stdout + said.stderr)
    lines = (said.stderr or said.stdout).strip().splitlines()
    return (found[1], "") if found else ("", lines[-1][:200] if lines else "says no version")


def _link_libraries(pythons: Sequence[Path], folder: Path) -> dict[str, str]:
    """LD_LIBRARY_PATH with links to the libraries bundled with nvidia-pytriton; {} without it."""
    for python in pythons:
        packages = sorted(
            python.parent.parent.glob("lib/python3*/site-packages/nvidia_pytriton.libs")
        )
        found = {
            name: next(iter(sorted(packages[0].glob(pattern))), None) if packages else None
            for name, pattern in BUNDLED.items()
        }
        if all(found.values()):
            folder.mkdir(parents=True, exist_ok=True)
            for name, target in found.items():
                (folder / name).unlink(missing_ok=True)
                (folder / name).symlink_to(str(target))
            rest = os.environ.get("LD_LIBRARY_PATH")
            return {"LD_LIBRARY_PATH": f"{folder}{os.pathsep}{rest}" if rest else str(folder)}
    return {}
