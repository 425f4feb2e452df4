// Philox4x32-10 and the normal numbers made of it, for every kernel that needs noise.
//
// The convention is that of mmfast/reference/_philox.py: key = a sample's seed, counter = (chunk, 0, sample, stream),
// and the four normals of a chunk belong to elements 4 chunk to 4 chunk + 3 of the sample. Integers and uniforms are
// equal to the reference's bit by bit; normals are the polynomials of kernels/_philox.py, contracted as Triton does.
//
// A product is one wide multiplication, of which both halves are used. Whatever depends on the sample alone (the keys
// of all rounds, half of rounds 1 and 2) is made once a block and shared: NoiseKey. Then a chunk costs 18 products, 19
// three-way xors and 74 instructions for its four normals, 28 instructions an element.
#pragma once

#include <cstdint>

#include "launch.cuh"

constexpr unsigned PHILOX_A = 0xD2511F53u;
constexpr unsigned PHILOX_B = 0xCD9E8D57u;
constexpr unsigned WEYL_LOW = 0x9E3779B9u;
constexpr unsigned WEYL_HIGH = 0xBB67AE85u;

// What the rounds of one sample take beside the chunk: 20 words, five loads of 16 bytes.
struct alignas(16) NoiseKey {
    unsigned c2_1;     // xor'd into c2 in round 1
    unsigned c0_2;     // into c0 in round 2
    unsigned c2_2;     // into c2 in round 2
    unsigned c3_2;     // c3 after round 2
    unsigned low[8];   // keys of rounds 3 to 10
    unsigned high[8];
};

__device__ __forceinline__ uint64_t wide_product(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b; }
__device__ __forceinline__ unsigned low_word(uint64_t x) { return static_cast<unsigned>(x); }
__device__ __forceinline__ unsigned high_word(uint64_t x) { return static_cast<unsigned>(x >> 32); }

// Rounds 1 and 2 as far as they do not depend on the chunk, and the keys of the rest.
__device__ __forceinline__ void make_noise_key(NoiseKey& out, uint64_t seed, unsigned sample, unsigned stream) {
    unsigned low = low_word(seed);
    unsigned high = high_word(seed);
    const uint64_t b = wide_product(sample, PHILOX_B);
    const uint64_t a = wide_product(high_word(b) ^ low, PHILOX_A);
    out.c2_1 = stream ^ high;
    out.c0_2 = low_word(b) ^ (low + WEYL_LOW);
    out.c2_2 = high_word(a) ^ (high + WEYL_HIGH);
    out.c3_2 = low_word(a);
    low += WEYL_LOW;
    high += WEYL_HIGH;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        low += WEYL_LOW;
        high += WEYL_HIGH;
        out.low[i] = low;
        out.high[i] = high;
    }
}

// The four words of a chunk.
__device__ __forceinline__ void philox(const NoiseKey& key, unsigned chunk, unsigned (&words)[4]) {
    uint64_t a = wide_product(chunk, PHILOX_A);
    uint64_t b = wide_product(high_word(a) ^ key.c2_1, PHILOX_B);
    unsigned c0 = high_word(b) ^ key.c0_2;
    unsigned c1 = low_word(b);
    unsigned c2 = low_word(a) ^ key.c2_2;
    unsigned c3 = key.c3_2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        a = wide_product(c0, PHILOX_A);
        b = wide_product(c2, PHILOX_B);
        c0 = high_word(b) ^ c1 ^ key.low[i];
        c2 = high_word(a) ^ c3 ^ key.high[i];
        c1 = low_word(b);
        c3 = low_word(a);
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// In (0, 1]: the middle of the word's interval of 2^-32.
__device__ __forceinline__ float uniform(unsigned word) {
    return fmaf(__uint2float_rn(word), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

// One instruction, within 1e-7 of itself; sqrtf, rounded exactly, would be eight with a branch.
__device__ __forceinline__ float fast_sqrt(float x) {
#if defined(__CUDACC__)
    float root;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#else
    return sqrtf(x);
#endif
}

// -2 ln u of a normal float32 u, within 1e-7 of itself: u = (1 + f) 2^e with 1 + f from sqrt(1/2) to sqrt(2).
__device__ __forceinline__ float minus_2_log(float u) {
    const unsigned bits = __float_as_uint(u);
    const unsigned exponent = (bits - 0x3F3504F3u) & 0xFF800000u;  // 2^23 e
    const float f = __uint_as_float(bits - exponent) - 1.0f;
    float p = fmaf(f, -0.17919836938381195f, 0.2896437644958496f);
    p = fmaf(f, p, -0.298347532749176f);
    p = fmaf(f, p, 0.3308747410774231f);
    p = fmaf(f, p, -0.39916834235191345f);
    p = fmaf(f, p, 0.5000589489936829f);
    p = fmaf(f, p, -0.6666831970214844f);
    p = fmaf(f, p, 0.9999995827674866f);
    p = fmaf(f, p, -2.0f);
    return fmaf(f, p, __int2float_rn(static_cast<int>(exponent)) * -1.6525917e-7f);  // -2 ln 2 / 2^23
}

// cos(2 pi u) and sin(2 pi u) of u in [0, 1], within 3e-7.
// With r = |u - 1/2| - 1/4 they are sin(2 pi r) and cos(2 pi r), the latter with the sign of 1/2 - u.
__device__ __forceinline__ float2 cos_sin_turn(float u) {
    const float v = 0.5f - u;
    const float r = fabsf(v) - 0.25f;
    const float q = r * r;
    float c = fmaf(q, 39.76161575317383f, -76.5813980102539f);
    c = fmaf(q, c, 81.60248565673828f);
    c = fmaf(q, c, -41.34168243408203f);
    c = r * fmaf(q, c, 6.2831854820251465f);
    float s = fmaf(q, -24.98223876953125f, 60.14401626586914f);
    s = fmaf(q, s, -85.45357513427734f);
    s = fmaf(q, s, 64.93934631347656f);
    s = fmaf(q, s, -19.739208221435547f);
    s = fmaf(q, s, 1.0f);
    return make_float2(c, __uint_as_float(__float_as_uint(s) ^ (__float_as_uint(v) & 0x80000000u)));
}

// The four normals of a chunk, by Box and Muller's transform.
__device__ __forceinline__ void normals4(const NoiseKey& key, unsigned chunk, float (&z)[4]) {
    unsigned words[4];
    philox(key, chunk, words);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const float radius = fast_sqrt(minus_2_log(uniform(words[i])));
        const float2 turn = cos_sin_turn(uniform(words[i + 1]));
        z[i] = radius * turn.x;
        z[i + 1] = radius * turn.y;
    }
}
