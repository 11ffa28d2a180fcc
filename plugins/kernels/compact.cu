// Step 4, contexts only: choose the heavy hitters (heavy.cu) and fold the rest of what left the window of local heads
// (docs/semantics.md, "Heavy hitters", "Fold"), then move what stays of the chunk from the workspace to the ring.
//
//   M = 0       finish
//   M = 1       sum_all, finish
//   M > 1       (assign, sum_clusters, move_centroids) x 3, assign, sum_clusters, finish
//   H > 0       score, select before these, and keep before finish
//
// The host knows bounds only, so everything is launched and leaves early: the first three rounds are Lloyd's and only a
// first fold has them. Only keep and finish write rows, both after the kernels that read folded keys and values; and
// keep reads what finish overwrites.
//
// Results are the same on every run: a fold is cut into slices whose length depends on the number of folded tokens
// alone, every sum runs in a fixed order of the tokens, and slices are added up in order.
#include "heavy.cuh"
#include "launch.h"

namespace razor {
namespace {

constexpr int kRounds = 4; // of Lloyd's algorithm; the assignment of the last one is the result
constexpr int kFinishThreads = 256;
constexpr int kTokensPerStore = 16; // tokens a block moves to the ring

// Sums of clusters take most of the workspace: M > 1 takes fewer and longer slices.
__host__ __device__ inline int max_slices(int comp_tokens) {
    const int n = 4096 / comp_tokens;
    return n > 64 ? 64 : n < 16 ? 16 : n;
}
__host__ __device__ inline int min_slice(int comp_tokens) {
    return comp_tokens == 1 ? 64 : comp_tokens < 32 ? 128 : 4 * comp_tokens;
}

// Sums and counts of a slice: [slice, Lh, M, 2 D] and [slice, Lh, M].
struct Work {
    float *sums;
    int32_t *counts;
    uint8_t *owners;  // [Lh, num_context_tokens]: cluster of folded token f of a sequence at its first row + f
    int32_t slices;   // no context has more
    Selection selection;
};

// What one context folds in one local head.
struct Fold {
    Candidates of;
    int32_t row;
    const int32_t *losers; // folded token f is this candidate; null: candidate first + f
    int32_t first, tokens;
    int32_t slice, slices; // tokens of a slice, number of slices
    int32_t first_slice;   // in Work

