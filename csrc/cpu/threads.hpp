// One small pool of threads per process. It holds no OpenMP, survives fork (the child starts a new one), and never makes a caller
// wait for another: a caller that finds it busy does its work alone. With one thread it is never touched.
#pragma once

#include <cstdint>
#include <functional>

namespace fastmaf {

// FASTMAF_NUM_THREADS, else OMP_NUM_THREADS, else what affinity and the cgroup's quota allow; or the number set last.
int num_threads();
void set_num_threads(int threads);  // throws std::invalid_argument below 1

// Calls body(task) for every task, each exactly once, on several threads. `poll`, if any, is called by the calling thread about every
// 100 ms; what it throws, and what a body throws, stops the loop and reaches the caller.
void parallel_loop(int64_t tasks, const std::function<void(int64_t)>& body, bool wake, const std::function<void()>* poll);

template <class F>
void parallel_for(int64_t tasks, F&& body, const std::function<void()>* poll = nullptr) {
    if (tasks == 1) return body(0);
    parallel_loop(tasks, std::ref(body), true, poll);
}

// The same for a loop so short that only threads which are still awake from the last one are of use.
template <class F>
void parallel_briefly(int64_t tasks, F&& body) {
    parallel_loop(tasks, std::ref(body), false, nullptr);
}

}  // namespace fastmaf
