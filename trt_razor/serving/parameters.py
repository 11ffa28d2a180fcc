"""The parameters of the five models: what each may be, and what it is unless told otherwise.

Every parameter is a string in ``config.pbtxt``. The stock backend takes a value that it cannot
read for "not set", and ``4096abc`` for 4096, with a line in its log at most; so the values are
checked here, before they are written and again when a repository is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trt_razor.errors import UsageError, did_you_mean

Value = str | bool | int | float | Sequence[int] | None
"""A parameter's value as a caller gives it; None = not set."""

INT32 = 2**31 - 1
INT64 = 2**63 - 1

# What the words of the tables mean.
#   int>=N    a whole number, 32 bits        size      bytes, 64 bits
#   fraction  between 0 and 1, both excluded share     from 0 to 1
#   ints>=N   whole numbers, "," between     groups    lists of whole numbers, ";" between
#   bool      true or false                  tree      groups in braces: {0, 0}, {0, 1}
#   folder    exists; relative: to the model's own folder
#   place     an absolute folder             file      an absolute file
#   path      any path, not looked at        model     a model of the repository
#   none      does not apply: only empty     a|b       one of these words
# A "?" behind it: the value may be empty, which means "not set". The last column is the value
# unless told otherwise: "-" is empty, "!" has to be given.
_TENSORRT_LLM = """
max_beam_width                   int>=1?    1
FORCE_CPU_ONLY_INPUT_TENSORS     no|yes     no
gpt_model_type                   inflight_fused_batching|inflight_batching|V1|v1  inflight_fused_batching
gpt_model_path                   place      !
encoder_model_path               place?     -
max_tokens_in_paged_kv_cache     int>=1?    -
max_attention_window_size        ints>=1?   -
sink_token_length                int>=0?    -
batch_scheduler_policy           guaranteed_no_evict|max_utilization  guaranteed_no_evict
kv_cache_free_gpu_mem_fraction   fraction?  0.9
cross_kv_cache_fraction          fraction?  -
kv_cache_host_memory_bytes       size?      0
kv_cache_onboard_blocks          bool?      true
exclude_input_in_output          bool       false
cancellation_check_period_ms     int>=1?    100
stats_check_period_ms            int>=1?    100
iter_stats_max_iterations        int>=0?    1000
request_stats_max_iterations     int>=0?    0
enable_kv_cache_reuse            bool       false
normalize_log_probs              bool?      true
enable_chunked_context           bool?      false
gpu_device_ids                   groups?    -
participant_ids                  groups?    -
num_nodes                        int>=1?    1
lora_cache_optimal_adapter_size  int>=1?    8
lora_cache_max_adapter_size      int>=1?    64
lora_cache_gpu_memory_fraction   fraction?  0.05
lora_cache_host_memory_bytes     size?      1073741824
lora_prefetch_dir                place?     -
decoding_mode                    top_k|top_p|top_k_top_p|beam_search|medusa|redrafter|lookahead|eagle|?  top_k_top_p
executor_worker_path             path       /opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker
lookahead_window_size            int>=1?    -
lookahead_ngram_size             int>=1?    -
lookahead_verification_set_size  int>=1?    -
medusa_choices                   tree?      -
eagle_choices                    tree?      -
gpu_weights_percent              share?     1.0
enable_context_fmha_fp32_acc     bool?      false
multi_block_mode                 bool?      true
cuda_graph_mode                  bool?      false
cuda_graph_cache_size            int>=0?    0
speculative_decoding_fast_logits bool?      false
tokenizer_dir                    path?      -
guided_decoding_backend          xgrammar|? -
xgrammar_tokenizer_info_path     file?      -
"""

