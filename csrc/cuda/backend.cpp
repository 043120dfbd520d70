// The host's side of a GPU: copies of flows, scratch, launches, and arrays of the host streamed through pinned buffers.
#include "../core/device.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include <unistd.h>

#include "../core/floats.hpp"
#include "../core/lazy.hpp"
#include "draw_image.hpp"
#include "gradient_image.hpp"
#include "kernels.hpp"

#ifndef FASTMAF_CUDA_CHUNK
#define FASTMAF_CUDA_CHUNK (int64_t(16) << 20)
#endif
#ifndef FASTMAF_CUDA_ARCHITECTURES
#define FASTMAF_CUDA_ARCHITECTURES "unknown"
#endif

namespace fastmaf {
namespace device {

namespace {

constexpr int kLanes = 128;                      // of the widest tile: four vectors
constexpr int64_t kScratch = int64_t(1) << 30;   // at most, for the blocks of a launch
constexpr int64_t kChunk = FASTMAF_CUDA_CHUNK;   // bytes of a host array that travel together
constexpr uint64_t kKept = uint64_t(256) << 20;  // bytes that the pool keeps between calls; those of larger flows outlast an allocation

std::string size_of(double bytes) {
    const char* const units[] = {"B", "KiB", "MiB", "GiB"};
    int unit = 0;
    for (; bytes >= 1024 && unit < 3; ++unit) bytes /= 1024;
    char text[32];
    std::snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", bytes, units[unit]);
    return text;
}

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
    explicit Buffer(bool pinned) : pinned_(pinned) {}
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { release(); }
    char* at_least(int64_t bytes) {
        if (bytes <= size_) return data_;
        release();
        void* p = nullptr;
        const cudaError_t error = pinned_ ? cudaHostAlloc(&p, size_t(bytes), cudaHostAllocDefault) : cudaMalloc(&p, size_t(bytes));
        if (error == cudaErrorMemoryAllocation && !pinned_) out_of_memory(bytes, "rows on their way");
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

std::mutex stations;
[[maybe_unused]] const bool fork_waits = fork_waits_for(stations);

// What the flows of a device share: what launches need of it, and slots that were used before. It goes with the last of them.
struct Station {
    int device;
    const pid_t process = getpid();  // a child after fork has no CUDA
    int processors = 0, cache = 0, shared = 0;
    bool tensor_cores = false;
    cudaMemPool_t pool = nullptr;  // null where the device has none
    std::mutex mutex;
    std::unique_ptr<Slots> spare;

    explicit Station(int device) : device(device) {
        check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the multiprocessors");
        check(cudaDeviceGetAttribute(&cache, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "asking for the cache");
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for the shared memory");
        tensor_cores = cuda::has_tensor_cores();
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
    Station(const Station&) = delete;
    Station& operator=(const Station&) = delete;
    ~Station() {
        int before = 0;
        if (process != getpid() || cudaGetDevice(&before) != cudaSuccess) return;
        cudaSetDevice(device);
        spare.reset();
        if (pool) cudaMemPoolDestroy(pool);
        cudaSetDevice(before);
    }

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

    static std::shared_ptr<Station> of(int device) {
        static std::map<int, std::weak_ptr<Station>>& all = *new std::map<int, std::weak_ptr<Station>>;
        std::lock_guard<std::mutex> lock(stations);
        std::shared_ptr<Station> station = all[device].lock();
        if (!station) all[device] = station = std::make_shared<Station>(device);
        return station;
    }
};

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

int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64:
        case DType::u64: return 8;
        case DType::f32:
        case DType::i32:
        case DType::u32: return 4;
        case DType::f16:
        case DType::i16:
        case DType::u16: return 2;
        default: return 1;
    }
}

template <class T>
Job<T> job_of(const Batch& batch) {
    Job<T> job;
    job.rows = batch.rows();
    job.x = {batch.x, batch.inner};
    job.context = {batch.context, batch.inner};
    return job;
}

template <class T>
void aim(Job<T>& job, const Samples& out) {
    if constexpr (std::is_same_v<T, float>) {
        job.out = out.single;
        job.other = out.wide;
    } else {
        job.out = out.wide;
        job.other = out.single;
    }
}

// Rows [begin, begin + count) of a host array, one behind the other.
void gather_rows(const Source& source, int64_t begin, int64_t count, int width, char* out) {
    const Rows& rows = source.rows;
    const int64_t element = size_of(rows.dtype), row = width * element;
    for (int64_t r = begin, end = begin + count; r < end;) {
        const char* p = rows.data + r / source.inner * rows.outer + r % source.inner * rows.inner;
        const int64_t run = rows.column == element && rows.inner == row ? std::min(end - r, source.inner - r % source.inner) : 1;
        if (rows.column == element)
            std::memcpy(out, p, size_t(run * row));
        else
            for (int c = 0; c < width; ++c) std::memcpy(out + c * element, p + c * rows.column, size_t(element));
        out += run * row;
        r += run;
    }
}

}  // namespace

template <class T>
struct Flow<T>::Parts {
    struct Copy {
        FlowView<T> view;
        TensorView tensor;
        DrawView draws;
    };

