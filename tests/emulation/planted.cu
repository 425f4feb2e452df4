// Kernels that are right, and the mistakes that the emulation or a sanitizer must find in them.
//   planted NAME ORDER   runs the mistake NAME ("none": every kernel as it should be), threads in order ORDER
// Prints "right" or "wrong", or the error that the launch threw; then whether every kernel is right after that.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

constexpr int THREADS = 128;
constexpr int TILES = 3;
constexpr int BLOCKS = 4;

// By kernel, in the order of `kernel_of` below.
#define MISTAKES(X)                                                                                           \
    X(none)                                                                                                   \
    X(global_read_past_end) X(global_write_past_end) X(dynamic_shared_past_end) X(read_before_write)          \
    X(write_before_read) X(uninitialised_shared)                                                              \
    X(sum_memory_reused) X(static_shared_past_end)                                                            \
    X(missing_syncwarp)                                                                                       \
    X(copy_not_waited_for) X(copy_waited_for_too_little) X(copy_read_past_end) X(copy_not_shared)             \
    X(misaligned_global) X(misaligned_pointer) X(misaligned_shared)                                           \
    X(divergent_barriers) X(barrier_after_return) X(mask_names_returned_lane) X(lane_outside_its_mask)        \
    X(lanes_in_different_calls) X(shuffle_from_outside_mask) X(deadlock) X(too_much_static_shared) X(trapped) \
    X(unswizzled_tile)                                                                                        \
    X(blocks_in_order) X(blocks_add_to_one_sum)                                                               \
    X(empty_grid) X(grid_too_large) X(block_too_large) X(too_much_dynamic_shared)

enum Mistake {
#define NAME(name) name,
    MISTAKES(NAME)
#undef NAME
};

// ---------------------------------------------------------------- y = x of each tile in reverse, through shared memory
// x, y: (BLOCKS, TILES, THREADS)
__global__ void reverse_kernel(const float* x, float* y, Mistake mistake) {
    DYNAMIC_SHARED(float, row);  // [THREADS]
    const int t = threadIdx.x;
    const int64_t start = int64_t(blockIdx.x) * TILES * THREADS;
    const int past_end = blockIdx.x == BLOCKS - 1 && t == THREADS - 1;
    for (int tile = 0; tile < TILES; ++tile) {
        const int64_t at = start + tile * THREADS + t;
        const int beyond = past_end && tile == TILES - 1;
        const float value = x[at + (mistake == global_read_past_end && beyond)];
        if (mistake != uninitialised_shared || t != 5) row[t + (mistake == dynamic_shared_past_end && beyond)] = value;
        if (mistake != read_before_write) __syncthreads();
        y[at + (mistake == global_write_past_end && beyond)] = row[THREADS - 1 - t];
        if (mistake != write_before_read) __syncthreads();
    }
}

// ---------------------------------------------------------------- y = variance of x over a block, in two sums
// x: (BLOCKS, THREADS), y: (BLOCKS)
__global__ void variance_kernel(const float* x, float* y, Mistake mistake) {
    SHARED(float, partial, [2][THREADS / 32]);
    const float value = x[int64_t(blockIdx.x) * THREADS + threadIdx.x];
    if (mistake == static_shared_past_end && threadIdx.x == 0) (&partial[1][3])[1] = 0.0f;
    const float mean = block_sum<THREADS / 32>(value, partial[0]) / THREADS;
    const float off = value - mean;
    const float sum = block_sum<THREADS / 32>(off * off, partial[mistake == sum_memory_reused ? 0 : 1]);
    if (threadIdx.x == THREADS - 1) y[blockIdx.x] = sum / THREADS;
}

// ---------------------------------------------------------------- y = 2 x of the neighbour, read in two ways
// x, y: (THREADS)
__global__ void neighbour_kernel(const float* x, float* y, Mistake mistake) {
    SHARED(float, slot, [THREADS]);
    const float value = x[threadIdx.x];
    slot[threadIdx.x] = value;
    const float other = __shfl_xor_sync(0xFFFFFFFFu, value, 1);  // lanes meet here, which orders no memory
    if (mistake != missing_syncwarp) __syncwarp();
    y[threadIdx.x] = other + slot[threadIdx.x ^ 1];
}

