#include "policy.h"

#include <algorithm>

namespace razor::trt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

void read_common(FieldReader &fields, razor_layer &layer, int32_t max_heavy_hitters) {
    layer.num_heads = fields.integer("num_heads", 1, INT32_MAX);
    layer.num_kv_heads = fields.integer("num_kv_heads", 1, RAZOR_MAX_KV_HEADS);
    layer.head_dim = fields.integer("head_dim", 1, INT32_MAX);
    layer.max_seq_len = fields.integer("max_seq_len", 1, INT32_MAX);
    layer.sink_tokens = fields.integer("sink_tokens", 0, INT32_MAX);
    layer.min_window = fields.integer("min_window", 1, INT32_MAX);
    layer.compression = fields.integer("compression", 0, INT32_MAX);
    layer.comp_tokens = fields.integer("comp_tokens", 0, RAZOR_MAX_COMP_TOKENS);
    layer.heavy_hitters = fields.integer("heavy_hitters", 0, max_heavy_hitters);
    layer.scale = fields.positive("scale");
}

void check_heads_and_policy(const razor_layer &layer) {
    razor_layer probe = layer;
    probe.full_ring_offset = probe.sink_tokens;
    probe.local_ring_offset = std::min(probe.sink_tokens, INT32_MAX - probe.heavy_hitters) + probe.heavy_hitters;
    probe.ring_rows = probe.max_seq_len; // enough for any window
    check(razor_check_layer(&probe));
}

void write_common(FieldWriter &plan, const razor_layer &layer) {
    plan.integer("num_heads", layer.num_heads);
    plan.integer("num_kv_heads", layer.num_kv_heads);
    plan.integer("head_dim", layer.head_dim);
    plan.integer("max_seq_len", layer.max_seq_len);
    plan.integer("sink_tokens", layer.sink_tokens);
    plan.integer("min_window", layer.min_window);
    plan.integer("compression", layer.compression);
    plan.integer("comp_tokens", layer.comp_tokens);
    plan.integer("heavy_hitters", layer.heavy_hitters);
    plan.number("scale", layer.scale);
}

std::vector<PluginField> common_field_names() {
    std::vector<PluginField> names;
    for (const char *name : {"num_heads", "num_kv_heads", "head_dim", "max_seq_len", "sink_tokens", "min_window",
                             "compression", "comp_tokens", "heavy_hitters"}) {
        names.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
    }
    names.emplace_back("scale", nullptr, PluginFieldType::kFLOAT32, 1);
    return names;
}

}  // namespace razor::trt
