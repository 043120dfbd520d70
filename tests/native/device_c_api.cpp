// libfastmaf on a GPU, over the runtime of runtime.cpp: what evaluators there give beside those of the CPU, where arrays may lie, streams, threads
// over one model, every error. Arguments: files of flows.
#include <fastmaf.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "runtime.hpp"

using namespace fastmaf;

namespace {

std::atomic<int> passed{0}, failed{0};

void check(bool ok, const std::string& what, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed.load() <= 40) std::fprintf(stderr, "line %d: %s\n", line, what.c_str());
}
#define CHECK(condition) check(condition, #condition, __LINE__)

constexpr int kHost = -1;
constexpr int64_t kRows = 900;  // several chunks
using Reals = std::vector<double>;

struct Model {
    fastmaf_model* get = nullptr;
    explicit Model(const char* path) {
        char text[300];
        if (fastmaf_model_open(path, &get, text, sizeof text)) check(false, text, __LINE__);
    }
    ~Model() { fastmaf_model_free(get); }
    operator const fastmaf_model*() const { return get; }
};

struct Evaluator {
    fastmaf_evaluator* get = nullptr;
    explicit Evaluator(const fastmaf_model* model) { made(fastmaf_evaluator_create(model, 1, &get, text, sizeof text)); }
    Evaluator(const fastmaf_model* model, int device, fastmaf_precision precision) {
        made(fastmaf_evaluator_create_on_device(model, device, precision, &get, text, sizeof text));
    }
    ~Evaluator() { fastmaf_evaluator_free(get); }
    Evaluator(const Evaluator&) = delete;
    operator fastmaf_evaluator*() const { return get; }
    // Whether a call was refused so, with these words in its text.
    bool refuses(fastmaf_status status, fastmaf_status expected, const char* words) const {
        const char* const said = fastmaf_message(get);
        const bool as_expected = status == expected && std::strstr(said, words) && std::strlen(said) <= 200;
        if (!as_expected) std::fprintf(stderr, "status %d: %s\n", status, said);
        return as_expected;
    }

private:
    char text[300] = "";
    void made(fastmaf_status status) { check(status == FASTMAF_OK, text, __LINE__); }
};

// Bytes of the host or of a device, all of them 0xFF: numbers are NaN.
struct Memory {
    void* data = nullptr;
    Memory(size_t bytes, int device) : bytes(bytes), device(device) {
        if (device == kHost) {
            data = std::malloc(bytes + 1);
            std::memset(data, 0xFF, bytes + 1);
        } else {
            cudaSetDevice(device);
            cudaMalloc(&data, bytes + 1);
            cudaSetDevice(0);
        }
    }
    ~Memory() { device == kHost ? std::free(data) : void(cudaFree(data)); }
    Memory(const Memory&) = delete;
    bool untouched() const {
        const char* const begin = static_cast<const char*>(data);
        return std::all_of(begin, begin + bytes, [](char c) { return c == char(0xFF); });
    }
    const size_t bytes;
    const int device;
};

size_t size_of(fastmaf_dtype dtype) { return dtype == FASTMAF_FLOAT32 ? 4 : 8; }

void put(void* data, fastmaf_dtype dtype, int64_t at, double value) {
    if (dtype == FASTMAF_FLOAT32)
        static_cast<float*>(data)[at] = float(value);
    else
        static_cast<double*>(data)[at] = value;
}

