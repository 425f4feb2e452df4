// Sums and maxima over the lanes of a warp and over a block, in float32 and in a fixed order: the same bits every time.
#pragma once

#include "launch.cuh"

// ---------------------------------------------------------------- over Width lanes; each gets the result
// Call with all 32 lanes of the warp.
template <int Width = 32>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
    return value;
}

template <int Width = 32>
__device__ __forceinline__ float2 warp_sum(float2 value) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2) {
        value.x += __shfl_xor_sync(0xFFFFFFFFu, value.x, step);
        value.y += __shfl_xor_sync(0xFFFFFFFFu, value.y, step);
    }
    return value;
}

// fmaxf drops a NaN beside a number.
template <int Width = 32>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int step = Width / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, step));
    return value;
}

// The four lanes that share a row of a tensor-core accumulator.
__device__ __forceinline__ float quad_sum(float value) { return warp_sum<4>(value); }
__device__ __forceinline__ float quad_max(float value) { return warp_max<4>(value); }

// ---------------------------------------------------------------- over a block of Warps * 32 threads along x
// Value is float, or float2 for two sums at once. `partial` is shared memory, [Warps]; every thread gets the sum.
// One barrier, after the writes: give the next call other memory, or put a barrier between.
template <int Warps, class Value>
__device__ __forceinline__ Value block_sum(Value value, Value* partial) {
    value = warp_sum(value);
    if constexpr (Warps == 1) {
        return value;
    } else {
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
        __syncthreads();
        Value total = partial[0];
#pragma unroll
        for (int warp = 1; warp < Warps; ++warp) {
            if constexpr (sizeof(Value) == sizeof(float)) {
                total += partial[warp];
            } else {
                const Value other = partial[warp];
                total.x += other.x;
                total.y += other.y;
            }
        }
        return total;
    }
}
