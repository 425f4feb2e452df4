// mma and ldmatrix of csrc/mma.cuh, emulated: each lane reads its own memory, so that sanitizers see it, and the last
// lane to come computes for all 32.
#pragma once

#include "collectives.h"
#include "device_math.h"
#include "floats.h"

namespace emu {

struct Mma {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

template <class T>
EMU_QUIET inline float element_of(const unsigned* registers, int i) {
    return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(registers[i >> 1] >> (i & 1) * 16)));
}

template <class T, int K>
EMU_QUIET inline void mma_all(void* const* arguments, unsigned lanes) {
    if (lanes != ~0u) {
        set_error("mma: needs all 32 lanes");
        return;
    }
    counted.products += 16 * 8 * K;
    float a[16][K];
    float b[K][8];
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *static_cast<const Mma*>(arguments[lane]);
        const int g = lane / 4;
        const int t = lane % 4;
        for (int i = 0; i < K / 2; ++i) {
            a[g + (i & 2 ? 8 : 0)][t * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = element_of<T>(m.a, i);
        }
        for (int i = 0; i < K / 4; ++i) b[t * 2 + (i & 1) + (i >= 2 ? 8 : 0)][g] = element_of<T>(m.b, i);
    }
    float product[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < K; ++k) {
            for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *static_cast<const Mma*>(arguments[lane]);
        for (int i = 0; i < 4; ++i) m.d[i] += product[lane / 4 + (i & 2 ? 8 : 0)][lane % 4 * 2 + (i & 1)];
    }
}

struct Ldmatrix {
    uint4 row;
    unsigned out[4];
    const void* address;
};

EMU_QUIET inline unsigned element_of_row(const void* argument, int column) {
    const unsigned* words = &static_cast<const Ldmatrix*>(argument)->row.x;
    return words[column >> 1] >> (column & 1) * 16 & 0xFFFF;
}

// Eight rows of 16 bytes come in one phase if they fill the 128 bytes of the banks: each at another place modulo 128.
EMU_QUIET inline int extra_phases(void* const* rows) {
    int hits[8] = {};
    int worst = 0;
    for (int row = 0; row < 8; ++row) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(static_cast<const Ldmatrix*>(rows[row])->address);
        const int count = ++hits[address / 16 % 8];
        if (count > worst) worst = count;
    }
    return worst - 1;
}

template <int Tiles, bool Transpose>
EMU_QUIET inline void ldmatrix_all(void* const* arguments, unsigned lanes) {
    if (lanes != ~0u) {
        set_error("ldmatrix: needs all 32 lanes");
        return;
    }
    for (int tile = 0; tile < Tiles; ++tile) {
        void* const* rows = arguments + tile * 8;
        ++counted.ldmatrix_phases;
        counted.ldmatrix_conflicts += extra_phases(rows);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4;
            const int t = lane % 4 * 2;
            const unsigned low = Transpose ? element_of_row(rows[t], g) : element_of_row(rows[g], t);
            const unsigned high = Transpose ? element_of_row(rows[t + 1], g) : element_of_row(rows[g], t + 1);
            static_cast<Ldmatrix*>(arguments[lane])->out[tile] = low | high << 16;
        }
    }
}

template <int Tiles, bool Transpose>
void ldmatrix(unsigned* r, const void* row, const std::source_location& where) {
    Ldmatrix argument{};
    argument.address = row;
    if (lane() < Tiles * 8) {  // the others' addresses are ignored
        check_aligned(row, 16);
        argument.row = *static_cast<const uint4*>(row);
    }
    meet(~0u, ldmatrix_all<Tiles, Transpose>, &argument, "ldmatrix", where);
    for (int tile = 0; tile < Tiles; ++tile) r[tile] = argument.out[tile];
}

}  // namespace emu

template <class T>
void mma_m16n8k16(float d[4], const unsigned a[4], const unsigned b[2], EMU_HERE) {
    emu::Mma argument{d, a, b};
    emu::meet(~0u, emu::mma_all<T, 16>, &argument, "mma_m16n8k16", where);
}

template <class T>
void mma_m16n8k8(float d[4], const unsigned a[2], const unsigned b[1], EMU_HERE) {
    emu::Mma argument{d, a, b};
    emu::meet(~0u, emu::mma_all<T, 8>, &argument, "mma_m16n8k8", where);
}

template <bool Transpose>
void ldmatrix_x4(unsigned r[4], const void* row, EMU_HERE) {
    emu::ldmatrix<4, Transpose>(r, row, where);
}

template <bool Transpose>
void ldmatrix_x2(unsigned r[2], const void* row, EMU_HERE) {
    emu::ldmatrix<2, Transpose>(r, row, where);
}

template <bool Transpose>
void ldmatrix_x1(unsigned r[1], const void* row, EMU_HERE) {
    emu::ldmatrix<1, Transpose>(r, row, where);
}

inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
