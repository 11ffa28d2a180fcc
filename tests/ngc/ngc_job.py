"""Runs requests on an engine directory and writes what came out: on every rank, under mpirun.

python ngc_job.py job.json out        →  out.json, out.npz (the leading rank)
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from trt_razor.trtllm.cache_settings import blocks_in_log, gib_in_log
from trt_razor.trtllm.executor import Request, open_executor
from trt_razor.trtllm.runtime import import_bindings, is_registered


def registered() -> bool:
    """Whether something registered our plugin before we did."""
    import tensorrt

    import_bindings()
    return is_registered(tensorrt)


def main(job_path: Path, out: Path) -> None:
    job = json.loads(job_path.read_text())
    requests = [Request(**r) for r in job["requests"]]
    preloaded = registered()
    rank_log = out.with_name(f"{out.name}-{np.random.default_rng().integers(1 << 60)}.log")
    with open_executor(
        Path(job["engine"]),
        free_gpu_memory_fraction=job["memory"],
        logits=job["logits"],
        log=rank_log,
    ) as executor:
        if not executor.leads:
            return
        results = executor.run(requests, stream=job["stream"], logits=job["logits"])
        iterations, report = executor.iterations(), executor.kv_pool_report()
        log = rank_log.read_text(errors="replace")
        out.with_suffix(".json").write_text(
            json.dumps(
                {
                    "tokens": [list(r.tokens) for r in results],
                    "windows": [[w.window, w.blocks, w.nbytes] for w in report.windows],
                    "log_windows": blocks_in_log(log),
                    "log_gib": gib_in_log(log),
                    "sequences_that_fit": report.sequences(executor.settings.max_seq_len),
                    "preloaded": preloaded,
                    "iterations": [asdict(i) for i in iterations],
                }
            )
        )
        logits = {f"logits{i}": r.logits for i, r in enumerate(results) if r.logits is not None}
        np.savez(out.with_suffix(".npz"), **logits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
