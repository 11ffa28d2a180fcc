#include "machine.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "fiber.h"
#include "razor_shim.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace razor_shim {
namespace {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kCanary = 256; // bytes on both sides of shared memory that must not change

struct Copy {
    char *to;
    uint4 bytes;
};

struct Warp;

struct Fiber : Context {
    Warp *warp;
    int lane;
    uint3 thread;
    std::vector<Copy> copies;       // issued, not delivered
    std::vector<size_t> group_ends; // of committed groups, as counts of `copies`
};

struct Warp {
    // What lanes bring to a collective and take from it; mma's operands as the matrices they are.
    alignas(64) uint32_t a[4][kLanes];      // 8x8 each: lane 4 r + q has columns 2q, 2q+1 of row r
    alignas(64) uint16_t b[16][8];
    alignas(64) float c[2][kLanes][2];
    alignas(64) uint32_t values[2][kLanes]; // shuffle
    uint8_t sources[kLanes];
    const char *rows[kLanes];               // load_matrix
    alignas(64) uint32_t results[4][kLanes];

    Fiber *lanes;                           // [size]
    int size;
    uint8_t order[kLanes];                  // in which lanes run
    int cursor;                             // index in order of the lane that runs, or will when this warp goes on
    int arrived;                            // lanes at the collective
    Op op;                                  // which one; kNone before the first lane
    Place place;
    int first;                              // the lane that came first
    int ready_index;                        // in Machine::ready; -1: at sync_block, or gone
};

struct Machine {
    std::mutex mutex; // one launch at a time
    bool running = false;
    const Launch *launch = nullptr;
    Context outside; // the launching thread
    Fiber *current = nullptr;
    std::unique_ptr<Fiber[]> fibers;
    int num_fibers = 0; // that have a stack
    std::unique_ptr<Warp[]> warps;
    int num_warps = 0;
    Warp *ready[kMaxThreads / kLanes];
    int num_ready = 0, num_waiting = 0, num_gone = 0;
    Warp *barrier_first = nullptr;

    char *memory = nullptr; // canary, shared memory, canary
    char *shared = nullptr;
    size_t shared_bytes = ~size_t{0};

