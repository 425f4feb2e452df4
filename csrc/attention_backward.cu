// Backward of attention for heads of 32 to 128 columns in 16 bits, without masks.
//
//     p  = exp2(s * scale * log2(e) - lse)         s = q k^T
//     ds = p * (do v^T - delta)                    delta = sum over columns of do * o
//     dq = scale * ds k       dk = scale * ds^T q       dv = p^T do
//
// Five products, 10 * n_q * n_k * d FLOPs, n_q * n_k exponentials; q, k, v, o, do are read once and dq, dk, dv written
// once, 16 bytes an element of a head. For 197 tokens of 64 columns both take an H100 about as long: neither two of the
// products nor the reads may come twice, as they do where dq has one kernel, and dk and dv another.
//
// A block has the keys of a head: k and v in shared memory, dk and dv in the registers of its warps, each of which owns
// bands of 16 keys. It walks over the queries, 64 at a time. With the scores transposed, keys as rows, p^T and ds^T are
// left operands of dv and dk as they leave the tensor cores. ds goes to shared memory too; after a barrier the warps
// share dq = ds k, which needs all keys, and go on to the next queries: ds is kept twice, so that one barrier a step is
// enough. q, do and o of the next step come by cp.async; delta is a sum over what a thread copied itself.
//
// A quarter of a multiprocessor has 16384 registers: 2 warps of 255 or 3 of 168 (`most_warps`). Up to D = 64 a warp has
// 32 keys: reading every query for 32 keys rather than 16 halves the traffic of shared memory, else the limit.
// 197 tokens are 13 bands on 7 warps; 257 are 16 on 8 and a band of one key that the warps share, each doing its scores
// for 16 queries and 8 columns of its dk and dv.
//
// Keys that do not fit (577 tokens) come in chunks, one after another; dq is then added up in float32 in global memory,
// each element by one thread, and stays in L2. Where heads are too few to fill the machine, and for cross-attention
// with few keys, blocks share a head: `key_splits` have part of the keys and `query_splits` part of the queries. Their
// parts, float32, are added by attention_backward_sum_kernel in a fixed order. No atomics: the same bits every time.
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "attention_backward.cuh"

