/*
 * razor.h: split-head KV cache attention for long contexts (RazorAttention, arXiv 2407.15891).
 *
 * A plain C interface over the CUDA kernels: no TensorRT, no torch, no allocation, no host
 * synchronisation. What is computed is defined in docs/semantics.md. One call attends a batch of
 * chunks (prompts, pieces of prompts, single tokens) over one layer's caches and updates them.
 *
 *     razor_layer layer = RAZOR_LAYER_INIT;      what a layer is: heads, dtypes, policy
 *     razor_limits limits = RAZOR_LIMITS_INIT;   how large a call may become
 *     razor_call call = RAZOR_CALL_INIT;         one call: pointers
 *     razor_workspace_size(&layer, &limits, &bytes);
 *     razor_attention(&layer, &call, workspace, bytes, stream);
 *
 * Symbols: B sequences of a call, Hq query heads, Hkv KV heads, g = Hq / Hkv, R retrieval heads, Lh = Hkv - R
 * local heads, D = head_dim, N0 sink tokens, M compensation tokens, H heavy hitters, n tokens of a sequence before
 * the call ("past"). Head order within a class: ascending KV head index.
 *
 * Memory: structs, and what they point to on the host (retrieval_heads), are read during the call only. Everything
 * called "device" is read and written when the stream gets there: it must stay until then, unchanged by others.
 * Pointers to 4-byte elements are on multiples of 4 bytes, others as said. Kernels run on the calling thread's current
 * device; stream and memory belong to it.
 *
 * Threads: every function may be called from any thread at any time; calls that share caches or a
 * workspace must be ordered by their stream.
 *
 * CUDA graphs: everything enqueued can be captured. A replay reads the same addresses; what differs from
 * replay to replay (past, chunk, slots, tables of blocks) is read there, on the device, and must stay within the host
 * numbers of the capture (batch, num_contexts, num_context_tokens, max_chunk, max_past). Make one call of the same kind
 * before the capture: the first one loads the kernels.
 *
 * Errors: functions with a razor_status never abort; razor_last_error() has one line that says what was expected and
 * what was found. What goes wrong on the device while kernels run is told by CUDA, at the next synchronisation.
 *
 * Versions: the first fields of a struct are its size and RAZOR_API_VERSION, set by the *_INIT macros, which set all
 * other fields to 0. A library accepts the structs of its own version and refuses others; those without these fields
 * (razor_view, razor_comp) are part of razor_call.
 */
#ifndef RAZOR_RAZOR_H
#define RAZOR_RAZOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define RAZOR_API __attribute__((visibility("default")))
#else
#define RAZOR_API
#endif

/* Raised whenever a struct or a function below changes. */
#define RAZOR_API_VERSION 2

#define RAZOR_MAX_KV_HEADS 256
#define RAZOR_MAX_COMP_TOKENS 256
#define RAZOR_MAX_HEAVY_HITTERS 1024
/* tokens_per_block of a paged view: a power of two in this range. */
#define RAZOR_MIN_BLOCK_TOKENS 8
#define RAZOR_MAX_BLOCK_TOKENS 1024

/* Nothing was enqueued, except with RAZOR_CUDA_ERROR: then earlier steps of the call may have been, and caches and out
 * are undefined. */
typedef enum razor_status {
    RAZOR_OK = 0,
    RAZOR_INVALID_ARGUMENT = 1, /* a field is wrong */
    RAZOR_UNSUPPORTED = 2,      /* a valid wish that this library has no kernel for */
    RAZOR_WORKSPACE_TOO_SMALL = 3,
    RAZOR_CUDA_ERROR = 4,       /* no driver, no device, a failed launch */
    RAZOR_VERSION_MISMATCH = 5  /* struct of another version */
} razor_status;

#ifdef __cplusplus
#define RAZOR_INIT_(type) {(uint32_t)sizeof(type), RAZOR_API_VERSION}
#else
#define RAZOR_INIT_(type) {.struct_size = (uint32_t)sizeof(type), .version = RAZOR_API_VERSION}
#endif

