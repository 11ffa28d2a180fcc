// Attention of generations: one query token of each sequence against all rows that its heads keep, and what becomes of
// the token that leaves the window. docs/semantics.md defines the result.
//
// The kernel is bound by the bytes of the cache. Four decisions follow:
//
// * Tensor cores for every group size. The query heads of one KV head are the rows of a 16-row tile, so each key and
//   value is read once for all of them; a group of 1 pads the tile and still issues far fewer instructions than FMAs
//   would. Groups above 16 become several tiles, whose rows come from L2 from the second on.
// * No barrier of the block in the main loop. Each warp runs its own ring of copies over slices of 16 keys.
// * Balance by rows, not by heads. The work of the batch is a line of units (a slice for each warp of a block), items
//   one behind another; an item is a (sequence, KV head, tile). Every block takes an equal piece of the line, wherever
//   items begin and end, so short local heads and long retrieval heads, short and long sequences fill the chip alike.
//   Lengths are read on the device: the same launch serves every replay of a graph.
// * One launch. An item inside one block's piece is finished there. The blocks of a longer one leave partial results,
//   and whoever arrives last combines them: in groups of 16 first, so that an item spread over the whole chip is not
//   combined by a single multiprocessor. Nobody waits for anybody, and sums are always taken in the same order.
//
// What leaves the window of a local head is for the last block of that head, which alone knows that all rows are read
// (decode_fold.cuh). A choice reads the rows of the heavy hitters once more, from L2; local heads come first of a
// sequence, so that other blocks have rows to attend meanwhile.
#pragma once

#include "decode_fold.cuh"
#include "decode_plan.cuh"
#include "decode_warp.cuh"

namespace razor {
namespace decode {

// The end of an item ---------------------------------------------------------------------------------
// Where a thread of the block puts 4 columns of a finished row.
template <typename T, int D>
__device__ __forceinline__ void write_out(const Params &p, const Item &item, int row, int column, float4 o, float sum,
                                          float scale) {
    T *out = static_cast<T *>(p.out) + (static_cast<int64_t>(item.row) * p.num_heads + item.query + row) * D + column;
    const float f = scale / sum;
    *reinterpret_cast<uint2 *>(out) = {pack<T>(o.x * f, o.y * f), pack<T>(o.z * f, o.w * f)};
}

// Combines the partial results of members first, first + step, … of an item; member 0 is in slot 1 of block `owner`,
// member k in slot 0 of block owner + k. Finished: writes the output; else the result replaces that of the first member.
template <typename T, int D, typename C>
__device__ __forceinline__ void combine(const Params &p, Scratch &scratch, float *partials, int owner,
                                        int first, int step, int count, bool finished, float scale) {
    const Item &item = scratch.item;
    const int rows = tile_rows(p), floats = slot_floats(p);
    const auto slot = [&](int i) {
        const int k = first + i * step;
        return partials + static_cast<int64_t>(k ? 2 * (owner + k) : 2 * owner + 1) * floats;
    };
    for (int i = threadIdx.x; i < item.heads * (D / 4); i += C::kThreads) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        float top = kMasked;
#pragma unroll 4
        for (int k = 0; k < count; ++k) top = fmaxf(top, slot(k)[rows * D + row]);
        float4 o{0.f, 0.f, 0.f, 0.f};
        float sum = 0.f;
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
            const float *from = slot(k);
            const float f = exp2_fast(from[rows * D + row] - top);
            const float4 x = *reinterpret_cast<const float4 *>(from + row * D + column);
            sum += f * from[rows * (D + 1) + row];
            o.x += f * x.x;
            o.y += f * x.y;
            o.z += f * x.z;
            o.w += f * x.w;
        }
        if (finished) {
            write_out<T, D>(p, item, row, column, o, sum, scale);
        } else {
            *reinterpret_cast<float4 *>(slot(0) + row * D + column) = o;
            if (column == 0) {
                scratch.max[0][row] = top;
                scratch.sum[0][row] = sum;
            }
        }
    }
    if (finished) return;
    sync_block(); // every thread has read the maxima
    for (int row = threadIdx.x; row < item.heads; row += C::kThreads) {
        slot(0)[rows * D + row] = scratch.max[0][row];
        slot(0)[rows * (D + 1) + row] = scratch.sum[0][row];
    }
}

