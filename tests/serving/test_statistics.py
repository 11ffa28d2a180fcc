"""Histograms and counters, and how they become metrics of a server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fake_triton import FakeTriton

from trt_razor.serving.models.metrics import Metrics
from trt_razor.serving.statistics import OUTCOMES, Histogram, Statistics


def test_histogram_counts_up_to_each_bound() -> None:
    h = Histogram((0.1, 1.0))
    for x in (0.05, 0.1, 0.5, 1.0, 7.0):
        h.observe(x)
    assert h.cumulative() == [2, 4, 5]
    assert h.sum == pytest.approx(8.65)


LABELS = {"model": "tensorrt_llm", "version": "1"}


def test_metrics_follow_the_statistics() -> None:
    triton = FakeTriton()
    s = Statistics(slots_total=4, kv_bytes_allocated=1000)
    metrics = Metrics(triton, s, LABELS)
    metrics.publish()
    assert triton.metric("slots_total") == 4
    assert triton.metric("kv_cache_bytes_allocated") == 1000
    assert {triton.metric("requests_total", outcome=o) for o in OUTCOMES} == {0}
    s.slots_active, s.queue_length, s.kv_bytes_used = 2, 7, 333
    s.prompt_tokens, s.generated_tokens = 10, 20
    s.count_request("stop")
    s.count_request("stop")
    s.count_request("rejected")
    for x in (0.004, 0.3, 1000.0):
        s.time_to_first_token.observe(x)
    calls = triton.calls
    metrics.publish()
    assert [triton.metric(n) for n in ("slots_active", "queue_length", "kv_cache_bytes_used")] == [
        2, 7, 333,
    ]  # fmt: skip
    assert triton.metric("prompt_tokens_total") == 10
    assert triton.metric("generated_tokens_total") == 20
    assert triton.metric("requests_total", outcome="stop") == 2
    assert triton.metric("requests_total", outcome="rejected") == 1
    name = "time_to_first_token_seconds"
    assert triton.metric(f"{name}_count") == 3
    assert triton.metric(f"{name}_sum") == pytest.approx(1000.304)
    assert triton.metric(f"{name}_bucket", le="0.005") == 1
    assert triton.metric(f"{name}_bucket", le="0.5") == 2
    assert triton.metric(f"{name}_bucket", le="+Inf") == 3
    # Counters that have not changed cost no call: each crosses a process border.
    changed = triton.calls - calls
    metrics.publish()
    assert triton.calls == calls + changed + 5  # the gauges


def test_gauges_survive_an_old_instance_that_ends_late() -> None:
    triton = FakeTriton()
    old, new = Statistics(4, 1000), Statistics(4, 1000)
    of_old, of_new = Metrics(triton, old, LABELS), Metrics(triton, new, LABELS)
    of_new.publish()
    old.clear_gauges()
    of_old.publish()
    of_new.publish()
    assert triton.metric("slots_total") == 4
    assert triton.metric("kv_cache_bytes_allocated") == 1000


def test_a_reload_goes_on_counting_and_unloading_clears_gauges() -> None:
    triton = FakeTriton()
    for _ in range(2):
        s = Statistics(4, 1000)
        metrics = Metrics(triton, s, LABELS)
        s.slots_active = 3
        s.generated_tokens = 5
        s.inter_token.observe(0.02)
        metrics.publish()
        assert triton.metric("slots_active") == 3
        s.clear_gauges()
        metrics.publish()
        gauges = ["slots_active", "slots_total", "queue_length", "kv_cache_bytes_used"]
        assert [triton.metric(n) for n in (*gauges, "kv_cache_bytes_allocated")] == [0] * 5
    assert triton.metric("generated_tokens_total") == 10
    assert triton.metric("inter_token_seconds_count") == 2


def test_what_the_server_holds_is_never_collected() -> None:
    """Not when Python ends either, when the way to the server is gone."""
    code = (
        "import fake_triton, sys\n"
        "from trt_razor.serving.models.metrics import Metrics\n"
        "from trt_razor.serving.statistics import Statistics\n"
        "triton = fake_triton.FakeTriton()\n"
        "class Family(triton.MetricFamily):\n"
        "    def __del__(self): print('collected')\n"
        "    def Metric(self, labels):\n"
        "        kind = type('M', (), {'__del__': lambda self: print('collected')})\n"
        "        return kind()\n"
        "triton.MetricFamily = Family\n"
        "Metrics(triton, Statistics(4, 1000), {'model': 'm', 'version': '1'})\n"
        "print('end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "end\n"
