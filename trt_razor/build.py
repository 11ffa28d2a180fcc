"""Building an engine: checkpoint, head map and policy in; an engine directory out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trt_razor.backends import choose_backend, get_backend
from trt_razor.backends.base import Backend, EngineOptions, Progress
from trt_razor.build_request import (
    BuildRequest,
    check_output,
    check_space,
    checkpoint_of,
    default_output,
    dtype_of,
    home,
    model_spec,
    output_of,
    safe_name,
)
from trt_razor.engine import HEADS_FILE, TOKENIZER_DIR, Engine, write_manifest
from trt_razor.errors import UsageError
from trt_razor.files import replace_directory
from trt_razor.graph.options import GraphOptions, weight_bytes
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.models.zoo import zoo_spec
from trt_razor.recipes import recipe_heads
from trt_razor.trtllm.backend import TensorRtLlmBackend, section_of
from trt_razor.trtllm.engine_config import TrtLlmOptions
from trt_razor.trtllm.engine_json import local_cache_of
from trt_razor.trtllm.options import check_quantization
from trt_razor.trtllm.quantized import TrtLlmCheckpoint
from trt_razor.trtllm.release import release_of

__all__ = [
    "BuildRequest",
    "build_engine",
    "checkpoint_of",
    "default_output",
    "model_spec",
    "resolve_heads",
    "safe_name",
]

DEFAULT_SEQ_LEN = 8192
"""Capacity of a slot unless given; less for models with fewer positions."""
DEFAULT_PREFILL_CHUNK = 2048
"""Prompt tokens read at once unless given; TensorRT-LLM reads prompts whole unless told otherwise."""
DEFAULT_SERVER_BATCH = 16
"""Sequences of a TensorRT-LLM engine unless given; other engines have one slot."""

RANDOM_SHARE = 0.15
"""Retrieval share of random weights, which have no retrieval heads: the paper's."""


def resolve_heads(
    request: BuildRequest,
    checkpoint: Checkpoint | TrtLlmCheckpoint,
    say: Callable[[str], None],
    progress: Progress,
) -> HeadMap:
    """The head map of a Razor build: a file, a shipped recipe, or found now.

    Raises:
        UsageError: a head map of another model. MissingExtra: finding heads needs torch.
    """
    spec = checkpoint.spec
    head_map: HeadMap | None = None
    if request.heads != "auto":
        path = home(Path(request.heads))
        head_map = _load_heads(path, spec)
        say(f"heads: {path} ({head_map.method})")
    elif request.random_weights:
        from trt_razor.heads.selection import uniform_share

        head_map = uniform_share(spec, RANDOM_SHARE)
        say(
            f"heads: {RANDOM_SHARE:.0%} spread evenly over the layers (random weights have no "
            f"retrieval heads)"
        )
    elif isinstance(checkpoint, TrtLlmCheckpoint) and _own_heads(checkpoint).is_file():
        head_map = _load_heads(_own_heads(checkpoint), spec)
        say(f"heads: {_own_heads(checkpoint)} ({head_map.method})")
    elif found := recipe_heads(spec):
        recipe, head_map = found
        say(f"heads: recipe {recipe.name} ({head_map.method})")
    if head_map is None:
        if isinstance(checkpoint, TrtLlmCheckpoint):
            raise UsageError(
                f"{checkpoint.location}: heads cannot be found in a checkpoint of TensorRT-LLM; find "
                f"them in the original one (trt-razor heads --checkpoint DIR) and give --heads FILE"
            )
        from trt_razor.heads.find import find_heads

        say(f"heads: no recipe for {spec.name}; finding them now (--heads FILE to reuse a map)")
        head_map = find_heads(checkpoint, None, progress)
    if head_map.checkpoint is not None and head_map.checkpoint != checkpoint.identity():
        say(
            "note: the head map was found on other weights of the same architecture; heads usually "
            "carry over to fine-tunes, evaluate before relying on it"
        )
    return head_map


def build_engine(
    request: BuildRequest,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
    summary: Callable[[ModelSpec, EngineOptions], None] = lambda spec, options: None,
) -> Engine:
    """Build an engine directory; an existing engine is replaced only by a finished one.

    Args:
        say: called with one line for each decision taken.
        progress: see ``backends.base.Progress``.
        summary: called once before the long part, with what will be built.

    Raises:
        UsageError: impossible request. RazorError: it failed; nothing half-made is left.
    """
    request.validate()
    backend_name, why = choose_backend(request.backend)
    backend = backend_of(request, backend_name)
    say(f"backend: {backend_name} ({why})")
    check_early(request, backend)
    checkpoint = checkpoint_of(request)
    spec = checkpoint.spec
    say(f"model: {spec.name} ({spec.architecture}, {spec.num_parameters():,} parameters)")
    request, backend = as_stored(request, backend, checkpoint)
    dtype = dtype_of(request, backend)
    output = output_of(request, spec, backend_name, dtype)
    check_output(output, request.force)
    options = options_of(request, backend, spec, None)  # before heads are searched for minutes
    check_space(output, _disk_need(request, backend, spec))
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        say("note: the checkpoint has no tokenizer; this engine takes token ids only")
    if request.razor:
        head_map = final_heads(resolve_heads(request, checkpoint, say, progress), backend, say)
        options = options_of(request, backend, spec, head_map)
    summary(spec, options)
    if isinstance(backend, TensorRtLlmBackend) and (line := backend.describe(spec, options)):
        say(line)

    with replace_directory(output) as staging:
        facts = backend.build(checkpoint, options, staging, progress)  # type: ignore[arg-type]
        if options.graph.head_map is not None:
            options.graph.head_map.save(staging / HEADS_FILE)
        if tokenizer is not None:
            tokenizer.save(staging / TOKENIZER_DIR)
        total = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            progress("checksums", done, total)

        write_manifest(staging, spec, checkpoint.identity(), backend_name, facts, options, count)
        check_output(output, request.force)  # something may have come there meanwhile
    return Engine.load(output, verify=False)