// What this block wrote becomes visible, then it counts itself. True in the block that is the last of `expected`; it
// sees what all of them wrote. All threads of the block.
__device__ inline bool arrive(int32_t *counter, int expected, Scratch &scratch) {
    __threadfence();
    sync_block();
    if (threadIdx.x == 0) scratch.arrived = atomicAdd(counter, 1);
    sync_block();
    const bool last = scratch.arrived == expected - 1;
    if (last) __threadfence();
    return last;
}

// Merges the warps of the block and, if the item is spread over several blocks, the blocks. Returns true in the one
// block that wrote the output. All threads of the block; the rings are free on return only behind a sync_block.
template <typename T, int D, bool Fp8>
__device__ __forceinline__ bool finish(const Params &p, Attention<D> &a, char *ring, const char *rings,
                                       Scratch &scratch, const Counters &counters, float *partials, int lane,
                                       int warp) {
    using C = Config<D, Fp8>;
    const Item &item = scratch.item;
    const int r = lane / 4, c = lane % 4;
    sync_warp(); // all lanes are done with the ring
    float *tile = reinterpret_cast<float *>(ring);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum = a.sum[i];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int row = r + 8 * i;
        if (c == 0) {
            scratch.max[warp][row] = a.max[i];
            scratch.sum[warp][row] = sum;
        }
        if (row < item.heads) {
            float *to = tile + row * C::kOutPitch;
            if (Fp8) {
#pragma unroll
                for (int j = 0; j < D / 32; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        *reinterpret_cast<float4 *>(to + 32 * j + 8 * c + 4 * e) = {
                            a.o[4 * j][2 * i + e], a.o[4 * j + 1][2 * i + e], a.o[4 * j + 2][2 * i + e],
                            a.o[4 * j + 3][2 * i + e]};
                    }
                }
            } else {
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    *reinterpret_cast<float2 *>(to + 8 * n + 2 * c) = {a.o[n][2 * i], a.o[n][2 * i + 1]};
                }
            }
        }
    }
    sync_block();

    const float scale = Fp8 && p.v_scale ? *p.v_scale : 1.f;
    const bool whole = item.first == 0 && item.last == item.units;
    const int rows = tile_rows(p), floats = slot_floats(p);
    float *slot = partials + static_cast<int64_t>(2 * blockIdx.x + (item.first == 0)) * floats;
    for (int i = threadIdx.x; i < item.heads * (D / 4); i += C::kThreads) {
        const int row = i / (D / 4), column = i % (D / 4) * 4;
        float top = scratch.max[0][row];
#pragma unroll
        for (int w = 1; w < C::kWarps; ++w) top = fmaxf(top, scratch.max[w][row]);
        float4 o{0.f, 0.f, 0.f, 0.f};
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < C::kWarps; ++w) {
            const float f = exp2_fast(scratch.max[w][row] - top);
            const float4 x =
                *reinterpret_cast<const float4 *>(rings + w * C::kRingBytes + (row * C::kOutPitch + column) * 4);
            sum += f * scratch.sum[w][row];
            o.x += f * x.x;
            o.y += f * x.y;
            o.z += f * x.z;
            o.w += f * x.w;
        }
        if (whole) {
            write_out<T, D>(p, item, row, column, o, sum, scale);
        } else {
            *reinterpret_cast<float4 *>(slot + row * D + column) = o;
            if (column == 0) {
                slot[rows * D + row] = top;
                slot[rows * (D + 1) + row] = sum;
            }
        }
    }
    if (whole) return true;

    const Share &share = scratch.share;
    const int owner = block_of_unit(share.total, share.blocks, item.begin);
    const int members = block_of_unit(share.total, share.blocks, item.begin + item.units - 1) - owner + 1;
    const int groups = (members + kGroup - 1) / kGroup;
    const int group = (static_cast<int>(blockIdx.x) - owner) / kGroup, first = group * kGroup;
    const int in_group = members - first < kGroup ? members - first : kGroup;
    const int leader = first ? 2 * (owner + first) : 2 * owner + 1; // slot
    if (!arrive(counters.groups + leader, in_group, scratch)) return false;
    combine<T, D, C>(p, scratch, partials, owner, first, 1, in_group, groups == 1, scale);
    if (groups == 1) return true;
    if (!arrive(counters.items + owner, groups, scratch)) return false;
    combine<T, D, C>(p, scratch, partials, owner, 0, kGroup, groups, true, scale);
    return true;
}

