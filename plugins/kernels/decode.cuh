// Attention of generations: one query token of each sequence against all rows that its heads keep, and the fold of the
// token that leaves the window. docs/semantics.md defines the result.
//
// The kernel is bound by the bytes of the cache. Four decisions follow:
//
// * Tensor cores for every group size. The query heads of one KV head are the rows of a 16-row tile, so each key and
//   value is read once for all of them; a group of 1 pads the tile and still issues far fewer instructions than FMAs
//   would. Groups above 16 become several tiles, whose rows come from L2 from the second on.
// * No barrier of the block in the main loop. Each warp runs its own ring of copies over slices of 16 keys.
// * Balance by rows, not by heads. The work of the batch is a line of units (a slice for each warp of a block), items
//   one behind another; an item is a (sequence, KV head, tile). Every block takes an equal piece of the line, wherever
//   items begin and end, so short local heads and long retrieval heads, short and long sequences fill the chip alike.
//   Lengths are read on the device: the same launch serves every replay of a graph.
// * One launch. An item inside one block's piece is finished there. The blocks of a longer one leave partial results,
//   and whoever arrives last combines them: in groups of 16 first, so that an item spread over the whole chip is not
//   combined by a single multiprocessor. Nobody waits for anybody, and sums are always taken in the same order.
#pragma once

#include "device.cuh"
#include "launch.h"
#include "rows.cuh"

namespace razor {
namespace decode {

constexpr int kSlice = 16;   // keys a warp takes at a time: one k-step of P V
constexpr int kTile = 16;    // query heads of an item: rows of an mma
constexpr int kMinUnits = 2; // of a block; below, more blocks cost more in combining than they read faster
constexpr int kGroup = 16;   // partial results that one block combines

// How one instantiation uses a multiprocessor. The stages of a block stay below the 99 KiB that the smallest supported
// chips allow.
template <int D, bool Fp8>
struct Config {
    static constexpr int kWarps = D == 256 ? 2 : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kUnit = kWarps * kSlice; // keys
    static constexpr int kStages = Fp8 ? (D == 256 ? 3 : 4) : (D == 64 ? 4 : D == 256 ? 2 : 3);
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

    // 128 registers of output leave none for 64 of queries.
    static constexpr bool kQueriesInShared = D == 256;
    static constexpr int kQueryBytes = kQueriesInShared ? kTile * D * 2 : 0;
    static constexpr int kScratchBytes = 1024;
    static constexpr int kSharedBytes = kWarps * kRingBytes + kQueryBytes + kScratchBytes;
    static_assert(kSharedBytes <= 99 * 1024, "must fit every supported chip");

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
// tiles of a local head, which must all be done before its compensation tokens change.
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
    w.local_rows = n + 1 - w.dropped;
    w.comp_units = w.dropped ? C::comp_units(p.policy.comp_tokens) : 0;
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
};

__device__ inline int64_t begin_of_block(int64_t total, int blocks, int i) { return total * i / blocks; }
__device__ inline int block_of_unit(int64_t total, int blocks, int64_t unit) {
    return static_cast<int>(((unit + 1) * blocks - 1) / total);
}

// Adds up the units of all sequences, a few for each thread, and sets scratch.share. False: nothing to do. All threads of
// the block.
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

// One warp -------------------------------------------------------------------------------------------
// Queries as A fragments; columns in the order in which keys are read (see Fp8 below).
template <int D>
struct Queries {
    uint32_t a[D == 256 ? 1 : D / 16][4];
};

// Running softmax of 16 rows over the keys a warp has seen. o in the layout of mma's c; sums are of this lane's columns.
template <int D>
struct Attention {
    float o[D / 8][4];
    float max[2], sum[2]; // rows lane / 4, lane / 4 + 8; max in units of log2
};

// FP8 has no ldmatrix. Instead the freedom of a dot product is used: k may be in any order that keys and queries share,
// and output columns in any order that the writer knows. With r = lane / 4, c = lane % 4:
//   K: the 4 bytes at [key r][16 kk + 4 c] are this lane's b0 and b1 of step kk, so columns 4 c .. 4 c + 3 of the
//      queries stand where a fragment has 2 c, 2 c + 1, 2 c + 8, 2 c + 9.
//   V: the 4 bytes at [key][32 j + 4 r] go to 4 different n-tiles, so column n of tile 4 j + t is d = 32 j + 4 n + t.
// first: 0 for the low, 1 for the high half of k.
template <bool Fp8>
__device__ inline int query_column(int step, int c, int half) {
    return Fp8 ? 16 * step + 4 * c + 2 * half : 16 * step + 2 * c + 8 * half;
}

// q: row 0 of the tile.
template <int D, bool Fp8>
__device__ __forceinline__ void load_queries(Queries<D> &queries, const char *q, int heads, int lane) {
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = r + 8 * (i & 1), column = query_column<Fp8>(kk, c, i >> 1);
            queries.a[kk][i] = row < heads ? *reinterpret_cast<const uint32_t *>(q + (row * D + column) * 2) : 0u;
        }
    }
}

