// Short chunks on a long past: how prefill divides the key rows of a tile of query rows among several blocks.
//
// Fifty tokens behind a hundred thousand are a handful of tiles of query rows, each of which walks over all keys: a
// handful of blocks, and a chip that waits for them. So the walk is cut. The host only decides whether it is, and into
// how many pieces of all items together (an item: one tile of query rows of one KV head of one context). How long a
// piece is and whose it is, blocks find out themselves from the lengths on the device: these may be far below what the
// host was promised, and differ between the sequences of a call. Pieces of all items are about equally long; items
// that are no longer than one stay whole and write their output as ever. The others leave partial results, their
// outputs not normalised with maxima and sums of the rows, in a slot of the workspace a piece; the kernel that follows
// combines them in the order of the keys, so that a call gives the same bits every time.
//
// Pieces lie on a line: contexts, in them heads, in these pieces, and in these tiles of query rows, which read the same
// keys and should run together. A block finds its place as decode's blocks do, by adding up what all contexts ask for.
#pragma once

#include "device.cuh"
#include "launch.h"
#include "params.h"
#include "rows.cuh"

// Keys of the shortest piece. At 16 bits they and their values are four times what 64 rows of partial results take,
// which are written and read again. Tests on a CPU make it smaller.
#ifndef RAZOR_PREFILL_PIECE
#define RAZOR_PREFILL_PIECE 256
#endif

