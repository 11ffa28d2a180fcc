// Workspace of decode and choice of the instantiation; the kernels are in decode_<head_dim>.cu.
#include "decode.cuh"

namespace razor {

#define RAZOR_EXTERN_DECODE(D)                                                                                       \
    extern template cudaError_t run_decode<__half, D, false>(const Params &, int32_t *, float *, const DeviceInfo &, \
                                                             cudaStream_t);                                          \
    extern template cudaError_t run_decode<__half, D, true>(const Params &, int32_t *, float *, const DeviceInfo &,  \
                                                            cudaStream_t);                                           \
    extern template cudaError_t run_decode<__nv_bfloat16, D, false>(const Params &, int32_t *, float *,              \
                                                                    const DeviceInfo &, cudaStream_t);               \
    extern template cudaError_t run_decode<__nv_bfloat16, D, true>(const Params &, int32_t *, float *,               \
                                                                   const DeviceInfo &, cudaStream_t);
RAZOR_EXTERN_DECODE(64)
RAZOR_EXTERN_DECODE(96)
RAZOR_EXTERN_DECODE(128)
RAZOR_EXTERN_DECODE(256)
#undef RAZOR_EXTERN_DECODE

namespace {

size_t bytes_of_ints(const Params &p) { return (decode_zeroed_ints(p) * sizeof(int32_t) + 255) / 256 * 256; }

template <typename T, int D>
cudaError_t choose_cache(const Params &p, int32_t *ints, float *partials, const DeviceInfo &device,
                         cudaStream_t stream) {
    return p.cache_type == CacheType::kFp8 ? run_decode<T, D, true>(p, ints, partials, device, stream)
                                           : run_decode<T, D, false>(p, ints, partials, device, stream);
}

template <int D>
cudaError_t choose_type(const Params &p, int32_t *ints, float *partials, const DeviceInfo &device,
                        cudaStream_t stream) {
    return p.bf16 ? choose_cache<__nv_bfloat16, D>(p, ints, partials, device, stream)
                  : choose_cache<__half, D>(p, ints, partials, device, stream);
}

}  // namespace

size_t decode_zeroed_ints(const Params &p) {
    // Tiles of a head are counted only where it has several.
    const size_t heads = decode::tiles_of(p) > 1 ? static_cast<size_t>(p.num_generations()) * p.num_local : 0;
    return decode::kFixedInts + heads;
}

size_t decode_workspace(const Params &p) {
    return bytes_of_ints(p) + static_cast<size_t>(decode::kSlots) * decode::slot_floats(p) * sizeof(float);
}

cudaError_t launch_decode(const Params &p, void *workspace, const DeviceInfo &device, cudaStream_t stream) {
    if (p.num_generations() == 0) return cudaSuccess;
    int32_t *ints = static_cast<int32_t *>(workspace);
    float *partials = reinterpret_cast<float *>(static_cast<char *>(workspace) + bytes_of_ints(p));
    switch (p.head_dim) {
    case 64: return choose_type<64>(p, ints, partials, device, stream);
    case 96: return choose_type<96>(p, ints, partials, device, stream);
    case 128: return choose_type<128>(p, ints, partials, device, stream);
    case 256: return choose_type<256>(p, ints, partials, device, stream);
    default: return cudaErrorInvalidValue; // the C API lets no other through
    }
}

}  // namespace razor
