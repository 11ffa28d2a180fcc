// Does with a plugin library what TensorRT does with it, through a plain C interface for tests.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string g_log;

class Logger : public ILogger {
public:
    void log(Severity severity, const char *text) noexcept override {
        g_log += std::to_string(static_cast<int>(severity)) + " " + text + "\n";
    }
} g_logger;

class Finder : public ILoggerFinder {
public:
    ILogger *findLogger() override {
        if (throws) throw std::string("no logger today");
        return &g_logger;
    }
    bool throws = false;
    virtual ~Finder() = default;
} g_finder;

// Dimensions are numbers that may be unknown at build time.
class Dimension : public IDimensionExpr, private apiv::VDimensionExpr {
public:
    Dimension(int64_t value, bool constant) : value(value), constant(constant) { mImpl = this; }
    const int64_t value;
    const bool constant;

private:
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return constant ? value : -1; }
    bool isSizeTensor() const override { return false; }
};

class Builder : public IExprBuilder, private apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    const IDimensionExpr *make(int64_t value, bool constant) {
        made_.push_back(std::make_unique<Dimension>(value, constant));
        return made_.back().get();
    }

private:
    const IDimensionExpr *constant(int64_t value) override { return make(value, true); }
    const IDimensionExpr *operation(DimensionOperation, const IDimensionExpr &, const IDimensionExpr &) override {
        return nullptr;
    }
    const IDimensionExpr *declareSizeTensor(int32_t, const IDimensionExpr &, const IDimensionExpr &) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Dimension>> made_;
};

class Context : public IPluginResourceContext {
public:
    IGpuAllocator *getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
};

struct Library {
    IPluginCreatorInterface *const *creators;
    int32_t count;

    IPluginCreatorV3One *find(const char *name) const {
        for (int i = 0; i < count; ++i) {
            // As TensorRT decides which kind of creator it has.
            if (std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
            auto *creator = static_cast<IPluginCreatorV3One *>(creators[i]);
            if (std::strcmp(creator->getPluginName(), name) == 0) return creator;
        }
        return nullptr;
    }
};

IPluginV3OneCore *core(IPluginV3 *p) {
    return static_cast<IPluginV3OneCore *>(p->getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild *build(IPluginV3 *p) {
    return static_cast<IPluginV3OneBuild *>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime *runtime(IPluginV3 *p) {
    return static_cast<IPluginV3OneRuntime *>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

}  // namespace

extern "C" {

struct HostField {
    const char *name;
    const void *data;
    int32_t type, length;
};

struct HostTensor {
    int32_t type, num_dims;
    int64_t dims[8], min[8], max[8];
    void *data;
    int32_t format;
};

}

namespace {

Dims to_dims(const HostTensor &t, const int64_t *values) {
    Dims out{};
    out.nbDims = t.num_dims;
    std::copy(values, values + t.num_dims, out.d);
    return out;
}

std::vector<PluginTensorDesc> descs(const HostTensor *tensors, int count) {
    std::vector<PluginTensorDesc> out(count);
    for (int i = 0; i < count; ++i) {
        out[i].dims = to_dims(tensors[i], tensors[i].dims);
        out[i].type = static_cast<DataType>(tensors[i].type);
        out[i].format = static_cast<TensorFormat>(tensors[i].format);
        out[i].scale = 1;
    }
    return out;
}

std::vector<DynamicPluginTensorDesc> dynamic(const HostTensor *tensors, int count) {
    std::vector<DynamicPluginTensorDesc> out(count);
    const std::vector<PluginTensorDesc> fixed = descs(tensors, count);
    for (int i = 0; i < count; ++i) {
        out[i].desc = fixed[i];
        out[i].opt = fixed[i].dims;
        out[i].min = to_dims(tensors[i], tensors[i].min);
        out[i].max = to_dims(tensors[i], tensors[i].max);
        for (int j = 0; j < tensors[i].num_dims; ++j) {
            if (out[i].min.d[j] != out[i].max.d[j]) out[i].desc.dims.d[j] = -1;
        }
    }
    return out;
}

}  // namespace

extern "C" {

const char *host_log() { return g_log.c_str(); }
void host_clear_log() { g_log.clear(); }
void host_logger_throws(int32_t throws) { g_finder.throws = throws != 0; }

Library *host_open(const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        g_log += dlerror();
        return nullptr;
    }
    const auto get = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(handle, "getCreators"));
    const auto set = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(handle, "setLoggerFinder"));
    if (get == nullptr || set == nullptr) return nullptr;
    auto *library = new Library{};
    library->creators = get(library->count);
    set(&g_finder);
    return library;
}

// "name version namespace" of creator i, or null.
const char *host_creator(Library *library, int32_t i) {
    static std::string text;
    if (i >= library->count) return nullptr;
    auto *creator = static_cast<IPluginCreatorV3One *>(library->creators[i]);
    text = std::string(creator->getPluginName()) + " " + creator->getPluginVersion() + " " +
           creator->getPluginNamespace();
    return text.c_str();
}

int32_t host_field_names(Library *library, const char *name, HostField *out, int32_t room) {
    const PluginFieldCollection *fields = library->find(name)->getFieldNames();
    for (int i = 0; i < fields->nbFields && i < room; ++i) {
        const PluginField &f = fields->fields[i];
        out[i] = {f.name, f.data, static_cast<int32_t>(f.type), f.length};
    }
    return fields->nbFields;
}

IPluginV3 *host_create(Library *library, const char *name, const char *layer, int32_t phase, const HostField *fields,
                       int32_t count) {
    std::vector<PluginField> all;
    for (int i = 0; i < count; ++i) {
        all.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type),
                         fields[i].length);
    }
    const PluginFieldCollection collection{count, all.data()};
    return library->find(name)->createPlugin(layer, count < 0 ? nullptr : &collection,
                                             static_cast<TensorRTPhase>(phase));
}

