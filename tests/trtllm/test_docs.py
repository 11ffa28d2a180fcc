"""What docs/ngc.md and docs/tensorrt-llm.md say that can be checked: commands, options, names, messages."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from doc_pages import DESIGN, NGC, ROOT, blocks, commands, parser_of, plan_of, raised, table

import trt_razor.trtllm
from trt_razor import cli_arguments, cli_serving_arguments
from trt_razor.build import TrtLlmCheckpoint
from trt_razor.heads.selection import uniform_share
from trt_razor.models.zoo import zoo_spec
from trt_razor.policy import PRESETS
from trt_razor.trtllm.engine_config import TrtLlmOptions, plan_engine, razor_section
from trt_razor.trtllm.ranks import check_ranks, equalise, rank_layout
from trt_razor.trtllm.release import NoTensorRtLlm, release_of
from trt_razor.trtllm.runtime import check_world

BOTH = pytest.mark.parametrize("text", [NGC, DESIGN], ids=["ngc", "tensorrt-llm"])


# Commands ---------------------------------------------------------------------------------------
PARSERS = {
    "heads": cli_arguments.heads_arguments,
    "plan": cli_arguments.plan_arguments,
    "build": cli_arguments.build_arguments,
    "inspect": cli_arguments.inspect_arguments,
    "triton": cli_serving_arguments.triton_arguments,
}


@pytest.mark.parametrize("shell", ["bash"])
def test_shell_commands_parse(shell: str) -> None:
    for block in blocks(NGC):
        done = subprocess.run([shell, "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{block}"


@BOTH
def test_our_commands_take_these_options(text: str) -> None:
    seen = 0
    for words in commands(text):
        if words[:1] == ["trt-razor"]:
            add, rest = PARSERS[words[1]], words[2:]
        elif words[:2] == ["python", "build_scripts/build_engine.py"]:
            add, rest = PARSERS["build"], words[2:]
        else:
            continue
        _, unknown = parser_of(add).parse_known_args([w.strip('"') for w in rest])
        assert not unknown, words
        seen += 1
    assert seen >= 2


def test_the_build_that_users_are_told_is_accepted() -> None:
    """The large model's commands, up to what needs an installed TensorRT-LLM."""
    builds = [w for w in commands(NGC) if "--tp-size" in w and "build_scripts/build_engine.py" in w]
    assert len(builds) == 2
    for words in builds:
        args = parser_of(cli_arguments.build_arguments).parse_args(words[2:])
        plan = plan_of(args.model, args.tp_size, args.max_seq_len or 8192)
        assert plan.tp_size == 8


def test_options_that_are_named_exist() -> None:
    """Also those in running text and tables, unless they are another program's."""
    known = {
        name
        for add in PARSERS.values()
        for action in parser_of(add)._actions
        for name in action.option_strings
    }
    latency = (ROOT / "benchmarks" / "latency.py").read_text()
    known |= set(re.findall(r'"(--[a-z-]+)"', latency))
    docker = {
        "--rm",
        "--gpus",
        "--interactive",
        "--tty",
        "--ipc",
        "--ulimit",
        "--publish",
        "--volume",
    }
    docker |= {"--tag", "--build-arg", "--yes", "--no-deps", "--runtime"}
    theirs = {  # of TensorRT-LLM's programs, Triton's launcher, mpirun
        "--allow-run-as-root", "--backend", "--disable_chunked_context", "--engine_dir", "--dataset",
        "--extra_llm_api_options", "--fast_build", "--host", "--max_batch_size", "--max_input_len",
        "--max_num_tokens", "--max_seq_len", "--model_cls_file", "--model_cls_name", "--model_path",
        "--model_repo", "--port", "--streamingllm", "--tokenizer", "--tp_size", "--use_fp8_context_fmha",
        "--use_paged_context_fmha", "--workers", "--world_size", "--checkpoint_dir", "--output_dir",
        "--gemm_plugin", "--model",
    }  # fmt: skip
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", NGC + DESIGN))
    assert named - known - docker - theirs == set()
    assert {"--tp-size", "--kv-dtype", "--local-cache", "--convert-only"} <= named


def test_option_table_is_the_parsers() -> None:
    parser = parser_of(cli_arguments.build_arguments)
    actions = {name: a for a in parser._actions for name in a.option_strings}
    told = " ".join(row[0] for row in table(DESIGN, "`trt-razor build"))
    mine = {
        a for a in actions if parser_group(parser, a) == "TensorRT-LLM (--backend tensorrt-llm)"
    }
    assert mine <= set(re.findall(r"--[a-z-]+", told))
    for name, choices in re.findall(r"`(--[a-z-]+) (\w+\|\w+)`", told):
        assert set(choices.split("|")) <= set(actions[name].choices or ())


