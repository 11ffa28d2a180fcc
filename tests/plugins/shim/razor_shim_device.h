// The machine of device.cuh on a CPU. Same names, same meaning; machine.h has the bodies.
//
// The last arguments of collectives are where they are called from: the lanes of a warp must meet at the same place.
#pragma once

#include <type_traits>

#include "machine.h"

#define RAZOR_SHIM_HERE razor_shim::Place place = razor_shim::Place::here(__builtin_FILE(), __builtin_LINE())

namespace razor {

inline char *shared_memory() { return razor_shim::shared_memory(); }

inline uint4 load_once(const void *global, const char *what, razor_shim::Place place) {
    razor_shim::check_aligned16(global, what, place);
    return *static_cast<const uint4 *>(global);
}
inline uint4 load_once(const void *global, RAZOR_SHIM_HERE) { return load_once(global, "load_once", place); }

inline void copy_async16(void *shared, const void *global, bool valid = true, RAZOR_SHIM_HERE) {
    uint4 bytes = {};
    if (valid) bytes = load_once(global, "copy_async16", place);
    razor_shim::copy_async(shared, bytes, place);
}
inline void copy_commit() { razor_shim::copy_commit(); }
template <int Pending>
inline void copy_wait() {
    static_assert(Pending >= 0, "groups");
    razor_shim::copy_wait(Pending);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void *row, RAZOR_SHIM_HERE) {
    razor_shim::load_matrix_x4(r, row, false, place);
}
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void *row, RAZOR_SHIM_HERE) {
    razor_shim::load_matrix_x4(r, row, true, place);
}

template <typename T>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, RAZOR_SHIM_HERE) {
    constexpr bool is_half = std::is_same_v<T, __half>;
    static_assert(is_half || std::is_same_v<T, __nv_bfloat16>, "__half or __nv_bfloat16");
    razor_shim::mma(c, a, b0, b1, is_half ? razor_shim::Op::kMmaHalf : razor_shim::Op::kMmaBfloat16, place);
}

inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.f : y;
}

template <typename V>
inline V shuffle(V value, int lane, RAZOR_SHIM_HERE) {
    static_assert(std::is_arithmetic_v<V> && (sizeof(V) == 4 || sizeof(V) == 8), "int, unsigned, float, double, long");
    uint32_t words[2] = {};
    memcpy(words, &value, sizeof(V));
    razor_shim::shuffle(words, sizeof(V) / 4, lane & 31, razor_shim::Op::kShuffle, place);
    memcpy(&value, words, sizeof(V));
    return value;
}
template <typename V>
inline V shuffle_xor(V value, int mask, RAZOR_SHIM_HERE) {
    static_assert(std::is_arithmetic_v<V> && (sizeof(V) == 4 || sizeof(V) == 8), "int, unsigned, float, double, long");
    uint32_t words[2] = {};
    memcpy(words, &value, sizeof(V));
    razor_shim::shuffle(words, sizeof(V) / 4, razor_shim::lane() ^ mask, razor_shim::Op::kShuffleXor, place);
    memcpy(&value, words, sizeof(V));
    return value;
}
inline void sync_warp(RAZOR_SHIM_HERE) { razor_shim::sync_warp(place); }
inline void sync_block(RAZOR_SHIM_HERE) { razor_shim::sync_block(place); }

template <typename... Expected, typename... Args>
inline cudaError_t launch(void (*kernel)(Expected...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                          const Args &...args) {
    static_assert(sizeof...(Expected) == sizeof...(Args) && (std::is_same_v<std::remove_cv_t<Expected>, Args> && ...),
                  "arguments of exactly the kernel's parameter types: their bytes are what it gets");
    static_assert((sizeof(Args) + ... + 0) <= 4096, "4 KiB of parameters");
    const auto body = [&] { kernel(args...); };
    razor_shim::Launch l;
    l.kernel = reinterpret_cast<const void *>(kernel);
    l.grid = grid;
    l.block = block;
    l.shared = shared;
    l.run_thread = [](const void *b) { (*static_cast<const decltype(body) *>(b))(); };
    l.body = &body;
    return razor_shim::run(l);
}

}  // namespace razor

#undef RAZOR_SHIM_HERE
