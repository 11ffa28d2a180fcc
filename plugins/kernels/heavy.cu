// Which dropped tokens stay as heavy hitters (docs/semantics.md, "Heavy hitters"): steps of compact, contexts only.
//
//   score    what the last queries of the chunk give each candidate: one tensor core product, key by query
//   select   the H highest of a head, losers and places of winners as lists
//   keep     winners to their rows
//
// Where all that is dropped finds a free row nothing is chosen: score and select are not launched, or leave at once.
// A decode step chooses inside its own kernel (decode_fold.cuh).
#include "heavy.cuh"
#include "launch.h"

namespace razor {
namespace {

// Scores ---------------------------------------------------------------------------------------------

constexpr int kScoreThreads = 128;
constexpr int kTile = 64; // candidates of a block, 16 a warp; query rows at a time

template <int D>
struct ScoreShape {
    static constexpr int kChunks = D / 8; // 16 bytes each, of a row
    static constexpr int kRowBytes = D * 2;
    static constexpr int kTileBytes = kTile * kRowBytes;
    static constexpr int kBlocksPerSm = D > 128 ? 3 : 4;
    // The same 16-byte column of 8 consecutive rows lies in 8 different groups of banks.
    __device__ static int at(int row, int chunk) {
        const int turn = D == 96 ? row >> 1 & 3 : row & 7;
        return row * kRowBytes + ((chunk ^ turn) << 4);
    }
};

struct Addresses {
    uintptr_t keys[kTile], values[kTile]; // 0 = no candidate
    uintptr_t queries[2][kTile];          // of an even, of an odd tile
};

template <int D>
constexpr size_t score_shared() { return 2 * ScoreShape<D>::kTileBytes + sizeof(Addresses); }

// Starts the copies of 64 rows of 16-bit elements, as one group.
template <int D>
__device__ inline void request(char *tile, const uintptr_t *from) {
    using S = ScoreShape<D>;
#pragma unroll 4
    for (int i = threadIdx.x; i < kTile * S::kChunks; i += kScoreThreads) {
        const int row = i / S::kChunks, chunk = i % S::kChunks;
        copy_async16(tile + S::at(row, chunk), reinterpret_cast<const char *>(from[row]) + chunk * 16, from[row] != 0);
    }
    copy_commit();
}

// A block scores 64 candidates of a head by all query rows; such a row is (token, query head of the group).
template <typename T, int D, bool kFp8>
__global__ void __launch_bounds__(kScoreThreads, ScoreShape<D>::kBlocksPerSm)
    score_kernel(const __grid_constant__ Params p, const Selection selection, int tiles) {
    using S = ScoreShape<D>;
    const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles;
    const int h = head % p.num_local, b = head / p.num_local;
    const Dropped drop = dropped_of(p, b);
    const int first = tile * kTile;
    if (!drop.choose || first >= drop.heavy + drop.tokens) return;
    const Candidates candidates = candidates_of(p, drop, b, h);
    const int left = candidates.count - first;

    char *const shared = shared_memory(); // two tiles of queries; the keys are in the second at first
    Addresses &addresses = *reinterpret_cast<Addresses *>(shared + 2 * S::kTileBytes);
    const int judges = drop.sequence.chunk < kSelectQueries ? drop.sequence.chunk : kSelectQueries;
    const int num_queries = judges * p.group, query_tiles = divide_up(num_queries, kTile);
    const char *queries = static_cast<const char *>(p.q) +
                          (static_cast<int64_t>(drop.sequence.row + drop.sequence.chunk - judges) * p.num_heads +
                           p.head_of[p.num_retrieval + h] * p.group) * S::kRowBytes;
    // Of the query row i of a tile; threads 0 .. 63.
    const auto look_up = [&](int query_tile) {
        const int row = query_tile * kTile + threadIdx.x, token = row / p.group;
        const int64_t offset = static_cast<int64_t>(token) * p.num_heads + (row - token * p.group);
        addresses.queries[query_tile & 1][threadIdx.x] =
            row < num_queries ? reinterpret_cast<uintptr_t>(queries + offset * S::kRowBytes) : 0;
    };
    if (threadIdx.x < kTile) {
        const int i = threadIdx.x;
        addresses.keys[i] = i < left ? reinterpret_cast<uintptr_t>(candidates.key(first + i)) : 0;
        look_up(0);
    } else {
        const int i = threadIdx.x - kTile;
        addresses.values[i] = i < left ? reinterpret_cast<uintptr_t>(candidates.value(first + i)) : 0;
    }
    sync_block();

    char *const keys = shared + S::kTileBytes;
    if constexpr (kFp8) {
#pragma unroll 4
        for (int i = threadIdx.x; i < kTile * S::kChunks / 2; i += kScoreThreads) {
            const int row = i / (S::kChunks / 2), piece = i % (S::kChunks / 2);
            uint4 bytes = {0, 0, 0, 0};
            if (addresses.keys[row]) bytes = reinterpret_cast<const uint4 *>(addresses.keys[row])[piece];
            const Eight<true> low = {{bytes.x, bytes.y}}, high = {{bytes.z, bytes.w}};
            *reinterpret_cast<uint4 *>(keys + S::at(row, 2 * piece)) = to_sixteen_bits<T>(low);
            *reinterpret_cast<uint4 *>(keys + S::at(row, 2 * piece + 1)) = to_sixteen_bits<T>(high);
        }
    } else {
        request<D>(keys, addresses.keys);
    }
    request<D>(shared, addresses.queries[0]);
    if (threadIdx.x < kTile && query_tiles > 1) look_up(1);

    // Lanes 4 r .. 4 r + 3 have the candidates r and r + 8 of the warp: their logits below, and here their values.
    const int lane = threadIdx.x % kWarp, base = threadIdx.x / kWarp * 16;
    float squares[2] = {0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const char *value = reinterpret_cast<const char *>(addresses.values[base + lane / 4 + 8 * half]);
        if (value == nullptr) continue;
        constexpr int kPieces = D / (kFp8 ? 16 : 8); // of 16 bytes
#pragma unroll
        for (int i = 0; i < kPieces; i += 4) {
            const int piece = i + lane % 4;
            if (kPieces % 4 && piece >= kPieces) continue;
#pragma unroll
            for (int e = 0; e < (kFp8 ? 16 : 8); e += 8) {
                float x[8];
                to_floats<T>(x, load8<kFp8>(value, piece * (kFp8 ? 16 : 8) + e), 1.f);
#pragma unroll
                for (int j = 0; j < 8; ++j) squares[half] += x[j] * x[j];
            }
        }
    }

    copy_wait<0>();
    sync_block();
    uint32_t a[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrix_x4(a[k], keys + S::at(base + (lane & 15), 2 * k + (lane >> 4)));
    sync_block(); // keys are read: their place is for queries

    const float scale = p.scale * kLog2e * (kFp8 && p.k_scale ? *p.k_scale : 1.f);
    float top[2] = {kMasked, kMasked}, sum[2] = {0.f, 0.f};
    for (int t = 0; t < query_tiles; ++t) {
        if (t + 1 < query_tiles) {
            const int next = (t + 1) & 1;
            request<D>(shared + next * S::kTileBytes, addresses.queries[next]);
            // The other table was read for tile t, a barrier ago.
            if (threadIdx.x < kTile && t + 2 < query_tiles) look_up(t + 2);
        }
        const char *const tile_of_queries = shared + (t & 1) * S::kTileBytes;
        float logit[kTile / 8][4] = {};
        const int row = (lane >> 4) * 8 + (lane & 7), odd = lane >> 3 & 1;
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
#pragma unroll
            for (int n = 0; n < kTile / 16; ++n) {
                uint32_t q[4];
                load_matrix_x4(q, tile_of_queries + S::at(16 * n + row, 2 * k + odd));
                mma<T>(logit[2 * n], a[k], q[0], q[1]);
                mma<T>(logit[2 * n + 1], a[k], q[2], q[3]);
            }
        }
        const int last = num_queries - t * kTile; // columns from here on are none
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float highest = top[half];
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &x = logit[n][2 * half + i];
                    x = 8 * n + 2 * (lane % 4) + i < last ? x * scale : -CUDART_INF_F;
                    highest = fmaxf(highest, x);
                }
            }
            float added = 0.f;
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) added += exp2_fast(logit[n][2 * half + i] - highest);
            }
            sum[half] = sum[half] * exp2_fast(top[half] - highest) + added;
            top[half] = highest;
        }
        copy_wait<0>();
        sync_block();
    }

    uint32_t *scores = selection.scores +
                       h * (p.num_context_tokens + static_cast<int64_t>(p.num_contexts) * p.policy.heavy_hitters) +
                       drop.sequence.row + static_cast<int64_t>(b) * p.policy.heavy_hitters + first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t score = score_of_quad(top[half], sum[half], squares[half]);
        const int candidate = base + lane / 4 + 8 * half;
        if (lane % 4 == 0 && candidate < left) scores[candidate] = score;
    }
}

