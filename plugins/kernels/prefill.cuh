// Attention of contexts: chunks of new tokens over what was cached before them and over themselves, causally.
//
// The query rows of a KV head are its chunk's tokens times its g query heads: row r is token r / g of query head r % g,
// so any g and any chunk length fill tiles. A thread block takes one tile of them and walks over the tiles of one
// sequence of key rows:
//
//   retrieval head   positions 0 .. past + chunk - 1 of `full`, where append has put the chunk
//   local head       compensation tokens | kept rows of the cache | the chunk, from new_k and new_v
//
// In either, the token i of the chunk sees all rows before the chunk and the chunk's rows 0 .. i: one number a query
// row, its last visible key row, is the whole mask. Only tiles around the diagonal look at it.
//
// Four warps hold 16 or 32 query rows each, with the accumulators of all of head_dim. 32 rows a warp halve what is read
// of shared memory per multiplication (16 rows read as fast as an A100 can multiply), 16 rows need half of the memory
// and waste less on short chunks: prefill() below chooses. Keys and values have one buffer each: the next keys arrive
// during softmax and P V, values during Q K, and two or more blocks on a multiprocessor fill each other's gaps. Second
// buffers would cost the second block.
//
// Where such tiles are too few for the chip, a block takes only a piece of the key rows: see prefill_split.cuh.
#pragma once

#include "device.cuh"
#include "launch.h"
#include "params.h"
#include "prefill_split.cuh"
#include "rows.cuh"

namespace razor {
namespace prefill_detail {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;

// Which rows a block works on: filled in by one thread. It is in shared memory because some twenty registers that are
// needed once a tile would otherwise stay occupied through the multiplications.
struct Task {
    HeadRows rows;
    HeadComp comp;
    const char *new_k, *new_v;  // row of the chunk's first token, local heads
    int64_t new_stride;         // bytes from token to token
    int64_t first_row;          // (token row, query head) of query row 0, in rows of head_dim elements
    int32_t num_comp;           // compensation tokens that take part
    int32_t num_cached;         // rows from the cache; includes the chunk where it is in the cache already
    int32_t num_keys;           // all: compensation, cached, new
    int32_t ring_start, front;  // see HeadRows::row_of_kept
    int32_t dropped;            // D(past)
    int32_t before_chunk;       // key rows before the chunk
    int32_t past;
    int32_t num_rows;           // query rows of the head: chunk * g; 0 = nothing to do
    int32_t first_head;         // first query head
    float k_scale, v_scale;
    float logit_scale;          // of q k with k as cached, to base 2
};

// RowTiles: rows a warp holds, in 16s.
template <typename T, int D, int RowTiles>
struct Shape {
    static constexpr int kRows = kWarps * 16 * RowTiles;   // query rows of a block
    static constexpr int kWarpRows = 16 * RowTiles;
    static constexpr int kKeys = tile_keys(D);             // key rows of a tile
    static constexpr int kChunks = D / 8;                  // 16 bytes each, of a row
    static constexpr int kRowBytes = D * 2;
    static constexpr int kTileBytes = kKeys * kRowBytes;
    static constexpr int kQueryBytes = kRows * kRowBytes;
    static constexpr int kRawBytes = kKeys * D;            // a tile as it lies in an FP8 cache
    // Queries stay in registers where the accumulators leave enough of them; else they are read again for every tile.
    static constexpr bool kKeepQueries = RowTiles == 1 || D <= 64;
    // Shared memory: [queries] values, keys, [FP8: raw keys or values], tables. Kept queries of 16 rows a warp borrow
    // the place of the tiles.
    static constexpr bool kBorrow = kKeepQueries && RowTiles == 1;
    static constexpr int kValuesAt = kBorrow ? 0 : kQueryBytes;
    static constexpr int kKeysAt = kValuesAt + kTileBytes;
    static constexpr bool kQueriesOverKeys = kBorrow && kQueryBytes > kTileBytes;
    static constexpr int kTilesEnd = kKeysAt + kTileBytes;
    static_assert(kQueryBytes <= kTilesEnd, "the output is staged where queries and tiles were");
    static constexpr int kBlocksPerSm = RowTiles == 1 && D < 128 ? 3 : 2;