# Our own engines. The public keys stay; those that are not here do not apply and are empty.
_OWN_ENGINE = """
max_beam_width                   1                        1
FORCE_CPU_ONLY_INPUT_TENSORS     yes                      yes
gpt_model_type                   inflight_fused_batching  inflight_fused_batching
gpt_model_path                   folder                   !
batch_scheduler_policy           guaranteed_no_evict      guaranteed_no_evict
exclude_input_in_output          bool                     true
cancellation_check_period_ms     int>=1                   100
enable_kv_cache_reuse            false                    false
enable_chunked_context           true                     true
num_nodes                        1                        1
decoding_mode                    top_k_top_p              top_k_top_p
tokenizer_dir                    folder?                  -
"""
_OWN_EXTRA = """
slots                            int>=1?                  -
max_queue_size                   int>=0                   64
max_input_tokens                 int>=1?                  -
max_output_tokens                int>=1?                  -
verify                           bool                     true
"""
_PREPROCESSING = """
tokenizer_dir                    folder                   !
add_special_tokens               bool                     true
multimodal_model_path            none?                    -
gpt_model_path                   path?                    -
max_num_images                   none?                    -
prompt_format                    raw|chat|messages        raw
vocab_size                       int>=1?                  -
max_input_tokens                 int>=1?                  -
"""
_POSTPROCESSING = """
tokenizer_dir                    folder                   !
skip_special_tokens              bool                     true
"""
_BLS = """
accumulate_tokens                bool                     false
tensorrt_llm_model_name          model                    tensorrt_llm
tensorrt_llm_draft_model_name    none?                    -
multimodal_encoders_name         none?                    -
text_from_engine                 bool                     false
exclude_input_in_output          bool                     false
tokenizer_dir                    folder?                  -
skip_special_tokens              bool                     true
"""
ENVIRONMENT = "EXECUTION_ENV_PATH"
"""A Python environment for a python model; the only parameter that may be there or not."""


@dataclass(frozen=True)
class Parameter:
    """One row of a table. ``default`` None: has to be given."""

    name: str
    kind: str
    default: str | None
    empty: bool

    def problem(self, value: str) -> str | None:
        """'expected …, found …' for a value that it may not have, else None."""
        if "${" in value:
            return f"expected a value, found the placeholder {value!r:.80}"
        if not value:
            return None if self.empty else f"expected {self._expected()}, found nothing"
        if _fits(self.kind, value):
            return None
        return f"expected {self._expected()}, found {value!r:.80}"

    def _expected(self) -> str:
        kind, _, least = self.kind.partition(">=")
        words = {
            "int": f"a whole number from {least} to {INT32}",
            "ints": f"whole numbers from {least} to {INT32} with ',' between them",
            "groups": "lists of whole numbers: ',' inside a list, ';' between lists",
            "size": "a number of bytes",
            "fraction": "a number between 0 and 1",
            "share": "a number from 0 to 1",
            "bool": "true or false",
            "tree": "lists of whole numbers in braces, such as {0, 0}, {0, 1}",
            "place": "an absolute path of a folder",
            "file": "an absolute path of a file",
            "folder": "a path of a folder",
            "path": "a path",
            "model": "the name of a model",
        }
        text = words.get(kind, " or ".join(kind.split("|")))
        return f"{text}, or nothing" if self.empty else text


_NUMBER = r"(?:0|[1-9][0-9]*)"
_NUMBERS = rf"{_NUMBER}(?:,{_NUMBER})*"
_BRACES = rf"\{{ ?{_NUMBER}(?:, ?{_NUMBER})* ?\}}"
_DECIMAL = r"[0-9]*\.?[0-9]+(?:[eE]-?[0-9]+)?"


def _fits(kind: str, value: str) -> bool:
    kind, _, least = kind.partition(">=")
    if kind in ("int", "ints"):
        pattern = _NUMBER if kind == "int" else _NUMBERS
        return bool(re.fullmatch(pattern, value)) and all(
            _within(n, int(least), INT32) for n in value.split(",")
        )
    if kind == "size":
        return bool(re.fullmatch(_NUMBER, value)) and _within(value, 0, INT64)
    if kind in ("groups", "tree"):
        pattern = (
            rf"{_NUMBERS}(?:;{_NUMBERS})*" if kind == "groups" else rf"{_BRACES}(?:, ?{_BRACES})*"
        )
        return bool(re.fullmatch(pattern, value)) and all(
            _within(n, 0, INT32) for n in re.findall("[0-9]+", value)
        )
    if kind in ("fraction", "share"):
        if not re.fullmatch(_DECIMAL, value):
            return False
        number = float(value)
        return 0 < number < 1 if kind == "fraction" else 0 <= number <= 1
    if kind == "bool":
        return value in ("true", "false")
    if kind in ("place", "file"):
        return value.startswith("/") and _printable(value)
    if kind in ("folder", "path"):
        return _printable(value)
    if kind == "model":
        return bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", value))
    return value in kind.split("|")


