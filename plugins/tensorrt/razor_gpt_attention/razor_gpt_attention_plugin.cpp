#include "razor_gpt_attention_plugin.h"

#include <algorithm>

#include "../common/policy.h"

namespace razor::trt {

using namespace nvinfer1;
using trtllm::LocalCache;
using trtllm::Role;

namespace {

[[noreturn]] void refuse(const char *field, const std::string &expected, int64_t found) {
    throw Refused("field " + std::string(field) + ": expected " + expected + ", found " + std::to_string(found));
}

constexpr const char *kOwnFields[] = {"num_retrieval", "position",        "rotary_dim",     "kv_cache_fp8",
                                      "tokens_per_block", "local_cache",  "layer_full",     "layer_local",
                                      "window",        "ring_slot_bytes", "comp_slot_bytes"};

int64_t volume(const Dims &dims) {
    int64_t out = 1;
    for (int i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < 0) return -1;
        out *= dims.d[i];
    }
    return out;
}

bool has_rope(const razor_layer &layer) {
    return layer.position == RAZOR_ROPE_HALF || layer.position == RAZOR_ROPE_INTERLEAVED;
}

}  // namespace

const PluginFieldCollection *RazorGptAttentionPlugin::fields() {
    static const std::vector<PluginField> names = [] {
        std::vector<PluginField> all = common_field_names();
        for (const char *name : kOwnFields) all.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
        return all;
    }();
    static const PluginFieldCollection collection{static_cast<int32_t>(names.size()), names.data()};
    return &collection;
}

RazorGptAttentionPlugin::RazorGptAttentionPlugin(const char *layer, TensorRTPhase phase, FieldReader &fields)
    : RazorGptAttentionPlugin(layer, phase, read(phase, fields)) {}

RazorGptAttentionPlugin::RazorGptAttentionPlugin(const char *layer, TensorRTPhase phase, Settings settings)
    : Plugin(kName, layer, phase, write(settings)), settings_(std::move(settings)) {}

RazorGptAttentionPlugin::Settings RazorGptAttentionPlugin::read(TensorRTPhase phase, FieldReader &fields) {
    Settings s;
    if (phase == TensorRTPhase::kRUNTIME) check_plan_version(fields);
    read_common(fields, s.layer, 0); // the cache manager's layouts have no rows for heavy hitters
    razor_layer &l = s.layer;
    l.num_retrieval = fields.integer("num_retrieval", 0, l.num_kv_heads);
    l.position = static_cast<razor_position>(fields.integer("position", RAZOR_ROPE_HALF, RAZOR_NO_POSITION));
    l.rope_table = RAZOR_TABLE_PAIRS;
    l.rotary_dim = has_rope(l) ? fields.integer("rotary_dim", 2, l.head_dim) : fields.integer("rotary_dim", 0, 0);
    s.fp8 = fields.integer("kv_cache_fp8", 0, 1) != 0;
    l.dtype = RAZOR_FP16; // stands in for either until the tensors say which
    l.cache_dtype = s.fp8 ? RAZOR_FP8_E4M3 : RAZOR_FP16;
    s.tokens_per_block = fields.integer("tokens_per_block", RAZOR_MIN_BLOCK_TOKENS, RAZOR_MAX_BLOCK_TOKENS);
    if (s.tokens_per_block & (s.tokens_per_block - 1)) {
        refuse("tokens_per_block", "a power of two", s.tokens_per_block);
    }
    s.local_cache = static_cast<LocalCache>(fields.integer("local_cache", static_cast<int>(LocalCache::kCyclicPool),
                                                           static_cast<int>(LocalCache::kStateSlots)));
    s.layer_full =
        l.num_retrieval > 0 ? fields.integer("layer_full", 0, INT32_MAX) : fields.integer("layer_full", -1, -1);
    check_heads_and_policy(l);
    read_local_cache(s, fields);
    fields.finish();
    check(razor_check_layer(&l));
    s.inputs = trtllm::inputs_of(s.local_cache, l.position, s.fp8);
    for (size_t i = 0; i < s.inputs.size(); ++i) s.places[static_cast<int>(s.inputs[i])] = static_cast<int>(i);
    return s;
}

