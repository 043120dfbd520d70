// Training on a GPU. The rows lie there, and so do the weights, of which the stages of a flow read copies that every step makes anew. A
// step is `grad`, which leaves the gradient and the loss, and `apply`; both only enqueue. The host looks at the losses once in many steps.
#include "flow.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "../core/floats.hpp"

namespace fastmaf {
namespace device {

namespace {

constexpr int64_t kLossRows = 32;      // summed up by one thread
constexpr int64_t kSquares = 4096;     // sums of squares that one sum is made of,
constexpr int64_t kSquaresSlice = 64;  // so many at a time

}  // namespace

template <class T>
struct TrainerState {
    std::shared_ptr<Weights<T>> weights;
    AdamSettings settings;
    std::unique_ptr<FlowState<T>> flow;
    std::unique_ptr<Stream> stream;
    bool ahead = false;              // the weights of the device are newer than those of the host
    int64_t steps = 0, pending = 0;  // those done; those under way, which are not counted there

    // The rows to train on, in the dtypes in which they came.
    DType x_dtype = DType::f64, context_dtype = DType::f64;
    Buffer x{false, "the rows to train on"}, context{false, "their contexts"}, row_weights{false, "their weights"};
    int64_t all_rows = 0;
    bool weighted = false;
    // Of an epoch: the order of the rows, and what a batch takes of them.
    Buffer order{false, "the order of the rows"}, batch{false, "a batch"}, host_losses{true, "losses"};
    int64_t ordered = 0;

    // The state: in the order of the master, but for a few numbers.
    Buffer state{false, "the weights and their moments"};
    T *master = nullptr, *first = nullptr, *second = nullptr, *gradient = nullptr, *scale = nullptr;
    double *sums = nullptr, *squares = nullptr, *losses = nullptr, *shared = nullptr, *logarithms = nullptr;
    int* halted = nullptr;
    RepackJob<T> repack{};
    ScaleJob<T> scales{};

    TrainerState(std::shared_ptr<Weights<T>> given, std::shared_ptr<Station> station, const AdamSettings& settings)
        : weights(std::move(given)), settings(settings), stream(std::make_unique<Stream>()) {
        make_flow(std::move(station));
        const int64_t size = master_size();
        Room room;
        const int64_t of_scales = scale_count();
        const int64_t places[] = {room.take(size * int64_t(sizeof(T))),
                                  room.take(size * int64_t(sizeof(T))),
                                  room.take(size * int64_t(sizeof(T))),
                                  room.take(size * int64_t(sizeof(T))),
                                  room.take((size + 1) * int64_t(sizeof(double))),
                                  room.take((kSquares + kSquares / kSquaresSlice + 1) * int64_t(sizeof(double))),
                                  room.take(Trainer<T>::kMostSteps * int64_t(sizeof(double))),
                                  room.take((of_scales + 1) * int64_t(sizeof(double))),
                                  room.take(int64_t(sizeof(T))),
                                  room.take(int64_t(sizeof(int)))};
        char* const base = state.at_least(room.size());
        T** const reals[] = {&master, &first, &second, &gradient};
        for (int i = 0; i < 4; ++i) *reals[i] = reinterpret_cast<T*>(base + places[i]);
        double** const wides[] = {&sums, &squares, &losses, &shared};
        for (int i = 0; i < 4; ++i) *wides[i] = reinterpret_cast<double*>(base + places[4 + i]);
        logarithms = shared + 1;
        scale = reinterpret_cast<T*>(base + places[8]);
        halted = reinterpret_cast<int*>(base + places[9]);
        check(cudaMemsetAsync(base, 0, size_t(room.size()), *stream), "setting moments to zero");
        push();
    }
    ~TrainerState() {
        if (flow->station->process == getpid()) cudaStreamSynchronize(*stream);
    }

    int64_t master_size() const { return int64_t(weights->master().size()); }
    int64_t scale_count() const {
        const Plan& plan = weights->plan();
        int64_t count = 0;
        for (const StageSpec& stage : plan.spec().stages)
            if (stage.output == Output::linear || stage.trainable) count += plan.features();
        return count;
    }

