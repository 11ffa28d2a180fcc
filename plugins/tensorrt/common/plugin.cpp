#include "plugin.h"

#include <algorithm>
#include <exception>
#include <vector>

namespace razor::trt {

using namespace nvinfer1;

void check_plan_version(FieldReader &fields) {
    if (!fields.has(kPlanVersionField)) {
        throw Refused("field " + std::string(kPlanVersionField) +
                      ": missing; the engine was not built with this plugin, build it again");
    }
    const int32_t found = fields.integer(kPlanVersionField, INT32_MIN, INT32_MAX);
    if (found != kPlanVersion) {
        throw Refused("field " + std::string(kPlanVersionField) + ": expected " + std::to_string(kPlanVersion) +
                      ", found " + std::to_string(found) +
                      "; the engine was built with another version of the plugin library: load that one, or build "
                      "the engine again");
    }
}

std::string to_text(const Dims &dims) {
    std::string out = "[";
    for (int i = 0; i < dims.nbDims; ++i) {
        out += (i ? ", " : "") + (dims.d[i] < 0 ? std::string("?") : std::to_string(dims.d[i]));
    }
    return out + "]";
}

const char *to_text(DataType type) {
    switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kFP8: return "float8_e4m3";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
    }
}

void check_dims(const char *name, const Dims &found, std::initializer_list<int64_t> expected) {
    bool fits = found.nbDims == static_cast<int32_t>(expected.size());
    for (int i = 0; fits && i < found.nbDims; ++i) {
        const int64_t want = expected.begin()[i];
        fits = want < 0 || found.d[i] < 0 || found.d[i] == want;
    }
    if (fits) return;
    Dims want{};
    want.nbDims = static_cast<int32_t>(expected.size());
    std::copy(expected.begin(), expected.end(), want.d);
    throw Refused(std::string("input ") + name + ": expected shape " + to_text(want) + ", found " + to_text(found));
}

void check(razor_status status) {
    if (status != RAZOR_OK) throw Refused(razor_last_error());
}

namespace {
constexpr size_t kAlignment = 256;
}

size_t padded_workspace(const razor_layer &layer, const razor_limits &limits) {
    size_t bytes = 0;
    check(razor_workspace_size(&layer, &limits, &bytes));
    return bytes + kAlignment;
}

void attend(const razor_layer &layer, const razor_limits &limits, const razor_call &call, void *workspace,
            cudaStream_t stream) {
    // TensorRT does not say how large the workspace is. It was made for the largest shapes of the profiles, and what a
    // call needs never grows when its shapes shrink.
    size_t bytes = 0;
    check(razor_workspace_size(&layer, &limits, &bytes));
    const uintptr_t address = (reinterpret_cast<uintptr_t>(workspace) + kAlignment - 1) / kAlignment * kAlignment;
    check(razor_attention(&layer, &call, reinterpret_cast<void *>(address), bytes, stream));
}

bool is_half(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

razor_dtype dtype_of(DataType type) {
    switch (type) {
    case DataType::kHALF: return RAZOR_FP16;
    case DataType::kBF16: return RAZOR_BF16;
    case DataType::kFP8: return RAZOR_FP8_E4M3;
    default: throw Refused(std::string("expected float16, bfloat16 or float8_e4m3, found ") + to_text(type));
    }
}

Plugin::Plugin(const char *type, std::string layer, TensorRTPhase phase, FieldWriter plan)
    : type_(type), layer_(std::move(layer)), phase_(phase), plan_(std::move(plan)) {
    metadata_ = plan_.text();
    timing_id_ = metadata_ + " " + razor_build_info();
}

template <typename Result, typename Body> Result Plugin::guarded(Result failure, const Body &body) const noexcept {
    try {
        try {
            return body();
        } catch (const std::exception &error) {
            log_error(std::string(type_) + " '" + layer_ + "': " + error.what());
        }
    } catch (...) { // out of memory while writing the message
        log_error("out of memory");
    }
    return failure;
}

void Plugin::check_counts(int inputs, int outputs) const {
    if (inputs == num_inputs() && outputs == num_outputs()) return;
    std::string names;
    for (int i = 0; i < num_inputs(); ++i) names += (i ? ", " : "") + std::string(input_name(i));
    throw Refused("expected " + std::to_string(num_inputs()) + " inputs (" + names + ") and " +
                  std::to_string(num_outputs()) + " outputs, found " + std::to_string(inputs) + " and " +
                  std::to_string(outputs) + "; which inputs there are follows from the fields");
}

IPluginCapability *Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
    }
    return nullptr;
}

