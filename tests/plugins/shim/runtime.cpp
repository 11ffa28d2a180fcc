// The CUDA runtime's functions that the C API uses, for one imaginary device whose memory is the host's.
#include <cuda_runtime.h>
#include <stdlib.h>

#include "machine.h"
#include "razor_shim.h"

namespace razor_shim {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

int environment(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

Device &the_device() {
    static Device d{environment("RAZOR_SHIM_SMS", 4), environment("RAZOR_SHIM_SHARED", 232448)};
    return d;
}

bool exists() { return the_device().multiprocessors > 0; }

}  // namespace

Device device() { return the_device(); }

cudaError_t report(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

}  // namespace razor_shim

using razor_shim::report;

void razor_shim_set_device(int multiprocessors, int max_shared) {
    razor_shim::the_device() = {multiprocessors, max_shared};
}

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    }
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetLastError() {
    const cudaError_t error = razor_shim::last_error;
    razor_shim::last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return razor_shim::last_error; }

cudaError_t cudaGetDevice(int *device) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) {
    *count = razor_shim::exists() ? 1 : 0;
    return *count ? cudaSuccess : report(cudaErrorNoDevice);
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    if (device != 0) return report(cudaErrorInvalidDevice);
    const razor_shim::Device d = razor_shim::device();
    switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = d.multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.max_shared + 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.max_shared; return cudaSuccess;
    }
    return report(cudaErrorInvalidValue);
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = razor_shim::exists() ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute attribute, int value) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    const bool too_much = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
                          (value < 0 || value > razor_shim::device().max_shared);
    return too_much ? report(cudaErrorInvalidValue) : cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int, size_t) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    if (bytes) memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    if (!razor_shim::exists()) return report(cudaErrorNoDevice);
    if (bytes) memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return razor_shim::exists() ? cudaSuccess : report(cudaErrorNoDevice); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