    std::shared_ptr<const Weights<T>> weights;
    std::shared_ptr<Station> station;
    Precision precision = Precision::highest;
    std::mutex mutex;
    std::unique_ptr<Copy> copies[2];
    std::unique_ptr<GradientView<T>> gradients;
    std::unique_ptr<WeightsView<T>> tasks;
    std::vector<void*> placed;  // where they lie

    ~Parts() {
        int before = 0;
        if (!station || station->process != getpid() || cudaGetDevice(&before) != cudaSuccess) return;
        cudaSetDevice(station->device);
        cudaDeviceSynchronize();  // a caller's stream may still read the copies
        for (void* memory : placed) cudaFree(memory);
        cudaSetDevice(before);
    }

    // What fill(image) lays out, where it will lie; it gets there before this returns.
    template <class Fill>
    void put(Fill fill) {
        Image measure;
        fill(measure);
        const int64_t bytes = int64_t(measure.bytes().size());
        void* memory = nullptr;
        const cudaError_t error = cudaMalloc(&memory, size_t(bytes));
        if (error == cudaErrorMemoryAllocation) out_of_memory(bytes, "the weights of a flow");
        check(error, "allocating " + size_of(double(bytes)) + " for the weights of a flow");
        try {
            Image image(static_cast<char*>(memory));
            fill(image);
            const Stream stream;
            const char* const attempt = "copying the weights of a flow";
            check(cudaMemcpyAsync(memory, image.bytes().data(), size_t(bytes), cudaMemcpyHostToDevice, stream), attempt);
            check(cudaStreamSynchronize(stream), attempt);
            placed.push_back(memory);
        } catch (...) {
            cudaFree(memory);
            throw;
        }
    }

    const Copy& copy_for(Direction direction) {
        std::lock_guard<std::mutex> lock(mutex);
        std::unique_ptr<Copy>& copy = copies[direction == Direction::sampler];
        if (copy) return *copy;
        TensorShape shape;
        DrawView draws;
        if constexpr (std::is_same_v<T, float>)
            if (station->tensor_cores) {
                if (direction == Direction::density)
                    shape = fit_tensor_cores(*weights, precision, cuda::tensor_warps(), station->shared);
                else
                    draws = fit_draws(*weights, precision, cuda::tensor_warps(), station->shared);
            }
        auto made = std::make_unique<Copy>();
        put([&](Image& image) {
            made->view = lay_out(image, *weights, direction, kLanes);
            if constexpr (std::is_same_v<T, float>) {
                if (shape.rows) made->tensor = lay_out_tensor(image, *weights, shape);
                if (draws.groups) made->draws = lay_out_draws(image, *weights, draws.parts, draws.groups);
            }
        });
        copy = std::move(made);
        return *copy;
    }

    const GradientView<T>& gradient_view() {
        const FlowView<T>& flow = copy_for(Direction::density).view;
        std::lock_guard<std::mutex> lock(mutex);
        if (gradients) return *gradients;
        auto made = std::make_unique<GradientView<T>>();
        put([&](Image& image) { *made = lay_out_gradients(image, *weights, flow, kLanes); });
        gradients = std::move(made);
        return *gradients;
    }

    const WeightsView<T>& weights_view() {
        std::lock_guard<std::mutex> lock(mutex);
        if (tasks) return *tasks;
        auto made = std::make_unique<WeightsView<T>>();
        put([&](Image& image) { *made = lay_out_weights(image, *weights); });
        tasks = std::move(made);
        return *tasks;
    }

