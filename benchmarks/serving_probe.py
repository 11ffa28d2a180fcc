"""Own measurements beside the load tool: prompts of an exact length, the server's KV gauges, and two
probes with streams of our own: what batching gains, and how long a short prompt waits for a long one.
"""

from __future__ import annotations

import math
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer

ENOUGH_WORDS = 100
ANSWER_SECONDS = 600.0
"""A stream that is silent for so long has failed."""


# Prompts ----------------------------------------------------------------------------------------
class PromptMaker:
    """Texts of random words with an exact number of tokens; no two begin alike or are the same.

    Args:
        extra: tokens that the server puts around each text (a BOS), within the number asked for.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int = 0, extra: int = 0) -> None:
        self.tokenizer, self.extra = tokenizer, extra
        self._rng = np.random.default_rng(seed)
        self._seen: set[str] = set()
        texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        words = sorted({t.strip() for t in texts if re.fullmatch(r" ?[A-Za-z]{2,12}", t)})
        # A word that is one token after a space, whatever it is at the beginning of a text.
        alone = len(tokenizer.encode("a b"))
        self._words = [w for w in words if len(tokenizer.encode(f"a b {w}")) == alone + 1]
        self._joint = " "
        if len(self._words) < ENOUGH_WORDS:  # a tokenizer of bytes or characters
            self._words, self._joint = list("abcdefghijklmnopqrstuvwxyz"), ""

    def make(self, tokens: int, count: int) -> list[str]:
        """``count`` distinct texts of exactly ``tokens`` tokens. Raises UsageError if they fail."""
        found: list[str] = []
        for _ in range(20 * count):
            if len(found) == count:
                break
            text = self._one(tokens - self.extra)
            if text is not None and text not in self._seen:
                self._seen.add(text)
                found.append(text)
        if len(found) < count:
            raise UsageError(f"prompts: cannot make {count} different ones of {tokens} tokens")
        return found

    def _one(self, tokens: int) -> str | None:
        words = list(self._rng.choice(self._words, max(tokens, 1)))
        for _ in range(8):  # the first word may take more than one
            text = self._joint.join(words)
            over = len(self.tokenizer.encode(text)) - tokens
            if over == 0:
                return text
            words = words[:-over] if over > 0 else [*words, *self._rng.choice(self._words, -over)]
            if not words:
                return None
        return None


# Metrics ----------------------------------------------------------------------------------------
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_metrics(text: str) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every sample of a Prometheus page; lines of no known form are left out."""
    found = []
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.match(line.strip())
        if match:
            with suppress(ValueError):
                found.append((match[1], dict(_LABEL.findall(match[2] or "")), float(match[3])))
    return found


def kv_gauges(text: str) -> dict[str, float]:
    """``used_bytes`` and ``allocated_bytes`` of our engines, ``used_blocks``, ``max_blocks`` and
    ``block_tokens`` of the tensorrtllm backend; those the page has."""
    found: dict[str, float] = {}
    blocks = {"used": "used_blocks", "max": "max_blocks", "tokens_per": "block_tokens"}
    for name, labels, value in parse_metrics(text):
        if labels.get("model", "tensorrt_llm") != "tensorrt_llm":
            continue
        if name == "trt_razor_kv_cache_bytes_used":
            found["used_bytes"] = value
        elif name == "trt_razor_kv_cache_bytes_allocated":
            found["allocated_bytes"] = value
        elif name == "nv_trt_llm_kv_cache_block_metrics":
            key = blocks.get(labels.get("kv_cache_block_type", ""))
            if key:
                found[key] = value
    return found


class KvWatch:
    """Highest KV gauges while the block runs; asks the server every ``period`` seconds."""

    def __init__(self, url: str | None, period: float = 0.1) -> None:
        self.url, self.period = url, period
        self.peak: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> KvWatch:
        if self.url:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self.url:
            self._thread.join(10)

    def _watch(self) -> None:
        while True:
            for name, value in kv_gauges(read_url(f"http://{self.url}/metrics")).items():
                self.peak[name] = max(value, self.peak.get(name, 0.0))
            if self._stop.wait(self.period):
                return


def read_url(url: str) -> str:
    """A page's text; empty if it cannot be had."""
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return str(page.read().decode("utf-8", "replace"))
    except (OSError, ValueError):
        return ""


# Streams ----------------------------------------------------------------------------------------
@dataclass
class Stream:
    """One request and when its tokens came (``time.perf_counter``)."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    error: str | None = None
    first: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def ttft(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent

    def receive(self, result: Any, error: Any) -> None:
        """The client's callback, on its thread."""
        now = time.perf_counter()
        if error is not None:
            self.error = " ".join(str(error).split())
        else:
            response = result.get_response()
            if any(o.name == "text_output" for o in response.outputs):
                self.times.append(now)
                counted = result.as_numpy("num_input_tokens")
                if counted is not None and counted.size:
                    self.input_tokens = int(counted.flat[0])
                self.first.set()
            final = response.parameters.get("triton_final_response")
            if final is None or not final.bool_param:
                return
        self.first.set()
        self.done.set()

    def wait(self, event: threading.Event, what: str) -> None:
        """Raises RazorError if the answer is an error, is empty, or does not come."""
        if not event.wait(ANSWER_SECONDS):
            raise RazorError(f"{what}: no answer in {ANSWER_SECONDS:.0f} s")
        if self.error or not self.times:
            raise RazorError(f"{what}: {self.error or 'an answer without tokens'}")


