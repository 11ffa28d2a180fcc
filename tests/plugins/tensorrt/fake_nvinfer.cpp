// libnvinfer.so.10 as far as a self-registering library needs it.
#include <NvInferRuntime.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

class Registry : public nvinfer1::IPluginRegistry {
public:
    bool registerCreator(nvinfer1::IPluginCreatorInterface &creator, const char *name_space) noexcept override {
        getPluginRegistry(); // the real one might; must not wait for itself
        auto &one = static_cast<nvinfer1::IPluginCreatorV3One &>(creator);
        std::printf("registered %s::%s %s\n", name_space, one.getPluginName(), one.getPluginVersion());
        return true;
    }
};

class Logger : public nvinfer1::ILogger {
public:
    void log(Severity, const char *text) noexcept override { std::printf("logged %s\n", text); }
};

}  // namespace

extern "C" nvinfer1::IPluginRegistry *getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}

extern "C" nvinfer1::ILogger *getLogger() noexcept {
    static Logger logger;
    return &logger;
}

extern "C" int32_t getInferLibVersion() noexcept {
    const char *version = std::getenv("FAKE_NVINFER_VERSION");
    return version ? std::atoi(version) : 101303;
}

extern "C" void *createInferRuntime_INTERNAL(void *, int32_t) noexcept {
    static int runtime;
    std::printf("runtime created\n");
    return &runtime;
}