    // The copy of the flow with the weights of the host, and the tables of what is copied there from the master.
    void make_flow(std::shared_ptr<Station> station) {
        flow = std::make_unique<FlowState<T>>();
        flow->weights = weights;
        flow->station = std::move(station);
        flow->copy_for(Direction::density);
        flow->gradient_view();
        flow->weights_view();
        flow->gradients->flow.constant = weights->fixed_constant();
        const Plan& plan = weights->plan();
        const Direction directions[] = {Direction::density, Direction::backward};
        const PlacedWeights<T>* const placed[] = {&flow->copies[0]->placed, &flow->backward};
        std::vector<SharedScale<T>> table;
        for (size_t k = 0; k < plan.stages(); ++k) {
            const StageSpec& stage = plan.spec().stages[k];
            for (size_t v = 0; v < size_t(plan.features()); ++v) {
                if (stage.output == Output::linear)
                    table.push_back({plan.weight_offset(k, 0) + plan.sorted()[k].maps[0].offset[v + 1] - 1, 0, {nullptr, nullptr}});
                if (!stage.trainable) continue;
                SharedScale<T> own{plan.bias_offset(k, 0) + int64_t(v), 1 / std::sqrt(weights->statistics(k).var[v] + stage.eps), {}};
                for (int d = 0; d < 2; ++d) own.scale[d] = const_cast<T*>(placed[d]->stages[k].scale) + v;
                table.push_back(own);
            }
        }
        flow->put([&](Image& image) {
            repack.count = 0;
            repack.nothing = kNoSource;
            for (int d = 0; d < 2; ++d) {
                const std::vector<uint32_t> sources = sources_of(plan, directions[d]);
                repack.to[d] = const_cast<T*>(placed[d]->at);
                repack.sources[d] = image.put(sources);
                if (d == 0) repack.size = int64_t(sources.size());
                repack.count += int64_t(sources.size());
            }
            scales.scales = image.put(table);
            scales.count = int64_t(table.size());
        });
    }

    // Launches with one check at the end.
    struct Launches {
        cudaError_t error = cudaSuccess;
        template <class F>
        void then(F call) {
            if (error == cudaSuccess) error = call();
        }
        template <class Job>
        void each(const Job& job, cudaStream_t stream) {
            then([&] { return cuda::launch_each(job, stream); });
        }
        void sum(const double* in, double* out, int64_t count, int64_t slice, cudaStream_t stream) {
            then([&] { return cuda::launch_sum<double>({in, out, 1, count, 1, slice, false}, stream); });
        }
        void done() const { check(error, "launching a kernel"); }
    };

    // What stages read of the master.
    void spread(Launches& launches) {
        repack.master = scales.master = master;
        scales.out = logarithms;
        launches.each(repack, *stream);
        launches.each(scales, *stream);
        if (scales.count) launches.sum(logarithms, shared, scales.count, scales.count, *stream);
    }

    // The weights of the host to the device ...
    void push() {
        send(weights->master().data(), master);
        Launches launches;
        spread(launches);
        launches.done();
        check(cudaStreamSynchronize(*stream), "copying weights");
        ahead = false;
    }
    // ... and back, if steps were made since.
    void pull() {
        if (!ahead) return;
        fetch(master, weights->master().data());
        weights->repack();
        ahead = false;
    }
    void send(const T* like_master, T* to) const {
        const size_t bytes = size_t(master_size()) * sizeof(T);
        if (bytes) check(cudaMemcpyAsync(to, like_master, bytes, cudaMemcpyHostToDevice, *stream), "copying weights");
        check(cudaStreamSynchronize(*stream), "copying weights");
    }
    void fetch(const T* like_master, T* out) const {
        const size_t bytes = size_t(master_size()) * sizeof(T);
        if (bytes) check(cudaMemcpyAsync(out, like_master, bytes, cudaMemcpyDeviceToHost, *stream), "copying weights");
        check(cudaStreamSynchronize(*stream), "copying weights");
    }

