"""Run an engine directory with TensorRT-LLM's own executor (``tensorrt_llm.bindings.executor``).

For tests, benchmarks and evaluation; servers use Triton (docs/tensorrt-llm.md). With several ranks every
rank calls ``open_executor`` under mpirun, and the one that ``leads`` sends the requests:

    with open_executor(Path("engine")) as executor:
        if executor.leads:
            results = executor.run([Request([1, 2, 3], max_new_tokens=16)])

Leaving the block on another rank waits until the leader is done.

Names and defaults are those of the bindings in TensorRT-LLM 1.0 - 1.2, whose ExecutorConfig takes any
attribute without a word: everything is passed as keywords of constructors, which do check.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_razor.errors import RazorError, UsageError
from trt_razor.trtllm.cache_settings import (
    CacheSettings,
    PoolReport,
    blocks_in_log,
    clamp_in_log,
    pool_report,
    read_settings,
)
from trt_razor.trtllm.requests import Iteration, Request, Result
from trt_razor.trtllm.runtime import (
    check_world,
    copied_to,
    first_line,
    import_bindings,
    load_plugin,
)

__all__ = ["Iteration", "Request", "Result", "TrtLlmExecutor", "open_executor"]

FAIL_FAST = "fail_fast_on_attention_window_too_large"
_EVENTS = 1024


@dataclass
class _Pending:
    """A request on its way."""

    index: int
    sent: float
    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)


def open_executor(
    directory: Path,
    *,
    max_batch_size: int | None = None,
    free_gpu_memory_fraction: float | None = None,
    max_tokens: int | None = None,
    chunked: bool | None = None,
    logits: bool = False,
    log: Path | None = None,
) -> TrtLlmExecutor:
    """Load the engines of a directory; call it on every rank.

    Windows and sinks are what the engine's config.json has as ``runtime_defaults``. Cached prompts are
    never reused: a prefix would bring its full rows but not its compressed ones.

    Args:
        max_batch_size: sequences at a time, at most what the engine was built for (the default).
        free_gpu_memory_fraction: share of the memory left after loading that KV pools may take;
            None = TensorRT-LLM's 0.9.
        max_tokens: tokens that pools may hold at most. With several windows TensorRT-LLM 1.0 takes it for
            each window, and 1.2 ignores it.
        chunked: read prompts in chunks; None = if the engine was built for it.
        logits: make generation logits available to ``run``.
        log: file for what TensorRT-LLM prints while it loads, at level INFO; it still goes to
            standard error, too.

    Raises:
        UsageError: no engine there, chunks it cannot do, too few or too many ranks, or no TensorRT-LLM.
        RazorError: the plugin is missing or another one than the engine was built with, loading failed,
            or the KV cache is too small for one sequence.
    """
    settings = read_settings(directory)
    check_world(settings.world_size)
    batch = settings.max_batch_size if max_batch_size is None else max_batch_size
    if not 1 <= batch <= settings.max_batch_size:
        raise UsageError(
            f"max_batch_size: expected 1..{settings.max_batch_size}, what the engine was built for, found "
            f"{batch}"
        )
    if chunked and not settings.chunked:
        raise UsageError(
            f"{directory}: chunked: this engine reads prompts in one go; build with --prefill-chunk N"
        )
    if log is not None:
        os.environ.setdefault("TLLM_LOG_LEVEL", "INFO")  # read when TensorRT-LLM is imported
    with contextlib.nullcontext() if log is None else copied_to(log):
        api = import_bindings()
        if settings.razor:
            load_plugin(directory)
        cache: dict[str, Any] = {"enable_block_reuse": False, "event_buffer_max_size": _EVENTS}
        if settings.window_list:
            cache["max_attention_window"] = list(settings.window_list)
        if settings.sink_tokens:
            cache["sink_token_length"] = settings.sink_tokens
        if free_gpu_memory_fraction is not None:
            cache["free_gpu_memory_fraction"] = free_gpu_memory_fraction
        if max_tokens is not None:
            cache["max_tokens"] = max_tokens
        options: dict[str, Any] = {
            "max_beam_width": 1,
            "kv_cache_config": api.KvCacheConfig(**cache),
            "enable_chunked_context": settings.chunked if chunked is None else chunked,
            "iter_stats_max_iterations": 100_000,
            "batching_type": api.BatchingType.INFLIGHT,
            "max_batch_size": batch,
            "parallel_config": api.ParallelConfig(
                communication_type=api.CommunicationType.MPI,
                communication_mode=api.CommunicationMode.LEADER,
            ),
            "gather_generation_logits": logits,
        }
        if hasattr(api.ExecutorConfig, FAIL_FAST):  # not in every 1.0; `check` below does it, too
            options[FAIL_FAST] = True
        try:
            executor = api.Executor(
                str(directory), api.ModelType.DECODER_ONLY, api.ExecutorConfig(**options)
            )
        except RuntimeError as e:
            raise RazorError(f"{directory}: TensorRT-LLM cannot load it: {first_line(e)}") from None
    opened = TrtLlmExecutor(api, executor, settings, batch, logits, log)
    try:
        if opened.leads:
            opened.check_windows()
    except BaseException:
        opened.close()
        raise
    return opened


class TrtLlmExecutor:
    """An open engine directory; made by ``open_executor``.

    Attributes:
        settings: of its caches. max_batch_size: sequences at a time.
        leads: whether this rank sends the requests.
    """

    def __init__(
        self,
        api: Any,
        executor: Any,
        settings: CacheSettings,
        max_batch_size: int,
        logits: bool,
        log: Path | None,
    ) -> None:
        self.settings, self.max_batch_size = settings, max_batch_size
        self._api, self._executor, self._gathers, self._log = api, executor, logits, log
        self._iterations: list[Iteration] = []
        self._pools: PoolReport | None = None
        self.leads = bool(executor.can_enqueue_requests())

    def __enter__(self) -> TrtLlmExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Shut down. The leader's call ends the other ranks; theirs waits for it."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()

    # Generation -------------------------------------------------------------------------------
    def run(
        self,
        requests: Sequence[Request],
        *,
        stream: bool = True,
        logits: bool = False,
        timeout: float = 600.0,
        on_token: Callable[[int, int], None] = lambda index, token: None,
    ) -> list[Result]:
        """Generate for all requests, batched in flight.

        Args:
            stream: tokens come one by one; otherwise all at the end of their request.
            logits: return them; ``open_executor`` must have been told.
            timeout: seconds without any answer that count as a failure.
            on_token: called with (index of the request, token) as tokens come.

        Raises:
            UsageError: not the leader, an empty or too long request, or logits without
                ``open_executor(logits=True)``.
            RazorError: TensorRT-LLM refused a request, or gave no answer in time; all are cancelled.
        """
        self._check_run(requests, logits)
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].after_tokens)
        pending: dict[int, _Pending] = {}
        results: list[Result | None] = [None] * len(requests)
        came, heard = 0, time.perf_counter()
        try:
            while waiting or pending:
                # With nobody left to wait for, the next one is due however few tokens came.
                while waiting and (requests[waiting[0]].after_tokens <= came or not pending):
                    index = waiting.pop(0)
                    request = self._request(requests[index], stream, logits)
                    sent = time.perf_counter()
                    pending[self._enqueue(request, index)] = _Pending(index, sent)
                responses = self._await()
                if responses:
                    heard = time.perf_counter()
                for response in responses:
                    got = pending[response.request_id]
                    tokens = self._take(response, got, heard, logits)
                    came += len(tokens)
                    for token in tokens:
                        on_token(got.index, token)
                    if response.result.is_final:
                        del pending[response.request_id]
                        results[got.index] = self._result(got, response.result, logits)
                if time.perf_counter() - heard > timeout:
                    raise RazorError(
                        f"TensorRT-LLM: no answer to {len(pending)} requests within {timeout:g} s"
                    )
        finally:
            for request_id in pending:
                self._executor.cancel_request(request_id)
        return [r for r in results if r is not None]

    def _check_run(self, requests: Sequence[Request], logits: bool) -> None:
        if not self.leads:
            raise UsageError("run: this rank has no requests to send; only the leading one does")
        if logits and not self._gathers:
            raise UsageError("logits: not gathered; open the engine with logits=True")
        limit = self.settings.max_seq_len
        for i, r in enumerate(requests):
            where = f"request {i + 1} of {len(requests)}"
            if len(r.tokens) < 1 or r.max_new_tokens < 1:
                raise UsageError(
                    f"{where}: expected a prompt and at least 1 new token, found {len(r.tokens)} and "
                    f"{r.max_new_tokens}"
                )
            if len(r.tokens) + r.max_new_tokens > limit:
                raise UsageError(
                    f"{where}: {len(r.tokens)} + {r.max_new_tokens} tokens do not fit max_seq_len {limit} "
                    "of this engine"
                )

    def _request(self, request: Request, stream: bool, logits: bool) -> Any:
        api = self._api
        return api.Request(
            input_token_ids=[int(t) for t in request.tokens],
            max_tokens=request.max_new_tokens,
            streaming=stream,
            sampling_config=api.SamplingConfig(beam_width=1, top_k=1),
            output_config=api.OutputConfig(
                return_generation_logits=logits,
                exclude_input_from_output=True,
                return_perf_metrics=True,
            ),
            end_id=request.end_id,
        )

    def _enqueue(self, request: Any, index: int) -> int:
        try:
            return int(self._executor.enqueue_request(request))
        except (RuntimeError, ValueError) as e:
            raise RazorError(
                f"request {index + 1}: TensorRT-LLM refused it: {first_line(e)}"
            ) from None

    def _await(self) -> list[Any]:
        """Responses of the next moment. Statistics are fetched along, lest they are dropped."""
        responses = self._executor.await_responses(timeout=datetime.timedelta(milliseconds=500))
        self._fetch_iterations()
        return list(responses)

    def _take(self, response: Any, got: _Pending, now: float, logits: bool) -> list[int]:
        """Tokens of a response, kept with their time and logits."""
        if response.has_error():
            raise RazorError(f"request {got.index + 1}: {first_line(response.error_msg)}")
        tokens = [int(t) for t in response.result.output_token_ids[0]]
        got.tokens += tokens
        got.arrivals += [now] * len(tokens)
        if logits and tokens and response.result.generation_logits is not None:
            # [beam, tokens, padded vocab], or [tokens, beam, padded vocab] from a stream; beam is 1.
            rows = _numpy(response.result.generation_logits)
            rows = rows.reshape(-1, rows.shape[-1])[: len(tokens), : self.settings.vocab_size]
            got.logits.append(rows)
        return tokens

    def _result(self, got: _Pending, result: Any, logits: bool) -> Result:
        table = None
        if logits:
            found = sum(len(rows) for rows in got.logits)
            if found != len(got.tokens):
                raise RazorError(
                    f"request {got.index + 1}: expected logits of {len(got.tokens)} tokens, found "
                    f"{found}"
                )
            table = np.concatenate(got.logits).astype(np.float32)
        reason = result.finish_reasons[0] if result.finish_reasons else "unknown"
        return Result(
            tuple(got.tokens),
            table,
            got.sent,
            tuple(got.arrivals),
            str(getattr(reason, "name", reason)),
            _first_token_seconds(getattr(result, "request_perf_metrics", None)),
        )

    # Figures ----------------------------------------------------------------------------------
    def iterations(self) -> list[Iteration]:
        """Steps since the last call (or the start)."""
        self._fetch_iterations()
        found, self._iterations = self._iterations, []
        return found

    def _fetch_iterations(self) -> None:
        for stats in self._executor.get_latest_iteration_stats():
            cache, flight = stats.kv_cache_stats, stats.inflight_batching_stats
            self._iterations.append(
                Iteration(
                    int(stats.iter),
                    float(stats.iter_latency_ms),
                    int(flight.num_context_requests) if flight else 0,
                    int(flight.num_gen_requests) if flight else 0,
                    int(flight.num_paused_requests) if flight else 0,
                    int(cache.used_num_blocks) if cache else 0,
                    int(cache.max_num_blocks) if cache else 0,
                )
            )

    def kv_pool_report(self) -> PoolReport:
        """KV memory set aside on this rank, by window; the leader only.

        Block counts are those of the cache manager's ``created`` events, else of its log lines.

        Raises:
            RazorError: neither is there, or windows are not the engine's.
        """
        if self._pools is None:
            blocks, source = self._blocks_by_event(), "events"
            if not blocks and self._log is not None:
                text = self._log.read_text(errors="replace")
                blocks, source = blocks_in_log(text), "log"
            if not blocks:
                raise RazorError(
                    "KV cache: TensorRT-LLM reported no pool sizes; open the engine with log=FILE, with "
                    "TLLM_LOG_LEVEL=INFO set before tensorrt_llm is imported"
                )
            self._pools = pool_report(self.settings, blocks, self.max_batch_size, source)
        return self._pools

    def _blocks_by_event(self) -> dict[int, int]:
        """Window → primary blocks, from events that exist from the start; {} without them."""
        manager = self._executor.get_kv_cache_event_manager()
        if manager is None:
            return {}
        blocks: dict[int, int] = {}
        for _ in range(20):
            for event in manager.get_latest_events(datetime.timedelta(milliseconds=100)):
                levels = getattr(event.data, "num_blocks_per_cache_level", None)
                if levels is not None:
                    blocks[int(event.window_size)] = int(levels[0])
            if len(blocks) >= len(self.settings.distinct_windows):
                break
        return blocks

    def check_windows(self) -> None:
        """Raises RazorError if TensorRT-LLM shortened a window, or has no room for one sequence."""
        text = self._log.read_text(errors="replace") if self._log is not None else ""
        if clamp := clamp_in_log(text):
            raise RazorError(f"KV cache too small: {clamp}; give it more memory")
        self.kv_pool_report().check()


def _numpy(tensor: Any) -> npt.NDArray[Any]:
    """A tensor of the bindings: torch's on the CPU, or anything that NumPy takes."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().float().cpu().numpy()
    return np.asarray(tensor)


def _first_token_seconds(metrics: Any) -> float | None:
    timing = getattr(metrics, "timing_metrics", None)
    if timing is None:
        return None
    seconds = (timing.first_token_time - timing.arrival_time).total_seconds()
    return float(seconds) if seconds > 0 else None
