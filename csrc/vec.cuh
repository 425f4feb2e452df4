// Vectors of up to 16 bytes a load, and conversions between float and the three element types.
// Global memory is read and written 16 bytes at a time; arithmetic is in float32.
#pragma once

#include <cstring>

#include "launch.cuh"

// N elements that move together. Longer than 16 bytes: several loads or stores of 16.
template <class T, int N = 16 / static_cast<int>(sizeof(T))>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
    static_assert((N & (N - 1)) == 0, "a power of two");
    T v[N];
    __device__ __forceinline__ T& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

// The register type that moves a piece of Bytes in one instruction.
template <int Bytes>
struct Word;
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<16> {
    using type = uint4;
};

template <class T, int N>
struct Pieces {
    static constexpr int bytes = N * int(sizeof(T)) < 16 ? N * int(sizeof(T)) : 16;
    static constexpr int count = N * int(sizeof(T)) / bytes;
    using word = typename Word<bytes>::type;
};

// ---------------------------------------------------------------- loads and stores
// `p` must be aligned to the vector, 16 bytes at most.

// Any memory, shared memory too.
template <class T, int N = 16 / static_cast<int>(sizeof(T))>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
    using P = Pieces<T, N>;
    check_aligned(p, P::bytes);
    typename P::word words[P::count];
#pragma unroll
    for (int i = 0; i < P::count; ++i) words[i] = reinterpret_cast<const typename P::word*>(p)[i];
    Vec<T, N> out;
    memcpy(static_cast<void*>(&out), words, sizeof(out));
    return out;
}

// Global memory that nothing writes while the kernel runs.
template <class T, int N = 16 / static_cast<int>(sizeof(T))>
__device__ __forceinline__ Vec<T, N> load_vec_readonly(const T* p) {
    using P = Pieces<T, N>;
    check_aligned(p, P::bytes);
    typename P::word words[P::count];
#pragma unroll
    for (int i = 0; i < P::count; ++i) words[i] = __ldg(reinterpret_cast<const typename P::word*>(p) + i);
    Vec<T, N> out;
    memcpy(static_cast<void*>(&out), words, sizeof(out));
    return out;
}

template <class T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& value) {
    using P = Pieces<T, N>;
    check_aligned(p, P::bytes);
    typename P::word words[P::count];
    memcpy(words, &value, sizeof(value));
#pragma unroll
    for (int i = 0; i < P::count; ++i) reinterpret_cast<typename P::word*>(p)[i] = words[i];
}

// ---------------------------------------------------------------- one element
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// ---------------------------------------------------------------- two 16-bit elements in one register
// Two floats as they lie in a tensor-core fragment: `low` in the low half, first in memory. One instruction.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}
template <>
__device__ __forceinline__ unsigned pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <class T>
__device__ __forceinline__ float2 unpack(unsigned bits);
template <>
__device__ __forceinline__ float2 unpack<__half>(unsigned bits) {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, sizeof(bits));
    return __half22float2(pair);
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(unsigned bits) {  // the upper half of a float32
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}

// ---------------------------------------------------------------- whole vectors
template <class T, int N>
__device__ __forceinline__ void to_floats(const Vec<T, N>& in, float (&out)[N]) {
    if constexpr (sizeof(T) == 4 || N == 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = to_float(in[i]);
    } else {
        unsigned words[N / 2];
        memcpy(words, &in, sizeof(in));
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float2 pair = unpack<T>(words[i]);
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    }
}

template <class T, int N>
__device__ __forceinline__ Vec<T, N> from_floats(const float (&in)[N]) {
    Vec<T, N> out;
    if constexpr (sizeof(T) == 4 || N == 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = from_float<T>(in[i]);
    } else {
        unsigned words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) words[i] = pack<T>(in[2 * i], in[2 * i + 1]);
        memcpy(static_cast<void*>(&out), words, sizeof(out));
    }
    return out;
}
