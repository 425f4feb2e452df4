// Tensor cores, ldmatrix and cp.async: the only PTX of the library. Fragment layouts are those of the PTX ISA, "Matrix
// Fragments for mma.m16n8k16" and ".m16n8k8"; with g = lane / 4 and t = lane % 4, and i the element of a register pair:
//   A (16 x 16)  a[0]: row g,     columns 2t + i       a[1]: row g + 8, columns 2t + i
//                a[2]: row g,     columns 8 + 2t + i   a[3]: row g + 8, columns 8 + 2t + i
//   B (16 x 8)   b[0]: rows 2t + i, column g           b[1]: rows 8 + 2t + i, column g
//   C (16 x 8)   d[0], d[1]: row g, columns 2t, 2t + 1    d[2], d[3]: row g + 8
// m16n8k8 has the first half of A's columns and of B's rows. A and B are __half or __nv_bfloat16, C is float32.
#pragma once

#include "launch.cuh"

#if defined(__CUDACC__)

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---------------------------------------------------------------- d += a b, all 32 lanes of a warp
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
__device__ __forceinline__ void mma_m16n8k8(float d[4], const unsigned a[2], const unsigned b[1]);
template <>
__device__ __forceinline__ void mma_m16n8k8<__nv_bfloat16>(float d[4], const unsigned a[2], const unsigned b[1]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<__half>(float d[4], const unsigned a[2], const unsigned b[1]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// ---------------------------------------------------------------- 8 x 8 tiles of 16-bit elements from shared memory
// Lane l gives the address of row l % 8 of tile l / 8, 16 bytes, aligned; x1 takes the addresses of lanes 0-7, x2 of
// 0-15. r[j] is tile j: row g, columns 2t + i (Transpose: rows 2t + i, column g).
template <bool Transpose>
__device__ __forceinline__ void ldmatrix_x4(unsigned r[4], const void* row) {
    if constexpr (Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

template <bool Transpose>
__device__ __forceinline__ void ldmatrix_x2(unsigned r[2], const void* row) {
    if constexpr (Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

template <bool Transpose>
__device__ __forceinline__ void ldmatrix_x1(unsigned r[1], const void* row) {
    if constexpr (Transpose) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// ---------------------------------------------------------------- copies from global to shared memory, asynchronous
// 16 bytes, both sides aligned. Not valid: 16 zero bytes, and `src` is not read.
__device__ __forceinline__ void cp_async_16(void* dst, const void* src, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are under way. Other threads' copies: a barrier after it.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---------------------------------------------------------------- 2^x, one instruction; 0 where that is subnormal
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#else

#include "emulation/async_copy.h"
#include "emulation/tensor_core.h"

#endif
