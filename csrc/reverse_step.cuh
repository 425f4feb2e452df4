// What the two sampling steps share: the body of the kernel and its launch. A step says what its factors are
// (ddim_step.cu and ddpm_step.cu).
//
// It goes from x_t to x_prev, with m the model's output after guidance, now and before the alpha-bars at t and t_prev:
//
//     m  = u + guidance (c - u)
//     x0 = x0_x x + x0_m m, clipped        epsilon: x / signal - sigma / signal m        v: signal x - sigma m        m
//     x_prev = p_x0 x0 + p_x x + p_m m + deviation noise        without a clip x0 is part of p_x and p_m
//
// Factors depend on the timestep alone: one thread of a block computes them in float32 from the schedule's pairs of
// numbers. 1 - now, 1 - before and before - now keep their digits, and no formula below subtracts anything else.
#pragma once

#include "samples.cuh"

namespace samples {

enum Prediction : int { Epsilon = 0, Velocity = 1, Sample = 2 };

constexpr unsigned STREAM_REVERSE_STEP = 2;  // and four times the timestep on top

// alpha-bar at t and t_prev: now, 1 - now, before, 1 - before, before - now.
struct AlphaBars {
    float now;
    float rest_now;
    float before;
    float rest_before;
    float difference;

    __device__ __forceinline__ AlphaBars(const Table& table, int64_t t, int64_t t_prev) {
        const float2 a = table(t);
        const float2 b = table(t_prev, -1);
        now = a.x;
        rest_now = rest(a);
        before = b.x;
        rest_before = rest(b);
        difference = (b.x - a.x) + (b.y - a.y);
    }
};

struct alignas(16) Factors {
    float x0_x;
    float x0_m;
    float p_x0;
    float p_x;
    float p_m;
    float deviation;
    float spread;  // of a variance that is learned in a range
    float adds;    // 0: no noise at this timestep
};

__device__ __forceinline__ void x0_factors(const AlphaBars& a, int prediction, Factors& f) {
    const float signal = sqrtf(a.now);
    const float sigma = sqrtf(a.rest_now);
    if (prediction == Epsilon) {
        f.x0_x = 1.0f / signal;
        f.x0_m = -sigma / signal;
    } else if (prediction == Velocity) {
        f.x0_x = signal;
        f.x0_m = -sigma;
    } else {
        f.x0_x = 0.0f;
        f.x0_m = fmaf(a.now, 0.0f, 1.0f);  // NaN where t is out of range
    }
}

// Arguments of a step's kernel beside the step itself.
struct StepTensors {
    const void* m;      // [B, size] of m_dtype, with guidance [2 B, size]: unconditional, then conditional;
    int m_dtype;        // with a learned variance each sample of twice the channels
    Timesteps t;
    Timesteps t_prev;
    Table table;
    const void* x;      // [B, size]
    const void* noise;  // [B, size] of noise_dtype, or null: made of seeds
    int noise_dtype;
    void* y;            // [B, size], or twice over
    void* x0;           // [B, size], or null: not wanted
    float guidance;
    float clip;         // 0: none
    int prediction;
    bool guided;
    bool noisy;
    bool duplicate;
    bool learned;       // the model's output has the variance in its second half of channels
    bool range;         // and it is learned in a range
    bool with_x;        // whether p_x is a factor
    bool with_m;        // whether p_m is
    bool last;          // channels_last
};

// Blocks that a multiprocessor shall hold, by registers; without a word ptxas spills some to hold more.
constexpr int step_blocks(Layout layout) { return layout == Layout::Wide || layout == Layout::Scattered ? 8 : 5; }

// The body of a step's kernel.
template <class T, Layout L, class Step>
__device__ __forceinline__ void reverse_step(
    const Plan& plan, const Seeds& seeds, const Step& step, const StepTensors& a) {
    using P = Patch<T, L>;
    SHARED(NoiseKey, key, );
    SHARED(Factors, shared, );
    Block block(plan);
    const bool made = a.noisy && a.noise == nullptr;
    if (threadIdx.x == 0) {
        const int64_t t = a.t[block.sample];
        const AlphaBars bars(a.table, t, a.t_prev[block.sample]);
        Factors f = {};
        x0_factors(bars, a.prediction, f);
        step.factors(bars, a, t, f);
        shared = f;
    }
    if (threadIdx.x == blockDim.x - 1 && made) {
        seeds.key(key, block.sample, 4 * static_cast<unsigned>(a.t[block.sample]) + STREAM_REVERSE_STEP);
    }
    __syncthreads();
    const Factors f = shared;
    const int64_t start = block.start(plan);
    const int64_t half = static_cast<int64_t>(plan.batch) * plan.size;  // from a sample to its other half
    const bool clipped = a.clip > 0.0f;
    const float limit = clipped ? a.clip : INFINITY;
    for (; block.tile < block.end; ++block.tile) {
        const P patch(plan, block.tile);
        if (!patch.any()) continue;
        float z[P::E];
        if (made) patch.noise(plan, key, z);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (!patch.inside[r]) continue;
            const int64_t at = start + patch.at[r];
            int64_t m_at = at;
            int64_t m_half = half;
            if (Step::LEARNS && a.learned) {
                m_at = 2 * at - (a.last ? patch.channel[r] : patch.at[r]);
                m_half = 2 * half;
            }
            float x[P::V];
            float m[P::V];
            float out[P::V];
            load_row<T, P::V>(static_cast<const T*>(a.x) + at, x);
            load_any<T, P::V>(a.m, a.m_dtype, m_at, m);
            if (a.guided) {
                load_any<T, P::V>(a.m, a.m_dtype, m_at + m_half, out);
#pragma unroll
                for (int i = 0; i < P::V; ++i) m[i] = fmaf(a.guidance, out[i] - m[i], m[i]);
            }
            if (a.noisy && !made) load_any<T, P::V>(a.noise, a.noise_dtype, at, z + r * P::V);
            if (clipped || a.x0 != nullptr) {
#pragma unroll
                for (int i = 0; i < P::V; ++i) out[i] = f.x0_m * m[i];
                if (a.prediction != Sample) {
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.x0_x, x[i], out[i]);
                }
#pragma unroll
                for (int i = 0; i < P::V; ++i) {  // NaN passes
                    const float below = out[i] > limit ? limit : out[i];
                    out[i] = below < -limit ? -limit : below;
                }
                if (a.x0 != nullptr) store_row<T, P::V>(static_cast<T*>(a.x0) + at, out);
                if (clipped) {
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = f.p_x0 * out[i];
                    if (a.with_x) {
#pragma unroll
                        for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.p_x, x[i], out[i]);
                    }
                    if (a.with_m) {
#pragma unroll
                        for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.p_m, m[i], out[i]);
                    }
                }
            }
            if (!clipped) {
#pragma unroll
                for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.p_m, m[i], f.p_x * x[i]);
            }
            if (a.noisy && f.adds != 0.0f) {
                if (Step::LEARNS && a.learned) {
                    const int64_t conditional = m_at + (a.guided ? m_half : 0);
                    load_any<T, P::V>(a.m, a.m_dtype, conditional + (a.last ? plan.channels : plan.size), m);
                    if (a.range) {
#pragma unroll
                        for (int i = 0; i < P::V; ++i) m[i] = __expf(f.spread * m[i]);
                    } else {
#pragma unroll
                        for (int i = 0; i < P::V; ++i) m[i] = fast_sqrt(m[i]);
                    }
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.deviation * z[r * P::V + i], m[i], out[i]);
                } else {
#pragma unroll
                    for (int i = 0; i < P::V; ++i) out[i] = fmaf(f.deviation, z[r * P::V + i], out[i]);
                }
            }
            store_row<T, P::V>(static_cast<T*>(a.y) + at, out);
            if (a.duplicate) store_row<T, P::V>(static_cast<T*>(a.y) + half + at, out);
        }
    }
}