    __device__ int candidate(int f) const {
        if (losers == nullptr) return first + f;
        const int c = losers[f];
        return c < of.count ? c : of.count - 1; // numbers on the device that lie can make the lists of contexts overlap
    }
    __device__ const char *key(int f) const { return of.key(candidate(f)); }
    __device__ const char *value(int f) const { return of.value(candidate(f)); }
};

__device__ inline Fold fold_of(const Params &p, const Work &work, int b, int h) {
    const Dropped drop = dropped_of(p, b);
    Fold f;
    f.of = candidates_of(p, drop, b, h);
    f.row = drop.sequence.row;
    f.losers = drop.choose ? work.selection.losers + losers_index(p, drop, h) : nullptr;
    f.first = drop.heavy_after; // what was kept stays, the first tokens fill free rows, the others are folded
    f.tokens = f.of.count - drop.heavy_after;
    const int m = p.policy.comp_tokens, even = divide_up(f.tokens, max_slices(m));
    f.slice = even > min_slice(m) ? even : min_slice(m);
    f.slices = divide_up(f.tokens, f.slice);
    // Slices of the contexts before b fit below either bound, whichever is smaller.
    const int by_number = b * work.slices, by_rows = f.row / min_slice(m) + b;
    f.first_slice = by_number < by_rows ? by_number : by_rows;
    return f;
}

__device__ inline int64_t sums_index(const Params &p, const Fold &f, int slice, int h, int m) {
    return (static_cast<int64_t>(f.first_slice + slice) * p.num_local + h) * p.policy.comp_tokens + m;
}

// No cluster stands for a token yet. Called by whole warps.
__device__ inline bool is_first_fold(const Params &p, const HeadComp &comp) {
    int used = 0;
    for (int m = threadIdx.x % kWarp; m < p.policy.comp_tokens; m += kWarp) used |= comp.count[m] > 0.f;
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) used |= shuffle_xor(used, mask);
    return !used;
}

// Index of the token that starts cluster m of a first fold.
__device__ inline int seed_of(int m, int tokens, int clusters) {
    return static_cast<int>((2 * m + 1) * static_cast<int64_t>(tokens) / (2 * clusters));
}

// M = 1: sums of one slice of one head --------------------------------------------------------------

constexpr int kSumAllThreads = 256;

template <typename T, bool kFp8>
__global__ void __launch_bounds__(kSumAllThreads, 3)
    sum_all_kernel(const __grid_constant__ Params p, const Work work) {
    const int slice = blockIdx.x % work.slices, head = blockIdx.x / work.slices;
    const int h = head % p.num_local, b = head / p.num_local;
    const Fold fold = fold_of(p, work, b, h);
    if (slice >= fold.slices) return;
    const float k_scale = kFp8 && p.k_scale ? *p.k_scale : 1.f, v_scale = kFp8 && p.v_scale ? *p.v_scale : 1.f;

    // A thread adds up eight columns of keys and of values, of every rows-th token.
    const int d = p.head_dim, pieces = d / 8, rows = kSumAllThreads / pieces;
    const int piece = threadIdx.x % pieces, row = threadIdx.x / pieces;
    const int begin = slice * fold.slice;
    const int end = begin + fold.slice < fold.tokens ? begin + fold.slice : fold.tokens;
    float k_sum[8] = {}, v_sum[8] = {};
    if (row < rows) {
        constexpr int kAtOnce = 4; // tokens whose loads are under way
        for (int base = begin + row; base < end; base += kAtOnce * rows) {
            Eight<kFp8> k[kAtOnce], v[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                const int f = base + j * rows;
                k[j] = v[j] = {};
                if (f < end) {
                    k[j] = load8<kFp8>(fold.key(f), piece * 8);
                    v[j] = load8<kFp8>(fold.value(f), piece * 8);
                }
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                float x[8], y[8];
                to_floats<T>(x, k[j], k_scale);
                to_floats<T>(y, v[j], v_scale);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    k_sum[i] += x[i];
                    v_sum[i] += y[i];
                }
            }
        }
    }
    float *shared = reinterpret_cast<float *>(shared_memory()); // [rows, 2 D]
    if (row < rows) {
        float *mine = shared + row * 2 * d + piece * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            mine[i] = k_sum[i];
            mine[d + i] = v_sum[i];
        }
    }
    sync_block();
    float *sums = work.sums + sums_index(p, fold, slice, h, 0) * 2 * d;
    for (int c = threadIdx.x; c < 2 * d; c += kSumAllThreads) {
        float sum = 0.f;
        for (int r = 0; r < rows; ++r) sum += shared[r * 2 * d + c];
        sums[c] = sum;
    }
}

// M > 1: the cluster each folded token belongs to ----------------------------------------------------

// A block compares 64 keys with 32 centroids at a time, a thread 4 with 4; 32 dimensions are in shared memory at once.
constexpr int kAssignThreads = 128;
constexpr int kKeys = 64, kCentroids = 32, kDims = 32;
constexpr int kKeyStride = kKeys + 4, kCentroidStride = kCentroids + 4; // 16-byte rows, shifted by four banks
constexpr int kAssignShared =
    (kDims * (kKeyStride + kCentroidStride) + RAZOR_MAX_COMP_TOKENS) * static_cast<int>(sizeof(float));

