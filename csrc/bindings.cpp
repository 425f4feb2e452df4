// mmfast._cuda: the host functions of every op, as they are. Knows no torch: tensors come as pointers and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "add_layer_norm.h"
#include "attention.h"
#include "ddim_step.h"
#include "ddpm_step.h"
#include "layer_norm.h"
#include "noise_like.h"
#include "noise_mse.h"
#include "pointer.h"
#include "q_sample.h"
#if defined(MMFAST_EMULATED)
#include "emulation/controls.h"
#endif

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA C++ kernels of mmfast; called by mmfast.cuda, which makes the tensors.";
#if defined(MMFAST_EMULATED)
    m.attr("emulated") = true;
    m.attr("architectures") = "";
    m.def("set_thread_order", &set_thread_order);
    m.def("statistics", &statistics);
    m.def("reset_statistics", &reset_statistics);
#else
    m.attr("emulated") = false;
    m.attr("architectures") = MMFAST_ARCHITECTURES;  // as given to nvcc: "80;90"
#endif
    m.def("attention_backward", &attention_backward);
    m.def("attention_backward_plan", &attention_backward_plan);
    m.def("attention_forward", &attention_forward);
    m.def("attention_forward_plan", &attention_forward_plan);
    m.def("shared_limit", &attention_shared_limit);
    m.def("add_layer_norm_forward", &add_layer_norm_forward);
    m.def("add_layer_norm_backward", &add_layer_norm_backward);
    m.def("layer_norm_forward", &layer_norm_forward);
    m.def("layer_norm_backward", &layer_norm_backward);
    m.def("ddim_step_forward", &ddim_step_forward);
    m.def("ddpm_step_forward", &ddpm_step_forward);
    m.def("noise_like_forward", &noise_like_forward);
    m.def("noise_mse_backward", &noise_mse_backward);
    m.def("noise_mse_blocks", &noise_mse_blocks);
    m.def("noise_mse_forward", &noise_mse_forward);
    m.def("philox_words", &philox_words);
    m.def("q_sample_backward", &q_sample_backward);
    m.def("q_sample_forward", &q_sample_forward);
}