// Numbers of `rows` x `columns` to be read: by rows, or column by column, backwards, with every other place left free.
struct Input {
    Memory memory;
    fastmaf_array array{};
    Input(const Reals& values, int64_t rows, int64_t columns, int64_t of_group, fastmaf_dtype dtype, bool strided, int device)
        : memory(size_t(2 * rows * columns) * size_of(dtype), device) {
        array = fastmaf_rows(memory.data, dtype, of_group, columns);
        int64_t first = 0;
        if (strided) {
            first = 2 * rows * (columns - 1);
            array = {static_cast<char*>(memory.data) + size_t(first) * size_of(dtype), dtype, 2 * of_group, 2, -2 * rows};
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                put(memory.data, dtype, first + r * array.row_stride + c * array.column_stride, values[size_t(r * columns + c)]);
    }
};

struct Output {
    Memory memory;
    fastmaf_output array{};
    int64_t rows, columns;
    Output(int64_t rows, int64_t columns, fastmaf_dtype dtype, bool strided, int device)
        : memory(size_t(rows * columns) * size_of(dtype), device), rows(rows), columns(columns) {
        array = fastmaf_into(memory.data, dtype, columns);
        if (strided) array = {memory.data, dtype, 1, rows};
    }
    Reals values() const {
        Reals result;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                const int64_t at = r * array.row_stride + c * array.column_stride;
                result.push_back(array.dtype == FASTMAF_FLOAT32 ? double(static_cast<const float*>(array.data)[at])
                                                                : static_cast<const double*>(array.data)[at]);
            }
        return result;
    }
};

enum class Contexts { by_row, shared, by_group };

struct Layout {
    int device = kHost;  // where arrays lie
    Contexts contexts = Contexts::by_row;
    fastmaf_dtype in = FASTMAF_FLOAT64;  // dtype of inputs
    bool strided = false;                // inputs
    bool other = false;                  // outputs: another dtype than the model's, column by column
    bool single = false;                 // samples in float
};

// What every call that a GPU has gives.
struct Results {
    Reals log_prob, noise, x, probabilities, samples, density, value, d_x, d_context;
    bool late = true;  // nothing was written before the stream was waited for
};

Results evaluate(const fastmaf_model* model, fastmaf_evaluator* evaluator, const Reals& rows_of_x, const Reals& rows_of_context,
                 const Layout& layout, cudaStream_t stream = nullptr) {
    Results results;
    const int64_t features = fastmaf_model_features(model), width = fastmaf_model_context_features(model),
                  most = fastmaf_model_most_values(model);
    const int64_t groups = layout.contexts == Contexts::by_group ? 3 : 1, rows = kRows / groups, n = groups * rows;
    const fastmaf_dtype own = fastmaf_model_dtype(model), dtype = layout.other ? fastmaf_dtype(1 - own) : own;
    const fastmaf_dtype of_samples = layout.single ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64;
    const Input x(rows_of_x, n, features, rows, layout.in, layout.strided, layout.device);
    Input contexts(rows_of_context, std::max<int64_t>(1, n), std::max<int64_t>(1, width), rows, layout.in, layout.strided, layout.device);
    fastmaf_array of_draws = contexts.array;
    if (layout.contexts == Contexts::shared) contexts.array.row_stride = contexts.array.group_stride = 0;
    if (layout.contexts == Contexts::by_group) contexts.array.row_stride = 0;
    if (layout.contexts != Contexts::by_group) of_draws.group_stride = of_draws.row_stride;  // one of each row
    const fastmaf_array *const c = width ? &contexts.array : nullptr, *const of_contexts = width ? &of_draws : nullptr;
    const int64_t drawn = layout.contexts == Contexts::by_row && width ? n : groups;  // contexts

    auto get = [&](int64_t columns, fastmaf_dtype kind, auto call) {
        Output out(n, columns, kind, layout.other, layout.device);
        const fastmaf_status status = call(&out.array);
        if (status) check(false, fastmaf_message(evaluator), __LINE__);
        if (layout.device != kHost) {
            results.late = results.late && out.memory.untouched();
            if (stream) {
                cudaStreamSynchronize(nullptr);
                results.late = results.late && out.memory.untouched();
            }
            cudaStreamSynchronize(stream);
        }
        return out.values();
    };
    results.log_prob =
        get(1, dtype, [&](const fastmaf_output* out) { return fastmaf_log_prob(evaluator, groups, rows, &x.array, c, out); });
    results.samples = get(features, of_samples, [&](const fastmaf_output* out) {
        return fastmaf_sample(evaluator, drawn, n / drawn, of_contexts, 5, 1000, 7, out, nullptr);
    });
    Output density(n, 1, dtype, layout.other, layout.device);
    const Reals again = get(features, of_samples, [&](const fastmaf_output* out) {
        return fastmaf_sample(evaluator, drawn, n / drawn, of_contexts, 5, 1000, 7, out, &density.array);
    });
    CHECK(again == results.samples);
    results.density = density.values();
    Output d_context(layout.contexts == Contexts::by_row ? n : groups, std::max<int64_t>(1, width), dtype, layout.other, layout.device);
    Output d_x(n, features, dtype, layout.other, layout.device);
    results.value = get(1, dtype, [&](const fastmaf_output* out) {
        return fastmaf_log_prob_and_grad(evaluator, groups, rows, &x.array, c, out, most ? nullptr : &d_x.array,
                                         width ? &d_context.array : nullptr);
    });
    if (!most) results.d_x = d_x.values();
    if (width) results.d_context = d_context.values();
    if (fastmaf_model_members(model)) return results;
    if (most) {
        const int64_t all = features * most;
        results.probabilities = get(
            all, dtype, [&](const fastmaf_output* out) { return fastmaf_conditional_probs(evaluator, groups, rows, &x.array, c, out); });
        return results;
    }
    results.noise =
        get(features, dtype, [&](const fastmaf_output* out) { return fastmaf_to_noise(evaluator, groups, rows, &x.array, c, out); });
    const Input noise(results.noise, n, features, rows, layout.in, layout.strided, layout.device);
    results.x = get(features, of_samples,
                    [&](const fastmaf_output* out) { return fastmaf_from_noise(evaluator, groups, rows, &noise.array, c, out); });
    return results;
}

