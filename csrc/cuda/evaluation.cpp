// Densities, noise and samples on a GPU: which kernels, in how many blocks.
#include "flow.hpp"

#include <algorithm>
#include <limits>

#include "../core/floats.hpp"

namespace fastmaf {
namespace device {

namespace {

// The widest tile that leaves no multiprocessor without one and fits in the cache with its neighbours.
template <class T>
int vectors_for(const Station& station, const FlowView<T>& flow, int64_t rows, int resident) {
    for (int vectors : {4, 2})
        if (flow.scratch * vectors / 4 * resident <= station.cache && rows >= int64_t(32) * vectors * station.processors) return vectors;
    return 1;
}

}  // namespace

template <class T>
void FlowState<T>::launch(cuda::Operation operation, Job<T> job, bool shared, cudaStream_t stream) {
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
    job.vectors = vectors_for(*station, flow, job.rows, resident);
    const int64_t rows = 32 * job.vectors, tiles = (job.rows + rows - 1) / rows;
    int64_t blocks = std::min({tiles, int64_t(resident) * station->processors, most});
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
            error = cuda::launch_fold<T>(flow, job, reinterpret_cast<T*>(behind), reinterpret_cast<T*>(behind + room), pointers, stream);
        job.folded = pointers;
    }
    if (error == cudaSuccess) error = cuda::launch<T>(operation, flow, job, int(blocks), stream);
    const cudaError_t freed = station->release(memory, stream);
    check(error, "launching a kernel");
    check(freed, "freeing scratch");
}

template <class T>
void FlowState<T>::stream_job(cuda::Operation operation, const Job<T>& job, bool shared, const Poll& poll) {
    const Plan& plan = weights->plan();
    auto numbers = [](const uint64_t* data) {
        Source source;
        source.rows = {reinterpret_cast<const char*>(data), DType::u64, 0, 8, 8};
        source.inner = std::numeric_limits<int64_t>::max();
        return source;
    };
    const std::vector<RowsIn> inputs = {{job.x, job.draws ? 0 : plan.features(), false},
                                        {job.context, plan.context(), shared},
                                        {numbers(job.index), job.index ? 1 : 0, false},
                                        {numbers(job.group), job.index ? 1 : 0, false}};
    const std::vector<RowsOut> outputs = {{reinterpret_cast<char*>(job.out), job.width * int64_t(sizeof(T))},
                                          {reinterpret_cast<char*>(job.other), job.width * int64_t(sizeof(Other<T>))},
                                          {reinterpret_cast<char*>(job.log_prob), int64_t(sizeof(T))}};
    stream_rows(*station, job.rows, inputs, outputs, kLanes, 2, poll,
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

template <class T>
void FlowState<T>::run(cuda::Operation operation, const Job<T>& job, int64_t outer, int64_t inner, const Place& place, const Poll& poll) {
    if (job.rows == 0) return;
    check_process(*station);
    const Current current(station->device);
    const PlainFloats floats;
    const bool shared = weights->plan().context() > 0 && shares_context(job.context.rows, outer, inner);
    if (place.on_device)
        launch(operation, job, shared, reinterpret_cast<cudaStream_t>(place.stream));
    else
        stream_job(operation, job, shared, poll);
}

#define FASTMAF_INSTANTIATE(T) template void FlowState<T>::run(cuda::Operation, const Job<T>&, int64_t, int64_t, const Place&, const Poll&);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace device
}  // namespace fastmaf
