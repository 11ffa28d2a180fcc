// RazorGptAttention: takes the place of TensorRT-LLM's attention plugin; packed input, paged cache. See README.md.
#pragma once

#include <array>
#include <vector>

#include "../common/plugin.h"
#include "trtllm.h"

namespace razor::trt {

class RazorGptAttentionPlugin final : public Plugin {
public:
    static constexpr const char *kName = "RazorGptAttention";
    static const nvinfer1::PluginFieldCollection *fields();

    // Throws Refused.
    RazorGptAttentionPlugin(const char *layer, nvinfer1::TensorRTPhase phase, FieldReader &fields);

protected:
    Plugin *copy() const override { return new RazorGptAttentionPlugin(*this); }
    int num_inputs() const override { return static_cast<int>(settings_.inputs.size()); }
    int num_outputs() const override { return 1; }
    const char *input_name(int i) const override { return trtllm::name_of(settings_.inputs[i]); }
    int aliased_input(int) const override { return -1; } // the cache is no tensor here
    bool type_fits(int position, const nvinfer1::DynamicPluginTensorDesc *tensors) const override;
    std::string types_text() const override;
    void output_shapes(const nvinfer1::DimsExprs *inputs, nvinfer1::DimsExprs *outputs,
                       nvinfer1::IExprBuilder &builder) const override;
    void check_shapes(const nvinfer1::Dims *const *inputs) const override;
    size_t workspace_size(const nvinfer1::DynamicPluginTensorDesc *inputs) const override;
    void run(const nvinfer1::PluginTensorDesc *input_descs, const void *const *inputs, void *const *outputs,
             void *workspace, cudaStream_t stream) const override;

private:
    struct Settings {
        razor_layer layer = RAZOR_LAYER_INIT; // without the type
        bool fp8 = false;
        int32_t tokens_per_block = 0;
        trtllm::LocalCache local_cache = trtllm::LocalCache::kCyclicPool;
        int32_t layer_full = -1, layer_local = -1; // cache layers, -1 = none
        int32_t window = 0;                        // cyclic pool: W
        int64_t ring_slot_bytes = 0, comp_slot_bytes = 0; // state slots
        std::vector<trtllm::Role> inputs;
        std::array<int, trtllm::kNumRoles> places{}; // where in `inputs` a role is

        int32_t num_local() const { return layer.num_kv_heads - layer.num_retrieval; }
        int32_t local_rows() const { return layer.local_ring_offset + layer.ring_rows; }
    };

    explicit RazorGptAttentionPlugin(const char *layer, nvinfer1::TensorRTPhase phase, Settings settings);
    static Settings read(nvinfer1::TensorRTPhase phase, FieldReader &fields);
    static void read_local_cache(Settings &settings, FieldReader &fields);
    static FieldWriter write(const Settings &settings);

    // The layer must have such an input.
    int index(trtllm::Role role) const { return settings_.places[static_cast<int>(role)]; }
    razor_layer layer(nvinfer1::DataType type) const;
    void check_cache_settings(const int32_t *windows, int64_t num_windows, int32_t sinks) const;
    void check_contexts_begin(const trtllm::Requests &requests) const;
    void fill_state_slots(razor_call &call, const void *const *inputs) const;

    Settings settings_;
};

}  // namespace razor::trt