typedef enum razor_dtype { RAZOR_FP16 = 1, RAZOR_BF16 = 2, RAZOR_FP8_E4M3 = 3 } razor_dtype;

typedef enum razor_position {
    RAZOR_ROPE_HALF = 1,        /* element i turns with i + rotary_dim / 2 (llama, qwen) */
    RAZOR_ROPE_INTERLEAVED = 2, /* element 2 i turns with 2 i + 1 (GPT-J) */
    RAZOR_ALIBI = 3,
    RAZOR_NO_POSITION = 4       /* keys and queries arrive as they shall be cached */
} razor_position;

/* Layout of a row of the RoPE table: [cos(r/2) | sin(r/2)], or r/2 pairs (cos, sin). */
typedef enum razor_rope_table { RAZOR_TABLE_SPLIT = 1, RAZOR_TABLE_PAIRS = 2 } razor_rope_table;

/* What a layer is. Does not change between calls. */
typedef struct razor_layer {
    uint32_t struct_size;
    uint32_t version;
    int32_t num_heads;     /* Hq, a multiple of num_kv_heads */
    int32_t num_kv_heads;  /* Hkv, 1 .. RAZOR_MAX_KV_HEADS */
    int32_t head_dim;      /* 64, 96, 128 or 256 */
    int32_t num_retrieval; /* R, 0 .. Hkv */
    /* host [R] ascending KV head indices; NULL = 0 .. R-1 */
    const int32_t *retrieval_heads;
    razor_dtype dtype;       /* of qkv and out: FP16 or BF16 */
    razor_dtype cache_dtype; /* of cached keys and values: dtype, or FP8_E4M3 */
    razor_position position;
    razor_rope_table rope_table; /* read for RoPE only */
    int32_t rotary_dim;          /* leading elements that RoPE turns; 0 = head_dim; even */
    float scale;                 /* of the logits, > 0; as a rule 1/sqrt(head_dim) */
    int32_t max_seq_len;         /* capacity of a sequence in tokens, N_max */
    int32_t sink_tokens;         /* N0 >= 0; also a matter of full_ring_offset: 0 if there is nothing to set */
    /* Policy of local heads; not read when R = Hkv. */
    int32_t min_window;     /* S0 >= 1 */
    int32_t compression;    /* C >= 1; 0 = fixed window of S0 */
    int32_t comp_tokens;    /* M, 0 .. RAZOR_MAX_COMP_TOKENS; 0 or 1 with ALiBi */
    /* H, 0 .. RAZOR_MAX_HEAVY_HITTERS: dropped tokens that stay rows of their own, in the rows N0 .. N0 + H - 1 of a local
     * head, chosen at the end of every chunk, also of one token, by the attention of its last queries (docs/semantics.md,
     * "Heavy hitters"). A sequence has min(H, dropped tokens) of them. 0 with ALiBi: they carry no position. */
    int32_t heavy_hitters;
    /* Rows of a local head's ring, at least razor_ring_rows(); position p >= N0 of the window is in row
     * local_ring_offset + (p - N0) mod ring_rows, a sink p < N0 in row p. */
    int32_t ring_rows;
    int32_t local_ring_offset; /* at least N0 + H; more leaves a bubble, as in TensorRT-LLM's cyclic pools */
    int32_t full_ring_offset;  /* of retrieval heads, >= N0: position p >= N0 is in row p - N0 + this; N0 = row p */
} razor_layer;

#define RAZOR_LAYER_INIT RAZOR_INIT_(razor_layer)

typedef enum razor_view_kind {
    RAZOR_VIEW_NONE = 0,       /* the layer has no heads of this class */
    RAZOR_VIEW_CONTIGUOUS = 1,
    RAZOR_VIEW_PAGED = 2
} razor_view_kind;