def parser_group(parser: argparse.ArgumentParser, option: str) -> str | None:
    for group in parser._action_groups:
        if any(option in a.option_strings for a in group._group_actions):
            return group.title
    return None


# Names ------------------------------------------------------------------------------------------
@BOTH
def test_files_that_are_named_exist(text: str) -> None:
    folders = "benchmarks|build_scripts|docs|docker|plugins|tests|trt_razor"
    named = set(re.findall(rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w)", text))
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    for name in named - {"trt_razor/kernels"}:
        assert (ROOT / name).exists(), name
    assert named


@BOTH
def test_make_targets_exist(text: str) -> None:
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text()
    for target in targets & {"test-ngc", "plugin"}:
        assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", makefile, re.M), target
    assert "test-ngc" in targets


def test_images_are_the_dockerfiles() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name, default in re.findall(r"^ARG (\w*IMAGE)=(\S+)", dockerfile, re.M):
        (row,) = [r for r in table(NGC, "`--build-arg`") if r[0] == f"`{name}`"]
        assert row[1] == f"`{default}`"
    arguments = set(re.findall(r"^ARG (\w+)", dockerfile, re.M))
    assert {row[0].strip("`") for row in table(NGC, "`--build-arg`")} == arguments
    said = re.search(r"# TensorRT-LLM 1\.0\.0: (.*)", dockerfile)
    assert said is not None
    for release, tags in (
        ("1.0.0", "25.09 25.10"),
        ("1.1.0", "25.12 26.02"),
        ("1.2.1", "26.04 26.07"),
    ):
        (row,) = [r for r in table(NGC, "image") if r[1] == release]
        for tag in tags.split():
            assert tag in row[0]
            assert tag in said[0]
        caches = [c.name.lower() for c in release_of(release).local_caches]
        assert re.findall(r"`(\w+)`", row[4]) == caches


def test_chips_are_those_that_we_compile_for() -> None:
    cmake = (ROOT / "cmake" / "RazorCuda.cmake").read_text()
    found = re.search(r"set\(RAZOR_ARCHITECTURES (.*)\)", cmake)
    assert found is not None
    ours = {a.removesuffix("-real") for a in found[1].split()}
    (row,) = [r for r in table(NGC, "`--build-arg`") if r[0] == "`ARCHS`"]
    assert set(re.findall(r"(\d+)-real", row[2])) == ours
    listed = re.search(r"compute capability ([\d., or]+)", NGC)
    assert listed is not None
    assert {v.replace(".", "") for v in re.findall(r"\d+\.\d", listed[1])} == ours


def python_code() -> list[str]:
    heredocs = re.findall(r"<<'EOF'\n(.*?)\nEOF", "\n".join(blocks(NGC)), re.S)
    fenced = re.findall(r"```python\n(.*?)```", DESIGN, re.S)
    return [c for c in (*heredocs, *fenced) if "import" in c]


def test_python_code_calls_what_there_is() -> None:
    assert len(python_code()) == 2
    for code in python_code():
        tree = ast.parse(code)
        names: dict[str, object] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                names |= {a.name: getattr(module, a.name) for a in node.names}
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            owner = call.func
            target = names.get(owner.id) if isinstance(owner, ast.Name) else None
            if isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name):
                opened = {"executor": "trt_razor.trtllm.executor.TrtLlmExecutor"}
                kind = opened.get(owner.value.id)
                if kind is not None:
                    module_name, _, name = kind.rpartition(".")
                    target = getattr(
                        getattr(importlib.import_module(module_name), name), owner.attr
                    )
            if callable(target) and not isinstance(target, type(Path)) and target is not print:
                arguments = [None] * (len(call.args) + (isinstance(owner, ast.Attribute)))
                keywords = {k.arg: None for k in call.keywords if k.arg}
                inspect.signature(target).bind(*arguments, **keywords)


def test_model_classes_of_trtllm_build_exist() -> None:
    tree = ast.parse((ROOT / "trt_razor" / "trtllm" / "models.py").read_text())
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    named = set(re.findall(r"\bRazor\w+ForCausalLM\b", DESIGN))
    assert named == {c for c in classes if c.endswith("ForCausalLM")}


