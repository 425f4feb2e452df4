// What attention's forward and backward share: rows of a head in shared memory, and products of them by tensor cores.
//
// A tile is rows of D 16-bit elements, D a multiple of 8, without padding; a row is D / 8 chunks of 16 bytes. ldmatrix
// reads one chunk of 8 consecutive rows at a time, which must lie in 8 different groups of banks. Rows 2 D bytes apart
// repeat a group after 8 / gcd(D / 8, 8) rows, so the chunk's number is xor'd with the count of repeats: for D = 64 the
// usual swizzle, for D = 40 or 72 nothing, and never a byte of padding. Row numbers given to the products are multiples
// of 8.
//
// A warp works on bands of 16 rows of the left matrix, with g = lane / 4 and t = lane % 4 as in mma.cuh. Sizes are
// exact: pairs of chunks are a product m16n8k16, a chunk left over is an m16n8k8.
#pragma once

#include <cstdint>

#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

// The head_dims that there are kernels for; under a sanitizer, where a kernel compiles slowly, some of each kind.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MMFAST_HEAD_DIMS 32, 40, 64, 72, 128
#else
#define MMFAST_HEAD_DIMS 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128
#endif

namespace attention {

constexpr float LOG2E = 1.4426950408889634f;

// Of a tensor (B, H, N, d), in elements; columns are one apart.
struct Strides {
    int64_t batch;
    int64_t head;
    int64_t row;
};

template <int D>
struct Rows {
    static_assert(D % 8 == 0);
    static constexpr int CHUNKS = D / 8;
    static constexpr int PAIRS = CHUNKS / 2;
    static constexpr bool ODD = CHUNKS % 2 != 0;
    static constexpr int GROUP = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : CHUNKS % 2 == 0 ? 2 : 1;

    // What a row xors to its chunks' numbers; the same for rows 8 apart.
    static __device__ __forceinline__ int twist(int row) {
        return int(unsigned(row) / (8 / GROUP) & (GROUP - 1));
    }
    // Where a chunk of a row begins, in elements.
    static __device__ __forceinline__ int at(int row, int chunk) { return row * D + ((chunk ^ twist(row)) * 8); }
};

// ---------------------------------------------------------------- global to shared memory
// Starts the copy of rows first, ..., first + count - 1 of a head (n, D) to tile rows 0, ..., count - 1, by `threads`
// threads, at least D / 8; rows from n on become zeros. `stride` is a multiple of 8, `head` is aligned to 16 bytes.
// A thread keeps to one chunk, so that nothing is divided and a step of the loop is a few additions.
template <int D, class T>
__device__ __forceinline__ void copy_rows(
    T* tile, const T* head, int64_t stride, int first, int count, int n, int thread, int threads) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    const int chunk = int(unsigned(thread) % CHUNKS);
    const int step = int(unsigned(threads) / CHUNKS);  // rows at a time
    const int there = min(count, n - first);
    int row = int(unsigned(thread) / CHUNKS);
    if (row >= step) return;  // threads that make no whole row
    const T* source = head + (first + row) * stride + chunk * 8;
#pragma unroll 4
    for (; row < there; row += step) {
        cp_async_16(tile + Rows<D>::at(row, chunk), source);
        source += step * stride;
    }
#pragma unroll 1
    for (; row < count; row += step) cp_async_16(tile + Rows<D>::at(row, chunk), head, false);
}

// ---------------------------------------------------------------- operands
// Tile rows row, ..., row + 15 as the left operand: a[2c], a[2c + 1] are chunk c of rows g and g + 8.
template <int D, class T>
__device__ __forceinline__ void load_band(unsigned (&a)[D / 4], const T* tile, int row) {
    const int lane = threadIdx.x % 32;
    const T* line = tile + (row + lane % 16) * D;
    const int twist = Rows<D>::twist(lane);
#pragma unroll
    for (int pair = 0; pair < Rows<D>::PAIRS; ++pair) {
        ldmatrix_x4<false>(a + 4 * pair, line + ((2 * pair + lane / 16) ^ twist) * 8);
    }
    if constexpr (Rows<D>::ODD) ldmatrix_x2<false>(a + D / 4 - 2, line + ((Rows<D>::CHUNKS - 1) ^ twist) * 8);
}

// Tile rows row, ..., row + 7, transposed, as the right operand: b[c] is chunk c.
template <int D, class T>
__device__ __forceinline__ void load_right(unsigned (&b)[D / 8], const T* tile, int row) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    const int lane = threadIdx.x % 32;
    const T* line = tile + (row + lane % 8) * D;
    const int twist = Rows<D>::twist(lane);
#pragma unroll
    for (int chunk = 0; chunk + 4 <= CHUNKS; chunk += 4) {
        ldmatrix_x4<false>(b + chunk, line + ((chunk + lane / 8) ^ twist) * 8);
    }
    constexpr int DONE = CHUNKS / 4 * 4;
    if constexpr (CHUNKS % 4 >= 2) ldmatrix_x2<false>(b + DONE, line + ((DONE + lane / 8 % 2) ^ twist) * 8);
    if constexpr (CHUNKS % 2 == 1) ldmatrix_x1<false>(b + CHUNKS - 1, line + ((CHUNKS - 1) ^ twist) * 8);
}