    uint64_t seed = 0, random = 1, launches = 0, switches = 0, bank_conflicts = 0;
    int fail_in = 0;
};

uint64_t environment_seed() {
    const char *text = getenv("RAZOR_SHIM_SEED");
    return text ? strtoull(text, nullptr, 0) : 0;
}

Machine &machine_of_process() {
    static Machine *m = [] {
        auto *made = new Machine; // for ever: fibers' stacks are
        made->seed = environment_seed();
        return made;
    }();
    return *m;
}
Machine &m = machine_of_process();

// Random numbers -----------------------------------------------------------------------------------------------------
uint64_t mix(uint64_t x) { // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
uint32_t random() { // xorshift64*
    m.random ^= m.random >> 12;
    m.random ^= m.random << 25;
    m.random ^= m.random >> 27;
    return static_cast<uint32_t>(m.random * 0x2545f4914f6cdd1du >> 32);
}
uint32_t random_below(uint32_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(random()) * n >> 32); }

template <typename T>
void shuffle_order(T *items, uint32_t n) {
    for (uint32_t i = n; i > 1; --i) std::swap(items[i - 1], items[random_below(i)]);
}

// Messages -----------------------------------------------------------------------------------------------------------
const char *name(Op op) {
    static const char *const names[] = {
        "nothing", "sync_warp", "sync_block", "shuffle", "shuffle_xor", "load_matrix_x4", "load_matrix_x4_trans",
        "mma<__half>", "mma<__nv_bfloat16>", "the kernel's end"};
    return names[static_cast<int>(op)];
}

__attribute__((format(printf, 1, 2), noreturn, cold)) void fail(const char *format, ...) {
    fprintf(stderr, "razor shim: ");
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    if (m.launch) {
        fprintf(stderr, "\n    in %s\n    block (%u, %u, %u)", function_name(m.launch->kernel), blockIdx.x, blockIdx.y,
                blockIdx.z);
        if (m.current) {
            fprintf(stderr, ", thread (%u, %u, %u) = lane %d of warp %d", threadIdx.x, threadIdx.y, threadIdx.z,
                    m.current->lane, static_cast<int>(m.current->warp - m.warps.get()));
        }
        fprintf(stderr, "; seed %llu, launch %llu", static_cast<unsigned long long>(m.seed),
                static_cast<unsigned long long>(m.launches));
    }
    fprintf(stderr, "\n");
    fflush(nullptr);
    abort();
}

struct Text {
    char chars[320];
};
Text at(const char *what, Place place) {
    Text t;
    if (place.file == nullptr) {
        snprintf(t.chars, sizeof(t.chars), "%s", what);
    } else {
        const char *slash = strrchr(place.file, '/');
        snprintf(t.chars, sizeof(t.chars), "%s (%s:%d)", what, slash ? slash + 1 : place.file, place.line);
    }
    return t;
}
Text at(Op op, Place place) { return at(name(op), place); }

// Scheduling ---------------------------------------------------------------------------------------------------------
inline void go(Fiber &to) {
    Fiber &from = *m.current;
    if (&from == &to) return;
    m.current = &to;
    ++m.switches;
    threadIdx = to.thread;
    switch_context(from, to);
}

inline void go(Warp &to) { go(to.lanes[to.order[to.cursor]]); }

void set_ready(Warp &w) {
    w.ready_index = m.num_ready;
    m.ready[m.num_ready++] = &w;
}
void set_not_ready(Warp &w) {
    Warp *last = m.ready[--m.num_ready];
    m.ready[w.ready_index] = last;
    last->ready_index = w.ready_index;
    w.ready_index = -1;
}

// Another order from here on; the running lane stays the running lane.
void new_order(Warp &w) {
    const uint8_t running = w.order[w.cursor];
    shuffle_order(w.order, static_cast<uint32_t>(w.size));
    w.cursor = static_cast<int>(std::find(w.order, w.order + w.size, running) - w.order);
}

__attribute__((noinline, cold)) void fail_mismatch(const Warp &w, Op op, Place place) {
    fail("lanes of a warp at different places: this lane at %s, lane %d at %s", at(op, place).chars, w.first,
         at(w.op, w.place).chars);
}

// One more lane of the warp has come. True for the last, which does the work, resets `arrived`, and goes on; the others
// leave with wait().
inline bool arrive(Warp &w, Op op, Place place) {
    if (w.arrived == 0) {
        w.op = op;
        w.place = place;
        w.first = m.current->lane;
    } else if (w.op != op || w.place.line != place.line) {
        fail_mismatch(w, op, place);
    }
    return ++w.arrived == w.size;
}
inline void wait(Warp &w) {
    if (++w.cursor == w.size) w.cursor = 0;
    go(w);
}

// After a collective: now and then other orders, other warps.
inline void leave(Warp &w) {
    w.arrived = 0;
    const uint32_t r = random();
    if ((r & 31u) == 0) {
        new_order(w);
    } else if ((r & 31u) == 1) {
        go(*m.ready[random_below(static_cast<uint32_t>(m.num_ready))]);
    }
}

__attribute__((noinline, cold)) void fail_part(const Warp &w, Op op, Place place) {
    fail("%s in a warp of %d lanes", at(op, place).chars, w.size);
}
inline Warp &whole_warp(Op op, Place place) {
    Warp &w = *m.current->warp;
    if (w.size != kLanes) fail_part(w, op, place);
    return w;
}

// The warp is at sync_block.
void meet_block(Warp &w) {
    w.arrived = 0;
    if (m.num_gone) {
        fail("%s: %d of the block's %d warps have left the kernel", at(w.op, w.place).chars, m.num_gone, m.num_warps);
    }
    if (m.num_waiting == 0) {
        m.barrier_first = &w;
    } else if (m.barrier_first->place.line != w.place.line) {
        fail("warps of a block at different places: this warp at %s, warp %d at %s", at(w.op, w.place).chars,
             static_cast<int>(m.barrier_first - m.warps.get()), at(m.barrier_first->op, m.barrier_first->place).chars);
    }
    set_not_ready(w);
    if (++m.num_waiting == m.num_warps) {
        m.num_waiting = 0;
        for (int i = 0; i < m.num_warps; ++i) set_ready(m.warps[i]);
    }
    go(*m.ready[random_below(static_cast<uint32_t>(m.num_ready))]);
}

// The warp has left the kernel.
void leave_kernel(Warp &w) {
    w.arrived = 0;
    ++m.num_gone;
    set_not_ready(w);
    if (m.num_waiting) {
        fail("this warp has left the kernel, %d others wait at %s", m.num_waiting,
             at(m.barrier_first->op, m.barrier_first->place).chars);
    }
    if (m.num_ready) {
        go(*m.ready[random_below(static_cast<uint32_t>(m.num_ready))]);
    } else {
        Fiber &from = *m.current;
        m.current = nullptr;
        switch_context(from, m.outside);
    }
}

// What every fiber runs: one thread of a block after another.
void loop() {
    arrived_first(m.outside);
    for (;;) {
        m.launch->run_thread(m.launch->body);
        Fiber &f = *m.current;
        f.copies.clear(); // those that nobody waited for have nobody to see them
        f.group_ends.clear();
        Warp &w = *f.warp;
        if (arrive(w, Op::kExit, {nullptr, 0})) {
            leave_kernel(w);
        } else {
            wait(w);
        }
    }
}

void prepare_threads(dim3 block) {
    if (!m.fibers) {
        m.fibers.reset(new Fiber[kMaxThreads]);
        m.warps.reset(new Warp[kMaxThreads / kLanes]());
    }
    const int threads = static_cast<int>(block.x * block.y * block.z);
    for (; m.num_fibers < threads; ++m.num_fibers) {
        make_context(m.fibers[m.num_fibers], loop, static_cast<unsigned>(m.num_fibers));
    }
    m.num_warps = (threads + kLanes - 1) / kLanes;
    for (int i = 0; i < threads; ++i) {
        Fiber &f = m.fibers[i];
        const unsigned u = static_cast<unsigned>(i);
        f.warp = &m.warps[i / kLanes];
        f.lane = i % kLanes;
        f.thread = {u % block.x, u / block.x % block.y, u / block.x / block.y};
    }
    for (int i = 0; i < m.num_warps; ++i) {
        Warp &w = m.warps[i];
        w.lanes = &m.fibers[i * kLanes];
        w.size = std::min(kLanes, threads - i * kLanes);
    }
}

void prepare_shared(size_t bytes) {
    if (bytes == m.shared_bytes) return;
    // Exactly this many bytes, on a multiple of 16 and of no more: the sanitizer sees the first byte behind them.
    free(m.memory);
    const size_t canary = RAZOR_SHIM_ASAN ? 0 : kCanary;
    m.memory = static_cast<char *>(malloc(bytes + 2 * canary));
    if (m.memory == nullptr) fail("no memory");
    m.shared = m.memory + canary;
    m.shared_bytes = bytes;
    memset(m.memory, 0xff, bytes + 2 * canary);
}

void check_canaries() {
    if (RAZOR_SHIM_ASAN) return;
    const auto changed = [](const char *p) { return std::any_of(p, p + kCanary, [](char c) { return c != '\xff'; }); };
    if (changed(m.memory)) fail("something wrote below shared memory");
    if (changed(m.shared + m.shared_bytes)) {
        fail("something wrote beyond the %zu bytes of shared memory", m.shared_bytes);
    }
}

void run_block(uint64_t index) {
    const dim3 grid = m.launch->grid;
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    memset(m.shared, 0xff, m.shared_bytes); // NaN in every type
    m.num_ready = m.num_waiting = m.num_gone = 0;
    for (int i = 0; i < m.num_warps; ++i) {
        Warp &w = m.warps[i];
        for (int l = 0; l < w.size; ++l) w.order[l] = static_cast<uint8_t>(l);
        shuffle_order(w.order, static_cast<uint32_t>(w.size));
        w.cursor = w.arrived = 0;
        set_ready(w);
    }
    Warp &w = *m.ready[random_below(static_cast<uint32_t>(m.num_ready))];
    Fiber &f = w.lanes[w.order[0]];
    m.current = &f;
    threadIdx = f.thread;
    switch_context(m.outside, f);
    check_canaries();
}

}  // namespace