void host_destroy(IPluginV3 *plugin) { delete plugin; }
IPluginV3 *host_clone(IPluginV3 *plugin) { return plugin->clone(); }

IPluginV3 *host_attach(IPluginV3 *plugin) {
    Context context;
    return runtime(plugin)->attachToContext(&context);
}

const char *host_identity(IPluginV3 *plugin) {
    static std::string text;
    text = std::string(core(plugin)->getPluginName()) + " " + core(plugin)->getPluginVersion() + " " +
           core(plugin)->getPluginNamespace();
    return text.c_str();
}

const char *host_timing_id(IPluginV3 *plugin) { return build(plugin)->getTimingCacheID(); }
const char *host_metadata(IPluginV3 *plugin) { return build(plugin)->getMetadataString(); }
int32_t host_format_limit(IPluginV3 *plugin) { return build(plugin)->getFormatCombinationLimit(); }
int32_t host_num_outputs(IPluginV3 *plugin) { return build(plugin)->getNbOutputs(); }

int32_t host_serialise(IPluginV3 *plugin, HostField *out, int32_t room) {
    const PluginFieldCollection *fields = runtime(plugin)->getFieldsToSerialize();
    for (int i = 0; i < fields->nbFields && i < room; ++i) {
        const PluginField &f = fields->fields[i];
        out[i] = {f.name, f.data, static_cast<int32_t>(f.type), f.length};
    }
    return fields->nbFields;
}

int32_t host_aliased_input(IPluginV3 *plugin, int32_t output) {
    IPluginV3OneBuild *one = build(plugin);
    // As TensorRT decides that the function exists.
    if (one->getInterfaceInfo().major < 2) return -2;
    return static_cast<IPluginV3OneBuildV2 *>(one)->getAliasedInput(output);
}

int32_t host_types(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, HostTensor *outputs,
                   int32_t num_outputs) {
    std::vector<DataType> in(num_inputs), out(num_outputs);
    for (int i = 0; i < num_inputs; ++i) in[i] = static_cast<DataType>(inputs[i].type);
    const int32_t status = build(plugin)->getOutputDataTypes(out.data(), num_outputs, in.data(), num_inputs);
    for (int i = 0; i < num_outputs; ++i) outputs[i].type = static_cast<int32_t>(out[i]);
    return status;
}

int32_t host_shapes(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, HostTensor *outputs,
                    int32_t num_outputs) {
    Builder builder;
    std::vector<DimsExprs> in(num_inputs), out(num_outputs);
    for (int i = 0; i < num_inputs; ++i) {
        in[i].nbDims = inputs[i].num_dims;
        for (int j = 0; j < inputs[i].num_dims; ++j) {
            in[i].d[j] = builder.make(inputs[i].dims[j], inputs[i].min[j] == inputs[i].max[j]);
        }
    }
    const int32_t status = build(plugin)->getOutputShapes(in.data(), num_inputs, nullptr, 0, out.data(), num_outputs,
                                                          builder);
    if (status != 0) return status;
    for (int i = 0; i < num_outputs; ++i) {
        outputs[i].num_dims = out[i].nbDims;
        for (int j = 0; j < out[i].nbDims; ++j) {
            outputs[i].dims[j] = static_cast<const Dimension *>(out[i].d[j])->value;
        }
    }
    return 0;
}

// One call per position, as TensorRT does: later tensors are not known yet.
int32_t host_formats(IPluginV3 *plugin, const HostTensor *tensors, int32_t num_inputs, int32_t num_outputs) {
    std::vector<DynamicPluginTensorDesc> all = dynamic(tensors, num_inputs + num_outputs);
    for (int i = 0; i < num_inputs + num_outputs; ++i) {
        std::vector<DynamicPluginTensorDesc> known = all;
        for (size_t j = i + 1; j < known.size(); ++j) known[j].desc.type = DataType::kBOOL;
        if (!build(plugin)->supportsFormatCombination(i, known.data(), num_inputs, num_outputs)) return i;
    }
    return -1;
}

int32_t host_configure(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, const HostTensor *outputs,
                       int32_t num_outputs) {
    return build(plugin)->configurePlugin(dynamic(inputs, num_inputs).data(), num_inputs,
                                          dynamic(outputs, num_outputs).data(), num_outputs);
}

int64_t host_workspace(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, const HostTensor *outputs,
                       int32_t num_outputs) {
    return static_cast<int64_t>(build(plugin)->getWorkspaceSize(dynamic(inputs, num_inputs).data(), num_inputs,
                                                                dynamic(outputs, num_outputs).data(), num_outputs));
}

int32_t host_shape_change(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, const HostTensor *outputs,
                          int32_t num_outputs) {
    return runtime(plugin)->onShapeChange(descs(inputs, num_inputs).data(), num_inputs,
                                          descs(outputs, num_outputs).data(), num_outputs);
}

int32_t host_enqueue(IPluginV3 *plugin, const HostTensor *inputs, int32_t num_inputs, const HostTensor *outputs,
                     int32_t num_outputs, void *workspace) {
    std::vector<const void *> in;
    std::vector<void *> out;
    for (int i = 0; i < num_inputs; ++i) in.push_back(inputs[i].data);
    for (int i = 0; i < num_outputs; ++i) out.push_back(outputs[i].data);
    return runtime(plugin)->enqueue(descs(inputs, num_inputs).data(), descs(outputs, num_outputs).data(), in.data(),
                                    out.data(), workspace, nullptr);
}

}
