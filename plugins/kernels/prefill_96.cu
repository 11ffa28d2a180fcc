// Prefill for head_dim 96.
#include "prefill.cuh"

namespace razor {

template cudaError_t prefill<__half, 96>(const Params &, float *, const DeviceInfo &, cudaStream_t);
template cudaError_t prefill<__nv_bfloat16, 96>(const Params &, float *, const DeviceInfo &, cudaStream_t);

}  // namespace razor
