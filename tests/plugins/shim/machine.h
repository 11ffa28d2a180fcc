// A block of CUDA threads on one CPU thread: a fiber for each, which runs until it meets the others.
//
// Blocks run one after another. A warp's lanes run one after another from collective to collective; the last lane to
// arrive does the work for all, and goes on. Warps run until the next sync_block, now and then interrupted. The order
// of blocks, warps and lanes comes from a seed, so that code which depends on it fails for some seeds.
//
// What a kernel must not do ends the process, with a line that says which kernel, block and thread: lanes of a warp at
// different collectives, a thread that left before the others met, a misaligned or outlying address in shared memory.
#pragma once

#include "cuda_runtime.h"

namespace razor_shim {

enum class Op : uint8_t {
    kNone, kSyncWarp, kSyncBlock, kShuffle, kShuffleXor, kLoadMatrix, kLoadMatrixTrans, kMmaHalf, kMmaBfloat16, kExit
};

struct Place {
    const char *file;
    int line;
    static constexpr Place here(const char *file, int line) { return {file, line}; }
};

struct Launch {
    const void *kernel; // its address, for messages
    dim3 grid, block;
    size_t shared;
    void (*run_thread)(const void *body);
    const void *body;
};

// Runs all blocks. Refuses what a device refuses: too many threads, too much shared memory, an empty grid.
cudaError_t run(const Launch &launch);

char *shared_memory();
int lane();

// Copies become visible when they are waited for; until then their destination holds NaN.
void copy_async(void *shared, const uint4 &bytes, Place place);
void copy_commit();
void copy_wait(int pending);

void sync_warp(Place place);
void sync_block(Place place);
// words: in, this lane's value; out, the value of lane `source`.
void shuffle(uint32_t *words, int num_words, int source, Op op, Place place);
void load_matrix_x4(uint32_t (&r)[4], const void *row, bool transposed, Place place);
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Op op, Place place);

[[noreturn]] void fail_alignment(const void *address, const char *what, Place place);
inline void check_aligned16(const void *address, const char *what, Place place) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail_alignment(address, what, place);
}

// mma.cpp: c[16][8] += a b. a: four 8x8 matrices (rows 0-7 and 8-15 of columns 0-7, then of columns 8-15); b: [16][8].
void multiply(float *c, const uint16_t *a, const uint16_t *b, bool is_half);

// symbols.cpp: name of the function at this address, demangled, or "?". Valid until the next call.
const char *function_name(const void *address);

// The device that cuda_runtime.h describes.
struct Device {
    int multiprocessors, max_shared;
};
Device device();
cudaError_t report(cudaError_t error); // for cudaGetLastError; returns it

}  // namespace razor_shim