void RazorGptAttentionPlugin::read_local_cache(Settings &s, FieldReader &fields) {
    razor_layer &l = s.layer;
    const bool local = s.num_local() > 0, cyclic = s.local_cache == LocalCache::kCyclicPool;
    const bool pool = local && cyclic, slots = local && !cyclic;
    const int64_t element = s.fp8 ? 1 : 2;
    const int32_t bubble = cyclic ? trtllm::bubble_rows(l.sink_tokens, s.tokens_per_block) : 0;
    l.full_ring_offset = l.local_ring_offset = l.sink_tokens + bubble;

    const int32_t smallest = razor_ring_rows(&l);
    s.layer_local = pool ? fields.integer("layer_local", 0, INT32_MAX) : fields.integer("layer_local", -1, -1);
    s.window = pool ? fields.integer("window", l.sink_tokens + smallest, INT32_MAX) : fields.integer("window", 0, 0);
    l.ring_rows = pool ? s.window - l.sink_tokens : smallest;
    if (pool && l.ring_rows % s.tokens_per_block != 0) {
        refuse("window", "sink_tokens = " + std::to_string(l.sink_tokens) + " plus a multiple of tokens_per_block = " +
                             std::to_string(s.tokens_per_block), s.window);
    }
    // Keys, then counts and log-weights, in the rows between sinks and ring.
    const int64_t comp_in_block = static_cast<int64_t>(l.comp_tokens) * (l.head_dim + 2) * 4;
    if (pool && comp_in_block > bubble * l.head_dim * element) {
        refuse("comp_tokens",
               "at most " + std::to_string(bubble * l.head_dim * element / ((l.head_dim + 2) * 4)) +
                   " in the " + std::to_string(bubble) + " rows between sink_tokens = " +
                   std::to_string(l.sink_tokens) + " and a block of " + std::to_string(s.tokens_per_block),
               l.comp_tokens);
    }
    // A short prompt would have its sinks, but not yet the block in which the compensation tokens begin.
    if (pool && l.comp_tokens > 0 && l.sink_tokens > s.tokens_per_block) {
        refuse("sink_tokens", "at most tokens_per_block = " + std::to_string(s.tokens_per_block) +
                                  " with compensation tokens behind them", l.sink_tokens);
    }
    const int64_t ring_bytes = 2 * static_cast<int64_t>(s.num_local()) * s.local_rows() * l.head_dim * element;
    const int64_t comp_bytes = static_cast<int64_t>(s.num_local()) * l.comp_tokens * (2 * l.head_dim + 2) * 4;
    const auto slot_bytes = [&](const char *name, int64_t needed) {
        const int64_t found = slots ? fields.integer64(name, needed, INT64_MAX) : fields.integer64(name, 0, 0);
        if (found % 16 != 0) refuse(name, "a multiple of 16", found);
        return found;
    };
    s.ring_slot_bytes = slot_bytes("ring_slot_bytes", ring_bytes);
    s.comp_slot_bytes = slot_bytes("comp_slot_bytes", comp_bytes);
}

FieldWriter RazorGptAttentionPlugin::write(const Settings &s) {
    FieldWriter plan;
    plan.integer(kPlanVersionField, kPlanVersion);
    write_common(plan, s.layer);
    plan.integer("num_retrieval", s.layer.num_retrieval);
    plan.integer("position", s.layer.position);
    plan.integer("rotary_dim", s.layer.rotary_dim);
    plan.integer("kv_cache_fp8", s.fp8);
    plan.integer("tokens_per_block", s.tokens_per_block);
    plan.integer("local_cache", static_cast<int32_t>(s.local_cache));
    plan.integer("layer_full", s.layer_full);
    plan.integer("layer_local", s.layer_local);
    plan.integer("window", s.window);
    plan.integer64("ring_slot_bytes", s.ring_slot_bytes);
    plan.integer64("comp_slot_bytes", s.comp_slot_bytes);
    return plan;
}

bool RazorGptAttentionPlugin::type_fits(int position, const DynamicPluginTensorDesc *tensors) const {
    const DataType found = tensors[position].desc.type;
    if (position >= num_inputs()) return found == tensors[0].desc.type;
    const Role role = settings_.inputs[position];
    return role == Role::kQkv ? is_half(found) : found == trtllm::type_of(role);
}

std::string RazorGptAttentionPlugin::types_text() const {
    return "expected qkv in float16 or bfloat16 (float32 has no kernels), scales, rotary tables and alibi_slopes in "
           "float32 (cast the slopes), addresses, perf knobs and progress in int64, everything else in int32";
}

