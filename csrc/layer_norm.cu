// Layer normalisation over the last dimension, forward and backward.
//
//     y  = xhat * weight + bias          xhat = (x - mean) * rstd,  rstd = 1 / sqrt(var + eps)
//     dx = rstd * (g - mean(g) - xhat * mean(g * xhat))             g = dy * weight
//     dweight = sum over rows of dy * xhat                          dbias = sum over rows of dy
//
// Both passes read each tensor once: forward moves 2 elements (4 B in 16 bits), backward 3 (6 B); some 10 and 20
// instructions an element leave both bound by memory. Rows lie on threads as norm_rows.cuh says; up to 1024 16-bit
// columns a row is one warp's, and no barrier is needed.
//
// Forward: a block for every few rows. A row stays in registers as it was read, so the variance is the two-pass one,
// and at 64 registers or fewer a multiprocessor has room for 1,024 threads with 48 or 64 B each under way, where 4.8
// TB/s need some 40 KB (Little's law).
//
// Backward: persistent blocks, two a multiprocessor, whose threads keep their columns' part of dweight and dbias in
// registers over all their rows: 12 warps a multiprocessor, too few to have loads enough under way. So each thread
// copies its pieces of the rows after this one to shared memory (cp.async), two ahead, and reads back what it copied
// itself: again no barrier, and up to 98 KB a multiprocessor under way. A second kernel adds up the blocks' partial
// sums in a fixed order. No atomics.
#include "layer_norm.h"

#include "norm_rows.cuh"

using namespace norm_rows;

namespace {

struct ForwardArgs {
    const void* x;  // [rows, width], strides as in Rows
    Rows x_rows;
    Parameter weight;  // [width]
    Parameter bias;    // [width]
    void* y;           // [rows, width] contiguous
    float* mean;       // [rows], or null: not saved
    float* rstd;       // [rows]
    int64_t rows;
    int width;
    int pieces;
    int code;  // dtype of x and y
    float per_width;  // 1 / width
    float eps;
};

constexpr int SINGLES = 8;  // V where N = 1

template <class T, int N, int V, int R>
__global__ void __launch_bounds__(N == 1 ? 1024 : 512, N == 1 ? 1 : 2) layer_norm_forward_kernel(ForwardArgs a) {
    SHARED(float, partial, [2][32 * R]);
    const int across = int(blockDim.x);
    const int code = N == 1 ? a.code : CODE<T>;
    int64_t row[R];
    Piece<T, N> x[R][V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        row[r] = (int64_t(blockIdx.x) * R + r) * blockDim.y + threadIdx.y;
        const int64_t start = row[r] < a.rows ? a.x_rows.start(row[r]) : 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int piece = v * across + int(threadIdx.x);
            const bool valid = row[r] < a.rows && piece < a.pieces;
            x[r][v] = load_piece<T, N>(a.x, code, start, piece * N, valid);
        }
    }
    float mean[R];
    float rstd[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        mean[r] = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            float values[N];
            piece_to_floats<T, N>(x[r][v], code, values);
            mean[r] += sum_of(values);
        }
    }
    row_sums(mean, partial[0]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        mean[r] *= a.per_width;
        rstd[r] = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (v * across + int(threadIdx.x) < a.pieces) {
                float values[N];
                piece_to_floats<T, N>(x[r][v], code, values);
#pragma unroll
                for (int i = 0; i < N; ++i) values[i] = (values[i] - mean[r]) * (values[i] - mean[r]);
                rstd[r] += sum_of(values);
            }
        }
    }
    row_sums(rstd, partial[1]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        rstd[r] = rsqrtf(rstd[r] * a.per_width + a.eps);
        if (a.mean != nullptr && threadIdx.x == 0 && row[r] < a.rows) {
            a.mean[row[r]] = mean[r];
            a.rstd[row[r]] = rstd[r];
        }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int piece = v * across + int(threadIdx.x);
        if (piece < a.pieces) {
            float weight[N];
            float bias[N];
            load_parameter<T, N>(a.weight, piece * N, 1.0f, weight);
            load_parameter<T, N>(a.bias, piece * N, 0.0f, bias);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (row[r] < a.rows) {
                    float values[N];
                    piece_to_floats<T, N>(x[r][v], code, values);
#pragma unroll
                    for (int i = 0; i < N; ++i) values[i] = (values[i] - mean[r]) * rstd[r] * weight[i] + bias[i];
                    store_piece<T, N>(a.y, code, row[r] * a.width, piece * N, values);
                }
            }
        }
    }
}

