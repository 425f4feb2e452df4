// What the emulator tells AddressSanitizer and ThreadSanitizer, and what it hides from them.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ADDRESS_SANITIZER 1
#endif
#if __has_feature(thread_sanitizer)
#define EMU_THREAD_SANITIZER 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define EMU_ADDRESS_SANITIZER 1
#endif
#if defined(__SANITIZE_THREAD__)
#define EMU_THREAD_SANITIZER 1
#endif

#if defined(EMU_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

// The emulator's own bookkeeping, which one OS thread does for all CUDA threads, is no race of the kernel.
// The attribute does not reach lambdas inside a function: there are none.
#if defined(EMU_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#define EMU_QUIET __attribute__((no_sanitize("thread")))
#else
#define EMU_QUIET
#endif

// Not copied into its callers: kernels would take long to compile.
#define EMU_APART __attribute__((noinline))

namespace emu {

// Happens-before edges. Only barriers make them: shuffles and mma order no memory, on a GPU either.
inline void acquire([[maybe_unused]] char* place) {
#if defined(EMU_THREAD_SANITIZER)
    __tsan_acquire(place);
#endif
}

inline void release([[maybe_unused]] char* place) {
#if defined(EMU_THREAD_SANITIZER)
    __tsan_release(place);
#endif
}

#if defined(EMU_ADDRESS_SANITIZER) || defined(EMU_THREAD_SANITIZER)
inline constexpr size_t stack_bytes = 256 << 10;
#else
inline constexpr size_t stack_bytes = 64 << 10;
#endif

}  // namespace emu