    // The widest tile that leaves no multiprocessor without one and fits in the cache with its neighbours.
    int vectors_for(const FlowView<T>& flow, int64_t rows, int resident) const {
        for (int vectors : {4, 2})
            if (flow.scratch * vectors / 4 * resident <= station->cache && rows >= int64_t(32) * vectors * station->processors)
                return vectors;
        return 1;
    }

    void launch(cuda::Operation operation, Job<T> job, bool shared, cudaStream_t stream) {
        const Copy& copy = copy_for(operation == cuda::Operation::evaluate ? Direction::density : Direction::sampler);
        const FlowView<T>& flow = copy.view;
        // With tensor cores there are two kernels: what halves cannot hold is left to the other one.
        const bool evaluates = operation == cuda::Operation::evaluate;
        DrawView draws = copy.draws;
        if (draws.groups) {  // no more of them than it takes to have all rows in one wave of blocks
            const int64_t groups = (job.rows + 15) / 16;
            draws.groups = int(std::clamp<int64_t>((groups + station->processors - 1) / station->processors, 1, draws.groups));
        }
        const int halves = evaluates ? (job.most ? 0 : copy.tensor.shape.rows) : 16 * draws.groups;  // rows of a tile
        const int64_t most = std::max<int64_t>(1, kScratch / flow.scratch);
        int64_t tensor_blocks = 1;
        if (halves) {
            int resident = 0;
            check(evaluates ? cuda::resident_tensor_blocks(copy.tensor, station->shared, &resident)
                            : cuda::resident_draw_blocks(draws, station->shared, &resident),
                  "preparing a kernel");
            tensor_blocks = std::min({(job.rows + halves - 1) / halves, int64_t(std::max(1, resident)) * station->processors, most});
        }
        int resident = 0;
        check(cuda::resident_blocks<T>(operation, &resident), "preparing a kernel");
        resident = std::max(1, resident);
        job.vectors = vectors_for(flow, job.rows, resident);
        const int64_t rows = 32 * job.vectors, tiles = (job.rows + rows - 1) / rows;
        int64_t blocks = std::min({tiles, int64_t(resident) * station->processors, most});
        auto padded = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
        const int64_t room = shared ? padded(int64_t(flow.stage_count) * flow.context * 32 * int64_t(sizeof(T))) : 0;
        const int64_t folded = shared ? padded(flow.folded_size * int64_t(sizeof(T))) : 0;
        const int64_t table = shared ? padded(flow.stage_count * int64_t(sizeof(T*))) : 0;

        void* memory = nullptr;
        for (;; blocks = std::max<int64_t>(1, blocks / 2), tensor_blocks = std::max<int64_t>(1, tensor_blocks / 2)) {
            const int64_t bytes = std::max(blocks, tensor_blocks) * flow.scratch + room + folded + table;
            const cudaError_t error = station->allocate(&memory, bytes, stream);
            if (error == cudaSuccess) break;
            if (error != cudaErrorMemoryAllocation) check(error, "allocating " + size_of(double(bytes)) + " of scratch");
            if (blocks == 1 && tensor_blocks == 1) out_of_memory(bytes, "the scratch of one block");
            cudaGetLastError();
        }
        job.scratch = static_cast<char*>(memory);
        cudaError_t error = cudaSuccess;
        if constexpr (std::is_same_v<T, float>)
            if (halves) {
                Job<T> first = job;
                first.vectors = (halves + 31) / 32;
                error = evaluates ? cuda::launch_tensor(flow, copy.tensor, first, int(tensor_blocks), stream)
                                  : cuda::launch_draws(flow, draws, first, int(tensor_blocks), stream);
                job.fills = true;
            }
        if (error == cudaSuccess && shared && flow.stage_count) {
            char* const behind = job.scratch + std::max(blocks, tensor_blocks) * flow.scratch;
            const T** const pointers = reinterpret_cast<const T**>(behind + room + folded);
            error = cudaMemsetAsync(behind + room, 0, size_t(folded), stream);  // panels also read the padding behind the biases
            if (error == cudaSuccess)
                error =
                    cuda::launch_fold<T>(flow, job, reinterpret_cast<T*>(behind), reinterpret_cast<T*>(behind + room), pointers, stream);
            job.folded = pointers;
        }
        if (error == cudaSuccess) error = cuda::launch<T>(operation, flow, job, int(blocks), stream);
        const cudaError_t freed = station->release(memory, stream);
        check(error, "launching a kernel");
        check(freed, "freeing scratch");
    }

