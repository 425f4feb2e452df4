// Standard normal noise from seeds.
//
//     y[b, e] = number e % 4 of the four normals of (seed of b, chunk e / 4)      (+ offset_noise * n[b, channel of e])
//
// One pass that writes 1 element (2 B in bf16) and reads nothing, bound by the arithmetic of the noise: about 30
// instructions an element. A block makes tiles of one sample; see samples.cuh.
#include "noise_like.h"

#include "samples.cuh"

using namespace samples;

namespace {

template <class T, Layout L>
__global__ void __launch_bounds__(THREADS) noise_like_forward_kernel(
    Plan plan,
    Seeds seeds,
    unsigned stream,
    T* y) {  // [B, size]
    SHARED(NoiseKey, key, );
    Block block(plan);
    if (threadIdx.x == 0) seeds.key(key, block.sample, stream);
    __syncthreads();
    y += block.start(plan);
    for (; block.tile < block.end; ++block.tile) {
        using P = Patch<T, L>;
        const P patch(plan, block.tile);
        if (!patch.any()) continue;
        float z[P::E];
        seeds.noise(patch, plan, key, block.sample, z);
#pragma unroll
        for (int r = 0; r < P::R; ++r) {
            if (patch.inside[r]) store_row<T, P::V>(y + patch.at[r], z + r * P::V);
        }
    }
}

__global__ void __launch_bounds__(THREADS) philox_words_kernel(
    Seeds seeds,
    unsigned sample,
    unsigned stream,
    unsigned first,
    unsigned count,
    uint4* words,      // [count]
    float4* normals) {  // [count]
    SHARED(NoiseKey, key, );
    if (threadIdx.x == 0) make_noise_key(key, seeds.one, sample, stream);
    __syncthreads();
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) {
        unsigned w[4];
        float z[4];
        philox(key, first + i, w);
        normals4(key, first + i, z);
        words[i] = make_uint4(w[0], w[1], w[2], w[3]);
        normals[i] = make_float4(z[0], z[1], z[2], z[3]);
    }
}

}  // namespace

void noise_like_forward(
    Pointer y, Pointer seeds, Pointer channel_noise, uint64_t seed, int64_t batch, int64_t size, int64_t channels,
    bool channels_last, double offset_noise, int64_t noise_stream, int dtype, int device, Pointer stream) {
    const Shape shape = {batch, size, channels, channels_last};
    const Layout layout = layout_of(shape, dtype, false, aligned({y}));
    const int threads = threads_of(shape);
    const Plan p = plan("noise_like_forward", shape, layout, dtype, false, threads);
    const Seeds s = {at<int64_t>(seeds), seed, at<float>(channel_noise), static_cast<float>(offset_noise)};
    const DeviceGuard guard(device);
    with_layout("noise_like_forward", dtype, layout, [&](auto element, auto kind) {
        using T = decltype(element);
        launch(noise_like_forward_kernel<T, kind()>, blocks(p), threads, 0, as_stream(stream), p, s,
               static_cast<unsigned>(noise_stream), at<T>(y));
    });
}

void philox_words(
    Pointer words, Pointer normals, uint64_t seed, int64_t sample, int64_t noise_stream, int64_t first, int64_t count,
    int device, Pointer stream) {
    const DeviceGuard guard(device);
    launch(philox_words_kernel, static_cast<unsigned>((count + THREADS - 1) / THREADS), THREADS, 0, as_stream(stream),
           Seeds{nullptr, seed, nullptr, 0.0f}, static_cast<unsigned>(sample), static_cast<unsigned>(noise_stream),
           static_cast<unsigned>(first), static_cast<unsigned>(count), at<uint4>(words), at<float4>(normals));
}