// The highest ----------------------------------------------------------------------------------------

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kBins = kSelectThreads; // of a digit, one a thread
constexpr int kCopies = 8;            // of each bin: the first digit of most scores is the same
constexpr int kAtOnce = 4;            // neighbouring candidates of a thread

struct Highest {
    int32_t bins[kBins * kCopies];
    int32_t warps[kSelectWarps];
    int32_t digit, above;
    int32_t rows[RAZOR_MAX_HEAVY_HITTERS]; // of losers, ascending
};

// Sum over the threads before this one, and over all. All threads of the block.
__device__ inline int sum_before(int value, int &total, int32_t *warps) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    int sum = value;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const int other = shuffle(sum, lane >= step ? lane - step : lane);
        if (lane >= step) sum += other;
    }
    sync_block(); // the sums before these are read
    if (lane == kWarp - 1) warps[warp] = sum;
    sync_block();
    int before = sum - value;
    total = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
        if (w < warp) before += warps[w];
        total += warps[w];
    }
    return before;
}

// One block a head. A radix select, 8 bits at a time, finds the score of the last winner and how many of that score win:
// those of the lowest index. Then one pass in the order of the candidates.
__global__ void __launch_bounds__(kSelectThreads) select_kernel(const __grid_constant__ Params p,
                                                                const Selection selection) {
    const int h = blockIdx.x % p.num_local, b = blockIdx.x / p.num_local;
    const Dropped drop = dropped_of(p, b);
    if (!drop.choose) return;
    const int rows = p.policy.heavy_hitters, count = drop.heavy + drop.tokens;
    const uint32_t *scores = selection.scores +
                             h * (p.num_context_tokens + static_cast<int64_t>(p.num_contexts) * rows) +
                             drop.sequence.row + static_cast<int64_t>(b) * rows;
    Highest &shared = *reinterpret_cast<Highest *>(shared_memory());

    uint32_t least = 0;
    int wanted = rows; // of those that have the digits of `least` so far, the `wanted` highest win
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < kBins * kCopies; i += kSelectThreads) shared.bins[i] = 0;
        sync_block();
        for (int c = threadIdx.x; c < count; c += kSelectThreads) {
            const uint32_t score = scores[c];
            if (shift == 24 || (score ^ least) >> (shift + 8) == 0)
                atomicAdd(shared.bins + (score >> shift & 0xff) * kCopies + threadIdx.x % kCopies, 1);
        }
        sync_block();
        int mine = 0, total;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) mine += shared.bins[threadIdx.x * kCopies + (threadIdx.x + i) % kCopies];
        const int below = sum_before(mine, total, shared.warps), above = total - below - mine;
        if (above < wanted && wanted <= above + mine) { // in one thread
            shared.digit = threadIdx.x;
            shared.above = above;
        }
        sync_block();
        least |= static_cast<uint32_t>(shared.digit) << shift;
        wanted -= shared.above;
    }

    int32_t *entering = selection.entering + static_cast<int64_t>(blockIdx.x) * rows;
    int32_t *losers = selection.losers ? selection.losers + losers_index(p, drop, h) : nullptr;
    int higher = 0, equal = 0; // than and to `least`, of the candidates so far
    int winners = 0;           // among the heavy hitters
    for (int begin = 0; begin < count;) {
        const bool held = begin < drop.heavy; // heavy hitters and dropped tokens are never in one round
        const int end = held ? drop.heavy : count;
        uint32_t score[kAtOnce];
        int both = 0; // higher ones, and equal ones 16 bits up
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int c = begin + threadIdx.x * kAtOnce + j;
            score[j] = c < end ? scores[c] : 0;
            if (c < end) both += (score[j] > least) + (score[j] == least) * 65536;
        }
        int total;
        const int before = sum_before(both, total, shared.warps);
        int higher_before = higher + (before & 0xffff), equal_before = equal + (before >> 16);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
            const int c = begin + threadIdx.x * kAtOnce + j;
            if (c >= end) continue;
            const bool wins = score[j] > least || (score[j] == least && equal_before < wanted);
            const int rank = higher_before + (equal_before < wanted ? equal_before : wanted); // winners before this one
            if (!wins) {
                if (held) shared.rows[c - rank] = c;
                if (losers) losers[c - rank] = c;
            } else if (held) {
                entering[c] = -1;
            } else {
                // Rows of losers first; there are as many rows behind the last heavy hitter as the rest needs.
                entering[rank < drop.heavy ? shared.rows[rank - winners] : rank] = c;
            }
            higher_before += score[j] > least;
            equal_before += score[j] == least;
        }
        higher += total & 0xffff;
        equal += total >> 16;
        if (held) winners = higher + (equal < wanted ? equal : wanted);
        begin = begin + kSelectThreads * kAtOnce < end ? begin + kSelectThreads * kAtOnce : end;
    }
}

