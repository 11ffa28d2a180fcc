"""A stand-in for perf_analyzer: its options that benchmarks/serving.py uses, its export, real requests."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

TYPES = {"text_input": ("BYTES", object), "stream": ("BOOL", bool)}


def ask(url: str, model: str, entry: dict[str, list[Any]]) -> dict[str, Any]:
    """One request and the times of its responses."""
    arrived: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    client = grpc.InferenceServerClient(url)
    client.start_stream(lambda result, error: arrived.put((time.time_ns(), result, error)))
    inputs = []
    for name, value in entry.items():
        kind, dtype = TYPES.get(name, ("INT32", np.int32))
        values = [v.encode() if isinstance(v, str) else v for v in value]
        tensor = grpc.InferInput(name, [1, len(values)], kind)
        tensor.set_data_from_numpy(np.array([values], dtype))
        inputs.append(tensor)
    found: dict[str, Any] = {"timestamp": time.time_ns(), "request_inputs": {}}
    found.update(response_timestamps=[], response_outputs=[])
    client.async_stream_infer(model, inputs, enable_empty_final_response=True)
    while True:
        now, result, error = arrived.get(timeout=60)
        if error is not None:
            raise RuntimeError(str(error))
        text = result.as_numpy("text_output")
        found["response_timestamps"].append(now)
        found["response_outputs"].append(
            {"text_output": "" if text is None else text.flat[0].decode("utf-8", "replace")}
        )
        if result.get_response().parameters["triton_final_response"].bool_param:
            client.stop_stream()
            return found


def main() -> int:
    if "--version" in sys.argv:
        print("Perf Analyzer Version 0.0.0-standin (commit none)")
        return 0
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument("-m")
    p.add_argument("-u")
    p.add_argument("-i", choices=["grpc"], required=True)
    for flag in ("--async", "--streaming"):
        p.add_argument(flag, action="store_true", required=True)
    p.add_argument("--input-data", type=Path)
    p.add_argument("--concurrency-range", type=int)
    p.add_argument("--request-count", type=int)
    p.add_argument("--profile-export-file", type=Path)
    args = p.parse_args()
    entries = json.loads(args.input_data.read_text())["data"]
    todo = [entries[i % len(entries)] for i in range(args.request_count)]
    done: list[dict[str, Any]] = []
    errors: list[str] = []
    lock = threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                if not todo:
                    return
                entry = todo.pop(0)
            try:
                done.append(ask(args.u, args.m, entry))
            except Exception as e:
                errors.append(str(e))

    threads = [threading.Thread(target=work) for _ in range(args.concurrency_range)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        print(
            f"Failed to retrieve results from inference request.\nThread [0] had error: {errors[0]}"
        )
        return 99
    experiment = {"experiment": {"mode": "concurrency", "value": len(threads)}, "requests": done}
    args.profile_export_file.write_text(json.dumps({"experiments": [experiment]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