    // Swizzle: the same 16-byte column of 8 consecutive rows lies in 8 different groups of banks.
    __device__ static int turn(int row) { return D == 96 ? row >> 1 & 3 : row & 7; }
    __device__ static int at(int row, int chunk) { return row * kRowBytes + ((chunk ^ turn(row)) << 4); }
    // at(row, 2 * pair + odd), for ldmatrix with a `pair` known to the compiler: it is made of few different numbers
    // and constants. The plain form gives one number a pair, which would occupy a register each.
    static constexpr int kTurns = D == 96 ? 2 : 4; // pairs of columns that take part in a turn
    __device__ static int at_pair(int row, int pair, int odd) {
        return row * kRowBytes + pair / kTurns * (kTurns * 32) + (((pair % kTurns * 2 + odd) ^ turn(row)) << 4);
    }
};

template <typename S>
struct Tables {
    uintptr_t address[2][2][S::kKeys]; // [even or odd tile][keys, values]; 0 = no such row, zeros
    float weight[2][S::kKeys];         // log2 of a compensation token's weight; 0 for other rows
    float position[2][S::kKeys];       // ALiBi
    float slope[S::kRows];             // ALiBi, times log2 e
    int32_t last[S::kRows];            // last visible key row
    Task task;
    Piece piece;
};

template <typename S>
constexpr size_t shared_bytes(bool fp8) {
    return S::kTilesEnd + (fp8 ? S::kRawBytes : 0) + sizeof(Tables<S>);
}

__device__ inline void make_task(Task &task, const Params &p, int context, int head, int head_dim) {
    const Sequence seq = sequence_of(p, context);
    const bool local = head >= p.num_retrieval;
    const int bytes = p.cache_bytes(), kv_head = p.head_of[head];
    task.num_rows = seq.chunk * p.group;
    task.past = seq.past;
    task.first_head = kv_head * p.group;
    task.first_row = static_cast<int64_t>(seq.row) * p.num_heads + task.first_head;
    task.k_scale = p.cache_type == CacheType::kFp8 && p.k_scale ? *p.k_scale : 1.f;
    task.v_scale = p.cache_type == CacheType::kFp8 && p.v_scale ? *p.v_scale : 1.f;
    task.logit_scale = p.scale * task.k_scale * kLog2e;
    if (seq.chunk == 0) return; // numbers that do not fit: touch nothing
    task.num_comp = 0;
    if (local) {
        const int h = head - p.num_retrieval;
        task.rows = head_rows(p.local, context, h, head_dim * bytes);
        task.dropped = p.policy.dropped(seq.past);
        task.ring_start = task.dropped % p.local.ring_rows;
        const int heavy = p.policy.heavy(task.dropped);
        task.front = task.rows.sinks + heavy;
        task.num_cached = seq.past - task.dropped + heavy;
        // As long as all that was dropped has rows of its own, all of them are unused.
        if (task.dropped > heavy && p.policy.comp_tokens > 0) {
            task.num_comp = p.policy.comp_tokens;
            task.comp = head_comp(p, task.rows, context, h);
        }
        const int64_t offset = (static_cast<int64_t>(seq.row) * p.num_local + h) * head_dim * bytes;
        task.new_k = p.new_k + offset;
        task.new_v = p.new_v + offset;
        task.new_stride = static_cast<int64_t>(p.num_local) * head_dim * bytes;
        task.before_chunk = task.num_comp + task.num_cached;
        task.num_keys = task.before_chunk + seq.chunk;
    } else {
        task.rows = head_rows(p.full, context, head, head_dim * bytes);
        task.dropped = task.ring_start = 0;
        task.front = task.rows.sinks;
        task.num_cached = task.num_keys = seq.past + seq.chunk;
        task.before_chunk = seq.past;
    }
}

// Addresses, weights and positions of the key rows of a tile: once a row, whatever the cache looks like.
template <typename S>
__device__ inline void look_up(Tables<S> &tables, int tile, bool alibi) {
    const int i = threadIdx.x % S::kKeys;
    const bool values = threadIdx.x / S::kKeys;
    if (threadIdx.x >= 2 * S::kKeys) return;
    const Task &task = tables.task;
    const int key = tile * S::kKeys + i;
    const int cached = key - task.num_comp; // index among the rows from the cache
    const char *address = nullptr;
    if (cached >= 0 && cached < task.num_cached) {
        const int row = task.rows.row_of_kept(cached, task.ring_start, task.front);
        if (row < task.rows.capacity) address = values ? task.rows.value(row) : task.rows.key(row);
    } else if (cached >= 0 && key < task.num_keys) {
        address = (values ? task.new_v : task.new_k) + (cached - task.num_cached) * task.new_stride;
    }
    tables.address[tile & 1][values][i] = reinterpret_cast<uintptr_t>(address);
    if (values) return;
    float weight = 0.f;
    if (cached < 0) weight = fmaxf(task.comp.log_weight[key] * kLog2e, kMasked); // -inf: unused
    tables.weight[tile & 1][i] = weight;
    if (alibi) {
        const int sinks = task.rows.sinks;
        float position = static_cast<float>(cached < sinks ? cached : cached + task.dropped);
        if (cached < 0) position = sinks + 0.5f * (task.dropped - 1);
        tables.position[tile & 1][i] = position;
    }
}

// The 16 bytes of a tile that are this thread's in the pass that begins at `first`; PerRow of them are a row. Where a
// pass is whole rows, its addresses differ from the first pass's by a constant.
template <int PerRow>
__device__ inline int row_of_pass(int first) {
    if (kThreads % PerRow == 0) return threadIdx.x / PerRow + first / PerRow;
    return (first + threadIdx.x) / PerRow;
}
template <int PerRow>
__device__ inline int piece_of_pass(int first) {
    if (kThreads % PerRow == 0) return threadIdx.x % PerRow;
    return (first + threadIdx.x) % PerRow;
}

// Enqueues the copies of a tile: rows of 16-bit elements to their places.
template <typename S>
__device__ inline void request(char *tile, const uintptr_t *address) {
#pragma unroll 4
    for (int i = 0; i < S::kKeys * S::kChunks; i += kThreads) {
        const int row = row_of_pass<S::kChunks>(i), chunk = piece_of_pass<S::kChunks>(i);
        const uintptr_t from = address[row];
        copy_async16(tile + S::at(row, chunk), reinterpret_cast<const void *>(from + chunk * 16), from != 0);
    }
}

// FP8: rows to a waiting area, 16 elements a piece. Each thread converts the pieces it copied itself, so that one area
// serves keys and values without barriers. Unrolled little, as these loops run while most registers hold accumulators.
template <typename S>
__device__ inline void request_raw(char *raw, const uintptr_t *address) {
    constexpr int kPieces = S::kChunks / 2;
#pragma unroll 2
    for (int i = 0; i < S::kKeys * kPieces; i += kThreads) {
        const int row = row_of_pass<kPieces>(i), piece = piece_of_pass<kPieces>(i);
        const uintptr_t from = address[row];
        copy_async16(raw + (i + threadIdx.x) * 16, reinterpret_cast<const void *>(from + piece * 16), from != 0);
    }
}

template <typename T, typename S>
__device__ inline void convert_raw(char *tile, const char *raw) {
    constexpr int kPieces = S::kChunks / 2;
#pragma unroll 1
    for (int i = 0; i < S::kKeys * kPieces; i += kThreads) {
        const int row = row_of_pass<kPieces>(i), piece = piece_of_pass<kPieces>(i);
        const uint4 bytes = *reinterpret_cast<const uint4 *>(raw + (i + threadIdx.x) * 16);
        const uint2 a = from_fp8x4<T>(bytes.x), b = from_fp8x4<T>(bytes.y);
        const uint2 c = from_fp8x4<T>(bytes.z), d = from_fp8x4<T>(bytes.w);
        *reinterpret_cast<uint4 *>(tile + S::at(row, 2 * piece)) = {a.x, a.y, b.x, b.y};
        *reinterpret_cast<uint4 *>(tile + S::at(row, 2 * piece + 1)) = {c.x, c.y, d.x, d.y};
    }
}

// Compensation tokens first .. num_comp - 1 to the beginning of a tile. Each 16 bytes are written by the thread that
// copied or converted the zeros there, so that no barrier is needed in between. Rare, and not inlined: its registers
// would be taken from the accumulators of the loop.
template <typename T, typename S>
__device__ __attribute__((noinline)) void place_comp(char *tile, const float *comp, int64_t stride, int first,
                                                     int num_comp, float inverse_scale, bool fp8) {
    const int pieces = fp8 ? S::kChunks / 2 : S::kChunks; // of a row
    const int left = num_comp - first;
    const int end = (left < S::kKeys ? left : S::kKeys) * pieces;
    for (int i = threadIdx.x; i < end; i += kThreads) {
        const int row = i / pieces;
        int chunk = fp8 ? i % pieces * 2 : i % pieces;
        const int last = fp8 ? chunk + 1 : chunk;
        for (; chunk <= last; ++chunk) {
            const float *from = comp + (first + row) * stride + chunk * 8;
            uint4 to;
            to.x = pack<T>(from[0] * inverse_scale, from[1] * inverse_scale);
            to.y = pack<T>(from[2] * inverse_scale, from[3] * inverse_scale);
            to.z = pack<T>(from[4] * inverse_scale, from[5] * inverse_scale);
            to.w = pack<T>(from[6] * inverse_scale, from[7] * inverse_scale);
            *reinterpret_cast<uint4 *>(tile + S::at(row, chunk)) = to;
        }
    }
}

// Query row r is row (token, head) of q and of out; where it begins, in elements.
__device__ inline int64_t row_offset(const Task &task, const Params &p, int row, int head_dim) {
    const int token = row / p.group;
    return (task.first_row + static_cast<int64_t>(token) * p.num_heads + (row - token * p.group)) * head_dim;
}

// What block blockIdx.x of a line works on. A barrier must follow.
template <int D>
__device__ inline void find_work(Task &task, Piece &piece, const Params &p, int pieces) {
    if (threadIdx.x < kWarp) find_piece<D>(piece, p, pieces, static_cast<int>(blockIdx.x));
    sync_block();
    if (threadIdx.x == 0 && piece.count > 0) {
        make_task(task, p, piece.context, piece.head, D);
        const int rows = (piece.tile + 1) * kSplitRows;
        const int last_row = (rows < task.num_rows ? rows : task.num_rows) - 1;
        trim_piece(piece, tile_keys(D), task.before_chunk + last_row / p.group);
    }
}

// grid: (tiles of query rows, contexts, KV heads): retrieval heads and late rows, which have most to read, start first;
// blocks that run at the same time read the same keys. Split: places on the line.
template <typename T, int D, int RowTiles, bool Split>
__global__ void __launch_bounds__(kThreads, Shape<T, D, RowTiles>::kBlocksPerSm)
    prefill_kernel(const __grid_constant__ Params p, const Line line) {
    using S = Shape<T, D, RowTiles>;
    const bool fp8 = p.cache_type == CacheType::kFp8, alibi = p.position == RAZOR_ALIBI;
    char *const shared = shared_memory();
    char *const values = shared + S::kValuesAt, *const keys = shared + S::kKeysAt;
    char *const raw = shared + S::kTilesEnd;
    auto &tables = *reinterpret_cast<Tables<S> *>(shared + S::kTilesEnd + (fp8 ? S::kRawBytes : 0));
    const Task &task = tables.task;
    const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * S::kWarpRows;

    const Piece &piece = tables.piece;
    if constexpr (Split) {
        static_assert(S::kRows == kSplitRows, "items of the line");
        find_work<D>(tables.task, tables.piece, p, line.pieces);
    } else if (threadIdx.x == 0) {
        make_task(tables.task, p, blockIdx.y, blockIdx.z, D);
    }
    sync_block();
    if (Split && piece.count == 0) return;
    const int block_row = (Split ? piece.tile : static_cast<int>(gridDim.x - 1 - blockIdx.x)) * S::kRows;
    if (block_row >= task.num_rows) return;
    const int first_tile = Split ? piece.index * piece.key_tiles : 0;

    look_up(tables, first_tile, alibi);
    // Rows behind the last one: they compute with zeros what the last token sees, and are not written.
    for (int i = threadIdx.x; i < S::kRows; i += kThreads) {
        const int row = block_row + i < task.num_rows ? block_row + i : task.num_rows - 1;
        tables.last[i] = task.before_chunk + row / p.group;
        if (alibi) tables.slope[i] = p.slopes[task.first_head + row % p.group] * kLog2e;
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < S::kRows * S::kChunks; i += kThreads) {
        const int row = i / S::kChunks, chunk = i % S::kChunks;
        const bool valid = block_row + row < task.num_rows;
        const int64_t offset = row_offset(task, p, valid ? block_row + row : block_row, D) + chunk * 8;
        copy_async16(shared + S::at(row, chunk), static_cast<const T *>(p.q) + offset, valid);
    }
    copy_commit();
    sync_block(); // tables

    const auto request_tile = [&](char *to, int tile, int values_or_keys) {
        const uintptr_t *address = tables.address[tile & 1][values_or_keys];
        if (fp8) request_raw<S>(raw, address);
        else request<S>(to, address);
        copy_commit();
    };
    // After it, and a barrier, the tile is there for all.
    const auto finish_tile = [&](char *to, int tile, const float *comp, float comp_scale) {
        copy_wait<0>();
        if (fp8) convert_raw<T, S>(to, raw);
        const int first_key = tile * S::kKeys;
        if (first_key < task.num_comp)
            place_comp<T, S>(to, comp, task.comp.stride, first_key, task.num_comp, 1.f / comp_scale, fp8);
    };
    if (fp8 || !S::kQueriesOverKeys) request_tile(keys, first_tile, 0);

    // Lane's part of ldmatrix addresses. Matrices of queries and values: rows 0-7, rows 8-15, then the next 8 columns;
    // of keys: columns first.
    const int row_in_pair = lane & 15, chunk_of_pair = lane >> 4;
    constexpr int kStep = 16 * S::kRowBytes;
    const char *const queries = shared + warp_row * S::kRowBytes;
    const int key_in_pair = (lane >> 4 << 3) + (lane & 7), chunk_of_key = lane >> 3 & 1;

    uint32_t query[S::kKeepQueries ? RowTiles : 1][S::kKeepQueries ? D / 16 : 1][4];
    if constexpr (S::kKeepQueries) {
        copy_wait<0>();
        sync_block();
#pragma unroll
        for (int t = 0; t < RowTiles; ++t)
#pragma unroll
            for (int k = 0; k < D / 16; ++k)
                load_matrix_x4(query[t][k], queries + t * kStep + S::at_pair(row_in_pair, k, chunk_of_pair));
        if constexpr (S::kQueriesOverKeys) {
            sync_block();
            if (!fp8) request_tile(keys, first_tile, 0);
        }
    }

    float out[RowTiles][D / 8][4];
    float top[RowTiles][2], sum[RowTiles][2]; // of rows lane / 4 and lane / 4 + 8; sum: of this lane's columns
#pragma unroll
    for (int t = 0; t < RowTiles; ++t) {
        top[t][0] = top[t][1] = kMasked;
        sum[t][0] = sum[t][1] = 0.f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[t][n][0] = out[t][n][1] = out[t][n][2] = out[t][n][3] = 0.f;
    }

    // What is the same for all tiles is read from shared memory again: registers are full.
    const int &last_key = Split ? tables.piece.last : tables.last[S::kRows - 1];
    for (int tile = first_tile; tile * S::kKeys <= last_key; ++tile) {
        const int first_key = tile * S::kKeys;
        const bool more = first_key + S::kKeys <= last_key;
        finish_tile(keys, tile, task.comp.k, task.k_scale);
        sync_block(); // keys are here, everyone has done with the last tile's values and tables
        request_tile(values, tile, 1);
        if (more) look_up(tables, tile + 1, alibi);

        // A warp has nothing to do above its diagonal.
        const bool visible = first_key <= tables.last[warp_row + S::kWarpRows - 1];
        float logit[RowTiles][S::kKeys / 8][4];
        if (visible) {
#pragma unroll
            for (int t = 0; t < RowTiles; ++t)
#pragma unroll
                for (int n = 0; n < S::kKeys / 8; ++n)
                    logit[t][n][0] = logit[t][n][1] = logit[t][n][2] = logit[t][n][3] = 0.f;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
                uint32_t a[RowTiles][4];
#pragma unroll
                for (int t = 0; t < RowTiles; ++t) {
                    if constexpr (S::kKeepQueries) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) a[t][i] = query[t][k][i];
                    } else {
                        load_matrix_x4(a[t], queries + t * kStep + S::at_pair(row_in_pair, k, chunk_of_pair));
                    }
                }
#pragma unroll
                for (int n = 0; n < S::kKeys / 16; ++n) {
                    uint32_t b[4];
                    load_matrix_x4(b, keys + n * kStep + S::at_pair(key_in_pair, k, chunk_of_key));
#pragma unroll
                    for (int t = 0; t < RowTiles; ++t) {
                        mma<T>(logit[t][2 * n], a[t], b[0], b[1]);
                        mma<T>(logit[t][2 * n + 1], a[t], b[2], b[3]);
                    }
                }
            }
        }

