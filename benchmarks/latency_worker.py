#!/usr/bin/env python3
"""One engine of benchmarks/latency.py, in a process (or several ranks) of its own: opens it, and runs the
trials that it is asked for over a local socket. Not called by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trt_razor.engine import Engine
from trt_razor.errors import RazorError
from trt_razor.generate import Generator
from trt_razor.sampling import SamplingParams
from trt_razor.trtllm.executor import Request, TrtLlmExecutor, open_executor

KEY_VARIABLE = "TRT_RAZOR_LATENCY_KEY"


class Runner(Protocol):
    """An open engine that generates for a batch."""

    def describe(self, lengths: list[int]) -> dict[str, Any]:
        """KV bytes of a sequence (all ranks) and how many sequences fit, by length."""
        ...

    def generate(self, prompts: list[list[int]], new_tokens: list[int], clock: Clock) -> None:
        """Run all prompts at once, tell ``clock`` every token."""
        ...

    def blocks(self) -> int | None:
        """Most cache blocks in use during the last ``generate``, if the engine counts them."""
        ...


class Clock:
    """When each token of each request came, in seconds after the batch was sent."""

    def __init__(self, requests: int) -> None:
        self.times: list[list[float]] = [[] for _ in range(requests)]
        self.start = time.perf_counter()

    def __call__(self, request: int, now: float) -> None:
        """A token of a request came; tokens of one step have one time (``time.perf_counter``)."""
        self.times[request].append(now - self.start)

    def result(self) -> dict[str, Any]:
        """Times to first token; gaps between tokens while all requests decode; the whole.

        The gaps begin when the last request has got its first token, and end when the first request
        is done: before and after, fewer sequences share a step.
        """
        begin = max(t[0] for t in self.times)
        end = min(t[-1] for t in self.times)
        gaps = [
            b - a
            for times in self.times
            for a, b in itertools.pairwise(times)
            if a >= begin and b <= end
        ]
        seconds = max(t[-1] for t in self.times)
        tokens = sum(len(t) for t in self.times)
        return {
            "ttft": [t[0] for t in self.times],
            "tpot": gaps,
            "tokens": tokens,
            "seconds": seconds,
        }


class ExecutorRunner:
    """A TensorRT-LLM engine in TensorRT-LLM's executor."""

    def __init__(self, executor: TrtLlmExecutor) -> None:
        self.executor = executor

    def describe(self, lengths: list[int]) -> dict[str, Any]:
        settings, pools = self.executor.settings, self.executor.kv_pool_report()
        return {
            "sequence_bytes": [settings.sequence_bytes(n) * settings.world_size for n in lengths],
            "sequence_blocks": [settings.sequence_blocks(n) for n in lengths],
            "fit": [min(pools.sequences(n), self.executor.max_batch_size) for n in lengths],
            "fit_in_pools": [pools.sequences(n) for n in lengths],
            "pool_bytes": (pools.pool_bytes + pools.slot_bytes) * settings.world_size,
            "max_seq_len": settings.max_seq_len,
        }

    def generate(self, prompts: list[list[int]], new_tokens: list[int], clock: Clock) -> None:
        self.executor.iterations()
        requests = [Request(p, n) for p, n in zip(prompts, new_tokens, strict=True)]
        for i, result in enumerate(self.executor.run(requests)):
            for arrival in result.arrivals:
                clock(i, arrival)

    def blocks(self) -> int | None:
        return max((i.used_blocks for i in self.executor.iterations()), default=None)


class SessionRunner:
    """An engine of ours in ``trt_razor.generate``: slots are reserved whole."""

    def __init__(self, engine: Engine) -> None:
        manifest = engine.manifest
        self.session = engine.open()
        self.generator = Generator(self.session, manifest.prefill_chunk)

    def describe(self, lengths: list[int]) -> dict[str, Any]:
        slots = self.session.num_slots
        return {
            "sequence_bytes": [self.session.kv_bytes // slots] * len(lengths),
            "fit": [slots if n <= self.session.max_seq_len else 0 for n in lengths],
            "pool_bytes": self.session.kv_bytes,
            "max_seq_len": self.session.max_seq_len,
        }

    def generate(self, prompts: list[list[int]], new_tokens: list[int], clock: Clock) -> None:
        index = {}
        for i, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True)):
            params = SamplingParams(max_new_tokens=count, ignore_eos=True)
            index[self.generator.submit(prompt, params)] = i
        while self.generator.active or self.generator.waiting:
            events = self.generator.step()
            now = time.perf_counter()
            for event in events:
                if event.error:
                    raise RazorError(event.error)
                if event.token is not None:
                    clock(index[event.request], now)

    def blocks(self) -> int | None:
        return None


def serve(connection: Connection, runner: Runner, vocab_size: int) -> None:
    """Answer until the other side says ``stop`` or goes away."""
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if "stop" in job:
            return
        try:
            if "describe" in job:
                answer = runner.describe(job["describe"])
            else:
                rng = np.random.default_rng(job["seed"])
                shape = (len(job["new_tokens"]), job["length"])
                prompts = rng.integers(0, vocab_size, shape).tolist()
                clock = Clock(len(prompts))
                runner.generate(prompts, job["new_tokens"], clock)
                answer = {**clock.result(), "blocks": runner.blocks()}
        except RazorError as e:
            answer = {"error": str(e)}
        connection.send_bytes(json.dumps(answer).encode())


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--backend", required=True)
    p.add_argument("--engine", type=Path, required=True)
    p.add_argument("--address", required=True)
    p.add_argument("--memory", type=float)
    args = p.parse_args()

    def connect() -> Connection:
        return Client(args.address, "AF_UNIX", authkey=bytes.fromhex(os.environ[KEY_VARIABLE]))

    try:
        if args.backend == "tensorrt-llm":
            with open_executor(args.engine, free_gpu_memory_fraction=args.memory) as executor:
                if executor.leads:
                    with connect() as connection:
                        serve(connection, ExecutorRunner(executor), executor.settings.vocab_size)
        else:
            engine = Engine.load(args.engine, verify=False)
            runner = SessionRunner(engine)
            with connect() as connection:
                serve(connection, runner, engine.manifest.spec.vocab_size)
    except RazorError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
