// Training on a device, over the runtime of runtime.cpp: beside the trainer of the CPU, in parts, and when something is missing.
#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "batches.hpp"
#include "device.hpp"

namespace {

// A Linear and a norm in front, whose scales all rows share.
FlowSpec scaled(int features, int context) {
    FlowSpec spec = small(features, context);
    StageSpec linear, norm;
    linear.output = Output::linear;
    norm.output = Output::norm;
    for (int i = 0; i < features; ++i) {
        linear.variable.push_back((i + 2) % features);
        norm.variable.push_back(i);
        norm.mean.push_back(0.1 * i);
        norm.var.push_back(0.5 + 0.1 * i);
    }
    norm.trainable = true;
    norm.eps = 1e-3;
    spec.stages.insert(spec.stages.begin(), {linear, norm});
    return spec;
}

// Norms with the statistics of the batch at both ends and in between.
FlowSpec normed(int features, int context) {
    FlowSpec spec = scaled(features, context);
    StageSpec norm = spec.stages[1];
    norm.of_batch = true;
    spec.stages = {norm, spec.stages[0], spec.stages[2], norm, norm, spec.stages[3], norm};
    return spec;
}

// Another order of the variables, and of the degrees: other masks on the same arrays.
FlowSpec turned(FlowSpec spec) {
    for (StageSpec& stage : spec.stages) {
        for (int64_t& rank : stage.ranks) rank = spec.features + 1 - rank;
        for (MapSpec& map : stage.maps)
            std::rotate(map.degrees.begin(), map.degrees.begin() + (map.degrees.empty() ? 0 : 2), map.degrees.end());
    }
    return spec;
}

struct Course {
    const char* name;
    std::vector<FlowSpec> members;
    AdamSettings settings;
    bool weighted;
};

std::vector<Course> courses() {
    AdamSettings careful;
    careful.l2 = 1e-2;
    careful.weight_decay = 0.1;
    careful.clip_norm = 0.5;
    AdamSettings blunt;  // a small eps would follow the rounding of gradients that are zero
    blunt.eps = careful.eps = 1e-3;
    return {{"small", {small(5, 2)}, blunt, false},
            {"rich", {rich(4, 2)}, careful, true},
            {"without context", {small(3, 0)}, careful, false},
            {"scaled", {scaled(4, 1)}, careful, true},
            {"norms of the batch", {normed(5, 2)}, careful, true},
            {"members with norms of the batch", {normed(4, 1), turned(normed(4, 1)), normed(4, 1)}, blunt, false},
            {"members", {rich(4, 1), turned(rich(4, 1)), rich(4, 1)}, careful, true}};
}

constexpr int64_t kBatch = 600;  // more rows than may go together where memory is short

template <class T>
struct Session {
    static constexpr int64_t kRows = 1100;
    std::vector<std::shared_ptr<Weights<T>>> members;
    std::shared_ptr<Weights<T>> weights;  // of the first one
    std::vector<T> start;
    Reals x, context, shares;
    std::vector<int64_t> order;
    AdamSettings settings;
    double mean = 0;
    int64_t done = 0;

    explicit Session(const Course& course) : settings(course.settings) {
        for (const FlowSpec& spec : course.members) members.push_back(std::make_shared<Weights<T>>(spec));
        weights = members[0];
        std::mt19937 rng(3);
        std::normal_distribution<double> normal;
        const int features = course.members[0].features;
        start.resize(size_t(weights->plan().parameter_count()));
        for (T& p : start) p = T(0.3 * normal(rng));
        size_t at = 0;
        for (const StageSpec& stage : course.members[0].stages) {
            if (stage.output == Output::norm) at += 2 * size_t(features);
            if (stage.output != Output::linear) continue;
            for (int i = 0; i < features; ++i) start[at + size_t(features * features + i * features + i)] += 1;  // pivots
            break;
        }
        x.resize(size_t(kRows * features));
        context.resize(size_t(kRows * course.members[0].context));
        for (double& v : x) v = normal(rng);
        for (double& v : context) v = normal(rng);
        if (course.weighted)
            for (int64_t i = 0; i < kRows; ++i) shares.push_back(0.5 + double(i % 4));
        order.resize(size_t(kRows) - 30);
        std::vector<int64_t> all(size_t{kRows});
        shuffle(9, 3, 0, kRows, all.data());
        std::copy_n(all.begin(), order.size(), order.begin());
        mean = course.weighted ? 2 : 1;
        reset();
    }
    void reset() {
        for (auto& member : members) member->set_parameters(start.data());
    }

