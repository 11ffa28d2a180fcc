// m16n8k16 with fp32 accumulation. Products of two 16-bit numbers are exact in fp32; each sum is rounded.
#include "machine.h"

namespace razor_shim {
namespace {

typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(16), aligned(2), may_alias));

// Always inlined: a vector that is an argument of a call would depend on the target's features.
#define RAZOR_SHIM_INLINE __attribute__((always_inline)) inline

// Eight at a time, as __half2float and __bfloat162float do it.
template <bool IsHalf>
RAZOR_SHIM_INLINE void convert(float *to, const uint16_t *from, int n) {
    for (int i = 0; i < n; i += 8) {
        const Words bits = __builtin_convertvector(*reinterpret_cast<const Shorts *>(from + i), Words);
        Words *out = reinterpret_cast<Words *>(to + i);
        if (!IsHalf) {
            *out = bits << 16;
            continue;
        }
        // Without branches: each element takes one of the three.
        const Words rest = bits & 0x7fffu, moved = (rest << 13) + (112u << 23);
        const Floats subnormal = (Floats)(moved + (1u << 23)) - 6.103515625e-05f; // 2^-14
        const Words is_subnormal = (Words)(rest < 0x0400u), is_infinite = (Words)(rest >= 0x7c00u);
        *out = (bits & 0x8000u) << 16 | (is_infinite & 0x7f800000u) | (is_subnormal & (Words)subnormal) |
               (~is_subnormal & moved);
    }
}

template <bool IsHalf>
RAZOR_SHIM_INLINE void multiply_matrices(float *c, const uint16_t *a, const uint16_t *b) {
    float fa[4 * 64], fb[16 * 8];
    convert<IsHalf>(fa, a, 4 * 64);
    convert<IsHalf>(fb, b, 16 * 8);
    for (int row = 0; row < 16; row += 8) { // eight sums at a time: additions to one wait for each other
        Floats sum[8];
        for (int i = 0; i < 8; ++i) sum[i] = *reinterpret_cast<const Floats *>(c + (row + i) * 8);
        for (int half = 0; half < 2; ++half) {
            const float *left = fa + half * 128 + row * 8, *right = fb + half * 64;
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) {
                const Floats factor = *reinterpret_cast<const Floats *>(right + k * 8);
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) sum[i] += left[i * 8 + k] * factor;
            }
        }
        for (int i = 0; i < 8; ++i) *reinterpret_cast<Floats *>(c + (row + i) * 8) = sum[i];
    }
}

void multiply_portable(float *c, const uint16_t *a, const uint16_t *b, bool is_half) {
    is_half ? multiply_matrices<true>(c, a, b) : multiply_matrices<false>(c, a, b);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void multiply_avx2(float *c, const uint16_t *a, const uint16_t *b, bool is_half) {
    is_half ? multiply_matrices<true>(c, a, b) : multiply_matrices<false>(c, a, b);
}
#endif

decltype(&multiply_portable) choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) return multiply_avx2;
#endif
    return multiply_portable;
}

const decltype(&multiply_portable) kMultiply = choose();

}  // namespace

void multiply(float *c, const uint16_t *a, const uint16_t *b, bool is_half) { kMultiply(c, a, b, is_half); }

}  // namespace razor_shim
