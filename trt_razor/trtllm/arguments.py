"""What TensorRT-LLM's builder is told about sizes and plugins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trt_razor.errors import UsageError
from trt_razor.trtllm.options import TrtLlmOptions


@dataclass(frozen=True)
class BuildArguments:
    """What TensorRT-LLM's builder is told, apart from the network.

    Attributes:
        max_input_len: longest prompt. max_num_tokens: of one step, all requests together.
        chunked: prompts may be read in chunks (needs paged context attention).
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    tokens_per_block: int
    chunked: bool
    gather_context_logits: bool

    def build_config(self) -> dict[str, Any]:
        """Keyword arguments of ``BuildConfig``."""
        return {
            "max_batch_size": self.max_batch_size,
            "max_input_len": self.max_input_len,
            "max_seq_len": self.max_seq_len,
            "max_num_tokens": self.max_num_tokens,
            "max_beam_width": 1,
            "gather_context_logits": self.gather_context_logits,
        }

    def plugin_config(self) -> dict[str, Any]:
        """Attributes to set on ``PluginConfig``.

        Paged context attention is what reuse of cached prompts hangs on, and Razor caches cannot be
        reused: a prefix would bring its full rows but not its compressed ones.
        """
        return {
            "gpt_attention_plugin": "auto",
            "gemm_plugin": "auto",
            "remove_input_padding": True,
            "context_fmha": True,
            "use_paged_context_fmha": self.chunked,
            "use_fp8_context_fmha": False,
            "tokens_per_block": self.tokens_per_block,
            "reduce_fusion": False,
            "user_buffer": False,
            "norm_quant_fusion": False,
            "streamingllm": False,
            "multiple_profiles": False,
        }


def build_arguments(
    max_seq_len: int, max_batch_size: int, options: TrtLlmOptions, prefill_chunk: int
) -> BuildArguments:
    """Sizes of an engine.

    Generations take their tokens of a step first, one each. What is left must hold the longest prompt
    without chunks, and a block with them, or contexts would wait until others have ended.

    Raises:
        UsageError: ``max_num_tokens`` below what a step needs.
    """
    chunk = prefill_chunk if 0 < prefill_chunk < max_seq_len else 0
    others = max_batch_size - 1
    tokens = options.max_num_tokens or (chunk or max_seq_len) + others
    least = others + (options.tokens_per_block if chunk else 1)
    if tokens < least:
        what = f"a block of {options.tokens_per_block}" if chunk else "one token of a prompt"
        raise UsageError(
            f"max_num_tokens: expected at least {least}, {what} beside a token of each of {others} other "
            f"sequences, found {tokens}"
        )
    return BuildArguments(
        max_batch_size=max_batch_size,
        max_input_len=max_seq_len - 1 if chunk else min(max_seq_len - 1, tokens),
        max_seq_len=max_seq_len,
        max_num_tokens=tokens,
        tokens_per_block=options.tokens_per_block,
        chunked=bool(chunk),
        gather_context_logits=options.gather_logits,
    )
