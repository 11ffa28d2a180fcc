// fp16 for the CPU: rounds to nearest even, with subnormals, infinities and NaN.
#pragma once

#include "cuda_runtime.h"

struct __half { uint16_t bits; };
struct __align__(4) __half2 { __half x, y; };
typedef __half half;
typedef __half2 half2;

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
    // Exponent and mantissa moved to fp32's place, exponent rebased (127 - 15). Subnormal numbers have no implicit one:
    // given one and then subtracted. The exponent of infinities and NaN goes to its largest.
    const uint32_t moved = (rest << 13) + (112u << 23);
    const float subnormal = __uint_as_float(moved + (1u << 23)) - __uint_as_float(113u << 23);
    const uint32_t magnitude = rest >= 0x7c00u  ? moved | 0x7f800000u
                               : rest < 0x0400u ? __float_as_uint(subnormal)
                                                : moved;
    return __uint_as_float(sign | magnitude);
}
inline __half __float2half_rn(float x) {
    const uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
    uint32_t magnitude;
    if (rest > 0x7f800000u) return {0x7fff};
    if (rest >= 0x477ff000u) { // 65520 and beyond
        magnitude = 0x7c00u;
    } else if (rest < 0x38800000u) { // below 2^-14: the addition of 0.5, whose last bit is 2^-24, rounds
        magnitude = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000u;
    } else {
        magnitude = (rest - (112u << 23) + 0x0fffu + (rest >> 13 & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | magnitude)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half2 __float2half2_rn(float x) { return {__float2half_rn(x), __float2half_rn(x)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }

// Exact before it is rounded: the product of two 11-bit numbers fits into fp32.
inline __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
