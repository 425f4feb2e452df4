// Residual add, LayerScale, drop path and layer normalisation: host functions. Pointers are of device memory, 0 for
// what is not there; sizes and strides are in elements; row r of a tensor starts at r / inner * outer + r % inner *
// stride. Dtypes are the codes of host.h; `dtype` is that of s and y, the wider one of x's and the residual's.
#pragma once

#include "pointer.h"

// s = residual + x * gamma * sample, and y = (s - mean) * rstd * weight + bias, both (rows, width) contiguous. gamma,
// weight and bias are (width,) and sample (samples,), one for each rows_per_sample rows: gamma and sample of x's dtype
// or float32, weight and bias of s's or float32. mean and rstd, (rows,) float32, are 0 where they are not to be saved.
void add_layer_norm_forward(
    Pointer x, int64_t inner_x, int64_t outer_x, int64_t stride_x, int x_dtype, Pointer residual, int64_t inner_r,
    int64_t outer_r, int64_t stride_r, int residual_dtype, Pointer gamma, int gamma_dtype, Pointer sample,
    int sample_dtype, Pointer weight, int weight_dtype, Pointer bias, int bias_dtype, Pointer y, Pointer s,
    Pointer mean, Pointer rstd, int64_t rows, int64_t rows_per_sample, int64_t width, double eps, int dtype, int device,
    Pointer stream);

// dx and dresidual (rows, width) contiguous, dweight, dbias and dgamma (width,), each in a dtype of its own, and
// dsample (rows,) float32, which is still to be summed over the rows of a sample; 0 where not wanted. dx may have x's
// dtype, s's or float32, dresidual the residual's, s's or float32. dy and ds (0 for none) are of s's dtype, s is
// contiguous, x is read for dgamma and dsample alone. For dweight, dbias and dgamma `workspace` holds 3 * programs *
// width floats; `programs` is the most blocks to run, two a multiprocessor.
void add_layer_norm_backward(
    Pointer dy, int64_t inner_dy, int64_t outer_dy, int64_t stride_dy, Pointer ds, int64_t inner_ds, int64_t outer_ds,
    int64_t stride_ds, Pointer x, int64_t inner_x, int64_t outer_x, int64_t stride_x, int x_dtype, Pointer s,
    Pointer gamma, int gamma_dtype, Pointer sample, int sample_dtype, Pointer weight, int weight_dtype, Pointer mean,
    Pointer rstd, Pointer dx, int dx_dtype, Pointer dresidual, int dresidual_dtype, Pointer dweight, int dweight_dtype,
    Pointer dbias, int dbias_dtype, Pointer dgamma, int dgamma_dtype, Pointer dsample, Pointer workspace, int programs,
    int64_t rows, int64_t rows_per_sample, int64_t width, int dtype, int device, Pointer stream);
