#include "warp.hpp"

#include <algorithm>
#include <vector>

#include "core/aligned.hpp"
#include "cuda/image.hpp"
#include "team.hpp"

#define FASTMAF_ISA warp
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#include "cuda/evaluate.inl.hpp"

namespace fastmaf {

namespace {

// A launch with one block.
template <class T, class F>
void run(const Weights<T>& packed, Direction direction, const Batch& batch, const Warps& warps, Job<T> job, F f) {
    FlowView<T> flow;
    PlacedWeights<T> stages;
    const AlignedVector<char> memory = placed([&](Image& image) { flow = lay_out(image, packed, direction, warp::lanes_of<T>(), stages); });
    AlignedVector<char> scratch(size_t(flow.scratch), char(0xFF));

    job.rows = batch.rows();
    job.vectors = warps.vectors;
    job.context = {batch.context, batch.inner};
    AlignedVector<T> room, folded;
    std::vector<const T*> table;
    if (flow.context && shares_context(batch.context, batch.outer, batch.inner)) {
        room.resize(size_t(flow.context) * 32);
        folded.resize(size_t(flow.folded_size));
        for (int k = 0; k < flow.stage_count; ++k) {
            table.push_back(folded.data() + flow.folded[k]);
            T* const own = folded.data() + flow.folded[k];
            with_team(warps.count, [&](const Team& team) { warp::fold<T>(flow, job, k, room.data(), own, team); });
        }
        job.folded = table.data();
    }
    with_team(warps.count, [&](const Team& team) {
        for (int64_t begin = 0; begin < job.rows; begin += 32 * job.vectors) f(flow, job, begin, scratch.data(), team);
    });
}

}  // namespace

template <class T>
void warp_evaluate(const Weights<T>& packed, const Batch& batch, const Warps& warps, T* log_prob, T* noise) {
    Job<T> job;
    job.x = {batch.x, batch.inner};
    job.log_prob = log_prob;
    job.out = noise;
    job.width = packed.plan().features();
    job.fills = warps.fills;
    run(packed, Direction::density, batch, warps, job, [](const auto&... all) { warp::evaluate<T>(all...); });
}

template <class T>
void warp_probabilities(const Weights<T>& packed, const Batch& batch, const Warps& warps, T* out) {
    Job<T> job;
    job.x = {batch.x, batch.inner};
    job.out = out;
    job.most = packed.plan().most_values();
    job.width = packed.plan().features() * job.most;
    run(packed, Direction::density, batch, warps, job, [](const auto&... all) { warp::evaluate<T>(all...); });
}

template <class T>
void warp_generate(const Weights<T>& packed, const Batch& batch, const Draw* draw, const Warps& warps, T* out, T* log_prob,
                   Other<T>* other) {
    Job<T> job;
    job.out = out;
    job.other = other;
    job.log_prob = log_prob;
    job.fills = warps.fills;
    const Batch rows = rows_of_call(batch, draw, warps.begin, job);
    run(packed, Direction::sampler, rows, warps, job, [](const auto&... all) { warp::generate<T>(all...); });
}

#ifdef FASTMAF_CUDA_CHUNK
}  // namespace fastmaf

#include "cuda/kernels.hpp"
#include "runtime.hpp"

// The kernels of the host's runtime.
namespace fastmaf {
namespace cuda {

template <class T>
cudaError_t resident_blocks(Operation, int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}
template <class T>
cudaError_t launch(Operation operation, const FlowView<T>& flow, const Job<T>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int block = 0; block < blocks; ++block)
            with_team(kWarpsOfTheHost, [&](const Team& team) {
                char* const scratch = job.scratch + block * flow.scratch;
                const int64_t rows = 32 * job.vectors;
                for (int64_t begin = block * rows; begin < job.rows; begin += blocks * rows)
                    operation == Operation::evaluate ? warp::evaluate<T>(flow, job, begin, scratch, team)
                                                     : warp::generate<T>(flow, job, begin, scratch, team);
            });
    });
    return cudaSuccess;
}
template <class T>
cudaError_t launch_fold(const FlowView<T>& flow, const Job<T>& job, T* room, T* folded, const T** table, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int k = 0; k < flow.stage_count; ++k) {
            table[k] = folded + flow.folded[k];
            with_team(kWarpsOfTheHost, [&](const Team& team) { warp::fold<T>(flow, job, k, room, folded + flow.folded[k], team); });
        }
    });
    return cudaSuccess;
}
#define FASTMAF_INSTANTIATE(T) \
    template cudaError_t resident_blocks<T>(Operation, int*); \
    template cudaError_t launch<T>(Operation, const FlowView<T>&, const Job<T>&, int, cudaStream_t); \
    template cudaError_t launch_fold<T>(const FlowView<T>&, const Job<T>&, T*, T*, const T**, cudaStream_t);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)
#undef FASTMAF_INSTANTIATE

}  // namespace cuda
#endif

#define FASTMAF_INSTANTIATE(T) \
    template void warp_evaluate<T>(const Weights<T>&, const Batch&, const Warps&, T*, T*); \
    template void warp_probabilities<T>(const Weights<T>&, const Batch&, const Warps&, T*); \
    template void warp_generate<T>(const Weights<T>&, const Batch&, const Draw*, const Warps&, T*, T*, Other<T>*);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace fastmaf