namespace razor {
namespace prefill_detail {

constexpr int kSplitRows = 64;              // query rows of an item
constexpr int kMaxSlots = 640;
constexpr size_t kMaxSlotBytes = 20u << 20; // of all slots
constexpr int kMinSplitKeys = 4 * RAZOR_PREFILL_PIECE; // of the longest sequence; else a second kernel costs too much

__host__ __device__ constexpr int tile_keys(int head_dim) { return head_dim > 128 ? 32 : 64; }

template <typename I>
__host__ __device__ constexpr I ceil_div(I a, I b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int min_piece_tiles(int head_dim) {
    return ceil_div(RAZOR_PREFILL_PIECE, tile_keys(head_dim));
}

// Tiles of so many query rows, of a KV head of the longest chunk.
inline int64_t tiles_of(const Params &p, int rows) {
    return ceil_div(static_cast<int64_t>(p.max_chunk) * p.group, static_cast<int64_t>(rows));
}

// Slots: [rows][head_dim] outputs, maxima of the rows, sums of the rows ------------------------------

__host__ __device__ inline int slot_rows(const Params &p) {
    const int64_t rows = static_cast<int64_t>(p.max_chunk) * p.group;
    return rows < kSplitRows ? static_cast<int>(rows) : kSplitRows;
}
__host__ __device__ inline int slot_floats(const Params &p) { return (slot_rows(p) * (p.head_dim + 2) + 31) / 32 * 32; }

inline bool long_enough_to_split(const Params &p) {
    return p.num_contexts > 0 && static_cast<int64_t>(p.max_past) + p.max_chunk >= kMinSplitKeys;
}

// Without regard to the device, which nobody knows when workspaces are made. Each of the limits grows with the call.
inline size_t bytes_of_slots(const Params &p) {
    if (!long_enough_to_split(p)) return 0;
    const int64_t items = tiles_of(p, kSplitRows) * p.num_contexts * p.num_kv_heads;
    const int piece = min_piece_tiles(p.head_dim) * tile_keys(p.head_dim);
    const int64_t pieces = (items < kMaxSlots ? items : kMaxSlots) * ceil_div(p.max_past + p.max_chunk, piece);
    const size_t bytes = (pieces < kMaxSlots ? pieces : kMaxSlots) * slot_floats(p) * sizeof(float);
    return bytes < kMaxSlotBytes ? bytes : kMaxSlotBytes;
}

// Host -----------------------------------------------------------------------------------------------

// What both kernels are told.
struct Line {
    float *slots;
    int32_t pieces; // of all items together, before each is rounded up
};

struct Split {
    int pieces; // as in Line; 0 = do not split
    int blocks; // of either launch: the pieces that there are at most
};

// resident: blocks of the kernel on a multiprocessor.
inline Split split_of(const Params &p, const DeviceInfo &device, int resident) {
    // Splitting costs a second kernel and a detour of the output through memory, and wins the part of the chip that
    // would be idle: not worth it if the items that have most to read fill more than half of it.
    const int64_t wave = static_cast<int64_t>(device.sms) * resident;
    const int64_t tiles = tiles_of(p, kSplitRows) * p.num_contexts;
    const int64_t items = tiles * p.num_kv_heads;
    if (!long_enough_to_split(p) || 2 * tiles * (p.num_retrieval ? p.num_retrieval : p.num_kv_heads) > wave)
        return {0, 0};
    // Pieces of equal length are best all on the chip at once; rounding adds less than one piece an item. Where that
    // alone is more than half a chip, most items are short ones of local heads and fill gaps.
    int64_t pieces = 2 * items <= wave ? wave - items : wave;
    // Slots: only items longer than a piece have them, fewer than 2 length / piece and than 1 + length / piece. So all
    // have less than twice the pieces, and less than pieces + items.
    const int64_t fit = static_cast<int64_t>(kMaxSlotBytes / (slot_floats(p) * sizeof(float)));
    const int64_t slots = fit < kMaxSlots ? fit : kMaxSlots;
    const int64_t most = slots - items > slots / 2 ? slots - items : slots / 2;
    if (pieces > most) pieces = most;
    return {static_cast<int>(pieces), static_cast<int>(pieces + items)};
}

// Device ---------------------------------------------------------------------------------------------

// A block's place. count = 0: none.
struct Piece {
    int32_t context, head, tile; // the item; head by class index, tile of query rows
    int32_t index, count;        // piece `index` of `count`
    int32_t key_tiles;           // of a piece
    int32_t slot, slot_step;     // this piece's slot; to the item's next piece
    int32_t last;                // last key row of the piece; see trim_piece
};

// What a context asks for. Key tiles of local heads may be a few more or less: an item's last piece takes what is left,
// and pieces that have none are dropped. Never more than those of retrieval heads, which the workspace is made for.
struct Load {
    int32_t tiles;       // of query rows
    int32_t full, local; // key tiles of a head
};

__device__ inline Load load_of(const Params &p, int context) {
    const Sequence seq = sequence_of(p, context);
    if (seq.chunk == 0) return {0, 0, 0};
    const int keys = seq.past + seq.chunk, dropped = p.policy.dropped(seq.past);
    int more = p.policy.heavy(dropped) - dropped; // than keys
    if (more < 0) more += p.policy.comp_tokens;
    return {ceil_div(seq.chunk * p.group, kSplitRows), ceil_div(keys, tile_keys(p.head_dim)),
            ceil_div(keys + (more < 0 ? more : 0), tile_keys(p.head_dim))};
}

// Place number `block` of the line. One warp; all of its lanes.
template <int D>
__device__ inline void find_piece(Piece &piece, const Params &p, int pieces, int block) {
    const int lane = threadIdx.x % kWarp;
    if (lane == 0) piece.count = 0;
    sync_warp();
    int64_t total = 0;
    for (int context = lane; context < p.num_contexts; context += kWarp) {
        const Load load = load_of(p, context);
        total += load.tiles * (static_cast<int64_t>(p.num_retrieval) * load.full +
                               static_cast<int64_t>(p.num_local) * load.local);
    }
#pragma unroll
    for (int i = 1; i < kWarp; i *= 2) total += shuffle_xor(total, i);
    const int64_t equal = (total + pieces - 1) / pieces;
    const int length = equal > min_piece_tiles(D) ? static_cast<int>(equal) : min_piece_tiles(D);

    int blocks_before = 0, slots_before = 0; // of the contexts before these 32
    for (int first = 0; first < p.num_contexts && blocks_before <= block; first += kWarp) {
        const int context = first + lane;
        const Load load = context < p.num_contexts ? load_of(p, context) : Load{0, 0, 0};
        const int full = ceil_div(load.full, length), local = ceil_div(load.local, length);
        const int full_blocks = load.tiles * p.num_retrieval * full, local_blocks = load.tiles * p.num_local * local;
        const int blocks = full_blocks + local_blocks;
        const int slots = (full > 1 ? full_blocks : 0) + (local > 1 ? local_blocks : 0);
        int end = blocks, slots_end = slots; // of the contexts up to this lane's
#pragma unroll
        for (int i = 1; i < kWarp; i *= 2) {
            const int from = lane >= i ? lane - i : lane;
            const int other = shuffle(end, from), other_slots = shuffle(slots_end, from);
            if (lane >= i) {
                end += other;
                slots_end += other_slots;
            }
        }
        int at = block - blocks_before - (end - blocks); // in this context
        if (at >= 0 && at < blocks) {
            const bool retrieval = at < full_blocks;
            int slot = slots_before + slots_end - slots + at;
            if (!retrieval) {
                at -= full_blocks;
                if (full == 1) slot -= full_blocks; // which have none
            }
            const int count = retrieval ? full : local, key_tiles = retrieval ? load.full : load.local;
            const int head = at / (count * load.tiles), rest = at % (count * load.tiles);
            piece.context = context;
            piece.head = retrieval ? head : p.num_retrieval + head;
            piece.tile = rest % load.tiles;
            piece.index = rest / load.tiles;
            piece.count = count;
            piece.key_tiles = ceil_div(key_tiles, count);
            piece.slot = slot;
            piece.slot_step = load.tiles;
        }
        blocks_before += shuffle(end, kWarp - 1);
        slots_before += shuffle(slots_end, kWarp - 1);
    }
}

// Pieces behind the last key row that any row of the item sees are none of it; the item's last piece ends there. Later
// tiles of query rows see further. One thread.
__device__ inline void trim_piece(Piece &piece, int tile_keys, int last_visible) {
    const int keys = piece.key_tiles * tile_keys; // of a piece
    const int needed = last_visible / keys + 1;
    if (needed < piece.count) piece.count = needed;
    piece.last = piece.index < piece.count - 1 ? (piece.index + 1) * keys - 1 : last_visible;
    if (piece.index >= piece.count) piece.count = 0;
}

}  // namespace prefill_detail
}  // namespace razor
