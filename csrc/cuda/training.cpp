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

// A network that trains the weights: its copy on the device, and what is copied there from the vector of all weights.
template <class T>
struct Member {
    std::shared_ptr<Weights<T>> weights;
    std::unique_ptr<FlowState<T>> flow;
    RepackJob<T> repack{};
    ScaleJob<T> scales{};
    std::vector<int64_t> first_scale;      // of each stage among these
    bool together = false;                 // norms take the statistics of the batch
    double* shared = nullptr;              // the sum of the logarithms of the scales that all rows share and weights make
    int64_t on_device = -1, on_host = -1;  // which version of the weights its copies are

    Member(std::shared_ptr<Weights<T>> given, const std::shared_ptr<Station>& station) : weights(std::move(given)) { make(station); }

    void make(const std::shared_ptr<Station>& station) {
        auto made = std::make_unique<FlowState<T>>();
        made->weights = weights;
        made->station = station;
        made->copy_for(Direction::density);
        made->gradient_view();
        made->weights_view();
        made->gradients->flow.constant = weights->fixed_constant();
        const Plan& plan = weights->plan();
        const std::vector<uint32_t>& index = plan.index();
        const Direction directions[] = {Direction::density, Direction::backward};
        const PlacedWeights<T>* const placed[] = {&made->copies[0]->placed, &made->backward};
        std::vector<SharedScale<T>> table;
        first_scale.resize(plan.stages());
        for (size_t k = 0; k < plan.stages(); ++k) {
            const StageSpec& stage = plan.spec().stages[k];
            first_scale[k] = int64_t(table.size());
            together = together || stage.of_batch;
            for (size_t v = 0; v < size_t(plan.features()); ++v) {
                if (stage.output == Output::linear)
                    table.push_back({index[size_t(plan.weight_offset(k, 0) + plan.sorted()[k].maps[0].offset[v + 1] - 1)], 0, 0, {}, {}});
                if (!stage.trainable) continue;
                SharedScale<T> own{index[size_t(plan.bias_offset(k, 0)) + v],
                                   std::sqrt(weights->statistics(k).var[v] + stage.eps),
                                   weights->statistics(k).mean[v],
                                   {},
                                   {}};
                for (int d = 0; d < 2; ++d) {
                    own.scale[d] = const_cast<T*>(placed[d]->stages[k].scale) + v;
                    own.loc[d] = const_cast<T*>(placed[d]->stages[k].loc) + v;
                }
                table.push_back(own);
            }
        }
        repack.nothing = kNoSource;
        made->put([&](Image& image) {
            repack.count = 0;
            for (int d = 0; d < 2; ++d) {
                std::vector<uint32_t> sources = sources_of(plan, directions[d]);
                for (uint32_t& source : sources)
                    if (source != kNoSource) source = index[source];
                repack.to[d] = const_cast<T*>(placed[d]->at);
                repack.sources[d] = image.put(sources);
                if (d == 0) repack.size = int64_t(sources.size());
                repack.count += int64_t(sources.size());
            }
            scales.scales = image.put(table);
            scales.count = int64_t(table.size());
            shared = const_cast<double*>(image.put(std::vector<double>(table.size() + 1, 0.0)));
            scales.out = shared + 1;
        });
        flow = std::move(made);
        on_device = -1;
    }
};

// Launches with one check at the end.
struct Launches {
    const cudaStream_t stream;
    cudaError_t error = cudaSuccess;
    template <class F>
    void then(F call) {
        if (error == cudaSuccess) error = call();
    }
    template <class Job>
    void each(const Job& job) {
        then([&] { return cuda::launch_each(job, stream); });
    }
    void sum(const double* in, double* out, int64_t count, int64_t slice) {
        then([&] { return cuda::launch_sum<double>({in, out, 1, count, 1, slice, false}, stream); });
    }
    void done() const { check(error, "launching a kernel"); }
};

template <class T>
struct TrainerState {
    const std::shared_ptr<Station> station;
    const bool members_share;
    const AdamSettings settings;
    std::vector<std::unique_ptr<Member<T>>> members;
    const std::unique_ptr<Stream> stream = std::make_unique<Stream>();
    int64_t steps = 0, pending = 0;  // those done; those under way, which are not counted there
    int64_t version = 0;             // of the weights
    std::vector<T> weights;          // on the host ...
    int64_t of_weights = -1;         // ... those of this version