static cudaError_t try_run(const Launch &launch) {
    const Device d = device();
    if (d.multiprocessors <= 0) return cudaErrorNoDevice;
    const uint64_t threads = static_cast<uint64_t>(launch.block.x) * launch.block.y * launch.block.z;
    const bool grid_fits = launch.grid.x <= 0x7fffffffu && launch.grid.y <= 65535 && launch.grid.z <= 65535;
    const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (threads == 0 || threads > kMaxThreads || launch.block.z > 64 || blocks == 0 || !grid_fits) {
        return cudaErrorInvalidConfiguration;
    }
    if (launch.shared > static_cast<size_t>(d.max_shared)) return cudaErrorInvalidValue;

    const std::lock_guard<std::mutex> lock(m.mutex);
    ++m.launches;
    if (m.fail_in > 0 && --m.fail_in == 0) return cudaErrorLaunchFailure;
    m.random = mix(m.seed ^ mix(m.launches)) | 1u;
    m.launch = &launch;
    blockDim = launch.block;
    gridDim = launch.grid;
    prepare_threads(launch.block);
    prepare_shared(launch.shared);
    std::vector<uint32_t> order(blocks);
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
    shuffle_order(order.data(), static_cast<uint32_t>(order.size()));
    for (const uint32_t block : order) run_block(block);
    m.launch = nullptr;
    return cudaSuccess;
}

