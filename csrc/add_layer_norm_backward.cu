// Residual add, LayerScale, drop path and layer normalisation in one pass, backward.
//
//     h = ds + LN'(dy)                       dresidual = h,  dx = h * gamma * sample
//     dgamma = sum over rows of h * x * sample        dsample = sum over a sample of h * x * gamma
//
// and dweight and dbias as in layer_norm.cu. It reads dy, ds and s and writes dresidual (8 B an element in 16 bits),
// plus x and dx where there is a scale (12 B). The shape of the program is that of layer_norm.cu; since there are up
// to three partial sums of each column in registers, it computes xhat and g twice, from shared memory, rather than
// keep them.
//
// A 16-bit x beside a float32 s moves 8 bytes at a time, and is not copied ahead.
#include "add_layer_norm.h"

#include "norm_rows.cuh"

using namespace norm_rows;

namespace {

constexpr int SINGLES = 16;  // V where N = 1

struct BackwardArgs {
    const void* dy;  // [rows, width], strides as in Rows
    Rows dy_rows;
    const void* ds;  // [rows, width], strides as in Rows, or null for 0
    Rows ds_rows;
    const void* x;  // [rows, width], strides as in Rows, or null: no gradient of a scale is wanted
    Rows x_rows;
    const void* s;      // [rows, width] contiguous
    Parameter gamma;    // [width]
    Parameter sample;   // [rows / rows_per_sample]
    Parameter weight;   // [width]
    const float* mean;  // [rows]
    const float* rstd;  // [rows]
    void* dx;           // [rows, width] contiguous, or null: not wanted
    void* dresidual;    // [rows, width] contiguous, or null: not wanted
    float* dweight;     // [blocks, width], or null
    float* dbias;       // [blocks, width], or null
    float* dgamma;      // [blocks, width], or null
    float* dsample;     // [rows], or null
    int64_t rows;
    int64_t rows_per_sample;
    int width;
    int pieces;
    int code;  // dtype of dy, ds and s
    int x_code;
    int dx_code;
    int dresidual_code;
    float per_width;
    int held;     // pieces of a row a thread, at most V
    int steps;    // rows of a thread, R at a time
    int stages;   // steps that are copied ahead: 2, or 1 where shared memory is short
    int ds_slot;  // which tensor of a stage ds is, after dy and s; 0: it is read from global memory
    int x_slot;   // likewise
    int slots;    // tensors of a stage
};

// 16-bit rows are at most 384 threads: at 168 registers that is 12 warps a multiprocessor.
template <class T, int N, int V, int R>
__global__ void __launch_bounds__(N == 8 ? 384 : 512, 1) add_layer_norm_backward_kernel(BackwardArgs a) {
    SHARED(float, partial, [2][32 * 2 * R]);
    SHARED(float, partial_dsample, [2][32 * R]);
    DYNAMIC_SHARED(T, stage);  // [stages][slots][R][held][threads][N]; at the end floats, [V * N][threads]
    const int across = int(blockDim.x);
    const int threads = across * int(blockDim.y);
    const int thread = int(threadIdx.y) * across + int(threadIdx.x);
    const int code = N == 1 ? a.code : CODE<T>;
    const int x_code = sizeof(T) == 4 ? a.x_code : code;
    const int64_t rows_a_step = int64_t(gridDim.x) * R * blockDim.y;
    const int64_t first_row = int64_t(blockIdx.x) * R * blockDim.y + threadIdx.y;

    const auto row_of = [&](int step, int r) { return first_row + step * rows_a_step + r * int(blockDim.y); };
    const auto piece_of = [&](int v) { return v * across + int(threadIdx.x); };
    const auto slot = [&](int step, int tensor, int r, int v) {
        const int buffer = a.stages == 2 ? step % 2 : 0;
        return stage + ((((buffer * a.slots + tensor) * R + r) * a.held + v) * threads + thread) * N;
    };
    // Starts the copies of a step's pieces of all tensors; zeros for rows that are not there.
    const auto fetch = [&](int step) {
        if constexpr (N > 1) {
            if (step < a.steps) {
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const int64_t row = row_of(step, r);
                    const bool valid = row < a.rows;
                    const T* const dy = static_cast<const T*>(a.dy) + (valid ? a.dy_rows.start(row) : 0);
                    const T* const s = static_cast<const T*>(a.s) + (valid ? row * a.width : 0);
                    const T* const ds = static_cast<const T*>(a.ds) + (valid && a.ds_slot ? a.ds_rows.start(row) : 0);
                    const T* const x = static_cast<const T*>(a.x) + (valid && a.x_slot ? a.x_rows.start(row) : 0);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        if (piece_of(v) >= a.pieces) continue;
                        cp_async_16(slot(step, 0, r, v), dy + piece_of(v) * N, valid);
                        cp_async_16(slot(step, 1, r, v), s + piece_of(v) * N, valid);
                        if (a.ds_slot) cp_async_16(slot(step, a.ds_slot, r, v), ds + piece_of(v) * N, valid);
                        if (a.x_slot) cp_async_16(slot(step, a.x_slot, r, v), x + piece_of(v) * N, valid);
                    }
                }
            }
            cp_async_commit();
        }
    };
    int64_t dy_start[R] = {};  // of this step's rows of single elements
    int64_t ds_start[R] = {};
    int64_t x_start[R] = {};
    const auto read = [&](int step, int r, int v, float mean, float rstd, float(&dy)[N], float(&xhat)[N]) {
        Piece<T, N> pieces[2];
        if constexpr (N > 1) {
            pieces[0] = load_copied<T, N>(slot(step, 0, r, v));
            pieces[1] = load_copied<T, N>(slot(step, 1, r, v));
        } else {
            const int64_t row = row_of(step, r);
            const bool valid = row < a.rows;
            pieces[0] = load_piece<T, N>(a.dy, code, dy_start[r], piece_of(v), valid);
            pieces[1] = load_piece<T, N>(a.s, code, row * a.width, piece_of(v), valid);
        }
        piece_to_floats<T, N>(pieces[0], code, dy);
        piece_to_floats<T, N>(pieces[1], code, xhat);
#pragma unroll
        for (int i = 0; i < N; ++i) xhat[i] = (xhat[i] - mean) * rstd;
    };
    // Of ds or x: from its slot, or, without one, from global memory.
    const auto read_other = [&](int step, int r, int v, int tensor, const void* data, const Rows& rows, int64_t single,
                                int its_code, float(&out)[N]) {
        if constexpr (N > 1) {
            if (tensor != 0) return piece_to_floats<T, N>(load_copied<T, N>(slot(step, tensor, r, v)), CODE<T>, out);
        }
        const int64_t row = row_of(step, r);
        const bool valid = row < a.rows;
        const int64_t start = N == 1 ? single : valid ? rows.start(row) : 0;
        piece_to_floats<T, N>(load_piece<T, N>(data, its_code, start, piece_of(v) * N, valid), its_code, out);
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
    float dgamma[V * N] = {};
#pragma unroll 1
    for (int step = 0; step < a.stages; ++step) fetch(step);
    read_statistics(0);
    for (int step = 0; step < a.steps; ++step) {
        float sums[2 * R] = {};  // of g, of g * xhat
        float dsample[R] = {};
        float mean[R];
        float rstd[R];
        float factor[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int64_t row = row_of(step, r);
            mean[r] = next_mean[r];
            rstd[r] = next_rstd[r];
            factor[r] = row < a.rows ? sample_of(a.sample, row, a.rows_per_sample) : 0.0f;
            if (N == 1 && row < a.rows) {
                dy_start[r] = a.dy_rows.start(row);
                if (a.ds != nullptr) ds_start[r] = a.ds_rows.start(row);
                if (a.x != nullptr) x_start[r] = a.x_rows.start(row);
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
                }
            }
        }
        row_sums(sums, partial[step % 2]);
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) sums[i] *= a.per_width;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (piece_of(v) >= a.pieces) continue;
            float weight[N];
            load_parameter<T, N>(a.weight, piece_of(v) * N, 1.0f, weight);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int64_t row = row_of(step, r);
                const int64_t start = row * a.width;
                float h[N];
                float other[N];  // xhat, then ds, then h * x
                read(step, r, v, mean[r], rstd[r], h, other);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    h[i] = (h[i] * weight[i] - sums[2 * r] - other[i] * sums[2 * r + 1]) * rstd[r];
                }
                if (a.ds != nullptr) {
                    read_other(step, r, v, a.ds_slot, a.ds, a.ds_rows, ds_start[r], code, other);
#pragma unroll
                    for (int i = 0; i < N; ++i) h[i] += other[i];
                }
                if (a.dresidual != nullptr && row < a.rows) {
                    store_piece<T, N>(a.dresidual, a.dresidual_code, start, piece_of(v) * N, h);
                }
                float gamma[N];
                load_parameter<T, N, true>(a.gamma, piece_of(v) * N, 1.0f, gamma);
                if (a.x != nullptr) {
                    read_other(step, r, v, a.x_slot, a.x, a.x_rows, x_start[r], x_code, other);
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        other[i] *= h[i];
                        dgamma[v * N + i] += other[i] * factor[r];
                        dsample[r] += other[i] * gamma[i];
                    }
                }
                if (a.dx != nullptr && row < a.rows) {
#pragma unroll
                    for (int i = 0; i < N; ++i) h[i] *= gamma[i] * factor[r];
                    store_piece<T, N>(a.dx, a.dx_code, start, piece_of(v) * N, h);
                }
            }
        }
        fetch(step + a.stages);
        if (a.dsample != nullptr) {
            row_sums(dsample, partial_dsample[step % 2]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if (threadIdx.x == 0 && row_of(step, r) < a.rows) a.dsample[row_of(step, r)] = dsample[r];
            }
        }
    }
    float* const room = reinterpret_cast<float*>(stage);
    const int64_t table_row = int64_t(blockIdx.x) * a.width;
    if (a.dweight != nullptr) write_partial<N, V>(dweight, room, a.dweight + table_row, a.pieces);
    if (a.dbias != nullptr) write_partial<N, V>(dbias, room, a.dbias + table_row, a.pieces);
    if (a.dgamma != nullptr) write_partial<N, V>(dgamma, room, a.dgamma + table_row, a.pieces);
}