// Winners to their rows ------------------------------------------------------------------------------

constexpr int kKeepThreads = 128;
constexpr int kKeepRows = 16; // of a block

__global__ void __launch_bounds__(kKeepThreads)
    keep_kernel(const __grid_constant__ Params p, const Selection selection, int tiles) {
    const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles;
    const int h = head % p.num_local, b = head / p.num_local;
    const Dropped drop = dropped_of(p, b);
    if (!drop.choose && drop.heavy_after == drop.heavy) return;
    const Candidates candidates = candidates_of(p, drop, b, h);
    const int32_t *entering = selection.entering + static_cast<int64_t>(head) * p.policy.heavy_hitters;
    const int pieces = p.head_dim * p.cache_bytes() / 16;
    for (int i = threadIdx.x; i < 2 * kKeepRows * pieces; i += kKeepThreads) {
        const int row = tile * kKeepRows + i / pieces % kKeepRows, byte = i % pieces * 16;
        const bool value = i >= kKeepRows * pieces;
        if (row >= drop.heavy_after || (!drop.choose && row < drop.heavy)) continue;
        const int c = drop.choose ? entering[row] : row; // candidate and row begin at the same number
        const int to = p.policy.sinks + row;
        if (c < 0 || to >= candidates.rows.capacity) continue;
        const char *from = value ? candidates.value(c) : candidates.key(c);
        *reinterpret_cast<uint4 *>((value ? candidates.rows.value(to) : candidates.rows.key(to)) + byte) =
            *reinterpret_cast<const uint4 *>(from + byte);
    }
}

