"""Parameters of the model ``tensorrt_llm`` of our own engines, from the texts in config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_razor.errors import UsageError


@dataclass(frozen=True)
class EngineSettings:
    """How an engine is served.

    Attributes:
        engine: its directory.
        slots: sequences at once; None = the engine's max_batch_size.
        max_queue_size: sequences that may wait for a slot.
        max_input_tokens, max_output_tokens: limits of a request; None = what the engine holds.
        verify: check the engine's checksums at load.
        exclude_input_in_output: for requests that do not say it.
        cancellation_check_period_ms: how often a request is asked whether its client has gone.
    """

    engine: Path
    slots: int | None = None
    max_queue_size: int = 64
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    verify: bool = True
    exclude_input_in_output: bool = True
    cancellation_check_period_ms: int = 100

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], folder: Path) -> EngineSettings:
        """Read a model's parameters; an empty text is as good as none.

        Args:
            folder: of the model in its repository; a relative engine path starts there.

        Raises:
            UsageError: names the parameter, what was expected and what was found.
        """
        given = {k: v.strip() for k, v in parameters.items() if v.strip()}
        path = given.get("gpt_model_path")
        if path is None:
            raise UsageError("parameter gpt_model_path: expected an engine directory, found none")
        return cls(
            engine=folder / path,
            slots=_int(given, "slots", 1),
            max_queue_size=_int(given, "max_queue_size", 0, cls.max_queue_size) or 0,
            max_input_tokens=_int(given, "max_input_tokens", 1),
            max_output_tokens=_int(given, "max_output_tokens", 1),
            verify=_bool(given, "verify", True),
            exclude_input_in_output=_bool(given, "exclude_input_in_output", True),
            cancellation_check_period_ms=_int(given, "cancellation_check_period_ms", 1, 100) or 100,
        )


def _int(given: Mapping[str, str], name: str, low: int, default: int | None = None) -> int | None:
    text = given.get(name)
    if text is None:
        return default
    # Not int(): that takes "1_000" and digits of other scripts.
    if not (text.isascii() and text.isdigit()) or not low <= int(text) <= 10**9:
        raise UsageError(f"parameter {name}: expected an integer >= {low}, found {text!r:.60}")
    return int(text)


def _bool(given: Mapping[str, str], name: str, default: bool) -> bool:
    text = given.get(name)
    if text is None:
        return default
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise UsageError(f"parameter {name}: expected true or false, found {text!r:.60}")
    return known[text.lower()]