cudaError_t run(const Launch &launch) { return report(try_run(launch)); }

char *shared_memory() { return m.shared; }
int lane() { return m.current->lane; }

void fail_alignment(const void *address, const char *what, Place place) {
    fail("%s: address %p is no multiple of 16", at(what, place).chars, address);
}

static void check_shared16(const void *address, const char *what, Place place) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(m.shared);
    if (m.shared_bytes < 16 || offset > m.shared_bytes - 16) {
        fail("%s: from byte %lld on of %zu bytes of shared memory", at(what, place).chars,
             static_cast<long long>(offset), m.shared_bytes);
    }
    check_aligned16(address, what, place);
}

void copy_async(void *shared, const uint4 &bytes, Place place) {
    check_shared16(shared, "copy_async16 to shared memory", place);
    m.current->copies.push_back({static_cast<char *>(shared), bytes});
    memset(shared, 0xff, sizeof(bytes));
}

void copy_commit() { m.current->group_ends.push_back(m.current->copies.size()); }

void copy_wait(int pending) {
    Fiber &f = *m.current;
    if (f.group_ends.size() <= static_cast<size_t>(pending)) return;
    const size_t groups = f.group_ends.size() - static_cast<size_t>(pending);
    const size_t copies = f.group_ends[groups - 1];
    for (size_t i = 0; i < copies; ++i) memcpy(f.copies[i].to, &f.copies[i].bytes, sizeof(uint4));
    f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<ptrdiff_t>(copies));
    f.group_ends.erase(f.group_ends.begin(), f.group_ends.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t &end : f.group_ends) end -= copies;
}

void sync_warp(Place place) {
    Warp &w = *m.current->warp;
    if (arrive(w, Op::kSyncWarp, place)) {
        leave(w);
    } else {
        wait(w);
    }
}

void sync_block(Place place) {
    Warp &w = *m.current->warp;
    if (arrive(w, Op::kSyncBlock, place)) {
        meet_block(w);
    } else {
        wait(w);
    }
}