// The same for D = 256, into shared memory, so that ldmatrix yields the fragments. All threads of the block.
template <int D, bool Fp8>
__device__ __forceinline__ void share_queries(char *shared, const char *q, int heads) {
    using C = Config<D, false>;
    for (int i = threadIdx.x; i < kTile * D / 2; i += C::kThreads) {
        const int row = i / (D / 2), pair = i % (D / 2);
        const int step = pair / 8, c = pair % 4, half = pair % 8 / 4; // of the fragment
        const int column = query_column<Fp8>(step, c, half);
        const uint32_t two = row < heads ? *reinterpret_cast<const uint32_t *>(q + (row * D + column) * 2) : 0u;
        *reinterpret_cast<uint32_t *>(shared + C::place(row, pair / 4) + pair % 4 * 4) = two;
    }
}

template <int D>
__device__ __forceinline__ void query_fragment(uint32_t (&a)[4], const Queries<D> &queries, const char *shared, int kk,
                                               int lane) {
    if (D == 256) {
        load_matrix_x4(a, shared + Config<D, false>::place(lane & 15, 2 * kk + (lane >> 4)));
    } else {
        const int step = D == 256 ? 0 : kk;
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = queries.a[step][i];
    }
}

// s[t]: q . k of 16 rows and keys 8 t .. 8 t + 7 of the tile at `keys`.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ void dot_keys(float (&s)[2][4], const Queries<D> &queries, const char *shared_queries,
                                         const char *keys, int lane) {
    using C = Config<D, Fp8>;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][i] = 0.f;
    }
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
        uint32_t a[4];
        query_fragment<D>(a, queries, shared_queries, kk, lane);
        if (Fp8) {
            const char *at = keys + lane / 4 * C::kPitch + 16 * kk + lane % 4 * 4;
            const uint2 low = from_fp8x4<T>(*reinterpret_cast<const uint32_t *>(at));
            const uint2 high = from_fp8x4<T>(*reinterpret_cast<const uint32_t *>(at + 8 * C::kPitch));
            mma<T>(s[0], a, low.x, low.y);
            mma<T>(s[1], a, high.x, high.y);
        } else {
            uint32_t k[4];
            load_matrix_x4(k, keys + C::place((lane >> 4) * 8 + (lane & 7), 2 * kk + (lane >> 3 & 1)));
            mma<T>(s[0], a, k[0], k[1]);
            mma<T>(s[1], a, k[2], k[3]);
        }
    }
}

// Bytes 0, 1 (high: 2, 3) of two keys, alternating.
__device__ inline uint32_t interleave(uint32_t a, uint32_t b, bool high) {
    if (high) {
        a >>= 16;
        b >>= 16;
    }
    return (a & 0xffu) | (b & 0xffu) << 8 | (a & 0xff00u) << 8 | (b & 0xff00u) << 16;
}