IPluginV3 *Plugin::clone() noexcept {
    return guarded<IPluginV3 *>(nullptr, [&] { return copy(); });
}

int32_t Plugin::getOutputDataTypes(DataType *outputs, int32_t num_outputs, const DataType *inputs,
                                   int32_t num_inputs) const noexcept {
    return guarded(1, [&] {
        check_counts(num_inputs, num_outputs);
        std::vector<DynamicPluginTensorDesc> tensors(num_inputs + num_outputs);
        for (int i = 0; i < num_inputs; ++i) {
            tensors[i].desc.type = inputs[i];
            if (!type_fits(i, tensors.data())) {
                throw Refused("input " + std::string(input_name(i)) + ": found " + to_text(inputs[i]) + "; " +
                              types_text());
            }
        }
        for (int i = 0; i < num_outputs; ++i) outputs[i] = inputs[std::max(aliased_input(i), 0)];
        return 0;
    });
}

int32_t Plugin::getOutputShapes(const DimsExprs *inputs, int32_t num_inputs, const DimsExprs *, int32_t,
                                DimsExprs *outputs, int32_t num_outputs, IExprBuilder &builder) noexcept {
    return guarded(1, [&] {
        check_counts(num_inputs, num_outputs);
        std::vector<Dims> dims(num_inputs);
        std::vector<const Dims *> pointers(num_inputs);
        for (int i = 0; i < num_inputs; ++i) {
            dims[i].nbDims = inputs[i].nbDims;
            for (int j = 0; j < inputs[i].nbDims; ++j) {
                dims[i].d[j] = inputs[i].d[j]->isConstant() ? inputs[i].d[j]->getConstantValue() : -1;
            }
            pointers[i] = &dims[i];
        }
        check_shapes(pointers.data());
        output_shapes(inputs, outputs, builder);
        return 0;
    });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors, int32_t num_inputs,
                                       int32_t num_outputs) noexcept {
    return guarded(false, [&] {
        check_counts(num_inputs, num_outputs);
        // TensorRT asks about everything it could try: no message for a no.
        return tensors[position].desc.format == TensorFormat::kLINEAR && type_fits(position, tensors);
    });
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc *, int32_t num_outputs) noexcept {
    return guarded(1, [&] {
        check_counts(num_inputs, num_outputs);
        // Both ends of a profile must be calls that could be run.
        std::vector<const Dims *> least(num_inputs), most(num_inputs);
        for (int i = 0; i < num_inputs; ++i) {
            least[i] = &inputs[i].min;
            most[i] = &inputs[i].max;
        }
        check_shapes(least.data());
        check_shapes(most.data());
        return 0;
    });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc *, int32_t num_outputs) const noexcept {
    return guarded<size_t>(0, [&] {
        check_counts(num_inputs, num_outputs);
        return workspace_size(inputs);
    });
}

void Plugin::check_all_shapes(const PluginTensorDesc *inputs) const {
    const Dims *pointers[64];
    for (int i = 0; i < num_inputs(); ++i) pointers[i] = &inputs[i].dims;
    check_shapes(pointers);
}

int32_t Plugin::onShapeChange(const PluginTensorDesc *inputs, int32_t num_inputs, const PluginTensorDesc *,
                              int32_t num_outputs) noexcept {
    return guarded(1, [&] {
        check_counts(num_inputs, num_outputs);
        check_all_shapes(inputs);
        return 0;
    });
}

int32_t Plugin::enqueue(const PluginTensorDesc *input_descs, const PluginTensorDesc *, const void *const *inputs,
                        void *const *outputs, void *workspace, cudaStream_t stream) noexcept {
    return guarded(1, [&] {
        check_all_shapes(input_descs);
        run(input_descs, inputs, outputs, workspace, stream);
        return 0;
    });
}

const PluginFieldCollection *Plugin::getFieldsToSerialize() noexcept {
    return guarded<const PluginFieldCollection *>(nullptr, [&] { return plan_.collection(); });
}

}  // namespace razor::trt
