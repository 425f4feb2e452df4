// The kernel of attention's backward; attention_backward.cu says what it computes and why so.
#pragma once

#include "attention_backward_tiles.cuh"
#include "host.h"

namespace attention {

template <class T>
struct BackwardParams {
    const T* q;             // (B, H, n_q, D)
    const T* k;             // (B, H / group, n_k, D)
    const T* v;             // (B, H / group, n_k, D)
    const T* out;           // (B, H, n_q, D)
    const T* dout;          // (B, H, n_q, D)
    const float* lse;       // (B, H, n_q), base 2
    T* dq;                  // as q, written where one block sees all keys
    T* dk;                  // as k, written where one block sees all queries
    T* dv;                  // as v
    float* dq_parts;        // (key_splits, B, H, n_q, D), or null where a block has all keys at once
    float* dkv_parts;       // (query_splits, 2, B, H / group, n_k, D), or null for one split
    Strides stride_q, stride_k, stride_v, stride_out, stride_dout, stride_dq, stride_dk, stride_dv;
    int64_t heads_kv;       // B * H / group
    int kv_heads;           // H / group
    int group;              // heads of q that share a head of k
    int n_q, n_k;
    int key_splits, query_splits;
    int split_bands;        // bands of 16 keys of a split
    int chunk_bands;        // of which a block holds so many at once
    float scale_log2;       // scale * log2(e)
    float scale;
    bool need_dkv;
};

// Where the heads of a block begin, in shared memory: five pointers less in registers.
template <class T>
struct Heads {
    const T* q;
    const T* dout;
    const T* out;
    T* dq;
    const float* lse;
};

template <int D, class T>
__global__ void __launch_bounds__(most_warps(D) * 32, 1)
    attention_backward_kernel(const __grid_constant__ BackwardParams<T> p) {
    using R = Rows<D>;
    constexpr int M = bands_a_warp(D);
    constexpr int KEEP = kept_pairs(D);
    DYNAMIC_SHARED(T, shared);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warps = blockDim.x / 32;
    const int g = lane / 4;
    const int t = lane % 4;

    const unsigned splits = p.key_splits * p.query_splits;
    const unsigned kv = blockIdx.x / splits;  // head of k, over the batch too
    const int key_split = blockIdx.x % splits % p.key_splits;
    const int query_split = blockIdx.x % splits / p.key_splits;

    const int head_steps = (p.n_q + STEP - 1) / STEP;
    const int all_steps = head_steps * p.group;
    const int split_steps = (all_steps + p.query_splits - 1) / p.query_splits;
    const int step0 = query_split * split_steps;
    const int steps = min(split_steps, all_steps - step0);
    const int first_band = key_split * p.split_bands;
    const int last_band = min((p.n_k + 15) / 16, first_band + p.split_bands);

    const bool may_extra = shares_a_band(D) && p.chunk_bands > warps * M;
    const BackwardMemory at(D, p.chunk_bands, may_extra, split_steps > 1 ? 2 : 1);
    float* stats = reinterpret_cast<float*>(shared + at.stats);  // [buffers][2][STEP]: lse and delta
    Heads<T>* heads = reinterpret_cast<Heads<T>*>(shared);
    if (threadIdx.x == 0) {
        const int64_t batch = kv / p.kv_heads;
        const int64_t head = kv % p.kv_heads * p.group;
        heads->q = p.q + batch * p.stride_q.batch + head * p.stride_q.head;
        heads->dout = p.dout + batch * p.stride_dout.batch + head * p.stride_dout.head;
        heads->out = p.out + batch * p.stride_out.batch + head * p.stride_out.head;
        heads->dq = p.dq + batch * p.stride_dq.batch + head * p.stride_dq.head;
        heads->lse = p.lse + int64_t(kv) * p.group * p.n_q;
    }

    for (int chunk_band = first_band; chunk_band < last_band; chunk_band += p.chunk_bands) {
        const int chunk_bands = min(p.chunk_bands, last_band - chunk_band);
        const int first_key = chunk_band * 16;
        const bool extra = shares_a_band(D) && chunk_bands > warps * M;  // a band that the warps share
        const int held = held_bands(D, chunk_bands, extra);
        const int end_key = min(p.n_k, first_key + chunk_bands * 16);
        if (chunk_band > first_band) __syncthreads();
        {
            const int64_t batch = kv / p.kv_heads;
            const int64_t head = kv % p.kv_heads;
            const T* k = p.k + batch * p.stride_k.batch + head * p.stride_k.head;
            const T* v = p.v + batch * p.stride_v.batch + head * p.stride_v.head;
            start_rows<D>(shared + at.k, k, p.stride_k.row, first_key, held * 16, end_key);
            start_rows<D>(shared + at.v, v, p.stride_v.row, first_key, held * 16, end_key);
        }

        unsigned kept[M][KEEP ? 4 * KEEP : 4];
        float dk[M][D / 8][4] = {};
        float dv[M][D / 8][4] = {};
        // Step i has its scores before the barrier and dq after it; the copies of step i + 1 land before, those of step
        // i + 2 start after. So two rounds come before the first step.
#pragma unroll 1
        for (int i = -2; i < steps; ++i) {
            const int buffer = i & 1;
            T* ds = shared + at.ds + buffer * at.ds_size;
            const T* q = shared + at.stage + buffer * at.stage_size;
            const int member = unsigned(max(0, step0 + i)) / unsigned(head_steps);  // of the group
            const int first = (step0 + i - member * head_steps) * STEP;  // query
            const int count = min(STEP, p.n_q - first);

            if (i >= 0 && first_key + warp * M * 16 < end_key) {
                // A second pass for the shared band: 16 queries a warp, the last warps first.
                const int passes = extra && (warps - 1 - warp) * 16 < count ? 2 : 1;
#pragma unroll 1
                for (int pass = 0; pass < passes; ++pass) {
                    const bool own = pass == 0;
                    const int band = own ? warp * M : warps * M;
                    const T* k = shared + at.k + band * 16 * pitch(D);
                    if constexpr (KEEP > 0) {
                        if (i == 0 || extra) {
                            const T* line = k + lane_place(pitch(D));
#pragma unroll
                            for (int m = 0; m < M; ++m) {
#pragma unroll
                                for (int pair = 0; pair < KEEP; ++pair) {
                                    ldmatrix_x4<false>(kept[m] + 4 * pair, line + m * 16 * pitch(D) + pair * 16);
                                }
                            }
                        }
                    }
                    const bool ragged = first_key + (band + M) * 16 > end_key;
#pragma unroll 1
                    for (int row = own ? 0 : (warps - 1 - warp) * 16; row < count; row += own ? 16 : warps * 16) {
                        const T* q_rows = q + row * pitch(D);
                        const T* dout_rows = q_rows + STEP * pitch(D);
                        const float* lse = stats + buffer * 2 * STEP + row + 2 * t;
                        float s[M][2][4] = {};
                        multiply_scores<D, KEEP>(s, kept, k, q_rows);
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            const float2 shift = *reinterpret_cast<const float2*>(lse + 8 * n);
#pragma unroll
                            for (int m = 0; m < M; ++m) {
#pragma unroll
                                for (int j = 0; j < 4; ++j) {
                                    s[m][n][j] = exp2_approx(s[m][n][j] * p.scale_log2 - (j % 2 ? shift.y : shift.x));
                                }
                            }
                        }
                        if (ragged) {
#pragma unroll
                            for (int m = 0; m < M; ++m) {
#pragma unroll
                                for (int j = 0; j < 8; ++j) {
                                    const int key = first_key + (band + m) * 16 + g + j % 4 / 2 * 8;
                                    if (key >= end_key) s[m][j / 4][j % 4] = 0.0f;
                                }
                            }
                        }
                        unsigned packed[M][4];
#pragma unroll
                        for (int m = 0; m < M; ++m) {
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                packed[m][j] = pack<T>(s[m][j / 2][j % 2 * 2], s[m][j / 2][j % 2 * 2 + 1]);
                            }
                        }
                        if (own && p.need_dkv) {
                            multiply_gradient<D>(dv, packed, dout_rows);
                        } else if (!own) {
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                T* to = shared + at.p + (g + j % 2 * 8) * pitch(STEP) + row + j / 2 * 8 + 2 * t;
                                *reinterpret_cast<unsigned*>(to) = packed[0][j];
                            }
                        }
                        float dp[M][2][4];  // dp - delta
#pragma unroll
                        for (int n = 0; n < 2; ++n) {
                            const float2 delta = *reinterpret_cast<const float2*>(lse + STEP + 8 * n);
#pragma unroll
                            for (int m = 0; m < M; ++m) {
#pragma unroll
                                for (int j = 0; j < 4; ++j) dp[m][n][j] = j % 2 ? -delta.y : -delta.x;
                            }
                        }
                        const unsigned none[M][4] = {};
                        multiply_scores<D, 0>(dp, none, k + (at.v - at.k), dout_rows);
#pragma unroll
                        for (int m = 0; m < M; ++m) {
#pragma unroll
                            for (int j = 0; j < 4; ++j) {
                                packed[m][j] = pack<T>(
                                    s[m][j / 2][j % 2 * 2] * dp[m][j / 2][j % 2 * 2],
                                    s[m][j / 2][j % 2 * 2 + 1] * dp[m][j / 2][j % 2 * 2 + 1]);
                                const int key = (band + m) * 16 + g + j % 2 * 8;
                                *reinterpret_cast<unsigned*>(ds + key * pitch(STEP) + row + j / 2 * 8 + 2 * t) =
                                    packed[m][j];
                            }
                        }
                        if (own && p.need_dkv) multiply_gradient<D>(dk, packed, q_rows);
                    }
                }
            }

