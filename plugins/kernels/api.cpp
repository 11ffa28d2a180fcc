// The C API: checks every number before a kernel sees it, lays out the workspace, enqueues the steps.
//
// Allocates nothing, throws nothing, never waits for the device.
#include <atomic>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "launch.h"
#include "params.h"
#include "razor/razor.h"

#ifndef RAZOR_VERSION_STRING
#define RAZOR_VERSION_STRING "unversioned"
#endif
#ifndef RAZOR_ARCHS
#define RAZOR_ARCHS "architectures not recorded"
#endif

namespace razor {
namespace {

// Bounds that keep every sum of the kernels inside int32, every product inside int64, and grids inside CUDA's limits.
constexpr int kMaxTokens = 1 << 29;
constexpr int kMaxBatch = 65535;
constexpr int kMaxHeads = 16384;
constexpr int kMaxQueryRows = 1 << 30;
constexpr int64_t kMaxStride = int64_t{1} << 42;
constexpr size_t kAlignment = 256;

thread_local char last_error[512] = "";

__attribute__((format(printf, 2, 3))) razor_status fail(razor_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

// Leaves the calling function with INVALID_ARGUMENT and this message unless `condition` holds.
#define RAZOR_EXPECT(condition, ...)                                        \
    do {                                                                    \
        if (!(condition)) return fail(RAZOR_INVALID_ARGUMENT, __VA_ARGS__); \
    } while (0)
#define RAZOR_TRY(expression)                      \
    do {                                           \
        const razor_status status_ = (expression); \
        if (status_ != RAZOR_OK) return status_;   \
    } while (0)

bool aligned(const void *pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// An enumerator that C code may have set to anything: read as the number it is.
template <typename Enum>
int code(const Enum &e) {
    static_assert(sizeof(Enum) == sizeof(int), "enums of the C API are ints");
    int value;
    memcpy(&value, &e, sizeof value);
    return value;
}

size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

razor_status check_device_pointer(const char *name, const void *pointer, size_t alignment) {
    RAZOR_EXPECT(pointer != nullptr, "%s: expected a device pointer, found NULL", name);
    RAZOR_EXPECT(aligned(pointer, alignment), "%s: expected an address on a multiple of %zu bytes, found %p", name,
                 alignment, pointer);
    return RAZOR_OK;
}

// An array on the device that may be absent.
razor_status check_optional(const char *name, const void *pointer) {
    return pointer == nullptr ? RAZOR_OK : check_device_pointer(name, pointer, 4);
}

template <typename Struct>
razor_status check_version(const char *name, const char *init, const Struct *s) {
    RAZOR_EXPECT(s != nullptr, "%s: expected a struct, found NULL", name);
    if (s->struct_size != sizeof(Struct) || s->version != RAZOR_API_VERSION)
        return fail(
            RAZOR_VERSION_MISMATCH,
            "%s: expected %zu bytes of API version %d, found %u bytes of version %u; start from %s of the razor.h "
            "that came with this library",
            name, sizeof(Struct), RAZOR_API_VERSION, s->struct_size, s->version, init);
    return RAZOR_OK;
}

// Layer --------------------------------------------------------------------------------------------

int num_local(const razor_layer &l) { return l.num_kv_heads - l.num_retrieval; }

int bytes_per_element(razor_dtype dtype) { return dtype == RAZOR_FP8_E4M3 ? 1 : 2; }

bool uses_rope(const razor_layer &l) { return l.position == RAZOR_ROPE_HALF || l.position == RAZOR_ROPE_INTERLEAVED; }

razor_status check_lengths(const razor_layer &l) {
    RAZOR_EXPECT(l.max_seq_len >= 1 && l.max_seq_len <= kMaxTokens, "max_seq_len: expected 1..%d, found %d", kMaxTokens,
                 l.max_seq_len);
    RAZOR_EXPECT(l.sink_tokens >= 0 && l.sink_tokens <= kMaxTokens, "sink_tokens: expected 0..%d, found %d", kMaxTokens,
                 l.sink_tokens);
    return RAZOR_OK;
}

razor_status check_window(const razor_layer &l) {
    RAZOR_EXPECT(l.min_window >= 1, "min_window: expected >= 1, found %d", l.min_window);
    RAZOR_EXPECT(l.compression >= 0, "compression: expected >= 1, or 0 for a fixed window, found %d", l.compression);
    return RAZOR_OK;
}

// The policy as kernels see it. Windows and divisors beyond max_seq_len act like max_seq_len, and so the sums of
// Policy::window and Policy::dropped cannot overflow.
Policy policy_of(const razor_layer &l) {
    const auto bounded = [&](int x) { return x < l.max_seq_len ? x : l.max_seq_len; };
    return {l.sink_tokens, bounded(l.min_window), bounded(l.compression), l.comp_tokens, l.heavy_hitters};
}

// W_cap = max(1, min(L(N_max) + 1, N_max - N0))
int ring_rows_of(const razor_layer &l) {
    const int window = policy_of(l).window(l.max_seq_len) + 1, all = l.max_seq_len - l.sink_tokens;
    const int rows = window < all ? window : all;
    return rows > 1 ? rows : 1;
}

razor_status check_layer(const razor_layer *layer) {
    RAZOR_TRY(check_version("razor_layer", "RAZOR_LAYER_INIT", layer));
    const razor_layer &l = *layer;
    RAZOR_EXPECT(l.num_kv_heads >= 1 && l.num_kv_heads <= RAZOR_MAX_KV_HEADS, "num_kv_heads: expected 1..%d, found %d",
                 RAZOR_MAX_KV_HEADS, l.num_kv_heads);
    RAZOR_EXPECT(l.num_heads >= 1 && l.num_heads <= kMaxHeads && l.num_heads % l.num_kv_heads == 0,
                 "num_heads: expected a multiple of %d KV heads, at most %d, found %d", l.num_kv_heads, kMaxHeads,
                 l.num_heads);
    RAZOR_EXPECT(l.head_dim == 64 || l.head_dim == 96 || l.head_dim == 128 || l.head_dim == 256,
                 "head_dim: expected 64, 96, 128 or 256, found %d", l.head_dim);
    RAZOR_EXPECT(l.num_retrieval >= 0 && l.num_retrieval <= l.num_kv_heads, "num_retrieval: expected 0..%d, found %d",
                 l.num_kv_heads, l.num_retrieval);
    if (l.retrieval_heads != nullptr) {
        for (int i = 0; i < l.num_retrieval; ++i) {
            const int head = l.retrieval_heads[i], least = i ? l.retrieval_heads[i - 1] + 1 : 0;
            RAZOR_EXPECT(head >= least && head < l.num_kv_heads,
                         "retrieval_heads[%d]: expected ascending KV heads, here one of %d..%d, found %d", i, least,
                         l.num_kv_heads - 1, head);
        }
    }
    const int dtype = code(l.dtype), cache_dtype = code(l.cache_dtype), position = code(l.position);
    RAZOR_EXPECT(dtype == RAZOR_FP16 || dtype == RAZOR_BF16,
                 "dtype: expected RAZOR_FP16 (%d) or RAZOR_BF16 (%d), found %d", RAZOR_FP16, RAZOR_BF16, dtype);
    RAZOR_EXPECT(cache_dtype == dtype || cache_dtype == RAZOR_FP8_E4M3,
                 "cache_dtype: expected dtype (%d) or RAZOR_FP8_E4M3 (%d), found %d", dtype, RAZOR_FP8_E4M3,
                 cache_dtype);
    RAZOR_EXPECT(position >= RAZOR_ROPE_HALF && position <= RAZOR_NO_POSITION,
                 "position: expected a razor_position (%d..%d), found %d", RAZOR_ROPE_HALF, RAZOR_NO_POSITION,
                 position);
    if (uses_rope(l)) {
        const int table = code(l.rope_table);
        RAZOR_EXPECT(table == RAZOR_TABLE_SPLIT || table == RAZOR_TABLE_PAIRS,
                     "rope_table: expected RAZOR_TABLE_SPLIT (%d) or RAZOR_TABLE_PAIRS (%d), found %d",
                     RAZOR_TABLE_SPLIT, RAZOR_TABLE_PAIRS, table);
        RAZOR_EXPECT(l.rotary_dim >= 0 && l.rotary_dim <= l.head_dim && l.rotary_dim % 2 == 0,
                     "rotary_dim: expected an even number of at most %d elements, or 0 for all, found %d", l.head_dim,
                     l.rotary_dim);
    }
    RAZOR_EXPECT(isfinite(l.scale) && l.scale > 0, "scale: expected a positive number, found %g", l.scale);
    RAZOR_TRY(check_lengths(l)); // sink_tokens also without local heads: views may shift what follows the sinks
    if (num_local(l) > 0) {
        RAZOR_TRY(check_window(l));
        RAZOR_EXPECT(l.comp_tokens >= 0 && l.comp_tokens <= RAZOR_MAX_COMP_TOKENS,
                     "comp_tokens: expected 0..%d, found %d", RAZOR_MAX_COMP_TOKENS, l.comp_tokens);
        RAZOR_EXPECT(l.position != RAZOR_ALIBI || l.comp_tokens <= 1,
                     "comp_tokens: expected 0 or 1 with ALiBi, found %d: a cluster has no single position",
                     l.comp_tokens);
        RAZOR_EXPECT(l.heavy_hitters >= 0 && l.heavy_hitters <= RAZOR_MAX_HEAVY_HITTERS,
                     "heavy_hitters: expected 0..%d, found %d", RAZOR_MAX_HEAVY_HITTERS, l.heavy_hitters);
        RAZOR_EXPECT(l.position != RAZOR_ALIBI || l.heavy_hitters == 0,
                     "heavy_hitters: expected 0 with ALiBi, found %d: their rows carry no position", l.heavy_hitters);
        const int rows = ring_rows_of(l);
        RAZOR_EXPECT(l.ring_rows >= rows && l.ring_rows <= kMaxTokens,
                     "ring_rows: expected at least %d (razor_ring_rows) for this policy and max_seq_len %d, found %d",
                     rows, l.max_seq_len, l.ring_rows);
        RAZOR_EXPECT(l.local_ring_offset >= int64_t{l.sink_tokens} + l.heavy_hitters && l.local_ring_offset <= kMaxTokens,
                     "local_ring_offset: expected at least sink_tokens + heavy_hitters (%d + %d), found %d",
                     l.sink_tokens, l.heavy_hitters, l.local_ring_offset);
    }
    if (l.num_retrieval > 0)
        RAZOR_EXPECT(l.full_ring_offset >= l.sink_tokens && l.full_ring_offset <= kMaxTokens,
                     "full_ring_offset: expected at least sink_tokens (%d), found %d", l.sink_tokens,
                     l.full_ring_offset);
    return RAZOR_OK;
}

void fill_layer(Params &p, const razor_layer &l) {
    p.num_heads = l.num_heads;
    p.num_kv_heads = l.num_kv_heads;
    p.group = l.num_heads / l.num_kv_heads;
    p.num_retrieval = l.num_retrieval;
    p.num_local = num_local(l);
    p.head_dim = l.head_dim;
    p.bf16 = l.dtype == RAZOR_BF16;
    p.cache_type = l.cache_dtype == RAZOR_FP8_E4M3 ? CacheType::kFp8 : CacheType::kSame;
    p.position = l.position;
    p.rope_table = uses_rope(l) ? l.rope_table : RAZOR_TABLE_SPLIT;
    p.rotary_dim = !uses_rope(l) ? 0 : l.rotary_dim ? l.rotary_dim : l.head_dim;
    p.max_seq_len = l.max_seq_len;
    p.scale = l.scale;
    p.policy = num_local(l) > 0 ? policy_of(l) : Policy{l.sink_tokens, l.max_seq_len, 0, 0, 0};
    int retrieval = 0, local = l.num_retrieval;
    for (int head = 0; head < l.num_kv_heads; ++head) {
        const bool retrieves =
            retrieval < l.num_retrieval && head == (l.retrieval_heads ? l.retrieval_heads[retrieval] : retrieval);
        p.head_of[retrieves ? retrieval++ : local++] = static_cast<uint8_t>(head);
    }
}

// Views --------------------------------------------------------------------------------------------

// Are the `na * nb` stretches of `size` that begin at i * a + j * b apart from one another? Asks for nesting: the wider
// stride steps over everything of the narrower one.
bool apart(int64_t a, int64_t na, int64_t b, int64_t nb, int64_t size) {
    if (na == 1) return nb == 1 || b >= size;
    if (nb == 1) return a >= size;
    return a < b ? a >= size && b >= (na - 1) * a + size : b >= size && a >= (nb - 1) * b + size;
}

// A stride that is not used may hold anything.
razor_status check_stride(const char *view, const char *name, int64_t stride, int64_t unit) {
    RAZOR_EXPECT(stride >= 0 && stride <= kMaxStride && stride % unit == 0,
                 "%s.%s: expected a multiple of %lld in 0..%lld, found %lld", view, name, static_cast<long long>(unit),
                 static_cast<long long>(kMaxStride), static_cast<long long>(stride));
    return RAZOR_OK;
}

razor_status fill_rows(Rows &rows, const char *name, const razor_view &v, const razor_layer &l, int heads, int batch,
                       int64_t needed_rows) {
    char field[48];
    const auto at = [&](const char *member) {
        snprintf(field, sizeof field, "%s.%s", name, member);
        return field;
    };
    const int bytes = bytes_per_element(l.cache_dtype), kind = code(v.kind);
    RAZOR_EXPECT(kind == RAZOR_VIEW_CONTIGUOUS || kind == RAZOR_VIEW_PAGED,
                 "%s.kind: expected RAZOR_VIEW_CONTIGUOUS (%d) or RAZOR_VIEW_PAGED (%d) for a layer with %d %s heads, "
                 "found %d",
                 name, RAZOR_VIEW_CONTIGUOUS, RAZOR_VIEW_PAGED, heads, name[0] == 'f' ? "retrieval" : "local", kind);
    RAZOR_EXPECT(v.capacity >= needed_rows, "%s.capacity: expected at least %lld rows, found %d", name,
                 static_cast<long long>(needed_rows), v.capacity);
    rows.capacity = v.capacity;
    if (kind == RAZOR_VIEW_CONTIGUOUS) {
        RAZOR_TRY(check_device_pointer(at("k"), v.k, 16));
        RAZOR_TRY(check_device_pointer(at("v"), v.v, 16));
        RAZOR_TRY(check_optional(at("slots"), v.slots));
        const int64_t slots = v.slots ? (batch > 2 ? batch : 2) : batch; // how many there are is not known
        if (slots > 1) RAZOR_TRY(check_stride(name, "slot_stride", v.slot_stride, 16 / bytes));
        if (heads > 1) RAZOR_TRY(check_stride(name, "head_stride", v.head_stride, 16 / bytes));
        RAZOR_EXPECT(apart(v.slot_stride, slots, v.head_stride, heads, int64_t{v.capacity} * l.head_dim),
                     "%s: slots and heads overlap: expected strides that step over %d rows of %d elements, found "
                     "head_stride %lld (%d heads) and slot_stride %lld (batch %d)",
                     name, v.capacity, l.head_dim, static_cast<long long>(v.head_stride), heads,
                     static_cast<long long>(v.slot_stride), batch);
        rows.k = static_cast<char *>(v.k);
        rows.v = static_cast<char *>(v.v);
        rows.slot_stride = slots > 1 ? v.slot_stride * bytes : 0;
        rows.head_stride = heads > 1 ? v.head_stride * bytes : 0;
        rows.slots = v.slots;
        return RAZOR_OK;
    }
    const int tokens = v.tokens_per_block;
    RAZOR_EXPECT(tokens >= RAZOR_MIN_BLOCK_TOKENS && tokens <= RAZOR_MAX_BLOCK_TOKENS && (tokens & (tokens - 1)) == 0,
                 "%s.tokens_per_block: expected a power of two in %d..%d, found %d", name, RAZOR_MIN_BLOCK_TOKENS,
                 RAZOR_MAX_BLOCK_TOKENS, tokens);
    RAZOR_TRY(check_device_pointer(at("pool"), v.pool, 16));
    RAZOR_TRY(check_device_pointer(at("block_offsets"), v.block_offsets, 4));
    RAZOR_TRY(check_stride(name, "layer_offset", v.layer_offset, 16));
    RAZOR_TRY(check_stride(name, "block_bytes", v.block_bytes, 16));
    const int64_t least = int64_t{heads} * tokens * l.head_dim * bytes;
    RAZOR_EXPECT(v.block_bytes >= least, "%s.block_bytes: expected at least %lld for %d heads of %d tokens, found %lld",
                 name, static_cast<long long>(least), heads, tokens, static_cast<long long>(v.block_bytes));
    RAZOR_TRY(check_stride(name, "key_value_stride", v.key_value_stride, 1));
    if (batch > 1) RAZOR_TRY(check_stride(name, "sequence_stride", v.sequence_stride, 1));
    const int64_t blocks = (int64_t{v.capacity} + tokens - 1) / tokens;
    RAZOR_EXPECT(
        apart(v.key_value_stride, 2, v.sequence_stride, batch, blocks),
        "%s: rows of block_offsets overlap: expected strides that step over %lld blocks, found key_value_stride "
        "%lld and sequence_stride %lld (batch %d)",
        name, static_cast<long long>(blocks), static_cast<long long>(v.key_value_stride),
        static_cast<long long>(v.sequence_stride), batch);
    rows.pool = static_cast<char *>(v.pool) + v.layer_offset;
    rows.block_offsets = v.block_offsets;
    rows.block_bytes = v.block_bytes;
    rows.sequence_stride = batch > 1 ? v.sequence_stride : 0;
    rows.key_value_stride = v.key_value_stride;
    rows.block_shift = __builtin_ctz(static_cast<unsigned>(tokens));
    return RAZOR_OK;
}

razor_status fill_comp(Comp &out, const razor_comp &c, const razor_view &local, const razor_layer &l, int batch) {
    const int64_t heads = num_local(l), m = l.comp_tokens, d = l.head_dim;
    const int kind = code(c.kind);
    RAZOR_EXPECT(kind == RAZOR_COMP_CONTIGUOUS || kind == RAZOR_COMP_IN_BUBBLE,
                 "comp.kind: expected RAZOR_COMP_CONTIGUOUS (%d) or RAZOR_COMP_IN_BUBBLE (%d) for comp_tokens %d, "
                 "found %d",
                 RAZOR_COMP_CONTIGUOUS, RAZOR_COMP_IN_BUBBLE, l.comp_tokens, kind);
    if (kind == RAZOR_COMP_IN_BUBBLE) {
        RAZOR_EXPECT(local.kind == RAZOR_VIEW_PAGED, "comp.kind: RAZOR_COMP_IN_BUBBLE needs a paged local view");
        const int64_t row_bytes = d * bytes_per_element(l.cache_dtype);
        const int64_t bytes = m * (d + 2) * 4; // of keys, counts, log-weights; values need less
        const int64_t rows = (bytes + row_bytes - 1) / row_bytes;
        const int first = l.sink_tokens + l.heavy_hitters, bubble = l.local_ring_offset - first;
        RAZOR_EXPECT(rows <= bubble,
                     "comp.kind: %d compensation tokens need %lld rows between sinks, heavy hitters and ring, found %d "
                     "(local_ring_offset %d - sink_tokens %d - heavy_hitters %d)",
                     l.comp_tokens, static_cast<long long>(rows), bubble, l.local_ring_offset, l.sink_tokens,
                     l.heavy_hitters);
        const int64_t inside = first % local.tokens_per_block;
        RAZOR_EXPECT(
            inside + rows <= local.tokens_per_block,
            "comp.kind: %lld rows of compensation tokens from row %d on do not lie inside one block of %d tokens",
            static_cast<long long>(rows), first, local.tokens_per_block);
        return RAZOR_OK;
    }
    RAZOR_TRY(check_device_pointer("comp.comp", c.comp, 16));
    RAZOR_TRY(check_device_pointer("comp.log_weight", c.log_weight, 4));
    RAZOR_TRY(check_device_pointer("comp.count", c.count, 4));
    RAZOR_TRY(check_optional("comp.slots", c.slots));
    const bool many = batch > 1 || c.slots != nullptr;
    if (many) {
        RAZOR_TRY(check_stride("comp", "comp_slot_stride", c.comp_slot_stride, 4));
        RAZOR_TRY(check_stride("comp", "weight_slot_stride", c.weight_slot_stride, 1));
        RAZOR_EXPECT(
            c.comp_slot_stride >= heads * m * 2 * d,
            "comp.comp_slot_stride: expected at least %lld elements (%d heads x %d tokens x 2 x %d), found %lld",
            static_cast<long long>(heads * m * 2 * d), num_local(l), l.comp_tokens, l.head_dim,
            static_cast<long long>(c.comp_slot_stride));
        RAZOR_EXPECT(c.weight_slot_stride >= heads * m,
                     "comp.weight_slot_stride: expected at least %lld elements (%d heads x %d tokens), found %lld",
                     static_cast<long long>(heads * m), num_local(l), l.comp_tokens,
                     static_cast<long long>(c.weight_slot_stride));
    }
    out.comp = c.comp;
    out.log_weight = c.log_weight;
    out.count = c.count;
    out.comp_slot_stride = many ? c.comp_slot_stride : 0;
    out.weight_slot_stride = many ? c.weight_slot_stride : 0;
    out.slots = c.slots;
    return RAZOR_OK;
}

// Call ---------------------------------------------------------------------------------------------

razor_status fill_batch(Params &p, const razor_call &c, const razor_layer &l) {
    RAZOR_EXPECT(c.batch >= 1 && c.batch <= kMaxBatch, "batch: expected 1..%d, found %d", kMaxBatch, c.batch);
    RAZOR_EXPECT(c.num_contexts >= 0 && c.num_contexts <= c.batch, "num_contexts: expected 0..%d (batch), found %d",
                 c.batch, c.num_contexts);
    RAZOR_EXPECT(c.max_past >= 0 && c.max_past <= l.max_seq_len, "max_past: expected 0..%d (max_seq_len), found %d",
                 l.max_seq_len, c.max_past);
    const int s = c.tokens_per_sequence;
    RAZOR_EXPECT(s >= 0, "tokens_per_sequence: expected >= 0, found %d", s);
    int contexts = c.num_contexts;
    bool generation_is_one = c.generation_chunk_is_one != 0;
    if (s > 0) {
        RAZOR_EXPECT(int64_t{c.batch} * s <= kMaxTokens,
                     "tokens_per_sequence: expected batch * tokens <= %d, found %d * %d", kMaxTokens, c.batch, s);
        RAZOR_EXPECT(contexts == c.batch || contexts == 0,
                     "num_contexts: expected 0 or %d (batch) in a padded call, found %d", c.batch, contexts);
        RAZOR_EXPECT(s == 1 || contexts == c.batch,
                     "num_contexts: expected %d (batch) in a padded call with %d tokens a sequence, found %d", c.batch,
                     s, contexts);
        if (s == 1 && contexts > 0) { // one token each: what decode does best
            contexts = 0;
            generation_is_one = false;
        }
    }
    p.batch = c.batch;
    p.num_contexts = contexts;
    p.tokens_per_sequence = s;
    p.max_past = c.max_past;
    p.max_chunk = 1;
    p.generation_chunk_is_one = generation_is_one;
    if (contexts > 0) {
        RAZOR_EXPECT(c.max_chunk >= 1 && c.max_chunk <= l.max_seq_len,
                     "max_chunk: expected 1..%d (max_seq_len), found %d", l.max_seq_len, c.max_chunk);
        p.max_chunk = c.max_chunk;
        if (s > 0) {
            RAZOR_EXPECT(c.max_chunk == s, "max_chunk: expected %d (tokens_per_sequence) in a padded call, found %d", s,
                         c.max_chunk);
            p.num_context_tokens = contexts * s;
        } else {
            RAZOR_EXPECT(c.num_context_tokens >= 1 && c.num_context_tokens <= kMaxTokens - kMaxBatch,
                         "num_context_tokens: expected 1..%d for %d contexts, found %d", kMaxTokens - kMaxBatch,
                         contexts, c.num_context_tokens);
            RAZOR_EXPECT(c.max_chunk <= c.num_context_tokens,
                         "max_chunk: expected 1..%d (num_context_tokens), found %d", c.num_context_tokens, c.max_chunk);
            p.num_context_tokens = c.num_context_tokens;
        }
        // Query rows of a KV head are counted in int32, a tile of them beyond the last included.
        const int group = l.num_heads / l.num_kv_heads;
        if (int64_t{p.max_chunk} * group > kMaxQueryRows)
            return fail(RAZOR_UNSUPPORTED,
                        "max_chunk: %d tokens with %d query heads a KV head are too many for one call; split it",
                        p.max_chunk, group);
        // Thread blocks are counted in int32: a block for 16 tokens or heavy hitters, or for a cluster, is the most any
        // step asks for; the last step asks for both.
        const int64_t pieces = (int64_t{p.max_chunk} + p.policy.heavy_hitters + 15) / 16,
                      blocks = pieces > l.comp_tokens ? pieces : l.comp_tokens;
        if (blocks * contexts * num_local(l) > INT32_MAX / 2)
            return fail(RAZOR_UNSUPPORTED,
                        "num_contexts: %d contexts of up to %d tokens with %d local heads are too many for "
                        "one call; split it",
                        contexts, p.max_chunk, num_local(l));
    } else if (s == 0) {
        RAZOR_EXPECT(c.num_context_tokens == 0, "num_context_tokens: expected 0 without contexts, found %d",
                     c.num_context_tokens);
    }
    return RAZOR_OK;
}

razor_status fill_call(Params &p, const razor_call *call, const razor_layer &l) {
    RAZOR_TRY(check_version("razor_call", "RAZOR_CALL_INIT", call));
    const razor_call &c = *call;
    RAZOR_TRY(fill_batch(p, c, l));
    RAZOR_TRY(check_device_pointer("qkv", c.qkv, 16));
    RAZOR_TRY(check_device_pointer("out", c.out, 16));
    RAZOR_EXPECT(c.past != nullptr || c.total != nullptr, "past: expected past or total, found NULL for both");
    RAZOR_EXPECT(c.chunk != nullptr || p.num_contexts == 0,
                 "chunk: expected a device pointer for %d contexts, found NULL", p.num_contexts);
    RAZOR_TRY(check_optional("past", c.past));
    RAZOR_TRY(check_optional("total", c.total));
    RAZOR_TRY(check_optional("chunk", c.chunk));
    p.qkv = c.qkv;
    p.out = c.out;
    p.past = c.past;
    p.total = c.total;
    p.chunk = c.chunk;

    // No sequence gets longer than this: the kernels treat one whose numbers on the device say otherwise as idle.
    const int64_t sum = int64_t{c.max_past} + p.max_chunk;
    const int tokens = static_cast<int>(sum < l.max_seq_len ? sum : l.max_seq_len);
    if (uses_rope(l)) {
        RAZOR_TRY(check_device_pointer("cos_sin", c.cos_sin, 4));
        RAZOR_EXPECT(c.num_positions >= tokens, "num_positions: expected at least %d rows of cos_sin, found %d", tokens,
                     c.num_positions);
        p.cos_sin = c.cos_sin;
        p.num_positions = c.num_positions;
    } else if (l.position == RAZOR_ALIBI) {
        RAZOR_TRY(check_device_pointer("alibi_slopes", c.alibi_slopes, 4));
        p.slopes = c.alibi_slopes;
    }
    if (l.cache_dtype == RAZOR_FP8_E4M3) {
        RAZOR_TRY(check_optional("k_scale", c.k_scale));
        RAZOR_TRY(check_optional("v_scale", c.v_scale));
        p.k_scale = c.k_scale;
        p.v_scale = c.v_scale;
    }
    const int sinks = l.sink_tokens;
    if (l.num_retrieval > 0) {
        const int64_t rows = tokens <= sinks ? tokens : int64_t{tokens} - sinks + l.full_ring_offset;
        RAZOR_TRY(fill_rows(p.full, "full", c.full, l, l.num_retrieval, c.batch, rows));
        p.full.sinks = sinks;
        p.full.ring_offset = l.full_ring_offset;
        p.full.ring_rows = l.max_seq_len; // never wraps
    }
    if (num_local(l) > 0) {
        RAZOR_TRY(
            fill_rows(p.local, "local", c.local, l, num_local(l), c.batch, int64_t{l.local_ring_offset} + l.ring_rows));
        p.local.sinks = sinks;
        p.local.ring_offset = l.local_ring_offset;
        p.local.ring_rows = l.ring_rows;
        if (l.comp_tokens > 0) RAZOR_TRY(fill_comp(p.comp, c.comp, c.local, l, c.batch));
    }
    return RAZOR_OK;
}

// Workspace ----------------------------------------------------------------------------------------

// [ append: q, new_k, new_v | decode: counters, rest ]: prefill and compact use the space of decode's rest; they run
// before and after it. The counters have a place of their own: append zeroes them before all of these.
struct Plan {
    size_t new_k, new_v, counters, scratch, total;
};

Plan plan_of(const Params &p) {
    Plan plan = {};
    const size_t width = static_cast<size_t>(p.head_dim);
    const size_t q = static_cast<size_t>(p.num_rows()) * p.num_heads * width * 2;
    const size_t chunk = static_cast<size_t>(p.num_context_tokens) * p.num_local * width * p.cache_bytes();
    plan.new_k = round_up(q);
    plan.new_v = plan.new_k + round_up(chunk);
    plan.counters = round_up(append_workspace(p));
    const bool generations = p.num_generations() > 0, contexts = p.num_contexts > 0;
    plan.scratch = plan.counters + (generations ? round_up(decode_zeroed_ints(p) * sizeof(int32_t)) : 0);
    plan.total = plan.scratch;
    const auto include = [&](size_t end) {
        if (end > plan.total) plan.total = end;
    };
    if (generations) include(plan.counters + round_up(decode_workspace(p)));
    if (contexts) include(plan.scratch + round_up(prefill_workspace(p)));
    if (contexts) include(plan.scratch + round_up(compact_workspace(p)));
    return plan;
}

// A call that needs at least what any call within the limits needs: as many contexts and as many generations as the
// batch has sequences.
razor_status fill_limits(Params &p, const razor_limits *limits, const razor_layer &l) {
    RAZOR_TRY(check_version("razor_limits", "RAZOR_LIMITS_INIT", limits));
    const razor_limits &m = *limits;
    RAZOR_EXPECT(m.max_batch >= 1 && m.max_batch <= kMaxBatch, "max_batch: expected 1..%d, found %d", kMaxBatch,
                 m.max_batch);
    RAZOR_EXPECT(m.max_context_tokens >= 0 && m.max_context_tokens <= kMaxTokens,
                 "max_context_tokens: expected 0..%d, found %d", kMaxTokens, m.max_context_tokens);
    RAZOR_EXPECT(m.max_past >= 0 && m.max_past <= l.max_seq_len, "max_past: expected 0..%d (max_seq_len), found %d",
                 l.max_seq_len, m.max_past);
    const bool contexts = m.max_context_tokens > 0;
    if (contexts) {
        const int most = m.max_context_tokens < l.max_seq_len ? m.max_context_tokens : l.max_seq_len;
        RAZOR_EXPECT(m.max_chunk >= 1 && m.max_chunk <= most,
                     "max_chunk: expected 1..%d (max_context_tokens %d, max_seq_len %d), found %d", most,
                     m.max_context_tokens, l.max_seq_len, m.max_chunk);
    }
    p.num_contexts = contexts ? m.max_batch : 0;
    p.batch = p.num_contexts + m.max_batch;
    p.num_context_tokens = m.max_context_tokens;
    p.max_chunk = contexts ? m.max_chunk : 1;
    p.max_past = m.max_past;
    return RAZOR_OK;
}

// Device -------------------------------------------------------------------------------------------

// Of the current device; asked once per device. CUDA's text is left for the caller.
cudaError_t query_device(DeviceInfo &info) {
    constexpr int kCached = 64;
    static std::atomic<uint64_t> cache[kCached]; // sms << 32 | shared; 0 = not asked yet
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    const bool cached = device >= 0 && device < kCached;
    uint64_t both = cached ? cache[device].load(std::memory_order_relaxed) : 0;
    if (both == 0) {
        int sms = 0, shared = 0;
        error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
        if (error == cudaSuccess)
            error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error != cudaSuccess) return error;
        both = static_cast<uint64_t>(sms) << 32 | static_cast<uint32_t>(shared);
        if (cached) cache[device].store(both, std::memory_order_relaxed);
    }
    info = {static_cast<int>(both >> 32), static_cast<int>(both & 0xffffffffu)};
    return cudaSuccess;
}

razor_status cuda_status(const char *step, cudaError_t error) {
    if (error == cudaSuccess) return RAZOR_OK;
    (void)cudaGetLastError(); // reported here; do not let a later check of the caller trip over it
    if (error == cudaErrorNoKernelImageForDevice)
        return fail(RAZOR_CUDA_ERROR, "%s: %s; this library is %s", step, cudaGetErrorString(error),
                    razor_build_info());
    if (error == cudaErrorInsufficientDriver)
        return fail(RAZOR_CUDA_ERROR,
                    "%s: CUDA error %d: %s; expected an NVIDIA driver for CUDA %d.%d, found none or an older one",
                    step, static_cast<int>(error), cudaGetErrorString(error), CUDART_VERSION / 1000,
                    CUDART_VERSION % 1000 / 10);
    return fail(RAZOR_CUDA_ERROR, "%s: CUDA error %d: %s", step, static_cast<int>(error), cudaGetErrorString(error));
}

razor_status enqueue(Params &p, const Plan &plan, char *workspace, cudaStream_t stream) {
    DeviceInfo device = {};
    RAZOR_TRY(cuda_status("device", query_device(device)));
    p.q = workspace;
    p.new_k = workspace + plan.new_k;
    p.new_v = workspace + plan.new_v;
    char *counters = workspace + plan.counters, *scratch = workspace + plan.scratch;
    const bool generations = p.num_generations() > 0, contexts = p.num_contexts > 0;
    const size_t zeroed = generations ? decode_zeroed_ints(p) : 0;
    RAZOR_TRY(cuda_status("append", launch_append(p, reinterpret_cast<int32_t *>(counters), zeroed, stream)));
    if (contexts) RAZOR_TRY(cuda_status("prefill", launch_prefill(p, scratch, device, stream)));
    if (generations) RAZOR_TRY(cuda_status("decode", launch_decode(p, counters, device, stream)));
    if (contexts && p.num_local > 0) RAZOR_TRY(cuda_status("compact", launch_compact(p, scratch, stream)));
    return RAZOR_OK;
}

} // namespace
} // namespace razor

// Exported -----------------------------------------------------------------------------------------

extern "C" {

uint32_t razor_api_version(void) { return RAZOR_API_VERSION; }

const char *razor_build_info(void) {
#ifdef RAZOR_SHIM
    return RAZOR_VERSION_STRING " (CPU shim)";
#else
    struct Text {
        char line[256];
        Text() {
            snprintf(line, sizeof line, "%s (CUDA %d.%d; %s)", RAZOR_VERSION_STRING, CUDART_VERSION / 1000,
                     CUDART_VERSION % 1000 / 10, RAZOR_ARCHS);
        }
    };
    static const Text text;
    return text.line;
#endif
}

const char *razor_last_error(void) { return razor::last_error; }

int32_t razor_ring_rows(const razor_layer *layer) {
    if (razor::check_version("razor_layer", "RAZOR_LAYER_INIT", layer) != RAZOR_OK) return 0;
    if (razor::check_lengths(*layer) != RAZOR_OK || razor::check_window(*layer) != RAZOR_OK) return 0;
    return razor::ring_rows_of(*layer);
}

razor_status razor_check_layer(const razor_layer *layer) { return razor::check_layer(layer); }

razor_status razor_workspace_size(const razor_layer *layer, const razor_limits *limits, size_t *bytes) {
    RAZOR_TRY(razor::check_layer(layer));
    razor::Params p = {};
    razor::fill_layer(p, *layer);
    RAZOR_TRY(razor::fill_limits(p, limits, *layer));
    if (bytes == nullptr) return razor::fail(RAZOR_INVALID_ARGUMENT, "bytes: expected a pointer, found NULL");
    *bytes = razor::plan_of(p).total;
    return RAZOR_OK;
}

razor_status razor_attention(const razor_layer *layer, const razor_call *call, void *workspace, size_t workspace_bytes,
                             void *stream) {
    RAZOR_TRY(razor::check_layer(layer));
    razor::Params p = {};
    razor::fill_layer(p, *layer);
    RAZOR_TRY(razor::fill_call(p, call, *layer));
    RAZOR_TRY(razor::check_device_pointer("workspace", workspace, razor::kAlignment));
    const razor::Plan plan = razor::plan_of(p);
    if (workspace_bytes < plan.total)
        return razor::fail(RAZOR_WORKSPACE_TOO_SMALL,
                           "workspace: expected at least %zu bytes, found %zu; ask "
                           "razor_workspace_size with limits that cover this call",
                           plan.total, workspace_bytes);
    return razor::enqueue(p, plan, static_cast<char *>(workspace), static_cast<cudaStream_t>(stream));
}

} // extern "C"
