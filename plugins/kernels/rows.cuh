// Where things are: sequences of a call, rows of a cache, compensation tokens. Device side.
#pragma once

#include <math_constants.h>

#include "params.h"

namespace razor {

// One sequence of a call.
struct Sequence {
    int past;  // n, tokens cached before the call
    int chunk; // tokens it brings; 0 = idle
    int row;   // its first token row in qkv, q and out
};

__device__ inline int chunk_of(const Params &p, int b) {
    if (p.chunk == nullptr || (p.generation_chunk_is_one && b >= p.num_contexts)) return 1;
    return p.chunk[b];
}

// Reads a handful of integers; packed contexts add up the chunks before them. Once a block, not once a row.
//
// Numbers on the device cannot be checked by the host. A sequence whose numbers do not fit the call comes out idle
// (chunk 0), so that no kernel reads or writes outside its rows. Sums are unsigned: absurd numbers wrap around.
__device__ inline Sequence sequence_of(const Params &p, int b) {
    Sequence s;
    s.chunk = chunk_of(p, b);
    s.past = p.past ? p.past[b]
                    : static_cast<int>(static_cast<uint32_t>(p.total[b]) - static_cast<uint32_t>(s.chunk));
    if (p.tokens_per_sequence) {
        s.row = b * p.tokens_per_sequence;
    } else if (b >= p.num_contexts) {
        s.row = p.num_context_tokens + b - p.num_contexts;
    } else {
        uint32_t row = 0;
        for (int i = 0; i < b; ++i) row += static_cast<uint32_t>(p.chunk[i]);
        s.row = static_cast<int>(row);
    }
    const bool context = b < p.num_contexts;
    const int longest = context ? p.max_chunk : 1;
    const bool inside = s.past >= 0 && s.chunk >= 0 && s.chunk <= longest && s.past <= p.max_past &&
                        s.past <= p.max_seq_len - s.chunk;
    const bool in_rows = p.tokens_per_sequence || !context || (s.row >= 0 && s.row <= p.num_context_tokens - s.chunk);
    if (!inside || !in_rows) s.chunk = s.row = 0;
    return s;
}

// Rows of one head of one sequence.
struct HeadRows {
    char *k, *v;            // contiguous: row 0; paged: byte of the head's first row inside a block, added to each block
    const int32_t *k_blocks, *v_blocks; // paged, else null
    int64_t block_bytes;
    int32_t block_shift, row_bytes;
    int32_t capacity, sinks, ring_offset, ring_rows;

    __device__ int row_of_position(int p) const {
        return p < sinks ? p : ring_offset + (p - sinks) % ring_rows;
    }
    // The i-th kept row (sinks, heavy hitters, then the window in position order) of a sequence with `dropped` tokens
    // gone. Without heavy hitters its position is i if i < sinks, else i + dropped. start = dropped % ring_rows.
    // Valid for i - front < ring_rows; front: sinks and heavy hitters in use.
    __device__ int row_of_kept(int i, int start, int front) const {
        if (i < front) return i;
        int j = start + i - front;
        if (j >= ring_rows) j -= ring_rows;
        return ring_offset + j;
    }
    __device__ char *key(int row) const { return at(k, k_blocks, row); }
    __device__ char *value(int row) const { return at(v, v_blocks, row); }

    __device__ char *at(char *base, const int32_t *blocks, int row) const {
        if (blocks == nullptr) return base + static_cast<int64_t>(row) * row_bytes;
        const int64_t block = static_cast<uint32_t>(blocks[row >> block_shift]);
        const int inside = row & ((1 << block_shift) - 1);
        return base + block * block_bytes + inside * row_bytes;
    }
};

// Head `h` of the class (0 .. R-1 of `full`, 0 .. Lh-1 of `local`) of sequence b.
__device__ inline HeadRows head_rows(const Rows &r, int b, int h, int row_bytes) {
    HeadRows out;
    out.block_bytes = r.block_bytes;
    out.block_shift = r.block_shift;
    out.row_bytes = row_bytes;
    out.capacity = r.capacity;
    out.sinks = r.sinks;
    out.ring_offset = r.ring_offset;
    out.ring_rows = r.ring_rows;
    if (r.block_offsets) {
        out.k_blocks = r.block_offsets + b * r.sequence_stride;
        out.v_blocks = out.k_blocks + r.key_value_stride;
        out.k = out.v = r.pool + (static_cast<int64_t>(h) << r.block_shift) * row_bytes;
    } else {
        const int64_t slot = r.slots ? r.slots[b] : b;
        const int64_t offset = slot * r.slot_stride + h * r.head_stride;
        out.k_blocks = out.v_blocks = nullptr;
        out.k = r.k + offset;
        out.v = r.v + offset;
    }
    return out;
}

// The M compensation tokens of one local head of one sequence.
struct HeadComp {
    float *k, *v;       // mean key m at k + m * stride, mean value at v + m * stride
    int64_t stride;
    float *count, *log_weight; // [M]
};

// rows: head_rows(p.local, b, h, …). M >= 1.
__device__ inline HeadComp head_comp(const Params &p, const HeadRows &rows, int b, int h) {
    HeadComp out;
    const int m = p.policy.comp_tokens, d = p.head_dim;
    if (p.comp.comp) {
        const int64_t slot = p.comp.slots ? p.comp.slots[b] : b;
        out.k = p.comp.comp + slot * p.comp.comp_slot_stride + static_cast<int64_t>(h) * m * 2 * d;
        out.v = out.k + d;
        out.stride = 2 * d;
        const int64_t weight = slot * p.comp.weight_slot_stride + h * m;
        out.count = p.comp.count + weight;
        out.log_weight = p.comp.log_weight + weight;
    } else {
        const int first = rows.sinks + p.policy.heavy_hitters;
        out.k = reinterpret_cast<float *>(rows.key(first));
        out.v = reinterpret_cast<float *>(rows.value(first));
        out.stride = d;
        out.count = out.k + m * d;
        out.log_weight = out.count + m;
    }
    return out;
}

}  // namespace razor
