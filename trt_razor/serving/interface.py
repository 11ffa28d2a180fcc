"""The public tensors of the five models of a TensorRT-LLM repository, and the ones that we add.

Existing clients name these tensors, so both flavours keep every one of them: name, data type,
dims, optional or not. The tables are those of TensorRT-LLM 1.0 to 1.2 (older releases call
``seed`` and ``min_tokens`` ``random_seed`` and ``min_length``).

A table has one tensor a line: name, data type, dims without the batch axis (-1: any), flags:
``optional`` (a request may leave it out), ``scalar`` (dims [1] reach the model without that axis),
``ragged`` (requests of one batch may differ in size). LOGITS, PROMPT_TABLE and ENCODER_FEATURES
are data types that the public templates leave open: see ``DataTypes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from trt_razor.errors import UsageError

DATA_TYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "STRING", "BF16",
)  # fmt: skip
_FLAGS = ("optional", "scalar", "ragged")


@dataclass(frozen=True)
class DataTypes:
    """The data types that the public templates leave to the one who fills them in.

    logits: of context and generation logits; the stock backend takes FP32 or FP16 and it must be
        what the engine computes. prompt_table: of prompt embeddings. encoder_features: of audio.

    Raises:
        UsageError: a type that no engine has there.
    """

    logits: str = "FP32"
    prompt_table: str = "FP16"
    encoder_features: str = "FP16"

    def __post_init__(self) -> None:
        for field, known in (
            ("logits", ("FP32", "FP16")),
            ("prompt_table", ("FP16", "BF16", "FP32")),
            ("encoder_features", ("FP16", "BF16", "FP32")),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UsageError(
                    f"data type of {field}: expected {' or '.join(known)}, found {value!r}"
                )


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model; ``dims`` without the batch axis, -1 for any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False
    scalar: bool = False
    ragged: bool = False


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of one model, in the order of its table."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def input(self, name: str) -> Tensor:
        """The input of that name. Raises KeyError if there is none."""
        return _find(self.inputs, name)

    def output(self, name: str) -> Tensor:
        """The output of that name. Raises KeyError if there is none."""
        return _find(self.outputs, name)

    def with_types(self, types: DataTypes) -> Interface:
        """The same with the open data types filled in."""
        filled = {
            "LOGITS": types.logits,
            "PROMPT_TABLE": types.prompt_table,
            "ENCODER_FEATURES": types.encoder_features,
        }
        return Interface(
            *(
                tuple(_retyped(t, filled.get(t.data_type, t.data_type)) for t in tensors)
                for tensors in (self.inputs, self.outputs)
            )
        )

    def __add__(self, more: Interface) -> Interface:
        return Interface(self.inputs + more.inputs, self.outputs + more.outputs)


def _find(tensors: tuple[Tensor, ...], name: str) -> Tensor:
    for tensor in tensors:
        if tensor.name == name:
            return tensor
    raise KeyError(name)


def _retyped(t: Tensor, data_type: str) -> Tensor:
    return Tensor(t.name, data_type, t.dims, t.optional, t.scalar, t.ragged)


def _table(text: str) -> tuple[Tensor, ...]:
    """The tensors of a table; a wrong table is an error when this module is imported."""
    tensors = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        name, data_type, dims, *flags = line.split()
        known = (*DATA_TYPES, "LOGITS", "PROMPT_TABLE", "ENCODER_FEATURES")
        if data_type not in known or not set(flags) <= set(_FLAGS):
            raise ValueError(f"wrong line in a table of tensors: {line!r}")
        tensors.append(
            Tensor(
                name,
                data_type,
                tuple(int(d) for d in dims.split(",")),
                optional="optional" in flags,
                scalar="scalar" in flags,
                ragged="ragged" in flags,
            )
        )
    return tuple(tensors)


def _interface(inputs: str = "", outputs: str = "") -> Interface:
    return Interface(_table(inputs), _table(outputs))


# What comes back of a sequence, from tensorrt_llm through the ensemble and the BLS model.
_RESULTS = """
cum_log_probs                       FP32             -1
output_log_probs                    FP32             -1,-1
context_logits                      LOGITS           -1,-1
generation_logits                   LOGITS           -1,-1,-1
batch_index                         INT32            1
sequence_index                      INT32            1
kv_cache_alloc_new_blocks           INT32            1
kv_cache_reused_blocks              INT32            1
kv_cache_alloc_total_blocks         INT32            1
arrival_time_ns                     INT64            1
first_scheduled_time_ns             INT64            1
first_token_time_ns                 INT64            1
last_token_time_ns                  INT64            1
acceptance_rate                     FP32             1
total_accepted_draft_tokens         INT32            1
total_draft_tokens                  INT32            1
num_input_tokens                    INT32            1
num_output_tokens                   INT32            1
"""

# The ensemble's prompt_embedding_table is FP16 in the public template; it must have the type of
# tensorrt_llm's, or the ensemble does not load, so here it follows the same setting.
PUBLIC: dict[str, Interface] = {
    "preprocessing": _interface(
        """
