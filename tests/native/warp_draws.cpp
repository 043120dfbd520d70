#include <algorithm>

#include "core/aligned.hpp"
#include "team.hpp"
#include "warp.hpp"

#define FASTMAF_ISA tensor
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#define FASTMAF_MMA "../../tests/native/warp_mma.inl.hpp"
#include "cuda/draw.inl.hpp"

namespace fastmaf {

namespace {

// A block of the sampler on tensor cores.
template <int HIDDEN, int PARTS>
void run_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int warps, int64_t block, int64_t blocks,
               char* scratch) {
    AlignedVector<char> shared(size_t(view.shared), char(0xFF));
    with_team(warps, [&](const Team& team) {
        tensor::clear_halves(shared.data(), view.ring, team);
        tensor::Supply<PARTS> supply(view, shared.data(), team);
        const int64_t rows = 16 * view.groups;
        for (int64_t begin = block * rows; begin < job.rows; begin += blocks * rows)
            tensor::generate_halves<HIDDEN, PARTS>(flow, view, job, begin, scratch, shared.data(), supply, team);
        tensor::wait_copies<0>();
    });
}

void run_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int warps, int64_t block, int64_t blocks,
               char* scratch) {
    using Run = decltype(&run_draws<1, 1>);
    const Run all[3][2] = {{run_draws<1, 1>, run_draws<1, 2>}, {run_draws<2, 1>, run_draws<2, 2>}, {run_draws<3, 1>, run_draws<3, 2>}};
    all[view.hidden - 1][view.parts - 1](flow, view, job, warps, block, blocks, scratch);
}

}  // namespace

void warp_draws(const Weights<float>& packed, const Batch& batch, const Draw* draw, int parts, int groups, int active, int warps,
                float* out, float* log_prob) {
    FlowView<float> flow;
    PlacedWeights<float> stages;
    DrawView view;
    const AlignedVector<char> memory = placed([&](Image& image) {
        flow = lay_out(image, packed, Direction::sampler, tensor::lanes_of<float>(), stages);
        view = lay_out_draws(image, packed, parts, groups);
    });
    view.groups = active;
    AlignedVector<char> scratch(size_t(flow.scratch), char(0xFF));
    Job<float> job;
    rows_of_call(batch, draw, 0, job);
    job.vectors = (16 * active + 31) / 32;
    job.out = out;
    job.log_prob = log_prob;
    job.width = packed.plan().features();
    // Two blocks, the second one first: the first one would write over its rows if it did not stop where its tiles end.
    for (int64_t block : {1, 0}) run_draws(flow, view, job, warps, block, 2, scratch.data());
}

}  // namespace fastmaf

#ifdef FASTMAF_CUDA_CHUNK
#include "cuda/kernels.hpp"
#include "runtime.hpp"

// The kernels of the host's runtime.
namespace fastmaf {
namespace cuda {

cudaError_t resident_draw_blocks(const DrawView&, int, int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t launch_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int block = 0; block < blocks; ++block)
            run_draws(flow, view, job, kWarpsOfTheHost, block, blocks, job.scratch + block * flow.scratch);
    });
    return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastmaf
#endif
