// RazorAttention: attention over explicit, contiguous caches that are updated in place. See README.md.
#pragma once

#include <vector>

#include "../common/plugin.h"

namespace razor::trt {

class RazorAttentionPlugin final : public Plugin {
public:
    static constexpr const char *kName = "RazorAttention";
    static const nvinfer1::PluginFieldCollection *fields();

    // Throws Refused.
    RazorAttentionPlugin(const char *layer, nvinfer1::TensorRTPhase phase, FieldReader &fields);

protected:
    Plugin *copy() const override { return new RazorAttentionPlugin(*this); }
    int num_inputs() const override { return static_cast<int>(settings_.inputs.size()); }
    int num_outputs() const override { return 1 + num_inputs() - kFirstCache; }
    const char *input_name(int i) const override { return settings_.inputs[i]; }
    int aliased_input(int output) const override { return output == 0 ? -1 : kFirstCache + output - 1; }
    bool type_fits(int position, const nvinfer1::DynamicPluginTensorDesc *tensors) const override;
    std::string types_text() const override;
    void output_shapes(const nvinfer1::DimsExprs *inputs, nvinfer1::DimsExprs *outputs,
                       nvinfer1::IExprBuilder &builder) const override;
    void check_shapes(const nvinfer1::Dims *const *inputs) const override;
    size_t workspace_size(const nvinfer1::DynamicPluginTensorDesc *inputs) const override;
    void run(const nvinfer1::PluginTensorDesc *input_descs, const void *const *inputs, void *const *outputs,
             void *workspace, cudaStream_t stream) const override;

private:
    // The inputs that every variant has; then come caches, in the order of settings_.inputs.
    enum Input { kQkv, kPast, kChunk, kPastSpan, kPositions, kFirstCache };

    struct Settings {
        razor_layer layer = RAZOR_LAYER_INIT; // without types, positions and the pointer to the heads
        std::vector<int32_t> retrieval_heads;
        std::vector<const char *> inputs; // names
        int full_k = -1, local_k = -1, comp = -1; // input of the first cache of each kind, or -1
    };

    explicit RazorAttentionPlugin(const char *layer, nvinfer1::TensorRTPhase phase, Settings settings);
    static Settings read(nvinfer1::TensorRTPhase phase, FieldReader &fields);
    static FieldWriter write(const Settings &settings);

    razor_layer layer(nvinfer1::DataType type, nvinfer1::DataType cache_type, const nvinfer1::Dims &positions) const;
    razor_limits limits(const nvinfer1::Dims &qkv, const nvinfer1::Dims &past_span) const;

    Settings settings_;
};

}  // namespace razor::trt
