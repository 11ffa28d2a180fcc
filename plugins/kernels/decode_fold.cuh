// The token that leaves the window becomes a heavy hitter, or one of the candidates joins the compensation tokens of its
// head (docs/semantics.md, "Heavy hitters", "Fold", F = 1). By the block that finished the head: all blocks have read
// its rows.
#pragma once

#include "decode_plan.cuh"
#include "score.cuh"

namespace razor {
namespace decode {

// Key and value of a row to another. All threads of the block.
template <int D, bool Fp8>
__device__ inline void copy_row(const HeadRows &rows, int from, int to) {
    using C = Config<D, Fp8>;
    for (int i = threadIdx.x; i < 2 * C::kChunks; i += C::kThreads) {
        const int byte = i % C::kChunks * 16;
        const bool value = i >= C::kChunks;
        const char *source = value ? rows.value(from) : rows.key(from);
        *reinterpret_cast<uint4 *>((value ? rows.value(to) : rows.key(to)) + byte) =
            *reinterpret_cast<const uint4 *>(source + byte);
    }
}

// The candidate with the lowest score, of equal ones the last: 0 .. H - 1 are the heavy hitters, H is in row `leaving`. All
// threads of the block; behind it nobody reads a candidate any more.
//
// Straight from global memory into fragments, as few rows as there are: keys are the rows of the product, 8 query heads
// its columns, and the query heads of all tiles count. Columns of keys and queries are in the order in which a lane
// finds them: 8 neighbours are its part of two steps. The candidates go to the warps 8 at a time, so that one more than
// a multiple of 16 costs no warp another round.
template <typename T, int D, bool Fp8>
__device__ inline int lowest_candidate(const Params &p, Scratch &scratch, const HeadRows &rows, int leaving, int lane,
                                       int warp) {
    using C = Config<D, Fp8>;
    constexpr int kEach = 4;              // candidates of a lane at a time
    constexpr int kApart = 8 * C::kWarps; // from one to the next
    [[maybe_unused]] constexpr int kColumns = D == 256 && Fp8 ? 4 : D / 32; // times 32, whose loads are under way
    const Item &item = scratch.item;
    const int r = lane / 4, c = lane % 4, held = p.policy.heavy_hitters;
    const char *queries = static_cast<const char *>(p.q) +
                          (static_cast<int64_t>(item.row) * p.num_heads + item.kv_head * p.group) * D * 2;
    const float scale = p.scale * kLog2e * (Fp8 && p.k_scale ? *p.k_scale : 1.f);
    uint64_t lowest = ~uint64_t{0}; // score, and what is lower the higher the index is
    for (int first = 8 * warp; first <= held; first += kEach * kApart) {
        // Behind the last candidate the last row again, so that no load waits for a branch.
        const char *key[kEach], *value[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int candidate = first + i * kApart + r;
            const int row = candidate < held ? p.policy.sinks + candidate : leaving;
            key[i] = rows.key(row);
            value[i] = rows.value(row);
        }
        float top[kEach], sum[kEach], squares[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            top[i] = kMasked;
            sum[i] = squares[i] = 0.f;
#pragma unroll kColumns
            for (int j = 0; j < D / 32; ++j) {
                float x[8];
                to_floats<T>(x, load8<Fp8>(value[i], 32 * j + 8 * c), 1.f);
#pragma unroll
                for (int e = 0; e < 8; ++e) squares[i] += x[e] * x[e];
            }
        }
        for (int head = 0; head < p.group; head += 8) {
            const char *query = queries + (head + r < p.group ? head + r : 0) * D * 2;
            float logit[kEach / 2][4] = {};
#pragma unroll kColumns
            for (int j = 0; j < D / 32; ++j) {
                const int column = 32 * j + 8 * c;
                const uint4 b = load8<false>(query, column).bits;
#pragma unroll
                for (int i = 0; i < kEach; i += 2) {
                    const uint4 low = to_sixteen_bits<T>(load8<Fp8>(key[i], column));
                    const uint4 high = to_sixteen_bits<T>(load8<Fp8>(key[i + 1], column));
                    mma<T>(logit[i / 2], {low.x, high.x, low.y, high.y}, b.x, b.y);
                    mma<T>(logit[i / 2], {low.z, high.z, low.w, high.w}, b.z, b.w);
                }
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                float x[2];
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    x[e] = head + 2 * c + e < p.group ? logit[i / 2][i % 2 * 2 + e] * scale : -CUDART_INF_F;
                const float highest = fmaxf(top[i], fmaxf(x[0], x[1]));
                sum[i] = sum[i] * exp2_fast(top[i] - highest) + exp2_fast(x[0] - highest) + exp2_fast(x[1] - highest);
                top[i] = highest;
            }
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int candidate = first + i * kApart + r;
            const uint64_t score = score_of_quad(top[i], sum[i], squares[i]);
            const uint64_t place = score << 32 | (0xffffffffu - static_cast<uint32_t>(candidate));
            if (candidate <= held && place < lowest) lowest = place;
        }
    }
#pragma unroll
    for (int mask = 4; mask < kWarp; mask *= 2) {
        const uint64_t other = shuffle_xor(lowest, mask);
        lowest = other < lowest ? other : lowest;
    }
    if (lane == 0) scratch.lowest[warp] = lowest;
    sync_block();
    lowest = scratch.lowest[0];
#pragma unroll
    for (int w = 1; w < C::kWarps; ++w) lowest = scratch.lowest[w] < lowest ? scratch.lowest[w] : lowest;
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(lowest));
}

// Puts a row into the compensation tokens of the item's head: it opens the first unused cluster, or joins the nearest. All
// threads of the block; behind it nobody reads the row any more. M >= 1.
template <typename T, int D, bool Fp8>
__device__ inline void fold(const Params &p, Scratch &scratch, const HeadRows &rows, int row, int lane, int warp) {
    using C = Config<D, Fp8>;
    const Item &item = scratch.item;
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
            for (int i = 0; i < D / kWarp; ++i) x[i] = load1<T, Fp8>(key, lane + kWarp * i, k_scale);
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
        const float x = load1<T, Fp8>(key, d, k_scale), y = load1<T, Fp8>(value, d, v_scale);
        const float mean_k = k[d], mean_v = v[d];
        k[d] = open ? x : mean_k + (x - mean_k) / count;
        v[d] = open ? y : mean_v + (y - mean_v) / count;
    }
    sync_block(); // every thread has read the row and the count
    if (threadIdx.x == 0) {
        comp.count[cluster] = count;
        comp.log_weight[cluster] = logf(count);
    }
}