    Batch rows() const {
        Batch batch;
        batch.inner = kRows;
        batch.x = rows_of(x.data(), weights->plan().features());
        batch.context = rows_of(context.data(), weights->plan().context());
        return batch;
    }
    const double* weights_of_rows() const { return shares.empty() ? nullptr : shares.data(); }

    // A trainer of a copy of the weights, with the rows.
    std::unique_ptr<device::Trainer<T>> on_device(int device = 0, int64_t most = -1) const {
        auto trainer = std::make_unique<device::Trainer<T>>(copies(), members.size() > 1, device, settings);
        if (members.size() > 1) trainer->set_parameters(start.data());
        trainer->set_rows(rows(), weights_of_rows(), {}, most);
        return trainer;
    }
    std::unique_ptr<Trainer<T>> on_host() const {
        auto trainer = std::make_unique<Trainer<T>>(copies(), members.size() > 1, settings);
        if (members.size() > 1) trainer->set_parameters(start.data());
        return trainer;
    }
    std::vector<std::shared_ptr<Weights<T>>> copies() const {
        std::vector<std::shared_ptr<Weights<T>>> result;
        for (const auto& member : members) result.push_back(std::make_shared<Weights<T>>(*member));
        return result;
    }
    double epoch(device::Trainer<T>& trainer, int64_t batch_size, double rate, const Poll& poll = {}) {
        const int64_t count = int64_t(order.size());
        return trainer.epoch(order.data(), count, Batches(count, batch_size, Reals(order.size(), rate), mean), done, poll);
    }
    double epoch(Trainer<T>& trainer, int64_t batch_size, double rate) {
        Batch batch = rows();
        batch.index = order.data();
        batch.inner = int64_t(order.size());
        return trainer.epoch(batch, weights_of_rows(), Batches(batch.inner, batch_size, Reals(order.size(), rate), mean), done, {});
    }
};

template <class T>
struct State {
    std::vector<T> parameters, first, second;
    int64_t steps;
    template <class Any>
    explicit State(const Any& trainer)
        : parameters(size_t(trainer.parameter_count())), first(parameters), second(parameters), steps(trainer.steps()) {
        trainer.get_parameters(parameters.data());
        trainer.get_moments(first.data(), second.data());
    }
    template <class Any>
    void give(Any& trainer) const {
        trainer.set_parameters(parameters.data());
        trainer.set_moments(first.data(), second.data());
        trainer.set_steps(steps);
    }
    bool operator==(const State& o) const {
        return parameters == o.parameters && first == o.first && second == o.second && steps == o.steps;
    }
};

template <class T>
double distance(const std::vector<T>& a, const std::vector<T>& b) {
    double worst = 0;
    for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(double(a[i]) - double(b[i])));
    return a.size() == b.size() && std::isfinite(worst) ? worst : INFINITY;
}