// Returns how many blocks ran, which is how many rows of the tables of partial sums were written.
template <class T, int N, int V>
int run_backward(BackwardArgs& a, const Plan& plan, int programs, int device, cudaStream_t stream) {
    constexpr int R = 1;
    const int threads = int(plan.block.x * plan.block.y);
    const int64_t steps = ceil_div(a.rows, int64_t(R) * plan.block.y);
    if (threads > 192 && programs > 1) programs /= 2;  // one such block fills a multiprocessor
    const int blocks = int(steps < programs ? steps : programs);
    const size_t a_slot = N == 1 ? 0 : size_t(R * plan.held * N) * sizeof(T) * threads;
    const size_t at_end = size_t(V * N) * sizeof(float) * threads;
    a.held = plan.held;
    a.steps = int(ceil_div(steps, blocks));
    a.stages = 2;
    a.slots = 2;
    a.ds_slot = a.ds ? a.slots++ : 0;
    a.x_slot = a.x && a.x_code == CODE<T> ? a.slots++ : 0;  // what is copied is 16 bytes
    if (2 * a.slots * a_slot > EVERYWHERE) {
        const size_t limit = dynamic_limit(device);
        if (2 * a.slots * a_slot > limit) a.stages = 1;
        if (a.slots * a_slot > limit) {
            a.ds_slot = a.x_slot = 0;
            a.slots = 2;
        }
    }
    const size_t staged = a.stages * a.slots * a_slot;
    launch(add_layer_norm_backward_kernel<T, N, V, R>, Grid(blocks), plan.block, staged < at_end ? at_end : staged,
           stream, a);
    return blocks;
}

}  // namespace

