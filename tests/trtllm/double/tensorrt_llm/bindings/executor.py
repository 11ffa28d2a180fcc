"""``Executor``, with the classes of executor_types.py, which ``tensorrt_llm.bindings.executor`` has too.

Read from the bindings of autumn 2025: that responses come by iteration, that streams give single tokens
and logits [1, beam, vocab], that logits are as wide as the padded vocabulary, the events and the log
lines of the cache manager. Inferred: shares of memory in 1.1 (as in 1.2); the exceptions of requests
that are too long.

What is generated is made up: the next token is a hash of all tokens so far, so it depends neither on
the batch nor on the engine. Logits have their largest value there, and a larger one in the padding.
"""

import datetime
import hashlib
import json
import os
import pathlib
import sys
import time
from types import SimpleNamespace

import numpy as np

from .._release import RELEASE
from .executor_types import (
    STACK,
    BatchingType,
    CommunicationMode,
    CommunicationType,
    ExecutorConfig,
    FinishReason,
    KvCacheConfig,
    ModelType,
    OutputConfig,
    ParallelConfig,
    Refusal,
    Request,
    Response,
    RuntimeDefaults,
    SamplingConfig,
    typed,
)

__all__ = [
    "BatchingType",
    "CommunicationMode",
    "CommunicationType",
    "Executor",
    "ExecutorConfig",
    "FinishReason",
    "KvCacheConfig",
    "ModelType",
    "OutputConfig",
    "ParallelConfig",
    "Request",
    "Response",
    "RuntimeDefaults",
    "SamplingConfig",
]

MEMORY = int(os.environ.get("TRT_RAZOR_DOUBLE_MEMORY", str(64 << 20)))
"""Bytes of the made-up GPU that are free for KV pools and state slots."""
STEP_SECONDS = float(os.environ.get("TRT_RAZOR_DOUBLE_STEP", "0"))
opened: list = []
"""Every executor of this process, for tests to look into."""


class KVCacheEventManager:
    def __init__(self, blocks):
        self._events = [
            SimpleNamespace(
                event_id=i,
                window_size=window,
                data=SimpleNamespace(num_blocks_per_cache_level=[count, 0]),
            )
            for i, (window, count) in enumerate(blocks.items())
        ]

    def get_latest_events(self, timeout=None):
        if timeout is not None:
            typed(timeout, datetime.timedelta, "timeout")
        events, self._events = self._events, []
        return events


class _Sequence:
    def __init__(self, request_id, request, arrival):
        self.id, self.request, self.arrival = request_id, request, arrival
        self.tokens = list(request.input_token_ids)
        self.first = None
        self.rows = []

    @property
    def generated(self):
        return len(self.tokens) - len(self.request.input_token_ids)


