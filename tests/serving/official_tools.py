"""What load tools and the documented curl commands send, made again, beside official_clients.py.

``curl`` does what the documented commands do, ``run_perf_analyzer`` what genai-perf has perf_analyzer
send with its backend ``tensorrtllm``.
"""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from official_clients import LONG, ClientFailed, one, strings, tensor


# HTTP ---------------------------------------------------------------------------------------------
def curl_body(prompt: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """The documented body: stop and bad words are there, and empty."""
    return {
        "text_input": prompt,
        "max_tokens": max_tokens,
        "bad_words": "",
        "stop_words": "",
        **more,
    }


def curl(url: str, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
    """``curl -X POST url/path -d body``: status and all that comes."""
    connection = http.client.HTTPConnection(url, timeout=LONG)
    try:
        # curl -d says so, whatever the data are.
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", path, json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def events(text: str) -> Iterator[dict[str, Any]]:
    """Of the text that ``/generate_stream`` sends."""
    for part in text.split("\n\n"):
        if part:
            if not part.startswith("data: "):
                raise ClientFailed(f"expected an event, found {part!r}")
            yield json.loads(part[len("data: ") :])


# genai-perf ---------------------------------------------------------------------------------------
def perf_analyzer_row(prompt: str, max_tokens: int, streaming: bool = True) -> dict[str, Any]:
    """What genai-perf with ``--backend tensorrtllm`` has in a request, as tensors."""
    return {
        "text_input": strings([prompt]),
        "max_tokens": one(np.int32, max_tokens),
        "exclude_input_in_output": one(bool, True),
        "stream": one(bool, streaming),
        "min_tokens": one(np.int32, max_tokens),
    }


def run_perf_analyzer(
    url: str, prompts: Sequence[str], max_tokens: int, concurrency: int = 4
) -> list[list[str]]:
    """Texts of the responses of each prompt, with several streams at a time.

    perf_analyzer reads until the empty response with the final flag and keeps that one, too.

    Raises:
        ClientFailed: any error; perf_analyzer ends then.
    """
    texts: list[list[str]] = [[] for _ in prompts]
    failed: list[str] = []
    work = iter(list(enumerate(prompts)))
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                index, prompt = next(work, (-1, ""))
            if index < 0:
                return
            try:
                texts[index] = _perf_stream(url, perf_analyzer_row(prompt, max_tokens))
            except Exception as e:
                failed.append(f"Failed to retrieve results from inference request: {e}")
                return

    threads = [threading.Thread(target=run, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    if failed:
        raise ClientFailed(failed[0])
    return texts


def _perf_stream(url: str, row: Mapping[str, Any]) -> list[str]:
    import tritonclient.grpc as grpc

    got: queue.Queue[Any] = queue.Queue()
    texts = []
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: got.put(error or result))
        client.async_stream_infer(
            "ensemble", [tensor(n, v) for n, v in row.items()], enable_empty_final_response=True
        )
        while True:
            result = got.get(timeout=LONG)
            if isinstance(result, Exception):
                raise result
            text = result.as_numpy("text_output")
            texts.append("" if text is None else text[0].decode())
            if result.get_response().parameters["triton_final_response"].bool_param:
                return texts
