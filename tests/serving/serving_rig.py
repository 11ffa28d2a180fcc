"""Clients of a running server, as users have them, and its state by /metrics and /proc."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Values = Mapping[str, Any]
Response = dict[str, np.ndarray]

LONG = 60.0
"""Seconds nothing here takes, even on a busy machine: a test that waits so long has failed."""

FLOATS = {
    "top_p", "temperature", "length_penalty", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "runtime_top_p", "len_penalty", "embedding_bias", "embedding_bias_weights",
}  # fmt: skip
UNSIGNED = {"seed", "lora_task_id", "prompt_table_extra_id"}


class ServerError(Exception):
    """The server's answer to a bad request: ``status`` (HTTP; 0 with gRPC) and its text."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.text, self.status = text, status


# HTTP ------------------------------------------------------------------------------------------
def get(url: str, path: str, timeout: float = LONG) -> str:
    with urllib.request.urlopen(f"http://{url}{path}", timeout=timeout) as answer:
        return str(answer.read().decode())


def post(url: str, path: str, body: Values | bytes, timeout: float = LONG) -> str:
    """Raises ServerError for any status but 200."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(url, timeout=timeout)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200:
        raise ServerError(_error_of(text), answer.status)
    return text


def generate(url: str, model: str, body: Values | bytes, timeout: float = LONG) -> dict[str, Any]:
    """``/generate``: the one response."""
    data = json.loads(post(url, f"/v2/models/{model}/generate", body, timeout))
    if "error" in data:  # an error with status 200
        raise ServerError(data["error"], 200)
    return dict(data)


def generate_stream(
    url: str, model: str, body: Values | bytes, timeout: float = LONG
) -> Iterator[dict[str, Any]]:
    """``/generate_stream``: responses as they come. Closing the iterator closes the connection."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(url, timeout=timeout)
    try:
        connection.request(
            "POST",
            f"/v2/models/{model}/generate_stream",
            data,
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServerError(_error_of(answer.read().decode()), answer.status)
        assert answer.getheader("Content-Type", "").startswith("text/event-stream")
        for line in answer:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServerError(event["error"], 200)
                yield event
    finally:
        connection.close()


def _error_of(text: str) -> str:
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text


# gRPC ------------------------------------------------------------------------------------------
def arrays(values: Values) -> dict[str, np.ndarray]:
    """Tensors [1, n] (or as given, for arrays) with the types of the public interface."""
    out = {}
    for name, value in values.items():
        if not isinstance(value, np.ndarray):
            items = value if isinstance(value, (list, tuple)) else [value]
            if items and isinstance(items[0], (str, bytes)):
                items = [x.encode() if isinstance(x, str) else x for x in items]
                kind: Any = object
            elif items and isinstance(items[0], bool):
                kind = bool
            else:
                kind = np.float32 if name in FLOATS else np.uint64 if name in UNSIGNED else np.int32
            value = np.array(items, kind).reshape(1, -1)
        out[name] = value
    return out


def word_list(*words: list[int]) -> np.ndarray:
    """``stop_words_list`` or ``bad_words_list`` of one sequence: i32 [1, 2, n]."""
    ids = [i for word in words for i in word]
    ends = list(np.cumsum([len(w) for w in words])) + [-1] * len(ids)
    return np.array([[ids, ends[: len(ids)]]], np.int32)


class Stream:
    """One request on a gRPC stream of its own, with tritonclient."""

    def __init__(
        self,
        url: str,
        model: str,
        values: Values,
        request_id: str = "",
        outputs: tuple[str, ...] | None = None,
    ) -> None:
        import tritonclient.grpc as grpc

        self._got: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = grpc.InferenceServerClient(url)
        inputs = []
        for name, array in arrays(values).items():
            kind = "BYTES" if array.dtype == object else _TRITON_TYPE[array.dtype.name]
            tensor = grpc.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        self._client.start_stream(lambda result, error: self._got.put((result, error)))
        self._client.async_stream_infer(
            model,
            inputs,
            request_id=request_id,
            outputs=None if outputs is None else [grpc.InferRequestedOutput(o) for o in outputs],
            enable_empty_final_response=True,
        )

    def __iter__(self) -> Iterator[Response]:
        """Responses with data until the final flag; the stream is closed then."""
        try:
            while True:
                response, final = self.next()
                if response:
                    yield response
                if final:
                    return
        finally:
            self.close()

    def next(self, timeout: float = LONG) -> tuple[Response, bool]:
        """(response, whether it is the last). Raises ServerError, or queue.Empty."""
        result, error = self._got.get(timeout=timeout)
        if error is not None:
            raise ServerError(str(error.message()))
        message = result.get_response()
        response = {o.name: result.as_numpy(o.name) for o in message.outputs}
        return response, message.parameters["triton_final_response"].bool_param

    @property
    def waiting(self) -> int:
        """Responses that have come and were not taken yet."""
        return self._got.qsize()

    def cancel(self) -> None:
        """Give the request up, as a client does that wants no more."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


_TRITON_TYPE = {
    "bool": "BOOL", "int32": "INT32", "int64": "INT64", "uint64": "UINT64", "uint8": "UINT8",
    "float32": "FP32", "float16": "FP16",
}  # fmt: skip


def direct(ids: list[int], max_tokens: int, **values: Any) -> dict[str, Any]:
    """Inputs of ``tensorrt_llm`` for one prompt."""
    return {
        "input_ids": ids,
        "input_lengths": len(ids),
        "request_output_len": max_tokens,
        **values,
    }


def text_of(response: Values) -> str:
    """``text_output`` of a gRPC or JSON response."""
    value = response["text_output"]
    if isinstance(value, np.ndarray):
        value = value.reshape(-1)[0]
    return str(value.decode() if isinstance(value, bytes) else value)


def ids_of(responses: list[Response]) -> list[int]:
    """The ``output_ids`` of the responses of one sequence, joined; their lengths are checked."""
    out: list[int] = []
    for r in responses:
        row = r["output_ids"]
        assert row.shape == (1, 1, int(r["sequence_length"].item()))
        assert row.dtype == np.int32
        out += row[0, 0].tolist()
    return out


def in_parallel(count: int, work: Any, timeout: float = LONG) -> list[Any]:
    """``work(i)`` on ``count`` threads at once; their results, or the first exception."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    for t in threads:
        t.start()
    end = time.monotonic() + timeout
    for t in threads:
        t.join(max(0, end - time.monotonic()))
    assert not any(t.is_alive() for t in threads), f"not done within {timeout} s"
    if errors:
        raise errors[0]
    return results


# State -----------------------------------------------------------------------------------------
_LINE = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Metrics:
    """The server's Prometheus metrics: (name, labels) → value."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def read(cls, url: str) -> Metrics:
        samples = {}
        for line in get(url, "/metrics").splitlines():
            found = _LINE.match(line)
            if found:
                labels = frozenset(_LABEL.findall(found[2] or ""))
                samples[found[1], labels] = float(found[3])
        return cls(samples)

    def __call__(self, name: str, **labels: str) -> float:
        """Sum of the samples of our metric ``name`` that have these labels; it must exist."""
        wanted = set(labels.items())
        found = [
            v for (n, has), v in self.samples.items() if n == f"trt_razor_{name}" and wanted <= has
        ]
        assert found, f"no metric trt_razor_{name} {labels}"
        return sum(found)

    @property
    def idle(self) -> bool:
        return all(
            self(name) == 0 for name in ("slots_active", "queue_length", "kv_cache_bytes_used")
        )


def wait_until(condition: Any, what: str, timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.02)


def wait_idle(url: str, timeout: float = 10.0) -> Metrics:
    """Wait until slots, queue and cache are empty; the metrics then."""
    last = [Metrics.read(url)]

    def idle() -> bool:
        last[0] = Metrics.read(url)
        return last[0].idle

    wait_until(idle, "slots, queue and cache empty", timeout)
    return last[0]


def stubs(server: int) -> list[tuple[str, int]]:
    """(model, process id) of all instances of Python models that a server process runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and "triton_python_backend_stub" in words[0]:
                found.append((Path(words[1]).parents[1].name, int(folder.name)))
    return sorted(found)


def rss(pid: int) -> int:
    """Bytes of memory a process has in RAM of its own, shared memory aside."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and os.path.exists(f"/proc/{pid}")
