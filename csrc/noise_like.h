// Standard normal noise from seeds: noise_like.cu.
#pragma once

#include "pointer.h"

// Fills y [batch, size], contiguous or channels_last within a sample, with noise.
// seeds: [batch] int64, or 0 for `seed` and the samples' indices. channel_noise: [batch, channels] float32, added
// `offset_noise` times, or 0. channels: of a sample, 1 where it has none. stream: the counter's last word.
void noise_like_forward(
    Pointer y, Pointer seeds, Pointer channel_noise, uint64_t seed, int64_t batch, int64_t size, int64_t channels,
    bool channels_last, double offset_noise, int64_t noise_stream, int dtype, int device, Pointer stream);

// For tests: words [count, 4] uint32 of chunks first, first + 1, ..., and their normals [count, 4] float32.
void philox_words(
    Pointer words, Pointer normals, uint64_t seed, int64_t sample, int64_t noise_stream, int64_t first, int64_t count,
    int device, Pointer stream);
