"""Double of ``tensorrt_llm.bindings.executor``: constructors, keywords and answers as in 1.0 - 1.2.

Read from the bindings of autumn 2025 (pybind and nanobind alike): names, order, defaults, what is
keyword only, that ExecutorConfig takes any attribute later on. Inferred: that 1.0.0 has neither
``fail_fast_on_attention_window_too_large`` nor that name for ``mm_embedding_offloading``. Classes that
no test of ours makes are left out.
"""

import enum

from .._release import RELEASE

STACK = "\n1  0x7f [stack]"
"""Errors from C++ go on with a stack trace; TensorRT-LLM's words themselves are not mirrored."""


class Refusal(RuntimeError):
    """What the bindings make of an error in C++."""

    def __init__(self, text):
        super().__init__(f"[TensorRT-LLM][ERROR] {text}{STACK}")


class ModelType(enum.Enum):
    ENCODER_ONLY = 0
    DECODER_ONLY = 1
    ENCODER_DECODER = 2


class BatchingType(enum.Enum):
    STATIC = 0
    INFLIGHT = 1


class CommunicationType(enum.Enum):
    MPI = 0


class CommunicationMode(enum.Enum):
    LEADER = 0
    ORCHESTRATOR = 1


class FinishReason(enum.Enum):
    NOT_FINISHED = 0
    END_ID = 1
    STOP_WORDS = 2
    LENGTH = 3
    TIMED_OUT = 4
    CANCELLED = 5


class RuntimeDefaults:
    def __init__(self, max_attention_window=None, sink_token_length=None):
        self.max_attention_window = max_attention_window
        self.sink_token_length = sink_token_length


class KvCacheConfig:
    def __init__(
        self,
        enable_block_reuse=True,
        max_tokens=None,
        max_attention_window=None,
        sink_token_length=None,
        free_gpu_memory_fraction=None,
        host_cache_size=None,
        onboard_blocks=True,
        cross_kv_cache_fraction=None,
        secondary_offload_min_priority=None,
        event_buffer_max_size=0,
        *,
        enable_partial_reuse=True,
        copy_on_partial_reuse=True,
        use_uvm=False,
        attention_dp_events_gather_period_ms=5,
        runtime_defaults=None,
        max_gpu_total_bytes=0,
    ):
        if max_attention_window is not None:
            typed(max_attention_window, list, "max_attention_window")
            if not all(type(w) is int and w > 0 for w in max_attention_window):
                raise TypeError("max_attention_window: incompatible function arguments")
        if runtime_defaults is not None:  # where nothing is given
            if max_attention_window is None:
                max_attention_window = runtime_defaults.max_attention_window
            if sink_token_length is None:
                sink_token_length = runtime_defaults.sink_token_length
        if sink_token_length is not None:
            typed(sink_token_length, int, "sink_token_length")
            if sink_token_length < 1:
                raise RuntimeError("[TensorRT-LLM][ERROR] Assertion failed: sinkTokenLength > 0")
        if free_gpu_memory_fraction is not None and not 0 < free_gpu_memory_fraction < 1:
            raise RuntimeError(f"free_gpu_memory_fraction: {free_gpu_memory_fraction}")
        self.enable_block_reuse = enable_block_reuse
        self.max_tokens = max_tokens
        self.max_attention_window = max_attention_window
        self.sink_token_length = sink_token_length
        self.free_gpu_memory_fraction = free_gpu_memory_fraction
        self.event_buffer_max_size = event_buffer_max_size


class ParallelConfig:
    def __init__(
        self,
        communication_type=CommunicationType.MPI,
        communication_mode=CommunicationMode.LEADER,
        device_ids=None,
        participant_ids=None,
        orchestrator_config=None,
        num_nodes=None,
    ):
        typed(communication_type, CommunicationType, "communication_type")
        typed(communication_mode, CommunicationMode, "communication_mode")
        self.communication_type = communication_type
        self.communication_mode = communication_mode


_FIELDS = {
    "max_beam_width": 1,
    "scheduler_config": None,
    "kv_cache_config": None,
    "enable_chunked_context": False,
    "normalize_log_probs": True,
    "iter_stats_max_iterations": 1000,
    "request_stats_max_iterations": 0,
    "batching_type": BatchingType.INFLIGHT,
    "max_batch_size": None,
    "max_num_tokens": None,
    "parallel_config": None,
    "peft_cache_config": None,
    "logits_post_processor_config": None,
    "decoding_config": None,
    "use_gpu_direct_storage": False,
    "gpu_weights_percent": 1.0,
    "max_queue_size": None,
    "extended_runtime_perf_knob_config": None,
    "debug_config": None,
    "recv_poll_period_ms": 0,
    "max_seq_idle_microseconds": 180_000_000,
    "spec_dec_config": None,
    "guided_decoding_config": None,
    "additional_model_outputs": None,
    "cache_transceiver_config": None,
    "gather_generation_logits": False,
    **(
        {"prompt_table_offloading": False}
        if RELEASE < (1, 1)
        else {"mm_embedding_offloading": False}
    ),
    "enable_trt_overlap": False,
    **({} if RELEASE < (1, 1) else {"fail_fast_on_attention_window_too_large": False}),
}