            if (i >= -1 && i + 1 < steps) {  // lse and delta of the next step, whose copies by this thread have landed
                cp_async_wait<0>();
                const T* dout = shared + at.stage + (buffer ^ 1) * at.stage_size + STEP * pitch(D);
                const T* out = shared + at.out;
                float* to = stats + (buffer ^ 1) * 2 * STEP;
#pragma unroll 1
                for (int row = threadIdx.x / 8; row < STEP; row += blockDim.x / 8) {  // those beyond the last: anything
                    float sum = 0.0f;
#pragma unroll 1
                    for (int chunk = lane % 8; chunk < D / 8; chunk += 8) {
                        float a[8];
                        float b[8];
                        to_floats(load_vec<T, 8>(dout + row * pitch(D) + chunk * 8), a);
                        to_floats(load_vec<T, 8>(out + row * pitch(D) + chunk * 8), b);
#pragma unroll
                        for (int e = 0; e < 8; ++e) sum += a[e] * b[e];
                    }
                    sum = warp_sum<8>(sum);
                    if (lane % 8 == 0) to[STEP + row] = sum;
                }
            }
            __syncthreads();

            if (i >= 0 && extra && p.need_dkv) {  // dk and dv of the shared band: 8 columns of each a warp
                float dk_extra[4] = {};
                float dv_extra[4] = {};
                float4* sums = reinterpret_cast<float4*>(shared + at.sums) + threadIdx.x * 2;
                if (i > 0) load_sums(dk_extra, dv_extra, sums);
                const T* left = shared + at.p + lane_place(pitch(STEP));
                const T* left_ds = ds + warps * M * 16 * pitch(STEP) + lane_place(pitch(STEP));
                const T* right = q + lane % 16 * pitch(D) + warp * 8;
#pragma unroll 1
                for (int row = 0; row < count; row += 16) {
                    unsigned a[4];
                    unsigned b[2];
                    ldmatrix_x4<false>(a, left + row);
                    ldmatrix_x2<true>(b, right + (STEP + row) * pitch(D));
                    mma_m16n8k16<T>(dv_extra, a, b);
                    ldmatrix_x4<false>(a, left_ds + row);
                    ldmatrix_x2<true>(b, right + row * pitch(D));
                    mma_m16n8k16<T>(dk_extra, a, b);
                }
                sums[0] = make_float4(dk_extra[0], dk_extra[1], dk_extra[2], dk_extra[3]);
                sums[1] = make_float4(dv_extra[0], dv_extra[1], dv_extra[2], dv_extra[3]);
                __syncthreads();
            }

