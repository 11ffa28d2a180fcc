"""What a server counts: requests, tokens, times, and what is in the cache. Knows no server.

One thread (the loop's) changes these objects, apart from ``count_request``.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

OUTCOMES = ("stop", "length", "capacity", "error", "cancelled", "rejected")
"""How a request ends; rejected = the queue was full."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts of values up to each bound, as Prometheus has them.

    Attributes:
        bounds: upper bounds, inclusive, rising; +Inf is implied.
        counts: values in each interval, the last one above all bounds. sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """Values at most each bound, then all."""
        total, out = 0, []
        for n in self.counts:
            total += n
            out.append(total)
        return out


class Statistics:
    """Totals since the start, and how things are now.

    Attributes:
        requests: by outcome. prompt_tokens, generated_tokens: totals.
        slots_total, slots_active, queue_length: sequences (rows of requests), now.
        kv_bytes_allocated: bytes of all cache tensors. kv_bytes_used: bytes that the sequences in
            slots really keep.
        time_to_first_token, queue, inter_token, request: seconds; all but ``inter_token`` from the
            arrival of the request, ``queue`` until it has a slot.
    """

    def __init__(self, slots_total: int = 0, kv_bytes_allocated: int = 0) -> None:
        self.requests = dict.fromkeys(OUTCOMES, 0)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.slots_total = slots_total
        self.slots_active = 0
        self.queue_length = 0
        self.kv_bytes_allocated = kv_bytes_allocated
        self.kv_bytes_used = 0
        self.time_to_first_token = Histogram(_SLOW)
        self.queue = Histogram(_SLOW)
        self.inter_token = Histogram(_FAST)
        self.request = Histogram(_SLOW)
        self._lock = threading.Lock()

    def count_request(self, outcome: str) -> None:
        """A request ended; from any thread."""
        with self._lock:
            self.requests[outcome] += 1

    def clear_gauges(self) -> None:
        """Nothing is loaded any more: gauges outlive a model in a server."""
        self.slots_total = self.slots_active = self.queue_length = 0
        self.kv_bytes_allocated = self.kv_bytes_used = 0