/*
 * Where the keys and values of one class of heads are. A row is head_dim elements of cache_dtype without gaps; every
 * row begins on a multiple of 16 bytes. h is the index within the class. Memory need not be initialised.
 *
 * CONTIGUOUS: row r of head h of sequence b is at k + slot(b) * slot_stride + h * head_stride + r * head_dim
 * (elements; v likewise), with slot(b) = slots ? slots[b] : b. Heads and slots must not overlap. Not read: head_stride
 * with one head, slot_stride with B = 1 and no slots.
 *
 * PAGED (TensorRT-LLM's pools): a block holds [heads of this class, tokens_per_block, head_dim] of keys, or of values,
 * without gaps. Row r of a sequence is in its block r / tokens_per_block. The block's first byte: pool + layer_offset +
 * (uint32_t)offset * block_bytes, in 64 bits, with
 * offset = block_offsets[b * sequence_stride + (0 for keys, key_value_stride for values) + r / tokens_per_block].
 * Every offset within the capacity must be that of some block of the pool, also where no token is yet: such a block may
 * be read, and may hold anything.
 *
 * Slots and offsets are on the device and not checked. No two sequences of a call may have tokens in the same memory.
 */
typedef struct razor_view {
    razor_view_kind kind;
    int32_t capacity; /* rows of a sequence that exist; rows beyond are never touched. At least, for local heads,
                       * local_ring_offset + ring_rows; for retrieval heads all rows of min(max_past + max_chunk,
                       * max_seq_len) tokens, max_chunk being 1 without contexts */
    /* CONTIGUOUS */
    void *k, *v;                /* device */
    int64_t slot_stride, head_stride; /* elements */
    const int32_t *slots;       /* device [B], or NULL */
    /* PAGED */
    void *pool;                 /* device */
    int64_t layer_offset;       /* bytes */
    int64_t block_bytes;
    const int32_t *block_offsets; /* device */
    int64_t sequence_stride, key_value_stride; /* elements of block_offsets */
    int32_t tokens_per_block;
} razor_view;

typedef enum razor_comp_kind {
    RAZOR_COMP_NONE = 0,       /* M = 0, or no local heads */
    RAZOR_COMP_CONTIGUOUS = 1,
    RAZOR_COMP_IN_BUBBLE = 2   /* in the unused rows before the ring of a paged local view */
} razor_comp_kind;

/*
 * The compensation tokens of local heads, fp32.
 *
 * CONTIGUOUS: mean key m of head h of sequence b at comp + slot(b) * comp_slot_stride + (h * M + m) * 2 * D, its mean
 * value D elements later; count and log-weight at + slot(b) * weight_slot_stride + h * M + m. Strides are not read with
 * B = 1 and no slots.
 *
 * IN_BUBBLE: M mean keys from row N0 + H of the local view's key block on, then M counts, then M log-weights; M mean
 * values from row N0 + H of the value block on. All of it must fit in the rows N0 + H .. local_ring_offset - 1, inside one
 * block.
 *
 * The memory need not be initialised: a chunk that begins a sequence (past = 0) does that.
 */
typedef struct razor_comp {
    razor_comp_kind kind;
    float *comp;        /* device [slots, Lh, M, 2, D]; 16-byte aligned, comp_slot_stride a multiple of 4 */
    float *log_weight;  /* device [slots, Lh, M]; natural logarithm; -inf = unused */
    float *count;       /* device [slots, Lh, M]; 0 = unused */
    int64_t comp_slot_stride, weight_slot_stride; /* elements */
    const int32_t *slots; /* device [B], or NULL */
} razor_comp;

/* How large a call may become; decides the workspace. A call fits if none of its own numbers is larger. */
typedef struct razor_limits {
    uint32_t struct_size;
    uint32_t version;
    int32_t max_batch;          /* B */
    int32_t max_context_tokens; /* sum over the context rows of a call (padded: B * S) */
    int32_t max_chunk;          /* longest chunk; not read if max_context_tokens = 0 */
    int32_t max_past;           /* longest past */
} razor_limits;

#define RAZOR_LIMITS_INIT RAZOR_INIT_(razor_limits)