    // The rows to train on, in the dtypes in which they came: there, or of the host, from where windows of them come.
    DType x_dtype = DType::f64, context_dtype = DType::f64;
    Buffer x{false, "the rows to train on"}, context{false, "their contexts"}, row_weights{false, "their weights"};
    std::unique_ptr<Windows> windows;
    int64_t all_rows = 0, row_bytes = 0;
    bool weighted = false;
    // Of an epoch: the order of the rows, what a batch takes of them, and sums of gradients.
    Buffer order{false, "the order of the rows"}, batch{false, "a batch"}, host_losses{true, "losses"}, sums{false, "sums of gradients"};
    Buffer host_gradient{true, "gradients"};

    // In the order of the flat parameters, but for a few numbers. What no mask of a lone network leaves is zero for good.
    Buffer state{false, "the weights and their moments"};
    int64_t size = 0;
    T *parameters = nullptr, *first = nullptr, *second = nullptr, *gradient = nullptr, *scale = nullptr;
    double *squares = nullptr, *losses = nullptr;
    int* halted = nullptr;

    TrainerState(const std::vector<std::shared_ptr<Weights<T>>>& given, bool shared, std::shared_ptr<Station> where,
                 const AdamSettings& settings)
        : station(std::move(where)), members_share(shared), settings(settings), size(given.at(0)->plan().parameter_count()) {
        set_members(given);
        Room room;
        int64_t places[8];
        for (int i = 0; i < 4; ++i) places[i] = room.take(size * int64_t(sizeof(T)));
        places[4] = room.take((kSquares + kSquares / kSquaresSlice + 1) * int64_t(sizeof(double)));
        places[5] = room.take(Trainer<T>::kMostSteps * int64_t(sizeof(double)));
        places[6] = room.take(int64_t(sizeof(T)));
        places[7] = room.take(int64_t(sizeof(int)));
        char* const base = state.at_least(room.size());
        T** const reals[] = {&parameters, &first, &second, &gradient};
        for (int i = 0; i < 4; ++i) *reals[i] = reinterpret_cast<T*>(base + places[i]);
        squares = reinterpret_cast<double*>(base + places[4]);
        losses = reinterpret_cast<double*>(base + places[5]);
        scale = reinterpret_cast<T*>(base + places[6]);
        halted = reinterpret_cast<int*>(base + places[7]);
        check(cudaMemsetAsync(base, 0, size_t(room.size()), *stream), "setting moments to zero");
        weights.resize(size_t(size));
        members[0]->weights->get_parameters(weights.data());
        set_parameters(std::vector<T>(weights).data());
    }
    ~TrainerState() {
        if (station->process == getpid()) cudaStreamSynchronize(*stream);
    }

    void set_members(const std::vector<std::shared_ptr<Weights<T>>>& given) {
        std::vector<std::unique_ptr<Member<T>>> made;
        int64_t most = 0;
        for (const auto& own : given) {
            made.push_back(std::make_unique<Member<T>>(own, station));
            most = std::max(most, made.back()->flow->weights_view().size);
        }
        sums.at_least((most + 1) * int64_t(sizeof(double)));
        members = std::move(made);
    }

