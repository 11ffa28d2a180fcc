// Tests of the shim itself: does it compute what a GPU computes, and does it catch what it claims to catch?
//
//     razor_shim_selftest               all checks; 0 if they pass
//     razor_shim_selftest crash NAME    do what must end the process (test_shim.py reads the message)
//     razor_shim_selftest convert NAME  elements from stdin through a conversion to stdout (test_shim.py compares)
//     razor_shim_selftest bench         cost of a switch and of an mma
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "device.cuh"
#include "machine.h"
#include "razor_shim.h"

namespace {

using namespace razor;

int failures = 0;

#define CHECK(condition)                                                             \
    do {                                                                             \
        if (!(condition) && ++failures <= 20) printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    } while (0)

constexpr uint32_t kPoison = 0xffffffffu;
constexpr int kSeeds = 12;

// Indices ------------------------------------------------------------------------------------------
__global__ void write_indices(int *out, int *runs) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[i] = static_cast<int>(i);
    runs[i] += 1;
}

void test_indices() {
    const struct { dim3 grid, block; } shapes[] = {
        {1, 1}, {3, 40}, {2, 1024}, {dim3(3, 4, 5), dim3(8, 4, 2)}, {dim3(1, 7), dim3(1, 33)}, {dim3(1, 1, 9), 30}};
    for (const auto &s : shapes) {
        const size_t n = size_t{s.grid.x} * s.grid.y * s.grid.z * s.block.x * s.block.y * s.block.z;
        std::vector<int> out(n), runs(n);
        CHECK(launch(write_indices, s.grid, s.block, 0, nullptr, out.data(), runs.data()) == cudaSuccess);
        for (size_t i = 0; i < n; ++i) CHECK(out[i] == static_cast<int>(i) && runs[i] == 1);
    }
}

// Shuffles -----------------------------------------------------------------------------------------
template <typename V>
__global__ void shuffle_all(V *out, V factor) {
    const int t = static_cast<int>(threadIdx.x);
    const V mine = static_cast<V>(t + 1) * factor;
    V *o = out + t * 40;
    for (int mask = 0; mask < 32; ++mask) o[mask] = shuffle_xor(mine, mask);
    o[32] = shuffle(mine, t * 7 + 3);      // a permutation; lanes beyond 31 wrap
    o[33] = shuffle(mine, 5);
    o[34] = shuffle(o[33] + mine, t % 3);
    V sum = mine;
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    o[35] = sum;
}

template <typename V>
void test_shuffle(V factor) {
    std::vector<V> out(96 * 40);
    CHECK(launch(shuffle_all<V>, 1, 96, 0, nullptr, out.data(), V{factor}) == cudaSuccess);
    for (int t = 0; t < 96; ++t) {
        const int warp = t / 32 * 32, l = t % 32;
        const auto value = [&](int lane) { return static_cast<V>(warp + lane + 1) * factor; };
        const V *o = out.data() + t * 40;
        V sum = 0;
        for (int mask = 0; mask < 32; ++mask) {
            CHECK(o[mask] == value(l ^ mask));
            sum += value(mask);
        }
        CHECK(o[32] == value((t * 7 + 3) % 32));
        CHECK(o[33] == value(5));
        CHECK(o[34] == value(5) + value(t % 3));
        CHECK(o[35] == sum);
    }
}

// Barriers -----------------------------------------------------------------------------------------
__global__ void relay(int *out, int rounds) { // round i: add what the neighbour had after round i - 1
    int *s = reinterpret_cast<int *>(shared_memory());
    const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    s[t] = t;
    sync_block();
    for (int i = 0; i < rounds; ++i) {
        const int next = s[(t + 1) % n];
        sync_block();
        s[t] += next;
        sync_block();
    }
    out[t] = s[t];
}
__global__ void relay_in_warp(int *out, int rounds) {
    int *s = reinterpret_cast<int *>(shared_memory()) + threadIdx.x / 32 * 32;
    const int l = static_cast<int>(threadIdx.x) % 32;
    s[l] = static_cast<int>(threadIdx.x);
    sync_warp();
    for (int i = 0; i < rounds; ++i) {
        const int next = s[(l + 1) % 32];
        sync_warp();
        s[l] += next;
        sync_warp();
    }
    out[threadIdx.x] = s[l];
}

