// Noised samples and training targets, one step of the Markov chain, and their gradients: q_sample.cu.
#pragma once

#include "pointer.h"

// y = signal x + sigma noise, and with a target pointer signal noise - sigma x (`velocity`) or the noise.
// x, y, target: [batch, size] of one dtype, contiguous or channels_last within a sample. t: [batch] integers of
// `t_kind` (samples.cuh), t_stride elements apart. table: [last + 2, 2] float32. noise: as x, of noise_dtype (theirs or
// float32; beside float32 any), or 0: made of seeds, [batch] int64, or of `seed`. channel_noise: [batch, channels]
// float32, added offset_noise times, or 0. step: the coefficients and the stream of noise of one Markov step.
void q_sample_forward(
    Pointer x, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last, Pointer noise, int noise_dtype,
    Pointer seeds, uint64_t seed, Pointer channel_noise, double offset_noise, Pointer y, Pointer target, bool velocity,
    bool step, int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device,
    Pointer stream);

// dx = signal dy - sigma dv and dnoise = sigma dy + signal dv, where dv, dx and dnoise may be 0.
void q_sample_backward(
    Pointer dy, Pointer dv, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last, Pointer dx,
    Pointer dnoise, bool step, int64_t batch, int64_t size, int dtype, int device, Pointer stream);
