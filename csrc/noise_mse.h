// Mean squared error against noise that is made again where it is needed: noise_mse.cu.
#pragma once

#include "pointer.h"

// partial: [batch, noise_mse_blocks(...)] float32, loss: [batch] (`each`) or one, float32, parts: [batch] or 0.
// prediction: [batch, size], contiguous or channels_last within a sample; x0: as it, of x0_dtype (the prediction's or
// float32; beside a float32 prediction any), for targets other than 0 epsilon: 1 v, 2 sample. t: [batch] integers of
// t_kind (samples.cuh), and table [last + 2, 2] float32, for v and with a gamma above 0. weight: [batch] float32, a
// stride apart, or 0. seeds: [batch] int64, or 0 for `seed`.
// channel_noise: [batch, channels] float32, added offset_noise times, or 0. scale: 1 / n.
void noise_mse_forward(
    Pointer prediction, Pointer x0, int x0_dtype, Pointer t, int64_t t_stride, int t_kind, Pointer table, int64_t last,
    Pointer weight, int64_t weight_stride, Pointer seeds, uint64_t seed, Pointer channel_noise, double offset_noise,
    Pointer partial, Pointer loss, Pointer parts, int target, double gamma, double scale, bool each, int64_t batch,
    int64_t size, int64_t channels, bool channels_last, int dtype, int device, Pointer stream);

// The numbers that noise_mse_forward writes to `partial` for each sample. It depends on the sample's size alone.
int64_t noise_mse_blocks(int64_t size);

// dprediction as prediction; dloss: [batch] float32, a stride apart. scale: 2 / n.
void noise_mse_backward(
    Pointer dloss, int64_t dloss_stride, Pointer prediction, Pointer x0, int x0_dtype, Pointer t, int64_t t_stride,
    int t_kind, Pointer table, int64_t last, Pointer weight, int64_t weight_stride, Pointer seeds, uint64_t seed,
    Pointer channel_noise, double offset_noise, Pointer dprediction, int target, double gamma, double scale,
    int64_t batch, int64_t size, int64_t channels, bool channels_last, int dtype, int device, Pointer stream);