def _within(digits: str, least: int, most: int) -> bool:
    # The length first: int() of thousands of digits takes long or raises.
    return len(digits) <= 20 and least <= int(digits) <= most


def _printable(value: str) -> bool:
    """Not blank, and no line ends or other control characters."""
    return bool(value.strip()) and not re.search(r"[\0-\x1f\x7f]", value)


def _rows(text: str) -> Iterator[Parameter]:
    for line in text.split("\n"):
        if line.strip():
            name, kind, default = line.split()
            empty = kind.endswith("?")
            value = None if default == "!" else "" if default == "-" else default
            row = Parameter(name, kind.rstrip("?").rstrip("|"), value, empty)
            if value is not None and row.problem(value) is not None:
                raise ValueError(f"wrong default in a table of parameters: {line!r}")
            yield row


def _table(*texts: str) -> dict[str, Parameter]:
    return {row.name: row for text in texts for row in _rows(text)}


def _own_engine() -> dict[str, Parameter]:
    """All public keys in their order, then ours."""
    applies = _table(_OWN_ENGINE)
    table = {
        name: applies.get(name, Parameter(name, "none", "", True)) for name in _table(_TENSORRT_LLM)
    }
    return {**table, **_table(_OWN_EXTRA)}


_SHARED = {
    "preprocessing": _table(_PREPROCESSING),
    "postprocessing": _table(_POSTPROCESSING),
    "ensemble": {},
    "tensorrt_llm_bls": _table(_BLS),
}
PARAMETERS: dict[bool, dict[str, dict[str, Parameter]]] = {
    False: {**_SHARED, "tensorrt_llm": _table(_TENSORRT_LLM)},
    True: {**_SHARED, "tensorrt_llm": _own_engine()},
}
"""[own engine][model][parameter]; own False = the stock backend of TensorRT-LLM."""

_ENVIRONMENT = Parameter(ENVIRONMENT, "path", None, False)
_DEPENDENT = {
    ("decoding_mode", "lookahead"): (
        "lookahead_window_size",
        "lookahead_ngram_size",
        "lookahead_verification_set_size",
    ),
    ("guided_decoding_backend", "xgrammar"): ("xgrammar_tokenizer_info_path",),
    ("text_from_engine", "false"): ("tokenizer_dir",),
}


def rendered(value: Value) -> str:
    """A value as the file has it: booleans as true and false, lists with commas."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    return ",".join(str(n) for n in value)


def fill(model: str, own: bool, values: Mapping[str, Value]) -> dict[str, str]:
    """All parameters of a model: its defaults, and ``values`` over them.

    Raises:
        UsageError: an unknown parameter, a value that it may not have, or one that is missing.
    """
    table = PARAMETERS[own][model]
    given = {name: rendered(value) for name, value in values.items()}
    filled = {name: given.get(name, row.default or "") for name, row in table.items()}
    filled.update((name, value) for name, value in given.items() if name not in filled)
    for problem in problems(model, own, filled):
        raise UsageError(f"model {model!r}: {problem}")
    return filled


def problems(model: str, own: bool, values: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the parameters of a model, one line each."""
    table = PARAMETERS[own][model]
    for name in table:
        if name not in values:
            yield f"parameter {name!r} is missing"
    for name, value in values.items():
        row = table.get(name)
        if name == ENVIRONMENT and (own or model != "tensorrt_llm") and model != "ensemble":
            row = _ENVIRONMENT
        if row is None:
            known = did_you_mean(name, table) if table else "this model has none"
            yield f"unknown parameter {name!r}; {known}"
        elif row.kind == "none" and value:
            yield f"parameter {name!r} does not apply here; leave it empty"
        elif (problem := row.problem(value)) is not None:
            yield f"parameter {name!r}: {problem}"
    for (name, value), needed in _DEPENDENT.items():
        if values.get(name) == value and name in table:
            for other in needed:
                if not values.get(other):
                    yield f"parameter {other!r}: expected a value, as {name} is {value}; found nothing"
