// What a block of attention's backward holds, and what its warps do with it.
//
// Tiles lie in shared memory with an odd number of chunks of 16 bytes from row to row: 8 rows are in different banks,
// and where a chunk is needs no arithmetic, which leaves the registers to the gradients. Bands are 16 keys, rows of the
// left operand; scores are transposed, keys by queries.
#pragma once

#include "attention_tiles.cuh"

namespace attention {

constexpr int STEP = 64;  // queries that a block works on between two barriers

// What a block holds, by head_dim: warps, as many as leave registers enough, each with `bands_a_warp` bands and D / 2
// registers a band for their dk and dv. The first `kept_pairs` pairs of chunks of the keys stay in registers as left
// operands. Eight warps of D = 64 share one band more: the 257th token.
__host__ __device__ constexpr int bands_a_warp(int head_dim) { return head_dim <= 64 ? 2 : 1; }
__host__ __device__ constexpr int most_warps(int head_dim) {
    return head_dim <= 32 || (head_dim > 64 && head_dim <= 88) ? 12 : 8;
}
__host__ __device__ constexpr int kept_pairs(int head_dim) {
    return head_dim == 88 ? 0 : head_dim == 80 ? 1 : head_dim == 64 || head_dim == 72 ? 3 : head_dim / 16;
}
__host__ __device__ constexpr bool shares_a_band(int head_dim) { return head_dim == 64; }  // 8 warps, 8 columns each

// Elements from row to row of a tile in shared memory: an odd number of chunks, so that 8 rows lie in different banks.
__host__ __device__ constexpr int pitch(int width) { return width / 8 % 2 == 0 ? width + 8 : width; }

// Bands that a block has room for: whole warps' of them, and one to spare beside one that the warps share.
__host__ __device__ constexpr int held_bands(int head_dim, int bands, bool shared_band) {
    const int each = bands_a_warp(head_dim);
    return shared_band ? bands + each - 1 : (bands + each - 1) / each * each;
}

// Shared memory of a block: where things begin, in elements of 2 bytes. `buffers` is 1 for a single step, or 2.
struct BackwardMemory {
    int stats;       // [2][2][STEP] float32: lse and delta of a step
    int stage;       // [buffers][2][STEP][pitch(D)]: q and dout of a step
    int stage_size;
    int k;           // [keys][pitch(D)]
    int v;           // [keys][pitch(D)]
    int ds;          // [buffers][keys][pitch(STEP)]
    int ds_size;
    int out;         // [STEP][pitch(D)]: of a step; where there is but one, ds takes its place
    int p;           // [16][pitch(STEP)]: probabilities of a band that the warps share
    int sums;        // [threads][2][4] float32: its dk and dv
    int size;

    __host__ __device__ constexpr BackwardMemory(int head_dim, int bands, bool shared_band, int buffers)
        : stats(32),  // after the pointers of Heads
          stage(stats + 2 * 2 * 2 * STEP),
          stage_size(2 * STEP * pitch(head_dim)),
          k(stage + buffers * stage_size),
          v(k + held_bands(head_dim, bands, shared_band) * 16 * pitch(head_dim)),
          ds(2 * v - k),
          ds_size(held_bands(head_dim, bands, shared_band) * 16 * pitch(STEP)),
          out(buffers == 1 ? ds : ds + 2 * ds_size),
          p(out + (buffers == 1 && ds_size > STEP * pitch(head_dim) ? ds_size : STEP * pitch(head_dim))),
          sums(p + 16 * pitch(STEP)),
          size(shared_band ? sums + most_warps(head_dim) * 32 * 2 * 4 * 2 : p) {}
};

// Starts the copy of rows first, ..., first + count - 1 of a head (n, D) to rows 0, ..., count - 1 of a tile, zeros
// from row n on. Eight lanes a row: a thread finds what it copied itself.
template <int D, class T>
__device__ __forceinline__ void start_rows(T* tile, const T* head, int64_t stride, int first, int count, int n) {
#pragma unroll 1
    for (int row = threadIdx.x / 8; row < count; row += blockDim.x / 8) {
        const bool valid = first + row < n;
        const T* source = head + (valid ? first + row : 0) * stride;
#pragma unroll 1
        for (int chunk = threadIdx.x % 8; chunk < D / 8; chunk += 8) {
            cp_async_16(tile + row * pitch(D) + chunk * 8, source + chunk * 8, valid);
        }
    }
}

// Where this lane's row of 16 x 16 elements begins for ldmatrix: lanes 0-15 the first chunk, 16-31 the second.
__device__ __forceinline__ int lane_place(int row_pitch) {
    return threadIdx.x % 16 * row_pitch + threadIdx.x % 32 / 16 * 8;
}

// s[m] (16 keys x 16 queries) += band m of `left` times the transpose of 16 rows of `right`.
template <int D, int KEEP, int M, class T>
__device__ __forceinline__ void multiply_scores(
    float (&s)[M][2][4], const unsigned (&kept)[M][KEEP ? 4 * KEEP : 4], const T* left, const T* right) {
    using R = Rows<D>;
    const int lane = threadIdx.x % 32;
    const T* left_line = left + lane_place(pitch(D));
    const T* right_line = right + (lane % 8 + lane / 16 * 8) * pitch(D) + lane / 8 % 2 * 8;
#pragma unroll
    for (int pair = 0; pair < R::PAIRS; ++pair) {
        unsigned b[4];
        ldmatrix_x4<false>(b, right_line + pair * 16);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            unsigned a[4];
            if (pair < KEEP) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = kept[m][4 * pair + i];
            } else {
                ldmatrix_x4<false>(a, left_line + m * 16 * pitch(D) + pair * 16);
            }
            mma_m16n8k16<T>(s[m][0], a, b);
            mma_m16n8k16<T>(s[m][1], a, b + 2);
        }
    }
    if constexpr (R::ODD) {
        unsigned b[2];
        ldmatrix_x2<false>(b, right + lane_place(pitch(D)) + D - 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            unsigned a[2];
            ldmatrix_x2<false>(a, left_line + m * 16 * pitch(D) + D - 8);
            mma_m16n8k8<T>(s[m][0], a, b);
            mma_m16n8k8<T>(s[m][1], a, b + 1);
        }
    }
}