    // Rows of the host on their way in: `width` numbers each, or one row for all; and on their way out, so many bytes each.
    struct Input {
        Source source;
        int width;
        bool once;
        int64_t row() const { return width * size_of(source.rows.dtype); }
    };
    struct Output {
        char* rows;  // null: none are wanted
        int64_t row;
    };
    static constexpr int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

    // Rows of the host, in chunks of a multiple of `together`: while one is computed, its neighbours travel; or one after the other,
    // `slots_used` being 1. launch(inputs, outputs, begin, count, stream) gets them where they are on the device.
    template <class Launch>
    void stream_rows(int64_t rows, const std::vector<Input>& inputs, const std::vector<Output>& outputs, int64_t together, int slots_used,
                     const Poll& poll, Launch launch) {
        int64_t row = 0;
        for (const Input& input : inputs) row += input.once ? 0 : input.row();
        for (const Output& output : outputs) row += output.rows ? output.row : 0;
        const int64_t chunk = std::min(rows, std::max<int64_t>(together, kChunk / std::max<int64_t>(1, row) / together * together));
        std::vector<int64_t> of_input, of_output;
        int64_t in_size = 0, out_size = 0;
        for (const Input& input : inputs) {
            of_input.push_back(in_size);
            in_size += padded((input.once ? 1 : chunk) * input.row());
        }
        for (const Output& output : outputs) {
            of_output.push_back(out_size);
            out_size += output.rows ? padded(chunk * output.row) : 0;
        }

        struct Settled {  // nothing is under way when a call ends, however it ends
            Station& station;
            std::unique_ptr<Slots> slots;
            ~Settled() {
                for (auto& slot : slots->of)
                    if (slot) cudaStreamSynchronize(slot->stream);
                station.give_back(std::move(slots));
            }
        } settled{*station, station->take_slots()};
        Slots& slots = *settled.slots;
        int64_t waiting[2] = {-1, -1};
        auto collect = [&](int s) {
            if (waiting[s] < 0) return;
            Slot& slot = slots.at(s);
            check(cudaStreamSynchronize(slot.stream), "computing rows " + std::to_string(waiting[s]) + " and on");
            const int64_t count = std::min(chunk, rows - waiting[s]);
            const char* const results = slot.host_out.at_least(out_size);
            for (size_t i = 0; i < outputs.size(); ++i)
                if (outputs[i].rows)
                    std::memcpy(outputs[i].rows + waiting[s] * outputs[i].row, results + of_output[i], size_t(count * outputs[i].row));
            waiting[s] = -1;
        };
        int s = 0;
        for (int64_t begin = 0; begin < rows; begin += chunk, s = (s + 1) % slots_used) {
            if (poll) poll();
            Slot& slot = slots.at(s);
            collect(s);
            const int64_t count = std::min(chunk, rows - begin);
            char *const host = slot.host_in.at_least(in_size), *const in = slot.in.at_least(in_size);
            char *const results = slot.host_out.at_least(out_size), *const out = slot.out.at_least(out_size);
            auto travel = [&](char* to, const char* from, int64_t bytes, cudaMemcpyKind kind) {
                if (bytes) check(cudaMemcpyAsync(to, from, size_t(bytes), kind, slot.stream), "copying rows to the device or from it");
            };
            std::vector<Source> there;
            for (size_t i = 0; i < inputs.size(); ++i) {
                const Input& input = inputs[i];
                const int64_t here = input.once ? 1 : count;
                Source moved = input.source;
                moved.rows.column = size_of(moved.rows.dtype);
                moved.rows.inner = input.once ? 0 : input.row();
                moved.rows.outer = 0;
                moved.inner = count;
                if (moved.rows.data) {
                    gather_rows(input.source, input.once ? 0 : begin, here, input.width, host + of_input[i]);
                    travel(in + of_input[i], host + of_input[i], here * input.row(), cudaMemcpyHostToDevice);
                    moved.rows.data = in + of_input[i];
                }
                there.push_back(moved);
            }
            std::vector<char*> back;
            for (size_t i = 0; i < outputs.size(); ++i) back.push_back(outputs[i].rows ? out + of_output[i] : nullptr);
            launch(there, back, begin, count, cudaStream_t(slot.stream));
            for (size_t i = 0; i < outputs.size(); ++i)
                if (back[i]) travel(results + of_output[i], back[i], count * outputs[i].row, cudaMemcpyDeviceToHost);
            waiting[s] = begin;
        }
        collect(s);
        collect(1 - s);
    }