namespace attention {

template <>
void start_backward(int64_t head_dim, const BackwardParams<__half>& p, int64_t blocks, BackwardBlock block,
                    cudaStream_t stream) {
    start_backward_of<__half, MMFAST_HEAD_DIMS>(head_dim, p, blocks, block, stream);
}

// ---------------------------------------------------------------- parts to gradients
template <class T>
struct SumParams {
    struct Output {
        T* to;               // (batch, heads, rows, width)
        const float* parts;  // the same, contiguous, and `splits` of them
        Strides stride;
        int64_t step;        // from one part to the next, in elements
        int64_t vectors;     // of 8 elements
        int heads, rows, splits;
        float factor;
    } output[3];
    int chunks;  // vectors a row
};

// One thread for 8 elements of dq, dk or dv.
template <class T>
__global__ void __launch_bounds__(256) attention_backward_sum_kernel(const __grid_constant__ SumParams<T> p) {
    int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
    const int64_t before_dk = p.output[0].vectors;
    const int64_t before_dv = before_dk + p.output[1].vectors;
    const typename SumParams<T>::Output o =
        index < before_dk ? p.output[0] : index < before_dv ? p.output[1] : p.output[2];
    index -= index < before_dk ? 0 : index < before_dv ? before_dk : before_dv;
    if (index >= o.vectors) return;
    float sum[8] = {};
    for (int split = 0; split < o.splits; ++split) {
        const Vec<float, 8> x = load_vec<float, 8>(o.parts + split * o.step + index * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] += x[j];
    }
    const int64_t row = index / p.chunks;
    const int64_t head = row / o.rows;
    T* to = o.to + head / o.heads * o.stride.batch + head % o.heads * o.stride.head;
    store_chunk(to + row % o.rows * o.stride.row + index % p.chunks * 8, sum, o.factor);
}

// ---------------------------------------------------------------- host
static int64_t ceil_to(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Of a block that holds `bands` at once. `steps` are the queries' of a block, 64 each.
static BackwardBlock backward_block(int head_dim, int64_t bands, int64_t steps) {
    const int64_t each = bands_a_warp(head_dim);
    const int64_t most = most_warps(head_dim);
    const bool shared_band = shares_a_band(head_dim) && bands == most * each + 1;
    // Two at least: a step's 64 values of lse take a thread each.
    const int warps = int(std::clamp<int64_t>(ceil_to(bands, each) / each, 2, most));
    const BackwardMemory memory(head_dim, int(bands), shared_band, steps > 1 ? 2 : 1);
    return {2 * int64_t(memory.size), warps};
}

}  // namespace attention

BackwardPlan attention_backward_plan(int64_t heads_kv, int64_t group, int64_t n_q, int64_t n_k, int64_t head_dim,
                                     int processors, int64_t limit) {
    using namespace attention;
    const int d = int(head_dim);
    const int64_t each = bands_a_warp(d);
    const int64_t bands = ceil_to(n_k, 16) / 16;
    const int64_t steps = group * (ceil_to(n_q, STEP) / STEP);
    int64_t most = most_warps(d) * each;
    if (shares_a_band(d) && bands == most + 1 && backward_block(d, bands, steps).shared <= limit) most = bands;
    while (most > each && backward_block(d, most, steps).shared > limit) most -= each;
    const auto even = [&](int64_t of) {  // chunks of so many bands, about as large as one another
        const int64_t chunks = (of + most - 1) / most;
        return std::min({of, most, ceil_to((of + chunks - 1) / chunks, each)});
    };

    const int64_t chunks = (bands + most - 1) / most;
    const BackwardBlock block = backward_block(d, even(bands), steps);
    // Blocks of a multiprocessor, which has 1 KiB more than a block may have and takes 1 KiB of each.
    const int64_t resident =
        std::max<int64_t>(1, std::min<int64_t>(most_warps(d) / block.warps, (limit + 1024) / (block.shared + 1024)));
    const int64_t wanted = std::max<int64_t>(1, processors * resident / heads_kv);  // blocks that share a head
    int64_t key_splits = std::min(chunks, wanted);
    int64_t query_splits = std::min(steps, wanted / key_splits);
    const int64_t more = wanted / (key_splits * query_splits);
    if (more > 1) key_splits = std::min(key_splits * more, std::max(key_splits, bands / (2 * each)));
    const int64_t split = key_splits == 1 ? bands : ceil_to((bands + key_splits - 1) / key_splits, each);
    key_splits = (bands + split - 1) / split;
    const int64_t split_steps = (steps + query_splits - 1) / query_splits;
    query_splits = (steps + split_steps - 1) / split_steps;
    return {int(even(split)), int(split), int(key_splits), int(query_splits)};
}

void attention_backward(Pointer dout, Pointer q, Pointer k, Pointer v, Pointer out, Pointer lse, Pointer dq, Pointer dk,
                        Pointer dv, Pointer dq_parts, Pointer dkv_parts, int64_t batch, int64_t heads, int64_t kv_heads,
                        int64_t n_q, int64_t n_k, int64_t head_dim, HeadStrides stride_dout, HeadStrides stride_q,
                        HeadStrides stride_k, HeadStrides stride_v, HeadStrides stride_out, HeadStrides stride_dq,
                        HeadStrides stride_dk, HeadStrides stride_dv, double scale, BackwardPlan plan, int dtype,
                        int device, Pointer stream) {
    using namespace attention;
    const char* op = "attention_backward";
    const bool need_dkv = dk != 0;
    const auto [chunk_bands, split_bands, key_splits, query_splits] = plan;
    require(batch > 0 && heads > 0 && n_q > 0 && n_k > 0, op, ": sizes must be positive, got batch ", batch, ", heads ",
            heads, ", n_q ", n_q, ", n_k ", n_k);
    require(head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 128, op,
            ": head_dim must be a multiple of 8 from 32 to 128, got ", head_dim);
    require(kv_heads > 0 && heads % kv_heads == 0, op, ": kv_heads must divide heads ", heads, ", got ", kv_heads);
    require(n_q < 1 << 30 && n_k < 1 << 30, op, ": too many rows: n_q ", n_q, ", n_k ", n_k);
    require(dtype == Float16 || dtype == BFloat16, op, ": dtype must be 1 (float16) or 2 (bfloat16), got ", dtype);
    require(std::isfinite(scale), op, ": scale must be finite, got ", scale);
    require(need_dkv == (dv != 0), op, ": dk and dv must both be wanted, or neither");
    require((dout | q | k | v | out | dq | dk | dv | dq_parts | dkv_parts) % 16 == 0, op,
            ": tensors must be aligned to 16 bytes");
    for (const HeadStrides& strides :
         {stride_dout, stride_q, stride_k, stride_v, stride_out, stride_dq, stride_dk, stride_dv}) {
        for (int i = 0; i < 3; ++i) {
            require(strides[i] % 8 == 0, op, ": strides must be multiples of 8, got ", strides[i]);
        }
    }
    const int64_t group = heads / kv_heads;
    const int64_t heads_kv = batch * kv_heads;
    const int64_t bands = ceil_to(n_k, 16) / 16;
    const int64_t steps = group * (ceil_to(n_q, STEP) / STEP);
    const int64_t most = most_warps(int(head_dim)) * bands_a_warp(int(head_dim));
    const bool fits = chunk_bands > 0 && split_bands >= chunk_bands && key_splits > 0 && query_splits > 0 &&
                      chunk_bands <= most + (shares_a_band(int(head_dim)) ? 1 : 0) &&
                      int64_t(split_bands) * key_splits >= bands && int64_t(split_bands) * (key_splits - 1) < bands &&
                      (query_splits - 1) * ((steps + query_splits - 1) / query_splits) < steps;
    require(fits, op, ": a plan of ", chunk_bands, " bands of ", split_bands, ", ", key_splits, " key splits and ",
            query_splits, " query splits does not fit ", n_k, " keys, ", steps, " steps of queries and head_dim ",
            head_dim);
    require(dq_parts || (key_splits == 1 && chunk_bands >= bands), op, ": this plan needs memory for parts of dq");
    require(dkv_parts || !need_dkv || query_splits == 1, op, ": this plan needs memory for parts of dk and dv");
    DeviceGuard guard(device);
    const BackwardBlock block = backward_block(int(head_dim), chunk_bands, (steps + query_splits - 1) / query_splits);
    const int64_t limit = shared_limit(device);
    require(block.shared <= limit, op, ": ", chunk_bands * 16, " keys of ", head_dim, " columns do not fit in ", limit,
            " bytes");

    const auto strides = [](const HeadStrides& s) { return Strides{s[0], s[1], s[2]}; };
    const auto start = [&]<class T>(T) {
        BackwardParams<T> p = {};
        p.q = at<const T>(q);
        p.k = at<const T>(k);
        p.v = at<const T>(v);
        p.out = at<const T>(out);
        p.dout = at<const T>(dout);
        p.lse = at<const float>(lse);
        p.dq = at<T>(dq);
        p.dk = at<T>(dk);
        p.dv = at<T>(dv);
        p.dq_parts = at<float>(dq_parts);
        p.dkv_parts = at<float>(dkv_parts);
        p.stride_q = strides(stride_q);
        p.stride_k = strides(stride_k);
        p.stride_v = strides(stride_v);
        p.stride_out = strides(stride_out);
        p.stride_dout = strides(stride_dout);
        p.stride_dq = strides(stride_dq);
        p.stride_dk = strides(stride_dk);
        p.stride_dv = strides(stride_dv);
        p.heads_kv = heads_kv;
        p.kv_heads = int(kv_heads);
        p.group = int(group);
        p.n_q = int(n_q);
        p.n_k = int(n_k);
        p.key_splits = key_splits;
        p.query_splits = query_splits;
        p.split_bands = split_bands;
        p.chunk_bands = chunk_bands;
        p.scale_log2 = float(scale * LOG2E);
        p.scale = float(scale);
        p.need_dkv = need_dkv;
        start_backward(head_dim, p, heads_kv * key_splits * query_splits, block, as_stream(stream));
        if (key_splits == 1 && (query_splits == 1 || !need_dkv)) return;

        SumParams<T> sums = {};
        sums.chunks = int(head_dim / 8);
        const int64_t all_q = batch * heads * n_q * head_dim;
        const int64_t all_k = heads_kv * n_k * head_dim;
        sums.output[0] = {p.dq, p.dq_parts, p.stride_dq, all_q, key_splits > 1 ? all_q / 8 : 0, int(heads), int(n_q),
                          key_splits, p.scale};
        const int64_t some = need_dkv && query_splits > 1 ? all_k / 8 : 0;
        sums.output[1] = {p.dk, p.dkv_parts, p.stride_dk, 2 * all_k, some, int(kv_heads), int(n_k), query_splits,
                          p.scale};
        sums.output[2] = {p.dv, p.dkv_parts + (some ? all_k : 0), p.stride_dv, 2 * all_k, some, int(kv_heads), int(n_k),
                          query_splits, 1.0f};
        const int64_t vectors = sums.output[0].vectors + 2 * some;
        launch(attention_backward_sum_kernel<T>, (vectors + 255) / 256, dim3(256), 0, as_stream(stream), sums);
    };
    if (dtype == Float16) {
        start(__half{});
    } else {
        start(__nv_bfloat16{});
    }
}