// ---------------------------------------------------------------- products
// s[m] (16 x 8) += band m (16 x D) times the transpose of tile rows row, ..., row + 7.
template <int D, int M, class T>
__device__ __forceinline__ void multiply_rows(float (&s)[M][4], const unsigned (&a)[M][D / 4], const T* tile, int row) {
    unsigned b[D / 8];
    load_right<D>(b, tile, row);
#pragma unroll
    for (int pair = 0; pair < Rows<D>::PAIRS; ++pair) {
#pragma unroll
        for (int m = 0; m < M; ++m) mma_m16n8k16<T>(s[m], a[m] + 4 * pair, b + 2 * pair);
    }
    if constexpr (Rows<D>::ODD) {
#pragma unroll
        for (int m = 0; m < M; ++m) mma_m16n8k8<T>(s[m], a[m] + D / 4 - 2, b + D / 8 - 1);
    }
}

// sum[m] (16 x D, chunk by chunk) += p[m] (16 x 16) times tile rows row, ..., row + 15.
template <int D, int M, class T>
__device__ __forceinline__ void multiply_columns_16(
    float (&sum)[M][D / 8][4], const unsigned (&p)[M][4], const T* tile, int row) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    const int lane = threadIdx.x % 32;
    const T* line = tile + (row + lane % 16) * D;
    const int twist = Rows<D>::twist(lane);
#pragma unroll
    for (int chunk = 0; chunk + 2 <= CHUNKS; chunk += 2) {
        unsigned b[4];
        ldmatrix_x4<true>(b, line + ((chunk + lane / 16) ^ twist) * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            mma_m16n8k16<T>(sum[m][chunk], p[m], b);
            mma_m16n8k16<T>(sum[m][chunk + 1], p[m], b + 2);
        }
    }
    if constexpr (Rows<D>::ODD) {
        unsigned b[2];
        ldmatrix_x2<true>(b, line + ((CHUNKS - 1) ^ twist) * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) mma_m16n8k16<T>(sum[m][CHUNKS - 1], p[m], b);
    }
}

// sum[m] (16 x D, chunk by chunk) += p[m] (16 x 8) times tile rows row, ..., row + 7.
template <int D, int M, class T>
__device__ __forceinline__ void multiply_columns_8(
    float (&sum)[M][D / 8][4], const unsigned (&p)[M][2], const T* tile, int row) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    const int lane = threadIdx.x % 32;
    const T* line = tile + (row + lane % 8) * D;
    const int twist = Rows<D>::twist(lane);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 4) {
        unsigned b[4];
        constexpr int LEFT = CHUNKS % 4;
        if (chunk + 4 <= CHUNKS) {
            ldmatrix_x4<true>(b, line + ((chunk + lane / 8) ^ twist) * 8);
        } else {
            if constexpr (LEFT >= 2) ldmatrix_x2<true>(b, line + ((chunk + lane / 8 % 2) ^ twist) * 8);
            if constexpr (LEFT % 2 == 1) ldmatrix_x1<true>(b + LEFT - 1, line + ((chunk + LEFT - 1) ^ twist) * 8);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (chunk + i < CHUNKS) {
#pragma unroll
                for (int m = 0; m < M; ++m) mma_m16n8k8<T>(sum[m][chunk + i], p[m], b + i);
            }
        }
    }
}

// ---------------------------------------------------------------- registers to global memory
// The lanes t = 0..3 of a row hold pair t (two elements) of chunks 0..3 each; afterwards lane t holds chunk t whole.
__device__ __forceinline__ void transpose_quad(unsigned (&word)[4]) {
    const int t = threadIdx.x % 4;
    const bool odd = t & 1;
    const bool high = t & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {  // lanes t and t ^ 1
        const unsigned received = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[i] : word[i + 1], 1);
        word[i] = odd ? received : word[i];
        word[i + 1] = odd ? word[i + 1] : received;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // lanes t and t ^ 2
        const unsigned received = __shfl_xor_sync(0xFFFFFFFFu, high ? word[i] : word[i + 2], 2);
        word[i] = high ? received : word[i];
        word[i + 2] = high ? word[i + 2] : received;
    }
}

// Writes half `half` (0: row g, 1: row g + 8) of a 16 x D accumulator, times `factor`, to the row that `out` points to,
// 16 bytes a store. All lanes take part; those with `valid` write.
template <int D, class T>
__device__ __forceinline__ void store_row(T* out, const float (&sum)[D / 8][4], int half, float factor, bool valid) {
    constexpr int CHUNKS = Rows<D>::CHUNKS;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 4) {
        unsigned word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int from = chunk + i < CHUNKS ? chunk + i : chunk;
            word[i] = pack<T>(sum[from][2 * half] * factor, sum[from][2 * half + 1] * factor);
        }
        transpose_quad(word);
        if (valid && chunk + t < CHUNKS) {
            // Not a plain store, which the compiler takes apart here and puts together again only in part.
            __stcg(reinterpret_cast<uint4*>(out + (chunk + t) * 8), make_uint4(word[0], word[1], word[2], word[3]));
        }
    }
}

}  // namespace attention
