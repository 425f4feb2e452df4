// Barriers, and functions that the lanes of a warp call together. Stricter than a GPU: a barrier or a mask that misses
// a thread which has returned is an error, and so are lanes that meet in different calls.
#pragma once

#include "block.h"

namespace emu {

// ---------------------------------------------------------------- __syncthreads
EMU_QUIET inline void open_barrier() {
    Block& b = block;
    b.at_barrier = 0;
    if (b.alive != b.threads) {
        set_error("__syncthreads at " + place(b.barrier) + " waits, but " + std::to_string(b.threads - b.alive) +
                  " threads of block " + place(blockIdx) + " have returned");
    }
    for (int t = 0; t < b.threads; ++t) {
        if (thread_at(t).at_barrier) wake(thread_at(t));
    }
}

EMU_QUIET EMU_APART inline void sync_block(const std::source_location& where) {
    Block& b = block;
    // Two places in turn: the next barrier's arrivals must not be ordered before this one's departures.
    char* edge = &b.barrier_edge[current->barriers++ & 1];
    release(edge);
    if (b.at_barrier && !same_place(b.barrier, where)) {
        trap("divergent barriers: __syncthreads at " + place(where) + ", while others wait at " + place(b.barrier));
    }
    b.barrier = where;
    if (++b.at_barrier == b.alive) {
        open_barrier();
    } else {
        current->at_barrier = true;
        wait("__syncthreads", where);
    }
    acquire(edge);
}

// ---------------------------------------------------------------- warps
EMU_QUIET inline void remove_meeting(Warp& warp, int i) { warp.meeting[i] = warp.meeting[--warp.meetings]; }

// Runs the collective and wakes its lanes if every lane of the mask that is alive has arrived.
EMU_QUIET inline bool try_complete(int warp_number, int i) {
    Warp& warp = block.warp[warp_number];
    const Meeting m = warp.meeting[i];
    if (m.mask & warp.alive & ~m.arrived) return false;
    remove_meeting(warp, i);
    const unsigned missing = m.mask & ~warp.alive;
    if (missing) {
        char text[64];
        std::snprintf(text, sizeof(text), "the mask 0x%08X of ", m.mask);
        set_error(text + std::string(m.name) + " at " + place(m.where) + " names lane " +
                  std::to_string(std::countr_zero(missing)) + " of warp " + std::to_string(warp_number) +
                  (missing & warp.lanes ? ", which has returned" : ", which is not in the block"));
    } else if (m.run) {
        m.run(warp.argument, m.arrived);
    }
    for (int lane = 0; lane < warp_lanes; ++lane) {
        if (!(m.arrived >> lane & 1)) continue;
        Thread& thread = thread_at(warp_number * warp_lanes + lane);
        if (thread.state == State::waiting) wake(thread);
    }
    return true;
}

// The lanes of `mask` meet, and the last to come runs `run` over every lane's argument.
EMU_QUIET EMU_APART inline void meet(
    unsigned mask, Collective run, void* argument, const char* name, const std::source_location& where) {
    const int lane = current->number % warp_lanes;
    const int warp_number = current->number / warp_lanes;
    Warp& warp = block.warp[warp_number];
    if (!(mask >> lane & 1)) trap(std::string(name) + " at " + place(where) + ": the calling lane is not in its mask");
    warp.argument[lane] = argument;
    int i = 0;
    while (i < warp.meetings && warp.meeting[i].mask != mask) ++i;
    if (i == warp.meetings) {
        for (int other = 0; other < warp.meetings; ++other) {
            if (warp.meeting[other].mask & mask) {
                trap(std::string(name) + " at " + place(where) + ": masks overlap with those of lanes that wait in " +
                     warp.meeting[other].name + " at " + place(warp.meeting[other].where));
            }
        }
        warp.meeting[warp.meetings++] = {mask, 0, run, name, where, &warp.edge[warp.next_edge++ % sizeof(warp.edge)]};
    }
    Meeting& m = warp.meeting[i];
    if (m.run != run || !same_place(m.where, where)) {
        trap("lanes of one warp meet in different calls: " + std::string(name) + " at " + place(where) +
             ", others in " + m.name + " at " + place(m.where));
    }
    m.arrived |= 1u << lane;
    char* edge = m.edge;
    if (!run) release(edge);
    if (!try_complete(warp_number, i)) wait(name, where);
    if (!run) acquire(edge);
}

// What waited for the thread that now returns waits no longer.
EMU_QUIET inline void finish_thread() {
    const int warp_number = current->number / warp_lanes;
    Warp& warp = block.warp[warp_number];
    current->state = State::finished;
    --block.alive;
    warp.alive &= ~(1u << current->number % warp_lanes);
    if (block.stopped) return;
    if (block.at_barrier && block.at_barrier == block.alive) open_barrier();
    for (int i = warp.meetings; i-- > 0;) try_complete(warp_number, i);
}

inline int lane() { return current->number % warp_lanes; }

// ---------------------------------------------------------------- shuffles and votes
struct Shuffle {
    uint64_t bits;
    int source;
};

EMU_QUIET inline void shuffle_all(void* const* arguments, unsigned lanes) {
    uint64_t found[warp_lanes];
    for (int l = 0; l < warp_lanes; ++l) {
        if (!(lanes >> l & 1)) continue;
        const int source = static_cast<Shuffle*>(arguments[l])->source;
        if (!(lanes >> source & 1)) {
            set_error("a shuffle of lane " + std::to_string(l) + " reads lane " + std::to_string(source) +
                      ", which is not in the mask");
            return;
        }
        found[l] = static_cast<Shuffle*>(arguments[source])->bits;
    }
    for (int l = 0; l < warp_lanes; ++l) {
        if (lanes >> l & 1) static_cast<Shuffle*>(arguments[l])->bits = found[l];
    }
}

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name, const std::source_location& where) {
    static_assert(sizeof(T) <= 8);
    Shuffle argument{0, source};
    std::memcpy(&argument.bits, &value, sizeof(T));
    meet(mask, shuffle_all, &argument, name, where);
    std::memcpy(static_cast<void*>(&value), &argument.bits, sizeof(T));
    return value;
}

