#include "warp.hpp"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "core/aligned.hpp"
#include "cuda/image.hpp"
#include "cuda/tensor_image.hpp"

#define FASTMAF_ISA warp
#define FASTMAF_VEC "../../tests/native/warp_vec.inl.hpp"
#define FASTMAF_MMA "../../tests/native/warp_mma.inl.hpp"
#include "cuda/tensor.inl.hpp"

namespace fastmaf {

namespace {

// Where the warps of a block meet.
class Meeting {
public:
    explicit Meeting(int count) : count_(count) {}
    void wait() {
        if (count_ == 1) return;
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++here_ == count_) {
            here_ = 0;
            ++round_;
            all_.notify_all();
        } else {
            all_.wait(lock, [&] { return round_ != round; });
        }
    }

private:
    const int count_;
    int here_ = 0, round_ = 0;
    std::mutex mutex_;
    std::condition_variable all_;
};

struct Team {
    int rank, size;
    Meeting& meeting;
    bool mine(int i) const { return i % size == rank; }
    void sync() const { meeting.wait(); }
    int thread() const { return rank; }
    int threads() const { return size; }
};

template <class F>
void with_team(int count, F f) {
    Meeting meeting(count);
    std::vector<std::thread> others;
    for (int rank = 1; rank < count; ++rank) others.emplace_back([&, rank] { f(Team{rank, count, meeting}); });
    f(Team{0, count, meeting});
    for (auto& thread : others) thread.join();
}

// A launch with one block.
template <class T, class F>
void run(const Program<T>& program, Direction direction, const Batch& batch, const Warps& warps, Job<T> job, F f) {
    Image measure;
    lay_out(measure, program, direction, warp::lanes_of<T>());
    AlignedVector<char> memory(measure.bytes().size());
    Image image(memory.data());
    const FlowView<T> flow = lay_out(image, program, direction, warp::lanes_of<T>());
    std::copy(image.bytes().begin(), image.bytes().end(), memory.begin());
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

// A block of the tensor-core kernel: the tiles from its own on.
template <int MT, int PARTS>
void run_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int64_t block, int64_t blocks, char* scratch) {
    AlignedVector<char> shared(size_t(view.shared), char(0xFF));
    with_team(view.shape.groups * view.shape.teams, [&](const Team& team) {
        warp::clear_halves(view, shared.data(), team);
        warp::Feed<PARTS> feed(view, shared.data(), team.rank);
        const int64_t rows = view.shape.rows;
        for (int64_t begin = block * rows; begin < job.rows; begin += blocks * rows)
            warp::evaluate_halves<MT, PARTS>(flow, view, job, begin, scratch, shared.data(), feed, team);
        warp::wait_copies<0>();
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

void warp_halves(const Program<float>& program, const Batch& batch, const TensorShape& shape, float* log_prob, float* noise) {
    AlignedVector<char> memory;
    FlowView<float> flow;
    TensorView view;
    for (int pass = 0; pass < 2; ++pass) {
        Image image(memory.data());
        flow = lay_out(image, program, Direction::density, warp::lanes_of<float>());
        view = lay_out_tensor(image, program, shape);
        memory.resize(image.bytes().size());
        std::copy(image.bytes().begin(), image.bytes().end(), memory.begin());
    }
    AlignedVector<char> scratch(size_t(flow.scratch), char(0xFF));
    Job<float> job;
    job.rows = batch.rows();
    job.x = {batch.x, batch.inner};
    job.context = {batch.context, batch.inner};
    job.vectors = (shape.rows + 31) / 32;
    job.log_prob = log_prob;
    job.out = noise;
    job.width = program.features();
    run_tensor(flow, view, job, 0, 1, scratch.data());
}

void warp_multiply(const uint32_t (&a)[4][32], const uint32_t (&b)[2][32], float (&c)[4][32]) {
    warp::Words left[4], right[2];
    warp::Vec<float> sums[4];
    std::memcpy(left, a, sizeof a);
    std::memcpy(right, b, sizeof b);
    std::memcpy(sums, c, sizeof c);
    warp::multiply_add(sums, left, right[0], right[1]);
    std::memcpy(c, sums, sizeof c);
}

template <class T>
void warp_evaluate(const Program<T>& program, const Batch& batch, const Warps& warps, T* log_prob, T* noise) {
    Job<T> job;
    job.x = {batch.x, batch.inner};
    job.log_prob = log_prob;
    job.out = noise;
    job.width = program.features();
    job.fills = warps.fills;
    run(program, Direction::density, batch, warps, job, [](const auto&... all) { warp::evaluate<T>(all...); });
}

template <class T>
void warp_probabilities(const Program<T>& program, const Batch& batch, const Warps& warps, T* out) {
    Job<T> job;
    job.x = {batch.x, batch.inner};
    job.out = out;
    job.most = program.most_values();
    job.width = program.features() * job.most;
    run(program, Direction::density, batch, warps, job, [](const auto&... all) { warp::evaluate<T>(all...); });
}

template <class T>
void warp_generate(const Program<T>& program, const Batch& batch, const Draw* draw, const Warps& warps, T* out, T* log_prob) {
    Job<T> job;
    Batch rows = batch;
    job.out = out;
    job.log_prob = log_prob;
    if (draw) {
        rows.outer = draw->contexts;
        rows.inner = draw->rows;
        rows.context = draw->context;
        job.draws = true;
        job.seed = draw->seed;
        job.offset = draw->offset;
        job.context_offset = draw->context_offset;
        job.begin = uint64_t(warps.begin);
        job.inner = uint64_t(warps.begin + draw->rows);
        job.index = draw->index;
        job.group = draw->group;
    } else {
        job.x = {batch.x, batch.inner};
    }
    run(program, Direction::sampler, rows, warps, job, [](const auto&... all) { warp::generate<T>(all...); });
}

#ifdef FASTMAF_CUDA_CHUNK
}  // namespace fastmaf

#include "cuda/kernels.hpp"
#include "runtime.hpp"

// The kernels of the host's runtime.
namespace fastmaf {
namespace cuda {

constexpr int kWarps = 2;

template <class T>
cudaError_t resident_blocks(Operation, int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}
template <class T>
cudaError_t launch(Operation operation, const FlowView<T>& flow, const Job<T>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int block = 0; block < blocks; ++block)
            with_team(kWarps, [&](const Team& team) {
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
            with_team(kWarps, [&](const Team& team) { warp::fold<T>(flow, job, k, room, folded + flow.folded[k], team); });
        }
    });
    return cudaSuccess;
}
bool has_tensor_cores() { return true; }
int tensor_warps() { return kWarps; }
cudaError_t resident_tensor_blocks(const TensorView&, int* blocks) {
    *blocks = 1;
    return cudaSuccess;
}
cudaError_t launch_tensor(const FlowView<float>& flow, const TensorView& view, const Job<float>& job, int blocks, cudaStream_t stream) {
    enqueue(stream, [=] {
        for (int block = 0; block < blocks; ++block) run_tensor(flow, view, job, block, blocks, job.scratch + block * flow.scratch);
    });
    return cudaSuccess;
}
#define FASTMAF_INSTANTIATE(T)                                                                          \
    template cudaError_t resident_blocks<T>(Operation, int*);                                           \
    template cudaError_t launch<T>(Operation, const FlowView<T>&, const Job<T>&, int, cudaStream_t);     \
    template cudaError_t launch_fold<T>(const FlowView<T>&, const Job<T>&, T*, T*, const T**, cudaStream_t);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)
#undef FASTMAF_INSTANTIATE

}  // namespace cuda
#endif

#define FASTMAF_INSTANTIATE(T)                                                             \
    template void warp_evaluate<T>(const Program<T>&, const Batch&, const Warps&, T*, T*); \
    template void warp_probabilities<T>(const Program<T>&, const Batch&, const Warps&, T*); \
    template void warp_generate<T>(const Program<T>&, const Batch&, const Draw*, const Warps&, T*, T*);
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)

}  // namespace fastmaf