void test_barriers() {
    for (const int n : {32, 96, 100, 1024}) {
        const int rounds = 9;
        std::vector<int> out(n), expected(n), before;
        for (int t = 0; t < n; ++t) expected[t] = t;
        for (int i = 0; i < rounds; ++i) {
            before = expected;
            for (int t = 0; t < n; ++t) expected[t] += before[(t + 1) % n];
        }
        const size_t bytes = static_cast<size_t>(n) * 4;
        const dim3 block = static_cast<unsigned>(n);
        CHECK(launch(relay, 1, block, bytes, nullptr, out.data(), int{rounds}) == cudaSuccess);
        CHECK(out == expected);
        if (n % 32) continue;
        for (int t = 0; t < n; ++t) expected[t] = t;
        for (int i = 0; i < rounds; ++i) {
            before = expected;
            for (int t = 0; t < n; ++t) expected[t] += before[t / 32 * 32 + (t + 1) % 32];
        }
        CHECK(launch(relay_in_warp, 1, block, bytes, nullptr, out.data(), int{rounds}) == cudaSuccess);
        CHECK(out == expected);
    }
}

// Races show for some seeds --------------------------------------------------------------------------
__global__ void race_between_warps(int *out) { // no sync_block before the read
    int *s = reinterpret_cast<int *>(shared_memory());
    s[threadIdx.x] = 1;
    out[threadIdx.x] = s[threadIdx.x ^ 32];
}
__global__ void race_to_overwrite(int *out) { // no sync_block between read and next write
    int *s = reinterpret_cast<int *>(shared_memory());
    s[threadIdx.x] = 1;
    sync_block();
    out[threadIdx.x] = s[threadIdx.x ^ 32];
    s[threadIdx.x] = 2;
}
__global__ void race_in_warp(int *out) { // no sync_warp
    int *s = reinterpret_cast<int *>(shared_memory());
    s[threadIdx.x] = 1;
    out[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void race_midway(int *out) { // warps wait for the block too early: only an interrupted warp shows it
    int *s = reinterpret_cast<int *>(shared_memory());
    s[threadIdx.x] = 0;
    sync_block();
    for (int i = 0; i < 64; ++i) {
        sync_warp();
        s[threadIdx.x] += 1;
    }
    out[threadIdx.x] = s[threadIdx.x ^ 32] % 64 == 0;
}
__global__ void tickets(int *next, int *ticket) { ticket[blockIdx.x * 32 + threadIdx.x] = atomicAdd(next, 1); }

void test_races() {
    for (auto *kernel : {race_between_warps, race_to_overwrite, race_in_warp, race_midway}) {
        int right = 0;
        for (uint64_t seed = 0; seed < 64; ++seed) {
            razor_shim_set_seed(seed);
            std::vector<int> out(64);
            launch(kernel, 1, 64, 256, nullptr, out.data());
            right += std::all_of(out.begin(), out.end(), [](int x) { return x == 1; });
        }
        CHECK(right < 64);
    }
    std::set<std::vector<int>> block_orders, lane_orders;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        for (int again = 0; again < 2; ++again) { // the same seed, the same order
            razor_shim_set_seed(seed);
            int next = 0;
            std::vector<int> ticket(50 * 32), blocks, lanes;
            launch(tickets, 50, 32, 0, nullptr, &next, ticket.data());
            CHECK(next == 50 * 32);
            for (int i = 0; i < 50; ++i) blocks.push_back(ticket[i * 32] / 32);
            for (int i = 0; i < 32; ++i) lanes.push_back(ticket[i] % 32);
            block_orders.insert(blocks);
            lane_orders.insert(lanes);
            std::sort(ticket.begin(), ticket.end());
            for (int i = 0; i < next; ++i) CHECK(ticket[i] == i);
        }
    }
    CHECK(block_orders.size() == kSeeds && lane_orders.size() == kSeeds);
    razor_shim_set_seed(0);
}

// Matrices -----------------------------------------------------------------------------------------
__global__ void load_both(const uint16_t *matrices, uint32_t *plain, uint32_t *transposed) {
    // Rows of the four matrices in an order of their own, 16 bytes apart each.
    const int l = static_cast<int>(threadIdx.x), place = l * 11 % 32;
    char *s = shared_memory();
    memcpy(s + place * 16, matrices + l * 8, 16);
    sync_warp();
    uint32_t r[4];
    load_matrix_x4(r, s + place * 16);
    for (int i = 0; i < 4; ++i) plain[l * 4 + i] = r[i];
    load_matrix_x4_trans(r, s + place * 16);
    for (int i = 0; i < 4; ++i) transposed[l * 4 + i] = r[i];
}

void test_load_matrix() {
    uint16_t m[4][8][8];
    for (int i = 0; i < 256; ++i) m[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i * 251 + 7);
    uint32_t plain[32][4], transposed[32][4];
    CHECK(launch(load_both, 1, 32, 512, nullptr, const_cast<const uint16_t *>(&m[0][0][0]), &plain[0][0],
                 &transposed[0][0]) == cudaSuccess);
    for (int l = 0; l < 32; ++l) {
        const int r = l / 4, q = l % 4;
        for (int i = 0; i < 4; ++i) {
            CHECK(plain[l][i] == (m[i][r][2 * q] | static_cast<uint32_t>(m[i][r][2 * q + 1]) << 16));
            CHECK(transposed[l][i] == (m[i][2 * q][r] | static_cast<uint32_t>(m[i][2 * q + 1][r]) << 16));
        }
    }
}

__global__ void load_strided(int stride) {
    uint32_t r[4];
    load_matrix_x4(r, shared_memory() + static_cast<int>(threadIdx.x) * stride);
}

void test_bank_conflicts() {
    const struct { int stride; uint64_t conflicts; } cases[] = {
        {16, 0}, {144, 0}, {128, 28}, {64, 12}, {32, 4}, {0, 0}};
    for (const auto &c : cases) {
        const uint64_t before = razor_shim_bank_conflicts();
        CHECK(launch(load_strided, 1, 32, 8192, nullptr, int{c.stride}) == cudaSuccess);
        CHECK(razor_shim_bank_conflicts() - before == c.conflicts);
    }
}

// Fragments by the definition in device.cuh.
template <typename T>
__global__ void mma_fragments(const T *a, const T *b, float *c) { // a[16][16], b[16][8], c[16][8]
    const int l = static_cast<int>(threadIdx.x) % 32, r = l / 4, q = l % 4;
    const auto two = [](T low, T high) {
        return bit_cast<uint16_t>(low) | static_cast<uint32_t>(bit_cast<uint16_t>(high)) << 16;
    };
    uint32_t fa[4];
    for (int i = 0; i < 4; ++i) {
        const T *row = a + (r + i % 2 * 8) * 16 + i / 2 * 8 + 2 * q;
        fa[i] = two(row[0], row[1]);
    }
    const uint32_t b0 = two(b[2 * q * 8 + r], b[(2 * q + 1) * 8 + r]);
    const uint32_t b1 = two(b[(2 * q + 8) * 8 + r], b[(2 * q + 9) * 8 + r]);
    float *at[4] = {c + r * 8 + 2 * q, c + r * 8 + 2 * q + 1, c + (r + 8) * 8 + 2 * q, c + (r + 8) * 8 + 2 * q + 1};
    float fc[4];
    for (int i = 0; i < 4; ++i) fc[i] = *at[i];
    mma<T>(fc, fa, b0, b1);
    for (int i = 0; i < 4; ++i) *at[i] = fc[i];
}

// As attention does it: operands by load_matrix, the left from [m][k], the right from [n][k] or, transposed, [k][n].
template <typename T>
__global__ void mma_loaded(const T *a, const T *b, float *c, bool b_is_nk) {
    const int l = static_cast<int>(threadIdx.x), r = l / 4, q = l % 4;
    T *sa = reinterpret_cast<T *>(shared_memory()), *sb = sa + 256;
    for (int i = l; i < 256; i += 32) sa[i] = a[i];
    for (int i = l; i < 128; i += 32) sb[b_is_nk ? i % 8 * 16 + i / 8 : i] = b[i];
    sync_warp();
    uint32_t fa[4], fb[4];
    load_matrix_x4(fa, sa + l % 16 * 16 + l / 16 * 8);
    if (b_is_nk) {
        load_matrix_x4(fb, sb + l % 8 * 16 + l / 8 % 2 * 8);
    } else {
        load_matrix_x4_trans(fb, sb + l % 16 * 8);
    }
    float fc[4] = {};
    mma<T>(fc, fa, fb[0], fb[1]);
    for (int i = 0; i < 4; ++i) c[(r + i / 2 * 8) * 8 + 2 * q + i % 2] = fc[i];
}

template <typename T>
void test_mma() {
    std::mt19937 random(7);
    T a[16][16], b[16][8];
    float start[16][8], c[16][8];
    const auto number = [&](int largest, float step) {
        return static_cast<float>(static_cast<int>(random() % (2 * largest + 1)) - largest) * step;
    };
    for (auto &row : a) for (T &x : row) x = from_float<T>(number(20, 0.125f));
    for (auto &row : b) for (T &x : row) x = from_float<T>(number(30, 0.25f));
    for (auto &row : start) for (float &x : row) x = number(1000, 1);
    double expected[16][8]; // every sum is exact
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            expected[i][j] = 0;
            for (int k = 0; k < 16; ++k) expected[i][j] += static_cast<double>(to_float(a[i][k])) * to_float(b[k][j]);
        }
    }
    const T *pa = &a[0][0], *pb = &b[0][0];
    memcpy(c, start, sizeof(c));
    CHECK(launch(mma_fragments<T>, 1, 32, 0, nullptr, pa, pb, &c[0][0]) == cudaSuccess);
    for (int i = 0; i < 16; ++i) for (int j = 0; j < 8; ++j) CHECK(c[i][j] == start[i][j] + expected[i][j]);
    for (const bool b_is_nk : {false, true}) {
        CHECK(launch(mma_loaded<T>, 1, 32, 768, nullptr, pa, pb, &c[0][0], bool{b_is_nk}) == cudaSuccess);
        for (int i = 0; i < 16; ++i) for (int j = 0; j < 8; ++j) CHECK(c[i][j] == expected[i][j]);
    }
}