// Ends where the CPU ends, in the same bits every time, whatever it is cut into.
template <class T>
void beside_the_cpu(const Course& course) {
    Session<T> of(course);
    const auto host = of.on_host();
    const auto trainer = of.on_device(), other = of.on_device(1), streamed = of.on_device(0, 0);
    // Twelve steps at a rate of 1e-2 with an eps that bounds what a step makes of an error in the gradient.
    const double limit = sizeof(T) == 4 ? 2e-4 : 1e-11;
    bool close = true;
    std::unique_ptr<State<T>> half;
    for (int epoch = 0; epoch < 4; ++epoch) {
        const double expected = of.epoch(*host, kBatch, 1e-2), made = of.epoch(*trainer, kBatch, 1e-2),
                     again = of.epoch(*other, kBatch, 1e-2), in_windows = of.epoch(*streamed, kBatch, 1e-2);
        close = close && of.done == 2 && std::fabs(made - expected) <= 1100 * limit && made == again && made == in_windows;
        if (epoch == 1) half = std::make_unique<State<T>>(*trainer);
    }
    const State<T> end(*trainer), of_host(*host);
    const bool right = close && distance(end.parameters, of_host.parameters) <= limit && distance(end.first, of_host.first) <= limit &&
                       end.steps == of_host.steps;
    if (!right)
        std::fprintf(stderr, "%s, %d bytes: parameters %g, moments %g\n", course.name, int(sizeof(T)),
                     distance(end.parameters, of_host.parameters), distance(end.first, of_host.first));
    CHECK(right);
    CHECK(State<T>(*other) == end && State<T>(*streamed) == end);
    // Small batches, many of which come together; and back to rows that lie there.
    of.epoch(*other, 7, 1e-3);
    of.epoch(*streamed, 7, 1e-3);
    CHECK(State<T>(*other) == State<T>(*streamed));
    streamed->set_rows(of.rows(), of.weights_of_rows(), {});
    of.epoch(*other, 7, 1e-3);
    of.epoch(*streamed, 7, 1e-3);
    CHECK(State<T>(*other) == State<T>(*streamed));
    // What comes out of the middle goes on to the same end, in as little memory as there may be; and on the CPU.
    bool enough = true;
    for (int64_t bytes = int64_t(16) << 20; enough; bytes = bytes * 3 / 4) {
        const auto resumed = of.on_device();
        half->give(*resumed);
        runtime_limit(bytes);
        const std::string error = error_of([&] {
            of.epoch(*resumed, kBatch, 1e-2);
            of.epoch(*resumed, kBatch, 1e-2);
        });
        runtime_limit(int64_t(1) << 40);
        enough = error.empty();
        CHECK(enough ? State<T>(*resumed) == end : contains(error, "is out of memory"));
    }
    const auto on_host = of.on_host();
    half->give(*on_host);
    of.epoch(*on_host, kBatch, 1e-2);
    of.epoch(*on_host, kBatch, 1e-2);
    CHECK(distance(State<T>(*on_host).parameters, end.parameters) <= limit);
    // Densities under the weights as they are.
    std::vector<T> values(size_t{Session<T>::kRows}), expected(values);
    for (const std::vector<T>& weights : {end.parameters, of.start}) {
        trainer->set_parameters(weights.data());
        for (size_t m = 0; m < of.members.size(); ++m) {
            trainer->log_prob(m, of.rows(), values.data(), {});
            of.members[m]->set_parameters(weights.data());
            log_prob<T>(*of.members[m], of.rows(), expected.data(), {});
            CHECK(distance(values, expected) <= (sizeof(T) == 4 ? 1e-4 : 1e-11));
        }
    }
    // Other members go on with the weights.
    if (of.members.size() < 2) return;
    std::reverse(of.members.begin(), of.members.end());
    of.members.pop_back();
    of.start = end.parameters;
    const auto fewer = of.on_host();
    end.give(*trainer);
    end.give(*fewer);
    trainer->set_members(of.copies());
    of.epoch(*fewer, kBatch, 1e-2);
    of.epoch(*trainer, kBatch, 1e-2);
    CHECK(distance(State<T>(*fewer).parameters, State<T>(*trainer).parameters) <= limit);
    CHECK(State<T>(*trainer).parameters != end.parameters);
}

