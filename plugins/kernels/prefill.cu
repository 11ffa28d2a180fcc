// Attention of contexts: which kernel.
#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace razor {

// prefill_64.cu and so on, from prefill.cuh
template <typename T, int D>
cudaError_t prefill(const Params &p, const DeviceInfo &device, cudaStream_t stream);

namespace {

template <typename T>
cudaError_t prefill_of_type(const Params &p, const DeviceInfo &device, cudaStream_t stream) {
    switch (p.head_dim) {
        case 64: return prefill<T, 64>(p, device, stream);
        case 96: return prefill<T, 96>(p, device, stream);
        case 128: return prefill<T, 128>(p, device, stream);
        case 256: return prefill<T, 256>(p, device, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

size_t prefill_workspace(const Params &) { return 0; }

cudaError_t launch_prefill(const Params &p, void *, const DeviceInfo &device, cudaStream_t stream) {
    if (p.num_contexts == 0) return cudaSuccess;
    return p.bf16 ? prefill_of_type<__nv_bfloat16>(p, device, stream) : prefill_of_type<__half>(p, device, stream);
}

}  // namespace razor