template <typename T, bool kFp8>
__global__ void __launch_bounds__(kAssignThreads, 5)
    assign_kernel(const __grid_constant__ Params p, const Work work, int tiles, int round) {
    const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles;
    const int h = head % p.num_local, b = head / p.num_local;
    const Fold fold = fold_of(p, work, b, h);
    const int first_key = tile * kKeys;
    if (first_key >= fold.tokens) return;
    const HeadComp comp = head_comp(p, fold.of.rows, b, h);
    const bool first_fold = is_first_fold(p, comp);
    if (!first_fold && round < kRounds - 1) return;

    const int num_clusters = p.policy.comp_tokens, d = p.head_dim;
    const int seeds = num_clusters < fold.tokens ? num_clusters : fold.tokens;
    const bool from_seeds = first_fold && round == 0; // later rounds: move_centroids left them in comp
    const float scale = kFp8 && p.k_scale ? *p.k_scale : 1.f;

    float *keys = reinterpret_cast<float *>(shared_memory()); // [kDims, kKeyStride]
    float *centroids = keys + kDims * kKeyStride;             // [kDims, kCentroidStride]
    int *open = reinterpret_cast<int *>(centroids + kDims * kCentroidStride); // [M] cluster takes part
    for (int m = threadIdx.x; m < num_clusters; m += kAssignThreads)
        open[m] = first_fold ? m < seeds : comp.count[m] > 0.f;
    sync_block();

    const int ct = threadIdx.x % 8, kt = threadIdx.x / 8; // of centroids 4 ct .. and keys 4 kt ..
    float best[4];
    int owner[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = CUDART_INF_F, owner[i] = num_clusters;

    for (int m0 = 0; m0 < num_clusters; m0 += kCentroids) {
        float distance[4][4] = {};
        for (int d0 = 0; d0 < d; d0 += kDims) {
            sync_block();
            for (int i = threadIdx.x; i < kKeys * kDims / 8; i += kAssignThreads) {
                const int key = i % kKeys, piece = i / kKeys;
                float x[8] = {};
                if (first_key + key < fold.tokens)
                    to_floats<T>(x, load8<kFp8>(fold.key(first_key + key), d0 + piece * 8), scale);
#pragma unroll
                for (int j = 0; j < 8; ++j) keys[(piece * 8 + j) * kKeyStride + key] = x[j];
            }
            for (int i = threadIdx.x; i < kCentroids * kDims; i += kAssignThreads) {
                const int column = i % kDims, m = m0 + i / kDims;
                float x = 0.f;
                if (m < num_clusters && open[m])
                    x = from_seeds ? load1<T, kFp8>(fold.key(seed_of(m, fold.tokens, seeds)), d0 + column, scale)
                                   : comp.k[m * comp.stride + d0 + column];
                centroids[column * kCentroidStride + i / kDims] = x;
            }
            sync_block();
#pragma unroll 8
            for (int column = 0; column < kDims; ++column) {
                const float4 k4 = *reinterpret_cast<const float4 *>(keys + column * kKeyStride + 4 * kt);
                const float4 c4 = *reinterpret_cast<const float4 *>(centroids + column * kCentroidStride + 4 * ct);
                const float k[4] = {k4.x, k4.y, k4.z, k4.w}, c[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float difference = k[i] - c[j];
                        distance[i][j] += difference * difference;
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int m = m0 + 4 * ct + j;
            if (m >= num_clusters || !open[m]) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // Infinite distances tie as well.
                if (distance[i][j] < best[i] || (distance[i][j] == best[i] && m < owner[i])) {
                    best[i] = distance[i][j];
                    owner[i] = m;
                }
            }
        }
    }
#pragma unroll
    for (int mask = 1; mask < 8; mask *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float other = shuffle_xor(best[i], mask);
            const int other_owner = shuffle_xor(owner[i], mask);
            if (other < best[i] || (other == best[i] && other_owner < owner[i])) {
                best[i] = other;
                owner[i] = other_owner;
            }
        }
    }
    if (ct != 0) return;
    uint8_t *owners = work.owners + static_cast<int64_t>(h) * p.num_context_tokens + fold.row;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int f = first_key + 4 * kt + i;
        if (f >= fold.tokens) continue;
        int m = owner[i] < num_clusters ? owner[i] : 0; // NaN keys are near nothing
        if (!first_fold && f < num_clusters) {
            // Key f opens the f-th unused cluster if there are so many.
            int unused = 0;
            for (int n = 0; n < num_clusters; ++n) {
                if (open[n]) continue;
                if (unused++ == f) {
                    m = n;
                    break;
                }
            }
        }
        owners[f] = static_cast<uint8_t>(m);
    }
}

