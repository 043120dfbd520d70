// The core without Python: what sanitizers run. Threads, fork, every instruction set, odd sizes, gradients and training.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

using namespace fastmaf;

namespace {

int passed = 0, failed = 0;

void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok) std::fprintf(stderr, "line %d: %s\n", line, what);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

Columns plain_columns(int n) {
    Columns columns;
    columns.kind.assign(size_t(n), Bijection::identity);
    columns.lower.assign(size_t(n), -INFINITY);
    columns.upper.assign(size_t(n), INFINITY);
    columns.loc.assign(size_t(n), 0.25);
    columns.scale.assign(size_t(n), 0.5);
    return columns;
}

FlowSpec make_spec(int features, int context, const std::vector<int>& hidden, int mades, Activation activation, std::mt19937& rng) {
    FlowSpec spec;
    spec.features = features;
    spec.context = context;
    spec.columns = plain_columns(features);
    spec.context_columns = plain_columns(context);
    for (int k = 0; k < mades; ++k) {
        MadeSpec made;
        made.activation = activation;
        made.clip = 2;
        for (int i = 0; i < features; ++i) {
            made.ranks.push_back(i + 1);
            made.variable.push_back(i);
        }
        std::shuffle(made.ranks.begin(), made.ranks.end(), rng);
        int inputs = features;
        for (int width : hidden) {
            MapSpec map;
            map.rows = width;
            map.inputs = inputs;
            map.context = made.maps.empty() && context > 0;
            for (int u = 0; u < width; ++u) map.degrees.push_back(int64_t(rng() % unsigned(features)));
            made.maps.push_back(map);
            inputs = width;
        }
        made.maps.push_back({2 * features, inputs, {}, made.maps.empty() && context > 0});
        spec.mades.push_back(made);
    }
    for (int i = 0; i < features; ++i) spec.noise_variable.push_back(i);
    return spec;
}

template <class T>
std::shared_ptr<Program<T>> make_program(const FlowSpec& spec, std::mt19937& rng) {
    auto program = std::make_shared<Program<T>>(spec);
    std::vector<T> parameters(size_t(program->parameter_count()));
    std::normal_distribution<double> normal(0, 0.3);
    for (T& p : parameters) p = T(normal(rng));
    program->set_parameters(parameters.data());
    return program;
}

template <class T>
std::vector<T> normals(size_t n, std::mt19937& rng) {
    std::vector<T> values(n);
    std::normal_distribution<double> normal;
    for (T& v : values) v = T(normal(rng));
    return values;
}

template <class T>
Rows rows_of(const std::vector<T>& values, int width) {
    Rows rows;
    rows.data = reinterpret_cast<const char*>(values.data());
    rows.dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
    rows.inner = width * int(sizeof(T));
    rows.column = sizeof(T);
    return rows;
}

template <class T>
void round_trips(int features, int context, const std::vector<int>& hidden, Activation activation) {
    std::mt19937 rng(unsigned(7 * features + context));
    const auto program = make_program<T>(make_spec(features, context, hidden, 3, activation, rng), rng);
    const T tolerance = sizeof(T) == 4 ? T(2e-3) : T(1e-9);
    for (int64_t n : {1, 2, 3, 15, 16, 17, 47, 48, 49, 191, 400}) {
        const auto u = normals<T>(size_t(n * features), rng), c = normals<T>(size_t(n * std::max(1, context)), rng);
        std::vector<T> x(u.size()), back(u.size()), density(size_t(n), T(0)), value(size_t(n), T(0)), dx(u.size()), dc(c.size());
        Batch batch;
        batch.inner = n;
        batch.x = rows_of(u, features);
        batch.context = rows_of(c, context);
        from_noise<T>(*program, batch, x.data(), {});
        batch.x = rows_of(x, features);
        to_noise<T>(*program, batch, back.data(), {});
        log_prob<T>(*program, batch, density.data(), {});
        T worst = 0;
        for (size_t i = 0; i < u.size(); ++i) worst = std::max(worst, std::fabs(back[i] - u[i]));
        CHECK(worst < tolerance);
        const std::vector<T> ones(size_t(n), T(1));
        std::vector<T> parameters(size_t(program->parameter_count()));
        vjp<T>(*program, batch, ones.data(), value.data(), dx.data(), context ? dc.data() : nullptr, parameters.data(), {});
        for (int64_t i = 0; i < n; ++i) CHECK(std::fabs(value[size_t(i)] - density[size_t(i)]) <= tolerance * (1 + std::fabs(density[size_t(i)])));
        // Rows alone give the bits they give among others.
        for (int64_t i : {int64_t(0), n / 2, n - 1}) {
            Batch one = batch;
            one.inner = 1;
            one.x.data += i * one.x.inner;
            one.context.data += i * one.context.inner;
            T alone = 0;
            log_prob<T>(*program, one, &alone, {});
            CHECK(alone == density[size_t(i)]);
        }
    }
}

