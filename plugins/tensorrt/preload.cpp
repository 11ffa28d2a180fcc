// For LD_PRELOAD into a program that loads TensorRT engines and knows nothing of plugins, such as Triton with its
// TensorRT-LLM backend:
//
//     LD_PRELOAD=/path/libtrt_razor_preload_trt10.so tritonserver …
//
// How it finds the right moment. The program, or a library that it opens long after its start, links libnvinfer;
// whoever wants an engine calls createInferRuntime_INTERNAL (every createInferRuntime does), and whoever registers
// plugins calls getPluginRegistry. A preloaded library comes first in the search for symbols, so both calls arrive
// here: the real function is looked up as the caller would have found it, our plugins are registered, once a
// registry, and the call goes on.
//
// Nothing happens before. mpirun, shells and everything else that inherits LD_PRELOAD run as ever: this library has
// no constructor and needs neither TensorRT nor CUDA; the plugins are opened (from this library's own folder) when
// there is a TensorRT to give them to. Linking libnvinfer instead would load it into each of these programs, and stop
// those that cannot find it.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdio>
#include <mutex>
#include <set>
#include <string>

#define RAZOR_STRING_(x) #x
#define RAZOR_STRING(x) RAZOR_STRING_(x)
#define RAZOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr const char *kPlugins = "libtrt_razor_plugins_trt" RAZOR_STRING(RAZOR_TRT_MAJOR) ".so";
constexpr const char *kTensorRt = "libnvinfer.so." RAZOR_STRING(RAZOR_TRT_MAJOR);
constexpr const char *kNamespace = "trt_razor";

void say(const std::string &line) { std::fprintf(stderr, "[trt_razor] preload: %s\n", line.c_str()); }

// File of the object that an address belongs to, "" if unknown.
std::string object_of(const void *address) {
    Dl_info info{};
    return dladdr(address, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

std::string own_file() { return object_of(reinterpret_cast<const void *>(&own_file)); }

// `name` as the code at `caller` would have found it without this library: among what its object links, in the objects
// after this one, in a TensorRT that somebody has opened for himself.
void *real_function(const char *name, const void *caller) {
    const std::string self = own_file();
    const auto from = [&](void *handle) -> void * {
        if (handle == nullptr) return nullptr;
        void *found = dlsym(handle, name);
        return found != nullptr && object_of(found) != self ? found : nullptr;
    };
    const auto from_file = [&](const char *file) -> void * {
        void *handle = dlopen(file, RTLD_LAZY | RTLD_NOLOAD);
        void *found = from(handle);
        if (handle != nullptr) dlclose(handle); // whoever loaded it keeps it
        return found;
    };
    if (void *found = from_file(object_of(caller).c_str())) return found;
    if (void *found = from(RTLD_NEXT)) return found;
    return from_file(kTensorRt);
}

using RegistryFunction = nvinfer1::IPluginRegistry *(*)();
using LoggerFunction = nvinfer1::ILogger *(*)();

// Messages of the plugins go where TensorRT's own go.
class LoggerOfTensorRt : public nvinfer1::ILoggerFinder {
public:
    LoggerFunction function = nullptr;
    nvinfer1::ILogger *findLogger() override { return function ? function() : nullptr; }
    virtual ~LoggerOfTensorRt() = default;
};

void register_plugins(nvinfer1::IPluginRegistry *registry, void *registry_function) {
    // Recursive: what is called here may itself ask for the registry, and comes back through this library.
    static std::recursive_mutex mutex;
    static std::set<nvinfer1::IPluginRegistry *> done;
    static LoggerOfTensorRt *logger = new LoggerOfTensorRt; // outlives every caller
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    if (!done.insert(registry).second) return;

    // The registry's layout differs between majors: look before touching it.
    const std::string tensorrt = object_of(registry_function);
    void *handle = dlopen(tensorrt.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    const auto version = handle ? reinterpret_cast<int32_t (*)()>(dlsym(handle, "getInferLibVersion")) : nullptr;
    const int32_t found = version ? version() : 0;
    // 10.13.3 is 101303
    if (found / 10000 != RAZOR_TRT_MAJOR) {
        return say("expected TensorRT " RAZOR_STRING(RAZOR_TRT_MAJOR) ", found version " + std::to_string(found) +
                   " (" + tensorrt + "); the plugins are not registered, preload the library made for that version");
    }
    const std::string self = own_file();
    const std::string file = self.substr(0, self.rfind('/') + 1) + kPlugins;
    void *plugins = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (plugins == nullptr) return say(std::string("cannot open the plugins: ") + dlerror());
    using Creators = nvinfer1::IPluginCreatorInterface *const *(*)(int32_t &);
    const auto get_creators = reinterpret_cast<Creators>(dlsym(plugins, "getCreators"));
    const auto set_finder =
        reinterpret_cast<void (*)(nvinfer1::ILoggerFinder *)>(dlsym(plugins, "setLoggerFinder"));
    if (get_creators == nullptr || set_finder == nullptr) return say(file + ": expected getCreators, found none");
    logger->function = reinterpret_cast<LoggerFunction>(dlsym(handle, "getLogger"));
    if (logger->function != nullptr) set_finder(logger);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface *const *creators = get_creators(count);
    // False where the program has loaded the plugins itself: then they are there.
    for (int32_t i = 0; i < count; ++i) registry->registerCreator(*creators[i], kNamespace);
}

nvinfer1::IPluginRegistry *real_registry(const void *caller) {
    void *function = real_function("getPluginRegistry", caller);
    if (function == nullptr) return nullptr;
    nvinfer1::IPluginRegistry *registry = reinterpret_cast<RegistryFunction>(function)();
    if (registry != nullptr) register_plugins(registry, function);
    return registry;
}

}  // namespace

RAZOR_EXPORT nvinfer1::IPluginRegistry *getPluginRegistry() noexcept {
    try {
        return real_registry(__builtin_return_address(0));
    } catch (...) { // out of memory
        return nullptr;
    }
}

RAZOR_EXPORT void *createInferRuntime_INTERNAL(void *logger, int32_t version) noexcept {
    try {
        const void *caller = __builtin_return_address(0);
        real_registry(caller);
        const auto function =
            reinterpret_cast<void *(*)(void *, int32_t)>(real_function("createInferRuntime_INTERNAL", caller));
        return function ? function(logger, version) : nullptr;
    } catch (...) { // out of memory
        return nullptr;
    }
}