// M > 1: sums of one slice, by cluster ---------------------------------------------------------------

// A warp adds up 32 columns of one slice: sums [M, 32] in shared memory, a lane in a bank of its own.
constexpr int kSumShared = 36 * 1024;

__host__ __device__ inline int sum_warp_bytes(int comp_tokens) {
    return comp_tokens * (kWarp + 1) * static_cast<int>(sizeof(float));
}
inline int sum_warps(int comp_tokens) {
    const int n = kSumShared / sum_warp_bytes(comp_tokens);
    return n > 8 ? 8 : n;
}

template <typename T, bool kFp8>
__global__ void __launch_bounds__(8 * kWarp, 3)
    sum_clusters_kernel(const __grid_constant__ Params p, const Work work, int blocks_per_head, int round) {
    const int head = blockIdx.x / blocks_per_head, h = head % p.num_local, b = head / p.num_local;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int d = p.head_dim, num_clusters = p.policy.comp_tokens;
    const bool last = round == kRounds - 1;
    const int tiles = (last ? 2 * d : d) / kWarp; // values matter in the last round only
    const int unit = blockIdx.x % blocks_per_head * (blockDim.x / kWarp) + warp;
    const int slice = unit / tiles, tile = unit % tiles;
    const Fold fold = fold_of(p, work, b, h);
    if (slice >= fold.slices) return;
    if (!last && !is_first_fold(p, head_comp(p, fold.of.rows, b, h))) return;

    float *sums = reinterpret_cast<float *>(shared_memory() + warp * sum_warp_bytes(num_clusters)); // [M, 32]
    int *counts = reinterpret_cast<int *>(sums + num_clusters * kWarp);                            // [M]
    for (int m = 0; m < num_clusters; ++m) sums[m * kWarp + lane] = 0.f;
    for (int m = lane; m < num_clusters; m += kWarp) counts[m] = 0;
    sync_warp();

    const bool value = tile * kWarp >= d;
    const int column = tile * kWarp + lane - (value ? d : 0);
    const float *scale_of = value ? p.v_scale : p.k_scale;
    const float scale = kFp8 && scale_of ? *scale_of : 1.f;
    const int begin = slice * fold.slice;
    const int end = begin + fold.slice < fold.tokens ? begin + fold.slice : fold.tokens;
    const uint8_t *owners = work.owners + static_cast<int64_t>(h) * p.num_context_tokens + fold.row;
    constexpr int kAtOnce = 8; // loads under way
    for (int base = begin; base < end; base += kWarp) {
        // Every lane finds the row and the cluster of one token; all of them then add token after token.
        const int f = base + lane;
        unsigned long long address = 0;
        int owner = 0;
        if (f < end) {
            address = reinterpret_cast<uintptr_t>(value ? fold.value(f) : fold.key(f));
            owner = owners[f];
        }
        const int tokens = end - base < kWarp ? end - base : kWarp;
        for (int j0 = 0; j0 < tokens; j0 += kAtOnce) {
            float x[kAtOnce];
            int m[kAtOnce];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                m[j] = shuffle(owner, j0 + j);
                const char *row = reinterpret_cast<const char *>(static_cast<uintptr_t>(shuffle(address, j0 + j)));
                x[j] = j0 + j < tokens ? load1<T, kFp8>(row, column, scale) : 0.f;
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                if (j0 + j >= tokens) continue;
                sums[m[j] * kWarp + lane] += x[j];
                if (tile == 0 && lane == 0) ++counts[m[j]];
            }
        }
    }
    sync_warp();
    const int64_t index = sums_index(p, fold, slice, h, 0);
    float *to = work.sums + index * 2 * d + tile * kWarp + lane;
    for (int m = 0; m < num_clusters; ++m) to[static_cast<int64_t>(m) * 2 * d] = sums[m * kWarp + lane];
    if (tile == 0)
        for (int m = lane; m < num_clusters; m += kWarp) work.counts[index + m] = counts[m];
}

