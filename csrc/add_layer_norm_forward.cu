// Residual add, LayerScale, drop path and layer normalisation in one pass, forward.
//
//     s = residual + x * gamma * sample      y = LN(s) * weight + bias
//
// gamma (width,) is LayerScale, sample a drop-path factor for each sample. LN reads s as it is stored, rounded to its
// dtype, so that backward recomputes the same xhat. It reads x and residual and writes s and y: 8 B an element in 16
// bits. The shape of the program is that of layer_norm.cu.
//
// A 16-bit x or residual beside a float32 s moves 8 bytes at a time, the four elements that go with 16 bytes of s.
#include "add_layer_norm.h"

#include "norm_rows.cuh"

using namespace norm_rows;

namespace {

constexpr int SINGLES = 8;  // V where N = 1

struct ForwardArgs {
    const void* x;  // [rows, width], strides as in Rows
    Rows x_rows;
    const void* residual;  // [rows, width], strides as in Rows
    Rows residual_rows;
    Parameter gamma;   // [width]
    Parameter sample;  // [rows / rows_per_sample]
    Parameter weight;  // [width]
    Parameter bias;    // [width]
    void* y;           // [rows, width] contiguous
    void* s;           // [rows, width] contiguous
    float* mean;       // [rows], or null: not saved
    float* rstd;       // [rows]
    int64_t rows;
    int64_t rows_per_sample;
    int width;
    int pieces;
    int code;  // dtype of s and y
    int x_code;
    int residual_code;
    float per_width;  // 1 / width
    float eps;
};

template <class T, int N, int V, int R>
__global__ void __launch_bounds__(N == 1 ? 1024 : 512, N == 1 ? 1 : 2) add_layer_norm_forward_kernel(ForwardArgs a) {
    SHARED(float, partial, [2][32 * R]);
    const int across = int(blockDim.x);
    const int code = N == 1 ? a.code : CODE<T>;
    const int x_code = sizeof(T) == 4 ? a.x_code : code;
    const int residual_code = sizeof(T) == 4 ? a.residual_code : code;
    int64_t row[R];
    float factor[R];
    Piece<T, N> x[R][V];
    Piece<T, N> s[R][V];  // the residual, then s
#pragma unroll
    for (int r = 0; r < R; ++r) {
        row[r] = (int64_t(blockIdx.x) * R + r) * blockDim.y + threadIdx.y;
        const bool valid_row = row[r] < a.rows;
        const int64_t x_start = valid_row ? a.x_rows.start(row[r]) : 0;
        const int64_t residual_start = valid_row ? a.residual_rows.start(row[r]) : 0;
        factor[r] = valid_row ? sample_of(a.sample, row[r], a.rows_per_sample) : 1.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int piece = v * across + int(threadIdx.x);
            const bool valid = valid_row && piece < a.pieces;
            x[r][v] = load_piece<T, N>(a.x, x_code, x_start, piece * N, valid);
            s[r][v] = load_piece<T, N>(a.residual, residual_code, residual_start, piece * N, valid);
        }
    }
    float mean[R];
    float rstd[R];
#pragma unroll
    for (int r = 0; r < R; ++r) mean[r] = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int piece = v * across + int(threadIdx.x);
        if (piece >= a.pieces) continue;  // nothing to add, or to store
        float gamma[N];
        load_parameter<T, N, true>(a.gamma, piece * N, 1.0f, gamma);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            float values[N];
            float residual[N];
            piece_to_floats<T, N>(x[r][v], x_code, values);
            piece_to_floats<T, N>(s[r][v], residual_code, residual);
#pragma unroll
            for (int i = 0; i < N; ++i) values[i] = residual[i] + values[i] * gamma[i] * factor[r];
            s[r][v] = floats_to_piece<T, N>(values, code);
            if (row[r] < a.rows) write_piece<T, N>(a.s, code, row[r] * a.width, piece * N, s[r][v]);
            piece_to_floats<T, N>(s[r][v], code, values);
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
                piece_to_floats<T, N>(s[r][v], code, values);
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
        if (piece >= a.pieces) continue;
        float weight[N];
        float bias[N];
        load_parameter<T, N>(a.weight, piece * N, 1.0f, weight);
        load_parameter<T, N>(a.bias, piece * N, 0.0f, bias);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (row[r] < a.rows) {
                float values[N];
                piece_to_floats<T, N>(s[r][v], code, values);
#pragma unroll
                for (int i = 0; i < N; ++i) values[i] = (values[i] - mean[r]) * rstd[r] * weight[i] + bias[i];
                store_piece<T, N>(a.y, code, row[r] * a.width, piece * N, values);
            }
        }
    }
}

template <class T, int N, int V>
void run_forward(const ForwardArgs& a, const Plan& plan, cudaStream_t stream) {
    constexpr int R = N > 1 && V * N <= 8 ? 2 : 1;  // a narrow row alone is too few loads under way
    const int64_t blocks = ceil_div(a.rows, int64_t(R) * plan.block.y);
    launch(add_layer_norm_forward_kernel<T, N, V, R>, Grid(blocks), plan.block, 0, stream, a);
}

}  // namespace

void add_layer_norm_forward(
    Pointer x, int64_t inner_x, int64_t outer_x, int64_t stride_x, int x_dtype, Pointer residual, int64_t inner_r,
    int64_t outer_r, int64_t stride_r, int residual_dtype, Pointer gamma, int gamma_dtype, Pointer sample,
    int sample_dtype, Pointer weight, int weight_dtype, Pointer bias, int bias_dtype, Pointer y, Pointer s,
    Pointer mean, Pointer rstd, int64_t rows, int64_t rows_per_sample, int64_t width, double eps, int dtype, int device,
    Pointer stream) {
    const char* const op = "add_layer_norm_forward";
    const Rows x_rows{inner_x, outer_x, stride_x};
    const Rows residual_rows{inner_r, outer_r, stride_r};
    check_rows(op, rows, width, dtype, x_rows);
    check_rows(op, rows, width, dtype, residual_rows);
    check_samples(op, sample, rows, rows_per_sample);
    require(dtype == Float32 || (x_dtype == dtype && residual_dtype == dtype), op,
            ": x and residual must be of s's 16-bit dtype ", dtype, ", got ", x_dtype, " and ", residual_dtype);
    ForwardArgs a{at<const void>(x), x_rows, at<const void>(residual), residual_rows,
                  {at<const void>(gamma), gamma_dtype}, {at<const void>(sample), sample_dtype},
                  {at<const void>(weight), weight_dtype},
                  {at<const void>(bias), bias_dtype}, at<void>(y), at<void>(s), at<float>(mean), at<float>(rstd), rows,
                  rows_per_sample, int(width), 0, dtype, x_dtype, residual_dtype,
                  1.0f / float(width), float(eps)};
    const bool vectors = whole(dtype, x_rows, width) && whole(dtype, residual_rows, width) &&
                         whole(x | residual | gamma | weight | bias | y | s);
    const DeviceGuard guard(device);
    with_elements(op, dtype, vectors, [&](auto zero, auto n) {
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