struct BackwardArgs {
    const void* dy;  // [rows, width], strides as in Rows
    Rows dy_rows;
    const void* x;  // [rows, width], strides as in Rows
    Rows x_rows;
    Parameter weight;   // [width]
    const float* mean;  // [rows]
    const float* rstd;  // [rows]
    void* dx;           // [rows, width] contiguous, or null: not wanted
    float* dweight;     // [blocks, width], or null
    float* dbias;       // [blocks, width], or null
    int64_t rows;
    int width;
    int pieces;
    int code;  // dtype of dy, x and dx
    float per_width;
    int held;    // pieces of a row a thread, at most V
    int steps;   // rows of a thread, R at a time
    int stages;  // steps that are copied ahead: 2, or 1 where shared memory is short
};

// 16-bit rows are at most 384 threads: at 168 registers that is 12 warps a multiprocessor.
template <class T, int N, int V, int R>
__global__ void __launch_bounds__(N == 8 ? 384 : N == 4 ? 512 : 1024, 1) layer_norm_backward_kernel(BackwardArgs a) {
    constexpr bool KEEP = N > 1;  // xhat and g stay in registers; else they are computed twice
    SHARED(float, partial, [2][32 * 2 * R]);
    DYNAMIC_SHARED(T, stage);  // [stages][dy, x][R][held][threads][N]; at the end floats, [V * N][threads]
    const int across = int(blockDim.x);
    const int threads = across * int(blockDim.y);
    const int thread = int(threadIdx.y) * across + int(threadIdx.x);
    const int code = N == 1 ? a.code : CODE<T>;
    const int64_t rows_a_step = int64_t(gridDim.x) * R * blockDim.y;
    const int64_t first_row = int64_t(blockIdx.x) * R * blockDim.y + threadIdx.y;

    const auto row_of = [&](int step, int r) { return first_row + step * rows_a_step + r * int(blockDim.y); };
    const auto piece_of = [&](int v) { return v * across + int(threadIdx.x); };
    const auto slot = [&](int step, int tensor, int r, int v) {
        const int buffer = a.stages == 2 ? step % 2 : 0;
        return stage + ((((buffer * 2 + tensor) * R + r) * a.held + v) * threads + thread) * N;
    };
    // Starts the copies of a step's pieces of dy and x; zeros for rows that are not there.
    const auto fetch = [&](int step) {
        if constexpr (N > 1) {
            if (step < a.steps) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const int64_t row = row_of(step, r);
                    const bool valid = row < a.rows;
                    const T* const dy = static_cast<const T*>(a.dy) + (valid ? a.dy_rows.start(row) : 0);
                    const T* const x = static_cast<const T*>(a.x) + (valid ? a.x_rows.start(row) : 0);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        if (piece_of(v) >= a.pieces) continue;
                        cp_async_16(slot(step, 0, r, v), dy + piece_of(v) * N, valid);
                        cp_async_16(slot(step, 1, r, v), x + piece_of(v) * N, valid);
                    }
                }
            }
            cp_async_commit();
        }
    };
    int64_t dy_start[R] = {};  // of single elements
    int64_t x_start[R] = {};
    const auto read = [&](int step, int r, int v, float mean, float rstd, float(&dy)[N], float(&xhat)[N]) {
        Piece<T, N> pieces[2];
        if constexpr (N > 1) {
            pieces[0] = load_copied<T, N>(slot(step, 0, r, v));
            pieces[1] = load_copied<T, N>(slot(step, 1, r, v));
        } else {
            const bool valid = row_of(step, r) < a.rows;
            pieces[0] = load_piece<T, N>(a.dy, code, dy_start[r], piece_of(v), valid);
            pieces[1] = load_piece<T, N>(a.x, code, x_start[r], piece_of(v), valid);
        }
        piece_to_floats<T, N>(pieces[0], code, dy);
        piece_to_floats<T, N>(pieces[1], code, xhat);
#pragma unroll
        for (int i = 0; i < N; ++i) xhat[i] = (xhat[i] - mean) * rstd;
    };
    float next_mean[R];
    float next_rstd[R];
    const auto read_statistics = [&](int step) {  // 0 of a row that is not there, whose xhat is then 0
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int64_t row = row_of(step, r);
            const bool valid = step < a.steps && row < a.rows;
            next_mean[r] = valid ? __ldg(a.mean + row) : 0.0f;
            next_rstd[r] = valid ? __ldg(a.rstd + row) : 0.0f;
        }
    };

    float dweight[V * N] = {};
    float dbias[V * N] = {};
