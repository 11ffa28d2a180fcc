// Step 1: rotate queries and keys, put every new key and value where attention and compact read it.
//
// One thread block a token row (and, in small calls, a group of heads), one thread 16 elements of one head: two 16-byte
// pieces that hold both partners of eight RoPE pairs, so that cosines and sines are read once and serve all heads that
// the thread visits.
#include "device.cuh"
#include "launch.h"
#include "rows.cuh"

namespace razor {
namespace {

constexpr int kThreads = 128;
constexpr int kUnit = 16;              // elements of a head that a thread takes
constexpr int kRowsThatFillGpu = 1024; // from here on one block takes all heads of a row
constexpr int kCompElementsPerBlock = 8192;

// The sequence a token row belongs to; -1 if none. Called by whole warps.
__device__ int sequence_of_row(const Params &p, int row) {
    if (p.tokens_per_sequence) return row / p.tokens_per_sequence;
    if (row >= p.num_context_tokens) return p.num_contexts + row - p.num_context_tokens;
    const int lane = threadIdx.x % kWarp;
    uint32_t before = 0;
    for (int base = 0; base < p.num_contexts; base += kWarp) {
        uint32_t end = base + lane < p.num_contexts ? static_cast<uint32_t>(p.chunk[base + lane]) : 0;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const uint32_t left = shuffle(end, lane >= step ? lane - step : lane);
            if (lane >= step) end += left;
        }
        end += before;
        before = shuffle(end, kWarp - 1);
        int passed = end <= static_cast<uint32_t>(row);
#pragma unroll
        for (int mask = 1; mask < kWarp; mask *= 2) passed += shuffle_xor(passed, mask);
        if (passed < kWarp) return base + passed < p.num_contexts ? base + passed : -1;
    }
    return -1;
}

// A sequence begins: none of its compensation tokens stands for anything. Zeros, because 0 * NaN is NaN.
__device__ void begin_comp(const Params &p, int index, int blocks_per_sequence) {
    const int b = index / blocks_per_sequence;
    const Sequence s = sequence_of(p, b);
    if (s.past != 0 || s.chunk == 0) return;
    const int elements = p.policy.comp_tokens * p.head_dim;
    for (int h = index % blocks_per_sequence; h < p.num_local; h += blocks_per_sequence) {
        const HeadComp comp = head_comp(p, head_rows(p.local, b, h, p.head_dim * p.cache_bytes()), b, h);
        for (int i = threadIdx.x; i < elements; i += kThreads) {
            const int64_t at = i / p.head_dim * comp.stride + i % p.head_dim;
            comp.k[at] = 0.f;
            comp.v[at] = 0.f;
        }
        for (int m = threadIdx.x; m < p.policy.comp_tokens; m += kThreads) {
            comp.count[m] = 0.f;
            comp.log_weight[m] = -CUDART_INF_F;
        }
    }
}

__device__ inline float2 cos_sin_of(const Params &p, const float *table, int pair) {
    if (p.rope_table == RAZOR_TABLE_PAIRS) return {table[2 * pair], table[2 * pair + 1]};
    return {table[pair], table[p.rotary_dim / 2 + pair]};
}

// Cosines and sines of pairs 8 u .. 8 u + 7, by 16-byte loads.
__device__ inline void load_cos_sin(float (&c)[8], float (&s)[8], const Params &p, const float *table, int u) {
    if (p.rope_table == RAZOR_TABLE_PAIRS) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 two = reinterpret_cast<const float4 *>(table + 16 * u)[i];
            c[2 * i] = two.x, s[2 * i] = two.y, c[2 * i + 1] = two.z, s[2 * i + 1] = two.w;
        }
    } else {
        const float *sines = table + p.rotary_dim / 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 a = reinterpret_cast<const float4 *>(table + 8 * u)[i];
            const float4 b = reinterpret_cast<const float4 *>(sines + 8 * u)[i];
            c[4 * i] = a.x, c[4 * i + 1] = a.y, c[4 * i + 2] = a.z, c[4 * i + 3] = a.w;
            s[4 * i] = b.x, s[4 * i + 1] = b.y, s[4 * i + 2] = b.z, s[4 * i + 3] = b.w;
        }
    }
}

// Element e of a head after RoPE, for any even rotary_dim.
template <typename T>
__device__ float rotated(const Params &p, const float *table, const T *head, int e) {
    const float x = to_float(head[e]);
    if (e >= p.rotary_dim) return x;
    const int half = p.rotary_dim / 2;
    const bool interleaved = p.position == RAZOR_ROPE_INTERLEAVED;
    const bool second = interleaved ? e % 2 : e >= half;
    const int partner = interleaved ? e ^ 1 : second ? e - half : e + half;
    const float2 turn = cos_sin_of(p, table, interleaved ? e / 2 : second ? partner : e);
    const float y = to_float(head[partner]);
    return second ? x * turn.x + y * turn.y : x * turn.x - y * turn.y;
}

