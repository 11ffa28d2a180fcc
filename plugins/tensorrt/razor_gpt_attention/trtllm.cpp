#include "trtllm.h"

#include <algorithm>

#include "../common/fields.h"

namespace razor::trt::trtllm {

using nvinfer1::DataType;

const char *name_of(Role role) {
    switch (role) {
    case Role::kQkv: return "qkv";
    case Role::kSequenceLength: return "sequence_length";
    case Role::kHostPast: return "host_past_key_value_lengths";
    case Role::kHostWindows: return "host_max_attention_window_sizes";
    case Role::kHostSinks: return "host_sink_token_length";
    case Role::kContextLengths: return "context_lengths";
    case Role::kCacheIndirection: return "cache_indirection";
    case Role::kHostRequestTypes: return "host_request_types";
    case Role::kBlockOffsets: return "kv_cache_block_offsets";
    case Role::kHostBlockOffsets: return "host_kv_cache_block_offsets";
    case Role::kHostPoolPointers: return "host_kv_cache_pool_pointers";
    case Role::kHostPoolMapping: return "host_kv_cache_pool_mapping";
    case Role::kKvOrigQuant: return "kv_orig_quant_scale";
    case Role::kKvQuantOrig: return "kv_quant_orig_scale";
    case Role::kRotaryInvFreq: return "rotary_inv_freq";
    case Role::kRotaryCosSin: return "rotary_cos_sin";
    case Role::kAlibiSlopes: return "alibi_slopes";
    case Role::kHostContextLengths: return "host_context_lengths";
    case Role::kHostRuntimePerfKnobs: return "host_runtime_perf_knobs";
    case Role::kHostContextProgress: return "host_context_progress";
    case Role::kSlotMapping: return "slot_mapping";
    case Role::kConvStatePointer: return "conv_state_ptr";
    case Role::kRnnStatePointer: return "rnn_state_ptr";
    }
    return "?";
}

DataType type_of(Role role) {
    switch (role) {
    case Role::kQkv: return DataType::kHALF;
    case Role::kHostPoolPointers:
    case Role::kHostRuntimePerfKnobs:
    case Role::kHostContextProgress:
    case Role::kConvStatePointer:
    case Role::kRnnStatePointer: return DataType::kINT64;
    case Role::kKvOrigQuant:
    case Role::kKvQuantOrig:
    case Role::kRotaryInvFreq:
    case Role::kRotaryCosSin:
    case Role::kAlibiSlopes: return DataType::kFLOAT;
    default: return DataType::kINT32;
    }
}

std::vector<Role> inputs_of(LocalCache cache, razor_position position, bool fp8) {
    std::vector<Role> roles;
    for (int i = 0; i < kNumRoles; ++i) {
        const Role role = static_cast<Role>(i);
        bool there = true;
        switch (role) {
        case Role::kKvOrigQuant:
        case Role::kKvQuantOrig: there = fp8; break;
        case Role::kRotaryInvFreq:
        case Role::kRotaryCosSin:
            there = position == RAZOR_ROPE_HALF || position == RAZOR_ROPE_INTERLEAVED;
            break;
        case Role::kAlibiSlopes: there = position == RAZOR_ALIBI; break;
        case Role::kSlotMapping:
        case Role::kConvStatePointer:
        case Role::kRnnStatePointer: there = cache == LocalCache::kStateSlots; break;
        default: break;
        }
        if (there) roles.push_back(role);
    }
    return roles;
}

int32_t bubble_rows(int32_t sink_tokens, int32_t tokens_per_block) {
    const int32_t rest = sink_tokens % tokens_per_block;
    return rest == 0 ? 0 : tokens_per_block - rest;
}

int64_t block_bytes(int32_t heads, int32_t tokens_per_block, int32_t head_dim, bool fp8) {
    return static_cast<int64_t>(heads) * tokens_per_block * head_dim * (fp8 ? 1 : 2);
}

Requests read_requests(int32_t batch, int64_t tokens, const int32_t *types, const int32_t *past,
                       const int32_t *context_lengths, int32_t max_seq_len) {
    Requests out;
    out.batch = batch;
    const auto of = [](const char *name, int32_t b) { return std::string(name) + "[" + std::to_string(b) + "]"; };
    int64_t context_tokens = 0;
    for (int32_t b = 0; b < batch; ++b) {
        if (types[b] != 0 && types[b] != 1) {
            throw Refused(of("host_request_types", b) + ": expected 0 (context) or 1 (generation), found " +
                          std::to_string(types[b]));
        }
        const bool context = types[b] == 0;
        if (context && b != out.num_contexts) {
            throw Refused(of("host_request_types", b) +
                          ": expected contexts before generations, found a context after one");
        }
        // For a context TensorRT-LLM counts what is there once this chunk is; for a generation what was there before.
        int32_t before = past[b];
        if (context) {
            const int32_t chunk = context_lengths[b];
            if (chunk < 1) {
                throw Refused(of("host_context_lengths", b) + ": expected at least 1 token, found " +
                              std::to_string(chunk));
            }
            if (past[b] < chunk) {
                throw Refused(of("host_past_key_value_lengths", b) + ": expected at least the " +
                              std::to_string(chunk) + " tokens of this chunk, found " + std::to_string(past[b]) +
                              "; this TensorRT-LLM counts in another way than 1.0 - 1.2");
            }
            before -= chunk;
            if (before > 0 && out.continued < 0) {
                out.continued = b;
                out.begin = before;
            }
            out.num_contexts = b + 1;
            out.max_chunk = std::max(out.max_chunk, chunk);
            context_tokens += chunk;
        }
        if (past[b] < 0 || past[b] > max_seq_len) {
            throw Refused(of("host_past_key_value_lengths", b) + ": expected 0..max_seq_len = " +
                          std::to_string(max_seq_len) + " tokens, found " + std::to_string(past[b]));
        }
        out.max_past = std::max(out.max_past, before);
    }
    const int64_t expected = context_tokens + batch - out.num_contexts;
    if (tokens != expected) {
        throw Refused("input qkv: expected " + std::to_string(expected) + " tokens (" + std::to_string(context_tokens) +
                      " of contexts, one of each of " + std::to_string(batch - out.num_contexts) +
                      " generations), found " + std::to_string(tokens) +
                      "; build with remove_input_padding, without beam search and speculative decoding");
    }
    out.num_context_tokens = static_cast<int32_t>(context_tokens);
    return out;
}

razor_view pool_view(const PoolInputs &in, int32_t row, int32_t heads, int32_t capacity, int32_t tokens_per_block,
                     int32_t head_dim, bool fp8) {
    if (row >= in.cache_layers) {
        throw Refused("input host_kv_cache_pool_mapping: expected a row " + std::to_string(row) + ", found " +
                      std::to_string(in.cache_layers) + " rows; the engine's config.json must declare the cache " +
                      "layers that the network was built with");
    }
    if (in.pointers != in.pools) {
        throw Refused("input host_kv_cache_pool_pointers: expected " + std::to_string(in.pools) +
                      " pools, as kv_cache_block_offsets has, found " + std::to_string(in.pointers));
    }
    const int32_t pool = in.mapping[2 * row], layer_in_pool = in.mapping[2 * row + 1];
    if (pool < 0 || pool >= in.pools || layer_in_pool < 0) {
        throw Refused("input host_kv_cache_pool_mapping[" + std::to_string(row) + "]: expected one of " +
                      std::to_string(in.pools) + " pools and a layer in it, found " + std::to_string(pool) + ", " +
                      std::to_string(layer_in_pool));
    }
    const int64_t rows = static_cast<int64_t>(in.blocks) * tokens_per_block;
    if (rows < capacity) {
        throw Refused("input kv_cache_block_offsets: expected at least " +
                      std::to_string((static_cast<int64_t>(capacity) + tokens_per_block - 1) / tokens_per_block) +
                      " blocks a sequence for " + std::to_string(capacity) + " rows of cache layer " +
                      std::to_string(row) + ", found " + std::to_string(in.blocks) +
                      "; with sinks a sequence has one block more (prepare the inputs with streamingllm=True)");
    }
    razor_view view{};
    view.kind = RAZOR_VIEW_PAGED;
    view.capacity = capacity;
    view.tokens_per_block = tokens_per_block;
    view.block_bytes = block_bytes(heads, tokens_per_block, head_dim, fp8);
    // The primary pool. Offsets of the secondary one (bit 31) never reach an engine: blocks are brought back before.
    view.pool = reinterpret_cast<void *>(in.pool_pointers[2 * pool]);
    if (view.pool == nullptr) {
        throw Refused("input host_kv_cache_pool_pointers[" + std::to_string(pool) + "]: expected an address, found 0");
    }
    // A block of the pool holds keys and values of each of its layers, and offsets count in single ones of these.
    view.layer_offset = layer_in_pool * 2 * view.block_bytes;
    view.key_value_stride = in.blocks;
    view.sequence_stride = 2 * view.key_value_stride;
    view.block_offsets = in.block_offsets + pool * in.batch * view.sequence_stride;
    return view;
}

}  // namespace razor::trt::trtllm
