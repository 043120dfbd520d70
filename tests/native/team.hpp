// The warps of a block as threads of the host.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fastmaf {

constexpr int kWarpsOfTheHost = 2;  // of a block, where the host stands in for a GPU

// Where the warps of a block meet.
class Meeting {
public:
    explicit Meeting(int count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++here_ == count_) {
            here_ = 0;
            ++round_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round_ != round; });
        }
    }

private:
    const int count_;
    int here_ = 0, round_ = 0;
    std::mutex mutex_;
    std::condition_variable all_;
};

struct Team {
    int rank, size;
    Meeting& meeting;
    bool mine(int i) const { return i % size == rank; }
    void sync() const { meeting.wait(); }
    int warps() const { return size; }
    int thread() const { return rank; }
    int threads() const { return size; }
};

template <class F>
void with_team(int count, F f) {
    Meeting meeting(count);
    std::vector<std::thread> others;
    for (int rank = 1; rank < count; ++rank) others.emplace_back([&, rank] { f(Team{rank, count, meeting}); });
    f(Team{0, count, meeting});
    for (auto& thread : others) thread.join();
}

}  // namespace fastmaf