QUERY                               STRING           1
DECODER_QUERY                       STRING           1           optional
IMAGE_BYTES                         UINT8            -1,-1,-1,-1 optional
IMAGE_URL                           STRING           -1          optional
IMAGE_SIZES                         INT64            -1,2        optional
VIDEO_BYTES                         UINT8            -1,-1,-1,-1 optional
REQUEST_OUTPUT_LEN                  INT32            1
BAD_WORDS_DICT                      STRING           -1          optional
STOP_WORDS_DICT                     STRING           -1          optional
EMBEDDING_BIAS_WORDS                STRING           -1          optional
EMBEDDING_BIAS_WEIGHTS              FP32             -1          optional
END_ID                              INT32            1           optional
PAD_ID                              INT32            1           optional
PROMPT_TABLE_EXTRA_ID               UINT64           1           optional
""",
        """
INPUT_ID                            INT32            -1
REQUEST_INPUT_LEN                   INT32            1
DECODER_INPUT_ID                    INT32            -1
REQUEST_DECODER_INPUT_LEN           INT32            1
BAD_WORDS_IDS                       INT32            2,-1
STOP_WORDS_IDS                      INT32            2,-1
EMBEDDING_BIAS                      FP32             -1
REQUEST_OUTPUT_LEN                  INT32            -1
OUT_END_ID                          INT32            1
OUT_PAD_ID                          INT32            1
OUT_PROMPT_TABLE_EXTRA_IDS          UINT64           -1
PIXEL_VALUES                        FP16             -1,-1,-1,-1
ASPECT_RATIO_IDS                    INT64            -1
ASPECT_RATIO_MASK                   INT64            -1,-1
CROSS_ATTENTION_MASK                INT64            -1,-1,-1
IMAGE_SIZES                         INT64            -1,2
IS_VIDEO_INPUT                      BOOL             1
ATTENTION_MASK                      INT64            -1
IMAGE_GRID_THW                      INT64            3
VISION_INPUT_ID                     INT32            -1
""",
    ),
    "tensorrt_llm": _interface(
        """
