"""Statistics as Prometheus metrics of the server, at its ``/metrics``."""

from __future__ import annotations

import ctypes
from typing import Any

from trt_razor.serving.statistics import Histogram, Statistics

PREFIX = "trt_razor_"
GAUGES = {
    "kv_cache_bytes_allocated": ("kv_bytes_allocated", "Bytes of all KV cache tensors"),
    "kv_cache_bytes_used": ("kv_bytes_used", "Bytes that the sequences in slots keep"),
    "slots_total": ("slots_total", "Sequences that fit in the cache at once"),
    "slots_active": ("slots_active", "Sequences in slots"),
    "queue_length": ("queue_length", "Sequences that wait for a slot"),
}
COUNTERS = {
    "prompt_tokens_total": ("prompt_tokens", "Prompt tokens read"),
    "generated_tokens_total": ("generated_tokens", "Tokens generated"),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time_to_first_token", "Arrival to first token"),
    "queue_seconds": ("queue", "Arrival until a slot was free"),
    "inter_token_seconds": ("inter_token", "Between two tokens of a sequence"),
    "request_seconds": ("request", "Arrival to end"),
}


class Metrics:
    """The metrics of one model; ``publish`` brings them up to date.

    A server keeps metrics when a model is unloaded and goes on counting when it comes back. So
    counters get what was added since the last time; histograms are counters with the names that
    Prometheus gives their parts, since not every server version has them.

    Args:
        pb_utils: the module ``triton_python_backend_utils``.
        labels: of every metric, ``model`` and ``version``.
    """

    def __init__(self, pb_utils: Any, statistics: Statistics, labels: dict[str, str]) -> None:
        self._pb = pb_utils
        self._labels = labels
        self._statistics = statistics
        self._families: list[Any] = []  # a family ends its metrics when it is collected
        self._gauges = {n: self._one(n, t, "GAUGE") for n, (_, t) in GAUGES.items()}
        self._counters = {n: self._one(n, t, "COUNTER") for n, (_, t) in COUNTERS.items()}
        requests = self._family("requests_total", "Sequences that ended, by outcome", "COUNTER")
        self._requests = {o: self._metric(requests, outcome=o) for o in statistics.requests}
        self._histograms = {
            name: _HistogramMetrics(self, name, text, getattr(statistics, field))
            for name, (field, text) in HISTOGRAMS.items()
        }
        self._last: dict[str, float] = {}

    def _family(self, name: str, text: str, kind: str) -> Any:
        family = self._pb.MetricFamily(
            name=PREFIX + name, description=text, kind=getattr(self._pb.MetricFamily, kind)
        )
        self._families.append(family)
        return _for_ever(family)

    def _metric(self, family: Any, **labels: str) -> Any:
        return _for_ever(family.Metric(labels={**self._labels, **labels}))

    def _one(self, name: str, text: str, kind: str) -> Any:
        return self._metric(self._family(name, text, kind))

    def publish(self) -> None:
        """Send what has changed, and all gauges: when a model is loaded anew, the old one may clear
        them after the new one has set them. On one thread at a time."""
        s = self._statistics
        for name, metric in self._gauges.items():
            metric.set(float(getattr(s, GAUGES[name][0])))
        for name, metric in self._counters.items():
            self.add(name, metric, getattr(s, COUNTERS[name][0]))
        for outcome, metric in self._requests.items():
            self.add(outcome, metric, s.requests[outcome])
        for histogram in self._histograms.values():
            histogram.publish()

    def add(self, key: str, metric: Any, total: float) -> None:
        """Bring a counter from the last total of ``key`` to this one."""
        more = total - self._last.get(key, 0)
        if more > 0:
            metric.increment(float(more))
            self._last[key] = total


def _for_ever(thing: Any) -> Any:
    """Never collected: destructors that run when Python ends find the link to the server gone, and
    the process of the model dies of it (Triton 2.51, each time)."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    return thing


class _HistogramMetrics:
    def __init__(self, owner: Metrics, name: str, text: str, histogram: Histogram) -> None:
        self._owner, self._name, self._histogram = owner, name, histogram
        self._count = owner._one(f"{name}_count", f"{text}: values", "COUNTER")
        self._sum = owner._one(f"{name}_sum", f"{text}: sum", "COUNTER")
        buckets = owner._family(f"{name}_bucket", f"{text}: values up to le", "COUNTER")
        bounds = [f"{b:g}" for b in histogram.bounds] + ["+Inf"]
        self._buckets = {b: owner._metric(buckets, le=b) for b in bounds}
        self._seen = 0

    def publish(self) -> None:
        counts = self._histogram.cumulative()
        if counts[-1] == self._seen:
            return
        self._seen = counts[-1]
        for (bound, metric), n in zip(self._buckets.items(), counts, strict=True):
            self._owner.add(f"{self._name} {bound}", metric, n)
        self._owner.add(f"{self._name} sum", self._sum, self._histogram.sum)
        self._owner.add(f"{self._name} count", self._count, counts[-1])
