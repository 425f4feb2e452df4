// Layer normalisation over the last dimension: host functions. Pointers are of device memory, sizes and strides in
// elements; row r of a tensor starts at r / inner * outer + r % inner * stride. Dtypes are the codes of host.h.
#pragma once

#include "pointer.h"

// y = (x - mean) * rstd * weight + bias, (rows, width) contiguous in x's dtype. weight and bias, (width,), are float32
// or of x's dtype, or 0 for none. mean and rstd, (rows,) float32, are 0 where they are not to be saved.
void layer_norm_forward(
    Pointer x, int64_t inner, int64_t outer, int64_t stride, Pointer weight, int weight_dtype, Pointer bias,
    int bias_dtype, Pointer y, Pointer mean, Pointer rstd, int64_t rows, int64_t width, double eps, int dtype,
    int device, Pointer stream);

// dx (rows, width) contiguous in x's dtype, and dweight and dbias (width,) in dtypes of their own; 0 where not wanted.
// For these two `workspace` holds 2 * programs * width floats; `programs` is the most blocks to run, two a
// multiprocessor.
void layer_norm_backward(
    Pointer dy, int64_t inner_dy, int64_t outer_dy, int64_t stride_dy, Pointer x, int64_t inner_x, int64_t outer_x,
    int64_t stride_x, Pointer weight, int weight_dtype, Pointer mean, Pointer rstd, Pointer dx, Pointer dweight,
    int dweight_dtype, Pointer dbias, int dbias_dtype, Pointer workspace, int programs, int64_t rows, int64_t width,
    int dtype, int device, Pointer stream);