    // An evaluation of arrays of the host, which `job` holds.
    void stream_job(cuda::Operation operation, const Job<T>& job, bool shared, const Poll& poll) {
        const Plan& plan = weights->plan();
        auto numbers = [](const uint64_t* data) {
            Source source;
            source.rows = {reinterpret_cast<const char*>(data), DType::u64, 0, 8, 8};
            source.inner = std::numeric_limits<int64_t>::max();
            return source;
        };
        const std::vector<Input> inputs = {{job.x, job.draws ? 0 : plan.features(), false},
                                           {job.context, plan.context(), shared},
                                           {numbers(job.index), job.index ? 1 : 0, false},
                                           {numbers(job.group), job.index ? 1 : 0, false}};
        const std::vector<Output> outputs = {{reinterpret_cast<char*>(job.out), job.width * int64_t(sizeof(T))},
                                             {reinterpret_cast<char*>(job.other), job.width * int64_t(sizeof(Other<T>))},
                                             {reinterpret_cast<char*>(job.log_prob), int64_t(sizeof(T))}};
        stream_rows(job.rows, inputs, outputs, kLanes, 2, poll,
                    [&](const std::vector<Source>& in, const std::vector<char*>& out, int64_t begin, int64_t count, cudaStream_t stream) {
                        Job<T> part = job;
                        part.rows = count;
                        part.begin = uint64_t(begin);
                        part.x = in[0];
                        part.context = in[1];
                        part.index = reinterpret_cast<const uint64_t*>(in[2].rows.data);
                        part.group = reinterpret_cast<const uint64_t*>(in[3].rows.data);
                        part.out = reinterpret_cast<T*>(out[0]);
                        part.other = reinterpret_cast<Other<T>*>(out[1]);
                        part.log_prob = reinterpret_cast<T*>(out[2]);
                        launch(operation, part, shared, stream);
                    });
    }