// The largest difference of two lists, relative to 1 and the numbers; what is no number must be none in both.
double distance(const Reals& a, const Reals& b) {
    double most = a.size() == b.size() ? 0 : INFINITY;
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        if (a[i] == b[i] || (std::isnan(a[i]) && std::isnan(b[i]))) continue;
        const double error = std::fabs(a[i] - b[i]) / (1 + std::fabs(b[i]));
        most = error >= 0 ? std::max(most, error) : INFINITY;
    }
    return most;
}

// Of gradients, relative to the largest of them.
double distance_of_gradients(const Results& a, const Results& b) {
    auto relative = [](const Reals& one, const Reals& other) {
        double most = one.size() == other.size() ? 0 : INFINITY, size = 1e-30;
        for (double value : other) size = std::max(size, std::fabs(value));
        for (size_t i = 0; i < std::min(one.size(), other.size()); ++i) {
            const double error = std::fabs(one[i] - other[i]) / size;
            most = error >= 0 ? std::max(most, error) : INFINITY;
        }
        return most;
    };
    return std::max(relative(a.d_x, b.d_x), relative(a.d_context, b.d_context));
}

double distance(const Results& a, const Results& b) {
    return std::max({distance(a.log_prob, b.log_prob), distance(a.noise, b.noise), distance(a.x, b.x),
                     distance(a.probabilities, b.probabilities), distance(a.samples, b.samples), distance(a.density, b.density)});
}

// Rows where the density is not zero, and contexts.
void rows_for(const fastmaf_model* model, Reals& x, Reals& contexts) {
    const int64_t features = fastmaf_model_features(model), width = fastmaf_model_context_features(model);
    x.resize(size_t(kRows * features));
    contexts.resize(size_t(kRows * std::max<int64_t>(1, width)));
    for (size_t i = 0; i < contexts.size(); ++i) contexts[i] = double(int(100 * std::sin(double(i)))) / 128;  // the same in float
    const Evaluator cpu(model);
    const fastmaf_array each = fastmaf_rows(contexts.data(), FASTMAF_FLOAT64, 1, width);
    const fastmaf_output out = fastmaf_into(x.data(), FASTMAF_FLOAT64, features);
    CHECK(fastmaf_sample(cpu, kRows, 1, width ? &each : nullptr, 3, 0, 0, &out, nullptr) == FASTMAF_OK);
    for (double& value : x) value = double(float(value));
}