input_ids                           INT32            -1          optional ragged
encoder_input_features              ENCODER_FEATURES -1,-1       optional ragged
encoder_output_lengths              INT32            1           optional scalar
input_lengths                       INT32            1           scalar
request_output_len                  INT32            1           scalar
num_return_sequences                INT32            1           optional scalar
draft_input_ids                     INT32            -1          optional ragged
decoder_input_ids                   INT32            -1          optional ragged
decoder_input_lengths               INT32            1           optional scalar
draft_logits                        LOGITS           -1,-1       optional ragged
draft_acceptance_threshold          FP32             1           optional scalar
end_id                              INT32            1           optional scalar
pad_id                              INT32            1           optional scalar
stop_words_list                     INT32            2,-1        optional ragged
bad_words_list                      INT32            2,-1        optional ragged
embedding_bias                      FP32             -1          optional ragged
beam_width                          INT32            1           optional scalar
temperature                         FP32             1           optional scalar
runtime_top_k                       INT32            1           optional scalar
runtime_top_p                       FP32             1           optional scalar
runtime_top_p_min                   FP32             1           optional scalar
runtime_top_p_decay                 FP32             1           optional scalar
runtime_top_p_reset_ids             INT32            1           optional scalar
len_penalty                         FP32             1           optional scalar
early_stopping                      BOOL             1           optional scalar
repetition_penalty                  FP32             1           optional scalar
min_tokens                          INT32            1           optional scalar
beam_search_diversity_rate          FP32             1           optional scalar
presence_penalty                    FP32             1           optional scalar
frequency_penalty                   FP32             1           optional scalar
seed                                UINT64           1           optional scalar
return_log_probs                    BOOL             1           optional scalar
return_context_logits               BOOL             1           optional scalar
return_generation_logits            BOOL             1           optional scalar
return_perf_metrics                 BOOL             1           optional scalar
return_num_input_tokens             BOOL             1           optional scalar
return_num_output_tokens            BOOL             1           optional scalar
exclude_input_in_output             BOOL             1           optional scalar
stop                                BOOL             1           optional scalar
streaming                           BOOL             1           optional scalar
prompt_embedding_table              PROMPT_TABLE     -1,-1       optional ragged
prompt_table_extra_ids              UINT64           -1          optional ragged
prompt_vocab_size                   INT32            1           optional scalar
cross_attention_mask                BOOL             -1,-1       optional ragged
mrope_rotary_cos_sin                FP32             -1          optional
mrope_position_deltas               INT64            1           optional
lora_task_id                        UINT64           1           optional scalar
lora_weights                        FP16             -1,-1       optional ragged
lora_config                         INT32            -1,3        optional ragged
context_phase_params                UINT8            -1          optional ragged
skip_cross_attn_blocks              BOOL             1           optional ragged
retention_token_range_starts        INT32            -1          optional ragged
retention_token_range_ends          INT32            -1          optional ragged
retention_token_range_priorities    INT32            -1          optional ragged
retention_token_range_durations_ms  INT32            -1          optional ragged
retention_decode_priority           INT32            1           optional ragged
retention_decode_duration_ms        INT32            1           optional ragged
guided_decoding_guide_type          STRING           1           optional ragged
guided_decoding_guide               STRING           1           optional ragged
lookahead_window_size               INT32            1           optional ragged
lookahead_ngram_size                INT32            1           optional ragged
lookahead_verification_set_size     INT32            1           optional ragged
""",
        """
output_ids                          INT32            -1,-1
sequence_length                     INT32            -1
context_phase_params                UINT8            -1
"""
        + _RESULTS,
    ),
    "postprocessing": _interface(
        """
TOKENS_BATCH                        INT32            -1,-1
SEQUENCE_LENGTH                     INT32            -1
""",
        """
OUTPUT                              STRING           -1
""",
    ),
    "ensemble": _interface(
        """
text_input                          STRING           1
decoder_text_input                  STRING           1           optional
max_tokens                          INT32            1
num_return_sequences                INT32            1           optional
bad_words                           STRING           -1          optional
stop_words                          STRING           -1          optional
exclude_input_in_output             BOOL             1           optional
end_id                              INT32            1           optional
pad_id                              INT32            1           optional
top_k                               INT32            1           optional
top_p                               FP32             1           optional
temperature                         FP32             1           optional
length_penalty                      FP32             1           optional
repetition_penalty                  FP32             1           optional
min_tokens                          INT32            1           optional
presence_penalty                    FP32             1           optional
frequency_penalty                   FP32             1           optional
seed                                UINT64           1           optional
return_log_probs                    BOOL             1           optional
return_context_logits               BOOL             1           optional
return_generation_logits            BOOL             1           optional
return_perf_metrics                 BOOL             1           optional
return_num_input_tokens             BOOL             1           optional
return_num_output_tokens            BOOL             1           optional
beam_width                          INT32            1           optional
stream                              BOOL             1           optional
prompt_embedding_table              PROMPT_TABLE     -1,-1       optional
prompt_table_extra_id               UINT64           1           optional
prompt_vocab_size                   INT32            1           optional
embedding_bias_words                STRING           -1          optional
embedding_bias_weights              FP32             -1          optional
lora_task_id                        UINT64           1           optional
lora_weights                        FP16             -1,-1       optional ragged
lora_config                         INT32            -1,3        optional ragged
guided_decoding_guide_type          STRING           1           optional ragged
guided_decoding_guide               STRING           1           optional ragged
""",
        """