// Two trainers with half of a batch each, whose gradients are summed up between the halves of a step, are one with all of it.
void in_two_places() {
    Session<double> of(courses()[1]);
    const int64_t rows = int64_t(of.order.size()), half = rows / 2;
    const double mass = double(rows) * of.mean;
    const auto whole = of.on_device(), first = of.on_device(), second = of.on_device(1, 0);
    whole->set_order(of.order.data(), rows);
    first->set_order(of.order.data(), half);
    second->set_order(of.order.data() + half, rows - half);
    double sum = 0, parts = 0, others = 0;
    for (int step = 0; step < 3; ++step) {
        whole->grad(0, rows, mass);
        whole->apply(1e-2);
        first->grad(0, half, mass);
        second->grad(0, rows - half, mass);
        const device::StepArrays<double> a = first->arrays(), b = second->arrays();
        device::synchronize(0, a.stream);
        device::synchronize(1, b.stream);
        for (int64_t i = 0; i < a.size; ++i) a.gradient[i] = b.gradient[i] = a.gradient[i] + b.gradient[i];
        *a.loss = *b.loss = *a.loss + *b.loss;
        first->apply(1e-2);
        second->apply(1e-2);
    }
    CHECK(whole->look(sum) == 3 && first->look(parts) == 3 && second->look(others) == 3);
    CHECK(std::fabs(sum - parts) < 1e-9 && parts == others);
    const State<double> end(*whole), one(*first);
    CHECK(one == State<double>(*second) && distance(one.parameters, end.parameters) < 1e-12);
}

// And so are several whose epochs meet at each step, one without rows in some batches; one holds its rows on the host.
void in_three_places() {
    Session<double> of(courses()[3]);
    const int64_t rows = int64_t(of.order.size());
    const auto whole = of.on_device();
    const Batches batches(rows, 100, Reals(size_t(rows), 1e-2), of.mean);
    const Steps steps = batches;
    int64_t done = 0;
    const double expected = whole->epoch(of.order.data(), rows, steps, done, {});
    std::unique_ptr<device::Trainer<double>> parts[3] = {of.on_device(), of.on_device(1), of.on_device(0, 0)};
    std::vector<int64_t> order[3], ends[3];
    for (int64_t step = 0, i = 0; step < steps.count; ++step) {
        for (; i < steps.ends[step]; ++i) order[step % 2 ? i % 3 : i % 2].push_back(of.order[size_t(i)]);
        for (int k = 0; k < 3; ++k) ends[k].push_back(int64_t(order[k].size()));
    }
    std::mutex mutex;
    std::condition_variable changed;
    int arrived = 0, round = 0;
    Reals sums, shown;
    auto meet = [&](double* gradient, int64_t size, double* loss) {
        std::unique_lock<std::mutex> lock(mutex);
        sums.resize(size_t(size) + 1);
        for (int64_t i = 0; i < size; ++i) sums[size_t(i)] += gradient[i];
        sums.back() += *loss;
        const int now = round;
        if (++arrived == 3) {
            shown = sums;
            std::fill(sums.begin(), sums.end(), 0.0);
            arrived = 0;
            ++round;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return round > now; });
        }
        std::copy_n(shown.begin(), size, gradient);
        *loss = shown.back();
    };
    std::vector<std::thread> threads;
    Reals found(3);
    for (size_t k = 0; k < 3; ++k)
        threads.emplace_back([&, k] {
            int64_t own_done = 0;
            const Steps own{steps.count, ends[k].data(), steps.mass, steps.rates};
            found[k] = parts[k]->epoch(order[k].data(), int64_t(order[k].size()), own, own_done, {}, meet);
            CHECK(own_done == steps.count);
        });
    for (auto& thread : threads) thread.join();
    const State<double> end(*whole), first(*parts[0]);
    CHECK(distance(first.parameters, end.parameters) < 1e-11 && first == State<double>(*parts[1]) && first == State<double>(*parts[2]));
    CHECK(std::fabs(found[0] - expected) < 1e-9 && found[1] == found[0] && found[2] == found[0]);
}

