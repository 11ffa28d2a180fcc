// The token that leaves the window becomes a heavy hitter, or joins the compensation tokens of its head.
#pragma once

#include "decode_plan.cuh"

namespace razor {
namespace decode {

template <typename T, bool Fp8>
__device__ inline float cached(const char *row, int d, float scale) {
    if (Fp8) {
        const uint32_t two = from_fp8x4<T>(static_cast<uint8_t>(row[d])).x;
        return unpack<T>(two).x * scale;
    }
    return to_float(reinterpret_cast<const T *>(row)[d]);
}

// The token that leaves the window becomes heavy hitter number `dropped` of a local head. Nobody reads that row yet. All
// threads of the block.
template <int D, bool Fp8>
__device__ inline void keep_row(const Params &p, const Scratch &scratch) {
    using C = Config<D, Fp8>;
    const Item &item = scratch.item;
    const HeadRows rows = head_rows(p.local, item.b, item.head, C::kRowBytes);
    const int from = rows.row_of_position(p.policy.sinks + item.dropped), to = p.policy.sinks + item.dropped;
    if (from >= rows.capacity || to >= rows.capacity) return;
    for (int i = threadIdx.x; i < 2 * C::kChunks; i += C::kThreads) {
        const int byte = i % C::kChunks * 16;
        const bool value = i >= C::kChunks;
        const char *source = value ? rows.value(from) : rows.key(from);
        *reinterpret_cast<uint4 *>((value ? rows.value(to) : rows.key(to)) + byte) =
            *reinterpret_cast<const uint4 *>(source + byte);
    }
}

// Puts the token that leaves the window into the compensation tokens of a local head (docs/semantics.md, "Fold",
// F = 1): it opens the first unused cluster, or joins the nearest. All threads of the block.
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

}  // namespace decode
}  // namespace razor