    // Gradients of arrays of the device. Parts of the rows follow each other where sums need what they leave: those of weights, into `sums`
    // [master and one more], which go on unless they begin here, and those over rows that share a row or a context.
    void launch_gradients(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, double* sums, bool begins,
                          cudaStream_t stream) {
        const GradientView<T>& view = gradient_view();
        const WeightsView<T>* const of_weights = sums ? &weights_view() : nullptr;
        const int64_t outer = batch.outer, inner = batch.inner, all = outer * inner, master = sums ? of_weights->size + 1 : 0;
        struct Part {
            T* out;
            Summed summed;
            int64_t width, rows, slices, each;  // rows, slices, each: where in the memory; `each`: the gradients by row
        } parts[2] = {{out.x, out.of_x, view.flow.features, 0, 0, 0}, {out.context, out.of_context, view.flow.context, 0, 0, 0}};
        auto own_rows = [&](const Part& part) { return (part.summed.outer ? 1 : outer) * (part.summed.inner ? 1 : inner); };
        const int vectors = all >= int64_t(128) * station->processors ? 4 : all >= int64_t(64) * station->processors ? 2 : 1;
        const int64_t width = 32 * vectors;
        int64_t per_row = sums ? view.scratch / width + master * int64_t(sizeof(T)) / kGroup + 1 : 0;
        for (Part& part : parts) {
            if (!part.out) part.summed = {};
            if (part.summed.outer || part.summed.inner) per_row += part.width * int64_t(sizeof(T) + sizeof(double));
        }
        int resident = 0;
        check(cuda::resident_gradient_blocks<T>(&resident), "preparing a kernel");
        const int64_t at_once = int64_t(std::max(1, resident)) * station->processors;
        int64_t most_blocks = std::min(at_once, std::max<int64_t>(1, kScratch / view.scratch));
        int64_t most = per_row ? std::max<int64_t>(kGroup, std::min(all, kScratch / per_row)) : all;

        constexpr int64_t slice = 256;
        Lent memory(*station, stream);
        int64_t groups_of_rows = 0, length = 0, blocks = 0, partial = 0, of_weights_size = 0;
        for (;; most = std::max<int64_t>(kGroup, most / 2), most_blocks = std::max<int64_t>(1, most_blocks / 2)) {
            // As many groups of inner rows as may go together, or a part of one.
            groups_of_rows = inner <= most ? std::min(outer, most / inner) : 1;
            length = inner <= most ? inner : most / kGroup * kGroup;
            const int64_t rows = groups_of_rows * length, tiles = (rows + width - 1) / width;
            blocks = std::min(tiles, most_blocks);
            Room room;
            room.take((sums ? tiles : blocks) * view.scratch);
            of_weights_size = (rows + kGroup - 1) / kGroup * master * int64_t(sizeof(T));
            partial = room.take(of_weights_size);
            for (Part& part : parts) {
                if (!part.summed.outer && !part.summed.inner) continue;
                part.each = room.take(rows * part.width * int64_t(sizeof(T)));
                part.slices = room.take((rows / slice + std::max(groups_of_rows, length)) * part.width * int64_t(sizeof(double)));
                part.rows = room.take(own_rows(part) * part.width * int64_t(sizeof(double)));
            }
            if (memory.take(room.size(), "scratch")) break;
            if ((!per_row || most <= kGroup) && most_blocks <= 1) out_of_memory(room.size(), "the scratch of gradients");
        }
        auto real = [&](int64_t byte) { return reinterpret_cast<T*>(memory.at(byte)); };
        auto wide = [&](int64_t byte) { return reinterpret_cast<double*>(memory.at(byte)); };
        cudaError_t error = cudaSuccess;
        auto then = [&](auto call) {
            if (error == cudaSuccess) error = call();
        };
        // No task writes units that nobody reads.
        if (sums) then([&] { return cudaMemsetAsync(real(partial), 0, size_t(of_weights_size), stream); });
        for (const Part& part : parts) {
            if (!part.summed.outer && !part.summed.inner) continue;
            const size_t bytes = size_t(own_rows(part) * part.width) * sizeof(double);
            then([&] { return cudaMemsetAsync(wide(part.rows), 0, bytes, stream); });
        }
        for (int64_t i = 0; i < inner; i += length)
            for (int64_t o = 0; o < outer; o += groups_of_rows) {
                const int64_t count = std::min(groups_of_rows, outer - o), here = std::min(length, inner - i), rows = count * here;
                auto moved = [&](const Rows& given) {
                    Source source{given, here};
                    if (given.data) source.rows.data += o * given.outer + i * given.inner;
                    return source;
                };
                GradientJob<T> job;
                job.rows.rows = rows;
                job.rows.vectors = vectors;
                job.rows.x = moved(batch.x);
                job.rows.context = moved(batch.context);
                job.rows.scratch = memory.at(0);
                job.rows.log_prob = out.value ? out.value + o * inner + i : nullptr;
                job.cotangent = moved(cotangent);
                job.keeps = sums != nullptr;
                auto target = [&](const Part& part) {
                    if (part.summed.outer || part.summed.inner) return real(part.each);
                    return part.out ? part.out + (o * inner + i) * part.width : nullptr;
                };
                job.d_x = target(parts[0]);
                job.d_context = target(parts[1]);
                then([&] { return cuda::launch_gradient<T>(view, job, int(std::min(blocks, (rows + width - 1) / width)), stream); });
                for (const Part& part : parts) {
                    if (!part.summed.outer && !part.summed.inner) continue;
                    const bool both = part.summed.outer && part.summed.inner;
                    const int64_t a = both || part.summed.outer ? 1 : count, b = both ? rows : part.summed.outer ? count : here;
                    const int64_t c = part.width * (part.summed.inner ? 1 : here), slices = (b + slice - 1) / slice;
                    double* const total = wide(part.rows) + part.width * (both ? 0 : part.summed.outer ? i : o);
                    then([&] { return cuda::launch_sum<T>({real(part.each), wide(part.slices), a, b, c, slice, false}, stream); });
                    then([&] { return cuda::launch_sum<double>({wide(part.slices), total, a, slices, c, slices, true}, stream); });
                }
                if (!sums) continue;
                const int64_t groups = (rows + kGroup - 1) / kGroup;
                then([&] { return cuda::launch_weights<T>(view, *of_weights, memory.at(0), rows, vectors, real(partial), stream); });
                then([&] { return cuda::launch_sum<T>({real(partial), sums, 1, groups, master, groups, !begins || i + o > 0}, stream); });
            }
        for (const Part& part : parts) {
            if (!part.summed.outer && !part.summed.inner) continue;
            then([&] { return cuda::launch_narrow<T>(wide(part.rows), part.out, own_rows(part) * part.width, stream); });
        }
        check(error, "launching a kernel");
        check(memory.release(), "freeing scratch");
    }