    void set_rows(const Batch& given, const double* given_weights, const Poll& poll) {
        const Plan& plan = weights->plan();
        x_dtype = given.x.dtype;
        context_dtype = given.context.dtype;
        all_rows = given.rows();
        weighted = given_weights != nullptr;
        Rows of_weights;
        of_weights.data = reinterpret_cast<const char*>(given_weights);
        of_weights.inner = of_weights.column = sizeof(double);
        const std::vector<RowsIn> inputs = {{{given.x, given.inner}, plan.features(), false},
                                            {{given.context, given.inner}, plan.context(), false},
                                            {{of_weights, given.inner}, weighted ? 1 : 0, false}};
        Buffer* const places[] = {&x, &context, &row_weights};
        std::vector<char*> to;
        for (size_t i = 0; i < inputs.size(); ++i) to.push_back(places[i]->at_least(all_rows * inputs[i].row()));
        stream_rows(
            *flow->station, all_rows, inputs, {}, 1, 2, poll,
            [&](const std::vector<Source>& in, const std::vector<char*>&, int64_t begin, int64_t count, cudaStream_t on) {
                for (size_t i = 0; i < inputs.size(); ++i)
                    if (const int64_t row = inputs[i].row(); in[i].rows.data && row)
                        check(cudaMemcpyAsync(to[i] + begin * row, in[i].rows.data, size_t(count * row), cudaMemcpyDeviceToDevice, on),
                              "copying rows to the device");
            });
    }

    void set_order(const int64_t* given, int64_t count) {
        char* const to = order.at_least(count * int64_t(sizeof(int64_t)));
        check(cudaMemcpyAsync(to, given, size_t(count) * sizeof(int64_t), cudaMemcpyHostToDevice, *stream),
              "copying the order of the rows");
        check(cudaMemsetAsync(halted, 0, sizeof *halted, *stream), "copying the order of the rows");
        check(cudaStreamSynchronize(*stream), "copying the order of the rows");
        ordered = count;
    }

    void grad(int64_t begin, int64_t count, double mass) {
        const Plan& plan = weights->plan();
        TakeJob<T> take{};
        const int64_t x_size = size_of(x_dtype), context_size = size_of(context_dtype);
        const int64_t losses_of_slices = (count + kLossRows - 1) / kLossRows;
        Room room;
        const int64_t at_x = room.take(count * plan.features() * x_size), at_context = room.take(count * plan.context() * context_size);
        const int64_t at_weight = room.take(count * int64_t(sizeof(double))),
                      at_loss = room.take(losses_of_slices * int64_t(sizeof(double)));
        const int64_t at_cotangent = room.take(count * int64_t(sizeof(T))), at_value = room.take(count * int64_t(sizeof(T)));
        if (room.size() > batch.size()) check(cudaStreamSynchronize(*stream), "waiting for a batch");
        char* const base = batch.at_least(room.size());
        auto real = [&](int64_t at) { return reinterpret_cast<T*>(base + at); };
        auto wide = [&](int64_t at) { return reinterpret_cast<double*>(base + at); };
        take.x = {x.data(), base + at_x, plan.features(), x_size};
        take.context = {context.data(), base + at_context, plan.context(), context_size};
        take.rows = reinterpret_cast<const int64_t*>(order.data()) + begin;
        take.weights = weighted ? reinterpret_cast<const double*>(row_weights.data()) : nullptr;
        take.mass = mass;
        take.weight = wide(at_weight);
        take.cotangent = real(at_cotangent);
        take.count = count * (plan.features() + plan.context() + 1);
        Launches before;
        before.each(take, *stream);
        before.done();
        auto packed = [](const char* data, DType dtype, int64_t width) {
            const int64_t size = size_of(dtype);
            return Rows{data, dtype, 0, width * size, size};
        };
        Batch part;
        part.inner = count;
        part.x = packed(take.x.to, x_dtype, plan.features());
        if (plan.context()) part.context = packed(take.context.to, context_dtype, plan.context());
        Gradients<T> out;
        out.value = real(at_value);
        flow->launch_gradients(part, packed(base + at_cotangent, sizeof(T) == 4 ? DType::f32 : DType::f64, 1), out, sums, true, *stream);
        Launches launches;
        launches.each(LossJob<T>{real(at_value), wide(at_weight), shared, wide(at_loss), count, kLossRows, losses_of_slices}, *stream);
        launches.sum(wide(at_loss), losses + pending, losses_of_slices, losses_of_slices, *stream);
        launches.each(EntryJob<T>{flow->weights_view(), sums, master, gradient, master_size()}, *stream);
        launches.done();
    }

