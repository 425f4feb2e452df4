// One DDIM step: ddim_step.cu.
#pragma once

#include "pointer.h"

// x_prev and, with a pointer, x_0. model_output: [batch, size] of model_dtype, with guidance [2 batch, size]; x and x0:
// [batch, size]; y the same, or twice over (`duplicate`); contiguous or channels_last within a sample. t, t_prev:
// [batch] integers of a kind (samples.cuh), a stride apart. table: [last + 2, 2] float32. noise: as x, of noise_dtype,
// or 0 and made of seeds, [batch] int64, or of `seed`; unless `noisy`, none. The other dtypes are that of x or float32;
// beside a float32 x any. prediction: 0 epsilon, 1 v, 2 sample. clip: 0 for none.
void ddim_step_forward(
    Pointer model_output, int model_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer t_prev, int64_t prev_stride,
    int prev_kind, Pointer x, Pointer table, int64_t last, Pointer noise, int noise_dtype, Pointer seeds, uint64_t seed,
    Pointer y, Pointer x0, int prediction, bool guided, double guidance, double clip, bool noisy, bool duplicate,
    double eta, bool use_clipped, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype,
    int device, Pointer stream);
