// Prefill for head_dim 64.
#include "prefill.cuh"

namespace razor {

template cudaError_t prefill<__half, 64>(const Params &, float *, const DeviceInfo &, cudaStream_t);
template cudaError_t prefill<__nv_bfloat16, 64>(const Params &, float *, const DeviceInfo &, cudaStream_t);

}  // namespace razor