__device__ inline int tokens_of_cluster(const Params &p, const Work &work, const Fold &fold, int h, int m) {
    int tokens = 0;
    for (int s = 0; s < fold.slices; ++s) tokens += work.counts[sums_index(p, fold, s, h, m)];
    return tokens;
}

// Column c of [mean key, mean value] of cluster m: its sum over all slices.
__device__ inline float sum_of_column(const Params &p, const Work &work, const Fold &fold, int h, int m, int c) {
    const int64_t stride = static_cast<int64_t>(p.num_local) * p.policy.comp_tokens * 2 * p.head_dim;
    const float *from = work.sums + sums_index(p, fold, 0, h, m) * 2 * p.head_dim + c;
    float sum = 0.f;
#pragma unroll 8
    for (int s = 0; s < fold.slices; ++s) sum += from[s * stride];
    return sum;
}

// First fold: centroids move to the mean of their keys, or stay. The mean keys of comp, unused so far, hold them. -----

constexpr int kMoveThreads = 128;

template <typename T, bool kFp8>
__global__ void __launch_bounds__(kMoveThreads, 8)
    move_centroids_kernel(const __grid_constant__ Params p, const Work work, int round) {
    const int m = blockIdx.x % p.policy.comp_tokens, head = blockIdx.x / p.policy.comp_tokens;
    const int h = head % p.num_local, b = head / p.num_local;
    const Fold fold = fold_of(p, work, b, h);
    if (m >= fold.tokens) return;
    const HeadComp comp = head_comp(p, fold.of.rows, b, h);
    if (!is_first_fold(p, comp)) return;
    const int tokens = tokens_of_cluster(p, work, fold, h, m);
    if (tokens == 0 && round > 0) return;
    const int seeds = p.policy.comp_tokens < fold.tokens ? p.policy.comp_tokens : fold.tokens;
    const float scale = kFp8 && p.k_scale ? *p.k_scale : 1.f;
    for (int c = threadIdx.x; c < p.head_dim; c += kMoveThreads) {
        comp.k[m * comp.stride + c] = tokens ? sum_of_column(p, work, fold, h, m, c) / tokens
                                             : load1<T, kFp8>(fold.key(seed_of(m, fold.tokens, seeds)), c, scale);
    }
}

// Means, counts and log-weights; survivors of the chunk to their rows ----------------------------------

__device__ void update_cluster(const Params &p, const Work &work, int b, int h, int m) {
    const Fold fold = fold_of(p, work, b, h);
    if (fold.tokens == 0) return;
    const HeadComp comp = head_comp(p, fold.of.rows, b, h);
    const int tokens = p.policy.comp_tokens == 1 ? fold.tokens : tokens_of_cluster(p, work, fold, h, m);
    const float before = comp.count[m], after = before + tokens;
    sync_block(); // all have read the count
    if (tokens == 0) {
        // Left empty by a first fold: a centroid is still in its place.
        if (before == 0.f)
            for (int c = threadIdx.x; c < p.head_dim; c += kFinishThreads) comp.k[m * comp.stride + c] = 0.f;
        return;
    }
    for (int c = threadIdx.x; c < 2 * p.head_dim; c += kFinishThreads) {
        float *to = (c < p.head_dim ? comp.k + c : comp.v + c - p.head_dim) + m * comp.stride;
        const float sum = sum_of_column(p, work, fold, h, m, c);
        const float mean = before == 0.f ? 0.f : *to;
        *to = mean + (sum - tokens * mean) / after;
    }
    if (threadIdx.x == 0) {
        comp.count[m] = after;
        comp.log_weight[m] = logf(after);
    }
}

