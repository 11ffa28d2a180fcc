// How the work of a decode launch is cut: shape of a block, units and items, each block's piece. decode.cuh says why.
#pragma once

#include "device.cuh"
#include "launch.h"
#include "rows.cuh"

namespace razor {
namespace decode {

constexpr int kSlice = 16;   // keys a warp takes at a time: one k-step of P V
constexpr int kTile = 16;    // query heads of an item: rows of an mma
constexpr int kMinUnits = 2; // of a block: fewer are mostly the latency of the first rows, and more to combine
constexpr int kGroup = 16;   // partial results that one block combines

// Shared memory of a multiprocessor, for __launch_bounds__ only.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int kSharedOfChip = 164 * 1024;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedOfChip = 100 * 1024;
#else
constexpr int kSharedOfChip = 228 * 1024;
#endif

// How one instantiation uses a multiprocessor. The stages of a block stay below the 99 KiB that the smallest supported
// chips allow.
template <int D, bool Fp8>
struct Config {
    static constexpr int kWarps = D == 256 ? 2 : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kUnit = kWarps * kSlice; // keys
    static constexpr int kStages = Fp8 ? (D >= 128 ? 3 : 4) : (D == 64 ? 4 : D == 256 ? 2 : 3);
    // Blocks that shared memory allows on a multiprocessor of 228 KiB; registers must leave room for them.
    static constexpr int kResident = D == 128 && !Fp8 ? 2 : D == 64 && Fp8 ? 4 : 3;

    static constexpr int kRowBytes = D * (Fp8 ? 1 : 2);
    static constexpr int kChunks = kRowBytes / 16;
    // 16-bit rows are swizzled for ldmatrix. 8-bit rows are read 4 bytes a lane; 16 bytes more a row keep the 8 rows of
    // K, and the 4 row pairs of V, in different banks.
    static constexpr int kPitch = Fp8 ? kRowBytes + 16 : kRowBytes;
    static constexpr int kTileBytes = kSlice * kPitch;
    static constexpr int kStageBytes = 2 * kTileBytes; // K, V
    static constexpr int kRingBytes = kStages * kStageBytes;

    // Where registers have no room beside the output: 64 of queries and 128 of output, or 32 and 64 in a third block.
    static constexpr bool kQueriesInShared = D == 256 || (D == 128 && Fp8);
    static constexpr int kQueryBytes = kQueriesInShared ? kTile * D * 2 : 0;
    static constexpr int kScratchBytes = 1024;
    static constexpr int kSharedBytes = kWarps * kRingBytes + kQueryBytes + kScratchBytes;
    static_assert(kSharedBytes <= 99 * 1024, "must fit every supported chip");
    // Blocks that the chip being compiled for holds: where shared memory allows fewer, each may take more registers.
    static constexpr int kFit = kSharedOfChip / (kSharedBytes + 1024);
    static constexpr int kBound = kFit < 1 ? 1 : kFit < kResident ? kFit : kResident;

    // Output tile of a warp in fp32, laid over its ring when the ring is done; padded against bank conflicts.
    static constexpr int kOutPitch = D + 8;
    static_assert(kTile * kOutPitch * 4 <= kRingBytes, "output tile over the ring");

    __host__ __device__ static int units(int rows) { return (rows + kUnit - 1) / kUnit; }
    // Units of M compensation tokens in use. Up to one slice rides with the first unit of keys.
    __host__ __device__ static int comp_units(int m) { return m > kSlice ? units(m) : 0; }

