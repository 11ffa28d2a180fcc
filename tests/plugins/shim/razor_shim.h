// What tests may ask of the CPU shim, besides the C API of the library. Exported by librazor_shim.so.
#pragma once

#include <stdint.h>

#define RAZOR_SHIM_API __attribute__((visibility("default")))

extern "C" {

// Order of blocks, warps and lanes from the next launch on. The environment's RAZOR_SHIM_SEED, or 0, until then.
RAZOR_SHIM_API void razor_shim_set_seed(uint64_t seed);

// The device that the runtime API describes: multiprocessors (0 = there is no device) and the most shared memory of a
// block. RAZOR_SHIM_SMS (4) and RAZOR_SHIM_SHARED (232448) until then.
RAZOR_SHIM_API void razor_shim_set_device(int multiprocessors, int max_shared);

// The n-th launch from now on (1 = the next one) fails with cudaErrorLaunchFailure and runs nothing. 0: none does.
RAZOR_SHIM_API void razor_shim_fail_launch(int n);

// Launches since the seed was set. Since the library was loaded: thread switches, and accesses to shared memory that
// load_matrix_x4 would have saved with its rows in other banks.
RAZOR_SHIM_API uint64_t razor_shim_launches(void);
RAZOR_SHIM_API uint64_t razor_shim_switches(void);
RAZOR_SHIM_API uint64_t razor_shim_bank_conflicts(void);
}