// o += p v, 16 keys.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ void add_values(Attention<D> &out, const uint32_t (&p)[4], const char *values, int lane) {
    using C = Config<D, Fp8>;
    if (Fp8) {
        const char *at = values + lane % 4 * 2 * C::kPitch + lane / 4 * 4;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            const uint32_t k0 = *reinterpret_cast<const uint32_t *>(at + 32 * j);
            const uint32_t k1 = *reinterpret_cast<const uint32_t *>(at + 32 * j + C::kPitch);
            const uint32_t k8 = *reinterpret_cast<const uint32_t *>(at + 32 * j + 8 * C::kPitch);
            const uint32_t k9 = *reinterpret_cast<const uint32_t *>(at + 32 * j + 9 * C::kPitch);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const uint2 b0 = from_fp8x4<T>(interleave(k0, k1, t));
                const uint2 b1 = from_fp8x4<T>(interleave(k8, k9, t));
                const int n = D >= 32 ? 4 * j + 2 * t : 0;
                mma<T>(out.o[n], p, b0.x, b1.x);
                mma<T>(out.o[n + 1], p, b0.y, b1.y);
            }
        }
    } else {
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t v[4];
            load_matrix_x4_trans(v, values + C::place(lane & 15, 2 * j + (lane >> 4)));
            mma<T>(out.o[2 * j], p, v[0], v[1]);
            mma<T>(out.o[2 * j + 1], p, v[2], v[3]);
        }
    }
}

// Takes 16 logits a row (log2 units) into the softmax and returns their weights as an A fragment. Sparse: a whole row may
// be masked.
template <typename T, int D, bool Sparse>
__device__ __forceinline__ void weigh(Attention<D> &out, float (&s)[2][4], uint32_t (&p)[4]) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float top = fmaxf(fmaxf(s[0][2 * i], s[0][2 * i + 1]), fmaxf(s[1][2 * i], s[1][2 * i + 1]));
        top = fmaxf(top, shuffle_xor(top, 1));
        top = fmaxf(top, shuffle_xor(top, 2));
        top = fmaxf(top, out.max[i]);
        scale[i] = exp2_fast(out.max[i] - top);
        out.max[i] = top;
    }
    // Maxima settle after a few slices; most find nothing to rescale.
    if (scale[0] != 1.f || scale[1] != 1.f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) out.sum[i] *= scale[i];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out.o[n][i] *= scale[i >> 1];
        }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float e = exp2_fast(s[t][i] - out.max[i >> 1]);
            s[t][i] = Sparse && !(s[t][i] > kMasked) ? 0.f : e;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            out.sum[i] += s[t][2 * i] + s[t][2 * i + 1];
            p[2 * t + i] = pack<T>(s[t][2 * i], s[t][2 * i + 1]);
        }
    }
}

// Up to 16 compensation tokens from `first` on, straight from global memory into fragments: they are few, and a path
// through the ring would need room for fp32. value_scale: from real units to those of the cache.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ void attend_comp(Attention<D> &out, const Queries<D> &queries, const char *shared_queries,
                                            const HeadComp &comp, int first, int count, float scale, float value_scale,
                                            const float (&bias)[2], int lane) {
    const int r = lane / 4, c = lane % 4;
    // Log-weights of this lane's columns: tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9.
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int m = first + 2 * c + (i & 1) + 8 * (i >> 1);
        weight[i] = m < count ? comp.log_weight[m] : -CUDART_INF_F;
    }
    float s[2][4];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[t][i] = 0.f;
    }
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
        uint32_t a[4];
        query_fragment<D>(a, queries, shared_queries, kk, lane);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int m = first + 8 * t + r;
            float2 low{0.f, 0.f}, high{0.f, 0.f};
            if (m < count) {
                const float *k = comp.k + m * comp.stride;
                low = *reinterpret_cast<const float2 *>(k + query_column<Fp8>(kk, c, 0));
                high = *reinterpret_cast<const float2 *>(k + query_column<Fp8>(kk, c, 1));
            }
            mma<T>(s[t], a, pack<T>(low.x, low.y), pack<T>(high.x, high.y));
        }
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float w = weight[2 * t + (i & 1)];
            s[t][i] = w > kMasked ? s[t][i] * scale + bias[i >> 1] + w * kLog2e : kMasked;
        }
    }
    uint32_t p[4];
    weigh<T, D, true>(out, s, p);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        const int d = Fp8 ? 32 * (n / 4) + 4 * r + n % 4 : 8 * n + r;
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int m = first + 2 * c + (i & 1) + 8 * (i >> 1);
            v[i] = weight[i] > kMasked ? comp.v[m * comp.stride + d] * value_scale : 0.f;
        }
        mma<T>(out.o[n], p, pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    }
}

// Keys and values of one item as this warp walks over them: lanes 0 .. 15 know where 16 keys are, lanes 16 .. 31 where
// their values are.
struct Source {
    HeadRows rows;
    char *base;
    const int32_t *blocks;
    int start; // of the ring
    int count; // kept rows

