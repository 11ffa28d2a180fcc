#include "decode.cuh"

namespace razor {

template cudaError_t run_decode<__half, 64, false>(const Params &, int32_t *, float *, const DeviceInfo &,
                                                   cudaStream_t);
template cudaError_t run_decode<__half, 64, true>(const Params &, int32_t *, float *, const DeviceInfo &,
                                                  cudaStream_t);
template cudaError_t run_decode<__nv_bfloat16, 64, false>(const Params &, int32_t *, float *, const DeviceInfo &,
                                                          cudaStream_t);
template cudaError_t run_decode<__nv_bfloat16, 64, true>(const Params &, int32_t *, float *, const DeviceInfo &,
                                                         cudaStream_t);

}  // namespace razor