// Every 16-bit number through the multiplication, on either side: its conversion is another one than the header's.
template <typename T>
void test_mma_conversion(bool is_half) {
    for (uint32_t first = 0; first < 65536; first += 8) {
        uint16_t a[4][8][8] = {}, b[16][8] = {};
        float c[16][8] = {};
        const uint16_t one = bit_cast<uint16_t>(from_float<T>(1.f));
        for (int i = 0; i < 8; ++i) {
            a[0][i][i] = static_cast<uint16_t>(first + i); // rows 0-7: the diagonal times ones
            b[i][i] = one;
            a[3][i][i] = one;                              // rows 8-15: ones times the diagonal
            b[8 + i][i] = static_cast<uint16_t>(first + i);
        }
        // Zero times infinity or NaN is NaN: only finite numbers leave the other elements alone.
        razor_shim::multiply(&c[0][0], &a[0][0][0], &b[0][0], is_half);
        const auto number = [&](int i) { return to_float(bit_cast<T>(static_cast<uint16_t>(first + i))); };
        if (number(0) - number(0) != 0 || number(7) - number(7) != 0) continue; // times zero they are NaN everywhere
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 8; ++j) CHECK(c[i][j] == (i % 8 == j ? number(j) : 0.f));
        }
    }
    // Infinity and NaN.
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const float x = to_float(bit_cast<T>(static_cast<uint16_t>(bits)));
        if (x - x == 0) continue;
        uint16_t a[4][8][8] = {}, b[16][8];
        float c[16][8] = {};
        a[0][2][3] = static_cast<uint16_t>(bits);
        std::fill_n(&b[0][0], 128, bit_cast<uint16_t>(from_float<T>(1.f)));
        razor_shim::multiply(&c[0][0], &a[0][0][0], &b[0][0], is_half);
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 8; ++j) CHECK(i == 2 ? (x == x ? c[i][j] == x : c[i][j] != c[i][j]) : c[i][j] == 0);
        }
    }
}