        finish_tile(values, tile, task.comp.v, task.v_scale);
        sync_block(); // values are here, everyone has done with the keys
        if (more) request_tile(keys, tile + 1, 0);
        if (!visible) continue;

        const int pair = 2 * (lane & 3); // first column of this lane in 8
        float factor = task.logit_scale; // of the logits as they stand
        if (alibi || first_key < task.num_comp) {
            const float scale = factor;
            factor = 1.f;
            const int to_time = task.past - task.before_chunk; // last visible key row -> position of the query
#pragma unroll
            for (int t = 0; t < RowTiles; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = warp_row + t * 16 + half * 8 + lane / 4;
                    const float slope = alibi ? tables.slope[row] : 0.f;
                    const float time = static_cast<float>(tables.last[row] + to_time);
#pragma unroll
                    for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const int column = n * 8 + pair + i;
                            float bias = tables.weight[tile & 1][column];
                            if (alibi) bias += slope * (tables.position[tile & 1][column] - time);
                            float &x = logit[t][n][2 * half + i];
                            x = x * scale + bias;
                        }
                }
        }
        if (first_key + S::kKeys - 1 > tables.last[warp_row]) {
#pragma unroll
            for (int t = 0; t < RowTiles; ++t)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int last = tables.last[warp_row + t * 16 + half * 8 + lane / 4] - first_key - pair;
#pragma unroll
                    for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            if (n * 8 + i > last) logit[t][n][2 * half + i] = -CUDART_INF_F; // whatever factor is
                }
        }

        // Softmax so far. A row that saw only unused compensation tokens yet has top = kMasked and sums of no meaning;
        // the first row it does see multiplies them by 0.