template <typename T>
__device__ inline void unpack8(float (&x)[8], const uint4 &packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack<T>(words[i]);
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
    }
}

template <typename T>
__device__ inline void store8(T *at, const float (&x)[8]) {
    *reinterpret_cast<uint4 *>(at) = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                                      pack<T>(x[6], x[7])};
}

__device__ inline uint32_t fp8x4(float a, float b, float c, float d, float scale) {
    return static_cast<uint32_t>(to_fp8(a / scale)) | static_cast<uint32_t>(to_fp8(b / scale)) << 8 |
           static_cast<uint32_t>(to_fp8(c / scale)) << 16 | static_cast<uint32_t>(to_fp8(d / scale)) << 24;
}

__device__ inline void store8_fp8(char *at, const float (&x)[8], float scale) {
    *reinterpret_cast<uint2 *>(at) = {fp8x4(x[0], x[1], x[2], x[3], scale), fp8x4(x[4], x[5], x[6], x[7], scale)};
}

// How the elements turn that a thread takes of every head it visits.
enum class Turn { kNone, kHalves, kNeighbours };

// kScalar: a rotary_dim or a table that 16-byte pieces do not fit; elements turn one by one.
template <typename T, bool kFp8, bool kScalar>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ Params p, int32_t *zeroed, int64_t num_zeroed, int num_rows,
                  int comp_blocks_per_sequence) {
    const int row = blockIdx.x;
    if (blockIdx.y == 0) {
        for (int64_t i = static_cast<int64_t>(row) * kThreads + threadIdx.x; i < num_zeroed;
             i += static_cast<int64_t>(gridDim.x) * kThreads)
            zeroed[i] = 0;
    }
    if (row >= num_rows) {
        if (blockIdx.y == 0 && comp_blocks_per_sequence) begin_comp(p, row - num_rows, comp_blocks_per_sequence);
        return;
    }

    const int b = sequence_of_row(p, row);
    Sequence s = {0, 0, 0};
    if (b >= 0) s = sequence_of(p, b);
    const int token = row - s.row;
    if (token < 0 || token >= s.chunk) {
        uint4 *out = static_cast<uint4 *>(p.out) + static_cast<int64_t>(row) * p.num_heads * p.head_dim / 8;
        for (int i = blockIdx.y * kThreads + threadIdx.x; i < p.num_heads * p.head_dim / 8; i += gridDim.y * kThreads)
            out[i] = {0, 0, 0, 0};
        return;
    }

    const int units = p.head_dim / kUnit;
    const int u = threadIdx.x % units, lanes = kThreads / units, lane = threadIdx.x / units;
    if (lane >= lanes) return;
    const int position = s.past + token;

    Turn turn = Turn::kNone;
    int low = kUnit * u, high = kUnit * u + 8; // first elements of the two pieces
    const float *table = nullptr;
    float c[8] = {}, sn[8] = {};
    if (p.position == RAZOR_ROPE_HALF || p.position == RAZOR_ROPE_INTERLEAVED) {
        const int entry = position < p.num_positions ? position : p.num_positions - 1;
        table = p.cos_sin + static_cast<int64_t>(entry) * p.rotary_dim;
        if (!kScalar && low < p.rotary_dim) {
            load_cos_sin(c, sn, p, table, u);
            turn = Turn::kNeighbours;
            if (p.position == RAZOR_ROPE_HALF) {
                turn = Turn::kHalves;
                low = 8 * u;
                high = p.rotary_dim / 2 + 8 * u;
            }
        }
    }
    float k_scale = 1.f, v_scale = 1.f;
    if (kFp8) {
        if (p.k_scale) k_scale = *p.k_scale;
        if (p.v_scale) v_scale = *p.v_scale;
    }

    const bool context = b < p.num_contexts;
    const int row_bytes = p.head_dim * (kFp8 ? 1 : 2), heads = p.num_heads + 2 * p.num_kv_heads;
    const T *tokens = static_cast<const T *>(p.qkv) + static_cast<int64_t>(row) * heads * p.head_dim;
    for (int i = blockIdx.y * lanes + lane; i < heads; i += gridDim.y * lanes) {
        const bool query = i < p.num_heads, value = i >= p.num_heads + p.num_kv_heads;
        const int j = query ? 0 : i - p.num_heads - (value ? p.num_kv_heads : 0); // class index
        const int source = query ? i : i - j + p.head_of[j];
        const T *head = tokens + source * p.head_dim;

        float x[8], y[8];
        unpack8<T>(x, load_once(head + low));
        unpack8<T>(y, load_once(head + high));
        if (kScalar) {
            if (!value) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    x[e] = rotated(p, table, head, low + e);
                    y[e] = rotated(p, table, head, high + e);
                }
            }
        } else if (!value) {
            if (turn == Turn::kHalves) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float a = x[e];
                    x[e] = a * c[e] - y[e] * sn[e];
                    y[e] = y[e] * c[e] + a * sn[e];
                }
            } else if (turn == Turn::kNeighbours) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float a = x[2 * e], d = y[2 * e];
                    x[2 * e] = a * c[e] - x[2 * e + 1] * sn[e];
                    x[2 * e + 1] = x[2 * e + 1] * c[e] + a * sn[e];
                    y[2 * e] = d * c[e + 4] - y[2 * e + 1] * sn[e + 4];
                    y[2 * e + 1] = y[2 * e + 1] * c[e + 4] + d * sn[e + 4];
                }
            }
        }

        if (query) {
            T *to = static_cast<T *>(p.q) + (static_cast<int64_t>(row) * p.num_heads + i) * p.head_dim;
            store8(to + low, x);
            store8(to + high, y);
            continue;
        }
        const int local = j - p.num_retrieval;
        char *to;
        if (local >= 0 && context) {
            // The ring still holds what attention reads and compact folds.
            to = (value ? p.new_v : p.new_k) + (static_cast<int64_t>(row) * p.num_local + local) * row_bytes;
        } else {
            const HeadRows rows =
                local >= 0 ? head_rows(p.local, b, local, row_bytes) : head_rows(p.full, b, j, row_bytes);
            const int at = rows.row_of_position(position);
            if (at >= rows.capacity) continue;
            to = value ? rows.value(at) : rows.key(at);
        }
        if constexpr (kFp8) {
            const float scale = value ? v_scale : k_scale;
            store8_fp8(to + low, x, scale);
            store8_fp8(to + high, y, scale);
        } else {
            store8(reinterpret_cast<T *>(to) + low, x);
            store8(reinterpret_cast<T *>(to) + high, y);
        }
    }
}

