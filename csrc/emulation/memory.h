// Shared memory, and global memory as kernels read and write it. Shared memory is made for one block, of exactly the
// size asked for, so that AddressSanitizer sees an overrun, and filled with 0xFF, which is NaN in every type.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <new>

#include "block.h"

namespace emu {

inline constexpr size_t max_shared = 227 << 10;        // of a block, Hopper's and Blackwell's
inline constexpr size_t max_static_shared = 48 << 10;  // what may be declared in a kernel
inline constexpr size_t shared_alignment = 128;        // of DYNAMIC_SHARED

struct SharedVariable {
    const char* key;
    char* memory;  // to be freed
    char* data;
};

struct SharedMemory {
    char* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    size_t static_bytes = 0;
    SharedVariable variable[64];
    int variables = 0;
};

inline SharedMemory shared;

#if defined(EMU_THREAD_SANITIZER)

// Blocks are not ordered, so they must not use the same addresses: each takes the next ones of an arena. Filled unseen,
// since whoever is first to name a variable orders nothing before the others.
inline constexpr size_t arena_bytes = 64 << 20;
inline char* arena = nullptr;
inline size_t arena_used = 0;

EMU_QUIET inline char* new_shared(size_t bytes) {
    char* memory = arena + arena_used;
    const size_t rounded = (bytes + shared_alignment - 1) / shared_alignment * shared_alignment;
    volatile uint64_t* words = reinterpret_cast<volatile uint64_t*>(memory);
    for (size_t i = 0; i < rounded / sizeof(uint64_t); ++i) words[i] = ~uint64_t{0};
    arena_used += rounded;
    return memory;
}

inline void free_shared(char*) {}

EMU_QUIET inline void reserve_shared(size_t bytes) {
    if (!arena) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* memory = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        arena = static_cast<char*>(memory);
        release(&block.start_edge);
    }
    if (arena_used + bytes + 2 * max_static_shared > arena_bytes) {  // full: the next blocks come after all before
        acquire(&block.end_edge);
        release(&block.start_edge);
        arena_used = 0;
    }
}

#else

inline char* new_shared(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, shared_alignment, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);
    return static_cast<char*>(memory);
}

inline void free_shared(char* memory) { std::free(memory); }
inline void reserve_shared(size_t) {}

#endif

// Made and freed by the scheduler, around a block.
EMU_QUIET inline void begin_shared(size_t bytes) {
    reserve_shared(bytes);
    shared.dynamic = new_shared(bytes);
    shared.dynamic_bytes = bytes;
    shared.static_bytes = 0;
}

EMU_QUIET inline void end_shared() {
    free_shared(shared.dynamic);
    while (shared.variables) free_shared(shared.variable[--shared.variables].memory);
}

// The variable that `key` stands for. At the alignment of its type and no more, as on a GPU, where a float array need
// not be aligned for 16-byte vectors.
EMU_QUIET EMU_APART inline char* shared_variable(const char* key, size_t bytes, size_t alignment) {
    SharedMemory& s = shared;
    for (int i = 0; i < s.variables; ++i) {
        if (s.variable[i].key == key) return s.variable[i].data;
    }
    s.static_bytes += (bytes + 15) / 16 * 16;
    if (s.variables == 64 || s.static_bytes > max_static_shared) {
        trap("SHARED variables of " + std::to_string(s.static_bytes) + " bytes, more than " +
             std::to_string(max_static_shared));
    }
    if (s.static_bytes + s.dynamic_bytes > max_shared) {
        trap(std::to_string(s.static_bytes) + " bytes of SHARED and " + std::to_string(s.dynamic_bytes) +
             " of DYNAMIC_SHARED memory, together more than " + std::to_string(max_shared));
    }
    const size_t offset = alignment < 16 ? alignment : 0;
    char* memory = new_shared(offset + bytes);
    s.variable[s.variables++] = {key, memory, memory + offset};
    return memory + offset;
}

}  // namespace emu

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::shared.dynamic)
#define SHARED(T, name, dims)                  \
    static char name##_key;                    \
    using name##_type = T dims;                \
    auto& name = *reinterpret_cast<name##_type*>( \
        emu::shared_variable(&name##_key, sizeof(name##_type), alignof(name##_type)))

template <class T>
T __ldg(const T* p) {
    return *p;
}

template <class T>
void __stcg(T* p, T value) {
    *p = value;
}

template <class T>
T atomicAdd(T* p, T value) {
    return std::atomic_ref<T>(*p).fetch_add(value, std::memory_order_relaxed);
}
