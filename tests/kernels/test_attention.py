"""The wrapper: which addresses, strides and numbers a call hands to the library.

The library is a stand-in that keeps what it gets; the kernels behind the real one are tested in
tests/plugins.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from trt_razor.errors import UsageError
from trt_razor.kernels import (
    BUBBLE,
    Caches,
    Compensation,
    ContiguousView,
    LayerConfig,
    Limits,
    PagedView,
    RazorKernels,
    structs,
)
from trt_razor.policy import RazorPolicy

POLICY = RazorPolicy(sink_tokens=4, min_window=12, compression=None, comp_tokens=2)
LAYER = LayerConfig(8, 4, 64, 64, POLICY, (1, 3))
WIDTH = LAYER.qkv_width


class StandIn:
    """Keeps the last call."""

    call: structs.RazorCall
    workspace: int | None
    size: int
    limits: structs.RazorLimits

    def workspace_size(self, layer: structs.RazorLayer, limits: structs.RazorLimits) -> int:
        self.limits = limits
        return 4096

    def attention(self, layer: Any, call: Any, workspace: int, size: int, stream: int) -> None:
        self.layer, self.call, self.workspace, self.size = layer, call, workspace, size
        self.stream = stream


@pytest.fixture
def kernels() -> RazorKernels:
    out = object.__new__(RazorKernels)
    out._library = StandIn()  # type: ignore[assignment]
    out.device_type = "cpu"
    return out


def sent(kernels: RazorKernels) -> StandIn:
    return kernels._library  # type: ignore[return-value]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tokens(*shape: int, width: int = WIDTH) -> Tensor:
    return torch.zeros(*shape, width, dtype=torch.float16)


def table(rows: int = 64) -> Tensor:
    return torch.zeros(rows, 64)


def test_a_padded_call(kernels: RazorKernels) -> None:
    caches = Caches.empty(LAYER, 3, "cpu")
    past, chunk, qkv, cos_sin = ints(0, 5, 9), ints(7, 0, 3), tokens(3, 7), table()
    out = kernels.attention(LAYER, qkv, caches, past=past, chunk=chunk, cos_sin=cos_sin)
    assert out.shape == (3, 7, 8 * 64)
    assert out.dtype == torch.float16
    got = sent(kernels)
    call = got.call
    assert (call.batch, call.num_contexts, call.tokens_per_sequence) == (3, 3, 7)
    assert (call.num_context_tokens, call.max_chunk, call.max_past) == (0, 7, 64)
    assert (call.qkv, call.out) == (qkv.data_ptr(), out.data_ptr())
    assert (call.past, call.total, call.chunk) == (past.data_ptr(), None, chunk.data_ptr())
    assert (call.cos_sin, call.num_positions) == (cos_sin.data_ptr(), 64)
    assert (call.alibi_slopes, call.k_scale, call.v_scale) == (None, None, None)
    assert isinstance(caches.full, ContiguousView)
    assert isinstance(caches.local, ContiguousView)
    assert isinstance(caches.comp, Compensation)
    full, local, comp = call.full, call.local, call.comp
    assert (full.kind, full.capacity, full.k) == (1, 64, caches.full.k.data_ptr())
    assert (full.slot_stride, full.head_stride, full.slots) == (2 * 64 * 64, 64 * 64, None)
    assert (local.capacity, local.v) == (4 + 13, caches.local.v.data_ptr())
    assert (comp.kind, comp.count) == (1, caches.comp.count.data_ptr())
    assert (comp.comp_slot_stride, comp.weight_slot_stride) == (2 * 2 * 2 * 64, 4)
    assert got.workspace is not None
    assert got.workspace % 256 == 0
    assert (got.size, got.stream) == (4096, 0)
    limits = got.limits
    assert (limits.max_batch, limits.max_context_tokens) == (3, 21)
    assert (limits.max_chunk, limits.max_past) == (7, 64)


def test_one_token_each_is_generation(kernels: RazorKernels) -> None:
    caches = Caches.empty(LAYER, 3, "cpu")
    for qkv in (tokens(3, 1), tokens(3)):
        out = kernels.attention(LAYER, qkv, caches, total=ints(1, 2, 3), cos_sin=table())
        call = sent(kernels).call
        assert out.shape == (*qkv.shape[:-1], 512)
        assert (call.num_contexts, call.tokens_per_sequence) == (0, qkv.dim() - 2)
        assert (call.num_context_tokens, call.chunk, call.past) == (0, None, None)
        assert sent(kernels).limits.max_context_tokens == 0


def test_a_packed_call(kernels: RazorKernels) -> None:
    """Two contexts with 9 rows, then two generations."""
    caches = Caches.empty(LAYER, 4, "cpu")
    options = {"past": ints(0, 3, 8, 9), "chunk": ints(4, 5, 1, 1), "cos_sin": table()}
    out = torch.empty(11, 512, dtype=torch.float16)
    workspace = torch.empty(1 << 16, dtype=torch.uint8)
    result = kernels.attention(
        LAYER,
        tokens(11),
        caches,
        num_contexts=2,
        max_chunk=5,
        max_past=9,
        generation_chunk_is_one=True,
        out=out,
        workspace=workspace,
        stream=77,
        **options,
    )
    got = sent(kernels)
    assert result is out
    assert (got.workspace, got.size, got.stream) == (workspace.data_ptr(), 1 << 16, 77)
    call = got.call
    assert (call.num_contexts, call.num_context_tokens, call.tokens_per_sequence) == (2, 9, 0)
    assert (call.max_chunk, call.max_past, call.generation_chunk_is_one) == (5, 9, 1)
    with pytest.raises(UsageError, match="num_contexts: missing; 11 packed rows for 4 sequences"):
        kernels.attention(LAYER, tokens(11), caches, **options)
    with pytest.raises(UsageError, match=r"qkv: expected at least 4 packed rows .* found 3"):
        kernels.attention(LAYER, tokens(3), caches, num_contexts=0, **options)


def test_slots_and_gaps(kernels: RazorKernels) -> None:
    """Caches that are parts of larger tensors, with a slot per sequence."""
    big = torch.zeros(6, 4, 80, 64, dtype=torch.float16)
    full = ContiguousView(big[:, :2, :64], big[:, 2:, :64], ints(5, 0))
    whole = Caches.empty(LAYER, 6, "cpu")
    assert isinstance(whole.comp, Compensation)
    comp = Compensation(whole.comp.comp, whole.comp.log_weight, whole.comp.count, ints(5, 0))
    caches = Caches(full, whole.local, comp)
    kernels.attention(LAYER, tokens(2, 1), caches, past=ints(1, 2), cos_sin=table())
    call = sent(kernels).call
    assert (call.full.capacity, call.full.v) == (64, big[:, 2:].data_ptr())
    assert (call.full.slot_stride, call.full.head_stride) == (4 * 80 * 64, 80 * 64)
    assert full.slots is not None
    assert call.full.slots == full.slots.data_ptr()
    assert comp.slots is not None
    assert call.comp.slots == comp.slots.data_ptr()


def test_paged_views_and_the_bubble(kernels: RazorKernels) -> None:
    pool = torch.zeros(1 << 16, dtype=torch.uint8)
    offsets = torch.zeros(2, 3, 5, dtype=torch.int32)  # keys of all sequences, then the values
    view = PagedView(pool, offsets.transpose(0, 1), 16, layer_offset=4096)
    layer = LayerConfig(
        8, 4, 64, 64, POLICY, (1, 3), cache_dtype="float8_e4m3fn", local_ring_offset=16
    )
    narrow = PagedView(pool, offsets.transpose(0, 1), 16, block_bytes=9999, capacity=40)
    scale = torch.ones(1)
    kernels.attention(
        layer,
        tokens(3, 1),
        Caches(view, narrow, BUBBLE),
        past=ints(1, 2, 3),
        cos_sin=table(),
        k_scale=scale,
        v_scale=torch.tensor(2.0),
    )
    call = sent(kernels).call
    full, local = call.full, call.local
    assert (full.kind, full.pool, full.layer_offset) == (2, pool.data_ptr(), 4096)
    assert (full.block_offsets, full.tokens_per_block) == (offsets.data_ptr(), 16)
    assert (full.sequence_stride, full.key_value_stride) == (5, 15)
    assert (full.capacity, full.block_bytes) == (80, 2 * 16 * 64)
    assert (local.capacity, local.block_bytes) == (40, 9999)
    assert (call.comp.kind, call.comp.comp) == (2, None)
    assert call.k_scale == scale.data_ptr()
    wide = Caches(PagedView(pool, offsets.transpose(0, 1), 16, capacity=81), narrow, BUBBLE)
    with pytest.raises(UsageError, match=r"full\.capacity: expected at most 80 rows .* found 81"):
        kernels.attention(layer, tokens(3, 1), wide, past=ints(1, 2, 3), cos_sin=table())


def test_alibi(kernels: RazorKernels) -> None:
    layer = LayerConfig(8, 4, 64, 64, position="alibi")
    caches, slopes = Caches.empty(layer, 1, "cpu"), torch.ones(8)
    kernels.attention(layer, tokens(1, 1), caches, past=ints(1), alibi_slopes=slopes)
    assert sent(kernels).call.alibi_slopes == slopes.data_ptr()
    assert sent(kernels).call.local.kind == structs.VIEW_NONE
    with pytest.raises(UsageError, match="alibi_slopes: missing"):
        kernels.attention(layer, tokens(1, 1), caches, past=ints(1))


def test_from_tensors(kernels: RazorKernels) -> None:
    rows = {"full_k": (2, 64), "full_v": (2, 64), "local_k": (2, 17), "local_v": (2, 17)}
    tensors = {n: torch.zeros(1, h, r, 64, dtype=torch.float16) for n, (h, r) in rows.items()}
    tensors["comp"] = torch.zeros(1, 2, 2, 2, 64)
    tensors["comp_log_weight"], tensors["comp_count"] = torch.zeros(2, 1, 2, 2)
    kernels.attention(
        LAYER, tokens(1, 1), Caches.from_tensors(tensors), past=ints(0), cos_sin=table()
    )
    assert sent(kernels).call.comp.log_weight == tensors["comp_log_weight"].data_ptr()
    assert Caches.from_tensors({}) == Caches()
    with pytest.raises(UsageError, match="caches: missing tensor 'comp_count'"):
        Caches.from_tensors({n: t for n, t in tensors.items() if n != "comp_count"})
    with pytest.raises(UsageError, match="caches: unknown tensor 'full_k_0'; known: full_k"):
        Caches.from_tensors({"full_k_0": tensors["full_k"]})


def wrong_calls() -> list[tuple[str, dict[str, Any], str]]:
    good = Caches.empty(LAYER, 2, "cpu")
    full, local, comp = good.full, good.local, good.comp
    assert isinstance(full, ContiguousView)
    assert isinstance(local, ContiguousView)
    assert isinstance(comp, Compensation)
    half = torch.float16

    def cached(**changes: Any) -> dict[str, Any]:
        parts = {"full": full, "local": local, "comp": comp, **changes}
        return {"caches": Caches(**parts)}

    return [
        ("dtype", {"qkv": tokens(2, 3).bfloat16()}, "qkv: expected dtype float16, found bfloat16"),
        (
            "width",
            {"qkv": tokens(2, 3, width=WIDTH + 1)},
            f"qkv: expected shape [2, S, {WIDTH}], found [2, 3, {WIDTH + 1}]",
        ),
        (
            "batch",
            {"qkv": tokens(3, 3)},
            f"qkv: expected shape [2, S, {WIDTH}], found [3, 3, {WIDTH}]",
        ),
        (
            "rank",
            {"qkv": tokens(1, 2, 3)},
            f"qkv: expected shape [rows, {WIDTH}], found [1, 2, 3, {WIDTH}]",
        ),
        ("no tokens", {"qkv": tokens(2, 0)}, f"qkv: expected tokens, found shape [2, 0, {WIDTH}]"),
        (
            "gaps",
            {"qkv": tokens(2, 3, width=2 * WIDTH)[:, :, ::2]},
            f"qkv: expected its last 3 dimensions without gaps, found shape [2, 3, {WIDTH}] with "
            f"strides [{6 * WIDTH}, {2 * WIDTH}, 2]",
        ),
        (
            "device",
            {"past": ints(0, 0).to("meta")},
            "past: expected a tensor on cpu (where qkv is), found meta",
        ),
        ("no past", {"past": None}, "past: expected past or total, found None for both"),
        (
            "past int64",
            {"past": torch.zeros(2, dtype=torch.int64)},
            "past: expected dtype int32, found int64",
        ),
        ("chunk shape", {"chunk": ints(1, 2, 3)}, "chunk: expected shape [2], found [3]"),
        ("no table", {"cos_sin": None}, "cos_sin: missing; a layer with RoPE needs its table"),
        (
            "table width",
            {"cos_sin": torch.zeros(64, 32)},
            "cos_sin: expected shape [positions, 64], found [64, 32]",
        ),
        ("scale", {"k_scale": torch.ones(2)}, "k_scale: expected shape [1], found [2]"),
        (
            "out",
            {"out": torch.zeros(2, 3, 511, dtype=half)},
            "out: expected shape [2, 3, 512], found [2, 3, 511]",
        ),
        (
            "workspace",
            {"workspace": torch.zeros(8)},
            "workspace: expected dtype uint8, found float32",
        ),
        (
            "no full",
            cached(full=None),
            "caches.full: expected a view for a layer with 2 retrieval heads, found None",
        ),
        (
            "no comp",
            cached(comp=None),
            "caches.comp: expected Compensation for a layer with 2 compensation tokens, found None",
        ),
        (
            "heads",
            cached(full=ContiguousView(full.k[:, :1], full.v)),
            "full.k: expected shape [slots >= B, 2, rows, 64], found [2, 1, 64, 64]",
        ),
        (
            "rows of v",
            cached(full=ContiguousView(full.k, full.v[:, :, :63])),
            "full.v: expected shape [2, 2, 64, 64], found [2, 2, 63, 64]",
        ),
        (
            "strides of v",
            cached(full=ContiguousView(full.k, torch.zeros(2, 2, 65, 64, dtype=half)[:, :, :64])),
            "full.v: expected the strides of full.k [8192, 4096, 64, 1], found [8320, 4160, 64, 1]",
        ),
        (
            "rows with gaps",
            cached(full=ContiguousView(*torch.zeros(2, 2, 2, 128, 64, dtype=half)[:, :, :, ::2])),
            "full.k: expected its last 2 dimensions without gaps, found shape [2, 2, 64, 64] with "
            "strides [16384, 8192, 128, 1]",
        ),
        (
            "cache dtype",
            cached(full=ContiguousView(full.k.float(), full.v)),
            "full.k: expected dtype float16, found float32",
        ),
        (
            "slots",
            cached(local=ContiguousView(local.k[:1], local.v[:1])),
            "local: expected a slot for each of 2 sequences, found 1",
        ),
        (
            "slot numbers",
            cached(local=ContiguousView(local.k, local.v, ints(1))),
            "local.slots: expected shape [2], found [1]",
        ),
        (
            "comp shape",
            cached(comp=Compensation(comp.comp[:, :, :1], comp.log_weight, comp.count)),
            "comp: expected shape [slots >= B, 2, 2, 2, 64], found [2, 2, 1, 2, 64]",
        ),
        (
            "count strides",
            cached(comp=Compensation(comp.comp, comp.log_weight, torch.zeros(2, 3, 2)[:, :2])),
            "comp_count: expected the slot stride of comp_log_weight (4), found 6",
        ),
        (
            "offsets",
            cached(full=PagedView(full.k, torch.zeros(2, 5, dtype=torch.int32), 16)),
            "full.block_offsets: expected shape [2, 2, blocks], found [2, 5]",
        ),
    ]


CASES = wrong_calls()


@pytest.mark.parametrize(
    "changes, message", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_tensors_that_do_not_fit(
    kernels: RazorKernels, changes: dict[str, Any], message: str
) -> None:
    arguments = {
        "qkv": tokens(2, 3),
        "caches": Caches.empty(LAYER, 2, "cpu"),
        "past": ints(0, 0),
        "chunk": ints(3, 3),
        "cos_sin": table(),
    }
    kernels.attention(LAYER, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        kernels.attention(LAYER, **{**arguments, **changes})


def test_views_of_classes_without_heads(kernels: RazorKernels) -> None:
    dense = LayerConfig(8, 4, 64, 64)
    caches, other = Caches.empty(dense, 1, "cpu"), Caches.empty(LAYER, 1, "cpu")
    wrong = Caches(caches.full, other.local)
    message = "caches.local: expected None for a layer with 0 local heads, found ContiguousView"
    with pytest.raises(UsageError, match=re.escape(message)):
        kernels.attention(dense, tokens(1, 1), wrong, past=ints(0), cos_sin=table())


def test_cpu_tensors_are_for_the_tests_library(kernels: RazorKernels) -> None:
    kernels.device_type = "cuda"
    with pytest.raises(UsageError, match="qkv: expected a tensor on cuda, found cpu"):
        kernels.attention(LAYER, tokens(1, 1), Caches(), past=ints(0))


def test_workspace_size_takes_limits(kernels: RazorKernels) -> None:
    assert kernels.workspace_size(LAYER, Limits(3, 10, 5, 64)) == 4096
    limits = sent(kernels).limits
    assert (limits.max_batch, limits.max_context_tokens) == (3, 10)
    assert (limits.max_chunk, limits.max_past) == (5, 64)
