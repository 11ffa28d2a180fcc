// The library's two entry points. IPluginRegistry::loadLibrary and OnnxParser look for them by name; nothing else is
// exported, and nothing of TensorRT is linked.
#include <NvInferRuntime.h>

#include "common/log.h"
#include "razor_attention/razor_attention_plugin.h"
#include "razor_gpt_attention/razor_gpt_attention_plugin.h"

#define RAZOR_EXPORT extern "C" __attribute__((visibility("default")))

RAZOR_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &num_creators) {
    static razor::trt::Creator<razor::trt::RazorAttentionPlugin> attention;
    static razor::trt::Creator<razor::trt::RazorGptAttentionPlugin> gpt_attention;
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&attention, &gpt_attention};
    num_creators = 2;
    return creators;
}

RAZOR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *finder) { razor::trt::set_logger_finder(finder); }