text_output                         STRING           -1
"""
        + _RESULTS,
    ),
    "tensorrt_llm_bls": _interface(
        """
text_input                          STRING           1
decoder_text_input                  STRING           1           optional
image_input                         FP16             -1,3,-1,-1  optional
image_bytes_input                   UINT8            -1,-1,-1,-1 optional
image_url_input                     STRING           1           optional
image_sizes_input                   INT64            -1,2        optional
video_bytes_input                   UINT8            -1,-1,-1,-1 optional
max_tokens                          INT32            1
bad_words                           STRING           -1          optional
stop_words                          STRING           -1          optional
exclude_input_in_output             BOOL             1           optional
end_id                              INT32            1           optional
pad_id                              INT32            1           optional
top_k                               INT32            1           optional
top_p                               FP32             1           optional
temperature                         FP32             1           optional
length_penalty                      FP32             1           optional
repetition_penalty                  FP32             1           optional
min_tokens                          INT32            1           optional
presence_penalty                    FP32             1           optional
frequency_penalty                   FP32             1           optional
seed                                UINT64           1           optional
return_log_probs                    BOOL             1           optional scalar
return_context_logits               BOOL             1           optional scalar
return_generation_logits            BOOL             1           optional scalar
num_return_sequences                INT32            1           optional scalar
beam_width                          INT32            1           optional
stream                              BOOL             1           optional
prompt_embedding_table              PROMPT_TABLE     -1,-1       optional
prompt_vocab_size                   INT32            1           optional
prompt_table_extra_id               UINT64           1           optional
embedding_bias_words                STRING           -1          optional
embedding_bias_weights              FP32             -1          optional
num_draft_tokens                    INT32            1           optional
use_draft_logits                    BOOL             1           optional scalar
lora_task_id                        UINT64           1           optional scalar
lora_weights                        FP16             -1,-1       optional ragged
lora_config                         INT32            -1,3        optional ragged
return_perf_metrics                 BOOL             1           optional scalar
return_num_input_tokens             BOOL             1           optional scalar
return_num_output_tokens            BOOL             1           optional scalar
guided_decoding_guide_type          STRING           1           optional
guided_decoding_guide               STRING           1           optional
""",
        """
text_output                         STRING           -1
"""
        + _RESULTS,
    ),
}
"""The public interface by model name, without the tensors that we add."""

MODELS = tuple(PUBLIC)

_ENGINE_FACTS = """
finish_reason                       STRING           1
kv_cache_used_bytes                 INT64            1
kv_cache_dense_bytes                INT64            1
"""
_PROMPT_FORMAT = "prompt_format STRING 1 optional"

EXTRA: dict[str, Interface] = {
    "preprocessing": _interface("PROMPT_FORMAT STRING 1 optional"),
    "tensorrt_llm": Interface((), ()),
    "postprocessing": Interface((), ()),
    "ensemble": _interface(_PROMPT_FORMAT),
    "tensorrt_llm_bls": _interface(_PROMPT_FORMAT),
}
"""What both flavours add: ``prompt_format`` is raw, chat or messages (see preprocessing)."""

EXTRA_OWN: dict[str, Interface] = {
    "preprocessing": Interface((), ()),
    "tensorrt_llm": _interface("", "text_output STRING -1" + _ENGINE_FACTS),
    "postprocessing": Interface((), ()),
    "ensemble": _interface("", _ENGINE_FACTS),
    "tensorrt_llm_bls": _interface("", _ENGINE_FACTS),
}
"""What only the models around our own engines add: the text, why a sequence ended ("" while it
goes on), the bytes of the sequence's KV cache and what dense attention would hold for it."""


def public_and_extra(model: str, own: bool, types: DataTypes | None = None) -> Interface:
    """All tensors of ``model``: of our own engines' flavour, or of the TensorRT-LLM one."""
    interface = PUBLIC[model] + EXTRA[model]
    if own:
        interface += EXTRA_OWN[model]
    return interface.with_types(types or DataTypes())