    void send(const T* from, T* to) const {
        const size_t bytes = size_t(size) * sizeof(T);
        if (bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, *stream), "copying weights");
        check(cudaStreamSynchronize(*stream), "copying weights");
    }
    void fetch(const T* from, T* to) const {
        const size_t bytes = size_t(size) * sizeof(T);
        if (bytes) check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, *stream), "copying weights");
        check(cudaStreamSynchronize(*stream), "copying weights");
    }
    // Without what no mask leaves, where that is nobody's.
    std::vector<T> masked(const T* given) const {
        std::vector<T> result(size_t(size), T(0));
        if (members_share)
            std::copy_n(given, result.size(), result.begin());
        else
            for (uint32_t place : members[0]->weights->plan().index()) result[place] = given[place];
        return result;
    }

    void set_parameters(const T* given) {
        weights = masked(given);
        send(weights.data(), parameters);
        of_weights = ++version;
    }
    const std::vector<T>& host_weights() {
        if (of_weights != version) fetch(parameters, weights.data());
        of_weights = version;
        return weights;
    }
    // The weights as they are, where the stages of a member read them ...
    void renew(Member<T>& member) {
        if (member.on_device == version) return;
        member.repack.weights = member.scales.weights = parameters;
        Launches launches{*stream};
        launches.each(member.repack);
        launches.each(member.scales);
        if (const int64_t count = member.scales.count) launches.sum(member.shared + 1, member.shared, count, count);
        launches.done();
        member.on_device = version;
    }
    // ... and on the host.
    void renew_host(Member<T>& member) {
        if (member.on_host == version) return;
        member.weights->set_parameters(host_weights().data());
        member.on_host = version;
    }

    // At most `most` bytes of them there; if it is negative, half of what is free.
    void set_rows(const Batch& given, const double* given_weights, int64_t most, const Poll& poll) {
        const Plan& plan = members[0]->weights->plan();
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
        row_bytes = 0;
        for (const RowsIn& input : inputs) row_bytes += input.row();
        if (most < 0) {
            size_t free = 0, total = 0;
            check(cudaMemGetInfo(&free, &total), "asking for the memory that is free");
            most = int64_t(free / 2) + x.size() + context.size() + row_weights.size();
        }
        windows.reset();
        if (all_rows * row_bytes > most) {
            windows = std::make_unique<Windows>(inputs);
            return;
        }
        Buffer* const places[] = {&x, &context, &row_weights};
        std::vector<char*> to;
        for (size_t i = 0; i < inputs.size(); ++i) to.push_back(places[i]->at_least(all_rows * inputs[i].row()));
        stream_rows(
            *station, all_rows, inputs, {}, 1, 2, poll,
            [&](const std::vector<Source>& in, const std::vector<char*>&, int64_t begin, int64_t count, cudaStream_t on) {
                for (size_t i = 0; i < inputs.size(); ++i)
                    if (const int64_t row = inputs[i].row(); in[i].rows.data && row)
                        check(cudaMemcpyAsync(to[i] + begin * row, in[i].rows.data, size_t(count * row), cudaMemcpyDeviceToDevice, on),
                              "copying rows to the device");
            });
    }

    void set_order(const int64_t* given, int64_t count) {
        if (windows) {
            check(cudaStreamSynchronize(*stream), "waiting for a batch");
            windows->set_order(given, count);
        } else {
            char* const to = order.at_least(count * int64_t(sizeof(int64_t)));
            check(cudaMemcpyAsync(to, given, size_t(count) * sizeof(int64_t), cudaMemcpyHostToDevice, *stream),
                  "copying the order of the rows");
        }
        check(cudaMemsetAsync(halted, 0, sizeof *halted, *stream), "copying the order of the rows");
        check(cudaStreamSynchronize(*stream), "copying the order of the rows");
    }

    void grad(int64_t begin, int64_t count, double mass) {
        Member<T>& member = *members[size_t(steps + pending) % members.size()];
        const Plan& plan = member.weights->plan();
        renew(member);
        if (count == 0) {
            check(cudaMemsetAsync(gradient, 0, size_t(size) * sizeof(T), *stream), "setting gradients to zero");
            return check(cudaMemsetAsync(losses + pending, 0, sizeof(double), *stream), "setting gradients to zero");
        }
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
        const char* from[] = {x.data(), context.data(), row_weights.data()};
        if (windows) {
            windows->enter(begin, count, *stream);
            for (size_t i = 0; i < 3; ++i) from[i] = windows->at(i, begin);
        }
        take.x = {from[0], base + at_x, plan.features(), x_size};
        take.context = {from[1], base + at_context, plan.context(), context_size};
        take.rows = windows ? nullptr : reinterpret_cast<const int64_t*>(order.data()) + begin;
        take.weights = weighted ? reinterpret_cast<const double*>(from[2]) : nullptr;
        take.mass = mass;
        take.weight = wide(at_weight);
        take.cotangent = real(at_cotangent);
        take.count = count * (plan.features() + plan.context() + 1);
        Launches before{*stream};
        before.each(take);
        before.done();
        auto packed = [](const char* data, DType dtype, int64_t width) {
            const int64_t size = size_of(dtype);
            return Rows{data, dtype, 0, width * size, size};
        };
        Batch part;
        part.inner = count;
        part.x = packed(take.x.to, x_dtype, plan.features());
        if (plan.context()) part.context = packed(take.context.to, context_dtype, plan.context());
        const Rows cotangent = packed(base + at_cotangent, sizeof(T) == 4 ? DType::f32 : DType::f64, 1);
        double* const sums = reinterpret_cast<double*>(this->sums.data());
        if (member.together) {
            gradients_together(member, part, cotangent, real(at_value), sums);
        } else {
            Gradients<T> out;
            out.value = real(at_value);
            member.flow->launch_gradients(part, cotangent, out, sums, true, *stream);
        }
        Launches launches{*stream};
        launches.each(LossJob<T>{real(at_value), wide(at_weight), member.shared, wide(at_loss), count, kLossRows, losses_of_slices});
        launches.sum(wide(at_loss), losses + pending, losses_of_slices, losses_of_slices);
        launches.then([&] { return cudaMemsetAsync(gradient, 0, size_t(size) * sizeof(T), *stream); });
        const WeightsView<T>& view = member.flow->weights_view();
        launches.each(EntryJob<T>{view, sums, parameters, gradient, view.size});
        launches.done();
    }

    // The same where norms take the statistics of the batch: all rows go as far as a norm before any goes on, and back.
    void gradients_together(Member<T>& member, const Batch& part, const Rows& cotangent, T* values, double* sums) {
        const GradientView<T>& view = member.flow->gradient_view();
        const WeightsView<T>& of_weights = member.flow->weights_view();
        const Plan& plan = member.weights->plan();
        const std::vector<StageSpec>& stages = plan.spec().stages;
        const int64_t count = part.inner, features = plan.features(), entries = of_weights.size + 1;
        const int vectors = count >= int64_t(128) * station->processors ? 4 : count >= int64_t(64) * station->processors ? 2 : 1;
        const int64_t width = 32 * vectors, tiles = (count + width - 1) / width, groups = (count + kGroup - 1) / kGroup;
        const int64_t slices = (count + kLossRows - 1) / kLossRows, reals = int64_t(sizeof(T)), wides = int64_t(sizeof(double));
        Room room;
        const int64_t at_tiles = room.take(tiles * view.scratch), at_partial = room.take(groups * entries * reals);
        const int64_t at_slices = room.take(2 * features * slices * wides), at_sums = room.take((2 * features + 1) * wides);
        const int64_t at_statistics = room.take(2 * features * int64_t(stages.size()) * wides);
        Lent memory(*station, *stream);
        if (!memory.take(room.size(), "scratch"))
            out_of_memory(room.size(), "a batch as batch norm keeps it, which a smaller batch_size makes smaller");
        auto wide = [&](int64_t at) { return reinterpret_cast<double*>(memory.at(at)); };
        auto mean_of = [&](size_t k) { return wide(at_statistics) + 2 * features * int64_t(k); };
        double *const of_slices = wide(at_slices), *const found = wide(at_sums), *const total = found + 2 * features;
        T* const partial = reinterpret_cast<T*>(memory.at(at_partial));
        const T* const cotangents = reinterpret_cast<const T*>(cotangent.data);

        GradientJob<T> job;
        job.rows.rows = count;
        job.rows.vectors = vectors;
        job.rows.x = {part.x, count};
        job.rows.context = {part.context, count};
        job.rows.scratch = memory.at(at_tiles);
        job.rows.log_prob = values;
        job.cotangent = {cotangent, count};
        job.keeps = true;
        NormRows<T> rows{memory.at(at_tiles), view.scratch, 0, 0, count, kLanes, int(width), int(features), cotangents, total};
        Launches launches{*stream};
        auto go = [&](size_t first, size_t last, bool backward) {
            const Stretch stretch{int(first), int(last), backward};
            launches.then([&] { return cuda::launch_stretch<T>(view, job, stretch, int(tiles), *stream); });
        };
        auto look_at = [&](size_t k) {
            const int64_t variables = plan.context() * kLanes * reals;
            rows.x = member.flow->backward.x[k] + variables;
            rows.d = view.dx[k % 2] + variables;
        };
        auto moment = [&](Moment moment, const double* mean, double* out) {
            const int64_t all = (moment == Moment::gradients ? 2 : 1) * features;
            launches.each(MomentJob<T>{rows, moment, mean, of_slices, kLossRows, slices, features * slices});
            launches.then([&] { return cuda::launch_sum<double>({of_slices, out, all, slices, 1, slices, false}, *stream); });
        };
        launches.then([&] { return cuda::launch_sum<T>({cotangents, of_slices, 1, count, 1, kLossRows, false}, *stream); });
        launches.sum(of_slices, total, slices, slices);
        size_t from = 0;
        for (size_t k = 0; k < stages.size(); ++k) {
            if (!stages[k].of_batch) continue;
            double *const mean = mean_of(k), *const variance = mean + features;
            go(from, k, false);
            look_at(k);
            moment(Moment::mean, nullptr, mean);
            moment(Moment::variance, mean, variance);
            const int64_t first = member.first_scale[k];
            launches.each(
                NormJob<T>{member.scales.scales + first, parameters, mean, variance, stages[k].eps, member.scales.out + first, features});
            from = k;
        }
        go(from, stages.size(), false);
        launches.sum(member.scales.out, member.shared, member.scales.count, member.scales.count);
        size_t last = stages.size();
        for (size_t k = last; k-- > 0;) {
            if (!stages[k].of_batch) continue;
            go(k, last, true);
            last = k;
            look_at(k);
            moment(Moment::gradients, mean_of(k), found);
            launches.each(ThroughJob<T>{rows, mean_of(k), mean_of(k) + features, found, stages[k].eps, count * features});
        }
        if (last > 0) go(0, last, true);
        launches.then([&] { return cudaMemsetAsync(partial, 0, size_t(groups * entries * reals), *stream); });
        launches.then([&] { return cuda::launch_weights<T>(view, of_weights, memory.at(at_tiles), count, vectors, partial, *stream); });
        launches.then([&] { return cuda::launch_sum<T>({partial, sums, 1, groups, entries, groups, false}, *stream); });
        launches.done();
        check(memory.release(), "freeing scratch");
        member.on_device = -1;  // its norms have the statistics of this batch
    }

    void apply(double rate) {
        const AdamSettings& a = settings;
        Launches launches{*stream};
        double* norm = nullptr;
        if (a.clip_norm > 0) {
            constexpr int64_t slices = kSquares / kSquaresSlice;
            norm = squares + kSquares + slices;
            launches.each(SquaresJob<T>{gradient, parameters, T(2 * a.l2), size, squares, kSquares});
            launches.sum(squares, squares + kSquares, kSquares, kSquaresSlice);
            launches.sum(squares + kSquares, norm, slices, slices);
        }
        launches.each(JudgeJob<T>{losses + pending, norm, a.clip_norm, scale, halted, 1});
        const AdamStep<T> step = adam_step<T>(a, steps + pending + 1, rate);
        launches.each(AdamJob<T>{step, scale, gradient, halted, parameters, first, second, size});
        launches.done();
        ++version;
        ++pending;
    }

    // How many steps from `first` on have rows that travel together, if they are few enough.
    int64_t together(const Steps& all, int64_t first) const {
        const int64_t begin = first ? all.ends[first - 1] : 0, most = std::min(all.count - first, Trainer<T>::kMostSteps);
        int64_t count = std::min<int64_t>(1, most);
        while (count < most && (all.ends[first + count] - begin) * row_bytes <= kChunk) ++count;
        return count;
    }

    // Gives what `grad` has left to `total`, and takes what becomes of it.
    void sum_up(const typename Trainer<T>::Total& total) {
        const size_t bytes = size_t(size) * sizeof(T);
        T* const own = reinterpret_cast<T*>(host_gradient.at_least(int64_t(bytes)));
        double loss = 0;
        check(cudaMemcpyAsync(own, gradient, bytes, cudaMemcpyDeviceToHost, *stream), "copying a gradient");
        check(cudaMemcpyAsync(&loss, losses + pending, sizeof loss, cudaMemcpyDeviceToHost, *stream), "copying a gradient");
        check(cudaStreamSynchronize(*stream), "training");
        total(own, size, &loss);
        check(cudaMemcpyAsync(gradient, own, bytes, cudaMemcpyHostToDevice, *stream), "copying a gradient");
        check(cudaMemcpyAsync(losses + pending, &loss, sizeof loss, cudaMemcpyHostToDevice, *stream), "copying a gradient");
        check(cudaStreamSynchronize(*stream), "copying a gradient");
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
Trainer<T>::Trainer(const std::vector<std::shared_ptr<Weights<T>>>& members, bool shared, int device, const AdamSettings& settings) {
    const std::shared_ptr<Station> station = Station::of(device);
    const Current current(device);
    const PlainFloats floats;
    state_ = std::make_unique<TrainerState<T>>(members, shared, station, settings);
}

template <class T>
Trainer<T>::~Trainer() = default;

namespace {

// What each call begins with.
template <class T>
class Call {
public:
    explicit Call(const TrainerState<T>& state) : current_((check_process(*state.station), state.station->device)) {}

private:
    const Current current_;
    const PlainFloats floats_;
};

}  // namespace

template <class T>
void Trainer<T>::set_rows(const Batch& rows, const double* weights, const Poll& poll, int64_t most) {
    const Call<T> call(*state_);
    state_->set_rows(rows, weights, most, poll);
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
    return {s.gradient, s.size, s.losses + s.pending, reinterpret_cast<uintptr_t>(cudaStream_t(*s.stream))};
}

template <class T>
double Trainer<T>::epoch(const int64_t* order, int64_t rows, const Steps& steps, int64_t& done, const Poll& poll, const Total& total) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    set_order(order, rows);
    using Clock = std::chrono::steady_clock;
    constexpr std::chrono::milliseconds soon(30), late(100);
    Clock::time_point polled = Clock::now();
    auto begin_of = [&](int64_t step) { return step ? steps.ends[step - 1] : 0; };
    double sum = 0;
    done = 0;
    // As many steps between two looks as take about as long as a person may wait for Ctrl-C; each of those that others have a part in.
    for (int64_t most = 1, window = 0; done < steps.count;) {
        const Clock::time_point before = Clock::now();
        try {
            if (s.windows && done == window) {
                window += s.together(steps, done);
                if (begin_of(window) > begin_of(done)) s.windows->enter(begin_of(done), begin_of(window) - begin_of(done), *s.stream);
            }
            const int64_t last = std::min(done + (total ? 1 : most), s.windows ? window : steps.count);
            for (int64_t step = done; step < last; ++step) {
                s.grad(begin_of(step), begin_of(step + 1) - begin_of(step), steps.mass[step]);
                if (total) s.sum_up(total);
                s.apply(steps.rates[step]);
            }
            if (s.windows && window < steps.count) {  // beside these steps
                const int64_t next = window + s.together(steps, window);
                s.windows->prepare(begin_of(window), begin_of(next) - begin_of(window));
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
void Trainer<T>::log_prob(size_t member, const Batch& batch, T* out, const Poll& poll) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    Member<T>& own = *s.members.at(member);
    s.renew(own);
    s.renew_host(own);
    check(cudaStreamSynchronize(*s.stream), "waiting for weights");
    own.flow->copies[0]->view.constant = own.weights->constant();
    Job<T> job;
    job.rows = batch.rows();
    job.x = {batch.x, batch.inner};
    job.context = {batch.context, batch.inner};
    job.log_prob = out;
    own.flow->run(cuda::Operation::evaluate, job, batch.outer, batch.inner, {}, poll);
}

template <class T>
void Trainer<T>::set_members(const std::vector<std::shared_ptr<Weights<T>>>& members) {
    const Call<T> call(*state_);
    state_->set_members(members);
}

template <class T>
void Trainer<T>::set_statistics(size_t stage, const double* mean, const double* var) {
    const Call<T> call(*state_);
    TrainerState<T>& s = *state_;
    for (auto& member : s.members) {
        member->weights->set_statistics(stage, mean, var);
        member->make(s.station);
    }
}

template <class T>
int Trainer<T>::features() const {
    return state_->members[0]->weights->plan().features();
}
template <class T>
int64_t Trainer<T>::parameter_count() const {
    return state_->size;
}

template <class T>
void Trainer<T>::get_parameters(T* parameters) const {
    const Call<T> call(*state_);
    const std::vector<T>& weights = state_->host_weights();
    std::copy(weights.begin(), weights.end(), parameters);
}

template <class T>
void Trainer<T>::set_parameters(const T* parameters) {
    const Call<T> call(*state_);
    state_->set_parameters(parameters);
}

template <class T>
void Trainer<T>::get_moments(T* first, T* second) const {
    const Call<T> call(*state_);
    state_->fetch(state_->first, first);
    state_->fetch(state_->second, second);
}

template <class T>
void Trainer<T>::set_moments(const T* first, const T* second) {
    const Call<T> call(*state_);
    state_->send(state_->masked(first).data(), state_->first);
    state_->send(state_->masked(second).data(), state_->second);
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