#pragma unroll 1
    for (int step = 0; step < a.stages; ++step) fetch(step);
    read_statistics(0);
    for (int step = 0; step < a.steps; ++step) {
        float kept_xhat[KEEP ? R : 1][KEEP ? V * N : 1];
        float kept_g[KEEP ? R : 1][KEEP ? V * N : 1];
        float sums[2 * R] = {};  // of g, of g * xhat
        float mean[R];
        float rstd[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            mean[r] = next_mean[r];
            rstd[r] = next_rstd[r];
            if (N == 1 && row_of(step, r) < a.rows) {
                dy_start[r] = a.dy_rows.start(row_of(step, r));
                x_start[r] = a.x_rows.start(row_of(step, r));
            }
        }
        read_statistics(step + 1);
        if constexpr (N > 1) {
            if (a.stages == 2) {
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (piece_of(v) >= a.pieces) continue;
            float weight[N];
            load_parameter<T, N>(a.weight, piece_of(v) * N, 1.0f, weight);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float dy[N];
                float xhat[N];
                read(step, r, v, mean[r], rstd[r], dy, xhat);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    const float g = dy[i] * weight[i];
                    dweight[v * N + i] += dy[i] * xhat[i];
                    dbias[v * N + i] += dy[i];
                    sums[2 * r] += g;
                    sums[2 * r + 1] += g * xhat[i];
                    if constexpr (KEEP) {
                        kept_xhat[r][v * N + i] = xhat[i];
                        kept_g[r][v * N + i] = g;
                    }
                }
            }
        }
        fetch(step + a.stages);
        if (a.dx == nullptr) continue;
        row_sums(sums, partial[step % 2]);
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) sums[i] *= a.per_width;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (piece_of(v) >= a.pieces) continue;
            float weight[N];
            if constexpr (!KEEP) load_parameter<T, N>(a.weight, piece_of(v) * N, 1.0f, weight);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int64_t row = row_of(step, r);
                float g[N];
                float xhat[N];
                if constexpr (KEEP) {
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        g[i] = kept_g[r][v * N + i];
                        xhat[i] = kept_xhat[r][v * N + i];
                    }
                } else {
                    read(step, r, v, mean[r], rstd[r], g, xhat);
#pragma unroll
                    for (int i = 0; i < N; ++i) g[i] *= weight[i];
                }
                float dx[N];
#pragma unroll
                for (int i = 0; i < N; ++i) dx[i] = (g[i] - sums[2 * r] - xhat[i] * sums[2 * r + 1]) * rstd[r];
                if (row < a.rows) store_piece<T, N>(a.dx, code, row * a.width, piece_of(v) * N, dx);
            }
        }
    }
    float* const room = reinterpret_cast<float*>(stage);
    const int64_t table_row = int64_t(blockIdx.x) * a.width;
    if (a.dweight != nullptr) write_partial<N, V>(dweight, room, a.dweight + table_row, a.pieces);
    if (a.dbias != nullptr) write_partial<N, V>(dbias, room, a.dbias + table_row, a.pieces);
}

template <class T, int N, int V>
void run_forward(const ForwardArgs& a, const Plan& plan, cudaStream_t stream) {
    constexpr int R = N > 1 && V * N <= 8 ? 2 : 1;  // a narrow row alone is too few loads under way
    const int64_t blocks = ceil_div(a.rows, int64_t(R) * plan.block.y);
    launch(layer_norm_forward_kernel<T, N, V, R>, Grid(blocks), plan.block, 0, stream, a);
}

// Returns how many blocks ran, which is how many rows of the tables of partial sums were written.
template <class T, int N, int V>
int run_backward(BackwardArgs& a, const Plan& plan, int programs, int device, cudaStream_t stream) {
    constexpr int R = N > 1 && V < 4 ? 4 / V : 1;
    const int threads = int(plan.block.x * plan.block.y);
    const int64_t steps = ceil_div(a.rows, int64_t(R) * plan.block.y);
    if (threads > 192 && programs > 1) programs /= 2;  // one such block fills a multiprocessor
    const int blocks = int(steps < programs ? steps : programs);
    const size_t a_stage = N == 1 ? 0 : size_t(2 * R * plan.held * N) * sizeof(T) * threads;
    const size_t at_end = size_t(V * N) * sizeof(float) * threads;
    a.held = plan.held;
    a.steps = int(ceil_div(steps, blocks));
    a.stages = 2 * a_stage <= EVERYWHERE || 2 * a_stage <= dynamic_limit(device) ? 2 : 1;
    const size_t bytes = a.stages * a_stage < at_end ? at_end : a.stages * a_stage;
    launch(layer_norm_backward_kernel<T, N, V, R>, Grid(blocks), plan.block, bytes, stream, a);
    return blocks;
}

}  // namespace