// Asynchronous copies ------------------------------------------------------------------------------
__global__ void copy_stages(const uint4 *from, uint32_t *seen) {
    char *s = shared_memory() + threadIdx.x * 64;
    const auto word = [&](int i) { return *reinterpret_cast<const uint32_t *>(s + i * 16); };
    for (int i = 0; i < 64; ++i) s[i] = 1;
    copy_async16(s, from);
    seen[0] = word(0);                     // issued: poison, not 1
    copy_commit();
    copy_async16(s + 16, from + 1);
    copy_commit();
    copy_async16(s + 32, nullptr, false);  // zeros, address not read
    copy_commit();
    copy_async16(s + 48, from + 3);        // never committed
    copy_wait<3>();
    seen[1] = word(0);
    copy_wait<2>();
    seen[2] = word(0);
    seen[3] = word(1);
    copy_wait<1>();
    seen[4] = word(1);
    seen[5] = word(2);
    copy_wait<0>();
    seen[6] = word(2);
    seen[7] = word(3);
    copy_commit();
    copy_commit();                         // an empty group counts
    copy_wait<1>();
    seen[8] = word(3);
}
// Without the wait of every copier and a sync_block, readers get poison.
__global__ void copy_for_others(const uint4 *from, uint32_t *out, bool barrier) {
    char *s = shared_memory();
    copy_async16(s + threadIdx.x * 16, from + threadIdx.x);
    copy_commit();
    copy_wait<0>();
    if (barrier) sync_block();
    out[threadIdx.x] = *reinterpret_cast<const uint32_t *>(s + (63 - threadIdx.x) * 16);
}