class Client:
    """Streams to one server, each over a connection of its own."""

    def __init__(self, url: str, model: str = "ensemble") -> None:
        try:
            import tritonclient.grpc as grpc
        except ImportError:
            raise MissingExtra("tritonclient", "triton", "the probe of a server") from None
        self._grpc, self.url, self.model = grpc, url, model
        self._clients: list[Any] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._clients:
            with suppress(Exception):  # whatever it says, it goes
                client.stop_stream(cancel_requests=True)
                client.close()

    def send(self, load: Mapping[str, Any], count_input: bool = False) -> Stream:
        """Start one request; ``load``: its tensors, as ``serving_load.Load.inputs`` has them."""
        return self.send_all([load], count_input)[0]

    def send_all(
        self, loads: Sequence[Mapping[str, Any]], count_input: bool = False
    ) -> list[Stream]:
        """Start several requests at once, over connections that are open before the first is sent."""
        streams, prepared = [], []
        for load in loads:
            stream = Stream()
            client = self._grpc.InferenceServerClient(self.url)
            self._clients.append(client)
            client.start_stream(stream.receive)
            prepared.append((client, self._inputs(load, count_input)))
            streams.append(stream)
        for stream, (client, inputs) in zip(streams, prepared, strict=True):
            stream.sent = time.perf_counter()
            client.async_stream_infer(
                self.model, inputs, enable_empty_final_response=True, request_id=f"{id(stream):x}"
            )
        return streams

    def _inputs(self, load: Mapping[str, Any], count_input: bool) -> list[Any]:
        tensors = dict(load, return_num_input_tokens=[True]) if count_input else dict(load)
        inputs = []
        for name, value in tensors.items():
            if isinstance(value[0], bool):
                array, kind = np.array([value], bool), "BOOL"
            elif isinstance(value[0], int):
                array, kind = np.array([value], np.int32), "INT32"
            else:
                array, kind = np.array([[v.encode() for v in value]], object), "BYTES"
            tensor = self._grpc.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
        return inputs


# Probes -----------------------------------------------------------------------------------------
def tokens_per_second(streams: Iterable[Stream]) -> float:
    """All tokens of streams sent together, from the first request to the last token."""
    streams = list(streams)
    seconds = max(s.times[-1] for s in streams) - min(s.sent for s in streams)
    return sum(len(s.times) for s in streams) / seconds


def probe_batching(
    url: str, model: str, loads: Callable[[int], list[dict[str, Any]]], streams: int, tokens: int
) -> dict[str, float]:
    """Output tokens/s of one stream, of ``streams`` at the same time, and their ratio.

    ``loads(n)`` makes n new requests of ``tokens`` tokens each. Raises RazorError.
    """
    speeds = []
    for count in (1, streams):
        with Client(url, model) as client:
            found = client.send_all(loads(count))
            for stream in found:
                stream.wait(stream.done, f"{count} streams")
                if len(stream.times) != tokens:
                    raise RazorError(
                        f"{count} streams: expected {tokens} responses, found {len(stream.times)}"
                    )
            speeds.append(tokens_per_second(found))
    return {"one": speeds[0], "many": speeds[1], "ratio": speeds[1] / speeds[0]}


@dataclass(frozen=True)
class Waiting:
    """A short prompt sent while a long one is read."""

    long_tokens: int
    short_tokens: int
    chunk: int
    shares: tuple[float, ...] = (0.2, 0.45, 0.7)

    @property
    def chunks(self) -> int:
        """Chunks that the long prompt is read in."""
        return math.ceil(self.long_tokens / self.chunk)


def probe_waiting(
    url: str, model: str, loads: Callable[[int, int], list[dict[str, Any]]], trial: Waiting,
    rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    """Time to first token of short prompts while a long one is read, in chunk times of the same run.

    One chunk's time is the long prompt's time to first token, alone, over its chunks. A short prompt
    is sent after about each of ``trial.shares`` of that time, at a random moment within a chunk; it
    does not count if the long prompt was read to its end before (``late``).
    ``loads(tokens, n)`` makes n new requests. Raises RazorError.
    """
    with Client(url, model) as client:
        alone = client.send(loads(trial.short_tokens, 1)[0])
        alone.wait(alone.done, "a short prompt")
        long = client.send(loads(trial.long_tokens, 1)[0])
        long.wait(long.done, "a long prompt")
    chunk_s = long.ttft / trial.chunks
    waits, late = [], 0
    for share in trial.shares:
        with ExitStack() as stack:
            client = stack.enter_context(Client(url, model))
            first, second = loads(trial.long_tokens, 1)[0], loads(trial.short_tokens, 1)[0]
            reading = client.send(first)
            pause = long.ttft * share + chunk_s * rng.random()
            reading.first.wait(max(0.0, pause - (time.perf_counter() - reading.sent)))
            short = client.send(second)
            for stream, what in ((short, "a short prompt"), (reading, "a long prompt")):
                stream.wait(stream.done, f"{what} beside another")
            if reading.times[0] < short.times[0]:
                late += 1
            else:
                waits.append(short.ttft)
    return {
        "chunk_s": chunk_s,
        "alone_s": alone.ttft,
        "long_s": long.ttft,
        "waits_s": waits,
        "chunks": [w / chunk_s for w in waits],
        "late": late,
    }


def added_tokens(url: str, model: str, load: Mapping[str, Any], tokens: int) -> int:
    """Tokens that the server puts around a text of ``tokens`` tokens, by its own count; 0 if it
    does not tell. Raises RazorError."""
    with Client(url, model) as client:
        stream = client.send(load, count_input=True)
        stream.wait(stream.done, "the first request")
    return 0 if stream.input_tokens is None else stream.input_tokens - tokens
