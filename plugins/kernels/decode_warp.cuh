// What one warp of decode does: queries, copies, a slice of keys and values, compensation tokens.
#pragma once

#include "decode_plan.cuh"

namespace razor {
namespace decode {

// Queries as A fragments; columns in the order in which keys are read (see Fp8 below).
template <int D, bool Fp8>
struct Queries {
    uint32_t a[Config<D, Fp8>::kQueriesInShared ? 1 : D / 16][4];
};

// Running softmax of 16 rows over the keys a warp has seen. o in the layout of mma's c; sums are of this lane's
// columns.
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
__device__ __forceinline__ void load_queries(Queries<D, Fp8> &queries, const char *q, int heads, int lane) {
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

// The same into shared memory, so placed that ldmatrix yields the fragments. All threads of the block.
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

template <int D, bool Fp8>
__device__ __forceinline__ void query_fragment(uint32_t (&a)[4], const Queries<D, Fp8> &queries, const char *shared,
                                               int kk, int lane) {
    if constexpr (Config<D, Fp8>::kQueriesInShared) {
        load_matrix_x4(a, shared + Config<D, false>::place(lane & 15, 2 * kk + (lane >> 4)));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = queries.a[kk][i];
    }
}

// s[t]: q . k of 16 rows and keys 8 t .. 8 t + 7 of the tile at `keys`.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ void dot_keys(float (&s)[2][4], const Queries<D, Fp8> &queries, const char *shared_queries,
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
        query_fragment<D, Fp8>(a, queries, shared_queries, kk, lane);
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
            for (int t = 0; t < 4; ++t) {
                const uint32_t selector = (4 + t) << 12 | t << 4; // byte t of both keys
                mma<T>(out.o[4 * j + t], p, from_fp8_high<T>(permute_bytes(k0, k1, selector)),
                       from_fp8_high<T>(permute_bytes(k8, k9, selector)));
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

// Takes 16 logits a row (log2 units) into the softmax and returns their weights as an A fragment. Sparse: a whole row
// may be masked.
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
__device__ __forceinline__ void attend_comp(Attention<D> &out, const Queries<D, Fp8> &queries,
                                            const char *shared_queries, const HeadComp &comp, int first, int count,
                                            float scale, float value_scale, const float (&bias)[2], int lane) {
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
        query_fragment<D, Fp8>(a, queries, shared_queries, kk, lane);
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
    int front; // rows before the window
    int count; // kept rows

    __device__ Source(const HeadRows &of, const Item &item, int lane)
        : rows(of), base(lane < kSlice ? of.k : of.v), blocks(lane < kSlice ? of.k_blocks : of.v_blocks),
          start(item.dropped % of.ring_rows), front(item.front), count(item.keys) {}

    // Where row `index` is, 0 = nowhere.
    __device__ uint64_t find(int index) const {
        if (index >= count) return 0;
        const int row = rows.row_of_kept(index, start, front);
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

}  // namespace decode
}  // namespace razor