template <typename T, bool kFp8, bool kScalar>
cudaError_t enqueue_kernel(const Params &p, int32_t *zeroed, size_t num_zeroed, cudaStream_t stream) {
    const int rows = p.num_rows(), heads = p.num_heads + 2 * p.num_kv_heads, lanes = kThreads / (p.head_dim / kUnit);
    int per_sequence = 0;
    if (p.num_local && p.policy.comp_tokens) {
        const int elements = p.num_local * p.policy.comp_tokens * p.head_dim;
        per_sequence = (elements + kCompElementsPerBlock - 1) / kCompElementsPerBlock;
        if (per_sequence > p.num_local) per_sequence = p.num_local;
    }
    const int64_t blocks = static_cast<int64_t>(rows) + static_cast<int64_t>(p.batch) * per_sequence;
    const int groups = rows < kRowsThatFillGpu ? (heads + lanes - 1) / lanes : 1;
    const dim3 grid(static_cast<unsigned>(blocks ? blocks : 1), groups);
    return launch(append_kernel<T, kFp8, kScalar>, grid, dim3(kThreads), 0, stream, p, zeroed,
                  static_cast<int64_t>(num_zeroed), rows, per_sequence);
}

template <typename T, bool kFp8>
cudaError_t enqueue(const Params &p, int32_t *zeroed, size_t num_zeroed, cudaStream_t stream) {
    const bool rope = p.position == RAZOR_ROPE_HALF || p.position == RAZOR_ROPE_INTERLEAVED;
    const bool pieces = p.rotary_dim % kUnit == 0 && reinterpret_cast<uintptr_t>(p.cos_sin) % 16 == 0;
    return rope && !pieces ? enqueue_kernel<T, kFp8, true>(p, zeroed, num_zeroed, stream)
                           : enqueue_kernel<T, kFp8, false>(p, zeroed, num_zeroed, stream);
}

size_t on_256(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

size_t append_workspace(const Params &p) {
    const size_t q = static_cast<size_t>(p.num_rows()) * p.num_heads * p.head_dim * 2;
    const size_t chunks = static_cast<size_t>(p.num_context_tokens) * p.num_local * p.head_dim * p.cache_bytes();
    return on_256(q) + 2 * on_256(chunks);
}

cudaError_t launch_append(const Params &p, int32_t *zeroed, size_t num_zeroed, cudaStream_t stream) {
    const bool fp8 = p.cache_type == CacheType::kFp8;
    if (p.bf16)
        return fp8 ? enqueue<__nv_bfloat16, true>(p, zeroed, num_zeroed, stream)
                   : enqueue<__nv_bfloat16, false>(p, zeroed, num_zeroed, stream);
    return fp8 ? enqueue<__half, true>(p, zeroed, num_zeroed, stream)
               : enqueue<__half, false>(p, zeroed, num_zeroed, stream);
}

}  // namespace razor