void when_something_is_wrong() {
    Session<float> of(courses()[0]);
    const auto trainer = of.on_device(), same = of.on_device();
    const auto host = of.on_host();
    // A step too far: the next loss is no number, and no step is made behind it.
    Reals rates(of.order.size(), 1e-3);
    rates[3] = 1e30;
    int64_t done = 0, of_host = 0;
    const int64_t all = int64_t(of.order.size());
    const double sum = trainer->epoch(of.order.data(), all, Batches(all, 50, rates, 1), done, {});
    Batch batch = of.rows();
    batch.index = of.order.data();
    batch.inner = int64_t(of.order.size());
    host->epoch(batch, nullptr, Batches(batch.inner, 50, rates, 1), of_host, {});
    CHECK(done == of_host && done == 4 && std::isfinite(sum) && trainer->steps() == 4);
    same->epoch(of.order.data(), 200, Batches(200, 50, Reals(rates.begin(), rates.begin() + 4), 1), done, {});
    CHECK(done == 4 && State<float>(*same) == State<float>(*trainer));
    State<float>(*of.on_device()).give(*trainer);
    CHECK(std::isfinite(of.epoch(*trainer, 50, 1e-3)) && of.done == 22);

    // A poll that throws; the order of the rows; statistics.
    const Poll impatient = [] { throw std::runtime_error("enough"); };
    CHECK(error_of([&] {
              for (;;) of.epoch(*trainer, 1, 1e-3, impatient);
          }) == "enough");
    const int64_t beyond[] = {3, 1100};
    bool refused = false;
    try {
        trainer->set_order(beyond, 2);
    } catch (const std::invalid_argument& error) { refused = contains(error.what(), "row 1100 is not among the 1100 rows"); }
    CHECK(refused);
    Session<double> norms(courses()[3]);
    const auto other = norms.on_device();
    norms.epoch(*other, kBatch, 1e-2);
    const Reals mean{0.3, 0.2, 0.1, 0}, var{2, 1, 3, 0.5};
    const State<double> before(*other);
    other->set_statistics(1, mean.data(), var.data());
    CHECK(State<double>(*other) == before);
    norms.weights->set_parameters(before.parameters.data());
    norms.weights->set_statistics(1, mean.data(), var.data());
    Reals values(1100), expected(1100);
    other->log_prob(0, norms.rows(), values.data(), {});
    log_prob<double>(*norms.weights, norms.rows(), expected.data(), {});
    CHECK(distance(values, expected) < 1e-11);
    const auto beside = norms.on_host();
    before.give(*beside);
    CHECK(std::fabs(norms.epoch(*other, kBatch, 1e-2) - norms.epoch(*beside, kBatch, 1e-2)) < 1e-9);
    CHECK(distance(State<double>(*other).parameters, State<double>(*beside).parameters) < 1e-11);

    CHECK(contains(error_of([&] { of.on_device(2); }), "there is no cuda:2 here; GPUs: 2"));

    // Memory and the device. Rows are there if they may be, and come in pieces where they would take more than half of what is free.
    const auto rowless = of.on_device(0, 0);
    runtime_limit(3000);
    CHECK(contains(error_of([&] { rowless->set_rows(of.rows(), nullptr, {}, int64_t(1) << 40); }), "is out of memory"));
    CHECK(error_of([&] { rowless->set_rows(of.rows(), nullptr, {}); }) == "");
    CHECK(contains(error_of([&] { of.on_device(); }), "is out of memory"));
    runtime_limit(20000);
    const auto late = [&] { of.epoch(*trainer, 600, 1e-3); };
    CHECK(contains(error_of(late), "is out of memory"));
    runtime_limit(int64_t(1) << 40);
    late();
    CHECK(of.done == 2);
    runtime_break(cudaErrorIllegalAddress);
    CHECK(contains(error_of(late), "the device is lost to this process"));
}

}  // namespace

int main() {
    for (const Course& course : courses()) {
        beside_the_cpu<float>(course);
        beside_the_cpu<double>(course);
    }
    in_two_places();
    in_three_places();
    when_something_is_wrong();
    CHECK(runtime_blocks() == 0);  // nothing stays
    {
        runtime_pools(false);
        beside_the_cpu<double>(courses()[0]);
        runtime_pools(true);
    }
    CHECK(runtime_blocks() == 0);
    std::printf("%d passed, %d failed\n", passed.load(), failed.load());
    return failed ? 1 : 0;
}
