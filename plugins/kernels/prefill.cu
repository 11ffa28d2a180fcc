// Attention of contexts: which kernel.
#include "prefill_split.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace razor {

// prefill_64.cu and so on, from prefill.cuh
template <typename T, int D>
cudaError_t prefill(const Params &p, float *slots, const DeviceInfo &device, cudaStream_t stream);

namespace {

template <typename T>
cudaError_t prefill_of_type(const Params &p, float *slots, const DeviceInfo &device, cudaStream_t stream) {
    switch (p.head_dim) {
        case 64: return prefill<T, 64>(p, slots, device, stream);
        case 96: return prefill<T, 96>(p, slots, device, stream);
        case 128: return prefill<T, 128>(p, slots, device, stream);
        case 256: return prefill<T, 256>(p, slots, device, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace

size_t prefill_workspace(const Params &p) { return prefill_detail::bytes_of_slots(p); }

cudaError_t launch_prefill(const Params &p, void *workspace, const DeviceInfo &device, cudaStream_t stream) {
    if (p.num_contexts == 0) return cudaSuccess;
    float *const slots = static_cast<float *>(workspace);
    return p.bf16 ? prefill_of_type<__nv_bfloat16>(p, slots, device, stream)
                  : prefill_of_type<__half>(p, slots, device, stream);
}

}  // namespace razor
