// Something made when it is first asked for, by whichever thread comes first.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>

namespace fastmaf {

// Held while anything is made. There is one for the process, so that a fork can wait for it: a child of a process that was in the middle of
// this would wait for ever.
std::mutex& making();

// Has a fork wait for another lock too, which is taken after making() by whoever takes both.
bool fork_waits_for(std::mutex& last);

template <class V>
class Lazy {
public:
    Lazy() = default;
    Lazy(const Lazy&) = delete;
    Lazy& operator=(const Lazy&) = delete;
    ~Lazy() { drop(); }

    V* get() const { return made_.load(std::memory_order_acquire); }  // null until it is made
    // `make` returns a unique_ptr and asks for nothing that is made like this.
    template <class F>
    V& get(F make) const {
        if (V* const made = get()) return *made;
        std::lock_guard<std::mutex> lock(making());
        if (!made_.load(std::memory_order_relaxed)) made_.store(make().release(), std::memory_order_release);
        return *made_.load(std::memory_order_relaxed);
    }
    void drop() { delete made_.exchange(nullptr); }  // nobody else may use it

private:
    mutable std::atomic<V*> made_{nullptr};
};

}  // namespace fastmaf
