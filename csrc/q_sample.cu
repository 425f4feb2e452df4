// Noised samples and training targets.
//
//     x_t = signal x0 + sigma noise          signal = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t)
//     v   = signal noise - sigma x0          (or the noise itself: the target epsilon)
//     dx0 = signal dx_t - sigma dv           dnoise = sigma dx_t + signal dv
//
// q_step, one step of the Markov chain, is the same with sqrt(1 - beta_t) and sqrt(beta_t), and another stream of
// noise.
//
// One pass: 2 elements of traffic (4 B in bf16), 3 with a target or given noise. With noise from seeds a 16-bit call is
// bound by its arithmetic, a float32 one by memory about as much; see philox.cuh for what a normal costs. A block works
// on one sample, whose two coefficients one thread gathers, and they stay in float32. The backward pass is two scaled
// sums.
#include "q_sample.h"

#include "samples.cuh"

using namespace samples;

namespace {

constexpr unsigned STREAM_Q_STEP = 1;  // and four times the timestep on top

__device__ __forceinline__ float2 factors_at(const Table& table, int64_t t, bool step) {
    return step ? step_signal_and_sigma(table, t) : signal_and_sigma(table, t);
}

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS) q_sample_forward_kernel(
    Plan plan,
    Seeds seeds,
    Timesteps timesteps,
    Table table,
    const T* __restrict__ x,         // [B, size]
    const void* __restrict__ noise,  // [B, size] of noise_dtype, or null: made of seeds
    int noise_dtype,
    T* __restrict__ y,               // [B, size]
    T* __restrict__ target,          // [B, size], or null
    bool velocity,
    bool step) {
    using P = Patch<T, L>;
    SHARED(NoiseKey, key, );
    SHARED(float2, factors, );
    Block block(plan);
    if (threadIdx.x == 0) factors = factors_at(table, timesteps[block.sample], step);
    if (threadIdx.x == blockDim.x - 1 && noise == nullptr) {
        const int64_t t = step ? timesteps[block.sample] : 0;
        seeds.key(key, block.sample, step ? 4 * static_cast<unsigned>(t) + STREAM_Q_STEP : 0);
    }
    __syncthreads();
    const float signal = factors.x;
    const float sigma = factors.y;
    const int64_t start = block.start(plan);
    for (; block.tile < block.end; ++block.tile) {
        const P patch(plan, block.tile);
        if (!patch.any()) continue;
        float z[P::E];
        if (noise == nullptr) seeds.noise(patch, plan, key, block.sample, z);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (!patch.inside[r]) continue;
            const int64_t at = start + patch.at[r];
            float row[P::V];
            float out[P::V];
            load_row<T, P::V>(x + at, row);
            if (noise != nullptr) load_any<T, P::V>(noise, noise_dtype, at, z + r * P::V);
#pragma unroll
            for (int i = 0; i < P::V; ++i) out[i] = fmaf(sigma, z[r * P::V + i], signal * row[i]);
            store_row<T, P::V>(y + at, out);
            if (target == nullptr) continue;
            if (velocity) {
#pragma unroll
                for (int i = 0; i < P::V; ++i) out[i] = fmaf(signal, z[r * P::V + i], -(sigma * row[i]));
                store_row<T, P::V>(target + at, out);
            } else {
                store_row<T, P::V>(target + at, z + r * P::V);
            }
        }
    }
}

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS) q_sample_backward_kernel(
    Plan plan,
    Timesteps timesteps,
    Table table,
    const T* __restrict__ dy,  // [B, size]
    const T* __restrict__ dv,  // [B, size], or null
    T* __restrict__ dx,        // [B, size], or null: not wanted
    T* __restrict__ dnoise,    // [B, size], or null: not wanted
    bool step) {
    using P = Patch<T, L>;
    SHARED(float2, factors, );
    Block block(plan);
    if (threadIdx.x == 0) factors = factors_at(table, timesteps[block.sample], step);
    __syncthreads();
    const float signal = factors.x;
    const float sigma = factors.y;
    const int64_t start = block.start(plan);
    for (; block.tile < block.end; ++block.tile) {
        const P patch(plan, block.tile);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (!patch.inside[r]) continue;
            const int64_t at = start + patch.at[r];
            float g[P::V];
            float v[P::V] = {};
            float out[P::V];
            load_row<T, P::V>(dy + at, g);
            if (dv != nullptr) load_row<T, P::V>(dv + at, v);
            if (dx != nullptr) {
#pragma unroll
                for (int i = 0; i < P::V; ++i) out[i] = signal * g[i];
                if (dv != nullptr) {
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = fmaf(-sigma, v[i], out[i]);
                }
                store_row<T, P::V>(dx + at, out);
            }
            if (dnoise != nullptr) {
#pragma unroll
                for (int i = 0; i < P::V; ++i) out[i] = sigma * g[i];
                if (dv != nullptr) {
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = fmaf(signal, v[i], out[i]);
                }
                store_row<T, P::V>(dnoise + at, out);
            }
        }
    }
}

}  // namespace

void q_sample_forward(
    Pointer x, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last, Pointer noise, int noise_dtype,
    Pointer seeds, uint64_t seed, Pointer channel_noise, double offset_noise, Pointer y, Pointer target, bool velocity,
    bool step, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device,
    Pointer stream) {
    const char* op = "q_sample_forward";
    const bool given = noise != 0;
    require_dtype(op, "noise", noise_dtype, dtype);
    const Shape shape = {batch, size, channels, channels_last};
    const Layout layout = layout_of(shape, dtype, given, aligned({x, noise, y, target}));
    const int threads = threads_of(shape);
    const Plan p = plan(op, shape, layout, dtype, given, threads);
    const Seeds s = {at<int64_t>(seeds), seed, at<float>(channel_noise), static_cast<float>(offset_noise)};
    const DeviceGuard guard(device);
    with_layout(op, dtype, layout, [&](auto element, auto kind) {
        using T = decltype(element);
        launch(q_sample_forward_kernel<T, kind()>, blocks(p), threads, 0, as_stream(stream), p, s,
               Timesteps{at<void>(t), t_stride, t_kind}, Table{at<float>(table), last}, at<T>(x), at<void>(noise),
               noise_dtype, at<T>(y), at<T>(target), velocity, step);
    });
}

void q_sample_backward(
    Pointer dy, Pointer dv, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last, Pointer dx,
    Pointer dnoise, bool step, int64_t batch, int64_t size, int dtype, int device, Pointer stream) {
    const char* op = "q_sample_backward";
    const Shape shape = {batch, size, 1, false};
    const Layout layout = layout_of(shape, dtype, true, aligned({dy, dv, dx, dnoise}));
    const int threads = threads_of(shape);
    const Plan p = plan(op, shape, layout, dtype, true, threads);
    const DeviceGuard guard(device);
    with_line(op, dtype, layout, [&](auto element, auto kind) {
        using T = decltype(element);
        launch(q_sample_backward_kernel<T, kind()>, blocks(p), threads, 0, as_stream(stream), p,
               Timesteps{at<void>(t), t_stride, t_kind}, Table{at<float>(table), last}, at<T>(dy), at<T>(dv), at<T>(dx),
               at<T>(dnoise), step);
    });
}
