#include "threads.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "../core/floats.hpp"

namespace fastmaf {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr auto kPollInterval = std::chrono::milliseconds(100);

int from_environment(const char* name) {
    const char* text = std::getenv(name);
    if (!text) return 0;
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    return end != text && value >= 1 && value <= 4096 ? int(value) : 0;
}

int available_cores() {
    int cores = int(std::max(1u, std::thread::hardware_concurrency()));
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
    std::ifstream quota_file("/sys/fs/cgroup/cpu.max");
    std::string quota;
    double period = 0;
    if (quota_file >> quota >> period && quota != "max" && period > 0)
        cores = std::min(cores, int(std::clamp(std::round(std::strtod(quota.c_str(), nullptr) / period), 1.0, 1e6)));
    return cores;
}

int default_threads() {
    for (const char* name : {"FASTMAF_NUM_THREADS", "OMP_NUM_THREADS"})
        if (const int value = from_environment(name)) return value;
    return available_cores();
}

std::atomic<int> chosen_threads{0}, fallback_threads{0};
thread_local int threads_of_scope = 0;

// Signals are for the threads of the program: their handlers must not run on one of ours.
class NoSignals {
public:
    NoSignals() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    NoSignals(const NoSignals&) = delete;
    NoSignals& operator=(const NoSignals&) = delete;
    ~NoSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

struct Loop {
    Loop(const std::function<void(int64_t)>& body, int64_t tasks) : body(body), tasks(tasks) {}

    const std::function<void(int64_t)>& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr error;

    // Takes tasks until none is left. Only the caller polls.
    void work(const std::function<void()>* poll) {
        try {
            Clock::time_point last = poll ? Clock::now() : Clock::time_point();
            for (int64_t task; !failed.load(std::memory_order_relaxed) && (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
                body(task);
                if (poll && Clock::now() - last > kPollInterval) {
                    (*poll)();
                    last = Clock::now();
                }
            }
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
};

class Pool;
// Never destroyed: its threads may outlive static destructors. After a fork the child's copy has no threads, so it gets a new pool. Made
// when the library is loaded: whoever is forked while another thread makes it would wait for ever.
extern Pool* pool;

class Pool {
public:
    bool acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
    void release() { busy_.store(false, std::memory_order_release); }

    // Helpers that are not awake when the caller runs out of tasks are not waited for. Waking one takes longer than a short loop: with
    // `wake` false that is left to the end, for the sake of the next loop.
    void run(Loop& loop, int helpers, bool wake, const std::function<void()>* poll) {
        try {
            if (workers_ < helpers) {
                const NoSignals blocked;
                for (; workers_ < helpers; ++workers_) std::thread(&Pool::live, this).detach();
            }
        } catch (const std::system_error&) {  // the system gives no more threads
            helpers = workers_;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            loop_ = &loop;
            vacant_ = helpers;
            generation_.fetch_add(1, std::memory_order_release);
        }
        auto wake_helpers = [&] {
            for (int i = 0; i < helpers; ++i) wake_.notify_one();
        };
        if (wake) wake_helpers();
        const std::function<void()> ask = [&] {
            (*poll)();
            if (this != pool) throw std::runtime_error("this process was forked in the middle of a call, which only its parent can finish");
        };
        loop.work(poll ? &ask : nullptr);
        if (this != pool) return;  // the threads of the parent are not here
        {
            std::lock_guard<std::mutex> lock(mutex_);
            loop_ = nullptr;
        }
        if (!wake) wake_helpers();
        const auto until = Clock::now() + kSpin;
        while (active_.load(std::memory_order_acquire) > 0) {
            if (Clock::now() < until) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [&] { return active_.load(std::memory_order_acquire) == 0; });
        }
    }

private:
    void live() {
        const PlainFloats floats;
        uint64_t seen = 0;
        for (;;) {
            const auto until = Clock::now() + kSpin;
            while (generation_.load(std::memory_order_acquire) == seen && Clock::now() < until) std::this_thread::yield();
            Loop* loop = nullptr;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
                seen = generation_.load(std::memory_order_relaxed);
                if (loop_ && vacant_ > 0) {
                    --vacant_;
                    active_.fetch_add(1, std::memory_order_relaxed);
                    loop = loop_;
                }
            }
            if (!loop) continue;
            loop->work(nullptr);
            if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    std::atomic<bool> busy_{false};
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> active_{0};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Loop* loop_ = nullptr;
    int vacant_ = 0, workers_ = 0;
};

Pool* pool = [] {
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
}();

}  // namespace

int num_threads() {
    if (threads_of_scope) return threads_of_scope;
    if (const int threads = chosen_threads.load(std::memory_order_relaxed)) return threads;
    int threads = fallback_threads.load(std::memory_order_relaxed);
    if (!threads) fallback_threads = threads = default_threads();  // twice by two threads, rather than locked during a fork
    return threads;
}

void set_num_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("the number of threads is " + std::to_string(threads) + "; it must be at least 1");
    chosen_threads = threads;
}

ThreadsOfScope::ThreadsOfScope(int threads) : before_(threads_of_scope) {
    if (threads) threads_of_scope = threads;
}
ThreadsOfScope::~ThreadsOfScope() { threads_of_scope = before_; }

void parallel_loop(int threads, int64_t tasks, const std::function<void(int64_t)>& body, bool wake, const std::function<void()>* poll) {
    Loop loop(body, tasks);
    const int helpers = int(std::min<int64_t>(threads, tasks)) - 1;
    if (helpers > 0 && pool->acquire()) {
        struct Release {
            Pool* const acquired = pool;
            ~Release() { acquired->release(); }
        } release;
        pool->run(loop, helpers, wake, poll);
    } else {
        loop.work(poll);
    }
    if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace fastmaf