    __device__ Source(const HeadRows &of, const Item &item, int lane)
        : rows(of), base(lane < kSlice ? of.k : of.v), blocks(lane < kSlice ? of.k_blocks : of.v_blocks),
          start(item.dropped % of.ring_rows), count(item.keys) {}

    // Where row `index` is, 0 = nowhere.
    __device__ uint64_t find(int index) const {
        if (index >= count) return 0;
        const int row = rows.row_of_kept(index, start);
        return row < rows.capacity ? reinterpret_cast<uint64_t>(rows.at(base, blocks, row)) : 0;
    }
};

// Starts the copy of 16 rows; `where`: Source::find of each lane. First the keys, then the values, one group each.
template <int D, bool Fp8>
__device__ __forceinline__ void start_copy(char *stage, uint64_t where, int lane) {
    using C = Config<D, Fp8>;
#pragma unroll
    for (int values = 0; values < 2; ++values) {
        char *tile = stage + values * C::kTileBytes;
#pragma unroll
        for (int i = 0; i < C::kChunks / 2; ++i) {
            const int chunk = (lane + kWarp * i) % C::kChunks, row = (lane + kWarp * i) / C::kChunks;
            const uint64_t from = shuffle(where, kSlice * values + row);
            char *to = tile + (Fp8 ? row * C::kPitch + chunk * 16 : C::place(row, chunk));
            copy_async16(to, reinterpret_cast<const char *>(from) + chunk * 16, from != 0);
        }
        copy_commit();
    }
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
    item.keys = local ? work.local_rows : work.full_rows;
    item.local = local;
    item.head = index / tiles;
    item.tile = index % tiles;
    item.kv_head = p.head_of[local ? p.num_retrieval + item.head : item.head];
    item.query = item.kv_head * p.group + item.tile * kTile;
    item.heads = p.group - item.tile * kTile < kTile ? p.group - item.tile * kTile : kTile;
    share.offset += item.last - item.first;
    share.left -= item.last - item.first;
}

// Where a thread of the block puts 4 columns of a finished row.
template <typename T, int D>
__device__ __forceinline__ void write_out(const Params &p, const Item &item, int row, int column, float4 o, float sum,
                                          float scale) {
    T *out = static_cast<T *>(p.out) + (static_cast<int64_t>(item.row) * p.num_heads + item.query + row) * D + column;
    const float f = scale / sum;
    *reinterpret_cast<uint2 *>(out) = {pack<T>(o.x * f, o.y * f), pack<T>(o.z * f, o.w * f)};
}

// Combines the partial results of members first, first + step, … of an item; member 0 is in slot 1 of block `owner`, member
// k in slot 0 of block owner + k. Finished: writes the output; else the result replaces that of the first member.
template <typename T, int D, typename C>
__device__ __forceinline__ void combine(const Params &p, Scratch &scratch, float *partials, int owner,
                                        int first, int step, int count, bool finished, float scale) {
    const Item &item = scratch.item;
    const int rows = tile_rows(p), floats = slot_floats(p);
    const auto slot = [&](int i) {
        const int k = first + i * step;
        return partials + static_cast<int64_t>(k ? 2 * (owner + k) : 2 * owner + 1) * floats;
    };
    for (int i = threadIdx.x; i < item.heads * (D / 4); i += C::kThreads) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        float top = kMasked;
#pragma unroll 4
        for (int k = 0; k < count; ++k) top = fmaxf(top, slot(k)[rows * D + row]);
        float4 o{0.f, 0.f, 0.f, 0.f};
        float sum = 0.f;
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
            const float *from = slot(k);
            const float f = exp2_fast(from[rows * D + row] - top);
            const float4 x = *reinterpret_cast<const float4 *>(from + row * D + column);
            sum += f * from[rows * (D + 1) + row];
            o.x += f * x.x;
            o.y += f * x.y;
            o.z += f * x.z;
            o.w += f * x.w;
        }
        if (finished) {
            write_out<T, D>(p, item, row, column, o, sum, scale);
        } else {
            *reinterpret_cast<float4 *>(slot(0) + row * D + column) = o;
            if (column == 0) {
                scratch.max[0][row] = top;
                scratch.sum[0][row] = sum;
            }
        }
    }
    if (finished) return;
    sync_block(); // every thread has read the maxima
    for (int row = threadIdx.x; row < item.heads; row += C::kThreads) {
        slot(0)[rows * D + row] = scratch.max[0][row];
        slot(0)[rows * (D + 1) + row] = scratch.sum[0][row];
    }
}

