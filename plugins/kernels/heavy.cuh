// What the chunk of a context pushes out of the window of local heads: which of it stays as heavy hitters, which is left
// to be folded (docs/semantics.md, "Heavy hitters"). compact.cu folds, heavy.cu chooses and keeps.
//
// The candidates of a head are its heavy hitters in row order, then the dropped tokens in position order. A chunk that
// chooses writes two lists to the workspace: the losers, which are folded, and for each row of a heavy hitter the winner
// that enters it. Where nothing is chosen, both follow from numbers.
#pragma once

#include "device.cuh"
#include "rows.cuh"
#include "score.cuh"

namespace razor {

constexpr int kSelectQueries = 64; // last tokens of a chunk, whose queries judge

__host__ __device__ inline int divide_up(int a, int b) { return a / b + (a % b != 0); }
inline size_t on_256(size_t bytes) { return (bytes + 255) / 256 * 256; }

// In the workspace. H > 0.
struct Selection {
    uint32_t *scores; // [Lh, num_context_tokens + num_contexts H]: of context b from its first row + b H on; in an order
                      // that unsigned numbers have
    int32_t *losers;  // [Lh, num_context_tokens], from its first row on: candidates in order; M > 0
    int32_t *entering; // [num_contexts, Lh, H]: candidate that enters row N0 + r, -1: it stays as it is
};

// What leaves the window of every local head of a context.
struct Dropped {
    Sequence sequence;
    int32_t first, tokens;      // positions first .. first + tokens - 1
    int32_t heavy, heavy_after; // heavy hitters before and after
    bool choose;                // among all candidates; else rows fill up in order
};

__device__ inline Dropped dropped_of(const Params &p, int b) {
    Dropped d;
    d.sequence = sequence_of(p, b);
    const int past = d.sequence.past, chunk = d.sequence.chunk;
    const int before = chunk > 0 ? p.policy.dropped(past) : 0, after = chunk > 0 ? p.policy.dropped(past + chunk) : 0;
    d.first = p.policy.sinks + before;
    d.tokens = after - before;
    d.heavy = p.policy.heavy(before);
    d.heavy_after = p.policy.heavy(after);
    d.choose = p.policy.heavy_hitters > 0 && d.heavy + d.tokens > p.policy.heavy_hitters;
    return d;
}

// Keys and values of the candidates of one head.
struct Candidates {
    HeadRows rows;
    const char *new_k, *new_v; // the head's row of the chunk's first token
    int64_t new_stride;
    int32_t past;
    int32_t heavy;         // the first of them are in rows N0 ..
    int32_t count;
    int32_t to_position;   // candidate c >= heavy has position c + this

    // A dropped token is in the ring if it was cached before the call, else still where append put it.
    __device__ const char *key(int c) const {
        if (c < heavy) return rows.key(rows.sinks + c);
        const int position = c + to_position;
        return position < past ? rows.key(rows.row_of_position(position)) : new_k + (position - past) * new_stride;
    }
    __device__ const char *value(int c) const {
        if (c < heavy) return rows.value(rows.sinks + c);
        const int position = c + to_position;
        return position < past ? rows.value(rows.row_of_position(position)) : new_v + (position - past) * new_stride;
    }
};

__device__ inline Candidates candidates_of(const Params &p, const Dropped &d, int b, int h) {
    Candidates c;
    const int row_bytes = p.head_dim * p.cache_bytes();
    c.rows = head_rows(p.local, b, h, row_bytes);
    c.new_stride = static_cast<int64_t>(p.num_local) * row_bytes;
    const int64_t offset = d.sequence.row * c.new_stride + h * row_bytes;
    c.new_k = p.new_k + offset;
    c.new_v = p.new_v + offset;
    c.past = d.sequence.past;
    c.heavy = d.heavy;
    c.count = d.heavy + d.tokens;
    c.to_position = d.first - d.heavy;
    return c;
}

__device__ inline int64_t losers_index(const Params &p, const Dropped &d, int h) {
    return static_cast<int64_t>(h) * p.num_context_tokens + d.sequence.row;
}

// heavy.cu. dropped: D of the longest sequence that a call may end with.
size_t selection_bytes(const Params &p);
Selection selection_at(const Params &p, char *workspace);
cudaError_t enqueue_selection(const Params &p, const Selection &selection, int dropped, cudaStream_t stream);
// Winners to their rows: behind the fold, which reads the rows of losers; before the ring takes new tokens.
cudaError_t enqueue_keep(const Params &p, const Selection &selection, int dropped, cudaStream_t stream);

}  // namespace razor