__device__ void store_survivors(const Params &p, int b, int tile, int tiles) {
    const Sequence s = sequence_of(p, b);
    if (s.chunk == 0) return;
    // Survivors: new sinks, then what of the chunk is in the window of past + chunk.
    const int end = s.past + s.chunk, sinks = p.policy.sinks;
    const int window = sinks + p.policy.dropped(end);
    const int new_sinks = end < sinks ? s.chunk : s.past < sinks ? sinks - s.past : 0;
    const int from = window > s.past ? window : s.past;
    const int survivors = new_sinks + (end > from ? end - from : 0);
    const int row_bytes = p.head_dim * p.cache_bytes(), pieces = row_bytes / 16, per_token = p.num_local * pieces;
    for (int i0 = tile * kTokensPerStore; i0 < survivors; i0 += tiles * kTokensPerStore) {
        const int n = survivors - i0 < kTokensPerStore ? survivors - i0 : kTokensPerStore;
        for (int j = threadIdx.x; j < n * per_token; j += kFinishThreads) {
            const int i = i0 + j / per_token, h = j % per_token / pieces, byte = j % pieces * 16;
            const int position = i < new_sinks ? s.past + i : from + i - new_sinks;
            const HeadRows rows = head_rows(p.local, b, h, row_bytes);
            const int row = rows.row_of_position(position);
            if (row >= rows.capacity) continue;
            const int64_t token = s.row + position - s.past, source = (token * p.num_local + h) * row_bytes + byte;
            *reinterpret_cast<uint4 *>(rows.key(row) + byte) = load_once(p.new_k + source);
            *reinterpret_cast<uint4 *>(rows.value(row) + byte) = load_once(p.new_v + source);
        }
    }
}

__global__ void __launch_bounds__(kFinishThreads, 3)
    finish_kernel(const __grid_constant__ Params p, const Work work, int update_blocks, int tiles) {
    const int index = blockIdx.x;
    if (index < update_blocks) {
        const int m = index % p.policy.comp_tokens, head = index / p.policy.comp_tokens;
        update_cluster(p, work, head / p.num_local, head % p.num_local, m);
    } else {
        const int i = index - update_blocks;
        store_survivors(p, i / tiles, i % tiles, tiles);
    }
}

// Host -------------------------------------------------------------------------------------------

struct Sizes {
    int slices;                    // of one context at most
    size_t sums, counts, owners;   // bytes
};

Sizes sizes_of(const Params &p) {
    Sizes s = {};
    const int m = p.policy.comp_tokens;
    if (p.num_contexts == 0 || p.num_local == 0 || m == 0) return s;
    const int longest = divide_up(p.max_chunk, min_slice(m)), most = max_slices(m);
    s.slices = longest < most ? longest : most;
    const size_t by_number = static_cast<size_t>(p.num_contexts) * s.slices;
    const size_t by_rows = static_cast<size_t>(p.num_context_tokens / min_slice(m)) + p.num_contexts;
    const size_t slices = by_number < by_rows ? by_number : by_rows;
    s.sums = on_256(slices * p.num_local * m * 2 * p.head_dim * sizeof(float));
    if (m > 1) {
        s.counts = on_256(slices * p.num_local * m * sizeof(int32_t));
        s.owners = on_256(static_cast<size_t>(p.num_local) * p.num_context_tokens);
    }
    return s;
}

