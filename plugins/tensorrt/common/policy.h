// Fields that both plugins have: heads and the policy of local heads.
#pragma once

#include "plugin.h"

namespace razor::trt {

// num_heads, num_kv_heads, head_dim, max_seq_len, sink_tokens, min_window, compression, comp_tokens, heavy_hitters,
// scale.
// What a number must be apart from its own range is for check_heads_and_policy to say.
void read_common(FieldReader &fields, razor_layer &layer, int32_t max_heavy_hitters);
// Throws Refused with razor_check_layer's line; rings and offsets need not be known yet.
void check_heads_and_policy(const razor_layer &layer);
void write_common(FieldWriter &plan, const razor_layer &layer);

// For a creator's list of fields.
std::vector<nvinfer1::PluginField> common_field_names();

}  // namespace razor::trt
