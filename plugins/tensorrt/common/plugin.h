// What both plugins have in common: the three capabilities of IPluginV3, and the rule that no exception leaves them.
#pragma once

#include <NvInferRuntime.h>

#include <cstddef>
#include <string>
#include <initializer_list>
#include <utility>
#include <vector>

#include "fields.h"
#include "log.h"
#include "razor/razor.h"

namespace razor::trt {

constexpr const char *kNamespace = "trt_razor";
constexpr const char *kPluginVersion = "1";

// Version of what a plan holds. Raise it whenever a serialised field is added, goes, or changes its meaning.
constexpr int32_t kPlanVersion = 1;
constexpr const char *kPlanVersionField = "plan_version";

// First field of a plan. Throws Refused if the plan is not of this version.
void check_plan_version(FieldReader &fields);

// "[2, 5, 128]"; a dimension that is not known yet is "?".
std::string to_text(const nvinfer1::Dims &dims);
const char *to_text(nvinfer1::DataType type);

// Throws Refused unless `found` has these dimensions; -1 on either side matches anything.
void check_dims(const char *name, const nvinfer1::Dims &found, std::initializer_list<int64_t> expected);

// Throws Refused with the library's own line unless status is RAZOR_OK.
void check(razor_status status);

// Bytes to ask TensorRT for, and the call with the aligned part of what it gave. The library wants a workspace on
// 256 bytes, TensorRT promises none.
size_t padded_workspace(const razor_layer &layer, const razor_limits &limits);
void attend(const razor_layer &layer, const razor_limits &limits, const razor_call &call, void *workspace,
            cudaStream_t stream);

bool is_half(nvinfer1::DataType type); // FP16 or BF16
razor_dtype dtype_of(nvinfer1::DataType type);

/*
 * Base of the plugins. TensorRT calls the noexcept functions; they call the protected ones, which throw Refused, log
 * the reason with the layer's name, and return failure.
 *
 * A plugin is its fields and nothing else: the same object serves any context, and nothing has to be set up
 * before enqueue.
 */
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
public:
    nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;
    nvinfer1::IPluginV3 *clone() noexcept final;

    const char *getPluginName() const noexcept final { return type_; }
    const char *getPluginVersion() const noexcept final { return kPluginVersion; }
    const char *getPluginNamespace() const noexcept final { return kNamespace; }

    int32_t getNbOutputs() const noexcept final { return num_outputs(); }
    int32_t getOutputDataTypes(nvinfer1::DataType *outputs, int32_t num_outputs, const nvinfer1::DataType *inputs,
                               int32_t num_inputs) const noexcept final;
    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t num_inputs,
                            const nvinfer1::DimsExprs *shape_inputs, int32_t num_shape_inputs,
                            nvinfer1::DimsExprs *outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder &builder) noexcept final;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors,
                                   int32_t num_inputs, int32_t num_outputs) noexcept final;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc *outputs, int32_t num_outputs) noexcept final;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc *outputs,
                            int32_t num_outputs) const noexcept final;
    int32_t getAliasedInput(int32_t output) noexcept final { return aliased_input(output); }
    // Attributes alone, TensorRT adds shapes and types; the library's build, because its kernels are what is timed.
    const char *getTimingCacheID() noexcept final { return timing_id_.c_str(); }
    const char *getMetadataString() noexcept final { return metadata_.c_str(); }
    // FP16 or BF16, each with its own or with FP8 caches.
    int32_t getFormatCombinationLimit() noexcept final { return 4; }

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t num_inputs,
                          const nvinfer1::PluginTensorDesc *outputs, int32_t num_outputs) noexcept final;
    int32_t enqueue(const nvinfer1::PluginTensorDesc *input_descs, const nvinfer1::PluginTensorDesc *output_descs,
                    const void *const *inputs, void *const *outputs, void *workspace,
                    cudaStream_t stream) noexcept final;
    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept final { return clone(); }
    const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept final;

protected:
    // type: the plugin's name. layer: what the network calls this node, for messages. plan: what goes into the plan.
    Plugin(const char *type, std::string layer, nvinfer1::TensorRTPhase phase, FieldWriter plan);
    Plugin(const Plugin &) = default;

    virtual Plugin *copy() const = 0;
    virtual int num_inputs() const = 0;
    virtual int num_outputs() const = 0;
    virtual const char *input_name(int i) const = 0;
    // Input whose memory the output has, or -1.
    virtual int aliased_input(int output) const = 0;
    // Does the type fit, given the types of the tensors before it? Inputs first, then outputs.
    virtual bool type_fits(int position, const nvinfer1::DynamicPluginTensorDesc *tensors) const = 0;
    // What to say about a type that does not fit.
    virtual std::string types_text() const = 0;
    virtual void output_shapes(const nvinfer1::DimsExprs *inputs, nvinfer1::DimsExprs *outputs,
                               nvinfer1::IExprBuilder &builder) const = 0;
    // Dimensions of the inputs, -1 where not known yet.
    virtual void check_shapes(const nvinfer1::Dims *const *inputs) const = 0;
    virtual size_t workspace_size(const nvinfer1::DynamicPluginTensorDesc *inputs) const = 0;
    virtual void run(const nvinfer1::PluginTensorDesc *input_descs, const void *const *inputs, void *const *outputs,
                     void *workspace, cudaStream_t stream) const = 0;

    bool building() const { return phase_ == nvinfer1::TensorRTPhase::kBUILD; }

private:
    template <typename Result, typename Body> Result guarded(Result failure, const Body &body) const noexcept;
    void check_counts(int inputs, int outputs) const;
    void check_all_shapes(const nvinfer1::PluginTensorDesc *inputs) const;

    const char *type_;
    std::string layer_;
    nvinfer1::TensorRTPhase phase_;
    FieldWriter plan_;
    std::string metadata_, timing_id_;
};

/*
 * A creator is a name, a list of fields and a constructor: T has kName, fields() and a constructor (layer, phase,
 * reader) that throws Refused.
 */
template <typename T> class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    const char *getPluginName() const noexcept override { return T::kName; }
    const char *getPluginVersion() const noexcept override { return kPluginVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }
    const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return T::fields(); }

    nvinfer1::IPluginV3 *createPlugin(const char *name, const nvinfer1::PluginFieldCollection *fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        const char *layer = name ? name : "";
        try {
            FieldReader reader(fields);
            return new T(layer, phase, reader);
        } catch (const std::exception &error) {
            report(layer, error.what());
        } catch (...) {
            report(layer, "unknown error");
        }
        return nullptr;
    }

private:
    static void report(const char *layer, const char *reason) noexcept {
        try {
            log_error(std::string(T::kName) + " '" + layer + "': " + reason);
        } catch (...) { // out of memory; nullptr says enough
        }
    }
};

}  // namespace razor::trt