template <class T>
std::vector<T> draw(const Program<T>& program, int64_t n, uint64_t offset = 0) {
    Draw request;
    request.rows = n;
    request.seed = 11;
    request.offset = offset;
    std::vector<T> x(size_t(n * program.features())), density(size_t(n), T(0));
    sample<T>(program, request, x.data(), density.data(), {});
    x.insert(x.end(), density.begin(), density.end());
    return x;
}

void many_callers() {
    std::mt19937 rng(3);
    const auto program = make_program<float>(make_spec(6, 0, {40, 33}, 3, Activation::relu, rng), rng);
    const auto expected = draw(*program, 500);
    std::vector<std::thread> threads;
    std::vector<int> equal(8, 0);
    for (int t = 0; t < 8; ++t)
        threads.emplace_back([&, t] {
            bool same = true;
            for (int repeat = 0; repeat < 20; ++repeat) same = same && draw(*program, 500) == expected;
            equal[size_t(t)] = same;
        });
    for (auto& thread : threads) thread.join();
    for (int same : equal) CHECK(same == 1);
}

void after_fork() {
    std::mt19937 rng(4);
    const auto program = make_program<double>(make_spec(5, 0, {20}, 2, Activation::tanh, rng), rng);
    const auto expected = draw(*program, 300);
    const pid_t child = fork();
    if (child == 0) _exit(draw(*program, 300) == expected ? 0 : 1);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

template <class T>
std::vector<T> train(int threads, const char* set) {
    set_num_threads(threads);
    set_isa(set);
    std::mt19937 rng(5);
    const auto program = make_program<T>(make_spec(5, 2, {30, 17}, 2, Activation::silu, rng), rng);
    const int64_t n = 230;
    const auto x = normals<T>(size_t(n * 5), rng), c = normals<T>(size_t(n * 2), rng);
    std::vector<int64_t> order(static_cast<size_t>(n));
    shuffle(9, 3, 0, n, order.data());
    Batch batch;
    batch.inner = n;
    batch.x = rows_of(x, 5);
    batch.context = rows_of(c, 2);
    batch.index = order.data();
    AdamSettings settings;
    settings.l2 = 1e-4;
    settings.clip_norm = 5;
    Trainer<T> trainer(program, settings);
    const std::vector<double> rates(5, 1e-2);
    double first = 0, last = 0;
    int64_t done = 0;
    for (int epoch = 0; epoch < 20; ++epoch) {
        last = trainer.epoch(batch, nullptr, 50, rates.data(), 1.0, done, {});
        if (epoch == 0) first = last;
        CHECK(done == 5);
    }
    CHECK(last < first);
    std::vector<T> parameters(size_t(program->parameter_count()));
    program->get_parameters(parameters.data());
    return parameters;
}

void errors() {
    int caught = 0;
    try {
        set_num_threads(0);
    } catch (const std::invalid_argument&) {
        ++caught;
    }
    try {
        set_isa("sse9");
    } catch (const std::invalid_argument&) {
        ++caught;
    }
    try {
        parallel_for(100, [](int64_t task) {
            if (task == 57) throw std::runtime_error("57");
        });
    } catch (const std::runtime_error& error) {
        caught += std::string(error.what()) == "57";
    }
    CHECK(caught == 3);
}

}  // namespace

int main() {
    set_num_threads(2);
    for (const bool poison : {false, true}) {
        set_poison(poison);
        for (const std::string& name : available_isas()) {
            set_isa(name);
            round_trips<float>(6, 0, {100, 100}, Activation::relu);
            round_trips<float>(1, 3, {5}, Activation::tanh);
            round_trips<double>(2, 0, {}, Activation::elu);
            round_trips<double>(21, 2, {10, 40, 7}, Activation::gelu);
            round_trips<float>(33, 0, {20, 70}, Activation::silu);
        }
    }
    set_poison(false);
    const auto whole = [] {
        std::mt19937 rng(6);
        return make_program<float>(make_spec(4, 0, {25}, 2, Activation::relu, rng), rng);
    }();
    const auto all = draw(*whole, 101);
    for (int threads : {1, 2, 7}) {
        set_num_threads(threads);
        CHECK(draw(*whole, 101) == all);
    }
    many_callers();
    after_fork();
    const auto isas = available_isas();
    for (const char* name : {"avx2", "avx512"}) {
        if (std::find(isas.begin(), isas.end(), name) == isas.end()) continue;
        const auto expected = train<float>(1, "avx2");
        for (int threads : {1, 2, 7}) CHECK(train<float>(threads, name) == expected);
    }
    train<double>(2, "baseline");
    errors();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
