// What every kernel is told, by value: one call of one layer, checked by the C API (api.cpp).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "razor/razor.h"

namespace razor {

// Retention rule of local heads (docs/semantics.md, "What a local head keeps").
struct Policy {
    int32_t sinks;       // N0
    int32_t min_window;  // S0
    int32_t compression; // C; 0 = fixed window
    int32_t comp_tokens; // M
    int32_t heavy_hitters; // H

    // L(n)
    __host__ __device__ int window(int n) const {
        if (compression == 0) return min_window;
        const int part = (n + compression - 1) / compression;
        return part > min_window ? part : min_window;
    }
    // D(n): positions N0 .. N0 + D(n) - 1 are dropped
    __host__ __device__ int dropped(int n) const {
        const int d = n - sinks - window(n);
        return d > 0 ? d : 0;
    }
    // h(n), of D(n): dropped tokens that are rows of their own. The others are in the clusters.
    __host__ __device__ int heavy(int dropped) const { return dropped < heavy_hitters ? dropped : heavy_hitters; }
};

// Keys and values of one class of heads. Position p lives in row p if p < sinks, else in row
// ring_offset + (p - sinks) mod ring_rows; retrieval heads have a ring that never wraps.
struct Rows {
    char *k, *v;                       // contiguous: first byte
    int64_t slot_stride, head_stride;  // contiguous: bytes
    const int32_t *slots;              // contiguous: device [B] or null
    const int32_t *block_offsets;      // paged; null = contiguous
    char *pool;                        // paged: of this layer
    int64_t block_bytes;
    int64_t sequence_stride, key_value_stride; // of block_offsets, elements
    int32_t block_shift;               // log2(tokens_per_block)
    int32_t capacity;                  // rows beyond are never touched
    int32_t sinks, ring_offset, ring_rows;
};

struct Comp {
    float *comp, *log_weight, *count; // contiguous; comp == null: in the bubble of the local view
    int64_t comp_slot_stride, weight_slot_stride; // elements
    const int32_t *slots;
};

enum class CacheType : int32_t { kSame = 0, kFp8 = 1 };

struct Params {
    // The call
    int32_t batch, num_contexts; // sequences; the first num_contexts bring chunks, the others one token
    int32_t tokens_per_sequence; // S of the padded layout, 0 = packed
    int32_t num_context_tokens;  // packed: rows of all contexts; padded: num_contexts * S
    int32_t max_chunk, max_past; // upper bounds known on the host (max_chunk: of contexts)
    const void *qkv;             // [rows, (Hq + 2 Hkv) D]
    void *out;                   // [rows, Hq D]
    const int32_t *past, *total, *chunk;
    bool generation_chunk_is_one;
    // The layer
    int32_t num_heads, num_kv_heads, group, num_retrieval, num_local, head_dim;
    bool bf16;            // dtype of qkv and out
    CacheType cache_type;
    razor_position position;
    razor_rope_table rope_table;
    int32_t rotary_dim, num_positions;
    int32_t max_seq_len;
    float scale;
    const float *cos_sin, *slopes;
    const float *k_scale, *v_scale; // null = 1
    Policy policy;
    Rows full, local;
    Comp comp;
    // Shared workspace, written by append
    void *q;              // [rows, Hq, D] rotated queries, dtype of qkv
    char *new_k, *new_v;  // [num_context_tokens, Lh, D] cache dtype: chunks of local heads (contexts only)
    // KV heads, retrieval heads first: class index j -> KV head. j < R: row j of `full`; else row j - R of `local`.
    uint8_t head_of[RAZOR_MAX_KV_HEADS];

    // Token rows of qkv, q and out
    __host__ __device__ int num_rows() const {
        return tokens_per_sequence ? batch * tokens_per_sequence : num_context_tokens + batch - num_contexts;
    }
    __host__ __device__ int num_generations() const { return batch - num_contexts; }
    __host__ __device__ int cache_bytes() const { return cache_type == CacheType::kFp8 ? 1 : 2; }
};
static_assert(sizeof(Params) <= 2048, "kernel parameters: 4 KiB at most, workspace pointers come on top");

}  // namespace razor