template <typename T, bool kFp8>
cudaError_t enqueue_fold(const Params &p, const Work &work, cudaStream_t stream) {
    const int m = p.policy.comp_tokens, heads = p.num_contexts * p.num_local;
    if (m == 1) {
        const int rows = kSumAllThreads / (p.head_dim / 8);
        return launch(sum_all_kernel<T, kFp8>, dim3(heads * work.slices), dim3(kSumAllThreads),
                      static_cast<size_t>(rows) * 2 * p.head_dim * sizeof(float), stream, p, work);
    }
    const int tiles = divide_up(p.max_chunk, kKeys), warps = sum_warps(m);
    for (int round = 0; round < kRounds; ++round) {
        cudaError_t e = launch(assign_kernel<T, kFp8>, dim3(heads * tiles), dim3(kAssignThreads), kAssignShared, stream,
                               p, work, tiles, round);
        if (e != cudaSuccess) return e;
        const bool last = round == kRounds - 1;
        const int blocks = divide_up(work.slices * (last ? 2 : 1) * p.head_dim / kWarp, warps);
        e = launch(sum_clusters_kernel<T, kFp8>, dim3(heads * blocks), dim3(warps * kWarp),
                   static_cast<size_t>(warps) * sum_warp_bytes(m), stream, p, work, blocks, round);
        if (e != cudaSuccess) return e;
        if (last) break;
        e = launch(move_centroids_kernel<T, kFp8>, dim3(heads * m), dim3(kMoveThreads), 0, stream, p, work, round);
        if (e != cudaSuccess) return e;
    }
    return cudaSuccess;
}

}  // namespace

size_t compact_workspace(const Params &p) {
    const Sizes s = sizes_of(p);
    return s.sums + s.counts + s.owners + selection_bytes(p);
}

cudaError_t launch_compact(const Params &p, void *workspace, cudaStream_t stream) {
    if (p.num_contexts == 0 || p.num_local == 0) return cudaSuccess;
    const Sizes sizes = sizes_of(p);
    char *bytes = static_cast<char *>(workspace);
    const Work work = {reinterpret_cast<float *>(bytes), reinterpret_cast<int32_t *>(bytes + sizes.sums),
                       reinterpret_cast<uint8_t *>(bytes + sizes.sums + sizes.counts), sizes.slices,
                       selection_at(p, bytes + sizes.sums + sizes.counts + sizes.owners)};
    const int m = p.policy.comp_tokens;
    const int64_t longest = static_cast<int64_t>(p.max_past) + p.max_chunk;
    const int end = longest < p.max_seq_len ? static_cast<int>(longest) : p.max_seq_len;
    const int dropped = p.policy.dropped(end); // which never falls
    const bool folds = m > 0 && dropped > p.policy.heavy_hitters;
    const bool fp8 = p.cache_type == CacheType::kFp8;
    cudaError_t e = enqueue_selection(p, work.selection, dropped, stream);
    if (e != cudaSuccess) return e;
    if (folds) {
        e = p.bf16 ? fp8 ? enqueue_fold<__nv_bfloat16, true>(p, work, stream)
                                           : enqueue_fold<__nv_bfloat16, false>(p, work, stream)
                              : fp8 ? enqueue_fold<__half, true>(p, work, stream)
                                    : enqueue_fold<__half, false>(p, work, stream);
        if (e != cudaSuccess) return e;
    }
    e = enqueue_keep(p, work.selection, dropped, stream);
    if (e != cudaSuccess) return e;
    const int64_t rows = static_cast<int64_t>(p.local.sinks) + p.local.ring_rows; // more do not survive
    const int survivors = rows < p.max_chunk ? static_cast<int>(rows) : p.max_chunk;
    const int updates = folds ? p.num_contexts * p.num_local * m : 0, tiles = divide_up(survivors, kTokensPerStore);
    return launch(finish_kernel, dim3(updates + p.num_contexts * tiles), dim3(kFinishThreads), 0, stream, p, work,
                  updates, tiles);
}

}  // namespace razor