            float next_lse = INFINITY;
            if (i + 2 < steps) {
                const int step = step0 + i + 2;
                const int64_t member = unsigned(step) / unsigned(head_steps);
                const int next = (step - int(member) * head_steps) * STEP;
                const int rows = min(STEP, (p.n_q - next + 15) / 16 * 16);
                T* stage = shared + at.stage + buffer * at.stage_size;
                start_rows<D>(stage, heads->q + member * p.stride_q.head, p.stride_q.row, next, rows, p.n_q);
                const T* dout = heads->dout + member * p.stride_dout.head;
                start_rows<D>(stage + STEP * pitch(D), dout, p.stride_dout.row, next, rows, p.n_q);
                const T* out = heads->out + member * p.stride_out.head;
                start_rows<D>(shared + at.out, out, p.stride_out.row, next, rows, p.n_q);
                const int row = next + threadIdx.x;
                if (threadIdx.x < STEP && row < p.n_q) next_lse = heads->lse[member * p.n_q + row];
                cp_async_commit();
            }

            // dq of this step, in pieces of 32 queries x 16 columns, the first to the last warps: they have fewer keys.
            constexpr int COLUMNS = (R::CHUNKS + 1) / 2;
            const int pieces = i < 0 ? 0 : (count + 31) / 32 * COLUMNS;
            const bool to_parts = p.key_splits > 1 || chunk_band + p.chunk_bands < last_band;
#pragma unroll 1
            for (int piece = warps - 1 - warp; piece < pieces; piece += warps) {
                const int row = piece / COLUMNS * 32;
                const int chunk = piece % COLUMNS * 2;
                const bool both = !R::ODD || chunk + 1 < R::CHUNKS;
                float sum[2][2][4] = {};
                const int64_t part = ((key_split * p.heads_kv + kv) * p.group + member) * p.n_q + first + row + g;
                float* parts = p.dq_parts + part * D + chunk * 8 + 2 * t;
                if (chunk_band > first_band) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        if (row + g + 8 * (j / 2) < count && (j % 2 == 0 || both)) {
                            const float2 x = *reinterpret_cast<const float2*>(parts + j / 2 * 8 * D + j % 2 * 8);
                            sum[j / 4][j % 2][j / 2 % 2 * 2] = x.x;
                            sum[j / 4][j % 2][j / 2 % 2 * 2 + 1] = x.y;
                        }
                    }
                }
                const T* left = ds + (lane % 8 + lane / 16 * 8) * pitch(STEP) + row + lane / 8 % 2 * 8;
                const T* right = shared + at.k + lane % 16 * pitch(D) + (both ? chunk + lane / 16 : chunk) * 8;
