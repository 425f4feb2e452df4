// Mean squared error against noise that is made again where it is needed.
//
//     d           = prediction - wanted           wanted = noise, or signal noise - sigma x0 (v), or x0 (sample)
//     parts_b     = snr_b / n sum_e d_be^2        snr_b: min-SNR's factor or 1; n: what the reduction divides by
//     loss        = sum_b weight_b parts_b        (or weight_b parts_b themselves)
//     dprediction = 2 dloss_b weight_b snr_b / n d
//
// Forward reads the prediction (1 element, 2 B in bf16) and writes a float32 number for each block; a second launch of
// one block adds them in a fixed order, so that the same input gives the same bits, and applies weights and reduction.
// Backward reads the prediction and writes its gradient, in one launch: 3 elements (6 B in bf16) for both passes, where
// noise that is kept, cast and compared takes 14. x0, where it is compared with, is read in both. The noise is made
// twice and costs arithmetic alone; see philox.cuh. How many tiles a forward block takes depends on the sample's size
// only, and so does the order in which a sample's squares are added: its loss has the same bits in any batch.
#include "noise_mse.h"

#include <algorithm>

#include "reduce.cuh"
#include "samples.cuh"

using namespace samples;

namespace {

enum Target : int { Epsilon = 0, Velocity = 1, Sample = 2 };

constexpr int64_t PARTIALS = 64;       // blocks of a sample that the forward pass aims at: the second launch adds them
constexpr int64_t FORWARD_TILES = 16;  // tiles that one of them takes at most
constexpr int FINISH_THREADS = 1024;
constexpr int LANES = 8;               // of the second launch for a sample

struct Wanted {
    const void* prediction;  // [B, size]
    const void* x0;          // [B, size] of x0_dtype, or null: the target is epsilon
    int x0_dtype;
    Timesteps t;             // without data: the target is not v and there is no gamma
    Table table;
    int target;
    float gamma;             // 0: none
};

// min(snr, gamma) over snr, snr + 1 or 1, with snr = alpha_bar / sigma^2 and alpha_bar + sigma^2 = 1.
// Comparisons are such that NaN, of a timestep out of range, remains; nothing is 0 / 0 at either end of a schedule.
__device__ __forceinline__ float min_snr(const Wanted& w, unsigned sample) {
    if (!(w.gamma > 0.0f)) return 1.0f;
    const float2 pair = w.table(w.t[sample]);
    const float alpha_bar = pair.x + pair.y;
    const float variance = rest(pair);
    if (w.target == Epsilon) {
        const float factor = w.gamma * variance / alpha_bar;
        return factor > 1.0f ? 1.0f : factor;
    }
    if (w.target == Velocity) return alpha_bar > w.gamma * variance ? w.gamma * variance : alpha_bar;
    const float factor = alpha_bar / variance;
    return factor > w.gamma ? w.gamma : factor;
}

// Row r of prediction - wanted. `at` counts elements of the batch; z is the patch's noise.
template <class T, int V>
__device__ __forceinline__ void difference(
    const Wanted& w, int64_t at, float2 factors, const float* z, float (&d)[V]) {
    load_row<T, V>(static_cast<const T*>(w.prediction) + at, d);
    if (w.target == Epsilon) {
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] -= z[i];
        return;
    }
    float x0[V];
    load_any<T, V>(w.x0, w.x0_dtype, at, x0);
    if (w.target == Velocity) {
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] -= fmaf(factors.x, z[i], -(factors.y * x0[i]));
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) d[i] -= x0[i];
    }
}

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS) noise_mse_forward_kernel(
    Plan plan,
    Seeds seeds,
    Wanted wanted,
    float* __restrict__ partial) {  // [B, blocks]
    using P = Patch<T, L>;
    SHARED(NoiseKey, key, );
    SHARED(float2, factors, );
    SHARED(float, warps, [THREADS / 32]);
    Block block(plan);
    if (threadIdx.x == 0 && wanted.target == Velocity) {
        factors = signal_and_sigma(wanted.table, wanted.t[block.sample]);
    }
    if (threadIdx.x == blockDim.x - 1 && wanted.target != Sample) seeds.key(key, block.sample, 0);
    __syncthreads();
    const int64_t start = block.start(plan);
    float total = 0.0f;
    for (; block.tile < block.end; ++block.tile) {
        const P patch(plan, block.tile);
        if (!patch.any()) continue;
        float z[P::E];
        if (wanted.target != Sample) seeds.noise(patch, plan, key, block.sample, z);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (!patch.inside[r]) continue;
            float d[P::V];
            difference<T, P::V>(wanted, start + patch.at[r], factors, z + r * P::V, d);
#pragma unroll
            for (int i = 0; i < P::V; ++i) total = fmaf(d[i], d[i], total);
        }
    }
    total = block_sum<THREADS / 32>(total, warps);
    if (threadIdx.x == 0) partial[blockIdx.x] = total * min_snr(wanted, block.sample);
}

