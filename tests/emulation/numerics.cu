// Conversions, reductions and tensor-core functions of the headers on arrays, for test_numerics.py to compare with
// PyTorch. nvcc compiles it too.
#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

// ---------------------------------------------------------------- vec.cuh
// x: (count), y: (count), through vectors of N elements of the narrower type, one a thread
template <class From, class To, int N>
__global__ void convert_kernel(const From* x, To* y, int64_t count) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= count) return;
    float values[N];
    to_floats(load_vec_readonly<From, N>(x + at), values);
    store_vec(y + at, from_floats<To, N>(values));
}

// The same, one element a thread: y[i] = from_float(to_float(x[i]))
template <class From, class To>
__global__ void convert_single_kernel(const From* x, To* y, int64_t count) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) y[at] = from_float<To>(to_float(x[at]));
}

// Words of two elements: y = pack(unpack(x)) with the halves exchanged
template <class T>
__global__ void swap_kernel(const unsigned* x, unsigned* y) {
    const float2 pair = unpack<T>(x[threadIdx.x]);
    y[threadIdx.x] = pack<T>(pair.y, pair.x);
}

// ---------------------------------------------------------------- reduce.cuh
// x: (128); out: (4, 128): sums of warps, maxima of warps, of groups of four, and the sum over the block;
// pairs: (128, 2), sums of x and of x^2 over the block
__global__ void reduce_kernel(const float* x, float* out, float* pairs) {
    SHARED(float, partial, [4]);
    SHARED(float2, partial_pair, [4]);
    const int t = threadIdx.x;
    out[t] = warp_sum(x[t]);
    out[128 + t] = warp_max(x[t]);
    out[256 + t] = quad_sum(x[t]) - quad_max(x[t]);
    out[384 + t] = block_sum<4>(x[t], partial);
    const float2 sums = block_sum<4>(make_float2(x[t], x[t] * x[t]), partial_pair);
    pairs[2 * t] = sums.x;
    pairs[2 * t + 1] = sums.y;
}

// ---------------------------------------------------------------- mma.cuh
// One warp. a: (32, 4) or (32, 2) registers, b: (32, 2) or (32, 1), d: (32, 4)
template <class T, int K>
__global__ void mma_kernel(const unsigned* a, const unsigned* b, float* d) {
    const int t = threadIdx.x;
    unsigned fragment_a[4] = {};
    unsigned fragment_b[2] = {};
    for (int i = 0; i < K / 4; ++i) fragment_a[i] = a[t * (K / 4) + i];
    for (int i = 0; i < K / 8; ++i) fragment_b[i] = b[t * (K / 8) + i];
    if constexpr (K == 16) {
        mma_m16n8k16<T>(d + t * 4, fragment_a, fragment_b);
    } else {
        mma_m16n8k8<T>(d + t * 4, fragment_a, fragment_b);
    }
}

