// FP8 e4m3 for the CPU: rounds to nearest even, saturates at +-448.
#pragma once

#include "cuda_runtime.h"

typedef uint8_t __nv_fp8_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

struct __nv_fp8_e4m3 { __nv_fp8_storage_t __x; };

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation,
                                                __nv_fp8_interpretation_t interpretation) {
    if (saturation != __NV_SATFINITE || interpretation != __NV_E4M3) __builtin_trap();
    const uint32_t u = __float_as_uint(x), sign = u >> 24 & 0x80u, rest = u & 0x7fffffffu;
    uint32_t magnitude;
    if (rest > 0x7f800000u) return 0x7f;
    if (rest >= 0x43e00000u) { // 448 and beyond
        magnitude = 0x7e;
    } else if (rest < 0x3c800000u) { // below 2^-6: the addition of 2^14, whose last bit is 2^-9, rounds
        magnitude = __float_as_uint(__uint_as_float(rest) + 16384.f) - 0x46800000u;
    } else {
        magnitude = (rest - (120u << 23) + 0x7ffffu + (rest >> 20 & 1u)) >> 20;
    }
    return static_cast<__nv_fp8_storage_t>(sign | magnitude);
}
