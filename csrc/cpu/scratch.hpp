// Scratch of the calling thread: one block, kept between calls and grown when needed, carved from the front.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmaf {

// Carves aligned pieces. With a null base it only measures, so the same code sizes a layout and lays it out.
class Carver {
public:
    explicit Carver(char* base = nullptr) : base_(base) {}
    template <class T>
    T* take(size_t count) {
        T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    size_t used() const { return used_; }

private:
    char* base_;
    size_t used_ = 0;
};

// At least `bytes`, aligned to a cache line; contents are whatever the last user left, or NaN when poisoned.
char* thread_scratch(size_t bytes);

// For tests: fill scratch with NaN before each use.
void set_poison(bool poison);
bool poisoned();

}  // namespace fastmaf