void test_copies() {
    std::vector<uint4> from(64);
    for (unsigned i = 0; i < 64; ++i) from[i] = {100 + i, 0, 0, 0};
    uint32_t seen[9];
    const uint4 *global = from.data();
    CHECK(launch(copy_stages, 1, 1, 64, nullptr, global, static_cast<uint32_t *>(seen)) == cudaSuccess);
    const uint32_t expected[9] = {kPoison, kPoison, 100, kPoison, 101, kPoison, 0, kPoison, 103};
    CHECK(std::equal(expected, expected + 9, seen));
    bool wrong = false;
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        razor_shim_set_seed(seed);
        for (const bool barrier : {true, false}) {
            std::vector<uint32_t> out(64);
            launch(copy_for_others, 1, 64, 1024, nullptr, global, out.data(), bool{barrier});
            for (unsigned i = 0; i < 64; ++i) {
                if (barrier) CHECK(out[i] == 163 - i);
                else wrong |= out[i] == kPoison;
            }
        }
    }
    CHECK(wrong);
    razor_shim_set_seed(0);
}

// Shared memory and launches -----------------------------------------------------------------------
__global__ void look_and_soil(int *clean, int bytes) {
    char *s = shared_memory();
    if (threadIdx.x == 0) {
        clean[blockIdx.x] = std::all_of(s, s + bytes, [](char c) { return c == '\xff'; }) &&
                            reinterpret_cast<uintptr_t>(s) % 16 == 0;
        memset(s, 0, static_cast<size_t>(bytes));
    }
}
struct Large {
    int numbers[500];
};
__global__ void sum_up(const __grid_constant__ Large large, int *out, float *total) {
    int sum = 0;
    for (const int x : large.numbers) sum += x;
    atomicAdd(out, sum);
    atomicAdd(total, 0.5f);
}
__global__ void nothing() {}

