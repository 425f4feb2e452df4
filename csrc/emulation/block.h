// One block of CUDA threads: a fiber each, run in an order that can be chosen, until all have returned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

inline constexpr int max_threads = 1024;
inline constexpr int warp_lanes = 32;
inline constexpr int max_warps = max_threads / warp_lanes;

// ---------------------------------------------------------------- what is counted
struct Statistics {
    uint64_t launches = 0;
    uint64_t blocks = 0;
    uint64_t switches = 0;            // between threads
    uint64_t ldmatrix_phases = 0;     // 8 rows of 16 bytes that shared memory can give at once
    uint64_t ldmatrix_conflicts = 0;  // phases that it takes besides
    uint64_t products = 0;            // multiplications of tensor cores
};

inline Statistics counted;

inline Statistics statistics() { return counted; }
inline void reset_statistics() { counted = Statistics{}; }

// ---------------------------------------------------------------- in which order threads run
// 0: in order. 1: the last first, threads and blocks. Odd: one warp, drawn anew for each block, runs ahead of the
// others. Even: any thread that can run, at random. Results must not depend on it.
inline uint64_t thread_order = 0;

inline void set_thread_order(uint64_t seed) { thread_order = seed; }

// ---------------------------------------------------------------- threads, warps, the block
enum class State { finished, ready, waiting };

using Collective = void (*)(void* const* arguments, unsigned lanes);

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

struct Thread : Fiber {
    uint3 index = {};
    int number = 0;  // in the block
    State state = State::finished;
    bool at_barrier = false;
    unsigned barriers = 0;  // passed so far
    const char* waits_in = "";
    std::source_location waits_at;
    std::vector<Copy> copies;               // cp.async since the last commit
    std::vector<std::vector<Copy>> groups;  // committed, not yet waited for
};

// Lanes of one warp that meet with the same mask.
struct Meeting {
    unsigned mask = 0;
    unsigned arrived = 0;
    Collective run = nullptr;  // null: __syncwarp
    const char* name = "";
    std::source_location where;
    char* edge = nullptr;
};

struct Warp {
    unsigned lanes = 0;  // that exist
    unsigned alive = 0;  // that have not returned
    uint64_t priority = 0;  // in odd thread orders
    int meetings = 0;
    Meeting meeting[warp_lanes];
    void* argument[warp_lanes];
    unsigned next_edge = 0;
    char edge[64];
};

struct Block {
    Thread thread[max_threads];
    Warp warp[max_warps];
    Fiber scheduler;
    int threads = 0;
    int alive = 0;
    int ready[max_threads];  // threads that can run: first .. last
    int first = 0;
    int last = 0;
    int at_barrier = 0;
    std::source_location barrier;
    int shift = 0;  // of threads against fibers
    char barrier_edge[2];
    char start_edge;  // from the launch to its threads
    char end_edge;    // and back
    void (*body)(void*) = nullptr;
    void* kernel = nullptr;
    bool stopped = false;  // an error: threads leave where they stand
    bool failed = false;
    char error[512];
    uint64_t random = 0;
};

inline Block block;
inline Thread* current = nullptr;

// Thread t of one block and thread t of another are different fibers: else a race between the two would be no race to
// ThreadSanitizer.
EMU_QUIET inline Thread& thread_at(int number) {
    const int fiber = number + block.shift;
    return block.thread[fiber < block.threads ? fiber : fiber - block.threads];
}

// Thrown through a thread whose block has an error.
struct Stopped {};

