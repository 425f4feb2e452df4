// What Python may ask of the emulation. Plain arguments: bindings.cpp includes it.
#pragma once

#include <cstdint>
#include <map>
#include <string>

// The order in which threads run: 0 in order, 1 the last first, other odd numbers one warp ahead, even ones at random.
void set_thread_order(uint64_t seed);

// What has been counted since the last reset: launches, blocks, switches (between threads), ldmatrix_phases and
// ldmatrix_conflicts (phases that bank conflicts add), products (multiplications of mma).
std::map<std::string, uint64_t> statistics();

void reset_statistics();
