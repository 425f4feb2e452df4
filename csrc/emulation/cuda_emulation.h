// Runs CUDA C++ kernels on a CPU, compiled by a host compiler without any part of the CUDA toolkit:
//   g++ -std=c++20 -O2 -fno-strict-aliasing -Wno-unknown-pragmas -x c++ -c kernel.cu
// Every CUDA thread is a fiber, all in one OS thread; blocks run one after another. A thread gives way where CUDA code
// meets others: __syncthreads, __syncwarp, shuffles, votes, mma, ldmatrix. So a run is repeatable, and the order of
// threads and blocks can be chosen (set_thread_order). AddressSanitizer and UndefinedBehaviorSanitizer see every access
// of a kernel; ThreadSanitizer finds races within a block and between blocks, whatever the order.
//
// Not covered: PTX, the rounding of GPU approximations and tensor cores, time, a block that waits for another.
#pragma once

#include "types.h"
#include "floats.h"
#include "device_math.h"
#include "block.h"
#include "collectives.h"
#include "memory.h"
#include "launch.h"