@pytest.mark.parametrize(
    "algorithm, words, reason",
    [
        ("W8A16", "W8A16, W4A16", "quantises it while it builds"),
        ("W4A16", "W8A16, W4A16", "interleaved"),
        ("W4A16_GPTQ", "GPTQ", "interleaved"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "FP8 per token and channel", "attention layer of its own"),
        ("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "SmoothQuant", "attention layer of its own"),
        ("W4A8_QSERVE_PER_GROUP", "QServe", "attention layer of its own"),
        ("W4A8_AWQ", "W4A8", "not supported"),
        ("NVFP4", "NVFP4", "not supported"),
        ("FP8_BLOCK_SCALES", "FP8 with block scales", "not supported"),
        ("INT8", "INT8", "not supported"),
        ("MIXED_PRECISION", "mixed", "another format"),
    ],
)
def test_formats_that_are_refused(algorithm: str, words: str, reason: str) -> None:
    """A checkpoint without rules for its tensors is one whose heads cannot move."""
    spec = zoo_spec("llama3.1-8b")
    checkpoint = TrtLlmCheckpoint(spec, "DIR", {}, 1, 1, algorithm, None, None, {})  # type: ignore[arg-type]
    assert reason in raised(checkpoint.check_permutable)
    (row,) = [r for r in quantised_rows() if words in r[0]]
    assert not row[1].startswith("yes")


def quantised_rows() -> list[list[str]]:
    part = DESIGN[DESIGN.index("**Quantised.**") :]
    lines = part[: part.index("\n## ")].splitlines()
    return [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in lines
        if line.startswith("| ") and len(line) > 6
    ]


# Messages ---------------------------------------------------------------------------------------
def other_ranks() -> None:
    spec = zoo_spec("qwen-72b")
    heads = equalise(uniform_share(spec, 0.15), 4)
    section = razor_section(spec, heads, rank_layout(heads, 4), PRESETS["paper"])
    plan_engine(spec, section, 32768, "float16", TrtLlmOptions(tp_size=8), release_of("1.0.0"))


OURS: dict[str, Callable[[], str]] = {
    "tensorrt_llm: not installed": lambda: str(NoTensorRtLlm()),
    "TensorRT-LLM: expected 1.0, 1.1 and 1.2, found …": lambda: raised(lambda: release_of("2.0.0")),
    "tp_size: the checkpoint's heads are ordered for … ranks": lambda: raised(other_ranks),
    "tp_size: 8 leaves each rank one of the 8 KV heads": lambda: raised(
        lambda: check_ranks(zoo_spec("llama3.1-8b"), 8, True)
    ),
    "ranks: expected 8 processes for this engine": lambda: raised(lambda: check_world(8)),
}
SOURCES = {  # said by C++ and by code that needs a machine of another kind
    "libtrt_razor_plugins_trt10.so: not found": (
        "trt_razor/backends/tensorrt.py",
        "{name}: not found in",
    ),
    "preload: expected TensorRT 10, found version …": (
        "plugins/tensorrt/preload.cpp",
        '"expected TensorRT " RAZOR_STRING(RAZOR_TRT_MAJOR) ", found version "',
    ),
    "expected the planned window 6564, found …": (
        "plugins/tensorrt/razor_gpt_attention/razor_gpt_attention_plugin.cpp",
        "expected the planned window ",
    ),
}
THEIRS = {
    "Assertion failed: sinkTokenLength > 0",
    "Cannot find plugin", "IPluginCreator not found", "Failed to deserialize cuda engine",
    "getPluginCreator could not find plugin: RazorGptAttention",
    "object '…' from LD_PRELOAD cannot be preloaded",
    "maxAttentionWindowVec too large to fit at least one sequence in kvCache",
    "streamLLM is not supported at the moment",
    "RNN based model doesn't support Chunked Context now",
    "RNN based model doesn't support beam search now",
    "Chunked context requires context FMHA, paged kv_cache and paged context FMHA",
    "Without enabling chunked context, the max context length (…) needs to be less than or equal to the max number of tokens",
    "Input tensor '…' not found", "Length of head_per_layer (…) must match number of attention layers",
}  # fmt: skip


def test_messages_in_the_table_are_said_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    monkeypatch.delenv("PMI_SIZE", raising=False)
    rows = table(NGC, "message")
    told = {m for row in rows for m in re.findall(r"`([^`]* [^`]*)`", row[0])}
    assert told == {*OURS, *SOURCES, *THEIRS}
    for message, produce in OURS.items():
        pattern = ".+".join(map(re.escape, message.split("…")))
        assert re.search(pattern, produce()), produce()
    for path, text in SOURCES.values():
        assert text in (ROOT / path).read_text()


# The package -------------------------------------------------------------------------------------
def test_the_package_names_its_modules() -> None:
    listed = re.findall(r"^    ``(\w+)`` ", trt_razor.trtllm.__doc__ or "", re.M)
    folder = ROOT / "trt_razor/trtllm"
    assert sorted(listed) == sorted(p.stem for p in folder.glob("[!_]*.py"))
