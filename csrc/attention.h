// Attention of heads in 16 bits: host functions. Strides are in elements; columns are one apart.
#pragma once

#include <array>
#include <tuple>

#include "pointer.h"

using HeadStrides = std::array<int64_t, 4>;  // of a tensor (B, H, N, d); the last is not looked at

// o = softmax(scale q k^T) v and the base-2 logarithm of each row's sum of exponentials.
// q, o (batch, heads, n_q, head_dim), k, v (batch, kv_heads, n_k, head_dim), float16 or bfloat16, aligned to 16 bytes,
// strides multiples of 8; lse (batch, heads, n_q) float32. head_dim is a multiple of 8 from 32 to 128; heads is a
// multiple of kv_heads. `processors` is how many multiprocessors there are to fill.
void attention_forward(Pointer q, Pointer k, Pointer v, Pointer o, Pointer lse, int64_t batch, int64_t heads,
                       int64_t kv_heads, int64_t n_q, int64_t n_k, int64_t head_dim, HeadStrides stride_q,
                       HeadStrides stride_k, HeadStrides stride_v, HeadStrides stride_o, double scale, int processors,
                       int dtype, int device, Pointer stream);

// How attention_forward runs: (rows of an item, warps a block, heads of k and v a block, blocks that share a head,
// bytes of shared memory a block). `limit` is the shared memory that a block may have.
std::tuple<int, int, int, int, int64_t> attention_forward_plan(int64_t batch, int64_t heads, int64_t kv_heads,
                                                               int64_t n_q, int64_t n_k, int64_t head_dim,
                                                               int processors, int64_t limit);

// host.h's shared_limit, for the plans that are made in Python.
int64_t attention_shared_limit(int device);

// How attention_backward runs: (bands of 16 keys that a block holds at once, of those that it has in all, blocks that
// share a head's keys, blocks that share its queries).
using BackwardPlan = std::array<int, 4>;

// The rule. heads_kv is batch * kv_heads, group heads / kv_heads; `limit` is the shared memory that a block may have.
BackwardPlan attention_backward_plan(int64_t heads_kv, int64_t group, int64_t n_q, int64_t n_k, int64_t head_dim,
                                     int processors, int64_t limit);

// The gradients of attention_forward's q, k and v from that of its output; dk and dv are 0 where only dq is wanted.
// Tensors as attention_forward's. dq_parts (key splits, batch, heads, n_q, head_dim) float32, 0 where one block has all
// keys at once; dkv_parts (query splits, 2, batch, kv_heads, n_k, head_dim) float32, 0 for one query split.
void attention_backward(Pointer dout, Pointer q, Pointer k, Pointer v, Pointer out, Pointer lse, Pointer dq, Pointer dk,
                        Pointer dv, Pointer dq_parts, Pointer dkv_parts, int64_t batch, int64_t heads, int64_t kv_heads,
                        int64_t n_q, int64_t n_k, int64_t head_dim, HeadStrides stride_dout, HeadStrides stride_q,
                        HeadStrides stride_k, HeadStrides stride_v, HeadStrides stride_out, HeadStrides stride_dq,
                        HeadStrides stride_dk, HeadStrides stride_dv, double scale, BackwardPlan plan, int dtype,
                        int device, Pointer stream);
