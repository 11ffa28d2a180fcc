"""The five models of a repository, in the two flavours that we write.

* TensorRT-LLM engines: ``tensorrt_llm`` is the stock ``tensorrtllm`` backend, the ensemble is wired
  as in the public templates;
* our own engines: ``tensorrt_llm`` is a Python model that has the text as well, so the ensemble
  takes it from there; ``postprocessing`` stands beside it for those who call it.

Preprocessing, postprocessing and ``tensorrt_llm_bls`` are Python models of ours in both.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field

from trt_razor.errors import UsageError
from trt_razor.serving.config import DynamicBatching, ModelConfig, Pairs, Step
from trt_razor.serving.interface import EXTRA_OWN, PUBLIC, DataTypes, public_and_extra
from trt_razor.serving.parameters import Value, fill
from trt_razor.serving.wiring import check_models

HEADER = "Written by trt-razor. Checked when it was written; see README.md for what may be changed."


@dataclass(frozen=True)
class _Settings:
    """What both flavours have.

    Attributes:
        engine_dir: the engine (``gpt_model_path`` of ``tensorrt_llm``).
        tokenizer_dir: of preprocessing and postprocessing; relative = to each model's folder.
        vocab_size: of the engine, which the stock backend wants an embedding_bias to have; None = the
            tokenizer's, often smaller.
        max_input_tokens: longest prompt of a request; None = what the engine holds.
        max_batch_size: rows of the largest request.
        parameters: more parameters of ``tensorrt_llm``, over the defaults in ``parameters.py``.
    """

    engine_dir: str
    tokenizer_dir: str = "1/tokenizer"
    vocab_size: int | None = None
    max_input_tokens: int | None = None
    max_batch_size: int = 8
    prompt_format: str = "raw"
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    exclude_input_in_output: bool = True
    accumulate_tokens: bool = False
    preprocessing_instances: int = 1
    postprocessing_instances: int = 1
    bls_instances: int = 4
    data_types: DataTypes = field(default_factory=DataTypes)
    parameters: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size",
            "preprocessing_instances",
            "postprocessing_instances",
            "bls_instances",
        ):
            _at_least(1, name, getattr(self, name))


@dataclass(frozen=True)
class TrtllmSettings(_Settings):
    """A repository around the stock backend. ``engine_dir`` is an absolute path.

    Attributes:
        max_queue_size: requests that may wait; 0 = no limit.
        decoupled: answers may stream; False = one response a request, and no batches.
    """

    max_queue_size: int = 0
    decoupled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, "max_queue_size", self.max_queue_size)


@dataclass(frozen=True)
class OwnSettings(_Settings):
    """A repository around our own engines. ``engine_dir`` may be relative to the model's folder.

    Attributes:
        slots: sequences that generate at a time; None = the engine's max_batch_size.
        max_queue_size: requests that may wait for a slot; more are refused.
        max_output_tokens: most tokens of an answer; None = what the engine holds.
        verify: check the engine's checksums when the model loads.
    """

    slots: int | None = None
    max_queue_size: int = 64
    max_output_tokens: int | None = None
    verify: bool = True


def trtllm_configs(settings: TrtllmSettings) -> list[ModelConfig]:
    """The configs of the five models around a TensorRT-LLM engine.

    Raises:
        UsageError: a setting or parameter that cannot be; its message names it.
    """
    parameters = {
        "gpt_model_path": settings.engine_dir,
        "exclude_input_in_output": settings.exclude_input_in_output,
        **settings.parameters,
    }
    engine = _model(
        "tensorrt_llm",
        settings,
        own=False,
        parameters=parameters,
        backend="tensorrtllm",
        decoupled=settings.decoupled,
        dynamic_batching=_batching(settings, settings.max_queue_size),
        instances=1,
    )
    return _repository(settings, engine, settings.max_queue_size, settings.decoupled)


def own_configs(settings: OwnSettings) -> list[ModelConfig]:
    """The configs of the five models around one of our own engines.

    Raises:
        UsageError: a setting or parameter that cannot be; its message names it.
    """
    parameters = {
        "gpt_model_path": settings.engine_dir,
        "exclude_input_in_output": settings.exclude_input_in_output,
        "slots": settings.slots,
        "max_queue_size": settings.max_queue_size,
        "max_input_tokens": settings.max_input_tokens,
        "max_output_tokens": settings.max_output_tokens,
        "verify": settings.verify,
        **settings.parameters,
    }
    engine = _model(
        "tensorrt_llm",
        settings,
        own=True,
        parameters=parameters,
        backend="python",
        decoupled=True,
        # The model takes every request at once and keeps its own queue: see max_queue_size there.
        dynamic_batching=_batching(settings, 0),
        instances=1,  # a second one would be a second engine, and stop requests would miss it
    )
    return _repository(settings, engine, 0, True)


def _repository(
    settings: _Settings, engine: ModelConfig, max_queue_size: int, decoupled: bool
) -> list[ModelConfig]:
    own = isinstance(settings, OwnSettings)
    configs = [
        _model(
            "preprocessing",
            settings,
            own=own,
            parameters={
                "tokenizer_dir": settings.tokenizer_dir,
                "add_special_tokens": settings.add_special_tokens,
                "prompt_format": settings.prompt_format,
                "vocab_size": settings.vocab_size,
                "max_input_tokens": settings.max_input_tokens,
            },
            dynamic_batching=_batching(settings, max_queue_size),
            instances=settings.preprocessing_instances,
        ),
        engine,
        _model(
            "postprocessing",
            settings,
            own=own,
            parameters={
                "tokenizer_dir": settings.tokenizer_dir,
                "skip_special_tokens": settings.skip_special_tokens,
            },
            dynamic_batching=DynamicBatching(),
            instances=settings.postprocessing_instances,
        ),
        _model("ensemble", settings, own=own, platform="ensemble", steps=_ensemble_steps(own)),
        _model(
            "tensorrt_llm_bls",
            settings,
            own=own,
            parameters={
                "accumulate_tokens": settings.accumulate_tokens,
                "text_from_engine": own,
                "exclude_input_in_output": engine.parameter("exclude_input_in_output"),
                "tokenizer_dir": _beside("preprocessing", settings.tokenizer_dir),
                "skip_special_tokens": settings.skip_special_tokens,
            },
            decoupled=decoupled,
            instances=settings.bls_instances,
        ),
    ]
    for problem in check_models(configs):
        raise UsageError(problem)
    return configs


def _model(
    name: str,
    settings: _Settings,
    *,
    own: bool,
    parameters: Mapping[str, Value] | None = None,
    backend: str = "",
    platform: str = "",
    decoupled: bool | None = None,
    dynamic_batching: DynamicBatching | None = None,
    instances: int = 0,
    steps: tuple[Step, ...] = (),
) -> ModelConfig:
    values = dict(parameters or {})
    if not platform and not backend:
        backend = "python"
    tensors = public_and_extra(name, own, settings.data_types)
    return ModelConfig(
        name=name,
        max_batch_size=settings.max_batch_size,
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        backend=backend,
        platform=platform,
        decoupled=decoupled,
        dynamic_batching=dynamic_batching,
        instances=instances,
        parameters=tuple(fill(name, own, values).items()),
        steps=steps,
        comment=HEADER,
    )


def _batching(settings: _Settings, max_queue_size: int) -> DynamicBatching:
    return DynamicBatching((settings.max_batch_size,), max_queue_size=max_queue_size)


def _beside(model: str, path: str) -> str:
    """A path relative to another model's folder, as the models of a repository see it."""
    return path if posixpath.isabs(path) else posixpath.join("..", model, path)