void results_are_those_of_the_cpu(const Model& model) {
    Reals x, contexts;
    rows_for(model, x, contexts);
    const Evaluator cpu(model);
#if defined(__x86_64__)
    const bool bits = __builtin_cpu_supports("avx2") && !std::getenv("FASTMAF_ISA");  // those of AVX2 and AVX-512 are the device's
#else
    const bool bits = false;
#endif
    const int64_t width = fastmaf_model_context_features(model);
    const bool is_single = fastmaf_model_dtype(model) == FASTMAF_FLOAT32;
    for (fastmaf_precision precision : {FASTMAF_HIGHEST, FASTMAF_HIGH, FASTMAF_MEDIUM}) {
        const bool halves = is_single && precision != FASTMAF_HIGHEST;
        const double allowed = !halves ? (bits ? 0 : is_single ? 1e-5 : 1e-10) : precision == FASTMAF_HIGH ? 4e-6 : 5e-3;
        for (int device : {0, 1}) {
            const bool all = precision == FASTMAF_HIGHEST && device == 1;
            if (precision != FASTMAF_HIGHEST && device == 0) continue;
            const Evaluator gpu(model, device, precision);
            cudaStream_t stream = nullptr;
            cudaSetDevice(device);
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
            cudaSetDevice(0);
            int number = 0;
            for (Contexts kind : {Contexts::by_row, Contexts::shared, Contexts::by_group})
                for (fastmaf_dtype in : {FASTMAF_FLOAT32, FASTMAF_FLOAT64}) {
                    ++number;
                    if (all ? kind == Contexts::shared && !width : number != (precision == FASTMAF_HIGH ? 3 : 6)) continue;
                    Layout layout;
                    layout.contexts = kind;
                    layout.in = in;
                    layout.strided = number % 2 == 0;
                    layout.single = number % 4 > 1;
                    const Results expected = evaluate(model, cpu, x, contexts, layout);
                    CHECK(distance(expected.log_prob, Reals(expected.log_prob.size())) > 0.01);
                    // Of gradients sums over rows may be made in another order; of an ensemble the shares are as its densities are.
                    const double rounded = std::max(is_single ? 2e-6 : 1e-12, fastmaf_model_members(model) ? allowed : 0);
                    const Results streamed = evaluate(model, gpu, x, contexts, layout);
                    CHECK(distance(streamed, expected) <= allowed);
                    CHECK(distance_of_gradients(streamed, expected) <= rounded && distance(streamed.value, expected.value) <= rounded);
                    layout.other = true;
                    const Results other = evaluate(model, gpu, x, contexts, layout);
                    CHECK(distance(other, expected) <= std::max(allowed, 1e-6));
                    CHECK(distance_of_gradients(other, expected) <= std::max(rounded, 1e-6));
                    layout.other = false;
                    if (fastmaf_model_members(model)) continue;
                    layout.device = device;
                    const bool own = number % 2;
                    CHECK(fastmaf_evaluator_set_stream(gpu, own ? stream : nullptr) == FASTMAF_OK);
                    const Results there = evaluate(model, gpu, x, contexts, layout, own ? stream : nullptr);
                    CHECK(distance(there, expected) <= allowed);
                    CHECK(distance_of_gradients(there, expected) <= rounded && distance(there.value, expected.value) <= rounded);
                    CHECK(there.late);
                    int current = -1;
                    cudaGetDevice(&current);
                    CHECK(current == 0);
                }
            cudaStreamDestroy(stream);
        }
    }
}

// Threads make the first calls on a model at a time, two on each device, each through an evaluator and a stream of its own.
void threads_share_a_model(const char* path) {
    Reals x, contexts;
    const Model model(path);
    rows_for(model, x, contexts);
    const int before = runtime_blocks();
    constexpr int count = 4;
    std::vector<Results> results(count);
    std::vector<std::thread> threads;
    for (int t = 0; t < count; ++t)
        threads.emplace_back([&, t] {
            cudaStream_t stream = nullptr;
            cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
            const Evaluator gpu(model, t % 2, FASTMAF_HIGH);
            Layout layout;
            layout.contexts = Contexts::shared;
            if (t < 2) {
                layout.device = t % 2;
                CHECK(fastmaf_evaluator_set_stream(gpu, stream) == FASTMAF_OK);
            }
            results[size_t(t)] = evaluate(model, gpu, x, contexts, layout, t < 2 ? stream : nullptr);
            cudaStreamDestroy(stream);
        });
    for (auto& thread : threads) thread.join();
    for (int t = 1; t < count; ++t) CHECK(distance(results[size_t(t)], results[0]) == 0);
    CHECK(runtime_blocks() > before);  // the model has its weights there still
}

