"""Building an engine: checkpoint, head map and policy in; an engine directory out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trt_razor.backends import choose_backend, get_backend
from trt_razor.backends.base import EngineOptions, Progress
from trt_razor.engine import (
    HEADS_FILE,
    TOKENIZER_DIR,
    Engine,
    is_engine,
    write_manifest,
)
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import replace_directory
from trt_razor.graph.options import GraphOptions
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from trt_razor.models.spec import ModelSpec
from trt_razor.models.zoo import zoo_spec
from trt_razor.policy import RazorPolicy

DEFAULT_SEQ_LEN = 8192
"""Capacity of a slot unless given; less for models with fewer positions."""

RECIPES_ENV = "TRT_RAZOR_RECIPES"


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: name in the zoo, or None with ``checkpoint``.
        checkpoint: Hugging Face folder or GGUF file, or None for the model's own weights.
        razor: False = dense attention.
        heads: ``auto`` (a shipped recipe, else find them), or a head map file.
        output: engine directory; None = ``engines/<model>-<razor|dense>-<backend>-<dtype>``.
        dtype: None = float32 for onnxruntime, float16 otherwise.
        max_seq_len: None = 8192, or the model's positions if fewer.
    """

    model: str | None = None
    checkpoint: Path | None = None
    razor: bool = False
    heads: str = "auto"
    backend: str = "auto"
    output: Path | None = None
    policy: RazorPolicy = RazorPolicy()
    dtype: str | None = None
    max_seq_len: int | None = None
    max_batch_size: int = 1
    prefill_chunk: int = 2048
    random_weights: bool = False
    force: bool = False


def model_spec(request: BuildRequest) -> ModelSpec:
    """The model's shape, from the zoo's name alone where that is enough."""
    if request.checkpoint is None and request.model is not None:
        return zoo_spec(request.model)
    return checkpoint_of(request).spec


def checkpoint_of(request: BuildRequest) -> Checkpoint:
    """Open the weights of a request.

    Raises:
        UsageError: no model named, or one whose weights are not at hand (with how to supply them).
        RazorError: a damaged checkpoint.
    """
    if request.random_weights:
        if request.checkpoint is not None:
            raise UsageError("--random-weights and --checkpoint exclude each other; choose one")
        if request.model is None:
            raise UsageError("--random-weights needs --model NAME")
        return random_checkpoint(zoo_spec(request.model))
    return open_checkpoint(request.model, request.checkpoint)


def default_output(spec: ModelSpec, razor: bool, backend: str, dtype: str) -> Path:
    return Path("engines") / f"{spec.name}-{'razor' if razor else 'dense'}-{backend}-{dtype}"


def recipe_heads(spec: ModelSpec) -> Path | None:
    """The head map shipped for a model, or None.

    Looked for in ``$TRT_RAZOR_RECIPES`` and then in the source tree's ``engines/recipes``.
    """
    folders = [Path(__file__).resolve().parent.parent / "engines" / "recipes"]
    if os.environ.get(RECIPES_ENV):
        folders.insert(0, Path(os.environ[RECIPES_ENV]))
    for folder in folders:
        path = folder / f"{spec.name}.heads.json"
        if path.is_file():
            return path
    return None


def resolve_heads(
    request: BuildRequest, checkpoint: Checkpoint, say: Callable[[str], None], progress: Progress
) -> HeadMap:
    """The head map of a Razor build: a file, a shipped recipe, or found now.

    Raises:
        UsageError: a head map of another model. MissingExtra: finding heads needs torch.
    """
    spec = checkpoint.spec
    if request.heads != "auto":
        path = Path(request.heads)
        head_map = HeadMap.load(path)
        head_map.check_model(spec.fingerprint(), spec.name, str(path))
        say(f"heads: {path} ({head_map.method})")
    elif request.random_weights:
        from trt_razor.heads.selection import uniform_share

        head_map = uniform_share(spec, 0.15)
        say("heads: 15 % spread evenly over the layers (random weights have no retrieval heads)")
    elif recipe := recipe_heads(spec):
        head_map = HeadMap.load(recipe)
        head_map.check_model(spec.fingerprint(), spec.name, str(recipe))
        say(f"heads: recipe {recipe.name} ({head_map.method})")
    else:
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
    backend_name, why = choose_backend(request.backend)
    backend = get_backend(backend_name)
    say(f"backend: {backend_name} ({why})")
    dtype = request.dtype or ("float32" if backend_name == "onnxruntime" else "float16")

    if request.model is not None or request.checkpoint is None:
        # Everything that can be refused from the name alone is refused before weights are opened.
        spec = zoo_spec(request.model or "")
        _check_output(_output(request, spec, backend_name, dtype), request.force)
    checkpoint = checkpoint_of(request)
    spec = checkpoint.spec
    say(f"model: {spec.name} ({spec.architecture}, {spec.num_parameters():,} parameters)")
    output = _output(request, spec, backend_name, dtype)
    _check_output(output, request.force)

    max_seq_len = request.max_seq_len or min(DEFAULT_SEQ_LEN, spec.max_positions)
    graph = GraphOptions(request.policy, None, max_seq_len, dtype)
    options = EngineOptions(graph, request.max_batch_size, request.prefill_chunk)
    backend.check(spec, options)  # before heads are searched for minutes
    if request.razor:
        head_map = resolve_heads(request, checkpoint, say, progress)
        graph = GraphOptions(request.policy, head_map, max_seq_len, dtype)
        options = EngineOptions(graph, request.max_batch_size, request.prefill_chunk)
        backend.check(spec, options)
    summary(spec, options)

    with replace_directory(output) as staging:
        facts = backend.build(checkpoint, options, staging, progress)
        if graph.head_map is not None:
            graph.head_map.save(staging / HEADS_FILE)
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            say("note: the checkpoint has no tokenizer; this engine takes token ids only")
        else:
            tokenizer.save(staging / TOKENIZER_DIR)
        total = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            progress("checksums", done, total)

        write_manifest(staging, spec, checkpoint.identity(), backend_name, facts, options, count)
    return Engine.load(output, verify=False)


def _output(request: BuildRequest, spec: ModelSpec, backend: str, dtype: str) -> Path:
    return request.output or default_output(spec, request.razor, backend, dtype)


def _check_output(output: Path, force: bool) -> None:
    """Never overwrite what is not an engine, nor an engine without being told to."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output}: is a file; choose another --output")
    if not any(output.iterdir()):
        return
    if not is_engine(output):
        raise UsageError(
            f"{output}: exists and is not an engine of ours; it will not be touched, choose another "
            f"--output"
        )
    if not force:
        raise UsageError(f"{output}: an engine is already there; --force rebuilds it")
    if not os.access(output.parent, os.W_OK):
        raise RazorError(f"{output.parent}: not writable")
