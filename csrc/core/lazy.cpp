#include "lazy.hpp"

#include <vector>

#include <pthread.h>

namespace fastmaf {

namespace {

// What a fork locks, in this order.
std::vector<std::mutex*>& waited_for() {
    static std::vector<std::mutex*>& locks = *new std::vector<std::mutex*>{new std::mutex};
    return locks;
}

void lock_all() {
    for (std::mutex* lock : waited_for()) lock->lock();
}

void unlock_all() {
    for (std::mutex* lock : waited_for()) lock->unlock();
}

[[maybe_unused]] const int fork_waits = pthread_atfork(lock_all, unlock_all, unlock_all);

}  // namespace

std::mutex& making() {
    static std::mutex& mutex = *waited_for().front();
    return mutex;
}

bool fork_waits_for(std::mutex& last) {
    waited_for().push_back(&last);
    return true;
}

}  // namespace fastmaf