// Host -----------------------------------------------------------------------------------------------

template <typename T, int D, bool kFp8>
cudaError_t enqueue_scores(const Params &p, const Selection &selection, int candidates, cudaStream_t stream) {
    const int tiles = divide_up(candidates, kTile);
    return launch(score_kernel<T, D, kFp8>, dim3(p.num_contexts * p.num_local * tiles), dim3(kScoreThreads),
                  score_shared<D>(), stream, p, selection, tiles);
}

template <typename T, bool kFp8>
cudaError_t enqueue_scores(const Params &p, const Selection &selection, int candidates, cudaStream_t stream) {
    switch (p.head_dim) {
    case 64: return enqueue_scores<T, 64, kFp8>(p, selection, candidates, stream);
    case 96: return enqueue_scores<T, 96, kFp8>(p, selection, candidates, stream);
    case 128: return enqueue_scores<T, 128, kFp8>(p, selection, candidates, stream);
    case 256: return enqueue_scores<T, 256, kFp8>(p, selection, candidates, stream);
    default: return cudaErrorInvalidValue; // the C API lets no other through
    }
}

struct Sizes {
    size_t scores, losers, entering; // bytes
};

Sizes sizes_of(const Params &p) {
    const size_t heads = p.num_local, tokens = p.num_context_tokens;
    const size_t rows = static_cast<size_t>(p.num_contexts) * p.policy.heavy_hitters;
    if (rows == 0 || heads == 0) return {0, 0, 0};
    return {on_256(heads * (tokens + rows) * sizeof(uint32_t)),
            p.policy.comp_tokens ? on_256(heads * tokens * sizeof(int32_t)) : 0, on_256(heads * rows * sizeof(int32_t))};
}

}  // namespace

size_t selection_bytes(const Params &p) {
    const Sizes s = sizes_of(p);
    return s.scores + s.losers + s.entering;
}

Selection selection_at(const Params &p, char *workspace) {
    const Sizes s = sizes_of(p);
    char *losers = workspace + s.scores;
    return {reinterpret_cast<uint32_t *>(workspace), s.losers ? reinterpret_cast<int32_t *>(losers) : nullptr,
            reinterpret_cast<int32_t *>(losers + s.losers)};
}

cudaError_t enqueue_selection(const Params &p, const Selection &selection, int dropped, cudaStream_t stream) {
    const int rows = p.policy.heavy_hitters;
    if (rows == 0 || dropped <= rows) return cudaSuccess;
    const int candidates = rows + (dropped < p.max_chunk ? dropped : p.max_chunk);
    const bool fp8 = p.cache_type == CacheType::kFp8;
    const cudaError_t e = p.bf16 ? fp8 ? enqueue_scores<__nv_bfloat16, true>(p, selection, candidates, stream)
                                       : enqueue_scores<__nv_bfloat16, false>(p, selection, candidates, stream)
                          : fp8 ? enqueue_scores<__half, true>(p, selection, candidates, stream)
                                : enqueue_scores<__half, false>(p, selection, candidates, stream);
    if (e != cudaSuccess) return e;
    return launch(select_kernel, dim3(p.num_contexts * p.num_local), dim3(kSelectThreads), sizeof(Highest), stream, p,
                  selection);
}

cudaError_t enqueue_keep(const Params &p, const Selection &selection, int dropped, cudaStream_t stream) {
    const int rows = dropped < p.policy.heavy_hitters ? dropped : p.policy.heavy_hitters;
    if (rows == 0) return cudaSuccess;
    const int tiles = divide_up(rows, kKeepRows);
    return launch(keep_kernel, dim3(p.num_contexts * p.num_local * tiles), dim3(kKeepThreads), 0, stream, p, selection,
                  tiles);
}

}  // namespace razor
