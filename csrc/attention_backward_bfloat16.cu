// The backward of attention for bfloat16: a file of its own, so that a build compiles both types at once.
#include "attention_backward.cuh"

namespace attention {

template <>
void start_backward(int64_t head_dim, const BackwardParams<__nv_bfloat16>& p, int64_t blocks, BackwardBlock block,
                    cudaStream_t stream) {
    start_backward_of<__nv_bfloat16, MMFAST_HEAD_DIMS>(head_dim, p, blocks, block, stream);
}

}  // namespace attention