// The end of a step that drops a token of the item's head. H + M >= 1. All threads of the block.
template <typename T, int D, bool Fp8>
__device__ inline void leave_window(const Params &p, Scratch &scratch, int lane, int warp) {
    const Item &item = scratch.item;
    const Policy &policy = p.policy;
    const HeadRows rows = head_rows(p.local, item.b, item.head, Config<D, Fp8>::kRowBytes);
    const int leaving = rows.row_of_position(policy.sinks + item.dropped);
    if (leaving >= rows.capacity || policy.sinks + policy.heavy_hitters > rows.capacity) return;
    if (item.dropped < policy.heavy_hitters) { // the next free row, which nobody reads yet
        copy_row<D, Fp8>(rows, leaving, policy.sinks + item.dropped);
        return;
    }
    int loser = leaving;
    if (policy.heavy_hitters) {
        const int lowest = lowest_candidate<T, D, Fp8>(p, scratch, rows, leaving, lane, warp);
        if (lowest < policy.heavy_hitters) loser = policy.sinks + lowest;
    }
    if (policy.comp_tokens) fold<T, D, Fp8>(p, scratch, rows, loser, lane, warp);
    if (loser != leaving) copy_row<D, Fp8>(rows, leaving, loser);
}

// Once a head: what it would keep in registers is for the kernel's main loop.
template <typename T, int D, bool Fp8>
__device__ __attribute__((noinline)) void leave_window_apart(const Params &p, Scratch &scratch, int lane, int warp) {
    leave_window<T, D, Fp8>(p, scratch, lane, warp);
}

}  // namespace decode
}  // namespace razor
