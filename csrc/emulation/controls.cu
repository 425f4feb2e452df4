#include "controls.h"

#include "cuda_emulation.h"

void set_thread_order(uint64_t seed) { emu::set_thread_order(seed); }

std::map<std::string, uint64_t> statistics() {
    const emu::Statistics now = emu::statistics();
    return {{"launches", now.launches},
            {"blocks", now.blocks},
            {"switches", now.switches},
            {"ldmatrix_phases", now.ldmatrix_phases},
            {"ldmatrix_conflicts", now.ldmatrix_conflicts},
            {"products", now.products}};
}

void reset_statistics() { emu::reset_statistics(); }