// tiles: (Tiles, 8, 8) 16-bit elements; r: (32, Tiles)
template <int Tiles, bool Transpose>
__global__ void ldmatrix_kernel(const unsigned short* tiles, unsigned* r) {
    DYNAMIC_SHARED(unsigned short, shared);
    const int t = threadIdx.x;
    if (t < Tiles * 8) cp_async_16(shared + t * 8, tiles + t * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const unsigned short* row = t < Tiles * 8 ? shared + t * 8 : shared;
    if constexpr (Tiles == 4) {
        ldmatrix_x4<Transpose>(r + t * Tiles, row);
    } else if constexpr (Tiles == 2) {
        ldmatrix_x2<Transpose>(r + t * Tiles, row);
    } else {
        ldmatrix_x1<Transpose>(r + t * Tiles, row);
    }
}

// c = a b by one warp as a kernel would do it: a (16, K) and b (K, 8) by ldmatrix, b also as its transpose (8, K)
template <class T, int K>
__global__ void product_kernel(const T* a, const T* b, const T* b_transposed, float* c, float* c_other) {
    DYNAMIC_SHARED(T, shared);
    T* shared_a = shared;
    T* shared_b = shared_a + 16 * K;
    T* shared_t = shared_b + K * 8;
    const int t = threadIdx.x;
    for (int i = t; i < 16 * K / 8; i += 32) cp_async_16(shared_a + i * 8, a + i * 8);
    for (int i = t; i < K; i += 32) cp_async_16(shared_b + i * 8, b + i * 8);
    for (int i = t; i < K; i += 32) cp_async_16(shared_t + i * 8, b_transposed + i * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    unsigned fa[4], fb[2], ft[2];
    float d[2][4] = {};
    if constexpr (K == 16) {
        ldmatrix_x4<false>(fa, shared_a + t % 16 * K + t / 16 * 8);
        ldmatrix_x2<true>(fb, shared_b + t % 16 * 8);
        ldmatrix_x2<false>(ft, shared_t + t % 8 * K + t % 16 / 8 * 8);
        mma_m16n8k16<T>(d[0], fa, fb);
        mma_m16n8k16<T>(d[1], fa, ft);
    } else {
        ldmatrix_x2<false>(fa, shared_a + t % 16 * K);
        ldmatrix_x1<true>(fb, shared_b + t % 8 * 8);
        ldmatrix_x1<false>(ft, shared_t + t % 8 * K);
        mma_m16n8k8<T>(d[0], fa, fb);
        mma_m16n8k8<T>(d[1], fa, ft);
    }
    for (int i = 0; i < 4; ++i) {
        const int at = (t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2;
        c[at] = d[0][i];
        c_other[at] = d[1][i];
    }
}

// ---------------------------------------------------------------- functions of a device
// x: (count), y: (count, 8)
__global__ void functions_kernel(const float* x, float* y, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sine = 0.0f;
    float cosine = 0.0f;
    sincospif(x[i], &sine, &cosine);
    float* row = y + i * 8;
    row[0] = rsqrtf(x[i]);
    row[1] = sine;
    row[2] = cosine;
    row[3] = __expf(x[i]);
    row[4] = __logf(x[i]);
    row[5] = __fdividef(x[i], 3.0f);
    row[6] = __saturatef(x[i]);
    row[7] = exp2_approx(x[i]);
}

// x: (32, 2), y: (32, 5)
__global__ void integers_kernel(const unsigned long long* x, unsigned long long* y) {
    const int t = threadIdx.x;
    const unsigned long long a = x[2 * t];
    const unsigned long long b = x[2 * t + 1];
    y[5 * t] = __umul64hi(a, b);
    y[5 * t + 1] = __umulhi(static_cast<unsigned>(a), static_cast<unsigned>(b));
    y[5 * t + 2] = __popc(static_cast<unsigned>(a));
    y[5 * t + 3] = __clz(static_cast<int>(a));
    y[5 * t + 4] = __ffs(static_cast<int>(a));
}

// ---------------------------------------------------------------- functions for Python
template <class From, class To, int N>
static void convert(const From* x, To* y, int64_t count) {
    launch(convert_kernel<From, To, N>, (count + 256 * N - 1) / (256 * N), 256, 0, nullptr, x, y, count);
}

template <class From, class To>
static void convert_single(const From* x, To* y, int64_t count) {
    launch(convert_single_kernel<From, To>, (count + 255) / 256, 256, 0, nullptr, x, y, count);
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void half_to_float(const __half* x, float* y, int64_t count) { convert<__half, float, 8>(x, y, count); }
EXPORT void float_to_half(const float* x, __half* y, int64_t count) { convert<float, __half, 8>(x, y, count); }
EXPORT void bf16_to_float(const __nv_bfloat16* x, float* y, int64_t count) {
    convert<__nv_bfloat16, float, 8>(x, y, count);
}
EXPORT void float_to_bf16(const float* x, __nv_bfloat16* y, int64_t count) {
    convert<float, __nv_bfloat16, 8>(x, y, count);
}
EXPORT void half_to_float_single(const __half* x, float* y, int64_t count) { convert_single(x, y, count); }
EXPORT void float_to_half_single(const float* x, __half* y, int64_t count) { convert_single(x, y, count); }
EXPORT void bf16_to_float_single(const __nv_bfloat16* x, float* y, int64_t count) { convert_single(x, y, count); }
EXPORT void float_to_bf16_single(const float* x, __nv_bfloat16* y, int64_t count) { convert_single(x, y, count); }

EXPORT void swap_half(const unsigned* x, unsigned* y) { launch(swap_kernel<__half>, 1, 32, 0, nullptr, x, y); }
EXPORT void swap_bf16(const unsigned* x, unsigned* y) { launch(swap_kernel<__nv_bfloat16>, 1, 32, 0, nullptr, x, y); }

EXPORT void reduce(const float* x, float* out, float* pairs) {
    launch(reduce_kernel, 1, 128, 0, nullptr, x, out, pairs);
}

template <class T, int K>
static void mma(const unsigned* a, const unsigned* b, float* d) {
    launch(mma_kernel<T, K>, 1, 32, 0, nullptr, a, b, d);
}

EXPORT void mma_half_16(const unsigned* a, const unsigned* b, float* d) { mma<__half, 16>(a, b, d); }
EXPORT void mma_half_8(const unsigned* a, const unsigned* b, float* d) { mma<__half, 8>(a, b, d); }
EXPORT void mma_bf16_16(const unsigned* a, const unsigned* b, float* d) { mma<__nv_bfloat16, 16>(a, b, d); }
EXPORT void mma_bf16_8(const unsigned* a, const unsigned* b, float* d) { mma<__nv_bfloat16, 8>(a, b, d); }

template <int Tiles>
static void ldmatrix(const unsigned short* tiles, unsigned* r, bool transpose) {
    const auto kernel = transpose ? ldmatrix_kernel<Tiles, true> : ldmatrix_kernel<Tiles, false>;
    launch(kernel, 1, 32, Tiles * 128, nullptr, tiles, r);
}

EXPORT void ldmatrix(const unsigned short* tiles, unsigned* r, int count, bool transpose) {
    if (count == 4) ldmatrix<4>(tiles, r, transpose);
    if (count == 2) ldmatrix<2>(tiles, r, transpose);
    if (count == 1) ldmatrix<1>(tiles, r, transpose);
}

template <class T, int K>
static void product(const T* a, const T* b, const T* b_transposed, float* c, float* c_other) {
    launch(product_kernel<T, K>, 1, 32, 32 * K * sizeof(T), nullptr, a, b, b_transposed, c, c_other);
}

EXPORT void product_half_16(const __half* a, const __half* b, const __half* t, float* c, float* other) {
    product<__half, 16>(a, b, t, c, other);
}
EXPORT void product_half_8(const __half* a, const __half* b, const __half* t, float* c, float* other) {
    product<__half, 8>(a, b, t, c, other);
}
using Bf16 = __nv_bfloat16;
EXPORT void product_bf16_16(const Bf16* a, const Bf16* b, const Bf16* t, float* c, float* other) {
    product<Bf16, 16>(a, b, t, c, other);
}
EXPORT void product_bf16_8(const Bf16* a, const Bf16* b, const Bf16* t, float* c, float* other) {
    product<Bf16, 8>(a, b, t, c, other);
}

EXPORT void functions(const float* x, float* y, int64_t count) {
    launch(functions_kernel, (count + 127) / 128, 128, 0, nullptr, x, y, count);
}

EXPORT void integers(const unsigned long long* x, unsigned long long* y) {
    launch(integers_kernel, 1, 32, 0, nullptr, x, y);
}