// What this block wrote becomes visible, then it counts itself. True in the block that is the last of `expected`; it sees
// what all of them wrote. All threads of the block.
__device__ inline bool arrive(int32_t *counter, int expected, Scratch &scratch) {
    __threadfence();
    sync_block();
    if (threadIdx.x == 0) scratch.arrived = atomicAdd(counter, 1);
    sync_block();
    const bool last = scratch.arrived == expected - 1;
    if (last) __threadfence();
    return last;
}

// Merges the warps of the block and, if the item is spread over several blocks, the blocks. Returns true in the one block
// that wrote the output. All threads of the block; the rings are free on return only behind a sync_block.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ bool finish(const Params &p, Attention<D> &a, char *ring, const char *rings,
                                       Scratch &scratch, const Counters &counters, float *partials, int lane,
                                       int warp) {
    using C = Config<D, Fp8>;
    const Item &item = scratch.item;
    const int r = lane / 4, c = lane % 4;
    sync_warp(); // all lanes are done with the ring
    float *tile = reinterpret_cast<float *>(ring);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum = a.sum[i];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = r + 8 * i;
        if (c == 0) {
            scratch.max[warp][row] = a.max[i];
            scratch.sum[warp][row] = sum;
        }
        if (row < item.heads) {
            float *to = tile + row * C::kOutPitch;
            if (Fp8) {
#pragma unroll
                for (int j = 0; j < D / 32; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        *reinterpret_cast<float4 *>(to + 32 * j + 8 * c + 4 * e) = {
                            a.o[4 * j][2 * i + e], a.o[4 * j + 1][2 * i + e], a.o[4 * j + 2][2 * i + e],
                            a.o[4 * j + 3][2 * i + e]};
                    }
                }
            } else {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    *reinterpret_cast<float2 *>(to + 8 * n + 2 * c) = {a.o[n][2 * i], a.o[n][2 * i + 1]};
                }
            }
        }
    }
    sync_block();

    const float scale = Fp8 && p.v_scale ? *p.v_scale : 1.f;
    const bool whole = item.first == 0 && item.last == item.units;
    const int rows = tile_rows(p), floats = slot_floats(p);
    float *slot = partials + static_cast<int64_t>(2 * blockIdx.x + (item.first == 0)) * floats;
    for (int i = threadIdx.x; i < item.heads * (D / 4); i += C::kThreads) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        float top = scratch.max[0][row];
#pragma unroll
        for (int w = 1; w < C::kWarps; ++w) top = fmaxf(top, scratch.max[w][row]);
        float4 o{0.f, 0.f, 0.f, 0.f};
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            const float f = exp2_fast(scratch.max[w][row] - top);
            const float4 x =
                *reinterpret_cast<const float4 *>(rings + w * C::kRingBytes + (row * C::kOutPitch + column) * 4);
            sum += f * scratch.sum[w][row];
            o.x += f * x.x;
            o.y += f * x.y;
            o.z += f * x.z;
            o.w += f * x.w;
        }
        if (whole) {
            write_out<T, D>(p, item, row, column, o, sum, scale);
        } else {
            *reinterpret_cast<float4 *>(slot + row * D + column) = o;
            if (column == 0) {
                slot[rows * D + row] = top;
                slot[rows * (D + 1) + row] = sum;
            }
        }
    }
    if (whole) return true;

    const Share &share = scratch.share;
    const int owner = block_of_unit(share.total, share.blocks, item.begin);
    const int members = block_of_unit(share.total, share.blocks, item.begin + item.units - 1) - owner + 1;
    const int groups = (members + kGroup - 1) / kGroup;
    const int group = (static_cast<int>(blockIdx.x) - owner) / kGroup, first = group * kGroup;
    const int in_group = members - first < kGroup ? members - first : kGroup;
    const int leader = first ? 2 * (owner + first) : 2 * owner + 1; // slot
    if (!arrive(counters.groups + leader, in_group, scratch)) return false;
    combine<T, D, C>(p, scratch, partials, owner, first, 1, in_group, groups == 1, scale);
    if (groups == 1) return true;
    if (!arrive(counters.items + owner, groups, scratch)) return false;
    combine<T, D, C>(p, scratch, partials, owner, 0, kGroup, groups, true, scale);
    return true;
}

