// See station.hpp; and which GPUs there are.
#include "station.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "../core/lazy.hpp"
#include "kernels.hpp"

#ifndef FASTMAF_CUDA_ARCHITECTURES
#define FASTMAF_CUDA_ARCHITECTURES "unknown"
#endif

namespace fastmaf {
namespace device {

namespace {

constexpr uint64_t kKept = uint64_t(256) << 20;  // bytes that the pool keeps between calls; those of larger flows outlast an allocation

std::mutex stations;
[[maybe_unused]] const bool fork_waits = fork_waits_for(stations);

// Errors that no later call of this process can leave behind.
bool is_lost(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorMisalignedAddress:
        case cudaErrorIllegalInstruction:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchFailure:
        case cudaErrorLaunchTimeout:
        case cudaErrorECCUncorrectable:
        case cudaErrorDevicesUnavailable:
        case cudaErrorContextIsDestroyed: return true;
        default: return false;
    }
}

}  // namespace

std::string size_of(double bytes) {
    const char* const units[] = {"B", "KiB", "MiB", "GiB"};
    int unit = 0;
    for (; bytes >= 1024 && unit < 3; ++unit) bytes /= 1024;
    char text[32];
    std::snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", bytes, units[unit]);
    return text;
}

void check(cudaError_t error, const std::string& attempt) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // forgets it, so that the next call does not meet it again
    std::string text = std::string(cudaGetErrorName(error)) + " while " + attempt + ": " + cudaGetErrorString(error);
    if (is_lost(error)) text += "; the device is lost to this process, which has to be started again";
    throw Error(text, error == cudaErrorMemoryAllocation);
}

[[noreturn]] void out_of_memory(int64_t bytes, const std::string& what) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    int device = 0;
    cudaGetDevice(&device);
    cudaMemGetInfo(&free, &total);
    throw Error("cuda:" + std::to_string(device) + " is out of memory: " + size_of(double(bytes)) + " were asked for " + what + ", " +
                    size_of(double(free)) + " of " + size_of(double(total)) + " are free",
                true);
}

Station::Station(int device) : device(device) {
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the multiprocessors");
    check(cudaDeviceGetAttribute(&cache, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "asking for the cache");
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for the shared memory");
    const cudaError_t found = cuda::find_tensor_cores(&tensor_cores);
    if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();
        throw Error("the kernels were compiled for " FASTMAF_CUDA_ARCHITECTURES ", not for cuda:" + std::to_string(device) +
                    ": install fastmaf anew where this GPU is in sight");
    }
    check(found, "looking for tensor cores");
    const char* const wanted = std::getenv("FASTMAF_TENSOR_CORES");
    always_tensor_cores = wanted && !std::strcmp(wanted, "always");
    if (wanted && *wanted && !always_tensor_cores && std::strcmp(wanted, "auto"))
        throw Error("FASTMAF_TENSOR_CORES is neither auto nor always");
    int pools = 0;
    check(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device), "asking for memory pools");
    if (!pools) return;
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    check(cudaMemPoolCreate(&pool, &properties), "making a memory pool on cuda:" + std::to_string(device));
    uint64_t kept = kKept;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "setting up a memory pool");
}

Station::~Station() {
    int before = 0;
    if (process != getpid() || cudaGetDevice(&before) != cudaSuccess) return;
    cudaSetDevice(device);
    spare.reset();
    if (pool) cudaMemPoolDestroy(pool);
    cudaSetDevice(before);
}

std::shared_ptr<Station> Station::of(int device) {
    const State found = state();
    if (!found.reason.empty()) throw Error(found.reason);
    if (device < 0 || device >= int(found.gpus.size()))
        throw Error("there is no cuda:" + std::to_string(device) + " here; GPUs: " + std::to_string(found.gpus.size()));
    const Current current(device);
    static std::map<int, std::weak_ptr<Station>>& all = *new std::map<int, std::weak_ptr<Station>>;
    std::lock_guard<std::mutex> lock(stations);
    std::shared_ptr<Station> station = all[device].lock();
    if (!station) all[device] = station = std::make_shared<Station>(device);
    return station;
}

State state() {
    State state;
    state.built = true;
    state.architectures = FASTMAF_CUDA_ARCHITECTURES;
    int runtime = 0, driver = 0, count = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    auto version = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
    state.versions = "CUDA " + version(runtime) + (driver ? ", driver for CUDA " + version(driver) : ", no driver");
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        state.reason = std::string("no GPU can be used: ") + cudaGetErrorString(error) + " (" + state.versions + ")";
        return state;
    }
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties{};
        if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
        const std::string architecture = std::to_string(properties.major) + std::to_string(properties.minor);
        state.gpus.push_back(std::string(properties.name) + " (sm_" + architecture + ", " + size_of(double(properties.totalGlobalMem)) +
                             ")");
    }
    if (state.gpus.empty()) state.reason = "no GPU can be used: none is visible (" + state.versions + ")";
    return state;
}

int device_of(uintptr_t address) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address)) != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
    return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged ? attributes.device : -1;
}

void synchronize(int device, uintptr_t stream) {
    const Current current(device);
    check(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(stream)), "waiting for a stream");
}

void copy_to_host(int device, uintptr_t from, void* to, int64_t bytes, uintptr_t stream) {
    const Current current(device);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (bytes)
        check(cudaMemcpyAsync(to, reinterpret_cast<const void*>(from), size_t(bytes), cudaMemcpyDeviceToHost, on),
              "copying rows to the host");
    check(cudaStreamSynchronize(on), "copying rows to the host");
}

void copy_from_host(int device, const void* from, uintptr_t to, int64_t bytes, uintptr_t stream) {
    const Current current(device);
    const cudaStream_t on = reinterpret_cast<cudaStream_t>(stream);
    if (bytes)
        check(cudaMemcpyAsync(reinterpret_cast<void*>(to), from, size_t(bytes), cudaMemcpyHostToDevice, on), "copying rows to the device");
    check(cudaStreamSynchronize(on), "copying rows to the device");
}

}  // namespace device
}  // namespace fastmaf