// One block: LANES threads a sample, as many samples at a time as fit.
__global__ void __launch_bounds__(FINISH_THREADS) noise_mse_finish_kernel(
    const float* __restrict__ partial,  // [B, blocks]
    const float* __restrict__ weight,   // [B], weight_stride apart, or null
    int64_t weight_stride,
    float* __restrict__ loss,           // [B] if `each`, else one
    float* __restrict__ parts,          // [B], or null: not wanted
    unsigned batch,
    unsigned blocks,
    float scale,
    bool each) {
    SHARED(float, warps, [FINISH_THREADS / 32]);
    const unsigned lane = threadIdx.x % LANES;
    float total = 0.0f;
    for (unsigned first = 0; first < batch; first += FINISH_THREADS / LANES) {
        const unsigned b = first + threadIdx.x / LANES;
        float sum = 0.0f;
        float factor = 1.0f;
        if (b < batch) {
            const float* row = partial + static_cast<int64_t>(b) * blocks;
            if (weight != nullptr) factor = weight[b * weight_stride];
#pragma unroll 4
            for (unsigned p = lane; p < blocks; p += LANES) sum += row[p];
        }
        const float part = warp_sum<LANES>(sum) * scale;
        if (b < batch && lane == 0) {
            if (parts != nullptr) parts[b] = part;
            if (each) {
                loss[b] = part * factor;
            } else {
                total += part * factor;
            }
        }
    }
    if (each) return;  // the whole block
    total = block_sum<FINISH_THREADS / 32>(total, warps);
    if (threadIdx.x == 0) *loss = total;
}

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS) noise_mse_backward_kernel(
    Plan plan,
    Seeds seeds,
    Wanted wanted,
    const float* __restrict__ dloss,   // [B], dloss_stride apart
    int64_t dloss_stride,
    const float* __restrict__ weight,  // [B], weight_stride apart, or null
    int64_t weight_stride,
    float scale,
    T* __restrict__ dprediction) {     // [B, size]
    using P = Patch<T, L>;
    SHARED(NoiseKey, key, );
    SHARED(float4, factors, );
    Block block(plan);
    if (threadIdx.x == 0) {
        float factor = scale;  // small: the product of all stays small for longest
        if (weight != nullptr) factor *= weight[block.sample * weight_stride];
        factor *= min_snr(wanted, block.sample);
        factor *= dloss[block.sample * dloss_stride];
        float2 pair = make_float2(0.0f, 0.0f);
        if (wanted.target == Velocity) pair = signal_and_sigma(wanted.table, wanted.t[block.sample]);
        factors = make_float4(pair.x, pair.y, factor, 0.0f);
    }
    if (threadIdx.x == blockDim.x - 1 && wanted.target != Sample) seeds.key(key, block.sample, 0);
    __syncthreads();
    const int64_t start = block.start(plan);
    for (; block.tile < block.end; ++block.tile) {
        const P patch(plan, block.tile);
        if (!patch.any()) continue;
        float z[P::E];
        if (wanted.target != Sample) seeds.noise(patch, plan, key, block.sample, z);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (!patch.inside[r]) continue;
            const int64_t at = start + patch.at[r];
            const float4 f = factors;
            float d[P::V];
            difference<T, P::V>(wanted, at, make_float2(f.x, f.y), z + r * P::V, d);
#pragma unroll
            for (int i = 0; i < P::V; ++i) d[i] *= f.z;
            store_row<T, P::V>(dprediction + at, d);
        }
    }
}

