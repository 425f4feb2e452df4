// How a kernel is started, in CUDA and in its emulation on a CPU: the same source, nvcc or a host compiler.
// Kernels declare shared memory by SHARED and DYNAMIC_SHARED; host functions call launch().
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

// T* name: the shared memory that launch() is asked for, aligned to 128 bytes.
#define DYNAMIC_SHARED(T, name)                                           \
    extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_bytes)
// SHARED(float, partial, [2][4]): a shared array, at the alignment of its type.
#define SHARED(T, name, dims) __shared__ T name dims

// Does nothing on a GPU, which checks it itself.
__device__ __forceinline__ void check_aligned(const void*, int) {}
#else
#include "emulation/cuda_emulation.h"

using emu::check_aligned;
#endif

// Blocks along each axis, in 64 bits until they have been checked.
struct Grid {
    int64_t x, y, z;
    constexpr Grid(int64_t x_, int64_t y_ = 1, int64_t z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr Grid(dim3 v) : x(v.x), y(v.y), z(v.z) {}
};

[[noreturn]] inline void launch_failed(const std::string& why, const Grid& grid, dim3 block, size_t shared_bytes) {
    const auto list = [](int64_t x, int64_t y, int64_t z) {
        return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
    };
    throw std::runtime_error("launch: " + why + ": grid " + list(grid.x, grid.y, grid.z) + ", block " +
                             list(block.x, block.y, block.z) + ", " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
}

// Throws std::runtime_error for sizes that no GPU takes.
inline void require_launchable(const Grid& grid, dim3 block, size_t shared_bytes) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) launch_failed("the grid is empty", grid, block, shared_bytes);
    if (grid.x < 0 || grid.y < 0 || grid.z < 0 || grid.x > 0x7FFFFFFF || grid.y > 0xFFFF || grid.z > 0xFFFF) {
        launch_failed("the grid must be within (2147483647, 65535, 65535)", grid, block, shared_bytes);
    }
    const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64) {
        launch_failed("a block must have 1 to 1024 threads, at most 64 along z", grid, block, shared_bytes);
    }
    if (shared_bytes > 227 << 10) {
        launch_failed("a block has at most 232448 bytes of shared memory", grid, block, shared_bytes);
    }
}

inline dim3 as_dim3(const Grid& grid) {
    return dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
}

#if defined(__CUDACC__)

// Throws std::runtime_error unless the call succeeded.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here: whoever looks next must not find it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// More shared memory than 48 KiB is had on request only, once for each kernel and device.
inline cudaError_t allow_shared(const void* kernel, size_t bytes) {
    static std::mutex lock;
    static std::map<std::pair<const void*, int>, size_t> allowed;
    int device = 0;
    const cudaError_t no_device = cudaGetDevice(&device);
    if (no_device != cudaSuccess) return no_device;
    const std::lock_guard guard(lock);
    size_t& now = allowed[{kernel, device}];
    if (now >= bytes) return cudaSuccess;
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (refused == cudaSuccess) now = bytes;
    return refused;
}

inline std::string kernel_name([[maybe_unused]] const void* kernel) {
#if CUDART_VERSION >= 12030
    const char* name = nullptr;
    if (cudaFuncGetName(&name, kernel) == cudaSuccess && name) return name;
    cudaGetLastError();
#endif
    return "a kernel";
}

#endif

// Starts `kernel` on the current device. Throws std::runtime_error, with the sizes, if it cannot; errors of the kernel
// itself show at the next synchronisation, in the emulation at once.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel takes another number of arguments");
    require_launchable(grid, block, shared_bytes);
#if defined(__CUDACC__)
    const void* address = reinterpret_cast<const void*>(kernel);
    cudaError_t error = cudaSuccess;
    // The 48 KiB hold for this and the kernel's own SHARED variables together.
    if (shared_bytes > 32 << 10) error = allow_shared(address, shared_bytes);
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = as_dim3(grid);
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        launch_failed(kernel_name(address) + ": " + cudaGetErrorString(error), grid, block, shared_bytes);
    }
#else
    (void)stream;
    const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
    emu::run_grid(as_dim3(grid), block, shared_bytes, [&] { std::apply(kernel, parameters); });
#endif
}