    // Place of a 16-byte chunk of a 16-bit tile: the 8 rows that ldmatrix reads at once lie in 8 different groups of
    // four banks. With D = 96 a row is one and a half times around the banks.
    __device__ static int place(int row, int chunk) {
        const int x = D == 96 ? (row >> 1) & 3 : row & 7;
        return row * kPitch + (chunk ^ x) * 16;
    }
};

__host__ __device__ inline int tiles_of(const Params &p) { return (p.group + kTile - 1) / kTile; }
__host__ __device__ inline int tile_rows(const Params &p) { return p.group < kTile ? p.group : kTile; }

// Workspace: ints, then partial results --------------------------------------------------------------
// Every block owns two slots: 0 for an item that began in an earlier block, 1 for one that goes on in the next.
constexpr int kSlots = 2 * kMaxDecodeBlocks;

// Arrivals: of the groups (by slot of their first member), of the items (by block of their first member), and of the
// tiles of a local head, which must all be done before its rows and compensation tokens change.
struct Counters {
    int32_t *groups, *items, *heads;
};
constexpr size_t kFixedInts = kSlots + kMaxDecodeBlocks;

__host__ __device__ inline Counters counters_at(int32_t *ints) {
    return {ints, ints + kSlots, ints + kFixedInts};
}

// A slot in floats: [tile_rows][D] outputs, not normalised, then maxima and sums of the rows.
__host__ __device__ inline int slot_floats(const Params &p) {
    return (tile_rows(p) * (p.head_dim + 2) + 31) / 32 * 32;
}

// What a sequence asks for ---------------------------------------------------------------------------
struct Work {
    Sequence sequence;
    int dropped;
    int full_rows, local_rows;
    int full_units, local_units; // of an item
    int comp_units;              // of them, the first of a local item
    int64_t units;               // of the sequence
};

template <typename C>
__device__ inline Work work_of(const Params &p, int b) {
    Work w;
    w.sequence = sequence_of(p, b);
    const int n = w.sequence.past;
    if (w.sequence.chunk == 0) {
        w.dropped = w.full_rows = w.local_rows = w.full_units = w.local_units = w.comp_units = 0;
        w.units = 0;
        return w;
    }
    w.dropped = p.num_local ? p.policy.dropped(n) : 0;
    w.full_rows = n + 1;
    const int heavy = p.policy.heavy(w.dropped);
    w.local_rows = n + 1 - w.dropped + heavy;
    w.comp_units = w.dropped > heavy ? C::comp_units(p.policy.comp_tokens) : 0;
    w.full_units = C::units(w.full_rows);
    w.local_units = C::units(w.local_rows) + w.comp_units;
    const int64_t units = static_cast<int64_t>(p.num_retrieval) * w.full_units +
                          static_cast<int64_t>(p.num_local) * w.local_units;
    w.units = units * tiles_of(p);
    return w;
}

// The state of a block that its threads have in common. In shared memory: registers are for the main loop.
//
// A block's piece of the line, and how far it has come.
struct Share {
    int64_t total;  // units of the line
    int64_t left;   // of our piece
    int64_t offset; // of the next unit in its sequence
    int64_t end;    // of our piece
    int32_t sequence;
    int32_t blocks; // that have a piece
};

// A (sequence, KV head, tile) and the part of its units that is this block's.
struct Item {
    int64_t begin;    // of the item on the line
    int32_t units;    // of the item; 0 = no item
    int32_t first, last; // ours: [first, last)
    int32_t comp_units;  // the first of them are compensation tokens
    int32_t b, row;   // sequence, its token row
    int32_t past;     // n
    int32_t dropped;  // D(n); 0 for retrieval heads
    int32_t keys;     // kept rows
    int32_t front;    // of them, sinks and heavy hitters: HeadRows::row_of_kept
    int32_t local;    // else retrieval
    int32_t head;     // of its class
    int32_t kv_head;
    int32_t tile, heads; // query heads of the tile
    int32_t query;    // head of its first row
};

struct Scratch {
    Share share;
    Item item;
    float max[4][kTile], sum[4][kTile]; // of each warp
    int64_t totals[4];
    int32_t arrived;
    float distance[4];
    int32_t nearest[4];
    uint64_t lowest[4];
};

__device__ inline int64_t begin_of_block(int64_t total, int blocks, int i) { return total * i / blocks; }
__device__ inline int block_of_unit(int64_t total, int blocks, int64_t unit) {
    return static_cast<int>(((unit + 1) * blocks - 1) / total);
}

// Adds up the units of all sequences, a few for each thread, and sets scratch.share. False: nothing to do. All
// threads of the block.
template <typename C>
__device__ inline bool find_share(const Params &p, Scratch &scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int each = (p.num_generations() + C::kThreads - 1) / C::kThreads;
    int first = p.num_contexts + static_cast<int>(threadIdx.x) * each;
    first = first < p.batch ? first : p.batch;
    const int last = first + each < p.batch ? first + each : p.batch;

    int64_t sum = 0;
    for (int b = first; b < last; ++b) sum += work_of<C>(p, b).units;
    int64_t before = sum;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const int64_t other = shuffle(before, lane >= step ? lane - step : lane);
        if (lane >= step) before += other;
    }
    if (lane == kWarp - 1) scratch.totals[warp] = before;
    sync_block();
    int64_t total = 0;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
        if (w < warp) before += scratch.totals[w];
        total += scratch.totals[w];
    }
    before -= sum;

    const int64_t useful = (total + kMinUnits - 1) / kMinUnits;
    const int blocks = useful < gridDim.x ? static_cast<int>(useful) : static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    if (block >= blocks) return false;
    const int64_t begin = begin_of_block(total, blocks, block);
    if (begin >= before && begin < before + sum) {
        int64_t offset = begin - before;
        int b = first;
        for (;; ++b) {
            const int64_t units = work_of<C>(p, b).units;
            if (offset < units) break;
            offset -= units;
        }
        const int64_t end = begin_of_block(total, blocks, block + 1);
        scratch.share = {total, end - begin, offset, end, b, blocks};
    }
    sync_block();
    return true;
}

// The next item of this block's piece. One thread of the block.
template <typename C>
__device__ inline void next_item(const Params &p, Share &share, Item &item) {
    item.units = 0;
    if (share.left == 0) return;
    Work work = work_of<C>(p, share.sequence);
    while (share.offset >= work.units) {
        share.offset -= work.units;
        work = work_of<C>(p, ++share.sequence);
    }
    // Local heads come first, then retrieval heads; the tiles of a head are neighbours and share its rows in L2.
    const int tiles = tiles_of(p);
    const int64_t local_units = static_cast<int64_t>(p.num_local) * tiles * work.local_units;
    const bool local = share.offset < local_units;
    const int64_t offset = local ? share.offset : share.offset - local_units;
    item.units = local ? work.local_units : work.full_units;
    const int index = static_cast<int>(offset / item.units);
    item.first = static_cast<int>(offset - static_cast<int64_t>(index) * item.units);
    item.last = item.units - item.first < share.left ? item.units : item.first + static_cast<int>(share.left);
    item.begin = share.end - share.left - item.first;
    item.comp_units = local ? work.comp_units : 0;
    item.b = share.sequence;
    item.row = work.sequence.row;
    item.past = work.sequence.past;
    item.dropped = local ? work.dropped : 0;
    item.local = local;
    item.head = index / tiles;
    item.keys = local ? work.local_rows : work.full_rows;
    item.front = p.policy.sinks + p.policy.heavy(item.dropped);
    item.tile = index % tiles;
    item.kv_head = p.head_of[local ? p.num_retrieval + item.head : item.head];
    item.query = item.kv_head * p.group + item.tile * kTile;
    item.heads = p.group - item.tile * kTile < kTile ? p.group - item.tile * kTile : kTile;
    share.offset += item.last - item.first;
    share.left -= item.last - item.first;
}

}  // namespace decode
}  // namespace razor
