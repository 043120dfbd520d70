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
void run_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int warps, int64_t block, int64_t blocks, char* scratch) {
    AlignedVector<char> shared(size_t(view.shared), char(0xFF));
    with_team(warps, [&](const Team& team) {
        tensor::clear_halves(view, shared.data(), team);
        tensor::Supply<PARTS> supply(view, shared.data(), team);
        const int64_t rows = 16 * view.groups;
        for (int64_t begin = block * rows; begin < job.rows; begin += blocks * rows)
            tensor::generate_halves<HIDDEN, PARTS>(flow, view, job, begin, scratch, shared.data(), supply, team);
        tensor::wait_copies<0>();
    });
}

void run_draws(const FlowView<float>& flow, const DrawView& view, const Job<float>& job, int warps, int64_t block, int64_t blocks, char* scratch) {
    using Run = decltype(&run_draws<1, 1>);
    const Run all[3][2] = {{run_draws<1, 1>, run_draws<1, 2>}, {run_draws<2, 1>, run_draws<2, 2>}, {run_draws<3, 1>, run_draws<3, 2>}};
    all[view.hidden - 1][view.parts - 1](flow, view, job, warps, block, blocks, scratch);
}

// The draws of a request, or the noise of a batch where there is none.
void fill_job(const Batch& batch, const Draw* draw, Job<float>& job) {
    Batch rows = batch;
    if (draw) {
        rows.outer = draw->contexts;
        rows.inner = draw->rows;
        rows.context = draw->context;
        job.draws = true;
        job.seed = draw->seed;
        job.inner = uint64_t(draw->rows);
    } else {
        job.x = {batch.x, batch.inner};
    }
    job.rows = rows.rows();
    job.context = {rows.context, rows.inner};
}

}  // namespace

void warp_draws(const Program<float>& program, const Batch& batch, const Draw* draw, int parts, int groups, int active, int warps, float* out,
                float* log_prob) {
    AlignedVector<char> memory;
    FlowView<float> flow;
    DrawView view;
    for (int pass = 0; pass < 2; ++pass) {
        Image image(memory.data());
        flow = lay_out(image, program, Direction::sampler, tensor::lanes_of<float>());
        view = lay_out_draws(image, program, parts, groups);
        memory.resize(image.bytes().size());
        std::copy(image.bytes().begin(), image.bytes().end(), memory.begin());
    }
    view.groups = active;
    AlignedVector<char> scratch(size_t(flow.scratch), char(0xFF));
    Job<float> job;
    fill_job(batch, draw, job);
    job.vectors = (16 * active + 31) / 32;
    job.out = out;
    job.log_prob = log_prob;
    job.width = program.features();
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
