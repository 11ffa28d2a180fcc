// The steps of a call, in stream order. Each is one file; all of them only enqueue.
//
//   append   rotate queries and keys, store what is new; begin compensation tokens where a sequence begins
//   prefill  attention of contexts
//   decode   attention of generations, splits combined; of the heavy hitters and the token that leaves the window the
//            lowest is folded
//   compact  contexts: choose the heavy hitters, fold the rest of what left the window, move what stays to the ring
//
// x_workspace(p) is what launch_x needs for a call of this size; never shrinks when a number of the call grows.
#pragma once

#include "params.h"

namespace razor {

constexpr int kMaxDecodeBlocks = 640; // thread blocks of a decode launch; bounds the workspace of its splits

struct DeviceInfo {
    int sms;                  // multiprocessors
    int max_shared_per_block; // bytes, opt-in
};

size_t append_workspace(const Params &p); // Params::q, new_k, new_v, in this order, each on a multiple of 256 bytes
size_t prefill_workspace(const Params &p);
size_t decode_workspace(const Params &p); // begins with the ints that append sets to zero
size_t compact_workspace(const Params &p);

// Ints at the beginning of decode's workspace that must be zero when it starts; append zeroes them.
size_t decode_zeroed_ints(const Params &p);

cudaError_t launch_append(const Params &p, int32_t *zeroed, size_t num_zeroed, cudaStream_t stream);
cudaError_t launch_prefill(const Params &p, void *workspace, const DeviceInfo &device, cudaStream_t stream);
cudaError_t launch_decode(const Params &p, void *workspace, const DeviceInfo &device, cudaStream_t stream);
cudaError_t launch_compact(const Params &p, void *workspace, cudaStream_t stream);

}  // namespace razor
