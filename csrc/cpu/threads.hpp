// One small pool of threads per process. It holds no OpenMP, survives fork (the child starts a new one), and never makes a caller
// wait for another: a caller that finds it busy does its work alone. With one thread it is never touched.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmaf {

// That of the scope, or the number set last; else FASTMAF_NUM_THREADS, else OMP_NUM_THREADS, else what affinity and the cgroup's quota allow.
int num_threads();
void set_num_threads(int threads);  // throws std::invalid_argument below 1

// Another number for what the calling thread begins in a scope; 0 leaves it.
class ThreadsOfScope {
public:
    explicit ThreadsOfScope(int threads);
    ThreadsOfScope(const ThreadsOfScope&) = delete;
    ThreadsOfScope& operator=(const ThreadsOfScope&) = delete;
    ~ThreadsOfScope();

private:
    const int before_;
};

// Calls body(task) for every task, each exactly once, on up to `threads` threads. `poll`, if any, is called by the calling thread about every
// 100 ms; what it throws, and what a body throws, stops the loop and reaches the caller.
void parallel_loop(int threads, int64_t tasks, const std::function<void(int64_t)>& body, bool wake, const std::function<void()>* poll);

template <class F>
void parallel_for(int threads, int64_t tasks, F&& body, const std::function<void()>* poll = nullptr) {
    if (tasks == 1) return body(0);
    parallel_loop(threads, tasks, std::ref(body), true, poll);
}

// The same for a loop so short that only threads which are still awake from the last one are of use.
template <class F>
void parallel_briefly(int threads, int64_t tasks, F&& body) {
    parallel_loop(threads, tasks, std::ref(body), false, nullptr);
}

}  // namespace fastmaf
