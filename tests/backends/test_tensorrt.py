"""The TensorRT backend: what it refuses, what it tells the builder, and its runner on stand-ins.

No TensorRT is installed where these run: the builder is a module that writes down what it is asked,
the runtime one that executes the same graph and insists on caches updated in place.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).parent))

from trt_fakes import FakeCudart, FakeTrt, compare_over_any_slots, write_fake_engine

from trt_razor.backends import tensorrt as module
from trt_razor.backends.base import EngineOptions
from trt_razor.backends.onnxruntime import OrtSession
from trt_razor.backends.tensorrt import TENSORRT, TensorRtBackend, find_plugin, plugin_name
from trt_razor.backends.tensorrt_session import TensorRtSession
from trt_razor.backends.trt_engine import read_facts
from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.files import sha256_file
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import random_checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.policy import RazorPolicy

TINY = ModelSpec("tiny", "llama", 2, 24, 40, 6, 3, 8, 61, 128, 1e-5)
SPEC = ModelSpec("small", "llama", 1, 128, 48, 2, 2, 64, 61, 128, 1e-5)


def heads(spec: ModelSpec) -> HeadMap:
    rows = tuple((i % 2,) for i in range(spec.num_layers))
    return HeadMap(
        spec.name, spec.fingerprint(), spec.num_layers, spec.num_kv_heads, rows, "test", "test"
    )


def options(dtype: str = "float16", razor: bool = True) -> EngineOptions:
    graph = GraphOptions(RazorPolicy(2, 5, 3), heads(SPEC) if razor else None, 64, dtype)
    return EngineOptions(graph, max_batch_size=2, prefill_chunk=32)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "libplugin.so"
    path.write_bytes(b"a library")
    monkeypatch.setenv("TRT_RAZOR_PLUGIN", str(path))
    return path


# The runner ------------------------------------------------------------------------------------
class Setup:
    """An engine folder, its stand-ins, and an OrtSession of the same graph."""

    def __init__(
        self, folder: Path, plugin: Path, comp_tokens: int = 1, razor: bool = True
    ) -> None:
        policy = RazorPolicy(2, 5, 3, comp_tokens)
        self.folder, self.plugin = folder, plugin
        graph = GraphOptions(policy, heads(TINY) if razor else None, 48)
        self.options = EngineOptions(graph, max_batch_size=4, prefill_chunk=16)
        self.caches = graph.caches(TINY)
        self.plain = write_fake_engine(
            random_checkpoint(TINY),
            self.options,
            folder,
            TENSORRT,
            plugin=plugin.name,
            plugin_sha256=sha256_file(plugin),
        )
        self.cudart = FakeCudart()
        self.trt = FakeTrt(self.cudart, self.options, in_place=True)

    def session(self, slots: int = 4) -> TensorRtSession:
        return TensorRtSession(
            self.folder, self.caches, slots, 48, trt=self.trt, cudart=self.cudart
        )


@pytest.mark.parametrize("comp_tokens, razor", [(0, True), (1, True), (4, True), (1, False)])
def test_same_logits_as_onnxruntime_over_any_slots(
    tmp_path: Path,
    plugin: Path,
    comp_tokens: int,
    razor: bool,
    needs_overloads: Callable[[], None],
) -> None:
    if razor:
        needs_overloads()
    setup = Setup(tmp_path, plugin, comp_tokens, razor)
    session = setup.session()
    ort = OrtSession(setup.plain, setup.caches, 4, 48, threads=1)
    compare_over_any_slots(session, ort, TINY.vocab_size, seed=comp_tokens)


def test_caches_exist_once(tmp_path: Path, plugin: Path) -> None:
    setup = Setup(tmp_path, plugin)
    planned = 3 * sum(t.nbytes for t in setup.caches)
    odd = 2 * sum(t.nbytes for t in setup.caches if t.nbytes % 256)
    assert setup.session(slots=3).kv_bytes == planned + odd
    assert setup.session(slots=1).kv_bytes == planned // 3


def test_the_plugin_is_loaded_once_a_process(tmp_path: Path, plugin: Path) -> None:
    setup = Setup(tmp_path, plugin)
    setup.session()
    setup.session()
    assert setup.trt.registry.loads == 1


def test_refuses_another_plugin_library(tmp_path: Path, plugin: Path) -> None:
    setup = Setup(tmp_path, plugin)
    plugin.write_bytes(b"another library")
    with pytest.raises(UsageError, match=r"built with another plugin library than .*sha256"):
        setup.session()
    plugin.unlink()
    with pytest.raises(RazorError, match=r"\$TRT_RAZOR_PLUGIN: .* found nothing at"):
        setup.session()


def test_refuses_facts_without_a_plugin(tmp_path: Path, plugin: Path) -> None:
    setup = Setup(tmp_path, plugin)
    facts = json.loads((tmp_path / "io.json").read_text())
    del facts["plugin_sha256"]
    (tmp_path / "io.json").write_text(json.dumps(facts))
    with pytest.raises(RazorError, match=r"io\.json: plugin_sha256: missing"):
        setup.session()


def test_refuses_an_engine_of_the_other_tensorrt(tmp_path: Path, plugin: Path) -> None:
    setup = Setup(tmp_path, plugin)
    facts = json.loads((tmp_path / "io.json").read_text())
    facts["schema"] = "trt_razor.rtx_io"
    (tmp_path / "io.json").write_text(json.dumps(facts))
    with pytest.raises(RazorError, match=r"schema: expected 'trt_razor\.tensorrt_io'"):
        setup.session()


# Building --------------------------------------------------------------------------------------
FAKE_MODULE = textwrap.dedent(
    """
    # Writes down, in order, what the builder is asked for.
    import enum, json, os, types
    __version__ = os.environ.get("FAKE_TRT_VERSION", "10.16.0.1")
    LOG = os.environ["FAKE_TRT_LOG"]
    FAIL = os.environ.get("FAKE_TRT_FAIL", "")

    def note(*event):
        with open(LOG, "a") as f:
            f.write(json.dumps(event) + "\\n")

    class ILogger:
        class Severity(enum.Enum):
            ERROR = 1
        def __init__(self): pass
    class NetworkDefinitionCreationFlag(enum.IntEnum):
        EXPLICIT_BATCH = 0
        STRONGLY_TYPED = 1
    class OnnxParserFlag(enum.Enum):
        ENABLE_PLUGIN_OVERRIDE = 5
    class PreviewFeature(enum.Enum):
        ALIASED_PLUGIN_IO_10_03 = 1

    class Registry:
        all_creators = []
        def load_library(self, path):
            note("load_library", path)
            return None if FAIL == "plugin" else object()
    def get_plugin_registry():
        return Registry()

    class Network:
        num_layers = 0
        def __init__(self): self.inputs, self.outputs = [], []
        num_inputs = property(lambda self: len(self.inputs))
        num_outputs = property(lambda self: len(self.outputs))
        def get_input(self, i): return self.inputs[i]
        def get_output(self, i): return self.outputs[i]

    class Config:
        def set_preview_feature(self, feature, on): note("preview", feature.name, on)
        def add_optimization_profile(self, profile):
            note("profile", profile.shapes)
            return 0

    class Profile:
        def __init__(self): self.shapes = {}
        def set_shape(self, name, low, best, high): self.shapes[name] = [low, best, high]

    class Builder:
        def __init__(self, logger):
            if FAIL == "gpu":
                logger.log(ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
        def create_network(self, flags):
            note("network", flags)
            return Network()
        def create_builder_config(self): return Config()
        def create_optimization_profile(self): return Profile()
        def build_serialized_network(self, network, config):
            note("build")
            return b"plan"

    class OnnxParser:
        num_errors = 0
        def __init__(self, network, logger): self.network = network
        def set_flag(self, flag): note("flag", flag.name)
        def parse_from_file(self, path):
            import onnx
            graph = onnx.load(path, load_external_data=True).graph
            note("parse", sorted({n.op_type for n in graph.node if n.domain == "trt_razor"}))
            def tensor(v):
                dims = [d.dim_value if d.HasField("dim_value") else -1 for d in v.type.tensor_type.shape.dim]
                return types.SimpleNamespace(name=v.name, shape=dims, dtype=types.SimpleNamespace(name="HALF"))
            self.network.inputs = [tensor(v) for v in graph.input]
            self.network.outputs = [tensor(v) for v in graph.output]
            return True
    """
)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: Path) -> Iterator[Path]:
    """A module ``tensorrt`` for this process and its children; returns its log."""
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "tensorrt.py").write_text(FAKE_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "python"))
    monkeypatch.setenv("FAKE_TRT_LOG", str(tmp_path / "log"))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(module, "gpu_capability", lambda: "9.0")
    yield tmp_path / "log"
    sys.modules.pop("tensorrt", None)


def quiet(stage: str, done: int, total: int) -> None:
    pass


def test_what_the_builder_is_told(builder: Path, plugin: Path, tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    chosen = options()
    TensorRtBackend().check(SPEC, chosen)
    facts = TensorRtBackend().build(random_checkpoint(SPEC), chosen, staging, quiet)
    events = [json.loads(line) for line in builder.read_text().splitlines()]
    kinds = [e[0] for e in events]
    assert kinds == [
        "load_library", "network", "flag", "preview", "parse", "profile", "profile", "build"
    ]  # fmt: skip
    told = dict(zip(kinds, events, strict=True))
    assert told["load_library"] == ["load_library", str(plugin)]
    assert told["network"] == ["network", 2]  # 1 << STRONGLY_TYPED
    assert told["flag"] == ["flag", "ENABLE_PLUGIN_OVERRIDE"]
    assert told["preview"] == ["preview", "ALIASED_PLUGIN_IO_10_03", True]
    assert told["parse"] == ["parse", ["RazorAttention"]]
    assert events[5][1]["input_ids"] == [[1, 1], [1, 32], [2, 32]]
    assert events[5][1]["full_k_0"] == [[1, 1, 64, 64], [1, 1, 64, 64], [2, 1, 64, 64]]

    assert sorted(p.name for p in staging.iterdir()) == ["io.json", "model.engine"]
    assert (staging / "model.engine").read_bytes() == b"plan"
    assert facts["plugin_sha256"] == sha256_file(plugin)
    assert facts["target"] == "9.0"
    io = read_facts(staging, TENSORRT)
    assert (io["plugin"], io["plugin_sha256"]) == (plugin.name, sha256_file(plugin))
    assert io["targets"] == ["9.0"]
    names = [t["name"] for t in io["inputs"]]
    assert names[5:] == [t.name for t in chosen.graph.caches(SPEC)]


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("plugin", r"libplugin\.so: cannot be loaded"),
        ("gpu", "TensorRT's builder cannot start: CUDA initialization failure"),
    ],
)
def test_failures_of_the_builder_are_one_line(
    builder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, message: str
) -> None:
    monkeypatch.setenv("FAKE_TRT_FAIL", fail)
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(RazorError, match=message) as e:
        TensorRtBackend().build(random_checkpoint(SPEC), options(), staging, quiet)
    assert "\n" not in str(e.value)
    assert list(staging.iterdir()) == []


def test_refused_before_anything_starts(builder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TensorRtBackend()
    with pytest.raises(UsageError, match=r"dtype: expected float16 or bfloat16 .*found float32"):
        backend.check(SPEC, options("float32"))
    tiny = EngineOptions(GraphOptions(RazorPolicy(2, 5, 3), heads(TINY), 48, "float16"))
    with pytest.raises(UsageError, match=r"tiny: head_dim: .*64, 96, 128, 256, found 8"):
        backend.check(TINY, tiny)
    backend.check(SPEC, options())
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.14.1")
    with pytest.raises(UsageError, match=r"expected version 10\.15 or newer, found 10\.14\.1"):
        backend.check(SPEC, options())


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match="tensorrt"):
        TensorRtBackend().check(SPEC, options())


def test_missing_plugin_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRT_RAZOR_PLUGIN", raising=False)
    monkeypatch.setattr(module, "plugin_name", lambda major: f"libnowhere{major}.so")
    with pytest.raises(
        RazorError, match=r"libnowhere11\.so: not found .*make plugin TENSORRT_ROOT"
    ):
        find_plugin(SimpleNamespace(__version__="11.1.0"))


def test_one_library_per_major_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin_name(10) != plugin_name(11)
    other = tmp_path / plugin_name(11)
    other.write_bytes(b"library")
    monkeypatch.setenv("TRT_RAZOR_PLUGIN", str(other))
    assert find_plugin(SimpleNamespace(__version__="11.1.0")) == other
    with pytest.raises(
        RazorError, match=r"expected libtrt_razor_plugins_trt10\.so for TensorRT 10"
    ):
        find_plugin(SimpleNamespace(__version__="10.16.1"))
    monkeypatch.setenv("TRT_RAZOR_PLUGIN", str(tmp_path))
    with pytest.raises(RazorError, match="found a folder at"):
        find_plugin(SimpleNamespace(__version__="10.16.1"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise OSError('libnvinfer.so.10: cannot\\n open')", "cannot be imported: libnvinfer"),
        ("import tensorrt_bindings", "cannot be imported: No module named 'tensorrt_bindings'"),
        ("", "expected a version such as 10.16.1, found 'None'"),
    ],
)
def test_a_broken_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(RazorError, match=re.escape(message)) as e:
        TensorRtBackend().check(SPEC, options())
    sys.modules.pop("tensorrt", None)
    assert "\n" not in str(e.value)


def test_building_without_a_gpu_is_refused(tmp_path: Path) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs the package cuda-bindings")
    if runtime.cudaGetDeviceCount()[1]:
        pytest.skip("there is a GPU")
    with pytest.raises(RazorError, match="--backend tensorrt builds on a GPU"):
        module.gpu_capability()
