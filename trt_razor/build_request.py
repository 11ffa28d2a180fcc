"""What to build: the request, its weights, and where the result goes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from trt_razor.backends.base import Backend
from trt_razor.engine import foreign_files, is_engine
from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint, random_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.models.stored import read_json
from trt_razor.models.zoo import zoo_names, zoo_spec
from trt_razor.plan_table import human_bytes
from trt_razor.policy import RazorPolicy
from trt_razor.trtllm.engine_config import TrtLlmOptions
from trt_razor.trtllm.quantized import (
    TrtLlmCheckpoint,
    is_trtllm_checkpoint,
    open_trtllm_checkpoint,
)


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
        max_batch_size: slots; None = 16 for tensorrt-llm, 1 otherwise.
        prefill_chunk: prompt tokens read at once; 0 = whole prompts; None = 0 for tensorrt-llm, 2048
            otherwise.
        random_weights: seeded random numbers instead of a checkpoint.
        force: replace an engine that is already at ``output``.
        trtllm: options of backend tensorrt-llm alone; None = its defaults.
        trtllm_version: build for this TensorRT-LLM instead of the installed one; only together with
            ``convert_only``.
        convert_only: for tensorrt-llm: write the converted checkpoint and no engine.
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
    max_batch_size: int | None = None
    prefill_chunk: int | None = None
    random_weights: bool = False
    force: bool = False
    trtllm: TrtLlmOptions | None = None
    trtllm_version: str | None = None
    convert_only: bool = False

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
        if self.backend == "tensorrt-llm":
            if self.convert_only and self.random_weights:
                raise UsageError(
                    "--random-weights: there is nothing to convert; give a --checkpoint"
                )
            if self.trtllm_version is not None and not self.convert_only:
                raise UsageError(
                    "--trtllm-version: an engine is built by the TensorRT-LLM that is installed; only "
                    "--convert-only can be for another one"
                )
            return
        for name, given in (
            ("--convert-only", self.convert_only),
            ("--trtllm-version", self.trtllm_version is not None),
            ("TensorRT-LLM options", self.trtllm not in (None, TrtLlmOptions())),
        ):
            if given:
                raise UsageError(f"{name}: only for --backend tensorrt-llm, found {self.backend}")


def model_spec(request: BuildRequest) -> ModelSpec:
    """The model's shape, without its weights where that can be: from the zoo or a config.json.

    Raises:
        UsageError: no or an unknown model, or a checkpoint of another model than named.
    """
    request.validate()
    if request.checkpoint is None:
        return zoo_spec(request.model or "")
    folder = home(request.checkpoint)
    config = folder / "config.json"
    if request.model is None and config.is_file():
        name = folder.resolve().name
        return spec_from_hf_config(read_json(config, "the model's config.json"), name, str(config))
    return checkpoint_of(request).spec


def checkpoint_of(request: BuildRequest) -> Checkpoint | TrtLlmCheckpoint:
    """Open the weights of a request; for backend tensorrt-llm also a checkpoint in its own format.

    Raises:
        UsageError: no model named, or one whose weights are not at hand (with how to supply them).
        RazorError: a damaged checkpoint.
    """
    request.validate()
    if request.random_weights:
        return random_checkpoint(zoo_spec(request.model or ""))
    folder = None if request.checkpoint is None else home(request.checkpoint)
    if folder is not None and is_trtllm_checkpoint(folder):
        if request.backend != "tensorrt-llm":
            raise UsageError(
                f"{folder}: a checkpoint in TensorRT-LLM's own format; only --backend tensorrt-llm reads "
                f"these, found {request.backend}"
            )
        return open_trtllm_checkpoint(folder, request.model)
    return open_checkpoint(request.model, request.checkpoint)


def safe_name(name: str) -> str:
    """A model's name as a file name: letters, digits and ``._-``, never hidden, at most 80 bytes."""
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip(".-")
    return safe.encode()[:80].decode(errors="ignore") or "model"


def default_output(spec: ModelSpec, razor: bool, backend: str, dtype: str) -> Path:
    """Where an engine goes unless told: below ``engines/`` of the current folder."""
    kind = "razor" if razor else "dense"
    return Path("engines") / f"{safe_name(spec.name)}-{kind}-{backend}-{dtype}"


def dtype_of(request: BuildRequest, backend: Backend) -> str:
    return request.dtype or ("float32" if backend.name == "onnxruntime" else "float16")


def output_of(request: BuildRequest, spec: ModelSpec, backend: str, dtype: str) -> Path:
    if request.output is None:
        return default_output(spec, request.razor, backend, dtype)
    return home(request.output)


def home(path: Path) -> Path:
    """``~`` as in a shell; unlike Path.expanduser, an unknown user is not an error."""
    return Path(os.path.expanduser(path))


def check_output(output: Path, force: bool) -> None:
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


def check_space(output: Path, need: int) -> None:
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