inline std::string place(const std::source_location& where) {
    const std::string file = where.file_name();
    return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

inline std::string place(const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

EMU_QUIET inline bool same_place(const std::source_location& a, const std::source_location& b) {
    if (a.line() != b.line()) return false;
    return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

// The first one counts. A copy by hand: a library function would be watched.
EMU_QUIET inline void set_error(const std::string& message) {
    if (block.failed) return;
    block.failed = true;
    const char* text = message.c_str();
    size_t i = 0;
    for (; i + 1 < sizeof(block.error) && text[i]; ++i) block.error[i] = text[i];
    block.error[i] = 0;
}

// An error of the thread that runs: ends the launch.
[[noreturn]] EMU_APART inline void trap(const std::string& message) {
    set_error(message + ", thread " + place(current->index) + " of block " + place(blockIdx));
    throw Stopped{};
}

// Vectors must lie at a multiple of their size: a GPU faults, a CPU may not.
[[noreturn]] EMU_APART inline void trap_misaligned(const void* p, size_t bytes) {
    char text[96];
    std::snprintf(text, sizeof(text), "misaligned address %p of a vector of %zu bytes", p, bytes);
    trap(text);
}

inline void check_aligned(const void* p, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) trap_misaligned(p, bytes);
}

EMU_QUIET inline void wake(Thread& thread) {
    thread.state = State::ready;
    thread.at_barrier = false;
    if (block.last == max_threads) {  // room is before the first
        for (int i = block.first; i < block.last; ++i) block.ready[i - block.first] = block.ready[i];
        block.last -= block.first;
        block.first = 0;
    }
    block.ready[block.last++] = thread.number;
}

// Lets others run until this thread is woken.
EMU_QUIET inline void wait(const char* name, const std::source_location& where) {
    current->waits_in = name;
    current->waits_at = where;
    current->state = State::waiting;
    Thread& self = *current;
    jump(self, block.scheduler, block.scheduler);
    if (block.stopped) throw Stopped{};
}

void finish_thread();  // collectives.h: barriers and warps that wait for no more threads

EMU_QUIET inline void run_body() {
    if (block.stopped) return;
    try {
        block.body(block.kernel);
    } catch (const Stopped&) {
    } catch (const std::exception& failed) {
        set_error(failed.what());
    } catch (...) {
        set_error("a kernel threw an exception");
    }
}

// The life of a fiber: a thread of one block after another.
EMU_QUIET inline void run_thread() {
    arrive(nullptr, block.scheduler);
    for (;;) {
        acquire(&block.start_edge);
        current->copies.clear();
        current->groups.clear();
        run_body();
        release(&block.end_edge);
        finish_thread();
        Thread& self = *current;
        jump(self, block.scheduler, block.scheduler);
    }
}

// ---------------------------------------------------------------- the scheduler
EMU_QUIET inline uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

EMU_QUIET inline int next_thread() {
    Block& b = block;
    int chosen = b.first;
    if (thread_order == 1) {
        chosen = b.last - 1;
    } else if (thread_order > 1 && thread_order % 2) {
        uint64_t best = 0;
        for (int i = b.first; i < b.last; ++i) {
            const uint64_t priority = b.warp[b.ready[i] / warp_lanes].priority;
            if (priority > best) {
                best = priority;
                chosen = i;
            }
        }
    } else if (thread_order > 1) {
        b.random = b.random * 6364136223846793005u + 1442695040888963407u;
        chosen = b.first + static_cast<int>((b.random >> 33) % (b.last - b.first));
    }
    const int number = b.ready[chosen];
    if (chosen == b.first) {
        ++b.first;
    } else {
        b.ready[chosen] = b.ready[--b.last];
    }
    if (b.first == b.last) b.first = b.last = 0;
    return number;
}

EMU_QUIET inline void resume(Thread& thread) {
    current = &thread;
    threadIdx = thread.index;
    ++counted.switches;
    jump(block.scheduler, thread, block.scheduler);
}

// Threads that wait, those with neighbours that wait at the same place together.
EMU_QUIET inline std::string describe_deadlock() {
    std::string text = "deadlock in block " + place(blockIdx) + ", every thread waits:";
    int listed = 0;
    for (int t = 0; t < block.threads; ++t) {
        const Thread& thread = thread_at(t);
        if (thread.state != State::waiting) continue;
        const int from = t;
        while (t + 1 < block.threads && thread_at(t + 1).state == State::waiting &&
               same_place(thread_at(t + 1).waits_at, thread.waits_at)) {
            ++t;
        }
        if (++listed > 8) return text + " ...";
        text += " " + std::to_string(from) + (t > from ? "-" + std::to_string(t) : "") + " in " + thread.waits_in +
                " at " + place(thread.waits_at) + ";";
    }
    return text;
}

// Lets every thread that has not returned leave where it stands, so that its fiber can serve again.
EMU_QUIET inline void stop_threads() {
    block.stopped = true;
    for (int t = 0; t < block.threads; ++t) {
        if (thread_at(t).state != State::finished) resume(thread_at(t));
    }
    block.stopped = false;
}

EMU_QUIET inline void start_threads(int count) {
    Block& b = block;
    b.threads = b.alive = count;
    b.first = b.last = b.at_barrier = 0;
    b.shift = static_cast<int>(counted.blocks * 37 % count);
    for (int w = 0; w * warp_lanes < count; ++w) {
        const int lanes = std::min(count - w * warp_lanes, warp_lanes);
        b.warp[w].lanes = b.warp[w].alive = lanes == warp_lanes ? ~0u : (1u << lanes) - 1;
        b.warp[w].meetings = 0;
        b.warp[w].priority = mix(thread_order * 1024 + counted.blocks * 64 + w) | 1;
    }
    for (int t = 0; t < count; ++t) {
        Thread& thread = thread_at(t);
        if (!thread.stack) make_fiber(thread, run_thread);
        thread.number = t;
        thread.barriers = 0;
        thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        wake(thread);
    }
}

// Runs the block at blockIdx. Throws std::runtime_error at an error of the kernel.
EMU_QUIET inline void run_block(int count) {
    Block& b = block;
    b.failed = false;
    start_threads(count);
    while (b.alive && !b.failed) {
        if (b.first == b.last) {
            set_error(describe_deadlock());
        } else {
            resume(thread_at(next_thread()));
        }
    }
    if (b.failed) stop_threads();
    ++counted.blocks;
    if (b.failed) throw std::runtime_error(std::string("cuda emulation: ") + b.error);
}

}  // namespace emu