#pragma unroll
        for (int t = 0; t < RowTiles; ++t) {
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float highest = logit[t][0][2 * half];
#pragma unroll
                for (int n = 0; n < S::kKeys / 8; ++n)
                    highest = fmaxf(highest, fmaxf(logit[t][n][2 * half], logit[t][n][2 * half + 1]));
                highest = fmaxf(highest, shuffle_xor(highest, 1));
                highest = fmaxf(highest, shuffle_xor(highest, 2));
                highest = fmaxf(top[t][half], highest * factor);
                shrink[half] = exp2_fast(top[t][half] - highest);
                top[t][half] = highest;
                float added = 0.f;
#pragma unroll
                for (int n = 0; n < S::kKeys / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        float &x = logit[t][n][2 * half + i];
                        x = exp2_fast(x * factor - highest);
                        added += x;
                    }
                sum[t][half] = sum[t][half] * shrink[half] + added;
            }
            if (shrink[0] != 1.f || shrink[1] != 1.f) { // rare once a few tiles are done
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    out[t][n][0] *= shrink[0];
                    out[t][n][1] *= shrink[0];
                    out[t][n][2] *= shrink[1];
                    out[t][n][3] *= shrink[1];
                }
            }
        }

#pragma unroll
        for (int k = 0; k < S::kKeys / 16; ++k) {
            uint32_t a[RowTiles][4];
#pragma unroll
            for (int t = 0; t < RowTiles; ++t) {
                a[t][0] = pack<T>(logit[t][2 * k][0], logit[t][2 * k][1]);
                a[t][1] = pack<T>(logit[t][2 * k][2], logit[t][2 * k][3]);
                a[t][2] = pack<T>(logit[t][2 * k + 1][0], logit[t][2 * k + 1][1]);
                a[t][3] = pack<T>(logit[t][2 * k + 1][2], logit[t][2 * k + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                uint32_t b[4];
                load_matrix_x4_trans(b, values + k * kStep + S::at_pair(row_in_pair, n, chunk_of_pair));
#pragma unroll
                for (int t = 0; t < RowTiles; ++t) {
                    mma<T>(out[t][2 * n], a[t], b[0], b[1]);
                    mma<T>(out[t][2 * n + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

    // One of several pieces: as it is, to the workspace. A row that sees none of its keys leaves kMasked, 0 and zeros.
    if (Split && piece.count > 1) {
        const int rows = slot_rows(p);
        float *const slot = line.slots + static_cast<int64_t>(piece.slot) * slot_floats(p);
#pragma unroll
        for (int t = 0; t < RowTiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float total = sum[t][half];
                total += shuffle_xor(total, 1);
                total += shuffle_xor(total, 2);
                const int row = warp_row + t * 16 + half * 8 + lane / 4;
                if (block_row + row >= task.num_rows) continue;
                float *const to = slot + row * D + 2 * (lane & 3);
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    *reinterpret_cast<float2 *>(to + n * 8) = {out[t][n][2 * half], out[t][n][2 * half + 1]};
                if ((lane & 3) == 0) {
                    slot[rows * D + row] = top[t][half];
                    slot[rows * (D + 1) + row] = total;
                }
            }
        return;
    }

    // Through shared memory, so that a row is written 16 bytes a lane. Each warp its own rows.
    sync_block();
#pragma unroll
    for (int t = 0; t < RowTiles; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = sum[t][half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            const float inverse = task.v_scale / total;
            const int row = warp_row + t * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                *reinterpret_cast<uint32_t *>(shared + S::at(row, n) + (lane & 3) * 4) =
                    pack<T>(out[t][n][2 * half] * inverse, out[t][n][2 * half + 1] * inverse);
        }
    sync_warp();
#pragma unroll 2
    for (int i = lane; i < S::kWarpRows * S::kChunks; i += kWarp) {
        const int row = warp_row + i / S::kChunks, chunk = i % S::kChunks;
        if (block_row + row >= task.num_rows) continue;
        *reinterpret_cast<uint4 *>(static_cast<T *>(p.out) + row_offset(task, p, block_row + row, D) + chunk * 8) =
            *reinterpret_cast<const uint4 *>(shared + S::at(row, chunk));
    }
}

// Partial results of pieces -> output. The blocks of an item's pieces share its rows: piece i takes the rows i,
// i + count and so on, which is one of them, or a few. A group of D / 4 threads holds a row, 4 columns a thread. Where
// there are fewer rows than groups, several groups add up a row's pieces.
template <int D>
struct Combine {
    static constexpr int kColumns = D / 4;
    static constexpr int kGroups = D > 64 ? 8 : 16;
    static constexpr int kCombineThreads = kColumns * kGroups;
    static_assert(kCombineThreads % kWarp == 0, "whole warps");

    struct Shared {
        float4 out[kGroups][kColumns];
        float top[kGroups], sum[kGroups];
        Task task;
        Piece piece;
    };
};

// grid: the line, as before it in prefill_kernel.
template <typename T, int D>
__global__ void __launch_bounds__(Combine<D>::kCombineThreads)
    combine_kernel(const __grid_constant__ Params p, const Line line) {
    using C = Combine<D>;
    constexpr int kAtOnce = 4; // pieces that a thread has under way
    auto &shared = *reinterpret_cast<typename C::Shared *>(shared_memory());
    const Task &task = shared.task;
    const Piece &piece = shared.piece;
    find_work<D>(shared.task, shared.piece, p, line.pieces);
    sync_block();
    const int count = piece.count;
    if (count <= 1) return;

    const int first_row = piece.tile * kSplitRows;
    const int rows = task.num_rows - first_row < kSplitRows ? task.num_rows - first_row : kSplitRows;
    const int ours = piece.index < rows ? ceil_div(rows - piece.index, count) : 0;
    int parts = 1; // groups of a row
    while (2 * parts * ours <= C::kGroups && 2 * parts <= count) parts *= 2;
    const int group = threadIdx.x / C::kColumns, column = threadIdx.x % C::kColumns;
    const int part = group % parts, rows_at_once = C::kGroups / parts;
    const int max_rows = slot_rows(p);
    const int64_t step = static_cast<int64_t>(slot_floats(p)) * piece.slot_step;
    const float *const slots = line.slots + static_cast<int64_t>(piece.slot) * slot_floats(p) - piece.index * step;

    for (int first = 0; first < ours; first += rows_at_once) {
        const int number = first + group / parts;
        const int row = piece.index + number * count;
        float top = kMasked, sum = 0.f;
        float4 out = {0.f, 0.f, 0.f, 0.f};
        const auto add = [&](float factor, const float4 &x) {
            out.x += factor * x.x;
            out.y += factor * x.y;
            out.z += factor * x.z;
            out.w += factor * x.w;
        };
        for (int i = part; i < count && number < ours; i += kAtOnce * parts) {
            float tops[kAtOnce], sums[kAtOnce];
            float4 outs[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const bool there = i + j * parts < count;
                const float *const slot = slots + (there ? i + j * parts : i) * step;
                tops[j] = there ? slot[max_rows * D + row] : kMasked;
                sums[j] = there ? slot[max_rows * (D + 1) + row] : 0.f;
                outs[j] = there ? *reinterpret_cast<const float4 *>(slot + row * D + 4 * column)
                                : float4{0.f, 0.f, 0.f, 0.f};
            }
            float highest = top;
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) highest = fmaxf(highest, tops[j]);
            const float shrink = exp2_fast(top - highest);
            top = highest;
            sum *= shrink;
            out = {out.x * shrink, out.y * shrink, out.z * shrink, out.w * shrink};
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const float factor = exp2_fast(tops[j] - highest);
                sum += factor * sums[j];
                add(factor, outs[j]);
            }
        }
        if (part > 0) {
            shared.out[group][column] = out;
            if (column == 0) {
                shared.top[group] = top;
                shared.sum[group] = sum;
            }
        }
        sync_block();
        if (part == 0 && number < ours) {
            float highest = top;
            for (int i = 1; i < parts; ++i) highest = fmaxf(highest, shared.top[group + i]);
            const float shrink = exp2_fast(top - highest);
            sum *= shrink;
            out = {out.x * shrink, out.y * shrink, out.z * shrink, out.w * shrink};
            for (int i = 1; i < parts; ++i) {
                const float factor = exp2_fast(shared.top[group + i] - highest);
                sum += factor * shared.sum[group + i];
                add(factor, shared.out[group + i][column]);
            }
            const float inverse = task.v_scale / sum;
            T *const to = static_cast<T *>(p.out) + row_offset(task, p, first_row + row, D) + 4 * column;
            *reinterpret_cast<uint2 *>(to) = {pack<T>(out.x * inverse, out.y * inverse),
                                              pack<T>(out.z * inverse, out.w * inverse)};
        }
        sync_block();
    }
}

template <typename T, int D, int RowTiles>
cudaError_t launch_shape(const Params &p, cudaStream_t stream) {
    using S = Shape<T, D, RowTiles>;
    const dim3 grid(static_cast<unsigned>(tiles_of(p, S::kRows)), p.num_contexts, p.num_kv_heads);
    const size_t shared = shared_bytes<S>(p.cache_type == CacheType::kFp8);
    return launch(prefill_kernel<T, D, RowTiles, false>, grid, dim3(kThreads), shared, stream, p, Line{});
}

template <typename T, int D>
cudaError_t launch_split(const Params &p, float *slots, const Split &split, cudaStream_t stream) {
    const Line line = {slots, split.pieces};
    const size_t shared = shared_bytes<Shape<T, D, 1>>(p.cache_type == CacheType::kFp8);
    const dim3 grid(split.blocks);
    const cudaError_t error = launch(prefill_kernel<T, D, 1, true>, grid, dim3(kThreads), shared, stream, p, line);
    if (error != cudaSuccess) return error;
    return launch(combine_kernel<T, D>, grid, dim3(Combine<D>::kCombineThreads), sizeof(typename Combine<D>::Shared),
                  stream, p, line);
}

}  // namespace prefill_detail

template <typename T, int D>
cudaError_t prefill(const Params &p, float *slots, const DeviceInfo &device, cudaStream_t stream) {
    using namespace prefill_detail;
    // Large tiles where two blocks of them fit on a multiprocessor (1 KiB a block is the system's) and the heads with
    // most to read have enough of them to go round. The others need at most 99 KiB a block and run everywhere.
    if constexpr (D <= 128) {
        using S = Shape<T, D, 2>;
        const int long_heads = p.num_retrieval ? p.num_retrieval : p.num_kv_heads;
        const bool fits = 2 * (shared_bytes<S>(p.cache_type == CacheType::kFp8) + 1024) <=
                          static_cast<size_t>(device.max_shared_per_block) + 1024;
        const bool fills = tiles_of(p, S::kRows) * long_heads * p.num_contexts >= 2 * static_cast<int64_t>(device.sms);
        if (fits && fills) return launch_shape<T, D, 2>(p, stream);
    }
    static_assert(shared_bytes<Shape<T, D, 1>>(true) <= 99 * 1024, "sm_86, sm_89 and sm_120 have no more");
    const Split split = split_of(p, device, Shape<T, D, 1>::kBlocksPerSm);
    if (split.pieces > 0) return launch_split<T, D>(p, slots, split, stream);
    return launch_shape<T, D, 1>(p, stream);
}

}  // namespace razor