void RazorGptAttentionPlugin::output_shapes(const DimsExprs *inputs, DimsExprs *outputs, IExprBuilder &builder) const {
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = builder.constant(static_cast<int64_t>(settings_.layer.num_heads) * settings_.layer.head_dim);
}

void RazorGptAttentionPlugin::check_shapes(const Dims *const *inputs) const {
    const razor_layer &l = settings_.layer;
    const auto at = [&](Role role) -> const Dims & { return *inputs[index(role)]; };
    const auto expect = [&](Role role, std::initializer_list<int64_t> dims) {
        check_dims(trtllm::name_of(role), at(role), dims);
    };
    expect(Role::kQkv, {-1, (l.num_heads + 2 * static_cast<int64_t>(l.num_kv_heads)) * l.head_dim});
    expect(Role::kSequenceLength, {-1});
    const int64_t batch = at(Role::kSequenceLength).d[0];
    expect(Role::kHostPast, {batch});
    expect(Role::kHostWindows, {-1});
    expect(Role::kHostSinks, {1});
    expect(Role::kContextLengths, {batch});
    const Dims &beams = at(Role::kCacheIndirection);
    if (beams.nbDims != 3 || beams.d[1] > 1) {
        throw Refused("input cache_indirection: expected a beam width of 1, found shape " + to_text(beams) +
                      "; build with max_beam_width=1");
    }
    expect(Role::kHostRequestTypes, {batch});
    expect(Role::kBlockOffsets, {-1, batch, 2, -1});
    expect(Role::kHostPoolPointers, {-1, 2}); // as many as offsets have when it runs; ranges of a profile may differ
    expect(Role::kHostPoolMapping, {-1, 2});
    expect(Role::kHostContextLengths, {batch});
    if (settings_.fp8 && volume(at(Role::kKvQuantOrig)) > 1) expect(Role::kKvQuantOrig, {1});
    if (has_rope(l)) {
        const int64_t elements = volume(at(Role::kRotaryCosSin)), needed = int64_t{l.max_seq_len} * l.rotary_dim;
        if (elements >= 0 && (elements < needed || elements % l.rotary_dim != 0)) {
            throw Refused("input rotary_cos_sin: expected pairs of " + std::to_string(l.rotary_dim / 2) +
                          " angles for at least max_seq_len = " + std::to_string(l.max_seq_len) +
                          " positions, found shape " + to_text(at(Role::kRotaryCosSin)));
        }
    }
    if (l.position == RAZOR_ALIBI) expect(Role::kAlibiSlopes, {l.num_heads});
    if (settings_.local_cache == LocalCache::kStateSlots) {
        expect(Role::kSlotMapping, {batch});
        expect(Role::kConvStatePointer, {1});
        expect(Role::kRnnStatePointer, {1});
    }
}

razor_layer RazorGptAttentionPlugin::layer(DataType type) const {
    razor_layer out = settings_.layer;
    out.dtype = dtype_of(type);
    out.cache_dtype = settings_.fp8 ? RAZOR_FP8_E4M3 : out.dtype;
    return out; // retrieval_heads stays null: a rank's retrieval heads come first
}

size_t RazorGptAttentionPlugin::workspace_size(const DynamicPluginTensorDesc *inputs) const {
    const int64_t most = settings_.layer.max_seq_len, tokens = inputs[0].max.d[0];
    razor_limits limits = RAZOR_LIMITS_INIT;
    limits.max_batch = static_cast<int32_t>(inputs[index(Role::kSequenceLength)].max.d[0]);
    limits.max_context_tokens = static_cast<int32_t>(tokens);
    limits.max_chunk = static_cast<int32_t>(std::min(tokens, most));
    limits.max_past = static_cast<int32_t>(most);
    return padded_workspace(layer(inputs[0].desc.type), limits);
}

