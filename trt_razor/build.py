"""Building an engine: checkpoint, head map and policy in; an engine directory out."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trt_razor.backends import choose_backend, get_backend
from trt_razor.backends.base import EngineOptions, Progress
from trt_razor.engine import (
    HEADS_FILE,
    TOKENIZER_DIR,
    Engine,
    foreign_files,
    is_engine,
    write_manifest,
)
from trt_razor.errors import RazorError, UsageError
from trt_razor.files import replace_directory
from trt_razor.graph.options import GraphOptions, weight_bytes
from trt_razor.headmap import HeadMap
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.models.stored import read_json
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.plan_table import human_bytes
from trt_razor.policy import RazorPolicy

DEFAULT_SEQ_LEN = 8192
"""Capacity of a slot unless given; less for models with fewer positions."""

RECIPES_ENV = "TRT_RAZOR_RECIPES"
RANDOM_SHARE = 0.15
"""Retrieval share of random weights, which have no retrieval heads: the paper's."""


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        model: name in the zoo, or None with ``checkpoint``. With both, the checkpoint must hold
            that model.
        checkpoint: Hugging Face folder or GGUF file, or None for the model's own weights.
        razor: False = dense attention.
        heads: ``auto`` (a shipped recipe, else find them), or a head map file.
        output: engine directory; None = ``engines/<model>-<razor|dense>-<backend>-<dtype>``.
        policy: what local heads keep; plays no part in a dense engine.
        dtype: None = float32 for onnxruntime, float16 otherwise.
        max_seq_len: capacity of a slot; None = 8192, or the model's positions if fewer.
        max_batch_size: slots.
        prefill_chunk: prompt tokens read at once; 0 = whole prompts.
        random_weights: seeded random numbers instead of a checkpoint.
        force: replace an engine that is already at ``output``.
    """

    model: str | None = None
    checkpoint: Path | None = None
    razor: bool = False
    heads: str = "auto"
    backend: str = "auto"
    output: Path | None = None
    policy: RazorPolicy = field(default_factory=RazorPolicy)
    dtype: str | None = None
    max_seq_len: int | None = None
    max_batch_size: int = 1
    prefill_chunk: int = 2048
    random_weights: bool = False
    force: bool = False

    def validate(self) -> None:
        """Raises UsageError for options that exclude each other."""
        if self.model is None and self.checkpoint is None:
            raise UsageError(
                f"no model: name one with --model NAME (known: {', '.join(zoo_names())}) or give "
                f"--checkpoint PATH"
            )
        if self.random_weights and self.checkpoint is not None:
            raise UsageError("--random-weights and --checkpoint exclude each other; choose one")
        if self.heads != "auto" and not self.razor:
            raise UsageError("--heads: a dense engine has no use for a head map; add --razor")


def model_spec(request: BuildRequest) -> ModelSpec:
    """The model's shape, without its weights where that can be: from the zoo or a config.json.

    Raises:
        UsageError: no or an unknown model, or a checkpoint of another model than named.
    """
    request.validate()
    if request.checkpoint is None:
        return zoo_spec(request.model or "")
    folder = _home(request.checkpoint)
    config = folder / "config.json"
    if request.model is None and config.is_file():
        name = folder.resolve().name
        return spec_from_hf_config(read_json(config, "the model's config.json"), name, str(config))
    return checkpoint_of(request).spec


def checkpoint_of(request: BuildRequest) -> Checkpoint:
    """Open the weights of a request.

    Raises:
        UsageError: no model named, or one whose weights are not at hand (with how to supply them).
        RazorError: a damaged checkpoint.
    """
    request.validate()
    if request.random_weights:
        return random_checkpoint(zoo_spec(request.model or ""))
    return open_checkpoint(request.model, request.checkpoint)


def safe_name(name: str) -> str:
    """A model's name as a file name: letters, digits and ``._-``, never hidden, at most 80 bytes."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip(".-")
    return safe.encode()[:80].decode(errors="ignore") or "model"


def default_output(spec: ModelSpec, razor: bool, backend: str, dtype: str) -> Path:
    """Where an engine goes unless told: below ``engines/`` of the current folder."""
    kind = "razor" if razor else "dense"
    return Path("engines") / f"{safe_name(spec.name)}-{kind}-{backend}-{dtype}"


def recipe_heads(spec: ModelSpec) -> tuple[Path, HeadMap] | None:
    """The head map shipped for a model, found by its fingerprint, whatever its folder is called.

    Looked for in ``$TRT_RAZOR_RECIPES``, in the source tree's ``engines/recipes``, and where a wheel
    put the same files.

    Raises:
        UsageError: a recipe that cannot be read (its own folder's fault, not the model's).
    """
    tree = Path(__file__).resolve().parent.parent / "engines" / "recipes"
    paths = [*sorted(tree.glob("*.heads.json")), *_installed_recipes()]
    if os.environ.get(RECIPES_ENV):
        paths = [*sorted(Path(os.environ[RECIPES_ENV]).glob("*.heads.json")), *paths]
    for path in paths:
        head_map = HeadMap.load(path)
        if head_map.fingerprint == spec.fingerprint():
            return path, head_map
    return None


