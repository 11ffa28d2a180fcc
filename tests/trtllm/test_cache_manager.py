"""The emulated cache manager and scheduler against numbers worked out by hand from TensorRT-LLM's rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cache_manager import (
    CacheConfig,
    CacheManager,
    OffsetTable,
    OutOfBlocks,
    blocks_of_memory,
    clamp_windows,
)
from in_flight import Batch, Graphs, InFlightBatching, Part, Request

# Two layers of a model: retrieval heads 1 and 3, local heads 3 and 1. The bubble is 12 rows.
CYCLIC = CacheConfig(
    heads=(1, 3, 3, 1),
    head_dim=64,
    element_bytes=2,
    tokens_per_block=16,
    max_seq_len=128,
    max_num_sequences=3,
    windows=(128, 36),
    sink_tokens=4,
    max_num_tokens=40,
    max_input_len=100,
)
LINEAR = replace(CYCLIC, windows=(), sink_tokens=0, linear=True)


def manager(config: CacheConfig, *blocks: int) -> CacheManager:
    return CacheManager(config, dict(zip(config.distinct_windows(), blocks, strict=True)))


# Pools --------------------------------------------------------------------------------------------


def test_pools_by_window_then_by_heads() -> None:
    found = manager(CYCLIC, 6, 20)
    assert [(p.window, p.heads, p.layers) for p in found.pools] == [
        (36, 1, (3,)),
        (36, 3, (1,)),
        (128, 1, (0,)),
        (128, 3, (2,)),
    ]
    assert found.pool_mapping().tolist() == [[2, 0], [1, 0], [3, 0], [0, 0]]
    assert found.window_sizes().tolist() == [128, 36, 128, 36]
    assert found.pools[1].block_bytes == 3 * 64 * 16 * 2
    assert found.pools[1].nbytes == 6 * 1 * 2 * 6144
    assert found.pool_pointers([5, 6, 7, 8]).tolist() == [[5, 0], [6, 0], [7, 0], [8, 0]]


def test_equal_windows_are_one_manager() -> None:
    one = replace(CYCLIC, windows=(128, 200))  # cut to the longest sequence
    assert one.windows == (128, 128)
    found = manager(one, 20)
    assert [(p.heads, p.layers) for p in found.pools] == [(1, (0, 3)), (3, (1, 2))]
    assert found.pool_mapping().tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    # Blocks are counted in keys, or values, of a layer: two layers, twice as far apart.
    assert [found.pools[0].entry(5, value) for value in (False, True)] == [20, 21]
    assert manager(replace(CYCLIC, windows=()), 20).windows[0].window == 128


def test_rows_and_blocks_of_a_sequence() -> None:
    assert CYCLIC.bubble == 12
    assert replace(CYCLIC, sink_tokens=32).bubble == 0
    assert [CYCLIC.max_token_num(w) for w in (36, 128)] == [48, 140]
    assert [CYCLIC.blocks_per_sequence(w) for w in (36, 128)] == [3, 9]
    assert CYCLIC.table_width == 9
    chunks = replace(CYCLIC, paged_context=True)
    assert [chunks.temporary_rows(w) for w in (36, 80, 128)] == [40, 20, 0]
    assert chunks.blocks_per_sequence(36) == 6  # 88 rows
    linear = replace(LINEAR, windows=(128, 36))
    assert [linear.blocks_per_sequence(w) for w in (36, 128)] == [8, 8]
    with pytest.raises(AssertionError, match="knows no sinks"):
        replace(LINEAR, sink_tokens=4)


# Memory -------------------------------------------------------------------------------------------


def test_memory_is_shared_out() -> None:
    # 1,024 bytes of a token in either window; 10 sequences of 36 + 128 tokens, and a little.
    memory = 10 * 164 * 1024 + 2000
    assert blocks_of_memory(CYCLIC, memory) == {36: 23, 128: 81}  # 360 and 1,281 tokens
    assert blocks_of_memory(CYCLIC, memory, max_tokens=100) == {36: 7, 128: 7}
    linear = replace(LINEAR, windows=(128, 36))
    assert blocks_of_memory(linear, memory) == {36: 52, 128: 52}  # 820 tokens each
    assert blocks_of_memory(linear, memory, max_tokens=100) == {36: 52, 128: 52}
    assert blocks_of_memory(LINEAR, memory, max_tokens=100) == {128: 7}
    with pytest.raises(AssertionError, match="no block"):
        blocks_of_memory(CYCLIC, 1000)


@pytest.mark.parametrize(
    "blocks, windows",
    [
        ({36: 3, 128: 9}, (128, 36)),  # just enough: 48 and 140 rows
        ({36: 3, 128: 8}, (108, 36)),  # 28 generated tokens take 3 blocks; 28 + 5 · 16
        ({36: 3, 128: 2}, (32, 36)),  # not even these fit: what there is
        ({36: 2, 128: 9}, (128, 32)),
    ],
)
def test_windows_are_clamped(blocks: dict[int, int], windows: tuple[int, ...]) -> None:
    clamped, left = clamp_windows(CYCLIC, blocks)
    assert clamped.windows == windows
    assert left == {windows[1]: blocks[36], windows[0]: blocks[128]}


def test_a_linear_window_has_a_block_to_spare() -> None:
    linear = replace(LINEAR, windows=(128, 36))
    assert clamp_windows(linear, {36: 4, 128: 8})[0].windows == (128, 36)
    assert clamp_windows(linear, {36: 3, 128: 8})[0].windows == (128, 28 + 16)


# Sequences ----------------------------------------------------------------------------------------


def test_a_ring_stops_growing() -> None:
    found = manager(CYCLIC, 6, 20)
    local, full = found.windows
    found.add_sequence(7, 30)  # 42 rows
    assert (local.of[7], full.of[7]) == ([0, 1, 2], [0, 1, 2])
    grown: list[tuple[str, int]] = []
    for token in range(30, 128):
        before = len(local.of[7]), len(full.of[7])
        found.add_token(7)
        grown += [("local", token)] * (len(local.of[7]) - before[0])
        grown += [("full", token)] * (len(full.of[7]) - before[1])
    # Token 36 is in row 48 of the full layers, and in row 16 again of the local ones.
    assert grown == [("full", token) for token in range(36, 128, 16)]
    assert (len(local.of[7]), len(full.of[7])) == (3, 9)


def test_a_long_prompt_has_no_more_than_the_window() -> None:
    found = manager(CYCLIC, 6, 20)
    found.add_sequence(0, 100)
    assert [len(w.of[0]) for w in found.windows] == [3, 7]
    chunks = manager(replace(CYCLIC, paged_context=True), 6, 20)
    chunks.add_sequence(0, 100)
    assert [len(w.of[0]) for w in chunks.windows] == [6, 7]  # what reads it takes more


def test_the_last_block_of_many_sinks_comes_late() -> None:
    """18 sinks and 14 rows of bubble are two blocks; a prompt of one token has the first of them."""
    found = manager(replace(CYCLIC, sink_tokens=18, windows=(128, 34)), 6, 20)
    found.add_sequence(0, 1)
    blocks = []
    for _ in range(20):
        blocks.append(len(found.windows[0].of[0]))
        found.add_token(0)
    assert blocks == [1, 1] + [2] * 16 + [3] * 2  # tokens 1, 2; 3 .. 18; 19, 20


def test_blocks_go_round() -> None:
    found = manager(replace(LINEAR, max_seq_len=64), 8)
    window = found.windows[0]
    for sequence in (0, 1):
        found.add_sequence(sequence, 33)
    assert (window.of[0], window.of[1]) == ([0, 1, 2], [3, 4, 5])
    assert found.remove_sequence(0) == {64: [0, 1, 2]}
    assert list(window.free) == [6, 7, 2, 1, 0]
    found.add_sequence(2, 40)
    assert window.of[2] == [6, 7, 2]
    with pytest.raises(OutOfBlocks, match="window 64: no block for sequence 3"):
        found.add_sequence(3, 40)


def test_a_linear_sequence_grows_with_each_block() -> None:
    found = manager(LINEAR, 8)
    found.add_sequence(0, 32)
    sizes = []
    for _ in range(18):
        found.add_token(0)
        sizes.append(len(found.windows[0].of[0]))
    assert sizes == [3] * 16 + [4] * 2  # tokens 33 .. 48, 49, 50


def test_a_linear_window_gives_blocks_back_and_keeps_their_entries() -> None:
    found = manager(replace(LINEAR, windows=(36,)), 8)
    window = found.windows[0]
    found.add_sequence(0, 51)
    assert window.of[0] == [0, 1, 2, 3]
    found.add_token(0)  # 52 = 36 + 16
    assert window.of[0] == [0, 1, 2, 3]
    assert window.owned(0, found.removed[0]) == [1, 2, 3]
    assert list(window.free) == [4, 5, 6, 7, 0]
    found.remove_sequence(0)
    assert list(window.free) == [4, 5, 6, 7, 0, 3, 2, 1]


# The table ----------------------------------------------------------------------------------------


def test_what_a_sequence_does_not_have_is_left_over() -> None:
    found = manager(replace(CYCLIC, heads=(1, 3), max_seq_len=40, windows=(40, 20)), 6, 12)
    table = OffsetTable(found)
    assert table.width == 4  # 40 + 12 rows
    found.add_sequence(0, 30)  # local: 2 blocks, full: 3
    found.add_sequence(1, 3)  # 1 and 1
    host, device = table.fill([0, 1])
    assert host.shape == (2, 2, 2, 4)
    assert host[:, 0].tolist() == [[[0, 2, 0, 0], [1, 3, 0, 0]], [[0, 2, 4, 0], [1, 3, 5, 0]]]
    assert host[:, 1].tolist() == [[[4, 0, 0, 0], [5, 0, 0, 0]], [[6, 0, 0, 0], [7, 0, 0, 0]]]
    assert np.array_equal(device, host)
    found.remove_sequence(0)
    host, device = table.fill([1])  # rows are elsewhere now, one block a row is copied
    assert host[0, 0].tolist() == [[4, 2, 0, 0], [5, 3, 0, 0]]  # behind it: of sequence 0
    assert host[1, 0].tolist() == [[6, 0, 0, 0], [7, 0, 0, 0]]  # behind it: of itself, pool 0
    assert np.array_equal(device, host)
    found.add_sequence(2, 30)
    _, device = table.fill([2])
    assert device[1, 0].tolist() == [[8, 10, 12, 0], [9, 11, 13, 0]]


def test_the_device_gets_as_many_columns_as_are_needed() -> None:
    found = manager(replace(CYCLIC, heads=(1, 3), max_seq_len=40, windows=(40, 20)), 6, 12)
    table = OffsetTable(found)
    found.add_sequence(0, 3)
    table.fill([0])
    table._host[:] = 99  # as if an earlier step had left something
    host, device = table.fill([0])
    assert host[0, 0].tolist() == [[0, 99, 99, 99], [1, 99, 99, 99]]
    assert device[0, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


# Batching -----------------------------------------------------------------------------------------


def batching(config: CacheConfig, *blocks: int, **options: bool) -> InFlightBatching:
    choice = {"evict": True, "chunked": False, "fused": True, **options}
    return InFlightBatching(manager(config, *blocks), 3, **choice)


def shapes(batches: list[Batch]) -> list[list[tuple[int, int, int]]]:
    """(request, begin, tokens) of each call."""
    return [[(p.sequence, p.begin, p.tokens) for p in batch.parts] for batch in batches]


def test_host_arrays() -> None:
    request = Request(0, prompt=10, max_new=5, position=10, generated=3, slot=2)
    batch = Batch(
        (
            Part(Request(1, 20, 9, slot=1), 8, 12, True, 1, 20),
            Part(request, 12, 1, False, 1, 10),
        )
    )
    assert batch.num_tokens == 13
    assert {name: array.tolist() for name, array in batch.arrays().items()} == {
        "sequence_length": [20, 13],
        "host_past_key_value_lengths": [20, 12],
        "context_lengths": [12, 10],
        "host_context_lengths": [12, 10],
        "host_request_types": [0, 1],
        "slot_mapping": [1, 2],
    }


def test_a_request_from_beginning_to_end() -> None:
    run = batching(LINEAR, 20, fused=False)
    run.submit(Request(0, prompt=10, max_new=3))
    found = []
    for _ in range(3):
        batches = run.step()
        found += shapes(batches)
        run.done(batches)
        if len(found) == 1:
            run.submit(Request(1, prompt=4, max_new=1))
    # The last token is not cached. A hybrid model's contexts have a call of their own, the first.
    assert found == [[(0, 0, 10)], [(1, 0, 4)], [(0, 10, 1)], [(0, 11, 1)]]
    assert not run.active
    assert len(run.manager.windows[0].free) == 20


def test_chunks() -> None:
    """Generations take their tokens first, what is left goes to prompts in whole blocks; prompts that are
    read to their end come last."""
    run = batching(replace(CYCLIC, paged_context=True), 30, 40, chunked=True)
    for request in (Request(0, 5, 9), Request(1, 60, 2), Request(2, 30, 2)):
        run.submit(request)
    found = []
    for _ in range(4):
        batches = run.step()
        found += shapes(batches)
        run.done(batches)
    assert found == [
        [(1, 0, 32), (0, 0, 5)],  # 40 tokens in all; 35 are 2 blocks and a rest
        [(1, 32, 28), (0, 5, 1)],  # the 11 left are no block
        [(2, 0, 30), (0, 6, 1), (1, 60, 1)],
        [(0, 7, 1), (2, 30, 1)],
    ]
    assert run.chunks == 1


def test_without_chunks_a_prompt_waits() -> None:
    run = batching(CYCLIC, 30, 40)
    for request in (Request(0, 30, 2), Request(1, 30, 2), Request(2, 5, 2)):
        run.submit(request)
    assert shapes(run.step()) == [[(0, 0, 30)]]  # and all behind it


def test_the_last_one_is_paused() -> None:
    run = batching(replace(LINEAR, max_seq_len=64, max_input_len=20), 4)
    run.submit(Request(0, 16, 30))
    run.submit(Request(1, 16, 30))
    found = []
    for _ in range(18):
        batches = run.step()
        found.append(shapes(batches)[0])
        run.done(batches)
    assert found[0] == [(0, 0, 16), (1, 0, 16)]
    assert found[16] == [(0, 31, 1), (1, 31, 1)]
    assert found[17] == [(0, 32, 1)]  # needs a third block
    paused = run.active[1]
    # It had generated 17 tokens; a prompt may have 20, so 13 of them are made again.
    assert (paused.prompt, paused.max_new, paused.generated, paused.position) == (20, 26, 0, 0)
    assert (run.pauses, run.dropped, paused.slot) == (1, 13, -1)
    while run.active[0].number == 0:
        batches = run.step()
        run.done(batches)
    assert shapes(run.step()) == [[(1, 0, 20)]]
    assert run.active[0].slot == 2  # another one: slots go round, too


def test_without_eviction_a_request_waits_for_all_its_blocks() -> None:
    run = batching(replace(LINEAR, max_seq_len=64), 4, evict=False)
    run.submit(Request(0, 16, 30))  # 46 tokens: 3 blocks
    run.submit(Request(1, 10, 10))  # 2
    assert shapes(run.step()) == [[(0, 0, 16)]]


def test_graphs_are_replayed_with_lengths_rounded_up() -> None:
    def call(graphs: Graphs, begin: int) -> tuple[bool, list[int]]:
        part = Part(Request(0, 5, 9), begin, 1, False, 1, 5)
        batch = Batch((part, replace(part, begin=3)))
        arrays = batch.arrays()
        return graphs.apply(batch, arrays), arrays["host_past_key_value_lengths"].tolist()

    graphs = Graphs(max_seq_len=400)
    assert call(graphs, 200) == (False, [200, 3])
    assert call(graphs, 201) == (True, [256, 256])
    assert call(graphs, 256) == (True, [256, 256])
    assert call(graphs, 257) == (False, [257, 3])
    assert call(graphs, 258) == (True, [399, 399])
    context = Batch((Part(Request(0, 5, 9), 0, 5, True, 1, 5),))
    assert not graphs.apply(context, context.arrays())
