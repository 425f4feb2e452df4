// What the headers of ops take in the place of tensors. Knows neither CUDA nor its emulation: bindings.cpp includes it.
#pragma once

#include <cstdint>

using Pointer = std::uintptr_t;  // data_ptr() of a tensor, 0 for none; or a raw stream