// ---------------------------------------------------------------- y = x, zeros behind `count`, by cp.async
// x: (count), y: (TILES, THREADS, 4)
__global__ void copy_kernel(const float* x, float* y, int count, Mistake mistake) {
    SHARED(float4, stage, [2][THREADS]);
    const int t = threadIdx.x;
    const int other = THREADS - 1 - t;
    for (int tile = -1; tile < TILES; ++tile) {
        if (tile + 1 < TILES) {  // the next one while this one is read
            const int next = ((tile + 1) * THREADS + t) * 4;
            cp_async_16(&stage[(tile + 1) & 1][t], x + next, mistake == copy_read_past_end || next < count);
        }
        cp_async_commit();
        if (tile < 0) continue;
        if (mistake == copy_waited_for_too_little) {
            cp_async_wait<2>();
        } else if (mistake != copy_not_waited_for) {
            cp_async_wait<1>();
        }
        if (mistake != copy_not_shared) __syncthreads();
        store_vec(y + (tile * THREADS + other) * 4, load_vec(&stage[tile & 1][other].x));
        __syncthreads();
    }
}

// ---------------------------------------------------------------- y = x, four at a time
// x, y: (THREADS, 4)
__global__ void vector_kernel(const float* x, float* y, Mistake mistake) {
    SHARED(float, plain, [THREADS * 4]);  // aligned for floats only
    const int at = threadIdx.x * 4;
    const bool last = threadIdx.x == THREADS - 1;
    if (mistake == misaligned_shared) {
        store_vec(&plain[at], load_vec(x + at));
    }
    if (mistake == misaligned_pointer && !last) {
        const float4 v = *reinterpret_cast<const float4*>(x + at + 1);
        plain[at] = v.x;
    }
    store_vec(y + at, load_vec(x + at + (mistake == misaligned_global && !last)));
}

// ---------------------------------------------------------------- y = lanes of the warp that hold a positive x
// x, y: (THREADS)
__global__ void count_kernel(const float* x, float* y, Mistake mistake) {
    const int t = threadIdx.x;
    const float value = x[t];
    if (mistake == barrier_after_return && t == 40) return;
    if (mistake == divergent_barriers) {
        if (t < 64) {
            __syncthreads();
        } else {
            __syncthreads();
        }
    }
    if (mistake == deadlock) {
        if (t < 16) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }
    if (mistake == lane_outside_its_mask) __syncwarp(0x7FFFFFFFu);
    if (mistake == shuffle_from_outside_mask && t < 16) y[t] = __shfl_xor_sync(0xFFFFu, value, 16);
    if (mistake == lanes_in_different_calls) {
        if (t % 2) {
            y[t] = __shfl_xor_sync(0xFFFFFFFFu, value, 2);
        } else {
            y[t] = __shfl_xor_sync(0xFFFFFFFFu, value, 4);
        }
    }
    if (mistake == too_much_static_shared) {
        SHARED(float4, large, [48 * 1024 / 16 + 1]);
        large[t] = make_float4(value, 0, 0, 0);
    }
    if (mistake == trapped && t == 3) __trap();
    __syncthreads();
    if (mistake == mask_names_returned_lane && t == 70) return;
    y[t] = static_cast<float>(__popc(__ballot_sync(0xFFFFFFFFu, value > 0.0f)));
}

