// One ancestral sampling step.
//
//     x_prev = p_x0 x0 + p_x x + deviation noise               (noise where t > 0)
//     p_x0 = sqrt(before) beta / (1 - now)                     beta = (before - now) / before
//     p_x  = sqrt(now / before) (1 - before) / (1 - now)
//     deviation^2 = beta (1 - before) / (1 - now) (fixed_small), beta (fixed_large), what the model says (learned), or
//                   between the two fixed ones in the logarithm, at what the model says from -1 to 1 (learned_range)
//
// One pass: x and the model's output are read and x_prev is written. Where x0 is not clipped, it is part of the factors
// of x and m. Noise comes from seeds and is never stored; in 16 bits it is what the time goes into (see philox.cuh).
#include "ddpm_step.h"

#include "reverse_step.cuh"

using namespace samples;

namespace {

enum Variance : int { FixedSmall = 0, FixedLarge = 1, Learned = 2, LearnedRange = 3 };

constexpr float SMALLEST_VARIANCE = 1e-20f;

struct DdpmStep {
    static constexpr bool LEARNS = true;
    int variance;

    // Factors of x0 (or without a clip of m), x and the noise in x_prev.
    __device__ __forceinline__ void factors(
        const AlphaBars& a, const StepTensors& tensors, int64_t t, Factors& f) const {
        const float beta = a.difference / a.before;
        const float inverse = 1.0f / a.rest_now;
        f.p_x0 = sqrtf(a.before) * beta * inverse;
        f.p_x = sqrtf(a.now / a.before) * a.rest_before * inverse;
        if (!(tensors.clip > 0.0f)) {
            if (tensors.prediction != Sample) f.p_x = fmaf(f.p_x0, f.x0_x, f.p_x);
            f.p_m = f.p_x0 * f.x0_m;
        }
        const float small = fmaxf(a.rest_before * inverse * beta, SMALLEST_VARIANCE);
        f.deviation = 1.0f;
        if (variance == FixedSmall) {
            f.deviation = sqrtf(small);
        } else if (variance == FixedLarge) {
            f.deviation = sqrtf(beta);
        } else if (variance == LearnedRange) {
            f.deviation = sqrtf(sqrtf(small) * sqrtf(beta));
            f.spread = 0.25f * logf(beta / small);
        }
        f.adds = t > 0 ? 1.0f : 0.0f;
    }
};

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS, step_blocks(L)) ddpm_step_forward_kernel(
    Plan plan, Seeds seeds, DdpmStep step, StepTensors tensors) {
    reverse_step<T, L>(plan, seeds, step, tensors);
}

}  // namespace

void ddpm_step_forward(
    Pointer model_output, int model_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer t_prev, int64_t prev_stride,
    int prev_kind, Pointer x, Pointer table, int64_t last, Pointer noise, int noise_dtype, Pointer seeds, uint64_t seed,
    Pointer y, Pointer x0, int prediction, bool guided, double guidance, double clip, bool noisy, bool duplicate,
    int variance, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device,
    Pointer stream) {
    const StepCall call = {model_output, model_dtype, t, t_stride, t_kind, t_prev, prev_stride, prev_kind, x, table,
                           last, noise, noise_dtype, seeds, seed, y, x0, prediction, guided, guidance, clip, noisy,
                           duplicate, batch, size, channels, channels_last, dtype, device, stream};
    const bool clipped = clip > 0.0;
    launch_step("ddpm_step_forward", call, DdpmStep{variance}, variance >= Learned, variance == LearnedRange, true,
                !clipped,
                [](auto element, auto layout) { return ddpm_step_forward_kernel<decltype(element), layout()>; });
}