EMU_QUIET inline void ballot_all(void* const* arguments, unsigned lanes) {
    unsigned votes = 0;
    for (int l = 0; l < warp_lanes; ++l) {
        if (lanes >> l & 1 && *static_cast<unsigned*>(arguments[l])) votes |= 1u << l;
    }
    for (int l = 0; l < warp_lanes; ++l) {
        if (lanes >> l & 1) *static_cast<unsigned*>(arguments[l]) = votes;
    }
}

inline unsigned ballot(unsigned mask, bool vote, const char* name, const std::source_location& where) {
    unsigned argument = vote;
    meet(mask, ballot_all, &argument, name, where);
    return argument;
}

}  // namespace emu

// ---------------------------------------------------------------- as CUDA names them
#define EMU_HERE std::source_location where = std::source_location::current()

inline void __syncthreads(EMU_HERE) { emu::sync_block(where); }

inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) { emu::meet(mask, nullptr, nullptr, "__syncwarp", where); }

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_HERE) {
    const int lane = emu::lane();
    return emu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_HERE) {
    const int lane = emu::lane();
    const int source = lane ^ lanes;
    const bool outside = (source & ~(width - 1)) > (lane & ~(width - 1));  // a later group: the lane's own value
    return emu::shuffle(mask, value, outside ? lane : source, "__shfl_xor_sync", where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    const int lane = emu::lane();
    const bool outside = (lane & (width - 1)) + static_cast<int>(delta) >= width;
    return emu::shuffle(mask, value, outside ? lane : lane + static_cast<int>(delta), "__shfl_down_sync", where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_HERE) {
    const int lane = emu::lane();
    const bool outside = (lane & (width - 1)) < static_cast<int>(delta);
    return emu::shuffle(mask, value, outside ? lane : lane - static_cast<int>(delta), "__shfl_up_sync", where);
}

inline unsigned __ballot_sync(unsigned mask, int vote, EMU_HERE) {
    return emu::ballot(mask, vote != 0, "__ballot_sync", where);
}

inline int __any_sync(unsigned mask, int vote, EMU_HERE) {
    return emu::ballot(mask, vote != 0, "__any_sync", where) != 0;
}

inline int __all_sync(unsigned mask, int vote, EMU_HERE) {
    return emu::ballot(mask, vote == 0, "__all_sync", where) == 0;
}

[[noreturn]] inline void emu_trap(EMU_HERE) { emu::trap("__trap() at " + emu::place(where)); }
#define __trap() emu_trap()