    void apply(double rate) {
        const AdamSettings& a = settings;
        const int64_t size = master_size();
        Launches launches;
        if (a.clip_norm > 0) {
            constexpr int64_t slices = kSquares / kSquaresSlice;
            launches.each(SquaresJob<T>{gradient, master, T(2 * a.l2), size, squares, kSquares}, *stream);
            launches.sum(squares, squares + kSquares, kSquares, kSquaresSlice, *stream);
            launches.sum(squares + kSquares, squares + kSquares + slices, slices, slices, *stream);
        }
        const double* const norm = a.clip_norm > 0 ? squares + kSquares + kSquares / kSquaresSlice : nullptr;
        launches.each(JudgeJob<T>{losses + pending, norm, a.clip_norm, scale, halted, 1}, *stream);
        const AdamStep<T> step = adam_step<T>(a, steps + pending + 1, rate);
        launches.each(AdamJob<T>{step, scale, gradient, halted, master, first, second, size}, *stream);
        spread(launches);
        launches.done();
        ahead = true;
        ++pending;
    }

    // After an error in mid-step.
    void forget() {
        cudaStreamSynchronize(*stream);
        pending = 0;
    }

    // Waits for the steps under way; how many of them were made, fewer where the loss of the next one is no number. `sum` gets their losses.
    int64_t look(double& sum) {
        double* const found = reinterpret_cast<double*>(host_losses.at_least(Trainer<T>::kMostSteps * int64_t(sizeof(double))));
        const int64_t asked = pending;
        pending = 0;
        check(cudaMemcpyAsync(found, losses, size_t(asked) * sizeof(double), cudaMemcpyDeviceToHost, *stream), "copying losses");
        check(cudaStreamSynchronize(*stream), "training");
        for (int64_t i = 0; i < asked; ++i) {
            if (!std::isfinite(found[i])) return i;
            sum += found[i];
            ++steps;
        }
        return asked;
    }
};

template <class T>
Trainer<T>::Trainer(std::shared_ptr<Weights<T>> weights, int device, const AdamSettings& settings) {
    for (const StageSpec& stage : weights->plan().spec().stages)
        if (stage.of_batch) throw std::invalid_argument("a norm with the statistics of the batch is trained on the CPU");
    const std::shared_ptr<Station> station = Station::of(device);
    const Current current(device);
    const PlainFloats floats;
    state_ = std::make_unique<TrainerState<T>>(std::move(weights), station, settings);
}

template <class T>
Trainer<T>::~Trainer() = default;

namespace {

// What each call begins with.
template <class T>
class Call {
public:
    explicit Call(const TrainerState<T>& state) : current_((state.flow->check_process(), state.flow->station->device)) {}

private:
    const Current current_;
    const PlainFloats floats_;
};

}  // namespace

template <class T>
void Trainer<T>::set_rows(const Batch& rows, const double* weights, const Poll& poll) {
    const Call<T> call(*state_);
    state_->set_rows(rows, weights, poll);
}

template <class T>
void Trainer<T>::set_order(const int64_t* order, int64_t rows) {
    const Call<T> call(*state_);
    for (int64_t i = 0; i < rows; ++i)
        if (order[i] < 0 || order[i] >= state_->all_rows)
            throw std::invalid_argument("row " + std::to_string(order[i]) + " is not among the " + std::to_string(state_->all_rows) +
                                        " rows to train on");
    state_->set_order(order, rows);
}

template <class T>
void Trainer<T>::grad(int64_t begin, int64_t rows, double mass) {
    const Call<T> call(*state_);
    state_->grad(begin, rows, mass);
}

template <class T>
void Trainer<T>::apply(double rate) {
    const Call<T> call(*state_);
    state_->apply(rate);
}

template <class T>
int64_t Trainer<T>::look(double& sum) {
    const Call<T> call(*state_);
    return state_->look(sum);
}

template <class T>
StepArrays<T> Trainer<T>::arrays() const {
    const TrainerState<T>& s = *state_;
    return {s.gradient, s.master_size(), s.losses + s.pending, reinterpret_cast<uintptr_t>(cudaStream_t(*s.stream))};
}

template <class T>
double Trainer<T>::epoch(const int64_t* order, int64_t rows, int64_t batch_size, const double* rates, double mean_weight, int64_t& done,
                         const Poll& poll) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    set_order(order, rows);
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::milliseconds soon(30), late(100);
    Clock::time_point polled = Clock::now();
    double sum = 0;
    done = 0;
    // As many steps between two looks as take about as long as a person may wait for Ctrl-C.
    for (int64_t begin = 0, most = 1; begin < rows;) {
        const Clock::time_point before = Clock::now();
        try {
            for (int64_t i = 0; i < most && begin < rows; ++i) {
                const int64_t count = std::min(batch_size, rows - begin);
                s.grad(begin, count, double(count) * mean_weight);
                s.apply(rates[done + i]);
                begin += count;
            }
        } catch (...) {
            s.forget();
            throw;
        }
        const int64_t asked = s.pending, made = s.look(sum);
        done += made;
        if (made < asked) return sum;
        const Clock::time_point now = Clock::now();
        if (now - before < soon) most = std::min(2 * most, kMostSteps);
        if (now - before > late) most = std::max<int64_t>(1, most / 2);
        if (!poll || now - polled < late) continue;
        poll();
        polled = now;
    }
    return sum;
}

template <class T>
void Trainer<T>::log_prob(const Batch& batch, T* out, const Poll& poll) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    s.pull();
    s.flow->copies[0]->view.constant = s.weights->constant();
    Job<T> job;
    job.rows = batch.rows();
    job.x = {batch.x, batch.inner};
    job.context = {batch.context, batch.inner};
    job.log_prob = out;
    s.flow->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, {}, poll);
}