def _at_least(least: int, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name}: expected a whole number of at least {least}, found {value!r}")


# The ensemble -------------------------------------------------------------------------------------
# One line an entry: the model's tensor, the ensemble's (the same name if it is not given). Names
# that begin with "_" live between two steps.
_TO_PREPROCESSING = """
QUERY text_input
DECODER_QUERY decoder_text_input
REQUEST_OUTPUT_LEN max_tokens
BAD_WORDS_DICT bad_words
STOP_WORDS_DICT stop_words
EMBEDDING_BIAS_WORDS embedding_bias_words
EMBEDDING_BIAS_WEIGHTS embedding_bias_weights
END_ID end_id
PAD_ID pad_id
PROMPT_TABLE_EXTRA_ID prompt_table_extra_id
PROMPT_FORMAT prompt_format
"""
_FROM_PREPROCESSING = """
INPUT_ID _INPUT_ID
REQUEST_INPUT_LEN _REQUEST_INPUT_LEN
DECODER_INPUT_ID _DECODER_INPUT_ID
REQUEST_DECODER_INPUT_LEN _REQUEST_DECODER_INPUT_LEN
REQUEST_OUTPUT_LEN _REQUEST_OUTPUT_LEN
BAD_WORDS_IDS _BAD_WORDS_IDS
STOP_WORDS_IDS _STOP_WORDS_IDS
EMBEDDING_BIAS _EMBEDDING_BIAS
OUT_END_ID _PREPROCESSOR_END_ID
OUT_PAD_ID _PREPROCESSOR_PAD_ID
OUT_PROMPT_TABLE_EXTRA_IDS _OUT_PROMPT_TABLE_EXTRA_IDS
"""
_TO_ENGINE = """
input_ids _INPUT_ID
input_lengths _REQUEST_INPUT_LEN
decoder_input_ids _DECODER_INPUT_ID
decoder_input_lengths _REQUEST_DECODER_INPUT_LEN
request_output_len _REQUEST_OUTPUT_LEN
bad_words_list _BAD_WORDS_IDS
stop_words_list _STOP_WORDS_IDS
embedding_bias _EMBEDDING_BIAS
end_id _PREPROCESSOR_END_ID
pad_id _PREPROCESSOR_PAD_ID
prompt_table_extra_ids _OUT_PROMPT_TABLE_EXTRA_IDS
runtime_top_k top_k
runtime_top_p top_p
len_penalty length_penalty
streaming stream
temperature
repetition_penalty
presence_penalty
frequency_penalty
min_tokens
seed
beam_width
num_return_sequences
exclude_input_in_output
return_log_probs
return_context_logits
return_generation_logits
return_perf_metrics
return_num_input_tokens
return_num_output_tokens
prompt_embedding_table
prompt_vocab_size
lora_task_id
lora_weights
lora_config
guided_decoding_guide_type
guided_decoding_guide
"""
_ENGINE_TO_POSTPROCESSING = """
output_ids _TOKENS_BATCH
sequence_length _SEQUENCE_LENGTH
"""
_TO_POSTPROCESSING = """
TOKENS_BATCH _TOKENS_BATCH
SEQUENCE_LENGTH _SEQUENCE_LENGTH
"""


def _entries(text: str) -> Pairs:
    lines = [line.split() for line in text.split("\n") if line]
    return tuple((words[0], words[-1]) for words in lines)


def _ensemble_steps(own: bool) -> tuple[Step, ...]:
    passed_on = tuple(
        (t.name, t.name) for t in PUBLIC["ensemble"].outputs if t.name != "text_output"
    )
    preprocessing = Step(
        "preprocessing", _entries(_TO_PREPROCESSING), _entries(_FROM_PREPROCESSING)
    )
    if own:
        extra = tuple((t.name, t.name) for t in EXTRA_OWN["ensemble"].outputs)
        text = (("text_output", "text_output"),)
        return (preprocessing, Step("tensorrt_llm", _entries(_TO_ENGINE), text + passed_on + extra))
    return (
        preprocessing,
        Step(
            "tensorrt_llm",
            _entries(_TO_ENGINE),
            _entries(_ENGINE_TO_POSTPROCESSING) + passed_on,
        ),
        Step("postprocessing", _entries(_TO_POSTPROCESSING), _entries("OUTPUT text_output")),
    )