// The kernel -----------------------------------------------------------------------------------------
template <typename T, int D, bool Fp8>
__global__ void __launch_bounds__(Config<D, Fp8>::kThreads, Config<D, Fp8>::kBound)
    decode_kernel(const __grid_constant__ Params p, int32_t *ints, float *partials) {
    using C = Config<D, Fp8>;
    constexpr int kAhead = C::kStages - 1; // slices under way while one is computed
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    char *rings = shared_memory();
    char *ring = rings + warp * C::kRingBytes;
    char *shared_queries = rings + C::kWarps * C::kRingBytes;
    Scratch &scratch = *reinterpret_cast<Scratch *>(shared_queries + C::kQueryBytes);
    static_assert(sizeof(Scratch) <= C::kScratchBytes, "scratch");
    const Counters counters = counters_at(ints);

    if (!find_share<C>(p, scratch)) return;
    const Item &item = scratch.item;
    const float scale = p.scale * kLog2e;
    const float key_scale = Fp8 && p.k_scale ? scale * *p.k_scale : scale;

    for (;;) {
        if (threadIdx.x == 0) next_item<C>(p, scratch.share, scratch.item);
        sync_block();
        if (item.units == 0) break;
        const Source source(head_rows(item.local ? p.local : p.full, item.b, item.head, C::kRowBytes), item, lane);

        // Slices of this warp: keys at, at + kUnit, …
        const int first_unit = item.first > item.comp_units ? item.first - item.comp_units : 0;
        const int last_unit = item.last - item.comp_units;
        const int at = first_unit * C::kUnit + warp * kSlice;
        int slices = at < source.count ? (source.count - at + C::kUnit - 1) / C::kUnit : 0;
        if (slices > last_unit - first_unit) slices = last_unit - first_unit; // <= 0: compensation tokens only
        const int place = at + lane % kSlice;

        uint64_t where[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) where[i] = i < slices ? source.find(place + i * C::kUnit) : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (i < slices) {
                start_copy<D, Fp8>(ring + i * C::kStageBytes, where[i], lane);
            } else {
                copy_commit();
                copy_commit();
            }
        }
        uint64_t next = kAhead < slices ? source.find(place + kAhead * C::kUnit) : 0;

        const char *q = static_cast<const char *>(p.q) +
                        (static_cast<int64_t>(item.row) * p.num_heads + item.query) * D * 2;
        Queries<D, Fp8> queries;
        if constexpr (C::kQueriesInShared) {
            share_queries<D, Fp8>(shared_queries, q, item.heads);
            sync_block();
        } else {
            load_queries<D, Fp8>(queries, q, item.heads, lane);
        }
        const bool biased = p.position == RAZOR_ALIBI;
        float slope[2] = {0.f, 0.f};
        if (biased) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = lane / 4 + 8 * i;
                if (row < item.heads) slope[i] = p.slopes[item.query + row] * kLog2e;
            }
        }

        Attention<D> attention;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            attention.max[i] = kMasked;
            attention.sum[i] = 0.f;
        }
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) attention.o[t][i] = 0.f;
        }

        // Compensation tokens, while the first copies are under way.
        const bool has_comp = item.comp_units ? item.first < item.comp_units : item.first == 0;
        if (has_comp && item.dropped > p.policy.heavy_hitters && p.policy.comp_tokens) {
            const int comp_tokens = p.policy.comp_tokens;
            const HeadRows rows = head_rows(p.local, item.b, item.head, C::kRowBytes);
            const HeadComp comp = head_comp(p, rows, item.b, item.head);
            const float middle = static_cast<float>(p.policy.sinks) + 0.5f * static_cast<float>(item.dropped - 1);
            const float distance = static_cast<float>(item.past) - middle;
            const float bias[2] = {-slope[0] * distance, -slope[1] * distance};
            const float value_scale = Fp8 && p.v_scale ? 1.f / *p.v_scale : 1.f;
            // A single slice rides along with the warp that has the fewest keys.
            const int units = item.last < item.comp_units ? item.last : item.comp_units;
            const int first = item.comp_units ? item.first * C::kWarps + warp : warp - (C::kWarps - 1);
            const int last = item.comp_units ? units * C::kWarps : 1;
            for (int slice = first; slice < last && slice * kSlice < comp_tokens; slice += C::kWarps) {
                if (slice < 0) continue;
                attend_comp<T, D, Fp8>(attention, queries, shared_queries, comp, slice * kSlice, comp_tokens, scale,
                                       value_scale, bias, lane);
            }
        }

        int stage = 0, free_stage = kAhead;
        for (int i = 0; i < slices; ++i) {
            const char *keys = ring + stage * C::kStageBytes;
            copy_wait<2 * (kAhead - 1) + 1>();
            sync_warp(); // keys of slice i are here, and all lanes are done with slice i - 1
            if (i + kAhead < slices) {
                start_copy<D, Fp8>(ring + free_stage * C::kStageBytes, next, lane);
                // Where the slice after that is: the block table answers while copies are under way.
                next = source.find(place + (i + kAhead + 1) * C::kUnit);
            } else {
                copy_commit();
                copy_commit();
            }

            float s[2][4];
            dot_keys<T, D, Fp8>(s, queries, shared_queries, keys, lane);
            const int first = at + i * C::kUnit;
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[t][e] *= key_scale;
            }
            if (biased) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int k = first + 8 * t + lane % 4 * 2 + (e & 1);
                        const int position = k < p.policy.sinks ? k : k + item.dropped;
                        s[t][e] -= slope[e >> 1] * static_cast<float>(item.past - position);
                    }
                }
            }
            if (first + kSlice > source.count) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if (first + 8 * t + lane % 4 * 2 + (e & 1) >= source.count) s[t][e] = kMasked;
                    }
                }
            }
            uint32_t weights[4];
            weigh<T, D, false>(attention, s, weights);

            copy_wait<2 * kAhead>();
            sync_warp(); // values
            add_values<T, D, Fp8>(attention, weights, keys + C::kTileBytes, lane);
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
            free_stage = free_stage + 1 == C::kStages ? 0 : free_stage + 1;
        }

        const bool wrote = finish<T, D, Fp8>(p, attention, ring, rings, scratch, counters, partials, lane, warp);
        // All blocks of the item have read the rows and the compensation tokens.
        if (wrote && item.local && (p.policy.heavy_hitters || p.policy.comp_tokens) &&
            p.policy.dropped(item.past + 1) > item.dropped) {
            const int tiles = tiles_of(p);
            int32_t *counter =
                counters.heads + static_cast<int64_t>(item.b - p.num_contexts) * p.num_local + item.head;
            if (tiles == 1 || arrive(counter, tiles, scratch)) {
                // Which of the two spills nothing on any chip (resources.md).
                if constexpr (D == 256 && !Fp8) leave_window<T, D, Fp8>(p, scratch, lane, warp);
                else leave_window_apart<T, D, Fp8>(p, scratch, lane, warp);
            }
        }
        sync_block(); // rings and scratch are free again
    }
}

}  // namespace decode

