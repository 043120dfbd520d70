// The flow on a GPU as callers see it, and its copies there.
#include "draw_image.hpp"
#include "flow.hpp"
#include "gradient_image.hpp"

namespace fastmaf {
namespace device {

namespace {

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

}  // namespace

template <class T>
FlowState<T>::~FlowState() {
    int before = 0;
    if (!station || station->process != getpid() || cudaGetDevice(&before) != cudaSuccess) return;
    cudaSetDevice(station->device);
    cudaDeviceSynchronize();  // a caller's stream may still read the copies
    for (void* memory : placed) cudaFree(memory);
    cudaSetDevice(before);
}

template <class T>
auto FlowState<T>::copy_for(Direction direction) -> const Copy& {
    std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<Copy>& copy = copies[direction == Direction::sampler];
    if (copy) return *copy;
    TensorShape shape;
    DrawView draws;
    if constexpr (std::is_same_v<T, float>)
        if (station->tensor_cores) {
            const double other = station->always_tensor_cores ? HUGE_VAL : cycles_in_float(weights->plan(), fitting_stages(*weights));
            if (direction == Direction::density) {
                const auto choice = fit_tensor_cores(*weights, precision, cuda::tensor_warps(), station->shared);
                if (choice.cycles < other) shape = choice.shape;
            } else {
                const auto choice = fit_draws(*weights, precision, cuda::tensor_warps(), station->shared);
                if (choice.cycles < other) draws = choice.shape;
            }
        }
    auto made = std::make_unique<Copy>();
    put([&](Image& image) {
        made->view = lay_out(image, *weights, direction, kLanes, made->placed);
        if constexpr (std::is_same_v<T, float>) {
            if (shape.rows) made->tensor = lay_out_tensor(image, *weights, shape);
            if (draws.groups) made->draws = lay_out_draws(image, *weights, draws.parts, draws.groups);
        }
    });
    copy = std::move(made);
    return *copy;
}

template <class T>
const GradientView<T>& FlowState<T>::gradient_view() {
    const FlowView<T>& flow = copy_for(Direction::density).view;
    std::lock_guard<std::mutex> lock(mutex);
    if (gradients) return *gradients;
    auto made = std::make_unique<GradientView<T>>();
    put([&](Image& image) { *made = lay_out_gradients(image, *weights, flow, kLanes, backward); });
    gradients = std::move(made);
    return *gradients;
}

template <class T>
const WeightsView<T>& FlowState<T>::weights_view() {
    std::lock_guard<std::mutex> lock(mutex);
    if (tasks) return *tasks;
    auto made = std::make_unique<WeightsView<T>>();
    put([&](Image& image) { *made = lay_out_weights(image, *weights); });
    tasks = std::move(made);
    return *tasks;
}

template <class T>
Flow<T>::Flow(std::shared_ptr<const Weights<T>> weights, int device, Precision precision) : state_(std::make_unique<FlowState<T>>()) {
    state_->station = Station::of(device);
    state_->weights = std::move(weights);
    state_->precision = precision;
}

template <class T>
Flow<T>::~Flow() = default;

template <class T>
const Weights<T>& Flow<T>::weights() const {
    return *state_->weights;
}

template <class T>
void Flow<T>::log_prob(const Batch& batch, T* out, const Place& place, const Poll& poll) const {
    Job<T> job = job_of<T>(batch);
    job.log_prob = out;
    state_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::to_noise(const Batch& batch, T* out, const Place& place, const Poll& poll, T* log_det) const {
    Job<T> job = job_of<T>(batch);
    job.out = out;
    job.log_prob = log_det;
    job.map = log_det != nullptr;
    job.width = weights().plan().features();
    state_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::conditional_probs(const Batch& batch, T* out, const Place& place, const Poll& poll) const {
    Job<T> job = job_of<T>(batch);
    job.out = out;
    job.most = weights().plan().most_values();
    job.width = weights().plan().features() * job.most;
    state_->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, place, poll);
}

template <class T>
void Flow<T>::from_noise(const Batch& noise, const Samples& out, const Place& place, const Poll& poll, T* log_det) const {
    Job<T> job = job_of<T>(noise);
    aim(job, out);
    job.log_prob = log_det;
    job.map = log_det != nullptr;
    job.width = weights().plan().features();
    state_->run(cuda::Operation::generate, job, noise.outer, noise.inner, place, poll);
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
    state_->run(cuda::Operation::generate, job, draw.contexts, draw.rows, place, poll);
}

template <class T>
void Flow<T>::vjp(const Batch& batch, const Rows& cotangent, const Gradients<T>& out, const Place& place, const Poll& poll) const {
    state_->differentiate(batch, cotangent, out, place, poll);
}

#define FASTMAF_INSTANTIATE(T) \
    template FlowState<T>::~FlowState(); \
    template const FlowState<T>::Copy& FlowState<T>::copy_for(Direction); \
    template const GradientView<T>& FlowState<T>::gradient_view(); \
    template const WeightsView<T>& FlowState<T>::weights_view();
FASTMAF_INSTANTIATE(float)
FASTMAF_INSTANTIATE(double)
template class Flow<float>;
template class Flow<double>;

}  // namespace device
}  // namespace fastmaf