// Fold -----------------------------------------------------------------------------------------------
template <typename T, bool Fp8>
__device__ inline float cached(const char *row, int d, float scale) {
    if (Fp8) {
        const uint32_t two = from_fp8x4<T>(static_cast<uint8_t>(row[d])).x;
        return unpack<T>(two).x * scale;
    }
    return to_float(reinterpret_cast<const T *>(row)[d]);
}

// Puts the token that leaves the window into the compensation tokens of a local head (docs/semantics.md, "Fold", F = 1):
// it opens the first unused cluster, or joins the nearest. All threads of the block.
template <typename T, int D, bool Fp8>
__device__ inline void fold(const Params &p, Scratch &scratch, int lane, int warp) {
    using C = Config<D, Fp8>;
    const Item &item = scratch.item;
    const HeadRows rows = head_rows(p.local, item.b, item.head, C::kRowBytes);
    const int row = rows.row_of_position(p.policy.sinks + item.dropped);
    if (row >= rows.capacity) return;
    const char *key = rows.key(row), *value = rows.value(row);
    const HeadComp comp = head_comp(p, rows, item.b, item.head);
    const int clusters = p.policy.comp_tokens;
    const float k_scale = Fp8 && p.k_scale ? *p.k_scale : 1.f, v_scale = Fp8 && p.v_scale ? *p.v_scale : 1.f;
    int cluster = 0;
    if (clusters > 1) {
        cluster = clusters;
        for (int i = lane; i < clusters; i += kWarp) {
            if (!(comp.count[i] > 0.f) && i < cluster) cluster = i;
        }
#pragma unroll
        for (int mask = kWarp / 2; mask; mask /= 2) {
            const int other = shuffle_xor(cluster, mask);
            cluster = other < cluster ? other : cluster;
        }
        if (cluster == clusters) { // the same in all warps
            float x[D / kWarp];
#pragma unroll
            for (int i = 0; i < D / kWarp; ++i) x[i] = cached<T, Fp8>(key, lane + kWarp * i, k_scale);
            float best = CUDART_INF_F;
            int nearest = 0;
            constexpr int kAtOnce = D <= 128 ? 8 : 4; // loads under way
            for (int first = warp; first < clusters; first += C::kWarps * kAtOnce) {
                float distance[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    const int m = first + C::kWarps * j;
                    const float *mean = comp.k + (m < clusters ? m : first) * comp.stride + lane;
                    distance[j] = 0.f;
#pragma unroll
                    for (int i = 0; i < D / kWarp; ++i) {
                        const float d = x[i] - mean[kWarp * i];
                        distance[j] += d * d;
                    }
                }
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
                    for (int mask = kWarp / 2; mask; mask /= 2) distance[j] += shuffle_xor(distance[j], mask);
                    const int m = first + C::kWarps * j;
                    if (m < clusters && distance[j] < best) {
                        best = distance[j];
                        nearest = m;
                    }
                }
            }
            if (lane == 0) {
                scratch.distance[warp] = best;
                scratch.nearest[warp] = nearest;
            }
            sync_block();
            cluster = scratch.nearest[0];
            best = scratch.distance[0];
#pragma unroll
            for (int w = 1; w < C::kWarps; ++w) {
                const float d = scratch.distance[w];
                const int m = scratch.nearest[w];
                if (d < best || (d == best && m < cluster)) {
                    best = d;
                    cluster = m;
                }
            }
        }
    }
    const float before = comp.count[cluster];
    const bool open = !(before > 0.f);
    const float count = open ? 1.f : before + 1.f;
    float *k = comp.k + cluster * comp.stride, *v = comp.v + cluster * comp.stride;
    for (int d = threadIdx.x; d < D; d += C::kThreads) {
        const float x = cached<T, Fp8>(key, d, k_scale), y = cached<T, Fp8>(value, d, v_scale);
        const float mean_k = k[d], mean_v = v[d];
        k[d] = open ? x : mean_k + (x - mean_k) / count;
        v[d] = open ? y : mean_v + (y - mean_v) / count;
    }
    sync_block(); // every thread has read the count
    if (threadIdx.x == 0) {
        comp.count[cluster] = count;
        comp.log_weight[cluster] = logf(count);
    }
}

