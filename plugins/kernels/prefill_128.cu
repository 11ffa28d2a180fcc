// Prefill for head_dim 128.
#include "prefill.cuh"

namespace razor {

template cudaError_t prefill<__half, 128>(const Params &, float *, const DeviceInfo &, cudaStream_t);
template cudaError_t prefill<__nv_bfloat16, 128>(const Params &, float *, const DeviceInfo &, cudaStream_t);

}  // namespace razor
