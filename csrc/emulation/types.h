// The words of CUDA C++ that a host compiler lacks: qualifiers, vector types, dim3. No CUDA toolkit is needed.
#pragma once

#include <cstddef>
#include <cstdint>

// __shared__ is left out on purpose: shared memory is made by SHARED and DYNAMIC_SHARED, which sanitizers can check.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

// The alignment of CUDA: UBSan then sees a misaligned access.
#define EMU_VECTOR_TYPES(scalar, name)                                                                \
    struct name##2 {                                                                                  \
        alignas(2 * sizeof(scalar)) scalar x;                                                         \
        scalar y;                                                                                     \
    };                                                                                                \
    struct name##3 {                                                                                  \
        scalar x, y, z;                                                                               \
    };                                                                                                \
    struct name##4 {                                                                                  \
        alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) scalar x;                          \
        scalar y, z, w;                                                                               \
    };                                                                                                \
    constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                           \
    constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }              \
    constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

EMU_VECTOR_TYPES(float, float)
EMU_VECTOR_TYPES(double, double)
EMU_VECTOR_TYPES(int, int)
EMU_VECTOR_TYPES(unsigned, uint)
EMU_VECTOR_TYPES(short, short)
EMU_VECTOR_TYPES(unsigned short, ushort)
EMU_VECTOR_TYPES(signed char, char)
EMU_VECTOR_TYPES(unsigned char, uchar)
EMU_VECTOR_TYPES(long long, longlong)
EMU_VECTOR_TYPES(unsigned long long, ulonglong)
#undef EMU_VECTOR_TYPES

struct dim3 {
    unsigned x = 1;
    unsigned y = 1;
    unsigned z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

using cudaStream_t = struct CUstream_st*;

inline constexpr int warpSize = 32;
