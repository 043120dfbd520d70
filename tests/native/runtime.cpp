#include "runtime.hpp"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace fastmaf {

namespace {

std::recursive_mutex mutex;
std::map<cudaStream_t, std::vector<std::function<void()>>> queues;
struct Block {
    int device;
    size_t bytes;
};
std::map<const char*, Block> blocks;
int64_t limit = int64_t(1) << 40;
cudaError_t broken = cudaSuccess;
bool pools = true;
thread_local int current = 0;
using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t allocate(void** p, size_t bytes, int device) {
    const Lock lock(mutex);
    if (int64_t(bytes) > limit) return cudaErrorMemoryAllocation;
    *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*p, 0xFF, bytes);
    blocks[static_cast<char*>(*p)] = {device, bytes};
    return cudaSuccess;
}

cudaError_t release(void* p) {
    const Lock lock(mutex);
    blocks.erase(static_cast<char*>(p));
    std::free(p);
    return cudaSuccess;
}

cudaError_t drain(cudaStream_t stream) {
    const Lock lock(mutex);
    auto work = std::move(queues[stream]);
    queues[stream].clear();
    for (auto& each : work) each();
    const cudaError_t error = broken;
    broken = cudaSuccess;
    return error;
}

}  // namespace

void enqueue(cudaStream_t stream, std::function<void()> work) {
    const Lock lock(mutex);
    queues[stream].push_back(std::move(work));
}
int runtime_blocks() { return int(blocks.size()); }
void runtime_limit(int64_t bytes) { limit = bytes; }
void runtime_break(cudaError_t error) { broken = error; }
void runtime_pools(bool there) { pools = there; }

}  // namespace fastmaf

using namespace fastmaf;

extern "C" {
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheHost"; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the host's runtime"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    current = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 2;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    std::memset(properties, 0, sizeof *properties);
    std::strcpy(properties->name, "the host");
    properties->major = 9;
    properties->totalGlobalMem = size_t(1) << 30;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrMemoryPoolsSupported ? pools : 1 << 18;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = size_t(limit);
    *total = size_t(1) << 30;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    const Lock lock(mutex);
    std::vector<cudaStream_t> all;
    for (auto& queue : queues) all.push_back(queue.first);
    for (cudaStream_t stream : all) drain(stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    void* p = nullptr;
    allocate(&p, 1, current);
    *stream = static_cast<cudaStream_t>(p);
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    drain(stream);
    {
        const Lock lock(mutex);
        queues.erase(stream);
    }
    return release(stream);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return drain(stream); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, -1); }
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, current); }
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    if (!pools) return cudaErrorNotSupported;
    void* p = nullptr;
    allocate(&p, 1, current);
    *pool = static_cast<cudaMemPool_t>(p);
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) { return release(pool); }
cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) { return allocate(p, bytes, current); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
    enqueue(stream, [p] { release(p); });
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    enqueue(stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
    const Lock lock(mutex);
    std::memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    const char* const address = static_cast<const char*>(p);
    auto block = blocks.upper_bound(address);
    if (block == blocks.begin()) return cudaSuccess;
    --block;
    if (block->second.device < 0 || address >= block->first + block->second.bytes) return cudaSuccess;
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = block->second.device;
    return cudaSuccess;
}
}