void test_launches() {
    for (const int bytes : {0, 1, 17, 4096, 232448}) {
        int clean[6] = {};
        const size_t shared = static_cast<size_t>(bytes);
        CHECK(launch(look_and_soil, 6, 64, shared, nullptr, static_cast<int *>(clean), int{bytes}) == cudaSuccess);
        for (const int c : clean) CHECK(c == 1);
    }
    Large large;
    int expected = 0, sum = 0;
    float total = 0;
    for (int i = 0; i < 500; ++i) expected += large.numbers[i] = i * i % 97;
    CHECK(launch(sum_up, 3, 33, 0, nullptr, large, &sum, &total) == cudaSuccess);
    CHECK(sum == expected * 99 && total == 49.5f);

    cudaGetLastError();
    CHECK(launch(nothing, 0, 32, 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(launch(nothing, 1, 0, 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(launch(nothing, 1, 1025, 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(launch(nothing, 1, dim3(1, 1, 65), 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(launch(nothing, dim3(1, 65536), 32, 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(launch(nothing, dim3(1, 1, 65536), 32, 0, nullptr) == cudaErrorInvalidConfiguration);
    CHECK(cudaPeekAtLastError() == cudaErrorInvalidConfiguration);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    CHECK(launch(nothing, 1, 32, 232449, nullptr) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 232449) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448) == cudaSuccess);

    razor_shim_fail_launch(2);
    CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaSuccess);
    CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaErrorLaunchFailure);
    CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaSuccess);
    razor_shim_set_seed(0);
    CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaSuccess && razor_shim_launches() == 1);

    int value = 0;
    razor_shim_set_device(132, 101376);
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 132);
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && value == 101376);
    CHECK(launch(nothing, 1, 32, 101377, nullptr) == cudaErrorInvalidValue);
    razor_shim_set_device(0, 0);
    CHECK(cudaGetDevice(&value) == cudaErrorNoDevice);
    CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaErrorNoDevice);
    razor_shim_set_device(4, 232448);
    CHECK(cudaGetDevice(&value) == cudaSuccess && value == 0);
    cudaGetLastError();

    char bytes[8] = "abcdefg", copy[8];
    CHECK(cudaMemcpyAsync(copy, bytes, 8, cudaMemcpyDefault) == cudaSuccess && !strcmp(copy, "abcdefg"));
    CHECK(cudaMemsetAsync(copy, 'x', 3) == cudaSuccess && !strcmp(copy, "xxxdefg"));
}

void test_exp2() {
    CHECK(exp2_fast(0.f) == 1.f && exp2_fast(-3.f) == 0.125f && exp2_fast(10.f) == 1024.f);
    CHECK(exp2_fast(-126.f) == 1.17549435e-38f && exp2_fast(-126.5f) == 0.f && exp2_fast(kMasked) == 0.f);
    CHECK(exp2_fast(128.f) == CUDART_INF_F && exp2_fast(CUDART_INF_F) == CUDART_INF_F);
    CHECK(exp2_fast(-CUDART_INF_F) == 0.f);
    CHECK(exp2_fast(CUDART_NAN_F) != exp2_fast(CUDART_NAN_F));
}

int run_checks() {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        razor_shim_set_seed(seed);
        test_indices();
        test_shuffle<int>(3);
        test_shuffle<float>(0.25f);
        test_shuffle<double>(0.1);
        test_shuffle<unsigned long long>(1ull << 40);
        test_barriers();
        test_load_matrix();
        test_mma<__half>();
        test_mma<__nv_bfloat16>();
    }
    test_races();
    test_bank_conflicts();
    test_mma_conversion<__half>(true);
    test_mma_conversion<__nv_bfloat16>(false);
    test_copies();
    test_launches();
    test_exp2();
    if (failures) {
        printf("%d checks failed\n", failures);
    } else {
        printf("all checks passed\n");
    }
    return failures != 0;
}

