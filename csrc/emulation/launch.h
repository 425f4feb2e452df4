// The launch of a kernel: its blocks, one after another, in the OS thread that asks.
#pragma once

#include <mutex>
#include <numeric>
#include <tuple>

#include "collectives.h"
#include "memory.h"

namespace emu {

// Threads see what was done before the launch, and what they do is seen after it. Nothing orders one block after
// another.
struct LaunchScope {
    LaunchScope() { release(&block.start_edge); }
    ~LaunchScope() { acquire(&block.end_edge); }
};

struct SharedScope {
    explicit SharedScope(size_t bytes) { begin_shared(bytes); }
    ~SharedScope() { end_shared(); }
};

// A step that visits every one of `blocks` in an order that looks like none.
inline uint64_t block_step(uint64_t blocks) {
    uint64_t step = blocks * 5 / 8 | 1;
    while (std::gcd(step, blocks) != 1) step += 2;
    return step;
}

EMU_QUIET inline void set_block(uint64_t number) {
    const uint64_t rows = number / gridDim.x;
    blockIdx.x = static_cast<unsigned>(number % gridDim.x);
    blockIdx.y = static_cast<unsigned>(rows % gridDim.y);
    blockIdx.z = static_cast<unsigned>(rows / gridDim.y);
}

template <class Body>
void run_grid(dim3 grid, dim3 dims, size_t bytes, Body body) {
    static std::mutex one_at_a_time;
    const std::lock_guard lock(one_at_a_time);
    block.body = [](void* kernel) { (*static_cast<Body*>(kernel))(); };
    block.kernel = &body;
    block.random = thread_order;
    blockDim = dims;
    gridDim = grid;
    adopt_thread(block.scheduler);
    ++counted.launches;
    const LaunchScope whole;
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    const uint64_t step = thread_order > 1 ? block_step(blocks) : 1;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t at = thread_order == 1 ? blocks - 1 - i : i * step % blocks;
        set_block(at);
        const SharedScope scope(bytes);
        run_block(static_cast<int>(dims.x * dims.y * dims.z));
    }
}

}  // namespace emu