// Evaluators of one model, device and precision have one copy of the weights, which goes with the model and the last of them.
void copies_are_shared(const char* path) {
    Reals x, contexts;
    Model model(path);
    rows_for(model, x, contexts);
    const bool is_single = fastmaf_model_dtype(model) == FASTMAF_FLOAT32;
    auto call = [&](const Evaluator& evaluator) {
        const Input in(x, kRows, fastmaf_model_features(model), kRows, FASTMAF_FLOAT64, false, kHost);
        const Input of_contexts(contexts, kRows, std::max<int64_t>(1, fastmaf_model_context_features(model)), kRows, FASTMAF_FLOAT64, false,
                                kHost);
        const Output out(kRows, 1, FASTMAF_FLOAT64, false, kHost);
        const fastmaf_array* const given = fastmaf_model_context_features(model) ? &of_contexts.array : nullptr;
        const fastmaf_status status = fastmaf_log_prob(evaluator, 1, kRows, &in.array, given, &out.array);
        check(status == FASTMAF_OK, fastmaf_message(evaluator), __LINE__);
        cudaDeviceSynchronize();  // scratch is freed
        return runtime_blocks();
    };
    const int before = runtime_blocks();
    Evaluator last(model, 1, FASTMAF_HIGHEST);
    const int one = call(last);
    CHECK(one > before);
    {
        const Evaluator second(model, 1, FASTMAF_HIGHEST);
        CHECK(call(second) == one);
        const Evaluator other(model, 1, FASTMAF_MEDIUM);
        CHECK(call(other) == one + is_single);
    }
    {
        const Evaluator again(model, 1, FASTMAF_MEDIUM);  // the model has kept it
        CHECK(call(again) == one + is_single);
    }
    const int64_t features = fastmaf_model_features(model), width = fastmaf_model_context_features(model);
    fastmaf_model_free(model.get);
    model.get = nullptr;
    CHECK(runtime_blocks() == one);
    const Input in(x, kRows, features, kRows, FASTMAF_FLOAT64, false, kHost);
    const Input of_contexts(contexts, kRows, std::max<int64_t>(1, width), kRows, FASTMAF_FLOAT64, false, kHost);
    const Output out(kRows, 1, FASTMAF_FLOAT64, false, kHost);
    CHECK(fastmaf_log_prob(last, 1, kRows, &in.array, width ? &of_contexts.array : nullptr, &out.array) == FASTMAF_OK);
    fastmaf_evaluator_free(last.get);
    last.get = nullptr;
    CHECK(runtime_blocks() == before);
}

