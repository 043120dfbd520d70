// A vector whose storage begins on a cache line, or on a huge page when it is large: tapes and tiles are walked through over and over.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastmaf {

template <class T>
struct AlignedAllocator {
    using value_type = T;
    static constexpr size_t line = 64, huge = size_t(2) << 20;
    AlignedAllocator() = default;
    template <class U>
    AlignedAllocator(const AlignedAllocator<U>&) {}
    static std::align_val_t alignment(size_t n) { return std::align_val_t(n * sizeof(T) >= huge ? huge : line); }
    T* allocate(size_t n) {
        void* p = ::operator new(n * sizeof(T), alignment(n));
#if defined(__linux__)
        if (n * sizeof(T) >= huge) madvise(p, n * sizeof(T), MADV_HUGEPAGE);
#endif
        return static_cast<T*>(p);
    }
    void deallocate(T* p, size_t n) { ::operator delete(p, alignment(n)); }
    template <class U>
    bool operator==(const AlignedAllocator<U>&) const {
        return true;
    }
    template <class U>
    bool operator!=(const AlignedAllocator<U>&) const {
        return false;
    }
};

template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace fastmaf