def _installed_recipes() -> list[Path]:
    """The recipes among the data files of an installed wheel, wherever its scheme puts them."""
    try:
        files = importlib.metadata.files("trt-razor") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (Path(f.locate()) for f in files if f.match("share/trt_razor/recipes/*.heads.json"))
    return sorted(path for path in found if path.is_file())


def resolve_heads(
    request: BuildRequest, checkpoint: Checkpoint, say: Callable[[str], None], progress: Progress
) -> HeadMap:
    """The head map of a Razor build: a file, a shipped recipe, or found now.

    Raises:
        UsageError: a head map of another model. MissingExtra: finding heads needs torch.
    """
    spec = checkpoint.spec
    head_map: HeadMap | None = None
    if request.heads != "auto":
        path = _home(Path(request.heads))
        head_map = HeadMap.load(path)
        head_map.check_model(spec.fingerprint(), spec.name, str(path))
        say(f"heads: {path} ({head_map.method})")
    elif request.random_weights:
        from trt_razor.heads.selection import uniform_share

        head_map = uniform_share(spec, RANDOM_SHARE)
        say(
            f"heads: {RANDOM_SHARE:.0%} spread evenly over the layers (random weights have no "
            f"retrieval heads)"
        )
    elif found := recipe_heads(spec):
        recipe, head_map = found
        say(f"heads: recipe {recipe.name} ({head_map.method})")
    if head_map is None:
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
    backend = get_backend(backend_name)
    say(f"backend: {backend_name} ({why})")
    dtype = request.dtype or ("float32" if backend_name == "onnxruntime" else "float16")

    def options_for(spec: ModelSpec, head_map: HeadMap | None) -> EngineOptions:
        length = request.max_seq_len
        if length is None:
            length = min(DEFAULT_SEQ_LEN, spec.max_positions)
        graph = GraphOptions(request.policy, head_map, length, dtype)
        options = EngineOptions(graph, request.max_batch_size, request.prefill_chunk)
        backend.check(spec, options)
        return options

    if request.model is not None and request.checkpoint is None:
        # What can be refused from the name alone is refused before weights are asked for.
        spec = zoo_spec(request.model)
        _check_output(_output(request, spec, backend_name, dtype), request.force)
        options_for(spec, None)
    checkpoint = checkpoint_of(request)
    spec = checkpoint.spec
    say(f"model: {spec.name} ({spec.architecture}, {spec.num_parameters():,} parameters)")
    output = _output(request, spec, backend_name, dtype)
    _check_output(output, request.force)
    options = options_for(spec, None)  # before heads are searched for minutes
    _check_space(output, weight_bytes(spec, dtype))
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        say("note: the checkpoint has no tokenizer; this engine takes token ids only")
    if request.razor:
        options = options_for(spec, resolve_heads(request, checkpoint, say, progress))
    summary(spec, options)

    with replace_directory(output) as staging:
        facts = backend.build(checkpoint, options, staging, progress)
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
        _check_output(output, request.force)  # something may have come there meanwhile
    return Engine.load(output, verify=False)


def _output(request: BuildRequest, spec: ModelSpec, backend: str, dtype: str) -> Path:
    if request.output is None:
        return default_output(spec, request.razor, backend, dtype)
    return _home(request.output)


def _home(path: Path) -> Path:
    """``~`` as in a shell; unlike Path.expanduser, an unknown user is not an error."""
    return Path(os.path.expanduser(path))


def _check_output(output: Path, force: bool) -> None:
    """Never overwrite what is not an engine of ours, nor an engine without being told to."""
    try:
        if os.path.realpath(output) == os.path.realpath(os.curdir):
            raise UsageError(f"{output}: is the current folder; give a folder in it as --output")
        if not output.exists():
            folder = next(p for p in Path(os.path.abspath(output)).parents if p.exists())
            if not folder.is_dir():
                raise UsageError(f"{folder}: is a file, not a folder; choose another --output")
        elif not output.is_dir():
            raise UsageError(f"{output}: is a file; choose another --output")
        else:
            folder = Path(os.path.realpath(output)).parent
            if any(output.iterdir()):
                _check_replaceable(output, force)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RazorError(f"{folder}: cannot write there; choose another --output")
    except OSError as e:
        raise RazorError(f"{output}: cannot use it as --output: {e.strerror or e}") from None


def _check_replaceable(output: Path, force: bool) -> None:
    if not is_engine(output):
        raise UsageError(
            f"{output}: exists and is not an engine of ours (or a damaged one), so it will not be "
            f"touched; choose another --output, or delete it yourself"
        )
    if not force:
        raise UsageError(f"{output}: an engine is already there; --force rebuilds it")
    foreign = foreign_files(output)
    if foreign:
        others = f" (nor are {len(foreign) - 1} others)" if len(foreign) > 1 else ""
        raise UsageError(
            f"{output / foreign[0]}: not a file of the engine there{others}, and --force would "
            f"delete it; move it away, or choose another --output"
        )


def _check_space(output: Path, need: int) -> None:
    """A lower bound, so that a hopeless build fails at once and not after an hour."""
    folder = next(p for p in Path(os.path.abspath(output)).parents if p.exists())
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < need:
        raise RazorError(
            f"{output}: disk full: the weights need {human_bytes(need)}, {human_bytes(free)} are "
            f"free; free some space, or choose an --output on another disk"
        )
