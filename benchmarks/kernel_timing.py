"""Timing for benchmarks/kernels.py: CUDA graphs replayed in turns; on a CPU (dry runs) plain calls."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from kernel_cases import Timing

Calls = Sequence[Callable[[], Any]]

ENOUGH_US = 300.0
"""A graph should run this long, or events and launches show."""


class Clock:
    """Measures contenders side by side on one device."""

    def __init__(self, device: torch.device, seconds: float, max_repeats: int = 200) -> None:
        self.device, self.seconds, self.max_repeats = device, seconds, max_repeats

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def measure(self, contenders: Mapping[str, Calls]) -> dict[str, Timing | str]:
        """Microseconds of one call of each contender, or why it could not be timed.

        The calls of a contender follow one another, each on memory of its own, so that what one
        reads is not in L2 from the one before. Contenders take turns, so that a change of clocks
        meets all of them.
        """
        results: dict[str, Timing | str] = {}
        ready: dict[str, tuple[Callable[[], float], int]] = {}
        for name, calls in contenders.items():
            try:
                ready[name] = self._prepare(calls)
            except Exception as e:  # peers refuse a shape in many ways; the caller decides
                results[name] = one_line(e)
        samples: dict[str, list[float]] = {name: [] for name in ready}
        spent = dict.fromkeys(ready, 0.0)
        while True:
            unfinished = [
                name
                for name in ready
                if len(samples[name]) < self.max_repeats
                and (spent[name] < self.seconds or len(samples[name]) < 5)
            ]
            if not unfinished:
                break
            for name in unfinished:
                run, count = ready[name]
                us = run()
                samples[name].append(us / count)
                spent[name] += us * 1e-6
        results.update({name: Timing.of(s) for name, s in samples.items()})
        return {name: results[name] for name in contenders}

    def _prepare(self, calls: Calls) -> tuple[Callable[[], float], int]:
        """A function that runs all calls, warm, and returns microseconds; and how many they are."""
        if not self.on_gpu:
            for call in calls:
                call()

            def plain() -> float:
                start = time.perf_counter()
                for call in calls:
                    call()
                return (time.perf_counter() - start) * 1e6

            return plain, len(calls)

        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        rounds = max(1, min(64, round(ENOUGH_US / max(1.0, start.elapsed_time(end) * 1000))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize(self.device)

        def replay() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1000

        return replay, rounds * len(calls)

    def copy_bandwidth(self, nbytes: int) -> tuple[float, list[float]]:
        """Bytes/s of a copy, read and write both counted: the median, and all samples."""
        source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        timing = self.measure({"copy": [lambda: target.copy_(source)]})["copy"]
        if isinstance(timing, str):
            raise RuntimeError(timing)
        rates = [2 * nbytes / (us * 1e-6) for us in (timing.high, timing.median, timing.low)]
        return rates[1], rates


def one_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "memory does not suffice"
    return text[:160]


def clocks(device: torch.device) -> str:
    """What nvidia-smi says now: clocks, power, temperature."""
    if device.type != "cuda":
        return "no GPU"
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        found = subprocess.run(
            ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError, AttributeError):
        return "clocks unknown (no nvidia-smi)"
    values = [v.strip() for v in found.stdout.strip().split(",")]
    if found.returncode != 0 or len(values) != 5:
        return "clocks unknown (nvidia-smi failed)"
    sm, sm_max, memory, power, heat = values
    return f"SM {sm} (max {sm_max}), memory {memory}, limit {power}, {heat} °C"


def driver() -> str:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else "unknown"