void shuffle(uint32_t *words, int num_words, int source, Op op, Place place) {
    Warp &w = whole_warp(op, place);
    const int lane = m.current->lane;
    if (source < 0 || source >= kLanes) fail("%s of lane %d", at(op, place).chars, source);
    w.sources[lane] = static_cast<uint8_t>(source);
    for (int i = 0; i < num_words; ++i) w.values[i][lane] = words[i];
    if (arrive(w, op, place)) {
        for (int i = 0; i < num_words; ++i) {
            for (int l = 0; l < kLanes; ++l) w.results[i][l] = w.values[i][w.sources[l]];
        }
        leave(w);
    } else {
        wait(w);
    }
    for (int i = 0; i < num_words; ++i) words[i] = w.results[i][lane];
}

// Rows of a matrix beyond the first in the same 16 bytes of shared memory's 128: each costs one more access.
static int count_conflicts(const char *const (&rows)[kLanes]) {
    int conflicts = 0;
    for (int i = 0; i < kLanes; i += 8) {
        uint32_t in_group[8] = {};
        uint32_t most = 0;
        for (int j = 0; j < 8; ++j) {
            bool seen = false;
            for (int k = 0; k < j; ++k) seen |= rows[i + j] == rows[i + k];
            if (!seen) most = std::max(most, ++in_group[(rows[i + j] - m.shared) / 16 % 8]);
        }
        conflicts += static_cast<int>(most) - 1;
    }
    return conflicts;
}

void load_matrix_x4(uint32_t (&r)[4], const void *row, bool transposed, Place place) {
    const Op op = transposed ? Op::kLoadMatrixTrans : Op::kLoadMatrix;
    Warp &w = whole_warp(op, place);
    const int lane = m.current->lane;
    check_shared16(row, name(op), place);
    w.rows[lane] = static_cast<const char *>(row);
    if (arrive(w, op, place)) {
        m.bank_conflicts += static_cast<uint64_t>(count_conflicts(w.rows));
        for (int i = 0; i < 4; ++i) {
            if (!transposed) {
                for (int j = 0; j < 8; ++j) memcpy(&w.results[i][4 * j], w.rows[8 * i + j], 16);
                continue;
            }
            uint16_t matrix[8][8], flipped[8][8];
            for (int j = 0; j < 8; ++j) memcpy(matrix[j], w.rows[8 * i + j], 16);
            for (int j = 0; j < 8; ++j) {
                for (int k = 0; k < 8; ++k) flipped[k][j] = matrix[j][k];
            }
            memcpy(w.results[i], flipped, sizeof(flipped));
        }
        leave(w);
    } else {
        wait(w);
    }
    for (int i = 0; i < 4; ++i) r[i] = w.results[i][lane];
}

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Op op, Place place) {
    Warp &w = whole_warp(op, place);
    const int lane = m.current->lane, r = lane / 4, q = lane % 4;
    for (int i = 0; i < 4; ++i) w.a[i][lane] = a[i];
    w.b[2 * q][r] = static_cast<uint16_t>(b0);
    w.b[2 * q + 1][r] = static_cast<uint16_t>(b0 >> 16);
    w.b[2 * q + 8][r] = static_cast<uint16_t>(b1);
    w.b[2 * q + 9][r] = static_cast<uint16_t>(b1 >> 16);
    memcpy(w.c[0][lane], c, 8);
    memcpy(w.c[1][lane], c + 2, 8);
    if (arrive(w, op, place)) {
        multiply(&w.c[0][0][0], reinterpret_cast<const uint16_t *>(w.a), &w.b[0][0], op == Op::kMmaHalf);
        leave(w);
    } else {
        wait(w);
    }
    memcpy(c, w.c[0][lane], 8);
    memcpy(c + 2, w.c[1][lane], 8);
}

}  // namespace razor_shim

using razor_shim::m;

void razor_shim_set_seed(uint64_t seed) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    m.seed = seed;
    m.launches = 0;
}
void razor_shim_fail_launch(int n) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    m.fail_in = n;
}
uint64_t razor_shim_launches(void) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    return m.launches;
}
uint64_t razor_shim_switches(void) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    return m.switches;
}
uint64_t razor_shim_bank_conflicts(void) {
    const std::lock_guard<std::mutex> lock(m.mutex);
    return m.bank_conflicts;
}