Wanted wanted_of(Pointer prediction, Pointer x0, int x0_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer table,
                 int64_t last, int target, double gamma) {
    return {at<void>(prediction), at<void>(x0), x0_dtype, {at<void>(t), t_stride, t_kind}, {at<float>(table), last},
            target, static_cast<float>(gamma)};
}

}  // namespace

int64_t noise_mse_blocks(int64_t size) {
    const int64_t tiles = (size + 8 * THREADS - 1) / (8 * THREADS);
    const int64_t each = std::min((tiles + PARTIALS - 1) / PARTIALS, FORWARD_TILES);
    return (tiles + each - 1) / each;
}

void noise_mse_forward(
    Pointer prediction, Pointer x0, int x0_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last,
    Pointer weight, int64_t weight_stride, Pointer seeds, uint64_t seed, Pointer channel_noise, double offset_noise,
    Pointer partial, Pointer loss, Pointer parts, int target, double gamma, double scale, bool each, int64_t batch,
    int64_t size, int64_t channels, bool channels_last, int dtype, int device, Pointer stream) {
    const char* op = "noise_mse_forward";
    const bool any_order = target == Sample;
    require_dtype(op, "x0", x0_dtype, dtype);
    const Shape shape = {batch, size, channels, channels_last};
    const Layout layout = layout_of(shape, dtype, any_order, aligned({prediction, x0}));
    const Plan p = plan(op, shape, layout, dtype, any_order, THREADS, noise_mse_blocks(size));
    const Seeds s = {at<int64_t>(seeds), seed, at<float>(channel_noise), static_cast<float>(offset_noise)};
    const Wanted w = wanted_of(prediction, x0, x0_dtype, t, t_stride, t_kind, table, last, target, gamma);
    const DeviceGuard guard(device);
    with_layout(op, dtype, layout, [&](auto element, auto kind) {
        using T = decltype(element);
        launch(noise_mse_forward_kernel<T, kind()>, blocks(p), THREADS, 0, as_stream(stream), p, s, w,
               at<float>(partial));
    });
    launch(noise_mse_finish_kernel, 1, FINISH_THREADS, 0, as_stream(stream), at<float>(partial), at<float>(weight),
           weight_stride, at<float>(loss), at<float>(parts), p.batch, p.by_blocks.divisor, static_cast<float>(scale),
           each);
}

void noise_mse_backward(
    Pointer dloss, int64_t dloss_stride, Pointer prediction, Pointer x0, int x0_dtype, Pointer t, int64_t t_stride,
    int t_kind, Pointer table, int64_t last, Pointer weight, int64_t weight_stride, Pointer seeds, uint64_t seed,
    Pointer channel_noise, double offset_noise, Pointer dprediction, int target, double gamma, double scale,
    int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device, Pointer stream) {
    const char* op = "noise_mse_backward";
    const bool any_order = target == Sample;
    require_dtype(op, "x0", x0_dtype, dtype);
    const Shape shape = {batch, size, channels, channels_last};
    const Layout layout = layout_of(shape, dtype, any_order, aligned({prediction, x0, dprediction}));
    const int threads = threads_of(shape);
    const Plan p = plan(op, shape, layout, dtype, any_order, threads);
    const Seeds s = {at<int64_t>(seeds), seed, at<float>(channel_noise), static_cast<float>(offset_noise)};
    const Wanted w = wanted_of(prediction, x0, x0_dtype, t, t_stride, t_kind, table, last, target, gamma);
    const DeviceGuard guard(device);
    with_layout(op, dtype, layout, [&](auto element, auto kind) {
        using T = decltype(element);
        launch(noise_mse_backward_kernel<T, kind()>, blocks(p), threads, 0, as_stream(stream), p, s, w,
               at<float>(dloss), dloss_stride, at<float>(weight), weight_stride, static_cast<float>(scale),
               at<T>(dprediction));
    });
}