// Enqueues the kernel of one instantiation.
template <typename T, int D, bool Fp8>
cudaError_t run_decode(const Params &p, int32_t *ints, float *partials, const DeviceInfo &device, cudaStream_t stream) {
    using C = decode::Config<D, Fp8>;
    // A block's shared memory costs the multiprocessor 1 KiB more, and it has 1 KiB more than a block may ask for.
    int resident = (device.max_shared_per_block + 1024) / (C::kSharedBytes + 1024);
    resident = resident < 1 ? 1 : resident < C::kResident ? resident : C::kResident;
    int64_t blocks = static_cast<int64_t>(device.sms) * resident;
    if (blocks > kMaxDecodeBlocks) blocks = kMaxDecodeBlocks;

    // Upper bound of the units, from the longest past.
    const int past = p.max_past < p.max_seq_len ? p.max_past : p.max_seq_len;
    int64_t local_rows = static_cast<int64_t>(past) + 1;
    if (p.num_local) {
        const int64_t kept = static_cast<int64_t>(p.policy.sinks) + p.policy.heavy_hitters + p.policy.window(past) + 1;
        if (kept < local_rows) local_rows = kept;
    }
    const int64_t local_units = C::units(static_cast<int>(local_rows)) + C::comp_units(p.policy.comp_tokens);
    const int64_t units = (p.num_retrieval * static_cast<int64_t>(C::units(past + 1)) + p.num_local * local_units) *
                          decode::tiles_of(p) * p.num_generations();
    const int64_t useful = (units + decode::kMinUnits - 1) / decode::kMinUnits;
    if (blocks > useful) blocks = useful;
    if (blocks < 1) blocks = 1;
    return launch(decode::decode_kernel<T, D, Fp8>, dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                  C::kSharedBytes, stream, p, ints, partials);
}

}  // namespace razor
