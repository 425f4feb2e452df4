// One ancestral sampling step: ddpm_step.cu.
#pragma once

#include "pointer.h"

// As ddim_step_forward, but for the last arguments: variance 0 "fixed_small", 1 "fixed_large", 2 "learned", 3
// "learned_range". A learned variance is the second half of the model output's channels: [batch, 2 size].
void ddpm_step_forward(
    Pointer model_output, int model_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer t_prev, int64_t prev_stride,
    int prev_kind, Pointer x, Pointer table, int64_t last, Pointer noise, int noise_dtype, Pointer seeds, uint64_t seed,
    Pointer y, Pointer x0, int prediction, bool guided, double guidance, double clip, bool noisy, bool duplicate,
    int variance, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device,
    Pointer stream);