// ---------------------------------------------------------------- y = x transposed in tiles of 8 x 8
// x, y: (32, 64)
__global__ void tile_kernel(const __nv_bfloat16* x, __nv_bfloat16* y, Mistake mistake) {
    DYNAMIC_SHARED(__nv_bfloat16, tile);  // [32][64], chunks of 8 in another order in each row
    const int t = threadIdx.x;
    const auto place = [mistake](int row, int chunk) {
        return row * 64 + (mistake == unswizzled_tile ? chunk : chunk ^ (row & 7)) * 8;
    };
    for (int i = t; i < 32 * 8; i += THREADS) store_vec(tile + place(i / 8, i % 8), load_vec(x + i * 8));
    __syncthreads();
    for (int chunk = t / 32; chunk < 8; chunk += THREADS / 32) {
        unsigned r[4];
        ldmatrix_x4<true>(r, tile + place(t % 32, chunk));
        for (int j = 0; j < 4; ++j) {
            const int row = j * 8 + t % 32 / 4;
            memcpy(y + row * 64 + chunk * 8 + t % 4 * 2, &r[j], 4);
        }
    }
}

// ---------------------------------------------------------------- y = x of this block, or the sum with those before it
// x, y: (BLOCKS), sum: (1)
__global__ void block_kernel(const float* x, float* y, float* sum, Mistake mistake) {
    if (threadIdx.x != 0) return;
    const int b = blockIdx.x;
    float before = 0.0f;
    for (int i = 0; i < b; ++i) before += x[i];
    if (mistake == blocks_in_order) before = b ? y[b - 1] : 0.0f;
    y[b] = before + x[b];
    if (mistake == blocks_add_to_one_sum) sum[0] += x[b];
}

#if !defined(__CUDACC__)

// ---------------------------------------------------------------- inputs, launches, what is right
struct Floats {
    std::vector<float> storage;  // new memory of this size: sanitizers know its end
    float* at;
    explicit Floats(int count, float value = NAN) : storage(count, value), at(storage.data()) {}
    Floats& random() {
        unsigned state = 12345;
        for (float& v : storage) {
            state = state * 1664525u + 1013904223u;
            v = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
        }
        return *this;
    }
};

static bool close(float a, double b) { return std::fabs(a - b) <= 1e-5 * (1 + std::fabs(b)); }

static bool reverse(Mistake mistake) {
    Floats x(BLOCKS * TILES * THREADS), y(BLOCKS * TILES * THREADS);
    launch(reverse_kernel, BLOCKS, THREADS, THREADS * sizeof(float), nullptr, x.random().at, y.at, mistake);
    bool right = true;
    for (int i = 0; i < BLOCKS * TILES; ++i) {
        for (int t = 0; t < THREADS; ++t) right &= y.at[i * THREADS + t] == x.at[i * THREADS + THREADS - 1 - t];
    }
    return right;
}

static bool variance(Mistake mistake) {
    Floats x(BLOCKS * THREADS), y(BLOCKS);
    launch(variance_kernel, BLOCKS, THREADS, 0, nullptr, x.random().at, y.at, mistake);
    bool right = true;
    for (int b = 0; b < BLOCKS; ++b) {
        double sum = 0, squares = 0;
        for (int t = 0; t < THREADS; ++t) {
            const double value = x.at[b * THREADS + t];
            sum += value;
            squares += value * value;
        }
        right &= close(y.at[b], squares / THREADS - sum / THREADS * sum / THREADS);
    }
    return right;
}

static bool neighbour(Mistake mistake) {
    Floats x(THREADS), y(THREADS);
    launch(neighbour_kernel, 1, THREADS, 0, nullptr, x.random().at, y.at, mistake);
    bool right = true;
    for (int t = 0; t < THREADS; ++t) right &= y.at[t] == 2 * x.at[t ^ 1];
    return right;
}

static bool copy(Mistake mistake) {
    const int count = (TILES * THREADS - 7) * 4;
    Floats x(count), y(TILES * THREADS * 4);
    launch(copy_kernel, 1, THREADS, 0, nullptr, x.random().at, y.at, count, mistake);
    bool right = true;
    for (int i = 0; i < TILES * THREADS * 4; ++i) right &= y.at[i] == (i < count ? x.at[i] : 0.0f);
    return right;
}

static bool vector(Mistake mistake) {
    Floats x(THREADS * 4), y(THREADS * 4);
    launch(vector_kernel, 1, THREADS, 0, nullptr, x.random().at, y.at, mistake);
    return x.storage == y.storage;
}

