"""The TensorRT-RTX runner against ONNX Runtime's session, on stand-ins for GPU and runtime."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent))

from trt_fakes import FakeCudart, FakeTrt, compare_over_any_slots, write_fake_engine

from trt_razor.backends.base import EngineOptions
from trt_razor.backends.onnxruntime import OrtSession
from trt_razor.backends.rtx_session import RtxSession, past_span
from trt_razor.errors import RazorError, UsageError
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import random_checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy

SPEC = ModelSpec("tiny", "llama", 2, 24, 40, 6, 3, 8, 61, 128, 1e-5)
HEADS = HeadMap("tiny", SPEC.fingerprint(), 2, 3, ((1,), (0, 2)), "test", "test")


class Setup:
    """An engine folder, its stand-ins, and an OrtSession of the same graph."""

    def __init__(self, folder: Path, comp_tokens: int = 1, razor: bool = True) -> None:
        policy = RazorPolicy(2, 5, 3, comp_tokens)
        self.folder = folder
        self.graph = GraphOptions(policy, HEADS if razor else None, 48)
        self.options = EngineOptions(self.graph, max_batch_size=4, prefill_chunk=16)
        self.caches = self.graph.caches(SPEC)
        self.plain = write_fake_engine(random_checkpoint(SPEC), self.options, folder)
        self.cudart = FakeCudart()

    def rtx(self, slots: int = 4, **changes: Any) -> RtxSession:
        cudart = changes.get("cudart", self.cudart)
        return RtxSession(
            self.folder,
            changes.get("caches", self.caches),
            slots,
            changes.get("max_seq_len", 48),
            trt=FakeTrt(cudart, self.options),
            cudart=cudart,
        )

    def ort(self, slots: int = 4) -> OrtSession:
        return OrtSession(self.plain, self.caches, slots, 48, threads=1)


def set_io(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "io.json").read_text())
    data.update(changes)
    (folder / "io.json").write_text(json.dumps(data))


@pytest.mark.parametrize("comp_tokens, razor", [(0, True), (1, True), (4, True), (1, False)])
def test_same_logits_as_onnxruntime_over_any_slots(
    tmp_path: Path, comp_tokens: int, razor: bool, needs_overloads: Callable[[], None]
) -> None:
    """Random ranges of slots, chunks, idle rows and resets: sides get mixed in every way."""
    if razor:
        needs_overloads()
    setup = Setup(tmp_path, comp_tokens, razor)
    rtx, ort = setup.rtx(), setup.ort()
    compare_over_any_slots(rtx, ort, SPEC.vocab_size, seed=comp_tokens)


def test_a_pass_over_agreeing_slots_copies_no_cache(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    rtx = setup.rtx()
    one = np.ones((4, 1), np.int32)
    setup.cudart.device_copies = 0
    for step in range(3):
        rtx.forward(0, one, np.full(4, step), np.ones(4), np.zeros((4, 1)))
    assert setup.cudart.device_copies == 0
    # Slot 0 alone moves on; then three slots are on one side and it is brought over to them.
    rtx.forward(0, one[:1], np.full(1, 3), np.ones(1), np.zeros((1, 1)))
    assert setup.cudart.device_copies == 0
    rtx.forward(0, one, np.full(4, 4), np.ones(4), np.zeros((4, 1)))
    assert setup.cudart.device_copies == len(setup.caches)


def test_kv_bytes_are_what_is_allocated(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    rtx = setup.rtx(slots=3)
    small = sum(setup.cudart.live[a].nbytes for a in rtx._small.values())
    assert rtx.kv_bytes == sum(b.nbytes for b in setup.cudart.live.values()) - small
    planned = 3 * sum(t.nbytes for t in setup.caches)
    odd = 2 * sum(t.nbytes for t in setup.caches if t.nbytes % 256)
    assert rtx.kv_bytes == 2 * planned + 2 * odd
    assert setup.rtx(slots=1, cudart=FakeCudart()).kv_bytes == 2 * planned // 3


def test_memory_is_given_back(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    rtx = setup.rtx()
    assert setup.cudart.live
    del rtx
    gc.collect()
    assert not setup.cudart.live


def test_memory_is_given_back_when_it_runs_out(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    cudart = FakeCudart(memory=50_000)
    with pytest.raises(RazorError, match=r"cudaMalloc failed.*use fewer slots"):
        setup.rtx(cudart=cudart)
    gc.collect()
    assert not cudart.live


@pytest.mark.parametrize(
    "cudart, error, message",
    [
        (FakeCudart(devices=-1), RazorError, "needs a GPU .*cudaErrorInsufficientDriver"),
        (FakeCudart(devices=0), RazorError, r"needs a GPU \(no GPU found\)"),
        (FakeCudart(capability=(9, 0)), UsageError, "8.0, 8.6, 8.9, 12.0, 12.1.* this GPU has 9.0"),
    ],
)
def test_refuses_a_machine_that_cannot_run_it(
    tmp_path: Path, cudart: FakeCudart, error: type[Exception], message: str
) -> None:
    setup = Setup(tmp_path)
    with pytest.raises(error, match=message):
        setup.rtx(cudart=cudart)
    assert not cudart.live


def test_a_runtime_that_cannot_start_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bindings say null with a TypeError."""

    def null(self: FakeTrt, logger: Any) -> None:
        logger.log(FakeTrt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    setup = Setup(tmp_path)
    monkeypatch.setattr(FakeTrt, "Runtime", null)
    with pytest.raises(RazorError, match="runtime cannot start: CUDA initialization failure"):
        setup.rtx()
    assert not setup.cudart.live


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tensorrt_rtx": "1.0.0"}, r"built with tensorrt_rtx 1\.0\.0, found 99\.9\.9"),
        ({"schema": "other"}, "schema: expected"),
        ({"version": 2}, "version: expected 1, found 2"),
        ({"max_chunk": "16"}, "max_chunk: expected int, found '16'"),
        ({"max_chunk": 0}, "max_chunk: expected int, found 0"),
        ({"max_seq_len": 64}, "max_seq_len: expected 48, found 64"),
        ({"inputs": [{"name": "past"}]}, r"inputs\[0\]: expected a name and a shape"),
        ({"inputs": []}, "inputs: input_ids is missing"),
        ({"outputs": []}, r"outputs\[0\]: expected logits"),
    ],
)
def test_refuses_wrong_facts(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    setup = Setup(tmp_path)
    set_io(tmp_path, **changes)
    with pytest.raises(RazorError, match=message):
        setup.rtx()


def test_refuses_other_caches_and_damaged_files(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    with pytest.raises(RazorError, match=r"cache tensor comp_0: expected None, found \('FLOAT'"):
        setup.rtx(caches=[t for t in setup.caches if t.name != "comp_0"])
    (tmp_path / "model.engine").write_bytes(b"\0" * 100)
    with pytest.raises(
        RazorError, match=r"cannot load this engine: Magic tag does not match\. more$"
    ):
        setup.rtx()
    (tmp_path / "model.engine").unlink()
    with pytest.raises(RazorError, match="cannot read"):
        setup.rtx()
    (tmp_path / "io.json").write_text("{")
    with pytest.raises(RazorError, match="not valid JSON"):
        setup.rtx()
    (tmp_path / "io.json").unlink()
    with pytest.raises(RazorError, match="cannot read"):
        setup.rtx()


@pytest.mark.parametrize(
    "first, shape, wanted, message",
    [
        (2, (3, 1), 1, "slots: expected 0..3, found 2..4"),
        (0, (5, 1), 1, "slots: expected 0..3, found 0..4"),
        (0, (1, 17), 1, "tokens in a chunk: expected at most 16, found 17"),
        (0, (1, 1), 17, "logits of a chunk: expected at most 16, found 17"),
    ],
)
def test_refuses_more_than_it_was_built_for(
    tmp_path: Path, first: int, shape: tuple[int, int], wanted: int, message: str
) -> None:
    rtx = Setup(tmp_path).rtx()
    rows = shape[0]
    with pytest.raises(UsageError, match=message):
        rtx.forward(first, np.zeros(shape), np.zeros(rows), np.ones(rows), np.zeros((rows, wanted)))


def test_spans_are_few_and_long_enough() -> None:
    spans = [past_span(n, 131072) for n in range(131073)]
    assert all(s >= max(n, 1) for n, s in enumerate(spans))
    assert max(spans) == 131072
    assert len(set(spans)) < 80
    assert all(s <= n * 1.13 + 128 for n, s in enumerate(spans))


def test_the_real_cuda_package_without_a_gpu_says_so(tmp_path: Path) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the package cuda-bindings")
    if runtime.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU")
    setup = Setup(tmp_path)
    with pytest.raises(RazorError, match="a TensorRT-RTX engine needs a GPU"):
        RtxSession(
            tmp_path, setup.caches, 1, 48, trt=FakeTrt(setup.cudart, setup.options), cudart=runtime
        )