    // What rows without any, or sums over them, have: zeros.
    void no_gradients(const Batch& batch, const Gradients<T>& out, const Place& place) const {
        const Plan& plan = weights->plan();
        auto zero = [&](T* values, int64_t count) {
            if (!values || count == 0) return;
            if (place.on_device)
                check(cudaMemsetAsync(values, 0, size_t(count) * sizeof(T), reinterpret_cast<cudaStream_t>(place.stream)),
                      "setting gradients to zero");
            else
                std::fill_n(values, count, T(0));
        };
        auto own = [&](const Summed& summed) { return (summed.outer ? 1 : batch.outer) * (summed.inner ? 1 : batch.inner); };
        zero(out.x, own(out.of_x) * plan.features());
        zero(out.context, own(out.of_context) * plan.context());
        zero(out.parameters, plan.parameter_count());
    }

    void differentiate(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll) {
        check_process();
        const Current current(station->device);
        const PlainFloats floats;
        const int64_t rows = batch.rows(), parameters = weights->plan().parameter_count();
        if (rows == 0) return no_gradients(batch, out, place);
        auto finish = [&](const double* sums, T* to, cudaStream_t stream) {
            check(cudaMemsetAsync(to, 0, size_t(parameters) * sizeof(T), stream), "setting gradients to zero");
            check(cuda::launch_parameters<T>(weights_view(), sums, to, stream), "launching a kernel");
        };
        auto sums_of = [&](Lent& memory, bool outside) {
            if (!out.parameters || parameters == 0) return static_cast<double*>(nullptr);
            const int64_t bytes = padded((weights_view().size + 1) * int64_t(sizeof(double)));
            const int64_t all = bytes + (outside ? 0 : parameters * int64_t(sizeof(T)));
            if (!memory.take(all, "sums")) out_of_memory(all, "the sums of gradients");
            return reinterpret_cast<double*>(memory.at(0));
        };
        if (place.on_device) {
            const cudaStream_t stream = reinterpret_cast<cudaStream_t>(place.stream);
            Lent memory(*station, stream);
            double* const sums = sums_of(memory, true);
            launch_gradients(batch, cotangent, out, sums, true, stream);
            if (sums) finish(sums, out.parameters, stream);
            return check(memory.release(), "freeing scratch");
        }
        const Plan& plan = weights->plan();
        const bool shared = plan.context() > 0 && shares_context(batch.context, batch.outer, batch.inner);
        const std::vector<Input> inputs = {{{batch.x, batch.inner}, plan.features(), false},
                                           {{batch.context, batch.inner}, plan.context(), shared},
                                           {{cotangent, batch.inner}, cotangent.data ? 1 : 0, false}};
        const std::vector<Output> outputs = {{reinterpret_cast<char*>(out.value), int64_t(sizeof(T))},
                                             {reinterpret_cast<char*>(out.x), plan.features() * int64_t(sizeof(T))},
                                             {reinterpret_cast<char*>(out.context), plan.context() * int64_t(sizeof(T))}};
        const Stream own;
        Lent memory(*station, own);
        double* const sums = sums_of(memory, false);
        check(cudaStreamSynchronize(own), "allocating memory");
        T* const results = sums ? reinterpret_cast<T*>(memory.at(padded((weights_view().size + 1) * int64_t(sizeof(double))))) : nullptr;
        stream_rows(rows, inputs, outputs, kGroup, sums ? 1 : 2, poll,
                    [&](const std::vector<Source>& in, const std::vector<char*>& back, int64_t begin, int64_t count, cudaStream_t stream) {
                        Batch part;
                        part.inner = count;
                        part.x = in[0].rows;
                        part.context = in[1].rows;
                        Gradients<T> own_part;
                        own_part.value = reinterpret_cast<T*>(back[0]);
                        own_part.x = reinterpret_cast<T*>(back[1]);
                        own_part.context = reinterpret_cast<T*>(back[2]);
                        launch_gradients(part, in[2].rows, own_part, sums, begin == 0, stream);
                        if (!sums || begin + count < rows) return;
                        finish(sums, results, stream);
                        check(cudaMemcpyAsync(out.parameters, results, size_t(parameters) * sizeof(T), cudaMemcpyDeviceToHost, stream),
                              "copying gradients from the device");
                    });
    }

