// libnvinfer as far as TensorRT's Python bindings need it to load a plugin library, make a plugin and put it into a
// network. Needs TensorRT's own headers (10 or 11), and vtables as GCC and Clang lay them out.
#include <NvInfer.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string g_log;

class Logger : public ILogger {
public:
    void log(Severity, const char *text) noexcept override { g_log += std::string(text) + "\n"; }
} g_logger;

class Finder : public ILoggerFinder {
public:
    ILogger *findLogger() override { return &g_logger; }
    virtual ~Finder() = default;
} g_finder;

class Registry : public IPluginRegistry {
public:
    void *loadLibrary(const char *path) noexcept override {
        void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) {
            g_log += std::string(dlerror()) + "\n";
            return nullptr;
        }
        const auto get = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(handle, "getCreators"));
        const auto set = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(handle, "setLoggerFinder"));
        if (get == nullptr || set == nullptr) return nullptr;
        set(&g_finder);
        int32_t count = 0;
        IPluginCreatorInterface *const *creators = get(count);
        creators_.insert(creators_.end(), creators, creators + count);
        return handle;
    }
    IPluginCreatorInterface *const *getAllCreators(int32_t *count) const noexcept override {
        *count = static_cast<int32_t>(creators_.size());
        return creators_.data();
    }
    IPluginCreatorInterface *const *getAllCreatorsRecursive(int32_t *count) noexcept override {
        return getAllCreators(count);
    }
    IPluginCreatorInterface *getCreator(const char *name, const char *version, const char *space) noexcept override {
        for (IPluginCreatorInterface *creator : creators_) {
            auto &one = static_cast<IPluginCreatorV3One &>(*creator);
            if (std::strcmp(one.getPluginName(), name) == 0 && std::strcmp(one.getPluginVersion(), version) == 0 &&
                std::strcmp(one.getPluginNamespace(), space) == 0) {
                return creator;
            }
        }
        return nullptr;
    }

    // Not used here.
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator &, const char *) noexcept override { return false; }
    bool deregisterCreator(const IPluginCreator &) noexcept override { return false; }
    IPluginCreator *const *getPluginCreatorList(int32_t *count) const noexcept override {
        *count = 0;
        return nullptr;
    }
    IPluginCreator *getPluginCreator(const char *, const char *, const char *) noexcept override { return nullptr; }
#endif
    bool registerCreator(IPluginCreatorInterface &, const char *) noexcept override { return false; }
    bool deregisterCreator(const IPluginCreatorInterface &) noexcept override { return false; }
    void setErrorRecorder(IErrorRecorder *) noexcept override {}
    IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    void deregisterLibrary(void *) noexcept override {}
    IPluginResource *acquirePluginResource(const char *, IPluginResource *) noexcept override { return nullptr; }
    int32_t releasePluginResource(const char *) noexcept override { return 0; }

private:
    std::vector<IPluginCreatorInterface *> creators_;
} g_registry;

// TensorRT's objects call their implementation through interfaces of up to a hundred functions, of which a few are
// needed. A pointer to a virtual member function holds the offset in the vtable, plus 1 on x86-64.
template <class Member>
size_t slot(Member member) {
    uintptr_t value = 0;
    std::memcpy(&value, &member, sizeof value);
    return value / sizeof(void *);
}

void not_there() {
    std::fprintf(stderr, "stub_nvinfer: a function that the stub does not have was called\n");
    std::abort();
}

template <class Interface>
struct Implementation {
    Implementation() : table(256, reinterpret_cast<void *>(not_there)) { pointer = table.data(); }
    template <class Member, class Function>
    void set(Member member, Function *function) {
        table[slot(member)] = reinterpret_cast<void *>(function);
    }
    Interface *get() { return reinterpret_cast<Interface *>(this); }

    void **pointer;  // first: what the callers take for the vtable
    std::vector<void *> table;
};

struct StubTensor : ITensor {
    StubTensor(const char *name, DataType type, const Dims &dims) : name(name), type(type), dims(dims) {
        functions.owner = this;
        functions.set(&apiv::VTensor::getName, +[](Functions *f) { return f->owner->name.c_str(); });
        functions.set(&apiv::VTensor::getType, +[](Functions *f) { return f->owner->type; });
        mImpl = functions.get();
    }
    struct Functions : Implementation<apiv::VTensor> {
        StubTensor *owner;
    } functions;
    std::string name;
    DataType type;
    Dims dims;
};

struct StubLayer : IPluginV3Layer {
    StubLayer(std::vector<StubTensor *> tensors, DataType type)
        : inputs(std::move(tensors)), output(new StubTensor("output", type, inputs[0]->dims)) {
        functions.owner = this;
        functions.set(&apiv::VLayer::getNbInputs,
                      +[](Functions *f) { return static_cast<int32_t>(f->owner->inputs.size()); });
        functions.set(&apiv::VLayer::getInput,
                      +[](Functions *f, int32_t i) -> ITensor * { return f->owner->inputs[i]; });
        functions.set(&apiv::VLayer::getOutput, +[](Functions *f, int32_t) -> ITensor * { return f->owner->output; });
        mLayer = functions.get();
    }
    struct Functions : Implementation<apiv::VLayer> {
        StubLayer *owner;
    } functions;
    std::vector<StubTensor *> inputs;
    StubTensor *output;
};

