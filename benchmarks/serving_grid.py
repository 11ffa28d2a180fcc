"""The measurement of benchmarks/serving.py: the grid, the probes, and what they found."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from serving_load import GenaiPerf, Load, PerfAnalyzer
from serving_probe import KvWatch, PromptMaker, Waiting, added_tokens, probe_batching, probe_waiting
from serving_report import summarise, summary
from serving_servers import Target

from trt_razor.console import Bars, say
from trt_razor.errors import RazorError, UsageError
from trt_razor.manifest import Manifest
from trt_razor.trtllm.cache_settings import read_settings

STREAMS, PROBE_TOKENS, SHORT = 8, 64, 16
"""Probes: streams at a time, tokens of each answer, tokens of a short prompt."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    concurrency: int
    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.concurrency} at a time, prompt {self.prompt}, output {self.output}"

    def requests(self, asked: int | None) -> int:
        """Requests of a round: whole waves, so that the concurrency holds to the end."""
        return (
            math.ceil((asked or max(8, 2 * self.concurrency)) / self.concurrency) * self.concurrency
        )


class Benchmark:
    """What is measured, with what, and what was found so far."""

    def __init__(self, args: argparse.Namespace, tool: PerfAnalyzer | GenaiPerf, maker: PromptMaker,
                 manifests: dict[str, Manifest], engines: dict[str, Path], folder: Path) -> None:  # fmt: skip
        self.args, self.tool, self.maker, self.folder = args, tool, maker, folder
        self.manifests, self.engines = manifests, engines
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.runs: dict[tuple[Cell, str], list[dict[str, float]]] = {}
        self.kv: dict[tuple[Cell, str], dict[str, float]] = {}
        self.probes: dict[str, dict[str, Any]] = {kind: {} for kind in args.kinds}
        self._prompts: dict[tuple[Cell, int], list[str]] = {}
        self.limit = min((m.max_seq_len for m in manifests.values()), default=1 << 40)
        self.grid = []
        for prompt, output, n in itertools.product(args.prompt, args.output, args.concurrency):
            cell = Cell(n, prompt, output)
            if prompt + output > self.limit:
                self.left_out.append(f"{cell}: engines take {self.limit} tokens")
            else:
                self.grid.append(cell)
        self._done = 0.0
        self._all = sum(self._weight(c) for c in self.grid) * (args.rounds + 1) * len(args.kinds)

    def _weight(self, cell: Cell) -> float:
        """About how long a run takes: reading is quicker than writing."""
        return cell.requests(self.args.requests) * (cell.prompt + 8 * cell.output)

    # The grid ---------------------------------------------------------------------------------
    def measure(self, targets: Sequence[Target], bars: Bars) -> None:
        """All cells on servers that are up, which take turns, and take turns in going first."""
        for target in targets:
            load = self.loads(SHORT, 1, 2)[0]
            added = added_tokens(target.grpc, self.args.served_model, load, SHORT)
            if not 0 <= added + self.maker.extra <= 4:
                raise UsageError(
                    f"{target.kind}: the server counts {SHORT + added} tokens where the tokenizer here "
                    f"counts {SHORT}: another tokenizer, or a prompt format other than raw"
                )
            self.maker.extra += added
        for cell in self.grid:
            for turn in range(self.args.rounds + 1):  # the first one warms up
                for target in targets if turn % 2 else targets[::-1]:
                    self._run(cell, target, turn)
                    self._done += self._weight(cell)
                    bars("measuring", int(self._done), int(self._all))

    def _run(self, cell: Cell, target: Target, turn: int) -> None:
        key = (cell, target.kind)
        if turn and key not in self.runs:
            return  # its warm-up failed, and was told
        target.check()
        if (cell, turn) not in self._prompts:
            count = cell.requests(self.args.requests)
            self._prompts[cell, turn] = self.maker.make(cell.prompt, count)
        load = Load(cell.concurrency, cell.output, self._prompts[cell, turn])
        try:
            with KvWatch(target.metrics if turn else None) as watch:
                found = self.tool.measure(
                    load, target.grpc, self.args.served_model, self.folder, self.args.limit
                )
        except RazorError as e:
            target.check()
            where = f"round {turn}" if turn else "warm-up"
            self.failed.append(f"{target.kind}, {cell}, {where}: {e}")
            say(self.failed[-1])
            return
        runs = self.runs.setdefault(key, [])
        if turn:
            runs.append(found)
            peak = self.kv.setdefault(key, {})
            for name, value in watch.peak.items():
                peak[name] = max(value, peak.get(name, 0.0))

    def rows(self) -> list[dict[str, Any]]:
        """A row for each cell that any engine has."""
        rows = []
        for cell in self.grid:
            row: dict[str, Any] = dict(vars(cell))
            for kind in self.args.kinds:
                runs = self.runs.get((cell, kind))
                if runs:
                    row[kind] = {**summarise(runs), "kv": self._kv(cell, kind), "rounds": runs}
            if any(kind in row for kind in self.args.kinds):
                rows.append(row)
        return rows

    def _kv(self, cell: Cell, kind: str) -> dict[str, Any]:
        kv: dict[str, Any] = dict(self.kv.get((cell, kind), {}), source="metrics")
        manifest = self.manifests.get(kind)
        if "used_bytes" not in kv and manifest and manifest.backend == "tensorrt-llm":
            settings = read_settings(self.engines[kind])
            n = min(cell.concurrency, manifest.max_batch_size)
            used = settings.sequence_bytes(cell.prompt + cell.output) * settings.world_size
            kv.update(used_bytes=n * used, source="engine")
        return kv

    # Probes -----------------------------------------------------------------------------------
    def loads(self, prompt: int, count: int, output: int) -> list[dict[str, Any]]:
        """Tensors of new requests."""
        return Load(1, output, self.maker.make(prompt, count)).inputs()

    def probe(self, targets: Sequence[Target], bars: Bars) -> None:
        """Both probes, the engines taking turns; the first round warms up."""
        chunk = self.args.chunk or next((m.prefill_chunk for m in self.manifests.values()), 0)
        long = min(self.args.probe_prompt, self.limit - PROBE_TOKENS)
        trial = Waiting(long, SHORT, chunk or long)
        waiting = trial.chunks >= 4 or not chunk
        if not waiting:
            self.left_out.append(
                f"short prompt beside a long one: {long} tokens are {trial.chunks} chunks of {chunk}"
            )
        rng = np.random.default_rng(1)
        found: dict[str, tuple[list[Any], list[Any]]] = {t.kind: ([], []) for t in targets}
        for turn in range(self.args.rounds + 1):
            bars("probes", turn, self.args.rounds + 1)
            for target in targets if turn % 2 else targets[::-1]:
                if target.kind not in found:
                    continue  # it failed, and that was told
                try:
                    target.check()
                    one = self._probe_round(target, trial, waiting, rng)
                except RazorError as e:
                    target.check()
                    self.failed.append(f"{target.kind}, probe: {e}")
                    say(self.failed[-1])
                    del found[target.kind]
                    continue
                if turn:
                    for values, value in zip(found[target.kind], one, strict=True):
                        values += [value] if value else []
        bars("probes", self.args.rounds + 1, self.args.rounds + 1)
        for kind, (together, waits) in found.items():
            self.probes[kind] = self._probe_document(kind, together, waits, trial, bool(chunk))

    def _probe_round(
        self, target: Target, trial: Waiting, waiting: bool, rng: np.random.Generator
    ) -> tuple[dict[str, float], dict[str, Any]]:
        model = self.args.served_model
        together = probe_batching(
            target.grpc,
            model,
            lambda n: self.loads(SHORT, n, PROBE_TOKENS),
            STREAMS,
            PROBE_TOKENS,
        )
        if not waiting:
            return together, {}
        return together, probe_waiting(
            target.grpc, model, lambda tokens, n: self.loads(tokens, n, 2), trial, rng
        )

    def _probe_document(
        self,
        kind: str,
        together: list[dict[str, float]],
        waits: list[dict[str, Any]],
        trial: Waiting,
        chunked: bool,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if together:
            figures = {n: summary([t[n] for t in together]) for n in ("one", "many", "ratio")}
            found["batching"] = {"streams": STREAMS, "tokens": PROBE_TOKENS, **figures}
        if any(w["waits_s"] for w in waits):
            w = {n: summary([x[n] for x in waits]) for n in ("chunk_s", "alone_s", "long_s")}
            for name in ("waits_s", "chunks") if chunked else ("waits_s",):
                w[name] = summary([value for x in waits for value in x[name]])
            lengths = {"long_tokens": trial.long_tokens, "short_tokens": trial.short_tokens}
            late = sum(x["late"] for x in waits)
            found["waiting"] = {**lengths, "chunk": trial.chunk, "late": late, **w}
        elif waits:
            self.left_out.append(
                f"{kind}, short prompt beside a long one: {trial.long_tokens} tokens are read too soon"
            )
        return found
