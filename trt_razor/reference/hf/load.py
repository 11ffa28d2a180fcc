"""Models of transformers from anything this package can open: zoo names, GGUF files, folders.

The weights are a ``Checkpoint``'s, the computation is transformers' own: somebody else's word on
what a model does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.checkpoint import Checkpoint, open_checkpoint
from trt_razor.models.spec import ModelSpec, spec_from_hf_config
from trt_razor.models.tokenizer import Tokenizer

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Loaded(NamedTuple):
    """A model, ready for inference.

    Attributes:
        model: of transformers, in eval mode.
        tokenizer: of the checkpoint.
        name: for messages and reports.
        fingerprint: ``ModelSpec.fingerprint``, None for a model that ModelSpec does not know.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    fingerprint: str | None


def load_model(
    name_or_dir: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load a model for inference.

    Args:
        name_or_dir: a zoo name whose weights are installed (``smollm2-135m``), a GGUF file, or a
            Hugging Face folder with safetensors. A folder is read by transformers itself, so it may
            be of any architecture that transformers has; code inside it is never run.
        dtype: of weights and arithmetic.

    Raises:
        UsageError: an unknown name, weights that are not at hand, an architecture or a file format
            that this cannot load, no tokenizer.
        RazorError: damaged files.
    """
    path = Path(name_or_dir).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return _from_folder(path, dtype, device)
    if path.exists():
        checkpoint = open_checkpoint(None, path)
    else:
        checkpoint = open_checkpoint(str(name_or_dir), None)
    tokenizer = _found(checkpoint.tokenizer(), checkpoint.location)
    model = checkpoint_model(checkpoint, dtype, device)
    return Loaded(model, tokenizer, checkpoint.spec.name, checkpoint.spec.fingerprint())


def checkpoint_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """A transformers model with a checkpoint's weights, in eval mode.

    Raises:
        UsageError: an architecture without a class in transformers (Baichuan), another dtype.
        RazorError: transformers' class has other weights than the spec says.
    """
    _check_dtype(dtype)
    config = hf_config(checkpoint.spec)
    names = checkpoint.spec.tensors()
    # transformers says which tensors it missed or did not want; nothing is initialised at random.
    state = {name: torch.from_numpy(_float32(checkpoint, name)).to(dtype) for name in names}
    with _no_bar():
        model, report = type_of(config).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    missing = set(report["missing_keys"]) - {"lm_head.weight"}
    wrong = missing | set(report["unexpected_keys"])
    if wrong or ("lm_head.weight" in report["missing_keys"] and not config.tie_word_embeddings):
        raise RazorError(
            f"{checkpoint.location}: transformers' {type(model).__name__} has other weights; they "
            f"differ in: {', '.join(sorted(wrong)[:4]) or 'lm_head.weight'}"
        )
    return model.to(device).eval()


def hf_config(spec: ModelSpec) -> Any:
    """The configuration object of transformers that means the same model.

    Raises:
        UsageError: Baichuan, whose code transformers does not have.
    """
    if spec.architecture not in _ARCHITECTURES:
        raise UsageError(
            f"{spec.name}: transformers has no class for {spec.architecture}; expected one of "
            f"{', '.join(_ARCHITECTURES)}"
        )
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids) or None,
        "pad_token_id": None,
        **_rope_fields(spec),
    }
    if spec.architecture in ("llama", "qwen3"):
        fields["attention_bias"] = spec.qkv_bias
    if spec.architecture == "llama":
        fields["mlp_bias"] = spec.mlp_bias
    if spec.architecture == "mistral":
        # ModelSpec ends a model's positions where its window does: none is left to slide.
        fields["sliding_window"] = None
    return AutoConfig.for_model(spec.architecture, **fields)


def type_of(config: Any) -> Any:
    """The causal model class of a configuration."""
    return AutoModelForCausalLM._model_mapping[type(config)]


def fingerprint_of(config: Any, name: str) -> str | None:
    """``ModelSpec.fingerprint`` of a transformers configuration; None if ModelSpec refuses it."""
    fields = config.to_dict()
    # How the weights are stored says nothing about what a head does.
    for stored in ("quantization_config", "dtype", "torch_dtype"):
        fields.pop(stored, None)
    try:
        return spec_from_hf_config(fields, name).fingerprint()
    except UsageError:
        return None


def _from_folder(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Loaded:
    _check_dtype(dtype)
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: expected weights as *.safetensors, found none; other formats can carry code "
            f"and are not read"
        )
    tokenizer = _found(Tokenizer.find(folder), str(folder))
    try:
        with _no_bar():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (OSError, ValueError, KeyError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UsageError(f"{folder}: transformers cannot load this model: {reason}") from None
    name = folder.resolve().name
    config = model.config.get_text_config(decoder=True)
    return Loaded(model.to(device).eval(), tokenizer, name, fingerprint_of(config, name))


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the bar that transformers draws over the caller's own output."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _rope_fields(spec: ModelSpec) -> dict[str, Any]:
    """Rotary embedding in the form that transformers 4 and 5 both take."""
    rope = spec.rope
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling == "none":
        return fields
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.scaling == "yarn":
        scaling["beta_fast"], scaling["beta_slow"] = rope.beta_fast, rope.beta_slow
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return {**fields, "rope_scaling": scaling}


def _float32(checkpoint: Checkpoint, name: str) -> Any:
    """A copy that torch may own: weights can be memory-mapped, and NumPy's bfloat16 is unknown to it."""
    return checkpoint.tensor(name).astype("float32")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise UsageError(f"dtype: expected a floating type of 16 to 64 bits, found {dtype}")


def _found(tokenizer: Tokenizer | None, where: str) -> Tokenizer:
    if tokenizer is None:
        raise UsageError(f"{where}: no tokenizer beside the weights; expected a tokenizer.json")
    return tokenizer