// Windows and sinks are settings of the server, which may also clamp them: an engine that ran with others than it was
// planned for would overwrite rows it still needs.
void RazorGptAttentionPlugin::check_cache_settings(const int32_t *windows, int64_t num_windows, int32_t sinks) const {
    const razor_layer &l = settings_.layer;
    const bool cyclic = settings_.local_cache == LocalCache::kCyclicPool;
    const auto window = [&](int32_t row) {
        if (row >= num_windows) {
            throw Refused("input host_max_attention_window_sizes: expected a window for cache layer " +
                          std::to_string(row) + ", found " + std::to_string(num_windows) + " windows");
        }
        return windows[row];
    };
    // The list has an entry for each cache layer of the model, which this layer does not know.
    const std::string way_out = "; give the server the windows that the engine's manifest.json or config.json "
                                "(runtime_defaults) lists, and the KV cache memory for them";
    if (settings_.layer_full >= 0 && window(settings_.layer_full) < l.max_seq_len) {
        throw Refused("input host_max_attention_window_sizes[" + std::to_string(settings_.layer_full) +
                      "] (retrieval heads): expected at least max_seq_len = " + std::to_string(l.max_seq_len) +
                      ", found " + std::to_string(window(settings_.layer_full)) + way_out);
    }
    if (settings_.layer_local >= 0 && window(settings_.layer_local) != settings_.window) {
        throw Refused("input host_max_attention_window_sizes[" + std::to_string(settings_.layer_local) +
                      "] (local heads): expected the planned window " + std::to_string(settings_.window) + ", found " +
                      std::to_string(window(settings_.layer_local)) + way_out);
    }
    // The linear manager of 1.1 and later has no sinks; ours are in the state slots.
    const int32_t planned = cyclic ? l.sink_tokens : 0;
    if (sinks != planned) {
        // A server refuses to be told 0.
        const std::string way_out = planned == 0 ? "leave sink_token_length unset"
                                                 : "set sink_token_length to " + std::to_string(planned);
        throw Refused("input host_sink_token_length: expected " + std::to_string(planned) + ", found " +
                      std::to_string(sinks) + "; " + way_out);
    }
}

// A prefix that the cache manager reuses comes with its rows in the pools, but not with what was compressed from them.
void RazorGptAttentionPlugin::check_contexts_begin(const trtllm::Requests &requests) const {
    if (settings_.num_local() == 0 || requests.continued < 0) return;
    const std::string found = "host_past_key_value_lengths[" + std::to_string(requests.continued) +
                              "]: expected the tokens of the prompt alone, found " +
                              std::to_string(requests.begin) + " before them";
    const char *way_out = "; disable KV cache reuse (enable_block_reuse false) and chunked context, or build with "
                          "use_paged_context_fmha disabled";
    if (settings_.local_cache == LocalCache::kStateSlots) {
        throw Refused(found + ": a reused prefix or a later chunk, whose local heads are in no state slot" + way_out);
    }
    // With a bubble the cyclic manager itself reuses nothing, so this is a later chunk. Without one it may be either.
    if (settings_.layer.full_ring_offset == settings_.layer.sink_tokens) {
        throw Refused(found + ": with sink_tokens = " + std::to_string(settings_.layer.sink_tokens) +
                      ", whole blocks of " + std::to_string(settings_.tokens_per_block) +
                      ", a later chunk cannot be told from a reused prefix, whose ring may have been overwritten" +
                      way_out + ", or choose other sink_tokens");
    }
}

void RazorGptAttentionPlugin::fill_state_slots(razor_call &call, const void *const *inputs) const {
    const razor_layer &l = settings_.layer;
    const auto address = [&](Role role) {
        const int64_t value = *static_cast<const int64_t *>(inputs[index(role)]);
        if (value == 0) {
            throw Refused("input " + std::string(trtllm::name_of(role)) + ": expected an address, found 0");
        }
        return reinterpret_cast<char *>(value);
    };
    const int32_t *slots = static_cast<const int32_t *>(inputs[index(Role::kSlotMapping)]);
    const int64_t element = settings_.fp8 ? 1 : 2;

    razor_view &view = call.local;
    view.kind = RAZOR_VIEW_CONTIGUOUS;
    view.capacity = settings_.local_rows();
    view.head_stride = static_cast<int64_t>(view.capacity) * l.head_dim;
    view.slot_stride = settings_.ring_slot_bytes / element;
    view.slots = slots;
    char *ring = address(Role::kConvStatePointer);
    view.k = ring;
    view.v = ring + settings_.num_local() * view.head_stride * element;

    if (l.comp_tokens == 0) return;
    razor_comp &comp = call.comp;
    comp.kind = RAZOR_COMP_CONTIGUOUS;
    const int64_t tokens = static_cast<int64_t>(settings_.num_local()) * l.comp_tokens;
    comp.comp = reinterpret_cast<float *>(address(Role::kRnnStatePointer));
    comp.log_weight = comp.comp + tokens * 2 * l.head_dim;
    comp.count = comp.log_weight + tokens;
    comp.comp_slot_stride = comp.weight_slot_stride = settings_.comp_slot_bytes / 4;
    comp.slots = slots;
}