// What must end the process -------------------------------------------------------------------------
__global__ void crash_kernel(int what, char *memory) {
    char *s = shared_memory(); // 1024 bytes
    const int t = static_cast<int>(threadIdx.x);
    uint32_t r[4];
    switch (what) {
    case 0: t == 35 ? (void)shuffle(t, 0) : sync_warp(); break;
    case 1:
        if (t == 35) sync_warp();
        else sync_warp();
        sync_warp();
        break;
    case 2:
        if (t == 35) return;
        sync_warp();
        break;
    case 3:
        if (t >= 32) return;
        sync_block();
        break;
    case 4:
        if (t >= 32) sync_block();
        else sync_block();
        break;
    case 5:
        if (t == 35) return;
        sync_block();
        break;
    case 6: copy_async16(s + 8, memory); break;
    case 7: copy_async16(s, memory + 4); break;
    case 8: copy_async16(s + 1024, memory); break;
    case 9: copy_async16(memory, memory); break;
    case 10: load_matrix_x4(r, s + 2 * t); break;
    case 11: load_matrix_x4_trans(r, s + 16 * (t + 1)); break;
    case 12: memory[t] = static_cast<char>(load_once(memory + 8).x); break;
    case 13: shuffle_xor(t, 32); break;
    case 14: s[1024 + t] = 0; break;
    case 15: s[-1 - t] = 0; break;
    case 16: memory[64] = s[1024]; break;
    case 17: memory[4096 + t] = 1; break;
    case 18: copy_async16(s, memory + 4096); break;
    case 19: *reinterpret_cast<uint4 *>(memory + 4 * t) = uint4{}; break;
    case 20: memory[0] = static_cast<char>(t << (t + 1)); break;
    case 21: {
        float c[4] = {};
        const uint32_t a[4] = {};
        t % 32 == 7 ? mma<__half>(c, a, 0, 0) : mma<__nv_bfloat16>(c, a, 0, 0);
        break;
    }
    }
}

const char *const kCrashes[] = {
    "other_collective", "other_place", "lane_left", "warp_left", "warps_at_other_places", "lane_left_block",
    "copy_to_misaligned", "copy_from_misaligned", "copy_beyond_shared", "copy_to_global", "matrix_misaligned",
    "matrix_beyond_shared", "load_misaligned", "shuffle_beyond_warp", "write_beyond_shared", "write_below_shared",
    "read_beyond_shared", "write_beyond_global", "copy_beyond_global", "write_misaligned", "shift_too_far",
    "other_type"};

int crash(const std::string &name) {
    if (name == "part_of_a_warp") {
        int out[40 * 36];
        launch(shuffle_all<int>, 1, 40, 0, nullptr, static_cast<int *>(out), 1);
        return 0;
    }
    const auto *found = std::find(std::begin(kCrashes), std::end(kCrashes), name);
    if (found == std::end(kCrashes)) return 2;
    std::vector<uint4> memory(256); // 4096 bytes
    launch(crash_kernel, dim3(2, 3), 64, 1024, nullptr, static_cast<int>(found - kCrashes),
           reinterpret_cast<char *>(memory.data()));
    return 0;
}

