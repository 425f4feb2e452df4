// Short attention, forward: o = softmax(scale q k^T) v, for heads whose keys and values fit in shared memory.
//
// Traffic: q, k, v are read once and o is written once, 8 bytes an element of a head (k and v once more for every block
// that shares their head; those reads come from L2). 4 n_q n_k d FLOPs and n_q n_k exponentials, on queries padded to
// 16 and keys padded to 8: 7 % more than that at 197 x 197, where tiles of 64 would make it 69 %.
//
// A block holds the keys and values of a head, or of several short ones, for good. Its warps take items, 16 or 32
// queries of a head each, keep queries and output in registers, and walk over the keys, 16 at a time and 8 at the end,
// with an online softmax. All keys in one pass would need a kernel for each number of them, and registers for as many
// scores, and save no memory: the keys are in shared memory anyhow. What the online form costs, the reduction over the
// lanes of a row and the rescaling, is put off until a row's maximum grows by more than 2^8, which after the first
// keys it hardly ever does: one vote of the warp asks. Whether a row is rescaled depends on that row alone, and
// rows of 16 and 32 queries go through the same steps, so the bits of a row depend on nothing but its head.
//
// 32 queries a warp halve the reads of shared memory, which bound 16 (128 cycles of ldmatrix against about 100 of
// mma.sync for 64 keys of 64 columns). Above 64 columns they do not fit in registers; and an item that has 16 queries
// or less computes 16, so that nothing is spent on padding of the larger tile. V arrives while the first scores are
// computed, the queries of a warp's next item while it works on this one.
#pragma once

#include "attention_tiles.cuh"

namespace attention {

// Warps of a block, and of a multiprocessor, at most: of 168 registers a thread, or of 128.
template <int D>
constexpr int MAX_WARPS = D > 64 && D <= 80 ? 16 : 12;
constexpr float SLACK = 8.0f;  // by how much, in base 2, a row's maximum may grow before its sums are rescaled
constexpr float LOWEST = -3.402823466e38f;  // below every finite score; -inf would make NaN of scores that are -inf
constexpr unsigned FULL = 0xFFFFFFFFu;

// Bands of 16 queries that a warp can work on at once.
template <int D>
constexpr int BANDS = D <= 64 ? 2 : 1;

template <class T>
struct Forward {
    const T* q;  // (B, H, n_q, d)
    const T* k;  // (B, H / group, n_k, d)
    const T* v;  // (B, H / group, n_k, d)
    T* o;        // (B, H, n_q, d)
    float* lse;  // (B, H, n_q)
    Strides stride_q, stride_k, stride_v, stride_o;
    int kv_heads, group, n_q, n_k;
    int units;          // heads of k and v in all: B * kv_heads
    int units_a_block;  // more than 1 only if splits is 1
    int splits;         // blocks that share a unit
    int rows;           // of an item: 16 or 32
    int tiles;          // items of a head of q
    int items_a_block;
    float scale;  // above 0, log2(e) included
    bool negate;  // the scores
};

// Which queries an item is.
struct Item {
    int unit;  // of the block
    int batch;
    int head;
    int row;
};

// What a block does. `batch` and `kv_head` are those of its first unit.
struct Work {
    int batch;
    int kv_head;
    int units;
    int end;  // of its items
};

// The batch and the head of k and v of a unit of the block.
template <class T>
__device__ __forceinline__ int2 find_unit(const Forward<T>& p, const Work& work, int unit) {
    int batch = work.batch;
    int head = work.kv_head + unit;
    for (; head >= p.kv_heads; head -= p.kv_heads) ++batch;
    return make_int2(batch, head);
}

template <class T>
__device__ __forceinline__ Item find_item(const Forward<T>& p, const Work& work, int index) {
    // Most often: no division.
    if (p.units_a_block * p.group == 1) return {0, work.batch, work.kv_head, index * p.rows};
    const unsigned head = unsigned(index) / unsigned(p.tiles);
    const unsigned unit = head / unsigned(p.group);
    const int2 at = find_unit(p, work, int(unit));
    return {int(unit), at.x, at.y * p.group + int(head - unit * p.group), (index - int(head) * p.tiles) * p.rows};
}

// Queries of an item to the warp's tile.
template <int D, class T>
__device__ __forceinline__ void copy_queries(const Forward<T>& p, T* tile, const Work& work, int index) {
    const Item item = find_item(p, work, index);
    const T* head = p.q + item.batch * p.stride_q.batch + item.head * p.stride_q.head;
    copy_rows<D>(tile, head, p.stride_q.row, item.row, p.rows, p.n_q, threadIdx.x % 32, 32);
}

// Until the block's values are there: all but the newest of each thread's copies, queries. Every warp calls it once.
__device__ __forceinline__ void wait_for_values() {
    cp_async_wait<1>();
    __syncthreads();
}

// What a warp knows of its M bands of 16 queries; [half] is row g or g + 8.
template <int D, int M>
struct State {
    unsigned q[M][D / 4];
    float sum[M][D / 8][4];  // of exponentials times values
    float total[M][2];       // of exponentials: this lane's share
    float top[M][2];         // what exponents are relative to, in base 2: within SLACK of the row's largest
};

// For rows whose largest score is above what their exponents are relative to by more than SLACK, makes it that.
template <int D, int M>
__device__ __forceinline__ void raise_tops(State<D, M>& state, const float (&found)[M][2], float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float top = quad_max(found[m][half]) * scale;
            if (top > state.top[m][half] + SLACK) {
                const float factor = exp2_approx(state.top[m][half] - top);
                state.top[m][half] = top;
                state.total[m][half] *= factor;
#pragma unroll
                for (int chunk = 0; chunk < D / 8; ++chunk) {
                    state.sum[m][chunk][2 * half] *= factor;
                    state.sum[m][chunk][2 * half + 1] *= factor;
                }
            }
        }
    }
}

