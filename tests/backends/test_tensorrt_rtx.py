"""The TensorRT-RTX builder on tiny models; the real SmolLM2 build is marked slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx")

from trt_razor.backends import tensorrt_rtx as module  # noqa: E402
from trt_razor.backends.base import EngineOptions  # noqa: E402
from trt_razor.backends.rtx_session import RtxSession  # noqa: E402
from trt_razor.backends.tensorrt_rtx import RTX, TensorRtRtxBackend  # noqa: E402
from trt_razor.backends.trt_builder import build_in_child  # noqa: E402
from trt_razor.backends.trt_engine import PROFILES, profile_shapes, read_facts  # noqa: E402
from trt_razor.errors import MissingExtra, RazorError, UsageError  # noqa: E402
from trt_razor.graph.options import GraphOptions  # noqa: E402
from trt_razor.headmap import HeadMap  # noqa: E402
from trt_razor.models.checkpoint import open_checkpoint, random_checkpoint  # noqa: E402
from trt_razor.models.spec import ModelSpec  # noqa: E402
from trt_razor.policy import RazorPolicy  # noqa: E402

SPEC = ModelSpec("tiny", "llama", 1, 32, 48, 4, 2, 8, 61, 128, 1e-5)
HEADS = HeadMap("tiny", SPEC.fingerprint(), 1, 2, ((1,),), "test", "test")


def options(
    razor: bool = True, dtype: str = "float16", comp_tokens: int = 1, heavy: int = 0
) -> EngineOptions:
    policy = RazorPolicy(2, 5, 3, comp_tokens, heavy)
    graph = GraphOptions(policy, HEADS if razor else None, 64, dtype)
    return EngineOptions(graph, max_batch_size=2, prefill_chunk=32)


def quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(
    "razor, dtype, comp_tokens, heavy",
    [
        (False, "float32", 1, 0),
        (True, "float32", 1, 0),
        (True, "float16", 1, 0),
        (True, "bfloat16", 1, 0),
        (True, "float16", 0, 0),
        (True, "float16", 4, 0),
        (True, "float16", 4, 8),
        (True, "bfloat16", 0, 3),
    ],
)
def test_builds(tmp_path: Path, razor: bool, dtype: str, comp_tokens: int, heavy: int) -> None:
    chosen = options(razor, dtype, comp_tokens, heavy)
    backend = TensorRtRtxBackend()
    backend.check(SPEC, chosen)
    seen: list[tuple[str, int, int]] = []
    facts = backend.build(
        random_checkpoint(SPEC), chosen, tmp_path, lambda *args: seen.append(args)
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["io.json", "model.engine"]
    assert (tmp_path / "model.engine").stat().st_size > 10_000
    assert int(facts["layers"]) > 50
    assert facts["target"] == ", ".join(module.TARGETS)

    io = read_facts(tmp_path, RTX)
    assert io["tensorrt_rtx"] == facts["tensorrt_rtx"]
    assert (io["max_batch_size"], io["max_chunk"], io["max_logits"]) == (2, 32, 32)
    assert io["outputs"][0] == {"name": "logits", "dtype": "FLOAT", "shape": [-1, -1, 61]}
    names = [t["name"] for t in io["inputs"]]
    caches = [t.name for t in chosen.graph.caches(SPEC)]
    assert names == ["input_ids", "past", "chunk", "past_span", "logits_index", *caches]
    assert [t["name"] for t in io["outputs"][1:]] == [f"{c}_out" for c in caches]

    assert seen[-1] == ("engine", 0, 0)
    assert seen[0][0] == "weights"


def test_engine_without_a_gpu_is_refused(tmp_path: Path) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the package cuda-bindings")
    if runtime.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU")
    chosen = options(razor=False)
    backend = TensorRtRtxBackend()
    backend.build(random_checkpoint(SPEC), chosen, tmp_path, quiet)
    with pytest.raises(RazorError, match="needs a GPU"):
        backend.open(tmp_path, chosen.graph.caches(SPEC), 1, 64)


def test_engine_of_another_version_is_refused(tmp_path: Path) -> None:
    chosen = options(razor=False)
    TensorRtRtxBackend().build(random_checkpoint(SPEC), chosen, tmp_path, quiet)
    data = json.loads((tmp_path / "io.json").read_text())
    data["tensorrt_rtx"] = "0.1"
    (tmp_path / "io.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"built with tensorrt_rtx 0\.1"):
        RtxSession(tmp_path, chosen.graph.caches(SPEC), 1, 64)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trt-razor\[tensorrt-rtx\]'"):
        TensorRtRtxBackend().check(SPEC, options())


def test_impossible_options_are_refused_before_anything_starts() -> None:
    graph = GraphOptions(RazorPolicy(), HEADS, 1024)
    with pytest.raises(UsageError, match="max_seq_len: expected at most 128"):
        TensorRtRtxBackend().check(SPEC, EngineOptions(graph))


def test_profiles_cover_prefill_and_generation() -> None:
    context, generation = profile_shapes(options())
    assert [s["input_ids"] for s in context] == [(1, 1), (1, 32), (2, 32)]
    assert [s["input_ids"] for s in generation] == [(1, 1), (2, 1), (2, 1)]
    assert context[2]["past_span"] == generation[2]["past_span"] == (64,)
    assert context[2]["logits_index"] == (2, 32)
    assert generation[2]["logits_index"] == (2, 1)
    long = EngineOptions(GraphOptions(RazorPolicy(), None, 4096), 1, 0)
    assert profile_shapes(long)[0][2]["input_ids"] == (1, 4096)
    assert profile_shapes(long)[0][2]["logits_index"] == (1, 128)
    assert len(profile_shapes(long)) == len(PROFILES)


def test_parser_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_calls_without_functions(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        del model.functions[:]
        path.write_bytes(model.SerializeToString())

    monkeypatch.setattr(module, "_inline_file", leave_calls_without_functions)
    with pytest.raises(
        RazorError, match=r"TensorRT-RTX's parser refused the graph: .*Plugin not found"
    ) as e:
        TensorRtRtxBackend().build(random_checkpoint(SPEC), options(False), tmp_path, quiet)
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_builder_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles that contradict the graph get past the parser."""

    def wrong(chosen: EngineOptions) -> Any:
        shapes = profile_shapes(chosen)
        for profile in shapes:
            for bound in profile:
                bound["chunk"] = (7,)
        return shapes

    monkeypatch.setattr(module, "profile_shapes", wrong)
    with pytest.raises(RazorError, match="TensorRT-RTX's builder refused the graph: ") as e:
        TensorRtRtxBackend().build(random_checkpoint(SPEC), options(), tmp_path, quiet)
    assert "\n" not in str(e.value)
    assert "no reason given" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_builder_and_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, with the signal that a terminal sends."""
    script = textwrap.dedent(
        f"""
        import subprocess, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_tensorrt_rtx import SPEC, options, quiet
        from trt_razor.backends.tensorrt_rtx import TensorRtRtxBackend
        from trt_razor.models.checkpoint import random_checkpoint

        class Child(subprocess.Popen):
            def communicate(self, *args):
                print(self.pid, flush=True)
                return super().communicate(*args)

        subprocess.Popen = Child

        try:
            TensorRtRtxBackend().build(random_checkpoint(SPEC), options(comp_tokens=16), Path({str(tmp_path)!r}), quiet)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        child = int(process.stdout.readline())
        time.sleep(1)  # the child is importing or building
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().splitlines()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert rest[-1] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(
        "import os, sys\nprint('bad graph', file=sys.stderr, flush=True)\nos.abort()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))  # handed on to the child
    with pytest.raises(RazorError, match=r"builder died \(exit status -6\): bad graph$"):
        build_in_child("tensorrt_rtx", tmp_path / "a.onnx", tmp_path / "model.engine", [])


def test_an_engine_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    chosen = options(razor=False)
    (tmp_path / "model.engine").mkdir()
    with pytest.raises(RazorError, match=r"model\.engine: cannot write: Is a directory"):
        TensorRtRtxBackend().build(random_checkpoint(SPEC), chosen, tmp_path, quiet)


@pytest.mark.slow
@pytest.mark.real
def test_builds_smollm2(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("smollm2-135m", None)
    spec = checkpoint.spec
    rows = tuple((i % 3,) if i % 3 == 0 else () for i in range(spec.num_layers))
    heads = HeadMap(spec.name, spec.fingerprint(), spec.num_layers, 3, rows, "test", "test")
    chosen = EngineOptions(GraphOptions(RazorPolicy(), heads, 8192, "float16"))
    TensorRtRtxBackend().build(checkpoint, chosen, tmp_path, quiet)
    assert (tmp_path / "model.engine").stat().st_size > 2 * spec.num_parameters()
    assert len(read_facts(tmp_path, RTX)["inputs"]) == 5 + len(chosen.graph.caches(spec))