// sum[m] (16 keys x D) += p[m] (16 keys x 16 queries) times 16 rows of `tile`.
template <int D, int M, class T>
__device__ __forceinline__ void multiply_gradient(
    float (&sum)[M][D / 8][4], const unsigned (&p)[M][4], const T* tile) {
    using R = Rows<D>;
    const T* line = tile + lane_place(pitch(D));
#pragma unroll
    for (int chunk = 0; chunk + 2 <= R::CHUNKS; chunk += 2) {
        unsigned b[4];
        ldmatrix_x4<true>(b, line + chunk * 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            mma_m16n8k16<T>(sum[m][chunk], p[m], b);
            mma_m16n8k16<T>(sum[m][chunk + 1], p[m], b + 2);
        }
    }
    if constexpr (R::ODD) {
        unsigned b[2];
        ldmatrix_x2<true>(b, line + D - 8);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            mma_m16n8k16<T>(sum[m][R::CHUNKS - 1], p[m], b);
        }
    }
}

// A warp's bands of an accumulator to rows of float32 in shared memory.
template <int D, int M>
__device__ __forceinline__ void store_bands(float* rows, const float (&sum)[M][D / 8][4]) {
    const int lane = threadIdx.x % 32;
    float* line = rows + lane / 4 * pitch(D) + lane % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int chunk = 0; chunk < D / 8; ++chunk) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float2* to = reinterpret_cast<float2*>(line + (m * 16 + half * 8) * pitch(D) + chunk * 8);
                *to = make_float2(sum[m][chunk][half * 2], sum[m][chunk][half * 2 + 1]);
            }
        }
    }
    __syncwarp();
}

// Eight numbers times `factor` to 16 bytes of global memory: one store past L1, where an assignment was split in four.
template <class T>
__device__ __forceinline__ void store_chunk(T* to, const float (&x)[8], float factor) {
    __stcg(reinterpret_cast<uint4*>(to),
           make_uint4(pack<T>(x[0] * factor, x[1] * factor), pack<T>(x[2] * factor, x[3] * factor),
                      pack<T>(x[4] * factor, x[5] * factor), pack<T>(x[6] * factor, x[7] * factor)));
}

// Those rows to global memory, 16 bytes a store: as they are to `parts`, or times `factor` to `out`.
template <int D, class T>
__device__ __forceinline__ void write_rows(
    const float* rows, T* out, float* parts, int64_t stride, float factor, int count) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < count * (D / 8); i += 32) {
        const int row = i / (D / 8);
        const int chunk = i % (D / 8);
        const Vec<float, 8> x = load_vec<float, 8>(rows + row * pitch(D) + chunk * 8);
        if (parts != nullptr) {
            store_vec(parts + row * D + chunk * 8, x);
        } else {
            store_chunk(out + row * stride + chunk * 8, x.v, factor);
        }
    }
}

// A thread's sums of the band that the warps share.
__device__ __forceinline__ void load_sums(float (&dk)[4], float (&dv)[4], const float4* sums) {
    const float4 x = sums[0];
    const float4 y = sums[1];
    dk[0] = x.x, dk[1] = x.y, dk[2] = x.z, dk[3] = x.w;
    dv[0] = y.x, dv[1] = y.y, dv[2] = y.z, dv[3] = y.w;
}

}  // namespace attention
