"""Converting a checkpoint for TensorRT-LLM without building an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trt_razor.backends.base import Progress
from trt_razor.build import (
    as_stored,
    backend_of,
    check_early,
    final_heads,
    options_of,
    resolve_heads,
)
from trt_razor.build_request import (
    BuildRequest,
    check_output,
    check_space,
    checkpoint_of,
    dtype_of,
    output_of,
)
from trt_razor.engine import HEADS_FILE
from trt_razor.errors import UsageError
from trt_razor.files import replace_directory
from trt_razor.graph.options import weight_bytes
from trt_razor.trtllm.backend import TensorRtLlmBackend


def convert_only(
    request: BuildRequest,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Write the TensorRT-LLM checkpoint of a Razor engine, heads in order, and build nothing.

    The folder can be given to ``trtllm-build`` (docs/tensorrt-llm.md), or to a later build as its
    checkpoint. Needs no TensorRT-LLM, but its version if none is installed.

    Returns:
        the folder, by default ``engines/<model>-<razor|dense>-tensorrt-llm-<dtype>-checkpoint``.

    Raises:
        UsageError: impossible request, or the output exists. RazorError: it failed; nothing is left.
    """
    request.validate()
    backend = backend_of(request, "tensorrt-llm")
    assert isinstance(backend, TensorRtLlmBackend)
    check_early(request, backend)
    checkpoint = checkpoint_of(request)
    spec = checkpoint.spec
    say(f"model: {spec.name} ({spec.architecture}, {spec.num_parameters():,} parameters)")
    request, backend = as_stored(request, backend, checkpoint)
    assert isinstance(backend, TensorRtLlmBackend)
    dtype = dtype_of(request, backend)
    output = output_of(request, spec, "tensorrt-llm", dtype)
    if request.output is None:
        output = output.with_name(f"{output.name}-checkpoint")
    _check_new(output)
    options = options_of(request, backend, spec, None)
    check_space(output, weight_bytes(spec, dtype))
    if request.razor:
        head_map = final_heads(resolve_heads(request, checkpoint, say, progress), backend, say)
        options = options_of(request, backend, spec, head_map)
    tokenizer = checkpoint.tokenizer()
    with replace_directory(output, "checkpoint") as staging:
        backend.convert(checkpoint, options, staging, progress)
        if options.graph.head_map is not None:
            options.graph.head_map.save(staging / HEADS_FILE)
        if tokenizer is not None:
            tokenizer.save(staging)  # beside the weights, as in a Hugging Face folder
        _check_new(output)  # something may have come there meanwhile
    return output


def _check_new(output: Path) -> None:
    """Nothing is ever replaced, not even with ``--force``: no manifest tells what is ours there."""
    if output.is_dir() and any(output.iterdir()):
        raise UsageError(
            f"{output}: exists and is not empty; choose another --output, or delete it"
        )
    check_output(output, force=False)
