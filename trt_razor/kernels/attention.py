"""One call over one layer's caches: torch tensors in, torch tensors out, nothing copied."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from trt_razor.errors import UsageError
from trt_razor.kernels import structs
from trt_razor.kernels.caches import Caches
from trt_razor.kernels.layer import LayerConfig, Limits
from trt_razor.kernels.library import Library
from trt_razor.kernels.tensors import address, check, import_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 256
"""Of the workspace, in bytes."""


class RazorKernels:
    """The kernels of one library.

    Args:
        library: its file; see ``find_library`` for what is tried without it.

    Attributes:
        path, build_info: which library, and how it was built.
        device_type: where tensors must be, "cuda"; "cpu" for the library of the tests that runs
            the kernels on a CPU.

    Raises:
        RazorError: the library is missing, cannot be loaded, or is of another API version.
    """

    def __init__(self, library: str | os.PathLike[str] | None = None) -> None:
        self._library = Library(library)
        self.path = self._library.path
        self.build_info = self._library.build_info
        self.device_type = "cpu" if "CPU shim" in self.build_info else "cuda"

    def check_layer(self, layer: LayerConfig) -> None:
        """Raises UsageError that names the first wrong field of the layer."""
        self._library.check_layer(layer.c_struct)

    def ring_rows(self, layer: LayerConfig) -> int:
        """Fewest rows of a local head's ring."""
        return self._library.ring_rows(layer.c_struct)

    def workspace_size(self, layer: LayerConfig, limits: Limits) -> int:
        """Bytes that a call within the limits needs. Raises UsageError for wrong numbers."""
        return self._library.workspace_size(layer.c_struct, limits.c_struct)

    def attention(
        self,
        layer: LayerConfig,
        qkv: Tensor,
        caches: Caches,
        *,
        past: Tensor | None = None,
        total: Tensor | None = None,
        chunk: Tensor | None = None,
        num_contexts: int | None = None,
        max_chunk: int | None = None,
        max_past: int | None = None,
        generation_chunk_is_one: bool = False,
        cos_sin: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        out: Tensor | None = None,
        workspace: Tensor | None = None,
        stream: int | None = None,
    ) -> Tensor:
        """Attend the new tokens of B sequences and update the caches in place.

        Only enqueues: nothing is read back, and a CUDA graph can capture it.

        Args:
            layer: what the layer is.
            qkv: [B, S, (Hq + 2 Hkv) D] (padded) or [rows, (Hq + 2 Hkv) D] (packed: contexts first,
                then one row a generation), before RoPE.
            caches: where its keys and values are.
            past: int32 [B], tokens cached before the call; or None and
            total: int32 [B], past + chunk.
            chunk: int32 [B], new tokens; None: one each (only without contexts).
            num_contexts: sequences that bring chunks, the first of the batch. Unless given: padded
                B (0 if S = 1), packed 0, which needs one row a sequence.
            max_chunk: upper bound of the contexts' chunks; S, or packed their number of rows.
            max_past: upper bound of past; ``layer.max_seq_len``.
            generation_chunk_is_one: do not read ``chunk`` for generations.
            cos_sin: float32 [positions, rotary_dim], for RoPE.
            alibi_slopes: float32 [Hq], for ALiBi.
            k_scale, v_scale: float32, one element, for FP8 caches; 1 unless given.
            out: [B, S, Hq D] or [rows, Hq D] of qkv's dtype; made unless given.
            workspace: uint8, ``workspace_size`` bytes, on a multiple of 256 bytes; made unless given.
            stream: a cudaStream_t; torch's current stream unless given.

        Returns:
            out; padded rows behind a chunk are zero.

        Raises:
            UsageError: a tensor or a number does not fit.
            RazorError: CUDA failed, or the workspace is too small.
        """
        torch = import_torch()
        device = qkv.device
        if device.type != self.device_type:
            raise UsageError(f"qkv: expected a tensor on {self.device_type}, found {device}")
        padded = qkv.dim() == 3
        sequences = past if past is not None else total
        if sequences is None:
            raise UsageError("past: expected past or total, found None for both")
        batch = sequences.numel()
        rows = (batch, "S") if padded else ("rows",)
        check("qkv", qkv, device, layer.dtype, (*rows, layer.qkv_width))
        if qkv.numel() == 0:
            raise UsageError(f"qkv: expected tokens, found shape {list(qkv.shape)}")
        for name, numbers in (("past", past), ("total", total), ("chunk", chunk)):
            if numbers is not None:
                check(name, numbers, device, "int32", (batch,))

        call = structs.new_call()
        tokens = qkv.shape[1] if padded else 0
        if num_contexts is None:
            if not padded and len(qkv) != batch:
                raise UsageError(
                    f"num_contexts: missing; {len(qkv)} packed rows for {batch} sequences are not "
                    f"one row each"
                )
            num_contexts = batch if tokens > 1 else 0
        if not 0 <= num_contexts <= batch:
            raise UsageError(f"num_contexts: expected 0..{batch} (batch), found {num_contexts}")
        context_tokens = num_contexts * tokens if padded else len(qkv) - batch + num_contexts
        if context_tokens < 0:
            raise UsageError(
                f"qkv: expected at least {batch - num_contexts} packed rows for as many "
                f"generations, found {len(qkv)}"
            )
        if max_chunk is None:
            max_chunk = tokens or min(max(context_tokens, 1), layer.max_seq_len)
        if max_past is None:
            max_past = layer.max_seq_len
        structs.fill(
            call,
            batch=batch,
            num_contexts=num_contexts,
            tokens_per_sequence=tokens,
            num_context_tokens=0 if padded else context_tokens,
            max_chunk=max_chunk,
            max_past=max_past,
            generation_chunk_is_one=int(generation_chunk_is_one),
        )
        _fill_positions(call, layer, cos_sin, alibi_slopes, device)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                check(name, scale, device, "float32", (1,) * scale.dim())
                setattr(call, name, scale.data_ptr())
        caches.fill(call, layer, batch, device)

        made: list[Tensor] = []
        shape = (*qkv.shape[:-1], layer.out_width)
        if out is None:
            out = torch.empty(shape, dtype=qkv.dtype, device=device)
            made.append(out)
        check("out", out, device, layer.dtype, shape)
        if workspace is None:
            limits = Limits(batch, context_tokens, max_chunk, max_past)
            workspace = new_workspace(self.workspace_size(layer, limits), device)
            made.append(workspace)
        check("workspace", workspace, device, "uint8", ("bytes",))
        call.qkv, call.out = qkv.data_ptr(), out.data_ptr()
        call.past, call.total, call.chunk = address(past), address(total), address(chunk)

        with _on(device):
            if device.type == "cuda":
                current = torch.cuda.current_stream(device).cuda_stream
                if stream is not None and stream != current:
                    for tensor in made:  # the allocator knows of the current stream only
                        tensor.record_stream(torch.cuda.ExternalStream(stream, device))
                stream = current if stream is None else stream
            self._library.attention(
                layer.c_struct, call, workspace.data_ptr(), workspace.numel(), stream or 0
            )
        return out


def new_workspace(size: int, device: torch.device | str = "cuda") -> Tensor:
    """uint8 [size] on a multiple of 256 bytes."""
    torch = import_torch()
    memory: Tensor = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


def _fill_positions(
    call: structs.RazorCall,
    layer: LayerConfig,
    cos_sin: Tensor | None,
    alibi_slopes: Tensor | None,
    device: torch.device,
) -> None:
    if layer.position in ("rope", "rope_interleaved"):
        if cos_sin is None:
            raise UsageError("cos_sin: missing; a layer with RoPE needs its table")
        width = layer.rotary_dim or layer.head_dim
        check("cos_sin", cos_sin, device, "float32", ("positions", width))
        structs.fill(call, cos_sin=cos_sin.data_ptr(), num_positions=len(cos_sin))
    elif layer.position == "alibi":
        if alibi_slopes is None:
            raise UsageError("alibi_slopes: missing; a layer with ALiBi needs a slope a head")
        check("alibi_slopes", alibi_slopes, device, "float32", (layer.num_heads,))
        structs.fill(call, alibi_slopes=alibi_slopes.data_ptr())


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the tensors' device CUDA's current one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[object] = import_torch().cuda.device(device)
    return guard