#pragma unroll 1
                for (int band = 0; band < chunk_bands; ++band) {
                    unsigned a0[4];
                    unsigned a1[4];
                    unsigned b[4];
                    ldmatrix_x4<true>(a0, left + band * 16 * pitch(STEP));
                    ldmatrix_x4<true>(a1, left + band * 16 * pitch(STEP) + 16);
                    ldmatrix_x4<true>(b, right + band * 16 * pitch(D));
                    mma_m16n8k16<T>(sum[0][0], a0, b);
                    mma_m16n8k16<T>(sum[0][1], a0, b + 2);
                    mma_m16n8k16<T>(sum[1][0], a1, b);
                    mma_m16n8k16<T>(sum[1][1], a1, b + 2);
                }
                if (to_parts) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        if (row + g + 8 * (j / 2) < count && (j % 2 == 0 || both)) {
                            *reinterpret_cast<float2*>(parts + j / 2 * 8 * D + j % 2 * 8) = make_float2(
                                sum[j / 4][j % 2][j / 2 % 2 * 2], sum[j / 4][j % 2][j / 2 % 2 * 2 + 1]);
                        }
                    }
                } else {
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        unsigned word[4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            const float* x = sum[m][j % 2] + j / 2 * 2;
                            word[j] = pack<T>(x[0] * p.scale, x[1] * p.scale);
                        }
                        transpose_quad(word);
                        const int to = row + m * 16 + g + t / 2 * 8;
                        if (to < count && (both || t % 2 == 0)) {
                            T* dq = heads->dq + member * p.stride_dq.head + (first + to) * p.stride_dq.row;
                            *reinterpret_cast<uint4*>(dq + (chunk + t % 2) * 8) =
                                make_uint4(word[0], word[1], word[2], word[3]);
                        }
                    }
                }
            }
            if (i + 2 < steps && threadIdx.x < STEP) stats[buffer * 2 * STEP + threadIdx.x] = next_lse;
        }

        if (!p.need_dkv) continue;
        const int64_t batch = kv / p.kv_heads;
        const int64_t head = kv % p.kv_heads;
        T* to_k = p.dk + batch * p.stride_dk.batch + head * p.stride_dk.head;
        T* to_v = p.dv + batch * p.stride_dv.batch + head * p.stride_dv.head;
        const int64_t plane = p.heads_kv * p.n_k * D;
        float* parts = p.dkv_parts + query_split * 2 * plane + int64_t(kv) * p.n_k * D;
        const int key = first_key + warp * M * 16;
        float* own = reinterpret_cast<float*>(shared + at.k) + warp * M * 16 * pitch(D);  // the keys are needed no more
        const int rows = min(M * 16, end_key - key);
        // Where the query splits share dk and dv, their parts; else the gradients.
        float* to_parts = p.query_splits > 1 ? parts + int64_t(key) * D : nullptr;
        __syncthreads();
        if (rows > 0) store_bands<D>(own, dk);
        write_rows<D>(own, to_k + key * p.stride_dk.row, to_parts, p.stride_dk.row, p.scale, rows);
        if (rows > 0) store_bands<D>(own, dv);
        if (to_parts != nullptr) to_parts += plane;
        write_rows<D>(own, to_v + key * p.stride_dv.row, to_parts, p.stride_dv.row, 1.0f, rows);
        if (extra) {
            float dk_extra[4];
            float dv_extra[4];
            load_sums(dk_extra, dv_extra, reinterpret_cast<float4*>(shared + at.sums) + threadIdx.x * 2);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = first_key + warps * M * 16 + g + half * 8;
                if (key >= p.n_k) continue;
                if (p.query_splits == 1) {
                    const int column = warp * 8 + 2 * t;
                    *reinterpret_cast<unsigned*>(to_k + key * p.stride_dk.row + column) =
                        pack<T>(dk_extra[half * 2] * p.scale, dk_extra[half * 2 + 1] * p.scale);
                    *reinterpret_cast<unsigned*>(to_v + key * p.stride_dv.row + column) =
                        pack<T>(dv_extra[half * 2], dv_extra[half * 2 + 1]);
                } else {
                    float* to = parts + int64_t(key) * D + warp * 8 + 2 * t;
                    *reinterpret_cast<float2*>(to) = make_float2(dk_extra[half * 2], dk_extra[half * 2 + 1]);
                    *reinterpret_cast<float2*>(to + plane) = make_float2(dv_extra[half * 2], dv_extra[half * 2 + 1]);
                }
            }
        }
    }
}

// Bytes of shared memory and warps of a block.
struct BackwardBlock {
    int64_t shared;
    int warps;
};

// Starts the kernel of one head_dim. Compiled once a type, in attention_backward.cu and attention_backward_bfloat16.cu.
template <class T>
void start_backward(int64_t head_dim, const BackwardParams<T>& p, int64_t blocks, BackwardBlock block,
                    cudaStream_t stream);

template <class T, int... Dims>
void start_backward_of(
    int64_t head_dim, const BackwardParams<T>& p, int64_t blocks, BackwardBlock block, cudaStream_t stream) {
    const bool found = ((head_dim == Dims && (launch(attention_backward_kernel<Dims, T>, blocks, dim3(block.warps * 32),
                                                     size_t(block.shared), stream, p), true)) || ...);
    require(found, "attention_backward: no kernel for head_dim ", head_dim);
}

}  // namespace attention