// The kernel -----------------------------------------------------------------------------------------
template <typename T, int D, bool Fp8>
__global__ void __launch_bounds__(Config<D, Fp8>::kThreads, Config<D, Fp8>::kResident)
    decode_kernel(const __grid_constant__ Params p, int32_t *ints, float *partials) {
    using C = Config<D, Fp8>;
    constexpr int kAhead = C::kStages - 1; // slices under way while one is computed
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    char *rings = shared_memory();
    char *ring = rings + warp * C::kRingBytes;
    char *shared_queries = rings + C::kWarps * C::kRingBytes;
    Scratch &scratch = *reinterpret_cast<Scratch *>(shared_queries + C::kQueryBytes);
    static_assert(sizeof(Scratch) <= C::kScratchBytes, "scratch");
    const Counters counters = counters_at(ints);

    if (!find_share<C>(p, scratch)) return;
    const Item &item = scratch.item;
    const float scale = p.scale * kLog2e;
    const float key_scale = Fp8 && p.k_scale ? scale * *p.k_scale : scale;

    for (;;) {
        if (threadIdx.x == 0) next_item<C>(p, scratch.share, scratch.item);
        sync_block();
        if (item.units == 0) break;
        const Source source(head_rows(item.local ? p.local : p.full, item.b, item.head, C::kRowBytes), item, lane);

        // Slices of this warp: keys at, at + kUnit, …
        const int first_unit = item.first > item.comp_units ? item.first - item.comp_units : 0;
        const int last_unit = item.last - item.comp_units;
        const int at = first_unit * C::kUnit + warp * kSlice;
        int slices = at < source.count ? (source.count - at + C::kUnit - 1) / C::kUnit : 0;
        if (slices > last_unit - first_unit) slices = last_unit - first_unit; // <= 0: compensation tokens only
        const int place = at + lane % kSlice;

        uint64_t where[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) where[i] = i < slices ? source.find(place + i * C::kUnit) : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i < slices) {
                start_copy<D, Fp8>(ring + i * C::kStageBytes, where[i], lane);
            } else {
                copy_commit();
                copy_commit();
            }
        }
        uint64_t next = kAhead < slices ? source.find(place + kAhead * C::kUnit) : 0;

        const char *q = static_cast<const char *>(p.q) +
                        (static_cast<int64_t>(item.row) * p.num_heads + item.query) * D * 2;
        Queries<D> queries;
        if constexpr (C::kQueriesInShared) {
            share_queries<D, Fp8>(shared_queries, q, item.heads);
            sync_block();
        } else {
            load_queries<D, Fp8>(queries, q, item.heads, lane);
        }
        const bool biased = p.position == RAZOR_ALIBI;
        float slope[2] = {0.f, 0.f};
        if (biased) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane / 4 + 8 * i;
                if (row < item.heads) slope[i] = p.slopes[item.query + row] * kLog2e;
            }
        }

        Attention<D> attention;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            attention.max[i] = kMasked;
            attention.sum[i] = 0.f;
        }
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) attention.o[t][i] = 0.f;
        }

        // Compensation tokens, while the first copies are under way.
        if (item.dropped && p.policy.comp_tokens && (item.comp_units ? item.first < item.comp_units : item.first == 0)) {
            const int comp_tokens = p.policy.comp_tokens;
            const HeadRows rows = head_rows(p.local, item.b, item.head, C::kRowBytes);
            const HeadComp comp = head_comp(p, rows, item.b, item.head);
            const float middle = static_cast<float>(p.policy.sinks) + 0.5f * static_cast<float>(item.dropped - 1);
            const float distance = static_cast<float>(item.past) - middle;
            const float bias[2] = {-slope[0] * distance, -slope[1] * distance};
            const float value_scale = Fp8 && p.v_scale ? 1.f / *p.v_scale : 1.f;
            // A single slice rides along with the warp that has the fewest keys.
            const int units = item.last < item.comp_units ? item.last : item.comp_units;
            const int first = item.comp_units ? item.first * C::kWarps + warp : warp - (C::kWarps - 1);
            const int last = item.comp_units ? units * C::kWarps : 1;
            for (int slice = first; slice < last && slice * kSlice < comp_tokens; slice += C::kWarps) {
                if (slice < 0) continue;
                attend_comp<T, D, Fp8>(attention, queries, shared_queries, comp, slice * kSlice, comp_tokens, scale,
                                       value_scale, bias, lane);
            }
        }

        int stage = 0, free_stage = kAhead;
        for (int i = 0; i < slices; ++i) {
            const char *keys = ring + stage * C::kStageBytes;
            copy_wait<2 * (kAhead - 1) + 1>();
            sync_warp(); // keys of slice i are here, and all lanes are done with slice i - 1
            if (i + kAhead < slices) {
                start_copy<D, Fp8>(ring + free_stage * C::kStageBytes, next, lane);
                // Where the slice after that is: the block table answers while this slice is computed.
                next = source.find(place + (i + kAhead + 1) * C::kUnit);
            } else {
                copy_commit();
                copy_commit();
            }

            float s[2][4];
            dot_keys<T, D, Fp8>(s, queries, shared_queries, keys, lane);
            const int first = at + i * C::kUnit;
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[t][e] *= key_scale;
            }
            if (biased) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int k = first + 8 * t + lane % 4 * 2 + (e & 1);
                        const int position = k < p.policy.sinks ? k : k + item.dropped;
                        s[t][e] -= slope[e >> 1] * static_cast<float>(item.past - position);
                    }
                }
            }
            if (first + kSlice > source.count) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if (first + 8 * t + lane % 4 * 2 + (e & 1) >= source.count) s[t][e] = kMasked;
                    }
                }
            }
            uint32_t weights[4];
            weigh<T, D, false>(attention, s, weights);

            copy_wait<2 * kAhead>();
            sync_warp(); // values
            add_values<T, D, Fp8>(attention, weights, keys + C::kTileBytes, lane);
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
            free_stage = free_stage + 1 == C::kStages ? 0 : free_stage + 1;
        }

        const bool wrote = finish<T, D, Fp8>(p, attention, ring, rings, scratch, counters, partials, lane, warp);
        // All blocks of the item have read the compensation tokens.
        if (wrote && item.local && p.policy.comp_tokens && p.policy.dropped(item.past + 1) > item.dropped) {
            const int tiles = tiles_of(p);
            int32_t *counter =
                counters.heads + static_cast<int64_t>(item.b - p.num_contexts) * p.num_local + item.head;
            if (tiles == 1 || arrive(counter, tiles, scratch)) fold<T, D, Fp8>(p, scratch, lane, warp);
        }
        sync_block(); // rings and scratch are free again
    }
}

}  // namespace decode