// Takes in KEYS more keys, of which the head has `left`; the rest are hidden.
template <int D, int M, int KEYS, class T>
__device__ __forceinline__ void take_keys(
    State<D, M>& state, const T* k_rows, const T* v_rows, int left, float scale, bool& waiting) {
    constexpr int PIECES = KEYS / 8;
    float s[PIECES][M][4];
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[piece][m][i] = 0.0f;
        }
        multiply_rows<D, M>(s[piece], state.q, k_rows, piece * 8);
    }
    if (waiting) {
        wait_for_values();
        waiting = false;
    }
    if (left < KEYS) {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool hidden = piece * 8 + int(threadIdx.x % 4) * 2 + i % 2 >= left;
#pragma unroll
                for (int m = 0; m < M; ++m) s[piece][m][i] = hidden ? -INFINITY : s[piece][m][i];
            }
        }
    }
    float found[M][2];  // this lane's largest
    bool raise = false;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            found[m][half] = -INFINITY;
#pragma unroll
            for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    found[m][half] = fmaxf(found[m][half], s[piece][m][i]);
                }
            }
            raise = raise || found[m][half] * scale > state.top[m][half] + SLACK;
        }
    }
    if (__any_sync(FULL, raise)) raise_tops(state, found, scale);
    unsigned p[PIECES][M][2];  // exponentials, as the left operand
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float low = exp2_approx(s[piece][m][2 * half] * scale - state.top[m][half]);
                const float high = exp2_approx(s[piece][m][2 * half + 1] * scale - state.top[m][half]);
                state.total[m][half] += low + high;
                p[piece][m][half] = pack<T>(low, high);
            }
        }
    }
    if constexpr (PIECES == 1) {
        multiply_columns_8<D, M>(state.sum, p[0], v_rows, 0);
    } else {
#pragma unroll
        for (int piece = 0; piece < PIECES; piece += 2) {
            unsigned pair[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) pair[m][i] = p[piece + i / 2][m][i % 2];
            }
            multiply_columns_16<D, M>(state.sum, pair, v_rows, piece * 8);
        }
    }
}

// One item, from the queries in `q_tile` to the output. Starts the copy of the warp's next one, if there is one.
template <int D, int M, class T>
__device__ __forceinline__ void attend(const Forward<T>& p, const Item& item, T* q_tile, const T* k_tile,
                                       const T* v_tile, const Work& work, int next, bool& waiting) {
    State<D, M> state;
#pragma unroll
    for (int m = 0; m < M; ++m) {
        load_band<D>(state.q[m], q_tile, m * 16);
#pragma unroll
        for (int i = 0; i < D / 4; ++i) state.q[m][i] ^= p.negate ? 0x80008000u : 0u;
#pragma unroll
        for (int chunk = 0; chunk < D / 8; ++chunk) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.sum[m][chunk][i] = 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) state.total[m][half] = 0.0f, state.top[m][half] = LOWEST;
    }
    __syncwarp();
    if (next < work.end) copy_queries<D>(p, q_tile, work, next);
    cp_async_commit();

    int left = p.n_k;
