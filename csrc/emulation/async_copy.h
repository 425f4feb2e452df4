// cp.async of csrc/mma.cuh, emulated: the bytes are NaN from the copy until the thread has waited for it, whatever the
// order.
#pragma once

#include <utility>

#include "block.h"

namespace emu {

EMU_APART inline void start_copy(void* to, const void* from) {
    check_aligned(to, 16);
    if (from) {
        check_aligned(from, 16);
        const uint4 value = *static_cast<const uint4*>(from);
        (void)*const_cast<const volatile unsigned*>(&value.x);  // read now, so that sanitizers see this call
    }
    *static_cast<uint4*>(to) = make_uint4(~0u, ~0u, ~0u, ~0u);
    current->copies.push_back({to, from});
}

EMU_APART inline void finish_copies(size_t groups_left) {
    auto& groups = current->groups;
    while (groups.size() > groups_left) {
        for (const Copy& copy : groups.front()) {
            *static_cast<uint4*>(copy.to) = copy.from ? *static_cast<const uint4*>(copy.from) : make_uint4(0, 0, 0, 0);
        }
        groups.erase(groups.begin());
    }
}

EMU_APART inline void close_group() {
    current->groups.push_back(std::move(current->copies));
    current->copies.clear();
}

}  // namespace emu

inline void cp_async_16(void* to, const void* from, bool valid = true) { emu::start_copy(to, valid ? from : nullptr); }
inline void cp_async_commit() { emu::close_group(); }

template <int N>
void cp_async_wait() {
    emu::finish_copies(N);
}