// Conversions ----------------------------------------------------------------------------------------
template <typename From, typename To, typename F>
int convert(F f) {
    std::vector<From> in(1 << 16);
    std::vector<To> out(in.size());
    for (size_t n; (n = fread(in.data(), sizeof(From), in.size(), stdin)) > 0;) {
        for (size_t i = 0; i < n; ++i) out[i] = f(in[i]);
        if (fwrite(out.data(), sizeof(To), n, stdout) != n) return 1;
    }
    return 0;
}

int convert(const std::string &name) {
    using u8 = uint8_t;
    using u16 = uint16_t;
    if (name == "fp32_fp16") return convert<float, u16>([](float x) { return __float2half_rn(x).bits; });
    if (name == "fp32_bf16") return convert<float, u16>([](float x) { return __float2bfloat16_rn(x).bits; });
    if (name == "fp32_fp8") return convert<float, u8>([](float x) { return to_fp8(x); });
    if (name == "fp16_fp32") return convert<u16, float>([](u16 x) { return __half2float(__half{x}); });
    if (name == "bf16_fp32") return convert<u16, float>([](u16 x) { return __bfloat162float(__nv_bfloat16{x}); });
    if (name == "fp8_fp16") return convert<uint32_t, uint2>([](uint32_t x) { return from_fp8x4<__half>(x); });
    if (name == "fp8_bf16") return convert<uint32_t, uint2>([](uint32_t x) { return from_fp8x4<__nv_bfloat16>(x); });
    if (name == "multiply_fp16") {
        return convert<ushort2, u16>(
            [](ushort2 x) { return __hmul2(__half2{{0}, {x.x}}, __half2{{0}, {x.y}}).y.bits; });
    }
    if (name == "multiply_bf16") {
        return convert<ushort2, u16>(
            [](ushort2 x) { return __hmul2(__nv_bfloat162{{0}, {x.x}}, __nv_bfloat162{{0}, {x.y}}).y.bits; });
    }
    return 2;
}

// Costs --------------------------------------------------------------------------------------------
__global__ void bench_shuffle(int n, float *out) {
    float v = 1;
    for (int i = 0; i < n; ++i) v += shuffle_xor(v, 1) * 0.5f;
    out[threadIdx.x] = v;
}
__global__ void bench_mma(int n, float *out) {
    float c[4] = {};
    const uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    for (int i = 0; i < n; ++i) mma<__half>(c, a, 0x3c003c00, 0x3c003c00);
    out[threadIdx.x] = c[0];
}

int bench() {
    const auto seconds = [](auto f) {
        const auto start = std::chrono::steady_clock::now();
        f();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    std::vector<float> out(128);
    const int n = 200000;
    const uint64_t before = razor_shim_switches();
    const double s = seconds([&] { launch(bench_shuffle, 1, 128, 0, nullptr, int{n}, out.data()); });
    printf("%.0f M switches/s\n", static_cast<double>(razor_shim_switches() - before) / s / 1e6);
    printf("%.0f ns per shuffle of a warp\n", s / n / 4 * 1e9);
    printf("%.0f ns per mma of a warp\n",
           seconds([&] { launch(bench_mma, 1, 128, 0, nullptr, int{n}, out.data()); }) / n / 4 * 1e9);
    alignas(64) uint16_t a[256] = {}, b[128] = {};
    float c[128] = {};
    printf("%.0f ns of it arithmetic\n", seconds([&] {
               for (int i = 0; i < n; ++i) razor_shim::multiply(c, a, b, true);
           }) / n * 1e9);
    printf("%.0f ns per thread of an empty kernel\n",
           seconds([&] { launch(nothing, n / 100, 128, 0, nullptr); }) / (n / 100) / 128 * 1e9);
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    const std::string command = argc > 1 ? argv[1] : "";
    if (argc == 1) return run_checks();
    if (argc == 2 && command == "bench") return bench();
    if (argc == 3 && command == "crash") return crash(argv[2]);
    if (argc == 3 && command == "convert") return convert(std::string(argv[2]));
    fprintf(stderr, "usage: razor_shim_selftest [crash NAME | convert NAME | bench]\n");
    return 2;
}
