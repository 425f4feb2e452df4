// Device functions that a host compiler's <cmath> lacks. GPU approximations are computed exactly here.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// Templates, since a newer C library may have a function of the same name, which then serves.
template <class T>
float rsqrtf(T x) {
    return 1.0f / std::sqrt(static_cast<float>(x));
}

template <class T>
float sinpif(T x) {
    return static_cast<float>(std::sin(std::fmod(static_cast<double>(x), 2.0) * 3.14159265358979323846));
}

template <class T>
float cospif(T x) {
    return static_cast<float>(std::cos(std::fmod(static_cast<double>(x), 2.0) * 3.14159265358979323846));
}

inline void sincospif(float x, float* sine, float* cosine) {
    *sine = sinpif(x);
    *cosine = cospif(x);
}

// Macros, since the GNU C library declares such names but has no such functions.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __sinf(x) std::sin(static_cast<float>(x))
#define __cosf(x) std::cos(static_cast<float>(x))
#define __powf(x, y) std::pow(static_cast<float>(x), static_cast<float>(y))

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN is 0
// Rounded where they stand: a host compiler must not contract them into a fused multiply-add.
namespace emu {
inline float rounded(float x) {
    asm("" : "+m"(x));
    return x;
}
}  // namespace emu
inline float __fadd_rn(float a, float b) { return emu::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return emu::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return emu::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return emu::rounded(a / b); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    __extension__ using wide = unsigned __int128;
    return static_cast<unsigned long long>((static_cast<wide>(a) * b) >> 64);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }

// Global min and max of one type, as CUDA has them.
template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
