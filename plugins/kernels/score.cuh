// Numbers of cached rows, and the score of a candidate (docs/semantics.md, "Heavy hitters"): heavy.cu chooses for chunks,
// decode_fold.cuh for decode steps.
#pragma once

#include "device.cuh"

namespace razor {

// Eight neighbouring elements of a cached row, as they lie there and as real numbers.
template <bool kFp8>
struct Eight;
template <>
struct Eight<false> {
    uint4 bits;
};
template <>
struct Eight<true> {
    uint2 bits;
};

// As eight T, without scale: exact.
template <typename T>
__device__ inline uint4 to_sixteen_bits(const Eight<false> &eight) { return eight.bits; }
template <typename T>
__device__ inline uint4 to_sixteen_bits(const Eight<true> &eight) {
    const uint2 low = from_fp8x4<T>(eight.bits.x), high = from_fp8x4<T>(eight.bits.y);
    return {low.x, low.y, high.x, high.y};
}

template <typename T, bool kFp8>
__device__ inline void to_floats(float (&x)[8], const Eight<kFp8> &eight, float scale) {
    const uint4 bits = to_sixteen_bits<T>(eight);
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack<T>(words[i]);
        x[2 * i] = kFp8 ? two.x * scale : two.x;
        x[2 * i + 1] = kFp8 ? two.y * scale : two.y;
    }
}
template <bool kFp8>
__device__ inline Eight<kFp8> load8(const char *row, int first) {
    return *reinterpret_cast<const Eight<kFp8> *>(row + first * (kFp8 ? 1 : 2));
}
template <typename T, bool kFp8>
__device__ inline float load1(const char *row, int column, float scale) {
    if constexpr (kFp8) return unpack<T>(from_fp8x4<T>(static_cast<uint8_t>(row[column])).x).x * scale;
    else return to_float(reinterpret_cast<const T *>(row)[column]);
}

// Orders unsigned numbers as the floats they come from. -0 is 0.
__device__ inline uint32_t ordered(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x == 0.f ? 0.f : x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ln ‖v‖ + ln Σ exp(s q k), in units of log2 and without the scale of values: neither changes who is higher. Lanes
// 4 r .. 4 r + 3 have parts of the same candidate, each with a maximum of its own: sum of 2^(logit - top), sum of
// squares of the value. All lanes of a warp; the four get the same number, in the order of ordered().
__device__ inline uint32_t score_of_quad(float top, float sum, float squares) {
    float highest = top;
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
        highest = fmaxf(highest, shuffle_xor(highest, mask));
        squares += shuffle_xor(squares, mask);
    }
    sum *= exp2_fast(top - highest);
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
    return ordered(0.5f * log2f(squares) + (highest + log2f(sum)));
}

}  // namespace razor