def backend_of(request: BuildRequest, name: str) -> Backend:
    if name != "tensorrt-llm":
        return get_backend(name)
    release = None if request.trtllm_version is None else release_of(request.trtllm_version)
    return TensorRtLlmBackend(
        request.trtllm or TrtLlmOptions(),
        release,
        request.razor,
        request.random_weights,
        request.convert_only,
    )


def check_early(request: BuildRequest, backend: Backend) -> None:
    """What can be refused from the name alone is refused before weights are asked for."""
    if request.model is None or request.checkpoint is not None:
        return
    spec = zoo_spec(request.model)
    if not request.convert_only:
        check_output(
            output_of(request, spec, backend.name, dtype_of(request, backend)), request.force
        )
    options_of(request, backend, spec, None)


def options_of(
    request: BuildRequest, backend: Backend, spec: ModelSpec, head_map: HeadMap | None
) -> EngineOptions:
    """Checked by the backend."""
    length, chunk, batch = request.max_seq_len, request.prefill_chunk, request.max_batch_size
    server = backend.name == "tensorrt-llm"
    if length is None:
        length = min(DEFAULT_SEQ_LEN, spec.max_positions)
    if chunk is None:
        chunk = 0 if server else DEFAULT_PREFILL_CHUNK
    if batch is None:
        batch = DEFAULT_SERVER_BATCH if server else 1
    graph = GraphOptions(request.policy, head_map, length, dtype_of(request, backend))
    options = EngineOptions(graph, batch, chunk)
    backend.check(spec, options)
    return options


def final_heads(head_map: HeadMap, backend: Backend, say: Callable[[str], None]) -> HeadMap:
    """The head map that is really built: TensorRT-LLM's ranks need equal counts."""
    if not isinstance(backend, TensorRtLlmBackend):
        return head_map
    equal = backend.heads(head_map)
    added = equal.num_retrieval - head_map.num_retrieval
    if added:
        layers = " and every layer the same number" if backend.options.pp_size > 1 else ""
        say(
            f"heads: {added} added to the {head_map.num_retrieval} that retrieve, so that each of "
            f"{backend.options.tp_size} ranks has equally many of a layer{layers} "
            f"({equal.share:.1%} in all)"
        )
    return equal


def as_stored(
    request: BuildRequest, backend: Backend, checkpoint: Checkpoint | TrtLlmCheckpoint
) -> tuple[BuildRequest, Backend]:
    """A checkpoint in TensorRT-LLM's format has its dtype and its cache type fixed, and may say where
    local heads shall live.

    Raises:
        UsageError: another one is asked for.
    """
    if not isinstance(checkpoint, TrtLlmCheckpoint):
        return request, backend
    dtype = checkpoint.spec.torch_dtype
    if request.dtype not in (None, dtype):
        raise UsageError(
            f"dtype: {checkpoint.location} is a checkpoint in {dtype}, found {request.dtype}; leave "
            "--dtype out, or convert the original one"
        )
    request = replace(request, dtype=dtype)
    assert isinstance(backend, TensorRtLlmBackend)
    if request.razor:
        # Minutes before heads would be moved, or a network made.
        if section_of(Path(checkpoint.location)) is None:
            checkpoint.check_permutable()
        where = f"{checkpoint.location}: quantization"
        check_quantization(checkpoint.quant_algo, checkpoint.kv_cache_quant_algo, where)
    if checkpoint.kv_cache_quant_algo == "FP8":
        backend = replace(backend, options=replace(backend.options, kv_dtype="fp8"))
    cache = local_cache_of(checkpoint.config, checkpoint.location)
    if backend.options.local_cache is None and cache in backend.the_release().local_caches:
        backend = replace(backend, options=replace(backend.options, local_cache=cache))
    return request, backend


def _disk_need(request: BuildRequest, backend: Backend, spec: ModelSpec) -> int:
    """Bytes that a build writes at least; TensorRT-LLM has a converted checkpoint beside the engines."""
    if isinstance(backend, TensorRtLlmBackend):
        return (1 if request.random_weights else 2) * weight_bytes(spec, dtype_of(request, backend))
    return weight_bytes(spec, dtype_of(request, backend))


def _load_heads(path: Path, spec: ModelSpec) -> HeadMap:
    """Raises UsageError: not a head map, or one of another model."""
    head_map = HeadMap.load(path)
    head_map.check_model(spec.fingerprint(), spec.name, str(path))
    found = head_map.num_layers, head_map.num_kv_heads
    if found != (spec.num_layers, spec.num_kv_heads):
        raise UsageError(
            f"{path}: expected {spec.num_layers} layers of {spec.num_kv_heads} KV heads, those of "
            f"'{spec.name}', found {found[0]} of {found[1]}; find the heads again: trt-razor heads"
        )
    return head_map


def _own_heads(checkpoint: TrtLlmCheckpoint) -> Path:
    """Where ``convert_only`` puts the head map of a checkpoint."""
    return Path(checkpoint.location) / HEADS_FILE
