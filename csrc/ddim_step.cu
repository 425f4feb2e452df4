// One DDIM step.
//
//     x_prev = sqrt(before) x0 + direction e + s noise         e: the noise that the model says is in x
//     s^2 = eta^2 (1 - before) ratio                           ratio = (before - now) / (before (1 - now))
//     direction^2 = 1 - before - s^2 = (1 - before) ((1 - eta^2) ratio + now (1 - before) / (before (1 - now)))
//
// Where x0 is not clipped, x_prev is a sum of x and m alone, whose factors are written with
//
//     gap = sqrt(before) sigma - direction signal = (before - now + s^2 now) / (direction signal + sqrt(before) sigma)
//
// which does not cancel. One pass: with guidance, and x_prev written twice for the next call of the model, 5 elements
// of traffic for each of x (two of the model's output, x, and two of x_prev), where one PyTorch op for each operation
// moves 26. Bound by memory bandwidth; noise from seeds (eta above 0) costs arithmetic as in philox.cuh.
#include "ddim_step.h"

#include "reverse_step.cuh"

using namespace samples;

namespace {

struct DdimStep {
    static constexpr bool LEARNS = false;
    float eta;
    bool use_clipped;

    // Factors of x0, x, m and the noise in x_prev. Not to be used: x0's without a clip, m's with `use_clipped`.
    __device__ __forceinline__ void factors(const AlphaBars& a, const StepTensors& tensors, int64_t, Factors& f) const {
        const float signal = sqrtf(a.now);
        const float sigma = sqrtf(a.rest_now);
        const float towards = sqrtf(a.before);
        float s2 = 0.0f;
        float direction = sqrtf(a.rest_before);
        if (tensors.noisy) {
            const float scale = 1.0f / (a.before * a.rest_now);
            s2 = eta * eta * a.rest_before * (a.difference * scale);
            const float left = fmaf((1.0f - eta) * (1.0f + eta), a.difference, a.now * a.rest_before);
            direction = sqrtf(a.rest_before * scale * left);
        }
        const float gap = fmaf(s2, a.now, a.difference) / fmaf(direction, signal, towards * sigma);
        f.deviation = sqrtf(s2);
        f.adds = 1.0f;
        f.p_x0 = towards;
        if (tensors.clip > 0.0f && use_clipped) {
            f.p_x0 = gap / sigma;
            f.p_x = direction / sigma;
        } else if (tensors.clip > 0.0f) {
            if (tensors.prediction == Epsilon) {
                f.p_m = direction;
            } else if (tensors.prediction == Velocity) {
                f.p_x = direction * sigma;
                f.p_m = direction * signal;
            } else {
                f.p_x = direction / sigma;
                f.p_m = -(direction * signal) / sigma;
            }
        } else if (tensors.prediction == Epsilon) {
            f.p_x = towards / signal;
            f.p_m = -gap / signal;
        } else if (tensors.prediction == Velocity) {
            f.p_x = fmaf(direction, sigma, towards * signal);
            f.p_m = -gap;
        } else {
            f.p_x = direction / sigma;
            f.p_m = gap / sigma;
        }
    }
};

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS, step_blocks(L)) ddim_step_forward_kernel(
    Plan plan, Seeds seeds, DdimStep step, StepTensors tensors) {
    reverse_step<T, L>(plan, seeds, step, tensors);
}

}  // namespace

void ddim_step_forward(
    Pointer model_output, int model_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer t_prev, int64_t prev_stride,
    int prev_kind, Pointer x, Pointer table, int64_t last, Pointer noise, int noise_dtype, Pointer seeds, uint64_t seed,
    Pointer y, Pointer x0, int prediction, bool guided, double guidance, double clip, bool noisy, bool duplicate,
    double eta, bool use_clipped, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype,
    int device, Pointer stream) {
    const StepCall call = {model_output, model_dtype, t, t_stride, t_kind, t_prev, prev_stride, prev_kind, x, table,
                           last, noise, noise_dtype, seeds, seed, y, x0, prediction, guided, guidance, clip, noisy,
                           duplicate, batch, size, channels, channels_last, dtype, device, stream};
    const bool clipped = clip > 0.0;
    const bool with_x = !clipped || use_clipped || prediction != Epsilon;
    const bool with_m = !clipped || !use_clipped;
    launch_step("ddim_step_forward", call, DdimStep{static_cast<float>(eta), use_clipped}, false, false, with_x, with_m,
                [](auto element, auto layout) { return ddim_step_forward_kernel<decltype(element), layout()>; });
}
