// A GPU as the flows on it share it: its errors, streams, memory, and slots for what travels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include <unistd.h>

#include "../core/device.hpp"

namespace fastmaf {
namespace device {

std::string size_of(double bytes);

void check(cudaError_t error, const std::string& attempt);
[[noreturn]] void out_of_memory(int64_t bytes, const std::string& what);

// Makes a device current for the time of a scope.
class Current {
public:
    explicit Current(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        if (device != before_) check(cudaSetDevice(device), "turning to cuda:" + std::to_string(device));
        changed_ = device != before_;
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    ~Current() {
        if (changed_) cudaSetDevice(before_);
    }

private:
    int before_ = 0;
    bool changed_ = false;
};

class Stream {
public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(stream_); }
    operator cudaStream_t() const { return stream_; }

private:
    cudaStream_t stream_ = nullptr;
};

// Grow-only memory, of the device or pinned on the host.
class Buffer {
public:
    explicit Buffer(bool pinned, const char* what = "rows on their way") : pinned_(pinned), what_(what) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }
    char* data() const { return data_; }
    int64_t size() const { return size_; }
    // What was in it is lost where it grows, so nothing may be under way there.
    char* at_least(int64_t bytes) {
        if (bytes <= size_) return data_;
        release();
        void* p = nullptr;
        const cudaError_t error = pinned_ ? cudaHostAlloc(&p, size_t(bytes), cudaHostAllocDefault) : cudaMalloc(&p, size_t(bytes));
        if (error == cudaErrorMemoryAllocation && !pinned_) out_of_memory(bytes, what_);
        check(error, "allocating " + size_of(double(bytes)) + (pinned_ ? " of pinned memory" : ""));
        size_ = bytes;
        return data_ = static_cast<char*>(p);
    }

private:
    void release() {
        if (data_) pinned_ ? cudaFreeHost(data_) : cudaFree(data_);
        data_ = nullptr;
        size_ = 0;
    }
    bool pinned_;
    const char* what_;
    char* data_ = nullptr;
    int64_t size_ = 0;
};

struct Slot {
    Stream stream;
    Buffer host_in{true}, host_out{true}, in{false}, out{false};
};

// Through which arrays of the host are streamed: while one is computed, the other travels.
struct Slots {
    std::unique_ptr<Slot> of[2];
    Slot& at(int s) {
        if (!of[s]) of[s] = std::make_unique<Slot>();
        return *of[s];
    }
};

// What the flows of a device share: what launches need of it, and slots that were used before. It goes with the last of them.
struct Station {
    int device;
    const pid_t process = getpid();  // a child after fork has no CUDA
    int processors = 0, cache = 0, shared = 0;
    bool tensor_cores = false, always_tensor_cores = false;
    cudaMemPool_t pool = nullptr;  // null where the device has none
    std::mutex mutex;
    std::unique_ptr<Slots> spare;

    explicit Station(int device);
    Station(const Station&) = delete;
    Station& operator=(const Station&) = delete;
    ~Station();

    // Each call streams through slots of its own, so that it never waits for another one, which may have called it (from a signal handler).
    std::unique_ptr<Slots> take_slots() {
        std::lock_guard<std::mutex> lock(mutex);
        return spare ? std::move(spare) : std::make_unique<Slots>();
    }
    void give_back(std::unique_ptr<Slots> slots) {
        std::lock_guard<std::mutex> lock(mutex);
        if (!spare) spare.swap(slots);
    }

    cudaError_t allocate(void** memory, int64_t bytes, cudaStream_t stream) const {
        return pool ? cudaMallocFromPoolAsync(memory, size_t(bytes), pool, stream) : cudaMalloc(memory, size_t(bytes));
    }
    // Without a pool the stream is waited for.
    cudaError_t release(void* memory, cudaStream_t stream) const {
        if (pool) return cudaFreeAsync(memory, stream);
        const cudaError_t error = cudaStreamSynchronize(stream), freed = cudaFree(memory);
        return error == cudaSuccess ? freed : error;
    }

    static std::shared_ptr<Station> of(int device);
};

// Before anything is asked of the device.
inline void check_process(const Station& station) {
    if (station.process != getpid())
        throw Error("CUDA does not survive a fork: this process was forked after a flow was used on a GPU; spawn it instead");
}

// Memory of the device for the time of a scope, in the order of a stream.
class Lent {
public:
    Lent(const Station& station, cudaStream_t stream) : station_(station), stream_(stream) {}
    Lent(const Lent&) = delete;
    Lent& operator=(const Lent&) = delete;
    ~Lent() { static_cast<void>(release()); }
    // False if there is not so much; other errors are thrown.
    bool take(int64_t bytes, const char* what) {
        const cudaError_t error = station_.allocate(&memory_, bytes, stream_);
        if (error == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            return false;
        }
        check(error, "allocating " + size_of(double(bytes)) + " of " + what);
        return true;
    }
    char* at(int64_t byte) const { return static_cast<char*>(memory_) + byte; }
    cudaError_t release() {
        void* const memory = memory_;
        memory_ = nullptr;
        return memory ? station_.release(memory, stream_) : cudaSuccess;
    }

private:
    const Station& station_;
    const cudaStream_t stream_;
    void* memory_ = nullptr;
};

}  // namespace device
}  // namespace fastmaf