    // Before anything is asked of the device.
    void check_process() const {
        if (station->process != getpid())
            throw Error("CUDA does not survive a fork: this process was forked after a flow was used on a GPU; spawn it instead");
    }

    void run(cuda::Operation operation, const Job<T>& job, int64_t outer, int64_t inner, const Place& place, const Poll& poll) {
        if (job.rows == 0) return;
        check_process();
        const Current current(station->device);
        const PlainFloats floats;
        const bool shared = weights->plan().context() > 0 && shares_context(job.context.rows, outer, inner);
        if (place.on_device)
            launch(operation, job, shared, reinterpret_cast<cudaStream_t>(place.stream));
        else
            stream_job(operation, job, shared, poll);
    }
};

template <class T>
Flow<T>::Flow(std::shared_ptr<const Weights<T>> weights, int device, Precision precision) : parts_(std::make_unique<Parts>()) {
    const State found = state();
    if (!found.reason.empty()) throw Error(found.reason);
    if (device < 0 || device >= int(found.gpus.size()))
        throw Error("there is no cuda:" + std::to_string(device) + " here; GPUs: " + std::to_string(found.gpus.size()));
    const Current current(device);
    parts_->weights = std::move(weights);
    parts_->precision = precision;
    parts_->station = Station::of(device);
}

template <class T>
Flow<T>::~Flow() = default;

template <class T>
const Weights<T>& Flow<T>::weights() const {
    return *parts_->weights;
}

template <class T>
void Flow<T>::log_prob(const Batch& batch, T* out, const Place& place, const Poll& poll) const {
    Job<T> job = job_of<T>(batch);
    job.log_prob = out;
    parts_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::to_noise(const Batch& batch, T* out, const Place& place, const Poll& poll, T* log_det) const {
    Job<T> job = job_of<T>(batch);
    job.out = out;
    job.log_prob = log_det;
    job.map = log_det != nullptr;
    job.width = weights().plan().features();
    parts_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::conditional_probs(const Batch& batch, T* out, const Place& place, const Poll& poll) const {
    Job<T> job = job_of<T>(batch);
    job.out = out;
    job.most = weights().plan().most_values();
    job.width = weights().plan().features() * job.most;
    parts_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::from_noise(const Batch& noise, const Samples& out, const Place& place, const Poll& poll, T* log_det) const {
    Job<T> job = job_of<T>(noise);
    aim(job, out);
    job.log_prob = log_det;
    job.map = log_det != nullptr;
    job.width = weights().plan().features();
    parts_->run(cuda::Operation::generate, job, noise.outer, noise.inner, place, poll);
}

template <class T>
void Flow<T>::sample(const Draw& draw, const Samples& out, T* log_prob, const Place& place, const Poll& poll) const {
    Job<T> job;
    job.rows = draw.contexts * draw.rows;
    job.context = {draw.context, draw.rows};
    aim(job, out);
    job.width = weights().plan().features();
    job.log_prob = log_prob;
    job.draws = true;
    job.seed = draw.seed;
    job.offset = draw.offset;
    job.context_offset = draw.context_offset;
    job.inner = uint64_t(draw.rows);
    job.index = draw.index;
    job.group = draw.group;
    parts_->run(cuda::Operation::generate, job, draw.contexts, draw.rows, place, poll);
}

template <class T>
void Flow<T>::vjp(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll) const {
    parts_->differentiate(batch, cotangent, out, place, poll);
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

template class Flow<float>;
template class Flow<double>;

}  // namespace device
}  // namespace fastmaf