#pragma unroll 1
    for (; left > 8; left -= 16) {
        take_keys<D, M, 16>(state, k_tile, v_tile, left, p.scale, waiting);
        k_tile += 16 * D;
        v_tile += 16 * D;
    }
    if (left > 0) take_keys<D, M, 8>(state, k_tile, v_tile, left, p.scale, waiting);

    const int lane = threadIdx.x % 32;
    T* out = p.o + item.batch * p.stride_o.batch + item.head * p.stride_o.head;
    float* lse = p.lse + (int64_t(item.batch) * p.kv_heads * p.group + item.head) * p.n_q;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = item.row + m * 16 + half * 8 + lane / 4;
            const float total = quad_sum(state.total[m][half]);
            const float factor = total == 0.0f ? 0.0f : 1.0f / total;
            store_row<D>(out + row * p.stride_o.row, state.sum[m], half, factor, row < p.n_q);
            if (lane % 4 == 0 && row < p.n_q) lse[row] = total == 0.0f ? INFINITY : state.top[m][half] + log2f(total);
        }
    }
}

template <int D, class T>
__global__ void __launch_bounds__(MAX_WARPS<D> * 32) attention_forward_kernel(const __grid_constant__ Forward<T> p) {
    DYNAMIC_SHARED(T, shared);
    constexpr int M = BANDS<D>;
    const int warp = threadIdx.x / 32;
    const int warps = blockDim.x / 32;
    const int keys = (p.n_k + 7) / 8 * 8;
    T* k_tiles = shared;                                // [units_a_block][keys][D]
    T* v_tiles = k_tiles + p.units_a_block * keys * D;  // [units_a_block][keys][D]
    T* q_tile = v_tiles + p.units_a_block * keys * D + warp * p.rows * D;  // [rows][D] of each warp

    const int first_unit = int(blockIdx.x) / p.splits * p.units_a_block;
    const int first = int(blockIdx.x) % p.splits * p.items_a_block;
    Work work;
    work.batch = first_unit / p.kv_heads;
    work.kv_head = first_unit % p.kv_heads;
    work.units = min(p.units_a_block, p.units - first_unit);
    work.end = min(first + p.items_a_block, work.units * p.group * p.tiles);
    int index = first + warp;

    if (index < work.end) copy_queries<D>(p, q_tile, work, index);
    for (int unit = 0; unit < work.units; ++unit) {
        const int2 at = find_unit(p, work, unit);
        const T* k = p.k + at.x * p.stride_k.batch + at.y * p.stride_k.head;
        copy_rows<D>(k_tiles + unit * keys * D, k, p.stride_k.row, 0, keys, p.n_k, threadIdx.x, blockDim.x);
    }
    cp_async_commit();
    for (int unit = 0; unit < work.units; ++unit) {
        const int2 at = find_unit(p, work, unit);
        const T* v = p.v + at.x * p.stride_v.batch + at.y * p.stride_v.head;
        copy_rows<D>(v_tiles + unit * keys * D, v, p.stride_v.row, 0, keys, p.n_k, threadIdx.x, blockDim.x);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

    bool waiting = true;  // for the values
    for (; index < work.end; index += warps) {
        const Item item = find_item(p, work, index);
        const T* k_tile = k_tiles + item.unit * keys * D;
        const T* v_tile = v_tiles + item.unit * keys * D;
        if (M == 2 && p.rows == 32 && item.row + 16 < p.n_q) {
            attend<D, M>(p, item, q_tile, k_tile, v_tile, work, index + warps, waiting);
        } else {
            attend<D, 1>(p, item, q_tile, k_tile, v_tile, work, index + warps, waiting);
        }
        cp_async_wait<0>();
        __syncwarp();
    }
    if (waiting) {  // a warp without an item
        cp_async_commit();
        wait_for_values();
    }
}

}  // namespace attention