template <class T>
int Trainer<T>::features() const {
    return state_->weights->plan().features();
}
template <class T>
int64_t Trainer<T>::parameter_count() const {
    return state_->weights->plan().parameter_count();
}

template <class T>
void Trainer<T>::get_parameters(T* parameters) const {
    const Call<T> call(*state_);
    state_->pull();
    state_->weights->get_parameters(parameters);
}

template <class T>
void Trainer<T>::set_parameters(const T* parameters) {
    const Call<T> call(*state_);
    state_->weights->set_parameters(parameters);
    state_->push();
}

template <class T>
void Trainer<T>::set_statistics(size_t stage, const double* mean, const double* var) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    s.pull();
    s.weights->set_statistics(stage, mean, var);
    s.make_flow(s.flow->station);
    s.push();
}

template <class T>
void Trainer<T>::get_moments(T* first, T* second) const {
    const Call<T> call(*state_);
    const TrainerState<T>& s = *state_;
    std::vector<T> own(size_t(s.master_size()));
    for (const auto& [from, to] : {std::make_pair(s.first, first), std::make_pair(s.second, second)}) {
        s.fetch(from, own.data());
        s.weights->spread(own.data(), to);
    }
}

template <class T>
void Trainer<T>::set_moments(const T* first, const T* second) {
    const Call<T> call(*state_);
    const TrainerState<T>& s = *state_;
    const std::vector<uint32_t>& index = s.weights->plan().index();
    std::vector<T> own(index.size());
    for (const auto& [from, to] : {std::make_pair(first, s.first), std::make_pair(second, s.second)}) {
        for (size_t i = 0; i < index.size(); ++i) own[i] = from[index[i]];
        s.send(own.data(), to);
    }
}

template <class T>
int64_t Trainer<T>::steps() const {
    return state_->steps;
}
template <class T>
void Trainer<T>::set_steps(int64_t steps) {
    state_->steps = steps;
}

template class Trainer<float>;
template class Trainer<double>;

}  // namespace device
}  // namespace fastmaf
