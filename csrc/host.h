// The host side of every op: arguments as Python gives them, checks, and the device that a launch goes to.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

#include "launch.cuh"
#include "pointer.h"

template <class T>
T* at(Pointer p) {
    return reinterpret_cast<T*>(p);
}

inline cudaStream_t as_stream(Pointer p) { return reinterpret_cast<cudaStream_t>(p); }

enum Dtype : int { Float32 = 0, Float16 = 1, BFloat16 = 2 };

// Raise ValueError unless `ok`; the rest is the message, values included.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
    if (ok) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// Call `body(T{})` with the element type that a dtype code names.
template <class Body>
void with_dtype(const char* op, int dtype, Body body) {
    if (dtype == Float32) {
        body(float{});
    } else if (dtype == Float16) {
        body(__half{});
    } else if (dtype == BFloat16) {
        body(__nv_bfloat16{});
    } else {
        require(false, op, ": dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got ", dtype);
    }
}

// Bytes of shared memory that a block may have on a device; those of an H100 in the emulation.
inline int64_t shared_limit([[maybe_unused]] int device) {
#if defined(__CUDACC__)
    static std::array<std::atomic<int>, 64> known = {};  // asked once a device: a launch is to cost no more than itself
    int bytes = device < 64 ? known[device].load() : 0;
    if (bytes == 0) {
        const cudaDeviceAttr asked = cudaDevAttrMaxSharedMemoryPerBlockOptin;
        check(cudaDeviceGetAttribute(&bytes, asked, device), "cudaDeviceGetAttribute");
        if (device < 64) known[device] = bytes;
    }
    return bytes;
#else
    const char* const asked = std::getenv("MMFAST_EMULATED_SHARED");  // a test of smaller devices
    return asked ? std::atoll(asked) : 227 << 10;
#endif
}

// Makes `device` current while it lives, as PyTorch expects to find it afterwards what it was. -1: leave it alone.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
#if defined(__CUDACC__)
        if (device < 0) return;
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device) {
            check(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
#else
        (void)device;
#endif
    }
    ~DeviceGuard() {
#if defined(__CUDACC__)
        if (changed_) cudaSetDevice(before_);
#endif
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = -1;
    bool changed_ = false;
};
