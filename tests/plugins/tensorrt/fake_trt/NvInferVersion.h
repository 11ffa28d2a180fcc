// Of the stand-in for TensorRT's headers, see NvInferRuntime.h.
#pragma once

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 3