static bool count(Mistake mistake) {
    Floats x(THREADS), y(THREADS);
    launch(count_kernel, 1, THREADS, 0, nullptr, x.random().at, y.at, mistake);
    bool right = true;
    for (int t = 0; t < THREADS; ++t) {
        int positive = 0;
        for (int lane = 0; lane < 32; ++lane) positive += x.at[t / 32 * 32 + lane] > 0;
        right &= y.at[t] == static_cast<float>(positive);
    }
    return right;
}

static bool tile(Mistake mistake) {
    std::vector<__nv_bfloat16> x(32 * 64), y(32 * 64);
    for (int i = 0; i < 32 * 64; ++i) x[i] = __nv_bfloat16(static_cast<float>(i % 251));
    launch(tile_kernel, 1, THREADS, 32 * 64 * 2, nullptr, x.data(), y.data(), mistake);
    bool right = true;
    for (int row = 0; row < 32; ++row) {
        for (int column = 0; column < 64; ++column) {
            const int from = (row / 8 * 8 + column % 8) * 64 + column / 8 * 8 + row % 8;
            right &= y[row * 64 + column].bits == x[from].bits;
        }
    }
    return right;
}

static bool blocks(Mistake mistake) {
    Floats x(BLOCKS), y(BLOCKS), total(1, 0.0f);
    launch(block_kernel, BLOCKS, 32, 0, nullptr, x.random().at, y.at, total.at, mistake);
    bool right = true;
    float sum = 0.0f;
    for (int b = 0; b < BLOCKS; ++b) {
        right &= close(y.at[b], sum + x.at[b]);
        sum += x.at[b];
    }
    if (mistake == blocks_add_to_one_sum) right &= close(total.at[0], sum);
    return right;
}

static bool sizes(Mistake mistake) {
    Floats x(BLOCKS), y(BLOCKS);
    const Grid grid = mistake == empty_grid ? Grid(0) : mistake == grid_too_large ? Grid(1, 70000) : Grid(BLOCKS);
    const size_t bytes = mistake == too_much_dynamic_shared ? 300000 : 0;
    const int threads = mistake == block_too_large ? 1056 : 32;
    launch(block_kernel, grid, threads, bytes, nullptr, x.random().at, y.at, y.at, mistake);
    return true;
}

static bool all(Mistake) {
    return reverse(none) && variance(none) && neighbour(none) && copy(none) && vector(none) && count(none) &&
           tile(none) && blocks(none);
}

static auto kernel_of(Mistake m) -> bool (*)(Mistake) {
    if (m == none) return all;
    if (m <= uninitialised_shared) return reverse;
    if (m <= static_shared_past_end) return variance;
    if (m <= missing_syncwarp) return neighbour;
    if (m <= copy_not_shared) return copy;
    if (m <= misaligned_shared) return vector;
    if (m <= trapped) return count;
    if (m <= unswizzled_tile) return tile;
    if (m <= blocks_add_to_one_sum) return blocks;
    return sizes;
}

int main(int argc, char** argv) {
    static const char* names[] = {
#define NAME(name) #name,
        MISTAKES(NAME)
#undef NAME
    };
    if (argc < 3) return 64;
    emu::set_thread_order(std::strtoull(argv[2], nullptr, 0));
    for (int m = 0; m < static_cast<int>(std::size(names)); ++m) {
        if (std::strcmp(argv[1], names[m]) != 0) continue;
        try {
            std::puts(kernel_of(Mistake(m))(Mistake(m)) ? "right" : "wrong");
        } catch (const std::exception& error) {
            std::puts(error.what());
        }
        std::printf("conflicts %llu\n", static_cast<unsigned long long>(emu::statistics().ldmatrix_conflicts));
        std::fflush(stdout);
        std::puts(all(none) ? "afterwards right" : "afterwards wrong");
        return 0;
    }
    return 64;
}

#endif
