"""What the Python models share: tensors and texts of a request, parameters, errors, paths.

Triton gives its Python interface only inside its own process, so it is imported where it is used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trt_razor.errors import RazorError, UsageError
from trt_razor.models.tokenizer import Tokenizer

MAX_TEXT_BYTES = 16 << 20
"""Longest text a request may bring: far more than any context holds."""

_TRUE = ("true", "t", "1", "yes", "y")
_FALSE = ("false", "f", "0", "no", "n")


def triton() -> Any:
    """Triton's Python interface (``pb_utils``)."""
    return importlib.import_module("triton_python_backend_utils")


# A model's configuration -------------------------------------------------------------------------
def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """Parameters of a model from what its ``initialize`` gets; empty ones are left out."""
    given = json.loads(args["model_config"]).get("parameters", {})
    return {k: v["string_value"] for k, v in given.items() if v.get("string_value")}


def is_decoupled(args: Mapping[str, str]) -> bool:
    """Whether the model may send any number of responses to a request."""
    policy = json.loads(args["model_config"]).get("model_transaction_policy") or {}
    return bool(policy.get("decoupled"))


def output_names(args: Mapping[str, str]) -> tuple[str, ...]:
    """Names of a model's outputs."""
    return tuple(o["name"] for o in json.loads(args["model_config"])["output"])


def flag(given: Mapping[str, str], name: str, default: bool) -> bool:
    """A parameter that is true or false, in any of the usual spellings.

    Raises:
        UsageError: another word.
    """
    value = given.get(name)
    if value is None:
        return default
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise UsageError(f"parameter {name}: expected true or false, found '{value}'")


def size(given: Mapping[str, str], name: str) -> int | None:
    """A parameter that is a whole number of at least 1; None = not set.

    Raises:
        UsageError: something else.
    """
    value = given.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and int(value) > 0):
        raise UsageError(f"parameter {name}: expected a whole number >= 1, found '{value:.40}'")
    return int(value)


def model_path(args: Mapping[str, str], value: str) -> Path:
    """A path of a parameter; a relative one starts at the model's own folder."""
    return Path(args["model_repository"]) / value


def load_tokenizer(args: Mapping[str, str]) -> Tokenizer:
    """The tokenizer that the parameter ``tokenizer_dir`` names.

    Raises:
        UsageError: no such parameter, folder or file, or a kind that is not supported.
        RazorError: a damaged file.
    """
    value = parameters(args).get("tokenizer_dir")
    if value is None:
        raise UsageError("parameter tokenizer_dir: expected the tokenizer's folder, found nothing")
    folder = model_path(args, value)
    if not folder.is_dir():
        raise UsageError(
            f"parameter tokenizer_dir: expected the tokenizer's folder, found nothing at {folder}; "
            f"write the model repository again with 'trt-razor triton'"
        )
    return Tokenizer.load(folder)


# Requests -----------------------------------------------------------------------------------------
def array(request: Any, name: str) -> np.ndarray | None:
    """An input of a request, or None if it has none of that name."""
    tensor = triton().get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def arrays(request: Any, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those inputs of a request that it has."""
    found = {name: array(request, name) for name in names}
    return {name: a for name, a in found.items() if a is not None}


def text(value: Any, where: str, limit: int = MAX_TEXT_BYTES) -> str:
    """A string element (bytes) as text.

    Raises:
        UsageError: it is too long or no UTF-8, naming the first bad byte.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (bytes, np.bytes_)):
        raise UsageError(f"{where}: expected a string, found {type(value).__name__}")
    if len(value) > limit:
        raise UsageError(f"{where}: {len(value)} bytes; at most {limit} are accepted")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{where}: expected UTF-8, found byte 0x{value[e.start]:02x} at offset {e.start} "
            f"({e.reason})"
        ) from None


def rows(values: np.ndarray) -> np.ndarray:
    """A tensor [batch] or [batch, …] as [batch, elements]."""
    return values.reshape(len(values), -1) if values.size else values.reshape(len(values), 0)


def one(values: np.ndarray, name: str) -> Any:
    """The only element of a tensor of one request.

    Raises:
        UsageError: there is not exactly one.
    """
    if values.size != 1:
        raise UsageError(f"{name}: expected 1 value, found {values.size}")
    return values.reshape(-1)[0]


def label(name: str, row: int, count: int) -> str:
    """How a message names a row of an input: with its index if there are several."""
    return name if count == 1 else f"{name}[{row}]"


# Responses ----------------------------------------------------------------------------------------
def tensor(name: str, values: np.ndarray) -> Any:
    """A tensor of a response or of a request to another model."""
    return triton().Tensor(name, np.ascontiguousarray(values))


def strings(values: Iterable[str]) -> np.ndarray:
    """Texts as Triton keeps them: [n] UTF-8 bytes in an object array."""
    encoded = [v.encode("utf-8", "replace") for v in values]
    result = np.empty(len(encoded), object)
    result[:] = encoded
    return result


def error(e: BaseException | str, code: str = "") -> Any:
    """An error for a response: one line, and a code that tells a client's mistake from ours.

    Args:
        code: name of a code of ``TritonError``; by default the error's own ``triton_code``,
            INVALID_ARG for a ``UsageError``, INTERNAL for others.
    """
    passed = getattr(e, "error", None)
    if isinstance(e, RazorError) and passed is not None:  # of a model behind this one
        return passed
    kind = triton().TritonError
    default = "INVALID_ARG" if isinstance(e, UsageError) else "INTERNAL"
    code = code or getattr(e, "triton_code", default)
    message = " ".join((str(e) or type(e).__name__).split())
    if isinstance(e, BaseException) and not isinstance(e, RazorError):
        message = f"unexpected {type(e).__name__}: {message}"
    return kind(message, getattr(kind, code)) if hasattr(kind, code) else kind(message)


def error_response(e: BaseException | str, code: str = "") -> Any:
    """A response that is an error."""
    return triton().InferenceResponse(output_tensors=[], error=error(e, code))


def log_unexpected(where: str, e: BaseException) -> None:
    """Put the trace of an error that nobody foresaw into the server's log."""
    import traceback

    trace = "".join(traceback.format_exception(type(e), e, e.__traceback__))
    triton().Logger.log_error(f"{where}: {trace}")


def load_failure(e: RazorError) -> Exception:
    """What ``initialize`` raises so that the server's log and its answer have the one line."""
    return triton().TritonModelException(str(e))