// What Python hands over for either step.
struct StepCall {
    Pointer model_output;
    int model_dtype;
    Pointer t;
    int64_t t_stride;
    int t_kind;
    Pointer t_prev;
    int64_t prev_stride;
    int prev_kind;
    Pointer x;
    Pointer table;
    int64_t last;
    Pointer noise;
    int noise_dtype;
    Pointer seeds;
    uint64_t seed;
    Pointer y;
    Pointer x0;
    int prediction;
    bool guided;
    double guidance;
    double clip;
    bool noisy;
    bool duplicate;
    int64_t batch;
    int64_t size;
    int64_t channels;
    bool channels_last;
    int dtype;
    int device;
    Pointer stream;
};

// `kernel(T{}, layout)` is the step's kernel.
template <class Step, class Kernel>
void launch_step(
    const char* op, const StepCall& c, const Step& step, bool learned, bool range, bool with_x, bool with_m,
    Kernel kernel) {
    const bool made = c.noisy && c.noise == 0;
    require_dtype(op, "model_output", c.model_dtype, c.dtype);
    require_dtype(op, "noise", c.noise_dtype, c.dtype);
    // The variance's place depends on the channel.
    const bool any_order = !made && !(learned && c.channels_last);
    const Shape shape = {c.batch, c.size, c.channels, c.channels_last};
    Layout layout = layout_of(shape, c.dtype, any_order, aligned({c.model_output, c.x, c.noise, c.y, c.x0}));
    if (learned && layout == Layout::Line) layout = Layout::Scattered;
    const int threads = threads_of(shape);
    const Plan p = plan(op, shape, layout, c.dtype, any_order, threads);
    const Seeds seeds = {at<int64_t>(c.seeds), c.seed, nullptr, 0.0f};
    StepTensors a = {};
    a.m = at<void>(c.model_output);
    a.m_dtype = c.model_dtype;
    a.t = {at<void>(c.t), c.t_stride, c.t_kind};
    a.t_prev = {at<void>(c.t_prev), c.prev_stride, c.prev_kind};
    a.table = {at<float>(c.table), c.last};
    a.x = at<void>(c.x);
    a.noise = at<void>(c.noise);
    a.noise_dtype = c.noise_dtype;
    a.y = at<void>(c.y);
    a.x0 = at<void>(c.x0);
    a.guidance = static_cast<float>(c.guidance);
    a.clip = static_cast<float>(c.clip);
    a.prediction = c.prediction;
    a.guided = c.guided;
    a.noisy = c.noisy;
    a.duplicate = c.duplicate;
    a.learned = learned;
    a.range = range;
    a.with_x = with_x;
    a.with_m = with_m;
    a.last = c.channels_last;
    const DeviceGuard guard(c.device);
    with_layout(op, c.dtype, layout, [&](auto element, auto kind) {
        launch(kernel(element, kind), blocks(p), threads, 0, as_stream(c.stream), p, seeds, step, a);
    });
}

}  // namespace samples