IPluginV3 *g_plugin = nullptr;

// Asks the plugin what TensorRT asks it when a network is built; null if it refuses.
IPluginV3Layer *add_plugin(ITensor *const *inputs, int32_t count, IPluginV3 &plugin) {
    g_plugin = plugin.clone();  // the caller's may go
    auto *build = static_cast<IPluginV3OneBuild *>(g_plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    std::vector<StubTensor *> tensors;
    std::vector<DataType> types;
    std::vector<DynamicPluginTensorDesc> all(count + 1);
    for (int32_t i = 0; i < count; ++i) {
        tensors.push_back(static_cast<StubTensor *>(inputs[i]));
        types.push_back(tensors[i]->type);
        all[i].desc.type = tensors[i]->type;
        all[i].desc.dims = all[i].min = all[i].opt = all[i].max = tensors[i]->dims;
    }
    DataType out{};
    if (build->getNbOutputs() != 1 || build->getOutputDataTypes(&out, 1, types.data(), count) != 0) return nullptr;
    all[count] = all[0];
    all[count].desc.type = out;
    for (int32_t i = 0; i <= count; ++i) {
        if (!build->supportsFormatCombination(i, all.data(), count, 1)) {
            g_log += "tensor " + std::to_string(i) + ": type or format refused\n";
            return nullptr;
        }
    }
    return new StubLayer(tensors, out);
}

struct StubNetwork : INetworkDefinition {
    StubNetwork() {
        using V = apiv::VNetworkDefinition;
        functions.set(&V::addInput, +[](void *, const char *name, DataType type, const Dims &dims) -> ITensor * {
            return new StubTensor(name, type, dims);
        });
        functions.set(&V::addPluginV3, +[](void *, ITensor *const *inputs, int32_t count, ITensor *const *,
                                           int32_t num_shapes, IPluginV3 &plugin) -> IPluginV3Layer * {
            return num_shapes == 0 ? add_plugin(inputs, count, plugin) : nullptr;
        });
        mImpl = functions.get();
    }
    Implementation<apiv::VNetworkDefinition> functions;
};

struct StubBuilder : IBuilder {
    StubBuilder() {
        functions.set(&apiv::VBuilder::createNetworkV2,
                      +[](void *, NetworkDefinitionCreationFlags) -> INetworkDefinition * { return new StubNetwork; });
        mImpl = functions.get();
    }
    Implementation<apiv::VBuilder> functions;
};

}  // namespace

extern "C" {

IPluginRegistry *getPluginRegistry() noexcept { return &g_registry; }
IPluginRegistry *getBuilderPluginRegistry(EngineCapability) noexcept { return &g_registry; }
void *createInferBuilder_INTERNAL(void *, int32_t) noexcept { return static_cast<IBuilder *>(new StubBuilder); }
void *createInferRuntime_INTERNAL(void *, int32_t) noexcept { return nullptr; }
void *createInferRefitter_INTERNAL(void *, void *, int32_t) noexcept { return nullptr; }
void *createNvOnnxParser_INTERNAL(void *, void *, int32_t) noexcept { return nullptr; }
void *createNvOnnxParserRefitter_INTERNAL(void *, void *, int32_t) noexcept { return nullptr; }
int32_t getNvOnnxParserVersion() noexcept { return 0; }
bool initLibNvInferPlugins(void *, const char *) noexcept { return true; }

const char *stub_log() noexcept { return g_log.c_str(); }

// "name type length value" of every field of the last plugin that a network was given, as it goes into an engine.
const char *stub_fields() noexcept {
    static std::string text;
    text.clear();
    if (g_plugin == nullptr) return "";
    IPluginCapability *capability = g_plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME);
    auto *runtime = static_cast<IPluginV3OneRuntime *>(capability);
    const PluginFieldCollection *fields = runtime->getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        const PluginField &f = fields->fields[i];
        std::string value = "?";
        if (f.type == PluginFieldType::kINT32) value = std::to_string(*static_cast<const int32_t *>(f.data));
        if (f.type == PluginFieldType::kINT64) value = std::to_string(*static_cast<const int64_t *>(f.data));
        if (f.type == PluginFieldType::kFLOAT32) value = std::to_string(*static_cast<const float *>(f.data));
        text += std::string(f.name) + " " + std::to_string(static_cast<int32_t>(f.type)) + " " +
                std::to_string(f.length) + " " + value + "\n";
    }
    return text.c_str();
}

}
