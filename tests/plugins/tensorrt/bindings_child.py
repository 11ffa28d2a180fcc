"""A process with TensorRT's Python bindings over the stub libraries; see test_real_bindings.py.

A job as JSON on stdin, the answer as JSON on stdout.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "trtllm"))

import doubles
from razor_models import SPECS, Case, build, caches

from trt_razor.errors import RazorError
from trt_razor.trtllm.options import TrtLlmOptions


def main() -> None:
    job = json.load(sys.stdin)
    stub, trt = _bindings(Path(job["stub"]))
    with tempfile.TemporaryDirectory() as folder:
        release = job["release"]
        with doubles.installed(Path(folder), release) as trtllm:
            answer = TASKS[job["task"]](trtllm, release, stub, trt, job)
    print(json.dumps(answer))


def _bindings(folder: Path) -> tuple[ctypes.CDLL, Any]:
    """The stub, and the real bindings, which take libraries of these names that are loaded already."""
    # Else the package's own libraries would be loaded too, where they are installed.
    sys.modules["tensorrt_libs"] = None  # type: ignore[assignment]
    libraries = {p.name.split(".")[0]: p for p in folder.glob("lib*.so.*")}
    stub = ctypes.CDLL(str(libraries.pop("libnvinfer")))
    for library in libraries.values():
        ctypes.CDLL(str(library))
    stub.stub_log.restype = stub.stub_fields.restype = ctypes.c_char_p
    import tensorrt_bindings

    return stub, tensorrt_bindings


def _plugins(trtllm: Any, release: str, folder: Path) -> list[tuple[str, str, dict, dict]]:
    """What our attention layers hand to ``add_plugin``, of every architecture and cache."""
    attention = trtllm.load("trt_razor.trtllm.attention")
    add, found = attention.add_plugin, []
    cases = [
        Case(kind, TrtLlmOptions(local_cache=cache, kv_dtype=kv_dtype))
        for kind in SPECS
        for cache in caches(release)
        for kv_dtype in ("auto", "fp8")
    ]
    for number, case in enumerate(cases):

        def spy(
            name: str,
            inputs: Mapping[str, Any],
            fields: Mapping[str, Any],
            label: str = f"{case.kind}, {case.options}",
        ) -> Any:
            tensors = {k: (t.trt_tensor.dtype.name, t.trt_tensor.shape) for k, t in inputs.items()}
            found.append((label, name, tensors, dict(fields)))
            return add(name, inputs, fields)

        attention.add_plugin = spy
        build(trtllm, case.model(trtllm, folder / str(number)), case.options)
    attention.add_plugin = add
    return found


def _use(attention: Any, trt: Any, plugins: str) -> Any:
    """Make ``attention`` speak to the real bindings; the network that it adds to."""
    network = trt.Builder(trt.Logger()).create_network(0)
    attention.trt = trt
    attention.find_plugin = lambda _: plugins
    attention.default_trtnet = lambda: network
    attention._create_tensor = lambda output, layer: (output, layer)
    return network


def add_plugins(
    trtllm: Any, release: str, stub: ctypes.CDLL, trt: Any, job: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every plugin of every network, sent and received."""
    attention = trtllm.load("trt_razor.trtllm.attention")
    with tempfile.TemporaryDirectory() as folder:
        calls = _plugins(trtllm, release, Path(folder))
    network = _use(attention, trt, job["plugins"])
    attention.load_plugin_library()
    answers = []
    for label, name, tensors, fields in calls:
        inputs = {}
        for key, (dtype, shape) in tensors.items():
            tensor = network.add_input(key, getattr(trt.DataType, dtype), [int(n) for n in shape])
            inputs[key] = SimpleNamespace(trt_tensor=tensor)
        output, layer = attention.add_plugin(name, inputs, fields)
        answers.append(
            {
                "label": label,
                "inputs": list(tensors),
                "received": [layer.get_input(i).name for i in range(layer.num_inputs)],
                "dtypes": [tensors["qkv"][0], output.dtype.name],
                "fields": fields,
                "stored": stub.stub_fields().decode(),
            }
        )
    return answers


def refusals(
    trtllm: Any, release: str, stub: ctypes.CDLL, trt: Any, job: Mapping[str, Any]
) -> dict[str, Any]:
    """What becomes of wrong fields, inputs and libraries."""
    attention = trtllm.load("trt_razor.trtllm.attention")
    with tempfile.TemporaryDirectory() as folder:
        _, name, tensors, fields = _plugins(trtllm, release, Path(folder))[0]
    network = _use(attention, trt, job["plugins"])
    inputs = {}
    for key, (dtype, shape) in tensors.items():
        tensor = network.add_input(key, getattr(trt.DataType, dtype), [int(n) for n in shape])
        inputs[key] = SimpleNamespace(trt_tensor=tensor)

    def attempt(action: Any) -> list[str]:
        before = len(stub.stub_log())
        try:
            action()
        except RazorError as e:
            return [str(e), stub.stub_log()[before:].decode()]
        return ["", stub.stub_log()[before:].decode()]

    def add(inputs: Mapping[str, Any] = inputs, **changes: Any) -> Any:
        return lambda: attention.add_plugin(name, inputs, {**fields, **changes})

    answer: dict[str, Any] = {"unregistered": attempt(add())}
    library, attention.find_plugin = attention.find_plugin, lambda _: job["stub"] + "/none.so"
    answer["no library"] = attempt(attention.load_plugin_library)
    attention.find_plugin = library
    attention.load_plugin_library()
    count = len(trt.get_plugin_registry().all_creators)
    attention.load_plugin_library()
    answer["creators"] = [count, len(trt.get_plugin_registry().all_creators)]
    answer["right"] = attempt(add())
    answer["wrong value"] = attempt(add(window=-5))
    answer["unknown field"] = attempt(add(anything=1))
    answer["wide"] = attempt(add(ring_slot_bytes=1 << 40))
    answer["wide fields"] = stub.stub_fields().decode()
    swapped = {**inputs, "sequence_length": inputs["qkv"]}
    answer["wrong input"] = attempt(add(swapped))
    return answer


def names(
    trtllm: Any, release: str, stub: ctypes.CDLL, trt: Any, job: Mapping[str, Any]
) -> dict[str, Any]:
    """Names and numbers of enumerations: the double's and the bindings'."""
    double = trtllm.load("tensorrt")
    answer: dict[str, Any] = {}
    for name in ("DataType", "PluginFieldType", "TensorRTPhase", "TensorLocation"):
        ours = {m.name: m.value for m in getattr(double, name)}
        real = {k: m.value for k, m in getattr(trt, name).__members__.items()}
        answer[name] = [ours, {k: real.get(k) for k in ours}]
    flags = {"OnnxParserFlag": "ENABLE_PLUGIN_OVERRIDE"}
    flags |= {"PreviewFeature": "ALIASED_PLUGIN_IO_10_03"}
    flags |= {"ExecutionContextAllocationStrategy": "ON_PROFILE_CHANGE"}
    answer["flags"] = {m: hasattr(getattr(trt, k), m) for k, m in flags.items()}
    answer["version"] = trt.__version__
    try:
        trt.Runtime(trt.Logger())  # the stub has none to give
    except TypeError as e:
        answer["null"] = str(e)
    return answer


TASKS = {"add_plugins": add_plugins, "refusals": refusals, "names": names}

if __name__ == "__main__":
    main()