void errors(const char* path) {
    char text[300] = "";
    const Model model(path);
    fastmaf_evaluator* none = nullptr;
    auto refused = [&](fastmaf_status status, fastmaf_status expected, const char* words) {
        const bool as_expected = status == expected && !none && std::strstr(text, words) && std::strlen(text) <= 200;
        if (!as_expected) std::fprintf(stderr, "status %d: %s\n", status, text);
        return as_expected;
    };
    CHECK(refused(fastmaf_evaluator_create_on_device(model, -1, FASTMAF_HIGH, &none, text, sizeof text), FASTMAF_INVALID_ARGUMENT,
                  "device is negative"));
    CHECK(refused(fastmaf_evaluator_create_on_device(model, 0, 3, &none, text, sizeof text), FASTMAF_INVALID_ARGUMENT, "precision"));
    CHECK(
        refused(fastmaf_evaluator_create_on_device(nullptr, 0, FASTMAF_HIGH, &none, text, sizeof text), FASTMAF_INVALID_ARGUMENT, "model"));
    CHECK(refused(fastmaf_evaluator_create_on_device(model, 0, FASTMAF_HIGH, nullptr, text, sizeof text), FASTMAF_INVALID_ARGUMENT,
                  "evaluator"));
    if (fastmaf_model_members(model)) {
        const Evaluator gpu(model, 1, FASTMAF_HIGH);
        const int64_t d = fastmaf_model_features(model), c = fastmaf_model_context_features(model);
        const Input x(Reals(size_t(4 * d)), 4, d, 4, FASTMAF_FLOAT64, false, 1);
        const Input context(Reals(size_t(4 * c + 4)), 4, c + 1, 4, FASTMAF_FLOAT64, false, 1);
        const Output out(4, 1, fastmaf_model_dtype(model), false, 1);
        CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &x.array, c ? &context.array : nullptr, &out.array), FASTMAF_UNSUPPORTED,
                          " lies on cuda:1: an ensemble takes arrays of the host"));
        return;
    }
    CHECK(refused(fastmaf_evaluator_create_on_device(model, 2, FASTMAF_HIGH, &none, text, sizeof text), FASTMAF_DEVICE_ERROR,
                  "there is no cuda:2 here; GPUs: 2"));

    const int64_t d = fastmaf_model_features(model), c = fastmaf_model_context_features(model), most = fastmaf_model_most_values(model);
    const fastmaf_dtype own = fastmaf_model_dtype(model), other = fastmaf_dtype(1 - own);
    const Evaluator cpu(model), gpu(model, 1, FASTMAF_HIGH);
    CHECK(cpu.refuses(fastmaf_evaluator_set_stream(cpu, nullptr), FASTMAF_INVALID_ARGUMENT, "the CPU"));
    CHECK(fastmaf_evaluator_set_stream(nullptr, nullptr) == FASTMAF_INVALID_ARGUMENT);
    const Reals zeros(size_t(8 * std::max(d, c) + 8));
    const Input x(zeros, 4, d, 4, FASTMAF_FLOAT64, false, 1), elsewhere(zeros, 4, d, 4, FASTMAF_FLOAT64, false, 0),
        host(zeros, 4, d, 4, FASTMAF_FLOAT64, false, kHost);
    const Input context(zeros, 4, c + 1, 4, FASTMAF_FLOAT64, false, 1), context_of_host(zeros, 4, c + 1, 4, FASTMAF_FLOAT64, false, kHost);
    const fastmaf_array* const given = c ? &context.array : nullptr;
    const Output out(4, 1, own, false, 1), back(4, d, own, false, 1), wrong(4, 1, other, false, 1), host_out(4, 1, own, false, kHost),
        columns(4, d, own, true, 1);
    fastmaf_array crooked = x.array;
    crooked.data = static_cast<const char*>(x.array.data) + 4;

    if (d > 1 && !most)
        CHECK(gpu.refuses(fastmaf_log_prob_and_grad(gpu, 1, 4, &x.array, given, &out.array, &columns.array, nullptr), FASTMAF_UNSUPPORTED,
                          "d_x is written in"));
    CHECK(gpu.refuses(fastmaf_log_prob_and_grad(gpu, 1, 4, &x.array, given, &host_out.array, nullptr, nullptr), FASTMAF_INVALID_ARGUMENT,
                      "log_prob on the host"));
    CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &elsewhere.array, given, &out.array), FASTMAF_INVALID_ARGUMENT,
                      "x lies on cuda:0, the evaluator computes on cuda:1"));
    CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &host.array, c ? &context_of_host.array : nullptr, &out.array), FASTMAF_INVALID_ARGUMENT,
                      "log_prob on cuda:1: all arrays"));
    CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &x.array, given, &host_out.array), FASTMAF_INVALID_ARGUMENT,
                      "log_prob on the host: all arrays"));
    if (c)
        CHECK(gpu.refuses(fastmaf_sample(gpu, 1, 4, &context_of_host.array, 0, 0, 0, &back.array, nullptr), FASTMAF_INVALID_ARGUMENT,
                          "context lies on the host, samples on cuda:1"));
    CHECK(gpu.refuses(fastmaf_sample(gpu, 1, 4, given, 0, 0, 0, &back.array, &host_out.array), FASTMAF_INVALID_ARGUMENT,
                      "samples lies on cuda:1, log_prob on the host"));
    CHECK(
        gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &crooked, given, &out.array), FASTMAF_INVALID_ARGUMENT, "x is not aligned to its 8 bytes"));
    CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &x.array, given, &wrong.array), FASTMAF_UNSUPPORTED,
                      own ? "log_prob is written in float64" : "log_prob is written in float32"));
    const std::string strides = "without gaps: row_stride " + std::to_string(d) + ", column_stride 1";
    if (d > 1) {
        CHECK(gpu.refuses(fastmaf_sample(gpu, 1, 4, given, 0, 0, 0, &columns.array, nullptr), FASTMAF_UNSUPPORTED, strides.c_str()));
        if (!most) {
            CHECK(gpu.refuses(fastmaf_to_noise(gpu, 1, 4, &x.array, given, &columns.array), FASTMAF_UNSUPPORTED, strides.c_str()));
            CHECK(gpu.refuses(fastmaf_from_noise(gpu, 1, 4, &x.array, given, &columns.array), FASTMAF_UNSUPPORTED, strides.c_str()));
        }
    }
    CHECK(gpu.refuses(most ? fastmaf_to_noise(gpu, 1, 4, &x.array, given, &back.array)
                           : fastmaf_conditional_probs(gpu, 1, 4, &x.array, given, &back.array),
                      FASTMAF_UNSUPPORTED, most ? "discrete" : "continuous"));
    fastmaf_output one = out.array;  // the stride of a single row is not read
    one.row_stride = 0;
    CHECK(fastmaf_log_prob(gpu, 1, 1, &x.array, given, &one) == FASTMAF_OK);
    const fastmaf_array nothing = fastmaf_rows(nullptr, FASTMAF_FLOAT64, 0, d);
    const fastmaf_output nowhere = fastmaf_into(nullptr, own, 1);
    CHECK(fastmaf_log_prob(gpu, 1, 0, &nothing, c ? &nothing : nullptr, &nowhere) == FASTMAF_OK);
    cudaDeviceSynchronize();

    const fastmaf_array* const of_host = c ? &context_of_host.array : nullptr;
    auto on_host = [&](const Evaluator& evaluator) { return fastmaf_log_prob(evaluator, 1, 4, &host.array, of_host, &host_out.array); };
    runtime_break(cudaErrorIllegalAddress);
    CHECK(gpu.refuses(on_host(gpu), FASTMAF_DEVICE_ERROR, "the device is lost to this process"));
    {
        const Evaluator first(model, 0, FASTMAF_HIGH);
        runtime_limit(30);
        CHECK(first.refuses(on_host(first), FASTMAF_OUT_OF_MEMORY, "memory"));  // pinned or of the device
        CHECK(gpu.refuses(fastmaf_log_prob(gpu, 1, 4, &x.array, given, &out.array), FASTMAF_OUT_OF_MEMORY, "cuda:1 is out of memory: "));
        runtime_limit(int64_t(1) << 40);
        CHECK(on_host(first) == FASTMAF_OK && !*fastmaf_message(first));
    }
    CHECK(on_host(gpu) == FASTMAF_OK);
    if (const pid_t child = fork()) {
        int status = 1;
        waitpid(child, &status, 0);
        CHECK(status == 0);
    } else {
        _exit(gpu.refuses(on_host(gpu), FASTMAF_DEVICE_ERROR, "fork") ? 0 : 1);
    }
}

}  // namespace

int main(int argc, char** argv) {
    char text[100] = "nothing";
    CHECK(fastmaf_devices(text, sizeof text) == 2 && !*text);
    for (int i = 1; i < argc; ++i) {
        const Model model(argv[i]);
        if (!fastmaf_model_members(model)) {
            copies_are_shared(argv[i]);
            threads_share_a_model(argv[i]);
        }
        results_are_those_of_the_cpu(model);
        errors(argv[i]);
    }
    cudaDeviceSynchronize();
    CHECK(runtime_blocks() == 0);
    std::printf("%d passed, %d failed\n", passed.load(), failed.load());
    return failed > 0 || argc < 2;
}
