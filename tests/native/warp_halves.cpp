#include <algorithm>
#include <cstring>

#include "core/aligned.hpp"
#include "team.hpp"
#include "warp.hpp"

#define FASTMAF_ISA tensor
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#define FASTMAF_MMA "../../tests/native/warp_mma.inl.hpp"
#include "cuda/tensor.inl.hpp"

namespace fastmaf {

namespace {

// A block of the tensor-core kernel: the tiles from its own on.
template <int MT, int PARTS>
void run_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int64_t block, int64_t blocks, char* scratch) {
    AlignedVector<char> shared(size_t(view.shared), char(0xFF));
    with_team(view.shape.groups * view.shape.teams, [&](const Team& team) {
        tensor::clear_halves(shared.data(), view.ring, team);
        tensor::Feed<PARTS> feed(view, shared.data(), team.rank);
        const int64_t rows = view.shape.rows;
        for (int64_t begin = block * rows; begin < job.rows; begin += blocks * rows)
            tensor::evaluate_halves<MT, PARTS>(flow, view, job, begin, scratch, shared.data(), feed, team);
        tensor::wait_copies<0>();
    });
}

void run_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int64_t block, int64_t blocks, char* scratch) {
    const auto run = view.shape.parts == 2       ? (view.shape.row_tiles == 2 ? run_tensor<2, 2> : run_tensor<1, 2>)
                     : view.shape.row_tiles == 4 ? run_tensor<4, 1>
                     : view.shape.row_tiles == 2 ? run_tensor<2, 1>
                                                 : run_tensor<1, 1>;
    run(flow, view, job, block, blocks, scratch);
}

}  // namespace

void warp_halves(const Weights<float>& packed, const Batch& batch, const TensorShape& shape, float* log_prob, float* noise) {
    FlowView<float> flow;
    PlacedWeights<float> stages;
    TensorView view;
    const AlignedVector<char> memory = placed([&](Image& image) {
        flow = lay_out(image, packed, Direction::density, tensor::lanes_of<float>(), stages);
        view = lay_out_tensor(image, packed, shape);
    });
    AlignedVector<char> scratch(size_t(flow.scratch), char(0xFF));
    Job<float> job;
    job.rows = batch.rows();
    job.x = {batch.x, batch.inner};
    job.context = {batch.context, batch.inner};
    job.vectors = (shape.rows + 31) / 32;
    job.log_prob = log_prob;
    job.out = noise;
    job.width = packed.plan().features();
    run_tensor(flow, view, job, 0, 1, scratch.data());
}

void warp_multiply(const uint32_t (&a)[4][32], const uint32_t (&b)[2][32], float (&c)[4][32]) {
    tensor::Words left[4], right[2];
    tensor::Vec<float> sums[4];
    std::memcpy(left, a, sizeof a);
    std::memcpy(right, b, sizeof b);
    std::memcpy(sums, c, sizeof c);
    tensor::multiply_add(sums, left, right[0], right[1]);
    std::memcpy(c, sums, sizeof c);
}

}  // namespace fastmaf

#ifdef FASTMAF_CUDA_CHUNK
#include "cuda/kernels.hpp"
#include "runtime.hpp"

// The kernels of the host's runtime.
namespace fastmaf {
namespace cuda {

cudaError_t find_tensor_cores(bool* found) {
    *found = true;
    return cudaSuccess;
}
int tensor_warps() { return kWarpsOfTheHost; }
cudaError_t resident_tensor_blocks(const TensorView&, int, int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t launch_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int block = 0; block < blocks; ++block) run_tensor(flow, view, job, block, blocks, job.scratch + block * flow.scratch);
    });
    return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastmaf
#endif
