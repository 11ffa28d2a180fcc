// What TensorRT-LLM (1.0 - 1.2, TensorRT engines) gives an attention plugin: order of the inputs, meaning of the host
// arrays, layout of its pools. Everything that is inferred from its behaviour and not promised by an interface is in
// this file and its .cpp, so that a release that differs is met in one place.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "razor/razor.h"

namespace razor::trt::trtllm {

// Where the local heads of a layer keep their rows.
enum class LocalCache : int32_t {
    kCyclicPool = 1, // in a cache layer of their own, whose window TensorRT-LLM wraps around behind the sinks (1.0)
    kStateSlots = 2, // in the state slots of hybrid models (1.1 - 1.2)
};

// What an input is; order of declaration = order of the inputs. Not every layer has every one.
enum class Role {
    kQkv,                    // [tokens, (Hq + 2 Hkv) D], before RoPE
    kSequenceLength,         // int32 [B]: tokens with this call's, on the device
    kHostPast,               // int32 [B]
    kHostWindows,            // int32 [cache layers]
    kHostSinks,              // int32 [1]
    kContextLengths,         // int32 [B], on the device; of a context: tokens of this chunk
    kCacheIndirection,       // [batch, beam, window]: only the beam width is read
    kHostRequestTypes,       // int32 [B]: 0 = context, 1 = generation
    kBlockOffsets,           // int32 [pools, B, 2, blocks], on the device
    kHostBlockOffsets,       // the same on the host; not read
    kHostPoolPointers,       // int64 [pools, 2]
    kHostPoolMapping,        // int32 [cache layers, 2]
    kKvOrigQuant,            // float [1], FP8 caches: 1 / kv_quant_orig; not read
    kKvQuantOrig,            // float [1], FP8 caches: value = stored * this
    kRotaryInvFreq,          // float, RoPE; not read: the table says it
    kRotaryCosSin,           // float [1, positions * rotary_dim] or [positions, rotary_dim ...], RoPE: pairs (cos, sin)
    kAlibiSlopes,            // float [Hq], ALiBi
    kHostContextLengths,     // int32 [B]
    kHostRuntimePerfKnobs,   // int64; not read
    kHostContextProgress,    // int64; not read
    kSlotMapping,            // int32 [B], on the device; state slots
    kConvStatePointer,       // int64 [1] on the host: address of [slots, ring bytes]; state slots
    kRnnStatePointer,        // int64 [1] on the host: address of [slots, compensation bytes]; state slots
};

constexpr int kNumRoles = static_cast<int>(Role::kRnnStatePointer) + 1;

const char *name_of(Role role);
nvinfer1::DataType type_of(Role role); // kQkv: kHALF stands for either half type

// Inputs of a layer in order.
std::vector<Role> inputs_of(LocalCache cache, razor_position position, bool fp8);

// Rows between the sinks and the ring: with sinks, TensorRT-LLM lets what follows them begin at a block.
int32_t bubble_rows(int32_t sink_tokens, int32_t tokens_per_block);

// Bytes of a block of one layer: keys or values.
int64_t block_bytes(int32_t heads, int32_t tokens_per_block, int32_t head_dim, bool fp8);

// The host's knowledge of the requests of a call.
struct Requests {
    int32_t batch = 0, num_contexts = 0;
    int32_t num_context_tokens = 0; // of all contexts together
    int32_t max_chunk = 1;          // of the contexts
    int32_t max_past = 0; // for a captured graph the host rounds the lengths of generations up
    int32_t continued = -1; // the first context with tokens before its chunk; -1 = none
    int32_t begin = 0;      // how many
};

// Throws Refused when the arrays contradict each other or the layer.
Requests read_requests(int32_t batch, int64_t tokens, const int32_t *types, const int32_t *past,
                       const int32_t *context_lengths, int32_t max_seq_len);

// One class of heads in the pools.
struct PoolInputs {
    int32_t pools, batch, blocks;   // dimensions of the block offsets
    int32_t pointers;               // rows of the pool pointers
    int32_t cache_layers;           // rows of the mapping
    const int32_t *block_offsets;   // device
    const int64_t *pool_pointers;   // host
    const int32_t *mapping;         // host
};

// View of cache layer `row` for `heads` heads. Throws Refused.
razor_view pool_view(const PoolInputs &inputs, int32_t row, int32_t heads, int32_t capacity, int32_t tokens_per_block,
                     int32_t head_dim, bool fp8);

}  // namespace razor::trt::trtllm