void layer_norm_forward(
    Pointer x, int64_t inner, int64_t outer, int64_t stride, Pointer weight, int weight_dtype, Pointer bias,
    int bias_dtype, Pointer y, Pointer mean, Pointer rstd, int64_t rows, int64_t width, double eps, int dtype,
    int device, Pointer stream) {
    const Rows x_rows{inner, outer, stride};
    check_rows("layer_norm_forward", rows, width, dtype, x_rows);
    ForwardArgs a{at<const void>(x), x_rows, {at<const void>(weight), weight_dtype}, {at<const void>(bias), bias_dtype},
                  at<void>(y), at<float>(mean), at<float>(rstd), rows, int(width), 0, dtype, 1.0f / float(width),
                  float(eps)};
    const bool vectors = whole(dtype, x_rows, width) && whole(x | y | weight | bias);
    const DeviceGuard guard(device);
    with_elements("layer_norm_forward", dtype, vectors, [&](auto zero, auto n) {
        constexpr int N = decltype(n)::value;
        const Plan plan = plan_rows(width, N, N == 1 ? SINGLES : 4, 128);
        a.pieces = plan.pieces;
        const auto run = [&](auto v) {
            run_forward<decltype(zero), N, decltype(v)::value>(a, plan, as_stream(stream));
        };
        if constexpr (N == 8) {
            with_held<1, 2, 4>(plan.held, run);
        } else if constexpr (N == 4) {
            with_held<2, 4>(plan.held, run);
        } else {
            with_held<SINGLES>(plan.held, run);
        }
    });
}

void layer_norm_backward(
    Pointer dy, int64_t inner_dy, int64_t outer_dy, int64_t stride_dy, Pointer x, int64_t inner_x, int64_t outer_x,
    int64_t stride_x, Pointer weight, int weight_dtype, Pointer mean, Pointer rstd, Pointer dx, Pointer dweight,
    int dweight_dtype, Pointer dbias, int dbias_dtype, Pointer workspace, int programs, int64_t rows, int64_t width,
    int dtype, int device, Pointer stream) {
    const Rows dy_rows{inner_dy, outer_dy, stride_dy};
    const Rows x_rows{inner_x, outer_x, stride_x};
    check_rows("layer_norm_backward", rows, width, dtype, dy_rows);
    check_rows("layer_norm_backward", rows, width, dtype, x_rows);
    require(programs > 0, "layer_norm_backward: programs must be positive, got ", programs);
    require(workspace || !(dweight || dbias), "layer_norm_backward: dweight and dbias need a workspace");
    float* const tables = at<float>(workspace);
    BackwardArgs a{at<const void>(dy), dy_rows, at<const void>(x), x_rows, {at<const void>(weight), weight_dtype},
                   at<const float>(mean), at<const float>(rstd), at<void>(dx), dweight ? tables : nullptr,
                   dbias ? tables + int64_t(programs) * width : nullptr, rows, int(width), 0, dtype,
                   1.0f / float(width), 0, 0, 0};
    const bool vectors = whole(dtype, dy_rows, width) && whole(dtype, x_rows, width) &&
                         whole(dy | x | weight | dx | workspace);
    const DeviceGuard guard(device);
    int blocks = 0;
    with_elements("layer_norm_backward", dtype, vectors, [&](auto zero, auto n) {
        constexpr int N = decltype(n)::value;
        const Plan plan = plan_rows(width, N, N == 1 ? SINGLES : 4, 192);
        a.pieces = plan.pieces;
        const auto run = [&](auto v) {
            blocks = run_backward<decltype(zero), N, decltype(v)::value>(a, plan, programs, device, as_stream(stream));
        };
        if constexpr (N == 8) {
            with_held<2, 4>(plan.held, run);
        } else {
            with_held<N == 4 ? 4 : SINGLES>(plan.held, run);
        }
    });
    column_sums({{a.dweight, a.dbias, nullptr}, {at<void>(dweight), at<void>(dbias), nullptr},
                 {dweight_dtype, dbias_dtype, Float32}, blocks, a.width},
                as_stream(stream));
}