void RazorGptAttentionPlugin::run(const PluginTensorDesc *descs, const void *const *inputs, void *const *outputs,
                                  void *workspace, cudaStream_t stream) const {
    // While it builds, TensorRT times the plugin on buffers of its own, all of them on the device: there is nothing on
    // the host to read, no cache, and one way to compute.
    if (building()) return;

    const auto dims = [&](Role role) -> const Dims & { return descs[index(role)].dims; };
    const auto ints = [&](Role role) { return static_cast<const int32_t *>(inputs[index(role)]); };
    const auto floats = [&](Role role) { return static_cast<const float *>(inputs[index(role)]); };
    const razor_layer layer = this->layer(descs[0].type);
    check_cache_settings(ints(Role::kHostWindows), dims(Role::kHostWindows).d[0], *ints(Role::kHostSinks));
    const trtllm::Requests requests = trtllm::read_requests(
        static_cast<int32_t>(dims(Role::kSequenceLength).d[0]), dims(Role::kQkv).d[0], ints(Role::kHostRequestTypes),
        ints(Role::kHostPast), ints(Role::kHostContextLengths), layer.max_seq_len);
    check_contexts_begin(requests);

    razor_limits limits = RAZOR_LIMITS_INIT;
    limits.max_batch = requests.batch;
    limits.max_context_tokens = requests.num_context_tokens;
    limits.max_chunk = requests.max_chunk;
    limits.max_past = requests.max_past;

    razor_call call = RAZOR_CALL_INIT;
    call.batch = requests.batch;
    call.num_contexts = requests.num_contexts;
    call.num_context_tokens = requests.num_context_tokens;
    call.max_chunk = requests.max_chunk;
    call.max_past = requests.max_past;
    call.qkv = inputs[0];
    call.out = outputs[0];
    call.total = ints(Role::kSequenceLength);
    call.chunk = ints(Role::kContextLengths); // of a generation: its prompt
    call.generation_chunk_is_one = 1;
    if (has_rope(layer)) {
        call.cos_sin = floats(Role::kRotaryCosSin);
        call.num_positions = static_cast<int32_t>(volume(dims(Role::kRotaryCosSin)) / layer.rotary_dim);
    } else if (layer.position == RAZOR_ALIBI) {
        call.alibi_slopes = floats(Role::kAlibiSlopes);
    }
    if (settings_.fp8) call.k_scale = call.v_scale = floats(Role::kKvQuantOrig);

    const Dims &offsets = dims(Role::kBlockOffsets);
    const trtllm::PoolInputs pools{static_cast<int32_t>(offsets.d[0]),
                                   static_cast<int32_t>(offsets.d[1]),
                                   static_cast<int32_t>(offsets.d[3]),
                                   static_cast<int32_t>(dims(Role::kHostPoolPointers).d[0]),
                                   static_cast<int32_t>(dims(Role::kHostPoolMapping).d[0]),
                                   ints(Role::kBlockOffsets),
                                   static_cast<const int64_t *>(inputs[index(Role::kHostPoolPointers)]),
                                   ints(Role::kHostPoolMapping)};
    const auto view = [&](int32_t row, int32_t heads, int32_t rows) {
        return trtllm::pool_view(pools, row, heads, rows, settings_.tokens_per_block, layer.head_dim, settings_.fp8);
    };
    if (settings_.layer_full >= 0) {
        const int32_t rows = std::max(layer.max_seq_len - layer.sink_tokens, 0) + layer.full_ring_offset;
        call.full = view(settings_.layer_full, layer.num_retrieval, rows);
    }
    if (settings_.layer_local >= 0) {
        call.local = view(settings_.layer_local, settings_.num_local(), settings_.local_rows());
        if (layer.comp_tokens > 0) call.comp.kind = RAZOR_COMP_IN_BUBBLE;
    } else if (settings_.num_local() > 0) {
        fill_state_slots(call, inputs);
    }
    attend(layer, limits, call, workspace, stream);
}

}  // namespace razor::trt