class Executor:
    """In-flight batching of made-up sequences; ``await_responses`` runs one iteration."""

    def __init__(self, model_path, model_type, executor_config):
        if not isinstance(model_path, (str, pathlib.Path)):
            raise TypeError("__init__(): incompatible constructor arguments")
        typed(model_type, ModelType, "model_type")
        typed(executor_config, ExecutorConfig, "executor_config")
        folder = pathlib.Path(model_path)
        config = json.loads((folder / "config.json").read_text())
        self.config = executor_config
        self._pretrained, self._build = config["pretrained_config"], config["build_config"]
        mapping = self._pretrained["mapping"]
        self.world = mapping["tp_size"] * mapping.get("pp_size", 1)
        self.rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        for rank in range(self.world):
            if not (folder / f"rank{rank}.engine").is_file():
                raise Refusal(f"no file rank{rank}.engine")
        if "razor" in self._pretrained:
            _need_plugin()
        self._hybrid = "recurrent" in self._pretrained.get("layer_types", [])
        if self._hybrid and executor_config.enable_chunked_context:
            raise Refusal("chunked context in a hybrid model")
        plugins = self._build["plugin_config"]
        if executor_config.enable_chunked_context and not plugins["use_paged_context_fmha"]:
            raise Refusal("chunked context without paged context attention")
        if (executor_config.max_batch_size or 0) > self._build["max_batch_size"]:
            raise Refusal(f"max_batch_size {executor_config.max_batch_size} of the executor")
        self.max_batch_size = executor_config.max_batch_size or self._build["max_batch_size"]
        self.blocks = self._make_pools()
        kv = executor_config.kv_cache_config
        self._events = KVCacheEventManager(self.blocks) if kv.event_buffer_max_size else None
        self._waiting, self._active, self._stats = [], [], []
        self._next, self._iteration = 1, 0
        self.shut_down = False
        opened.append(self)

    # Cache ------------------------------------------------------------------------------------
    def _make_pools(self):
        """Window -> primary blocks, with TensorRT-LLM's clamp of what does not fit."""
        kv, pre = self.config.kv_cache_config, self._pretrained
        self._tpb = self._build["plugin_config"]["tokens_per_block"]
        longest, tp = self._build["max_seq_len"], pre["mapping"]["tp_size"]
        group = pre.get("layer_types") or ["attention"]
        types = [group[i % len(group)] for i in range(pre["num_hidden_layers"])]
        heads = pre.get("num_kv_heads_per_layer") or [pre["num_key_value_heads"]] * len(types)
        told = kv.max_attention_window or [longest]
        windows = [min(told[i % len(told)], longest) for i in range(len(heads))]
        sinks = kv.sink_token_length or 0
        if sinks and RELEASE >= (1, 1):
            raise Refusal("sinks in a cache that is not cyclic")
        self._bubble = -sinks % self._tpb
        element = 1 if pre["quantization"].get("kv_cache_quant_algo") == "FP8" else 2
        per_token = {}
        for h, w in zip(heads, windows, strict=True):
            per_token[w] = per_token.get(w, 0) + 2 * -(-h // tp) * pre["head_size"] * element
        per_token = dict(sorted(per_token.items()))
        free = MEMORY * (kv.free_gpu_memory_fraction or 0.9)
        if RELEASE < (1, 1):
            weights = {w: w * n for w, n in per_token.items()}
        else:
            weights = dict.fromkeys(per_token, 1)
        blocks = {}
        for w, n in per_token.items():
            tokens = free * weights[w] / sum(weights.values()) / n
            if kv.max_tokens is not None and (len(per_token) == 1 or RELEASE < (1, 2)):
                tokens = min(tokens, kv.max_tokens)
            blocks[w] = int(tokens) // self._tpb
        clamped = {}
        for w, count in blocks.items():
            need = -(-(min(longest, w) + self._bubble) // self._tpb)
            clamped[w if count >= need else count * self._tpb] = count
        if list(clamped) != list(blocks):
            text = f"Old: {list(blocks)}, New: {list(clamped)}"
            if getattr(self.config, "fail_fast_on_attention_window_too_large", False):
                raise Refusal(f"a window does not fit. {text}")
            # These lines are the real ones, as far as cache_settings.py looks for them.
            _log(
                "[TensorRT-LLM][WARNING] maxAttentionWindowVec too large to fit at least one sequence in "
                f"kvCache. {text}"
            )
        lines = [
            f"[windowSize={w}] {{.primaryBlocks={n}, .secondayBlocks=0}}"
            for w, n in clamped.items()
        ]
        total = sum(
            n * self._tpb * p for n, p in zip(clamped.values(), per_token.values(), strict=True)
        )
        if os.environ.get("TLLM_LOG_LEVEL", "ERROR") == "INFO":
            _log(
                "\n".join(f"[TensorRT-LLM][INFO] {x}" for x in ["Blocks per window size:", *lines])
            )
            _log(
                f"[TensorRT-LLM][INFO] [MemUsageChange] Allocated {total / 2**30:.2f} GiB for max tokens in "
                f"paged KV cache ({sum(clamped.values()) * self._tpb})."
            )
        return clamped

    def _blocks_of(self, sequence):
        n = len(sequence.tokens)
        return sum(-(-(min(n, w) + self._bubble) // self._tpb) for w in self.blocks)

    # Requests ---------------------------------------------------------------------------------
    def can_enqueue_requests(self):
        return self.rank == 0

    def enqueue_request(self, request):
        typed(request, Request, "request")
        if not self.can_enqueue_requests() or self.shut_down:
            raise Refusal("requests on a rank that does not lead, or after the end")
        request_id, self._next = self._next, self._next + 1
        self._waiting.append(_Sequence(request_id, request, time.monotonic()))
        return request_id

    def cancel_request(self, request_id):
        for queue in (self._waiting, self._active):
            queue[:] = [s for s in queue if s.id != request_id]

    def await_responses(self, timeout=None):
        if timeout is not None:
            typed(timeout, datetime.timedelta, "timeout")
        contexts = []
        while self._waiting and len(self._active) < self.max_batch_size:
            sequence = self._waiting.pop(0)
            self._active.append(sequence)
            contexts.append(sequence)
        if not self._active:
            return []
        time.sleep(STEP_SECONDS)
        self._iteration += 1
        responses = []
        # Hybrid engines run contexts and generations apart; who waits for contexts makes no token.
        running = contexts if self._hybrid and contexts else list(self._active)
        for sequence in running:
            responses += self._step(sequence)
        used = sum(self._blocks_of(s) for s in self._active)
        self._count(contexts, len(running) - len(contexts), used)
        for sequence in [
            s for s in self._active if s.generated >= s.request.max_tokens or s.rows is None
        ]:
            self._active.remove(sequence)
        return responses

    def _step(self, sequence):
        request, out = sequence.request, sequence.request.output_config
        if len(request.input_token_ids) + request.max_tokens > self._build["max_seq_len"]:
            sequence.rows = None
            return [
                Response(sequence.id, error_msg=f"{sequence.id}: longer than max_seq_len{STACK}")
            ]
        if (
            len(request.input_token_ids) > self._build["max_num_tokens"]
            and not self.config.enable_chunked_context
        ):
            sequence.rows = None
            return [Response(sequence.id, error_msg="prompt longer than max_num_tokens")]
        token = next_token(sequence.tokens, self._pretrained["vocab_size"])
        sequence.tokens.append(token)
        now = time.monotonic()
        sequence.first = sequence.first or now
        if out.return_generation_logits:
            if not self.config.gather_generation_logits:
                raise Refusal("generation logits that are not gathered")
            sequence.rows.append(logits_of(token, self._pretrained["vocab_size"]))
        ended = token == request.end_id
        final = ended or sequence.generated >= request.max_tokens
        if not (final or request.streaming):
            return []
        new = sequence.tokens[len(request.input_token_ids) :]
        rows = np.stack(sequence.rows) if sequence.rows else None
        if request.streaming:
            new, rows = new[-1:], None if rows is None else rows[None, -1:]
        elif rows is not None:  # [beam, max_tokens, padded vocab]
            rows = np.concatenate(
                [rows, np.zeros((request.max_tokens - len(rows), rows.shape[1]))]
            )[None]
        if not out.exclude_input_from_output and not request.streaming:
            new = list(sequence.tokens)
        reason = FinishReason.END_ID if ended else FinishReason.LENGTH
        metrics = None
        if out.return_perf_metrics and final:
            times = SimpleNamespace(
                arrival_time=datetime.timedelta(seconds=sequence.arrival),
                first_scheduled_time=datetime.timedelta(seconds=sequence.arrival),
                first_token_time=datetime.timedelta(seconds=sequence.first),
                last_token_time=datetime.timedelta(seconds=now),
            )
            metrics = SimpleNamespace(timing_metrics=times)
        if ended:
            sequence.rows = None
        result = SimpleNamespace(
            is_final=final,
            output_token_ids=[new],
            generation_logits=rows,
            finish_reasons=[reason if final else FinishReason.NOT_FINISHED],
            sequence_index=0,
            request_perf_metrics=metrics,
        )
        return [Response(sequence.id, result)]

    # Figures ----------------------------------------------------------------------------------
    def _count(self, contexts, generations, used):
        limit = self.config.iter_stats_max_iterations
        stats = SimpleNamespace(
            iter=self._iteration,
            iter_latency_ms=STEP_SECONDS * 1e3,
            kv_cache_stats=SimpleNamespace(
                max_num_blocks=sum(self.blocks.values()),
                used_num_blocks=used,
                free_num_blocks=sum(self.blocks.values()) - used,
                tokens_per_block=self._tpb,
            ),
            inflight_batching_stats=SimpleNamespace(
                num_context_requests=len(contexts),
                num_gen_requests=generations,
                num_paused_requests=0,
                num_scheduled_requests=len(contexts) + generations,
            ),
        )
        self._stats = [*self._stats, stats][-limit:] if limit else []

    def get_latest_iteration_stats(self):
        stats, self._stats = self._stats, []
        return stats

    def get_kv_cache_event_manager(self):
        return self._events

    def shutdown(self):
        self.shut_down = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.shutdown()


def next_token(tokens, vocab):
    """The made-up model."""
    digest = hashlib.sha256(np.asarray(tokens, np.int64).tobytes()).digest()
    return int.from_bytes(digest[:4], "little") % vocab


def logits_of(token, vocab):
    """[padded vocab]: the largest of the vocabulary at ``token``, the padding larger still."""
    row = np.full(-(-vocab // 64) * 64 + 64, 99.0, np.float32)
    row[:vocab] = np.linspace(-1, 0, vocab)
    row[token] = 7.0
    return row


def _need_plugin():
    """A Razor engine cannot be deserialised without its creator."""
    import tensorrt

    if tensorrt.get_plugin_registry().get_creator("RazorGptAttention", "1", "trt_razor") is None:
        raise Refusal("engine needs the plugin RazorGptAttention, which is not registered")


def _log(text):
    """As C++ prints: to the file descriptor, past sys.stdout."""
    sys.stdout.flush()
    os.write(1, (text + "\n").encode())
