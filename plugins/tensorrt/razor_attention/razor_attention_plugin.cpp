#include "razor_attention_plugin.h"

#include <algorithm>

#include "../common/policy.h"

namespace razor::trt {

using namespace nvinfer1;

const PluginFieldCollection *RazorAttentionPlugin::fields() {
    static const std::vector<PluginField> names = [] {
        std::vector<PluginField> all = common_field_names();
        all.emplace_back("retrieval_heads", nullptr, PluginFieldType::kINT32, 0);
        return all;
    }();
    static const PluginFieldCollection collection{static_cast<int32_t>(names.size()), names.data()};
    return &collection;
}

RazorAttentionPlugin::RazorAttentionPlugin(const char *layer, TensorRTPhase phase, FieldReader &fields)
    : RazorAttentionPlugin(layer, phase, read(phase, fields)) {}

RazorAttentionPlugin::RazorAttentionPlugin(const char *layer, TensorRTPhase phase, Settings settings)
    : Plugin(kName, layer, phase, write(settings)), settings_(std::move(settings)) {}

RazorAttentionPlugin::Settings RazorAttentionPlugin::read(TensorRTPhase phase, FieldReader &fields) {
    Settings s;
    if (phase == TensorRTPhase::kRUNTIME) check_plan_version(fields);
    read_common(fields, s.layer, RAZOR_MAX_HEAVY_HITTERS);
    const int32_t num_kv_heads = s.layer.num_kv_heads;
    if (phase == TensorRTPhase::kRUNTIME) {
        const std::vector<int32_t> mask = fields.integers("retrieval_mask", 0, 1);
        if (static_cast<int32_t>(mask.size()) != num_kv_heads) {
            throw Refused("field retrieval_mask: expected " + std::to_string(num_kv_heads) + " integers, found " +
                          std::to_string(mask.size()));
        }
        for (int32_t head = 0; head < num_kv_heads; ++head) {
            if (mask[head]) s.retrieval_heads.push_back(head);
        }
    } else {
        s.retrieval_heads = fields.integers("retrieval_heads", 0, num_kv_heads - 1);
        for (size_t i = 1; i < s.retrieval_heads.size(); ++i) {
            if (s.retrieval_heads[i - 1] >= s.retrieval_heads[i]) {
                throw Refused("field retrieval_heads: expected ascending KV heads, found " +
                              std::to_string(s.retrieval_heads[i]) + " after " +
                              std::to_string(s.retrieval_heads[i - 1]));
            }
        }
    }
    fields.finish();

    s.layer.num_retrieval = static_cast<int32_t>(s.retrieval_heads.size());
    // These stand in until the tensors say which.
    s.layer.dtype = s.layer.cache_dtype = RAZOR_FP16;
    s.layer.position = RAZOR_ROPE_HALF;
    s.layer.rope_table = RAZOR_TABLE_SPLIT;
    check_heads_and_policy(s.layer);
    s.layer.local_ring_offset = s.layer.sink_tokens + s.layer.heavy_hitters;
    s.layer.full_ring_offset = s.layer.sink_tokens;
    s.layer.ring_rows = razor_ring_rows(&s.layer);

    s.inputs = {"qkv", "past", "chunk", "past_span", "cos_sin or alibi_slopes"};
    const auto add = [&](std::initializer_list<const char *> names) {
        const int first = static_cast<int>(s.inputs.size());
        s.inputs.insert(s.inputs.end(), names);
        return first;
    };
    const bool local = s.layer.num_retrieval < num_kv_heads;
    if (s.layer.num_retrieval > 0) s.full_k = add({"full_k", "full_v"});
    if (local) s.local_k = add({"local_k", "local_v"});
    if (local && s.layer.comp_tokens > 0) s.comp = add({"comp", "comp_log_weight", "comp_count"});
    return s;
}

FieldWriter RazorAttentionPlugin::write(const Settings &settings) {
    FieldWriter plan;
    plan.integer(kPlanVersionField, kPlanVersion);
    write_common(plan, settings.layer);
    // A mask, since a layer may have no retrieval heads and a field must not be empty.
    std::vector<int32_t> mask(settings.layer.num_kv_heads, 0);
    for (int32_t head : settings.retrieval_heads) mask[head] = 1;
    plan.integers("retrieval_mask", std::move(mask));
    return plan;
}

bool RazorAttentionPlugin::type_fits(int position, const DynamicPluginTensorDesc *tensors) const {
    const auto type_of = [&](int i) { return tensors[i].desc.type; };
    const DataType found = type_of(position);
    if (position >= num_inputs()) {
        return found == type_of(std::max(aliased_input(position - num_inputs()), static_cast<int>(kQkv)));
    }
    switch (position) {
    case kQkv: return is_half(found);
    case kPast:
    case kChunk: return found == DataType::kINT32;
    case kPastSpan: return found == DataType::kINT8;
    case kPositions: return found == DataType::kFLOAT;
    default: break;
    }
    if (settings_.comp >= 0 && position >= settings_.comp) return found == DataType::kFLOAT;
    // Keys and values: the first of them may be FP8, the others follow it.
    if (position > kFirstCache) return found == type_of(kFirstCache);
    return found == type_of(kQkv) || found == DataType::kFP8;
}

std::string RazorAttentionPlugin::types_text() const {
    return "expected qkv in float16 or bfloat16 (float32 has no kernels), past and chunk in int32, past_span in int8, "
           "cos_sin or alibi_slopes and comp* in float32, keys and values all in the type of qkv or all in float8_e4m3";
}

void RazorAttentionPlugin::output_shapes(const DimsExprs *inputs, DimsExprs *outputs, IExprBuilder &builder) const {
    outputs[0].nbDims = 3;
    outputs[0].d[0] = inputs[kQkv].d[0];
    outputs[0].d[1] = inputs[kQkv].d[1];
    outputs[0].d[2] = builder.constant(static_cast<int64_t>(settings_.layer.num_heads) * settings_.layer.head_dim);
    for (int i = 1; i < num_outputs(); ++i) outputs[i] = inputs[aliased_input(i)];
}

void RazorAttentionPlugin::check_shapes(const Dims *const *inputs) const {
    const razor_layer &l = settings_.layer;
    const int64_t d = l.head_dim, m = l.comp_tokens;
    const int64_t heads = l.num_retrieval, local = l.num_kv_heads - l.num_retrieval;
    check_dims("qkv", *inputs[kQkv], {-1, -1, (l.num_heads + 2 * static_cast<int64_t>(l.num_kv_heads)) * d});
    const int64_t batch = inputs[kQkv]->d[0];
    check_dims("past", *inputs[kPast], {batch});
    check_dims("chunk", *inputs[kChunk], {batch});
    check_dims("past_span", *inputs[kPastSpan], {-1});
    if (inputs[kPastSpan]->d[0] == 0) throw Refused("input past_span: expected a length >= 1, found 0");
    if (inputs[kPositions]->nbDims == 1) {
        check_dims("alibi_slopes", *inputs[kPositions], {l.num_heads});
        if (m > 1 && local > 0) {
            throw Refused("field comp_tokens: expected 0 or 1 with alibi_slopes, found " + std::to_string(m) +
                          "; a cluster has no single position");
        }
        if (l.heavy_hitters > 0 && local > 0) {
            throw Refused("field heavy_hitters: expected 0 with alibi_slopes, found " +
                          std::to_string(l.heavy_hitters) + "; their rows carry no position");
        }
    } else {
        check_dims("cos_sin", *inputs[kPositions], {-1, d});
        const int64_t positions = inputs[kPositions]->d[0];
        if (positions >= 0 && positions < l.max_seq_len) {
            throw Refused("input cos_sin: expected at least max_seq_len = " + std::to_string(l.max_seq_len) +
                          " positions, found " + std::to_string(positions));
        }
    }
    for (int i = 0; i < 2; ++i) {
        if (settings_.full_k >= 0) {
            check_dims(i ? "full_v" : "full_k", *inputs[settings_.full_k + i], {batch, heads, l.max_seq_len, d});
        }
        if (settings_.local_k >= 0) {
            check_dims(i ? "local_v" : "local_k", *inputs[settings_.local_k + i],
                       {batch, local, static_cast<int64_t>(l.local_ring_offset) + l.ring_rows, d});
        }
    }
    if (settings_.comp >= 0) {
        check_dims("comp", *inputs[settings_.comp], {batch, local, m, 2, d});
        check_dims("comp_log_weight", *inputs[settings_.comp + 1], {batch, local, m});
        check_dims("comp_count", *inputs[settings_.comp + 2], {batch, local, m});
    }
}

razor_layer RazorAttentionPlugin::layer(DataType type, DataType cache_type, const Dims &positions) const {
    razor_layer out = settings_.layer;
    out.retrieval_heads = settings_.retrieval_heads.data();
    out.dtype = dtype_of(type);
    out.cache_dtype = dtype_of(cache_type);
    out.position = positions.nbDims == 1 ? RAZOR_ALIBI : RAZOR_ROPE_HALF;
    out.rope_table = RAZOR_TABLE_SPLIT;
    return out;
}

razor_limits RazorAttentionPlugin::limits(const Dims &qkv, const Dims &past_span) const {
    razor_limits out = RAZOR_LIMITS_INIT;
    const int64_t batch = qkv.d[0], chunk = qkv.d[1];
    out.max_batch = static_cast<int32_t>(batch);
    out.max_chunk = static_cast<int32_t>(chunk);
    // Chunks of one token are decode steps.
    out.max_context_tokens = chunk > 1 ? static_cast<int32_t>(batch * chunk) : 0;
    out.max_past = static_cast<int32_t>(std::min<int64_t>(past_span.d[0], settings_.layer.max_seq_len));
    return out;
}

size_t RazorAttentionPlugin::workspace_size(const DynamicPluginTensorDesc *inputs) const {
    return padded_workspace(
        layer(inputs[kQkv].desc.type, inputs[kFirstCache].desc.type, inputs[kPositions].desc.dims),
        limits(inputs[kQkv].max, inputs[kPastSpan].max));
}

void RazorAttentionPlugin::run(const PluginTensorDesc *descs, const void *const *inputs, void *const *outputs,
                               void *workspace, cudaStream_t stream) const {
    // While it builds, TensorRT may time us on any memory; nobody reads what becomes of it.
    for (int i = 1; i < num_outputs() && !building(); ++i) {
        if (outputs[i] != inputs[aliased_input(i)]) {
            throw Refused(std::string("output ") + input_name(aliased_input(i)) +
                          "_out: expected the memory of its input, found other memory; build with "
                          "PreviewFeature::kALIASED_PLUGIN_IO_10_03 and bind one address to both");
        }
    }
    const Dims &qkv = descs[kQkv].dims;
    const razor_layer layer = this->layer(descs[kQkv].type, descs[kFirstCache].type, descs[kPositions].dims);
    const razor_limits limits = this->limits(qkv, descs[kPastSpan].dims);
    const int32_t num_local = layer.num_kv_heads - layer.num_retrieval;

    razor_call call = RAZOR_CALL_INIT;
    call.batch = limits.max_batch;
    call.tokens_per_sequence = static_cast<int32_t>(qkv.d[1]);
    call.num_contexts = call.tokens_per_sequence == 1 ? 0 : call.batch;
    call.max_chunk = limits.max_chunk;
    call.max_past = limits.max_past;
    call.qkv = inputs[kQkv];
    call.out = outputs[0];
    call.past = static_cast<const int32_t *>(inputs[kPast]);
    call.chunk = static_cast<const int32_t *>(inputs[kChunk]);
    const float *positions = static_cast<const float *>(inputs[kPositions]);
    if (layer.position == RAZOR_ALIBI) {
        call.alibi_slopes = positions;
    } else {
        call.cos_sin = positions;
        call.num_positions = static_cast<int32_t>(descs[kPositions].dims.d[0]);
    }

    void *const *caches = outputs + 1 - kFirstCache; // indexed as inputs are
    const auto contiguous = [&](int first, int32_t heads, int32_t rows) {
        razor_view view{};
        view.kind = RAZOR_VIEW_CONTIGUOUS;
        view.capacity = rows;
        view.k = caches[first];
        view.v = caches[first + 1];
        view.head_stride = static_cast<int64_t>(rows) * layer.head_dim;
        view.slot_stride = heads * view.head_stride;
        return view;
    };
    if (settings_.full_k >= 0) call.full = contiguous(settings_.full_k, layer.num_retrieval, layer.max_seq_len);
    if (settings_.local_k >= 0) {
        call.local = contiguous(settings_.local_k, num_local, layer.local_ring_offset + layer.ring_rows);
    }
    if (settings_.comp >= 0) {
        call.comp.kind = RAZOR_COMP_CONTIGUOUS;
        call.comp.comp = static_cast<float *>(caches[settings_.comp]);
        call.comp.log_weight = static_cast<float *>(caches[settings_.comp + 1]);
        call.comp.count = static_cast<float *>(caches[settings_.comp + 2]);
        call.comp.weight_slot_stride = static_cast<int64_t>(num_local) * layer.comp_tokens;
        call.comp.comp_slot_stride = call.comp.weight_slot_stride * 2 * layer.head_dim;
    }
    attend(layer, limits, call, workspace, stream);
}

}  // namespace razor::trt