/*
 * One call. Sequences 0 .. num_contexts - 1 bring chunks of any length ("context"); sequences num_contexts .. B - 1
 * bring one token each ("generation"), or none where chunk says 0. past = 0 begins a sequence, whatever its slot held.
 *
 * Token rows of qkv and out:
 *   padded (tokens_per_sequence = S > 0): token i of sequence b is row b * S + i; rows behind a chunk are ignored
 *     in qkv and set to zero in out;
 *   packed (tokens_per_sequence = 0): the chunks of the contexts follow one another in the first num_context_tokens
 *     rows, then each generation has one row, B - num_contexts in all, also where its chunk is 0.
 * Rows of out that no token of qkv belongs to are set to zero. qkv and out must not overlap.
 *
 * A padded call is all contexts (num_contexts = B), or with S = 1 all generations (num_contexts = 0), which is the same
 * then and runs as decode.
 *
 * past, total and chunk are read on the device. A sequence whose numbers do not fit (negative, beyond max_past,
 * max_chunk or max_seq_len) is treated as idle: its caches stay as they are.
 */
typedef struct razor_call {
    uint32_t struct_size;
    uint32_t version;
    int32_t batch;               /* B >= 1 */
    int32_t num_contexts;        /* 0 .. B */
    int32_t tokens_per_sequence; /* S, or 0 = packed */
    int32_t num_context_tokens;  /* packed: rows of all contexts together */
    int32_t max_chunk;           /* host: upper bound of chunk over the contexts, >= 1; padded: S */
    int32_t max_past;            /* host: upper bound of past over the batch */
    const void *qkv;             /* device [rows, (Hq + 2 Hkv) * D]: q heads, k heads, v heads; 16-byte aligned */
    void *out;                   /* device [rows, Hq * D]; 16-byte aligned */
    const int32_t *past;         /* device [B] tokens cached before this call; or NULL and: */
    const int32_t *total;        /* device [B] past + chunk; read if past is NULL only */
    const int32_t *chunk;        /* device [B]; may be NULL if num_contexts = 0 (all 1). Generation rows: 0 or 1, */
    int32_t generation_chunk_is_one; /* unless this is set: then chunk is read for contexts only */
    int32_t num_positions;       /* rows of cos_sin, at least min(max_past + max_chunk, max_seq_len) */
    const float *cos_sin;        /* device [num_positions, rotary_dim], row = position; RoPE. Faster 16-byte aligned */
    const float *alibi_slopes;   /* device [Hq] fp32; ALiBi */
    const float *k_scale, *v_scale; /* device [1], FP8 caches: value = stored * scale; NULL = 1 */
    razor_view full, local;
    razor_comp comp;
} razor_call;

#define RAZOR_CALL_INIT RAZOR_INIT_(razor_call)

/* RAZOR_API_VERSION of the library. Compare it first if the library was opened by name. */
RAZOR_API uint32_t razor_api_version(void);

/* Version of the library and what it was built with, e.g. "0.1.0 (CUDA 13.0; sm_80 sm_86 sm_90)". */
RAZOR_API const char *razor_build_info(void);

/* One line about the last failure of this thread; never NULL, empty if there was none. Valid until the thread's next
 * failure. */
RAZOR_API const char *razor_last_error(void);

/*
 * Smallest ring for a policy: min(L(n_max) + 1, n_max - N0), at least 1 (docs/semantics.md). Reads max_seq_len,
 * sink_tokens, min_window and compression only; 0 if one of them is wrong (razor_last_error says which).
 */
RAZOR_API int32_t razor_ring_rows(const razor_layer *layer);

/* Check a layer alone: what a builder wants to know before it builds. */
RAZOR_API razor_status razor_check_layer(const razor_layer *layer);

/*
 * Bytes of device memory that a call within the limits needs, on any device; a machine without one can ask too. Never
 * falls when a limit grows. Layers can share a workspace of the largest size of any, if one stream runs them.
 */
RAZOR_API razor_status razor_workspace_size(const razor_layer *layer, const razor_limits *limits, size_t *bytes);

/*
 * Attend and update the caches. workspace: device, 256-byte aligned, contents need not survive between calls and
 * need not be initialised. stream: a cudaStream_t; NULL = CUDA's default stream. Only enqueues: out is there when the
 * stream gets there.
 */
RAZOR_API razor_status razor_attention(const razor_layer *layer, const razor_call *call, void *workspace,
                                       size_t workspace_bytes, void *stream);

#ifdef __cplusplus
}
#endif
#endif
