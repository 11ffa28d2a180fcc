// What a server opens: links TensorRT, makes a runtime or asks for the registry.
#include <NvInferRuntime.h>

extern "C" __attribute__((visibility("default"))) int run_backend(bool with_registry) {
    if (with_registry && (getPluginRegistry() == nullptr || getPluginRegistry() == nullptr)) return 1;
    return createInferRuntime_INTERNAL(getLogger(), 101303) == nullptr;
}