// Enqueues the kernel of one instantiation.
template <typename T, int D, bool Fp8>
cudaError_t run_decode(const Params &p, int32_t *ints, float *partials, const DeviceInfo &device, cudaStream_t stream) {
    using C = decode::Config<D, Fp8>;
    // A block's shared memory costs the multiprocessor 1 KiB more, and it has 1 KiB more than a block may ask for.
    int resident = (device.max_shared_per_block + 1024) / (C::kSharedBytes + 1024);
    resident = resident < 1 ? 1 : resident < C::kResident ? resident : C::kResident;
    int64_t blocks = static_cast<int64_t>(device.sms) * resident;
    if (blocks > kMaxDecodeBlocks) blocks = kMaxDecodeBlocks;

    // Upper bound of the units, from the longest past.
    const int past = p.max_past < p.max_seq_len ? p.max_past : p.max_seq_len;
    int64_t local_rows = static_cast<int64_t>(past) + 1;
    if (p.num_local) {
        const int64_t window = static_cast<int64_t>(p.policy.sinks) + p.policy.window(past) + 1;
        if (window < local_rows) local_rows = window;
    }
    const int64_t local_units = C::units(static_cast<int>(local_rows)) + C::comp_units(p.policy.comp_tokens);
    const int64_t units = (p.num_retrieval * static_cast<int64_t>(C::units(past + 1)) + p.num_local * local_units) *
                          decode::tiles_of(p) * p.num_generations();
    const int64_t useful = (units + decode::kMinUnits - 1) / decode::kMinUnits;
    if (blocks > useful) blocks = useful;
    if (blocks < 1) blocks = 1;
    return launch(decode::decode_kernel<T, D, Fp8>, dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                  C::kSharedBytes, stream, p, ints, partials);
}

}  // namespace razor
