// The machine: warp-wide instructions that kernels use, each behind one function. With RAZOR_SHIM the tests put their own
// bodies behind these names and run the kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <math_constants.h>
#include <stdint.h>

namespace razor {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f;

// Floor of masked logits: finite, so that inf - inf never happens; exp2(kMasked - anything real) is 0.
constexpr float kMasked = -1e30f;

}  // namespace razor

#ifdef RAZOR_SHIM
#include "razor_shim_device.h"
#else

namespace razor {

// Dynamic shared memory of the block, 16-byte aligned.
__device__ inline char *shared_memory() {
    extern __shared__ __align__(16) char razor_shared[];
    return razor_shared;
}

__device__ inline uint32_t shared_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past L1. Not valid: zeros, and `global` is not read.
__device__ inline void copy_async16(void *shared, const void *global, bool valid = true) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned);
// r[i] of lane l: row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1 of matrix i. _trans: of the transposed matrices.
__device__ inline void load_matrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ inline void load_matrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b, m16n8k16, fp32 accumulation. With r = lane / 4, q = lane % 4:
//   a[0]: A[r][2q, 2q+1]   a[1]: A[r+8][2q, 2q+1]   a[2]: A[r][2q+8, 2q+9]   a[3]: A[r+8][2q+8, 2q+9]
//   b0: B[2q, 2q+1][r]     b1: B[2q+8, 2q+9][r]
//   c[0], c[1]: C[r][2q, 2q+1]                      c[2], c[3]: C[r+8][2q, 2q+1]
// T: __half or __nv_bfloat16.
template <typename T>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, flushing to 0 below the normal range.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

template <typename V>
__device__ inline V shuffle(V value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <typename V>
__device__ inline V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline void sync_block() { __syncthreads(); }

// 16 bytes that nobody writes during the kernel.
__device__ inline uint4 load_once(const void *global) { return __ldg(static_cast<const uint4 *>(global)); }

// Enqueues kernel<<<grid, block, shared, stream>>>(args...).
template <typename... Expected, typename... Args>
inline cudaError_t launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          const Args &...args) {
    if (shared > 48 * 1024) {
        // All the device has, not `shared`: a kernel has one such limit for launches of all sizes, and a thread that
        // launches it with less must not lower it between another's two calls.
        int device = 0, most = 0;
        cudaError_t e = cudaGetDevice(&device);
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, most);
        if (e != cudaSuccess) return e;
    }
    void *pointers[] = {const_cast<void *>(static_cast<const void *>(&args))...};
    return cudaLaunchKernel(reinterpret_cast<const void *>(kernel), grid, block, pointers, shared, stream);
}

}  // namespace razor

#endif  // RAZOR_SHIM

namespace razor {

// fp32 and 16-bit types ----------------------------------------------------------------------------
template <typename T>
__device__ inline float to_float(T x);
template <>
__device__ inline float to_float<__half>(__half x) { return __half2float(x); }
template <>
__device__ inline float to_float<__nv_bfloat16>(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <typename To, typename From>
__device__ inline To bit_cast(const From &from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// Two elements in one register, the first in the low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) { return bit_cast<uint32_t>(__floats2half2_rn(low, high)); }
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
template <typename T>
__device__ inline float2 unpack(uint32_t two) {
    return {to_float(bit_cast<T>(static_cast<uint16_t>(two))), to_float(bit_cast<T>(static_cast<uint16_t>(two >> 16)))};
}

// FP8 e4m3 -----------------------------------------------------------------------------------------
// Rounds to nearest even, saturates at +-448; NaN stays NaN.
__device__ inline uint8_t to_fp8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

// Four of the eight bytes of a (0 .. 3) and b (4 .. 7); byte i of the result is number selector >> 4 i & 7.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, selector);
#else
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
#endif
}

// The e4m3 numbers in the high bytes of the two 16-bit halves of x -> two T; low bytes are ignored. Exact. Not the
// conversion instruction, which only newer chips have and which yields fp16 only: the 7 bits of exponent and mantissa
// moved to T's place are the value times a power of two, subnormals included. (0x7f, NaN, becomes 480; only a NaN that
// was to be cached leaves it there: to_fp8 saturates.)
template <typename T>
__device__ inline uint32_t from_fp8_high(uint32_t x);

template <>
__device__ inline uint32_t from_fp8_high<__half>(uint32_t x) {
    const uint32_t bits = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
    return bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(bits), __floats2half2_rn(256.f, 256.f))); // bias 15 - 7
}
template <>
__device__ inline uint32_t from_fp8_high<__nv_bfloat16>(uint32_t x) {
    const uint32_t bits = (x & 0x80008000u) | (x >> 4 & 0x07f007f0u);
    // 2^120, bias 127 - 7: subnormal e4m3 numbers are subnormal bfloat16 numbers here; the product keeps them.
    const __nv_bfloat162 scale = __floats2bfloat162_rn(1.329227995784916e36f, 1.329227995784916e36f);
    return bit_cast<uint32_t>(__hmul2(bit_cast<__nv_bfloat162>(bits), scale));
}

// Four e4m3 bytes -> four T: elements 0, 1 in .x and 2, 3 in .y.
template <typename T>
__device__ inline uint2 from_fp8x4(uint32_t bytes) {
    return {from_fp8_high<T>(permute_bytes(bytes, 0, 0x1000)), from_fp8_high<T>(permute_bytes(bytes, 0, 0x3020))};
}

}  // namespace razor