class ExecutorConfig:
    def __init__(self, *values, **named):
        if len(values) > len(_FIELDS):
            raise TypeError("__init__(): incompatible constructor arguments")
        for name in named:
            if name not in _FIELDS:
                raise TypeError(
                    f"__init__(): incompatible constructor arguments: unexpected keyword {name}"
                )
        given = {**dict(zip(_FIELDS, values, strict=False)), **named}
        for name, default in _FIELDS.items():
            setattr(self, f"_{name}", given.get(name, default))
        if self._kv_cache_config is None:
            self._kv_cache_config = KvCacheConfig()
        typed(self._kv_cache_config, KvCacheConfig, "kv_cache_config")
        typed(self._batching_type, BatchingType, "batching_type")


def _property(name):
    return property(
        lambda self: getattr(self, f"_{name}"), lambda self, v: setattr(self, f"_{name}", v)
    )


for _name in _FIELDS:
    setattr(ExecutorConfig, _name, _property(_name))


class SamplingConfig:
    def __init__(
        self,
        beam_width=1,
        *,
        top_k=None,
        top_p=None,
        top_p_min=None,
        top_p_reset_ids=None,
        top_p_decay=None,
        seed=None,
        temperature=None,
        min_tokens=None,
        beam_search_diversity_rate=None,
        repetition_penalty=None,
        presence_penalty=None,
        frequency_penalty=None,
        length_penalty=None,
        early_stopping=None,
        no_repeat_ngram_size=None,
        num_return_sequences=None,
        min_p=None,
        beam_width_array=None,
    ):
        self.beam_width, self.top_k = beam_width, top_k


class OutputConfig:
    def __init__(
        self,
        return_log_probs=False,
        return_context_logits=False,
        return_generation_logits=False,
        exclude_input_from_output=False,
        return_encoder_output=False,
        return_perf_metrics=False,
        additional_model_outputs=None,
    ):
        self.return_context_logits = return_context_logits
        self.return_generation_logits = return_generation_logits
        self.exclude_input_from_output = exclude_input_from_output
        self.return_perf_metrics = return_perf_metrics


class Request:
    def __init__(
        self,
        input_token_ids,
        max_tokens,
        *,
        streaming=False,
        sampling_config=None,
        output_config=None,
        end_id=None,
        pad_id=None,
        position_ids=None,
        bad_words=None,
        stop_words=None,
        embedding_bias=None,
        external_draft_tokens_config=None,
        prompt_tuning_config=None,
        multimodal_input=None,
        multimodal_embedding=None,
        mrope_config=None,
        lora_config=None,
        lookahead_config=None,
        kv_cache_retention_config=None,
        logits_post_processor_name=None,
        logits_post_processor=None,
        encoder_input_token_ids=None,
        client_id=None,
        return_all_generated_tokens=False,
        priority=0.5,
        type=None,
        context_phase_params=None,
        encoder_input_features=None,
        encoder_output_length=None,
        cross_attention_mask=None,
        num_return_sequences=1,
        eagle_config=None,
        skip_cross_attn_blocks=None,
        guided_decoding_params=None,
        language_adapter_uid=None,
        allotted_time_ms=None,
        cache_salt_id=None,
    ):
        typed(input_token_ids, list, "input_token_ids")
        if any(not isinstance(t, int) for t in input_token_ids):
            raise TypeError("input_token_ids: incompatible constructor arguments")
        typed(max_tokens, int, "max_tokens")
        if not input_token_ids or max_tokens < 1:
            raise Refusal("a request without tokens")
        self.input_token_ids, self.max_tokens = input_token_ids, max_tokens
        self.streaming, self.end_id = streaming, end_id
        self.output_config = output_config or OutputConfig()
        self.sampling_config = sampling_config or SamplingConfig()


class Response:
    def __init__(self, request_id, result=None, error_msg=""):
        self.request_id, self.client_id, self.result, self._error = (
            request_id,
            None,
            result,
            error_msg,
        )

    def has_error(self):
        return bool(self._error)

    @property
    def error_msg(self):
        return self._error


def typed(value, kind, name):
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{name}: incompatible function arguments: {type(value).__name__}")