void add_layer_norm_backward(
    Pointer dy, int64_t inner_dy, int64_t outer_dy, int64_t stride_dy, Pointer ds, int64_t inner_ds, int64_t outer_ds,
    int64_t stride_ds, Pointer x, int64_t inner_x, int64_t outer_x, int64_t stride_x, int x_dtype, Pointer s,
    Pointer gamma, int gamma_dtype, Pointer sample, int sample_dtype, Pointer weight, int weight_dtype, Pointer mean,
    Pointer rstd, Pointer dx, int dx_dtype, Pointer dresidual, int dresidual_dtype, Pointer dweight, int dweight_dtype,
    Pointer dbias, int dbias_dtype, Pointer dgamma, int dgamma_dtype, Pointer dsample, Pointer workspace, int programs,
    int64_t rows, int64_t rows_per_sample, int64_t width, int dtype, int device, Pointer stream) {
    const char* const op = "add_layer_norm_backward";
    const Rows dy_rows{inner_dy, outer_dy, stride_dy};
    const Rows ds_rows{inner_ds, outer_ds, stride_ds};
    const Rows x_rows{inner_x, outer_x, stride_x};
    check_rows(op, rows, width, dtype, dy_rows);
    if (ds) check_rows(op, rows, width, dtype, ds_rows);
    if (x) check_rows(op, rows, width, dtype, x_rows);
    check_samples(op, sample, rows, rows_per_sample);
    require(programs > 0, op, ": programs must be positive, got ", programs);
    require(workspace || !(dweight || dbias || dgamma), op, ": dweight, dbias and dgamma need a workspace");
    require(x || !(dgamma || dsample), op, ": dgamma and dsample need x");
    require(!x || dtype == Float32 || x_dtype == dtype, op, ": x must be of s's 16-bit dtype ", dtype, ", got ",
            x_dtype);
    for (const int code : {dx ? dx_dtype : dtype, dresidual ? dresidual_dtype : dtype}) {
        require(dtype == Float32 || code == dtype || code == Float32, op,
                ": gradients must be float32 or of s's dtype ", dtype, ", got ", code);
    }
    float* const tables = at<float>(workspace);
    const int64_t table = int64_t(programs) * width;
    BackwardArgs a{at<const void>(dy), dy_rows, at<const void>(ds), ds_rows,
                   dgamma || dsample ? at<const void>(x) : nullptr, x_rows, at<const void>(s),
                   {at<const void>(gamma), gamma_dtype}, {at<const void>(sample), sample_dtype},
                   {at<const void>(weight), weight_dtype}, at<const float>(mean), at<const float>(rstd), at<void>(dx),
                   at<void>(dresidual), dweight ? tables : nullptr, dbias ? tables + table : nullptr,
                   dgamma ? tables + 2 * table : nullptr, at<float>(dsample), rows, rows_per_sample, int(width), 0,
                   dtype, x_dtype, dx_dtype, dresidual_dtype, 1.0f / float(width), 0, 0, 0, 0, 0, 0};
    const bool vectors = whole(dtype, dy_rows, width) && (!ds || whole(dtype, ds_rows, width)) &&
                         (!a.x || whole(dtype, x_rows, width)) &&
                         whole(dy | ds | s | gamma | weight | dx | dresidual | workspace) && (!a.x || whole(x));
    const DeviceGuard guard(device);
    int blocks = 0;
    with_elements(op, dtype, vectors, [&](auto zero, auto n) {
        constexpr int N = decltype(n)::value;
        const Plan plan = plan_rows(width, N, N == 1 ? SINGLES : 4, 192);
        a.pieces = plan.pieces;
        const auto run = [&](auto v) {
            blocks = run_backward<decltype(zero), N, decltype(v)::value>(a, plan, programs, device, as_stream(stream));
        };
        with_held<N == 1 ? SINGLES : 4>(plan.held, run);  // narrow rows too: of up to four tensors, one is enough
    });
    column_sums({{a.dweight, a.dbias, a.dgamma}, {at<void>(dweight), at<void>(dbias), at<void>(dgamma)},
                 {dweight_dtype, dbias_dtype, dgamma_dtype}, blocks, a.width},
                as_stream(stream));
}
