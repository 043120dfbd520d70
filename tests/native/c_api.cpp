// libfastmaf as a simulation uses it: what calls allocate, threads over one model, the caller's floating-point state, every error.
// Arguments: files of flows. FASTMAF_CALLS: how many calls must allocate nothing. FASTMAF_MEMCHECK=1: valgrind runs this; it takes the place of
// the allocator and knows of no flushing to zero.
#include <fastmaf.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED
#endif

std::atomic<long> allocations{0};
const bool memcheck = std::getenv("FASTMAF_MEMCHECK") != nullptr;

#if defined(__GLIBC__) && !defined(SANITIZED)
#define COUNTS_ALLOCATIONS
#pragma GCC visibility push(default)  // hidden ones replace nothing in shared libraries
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t size) {
    ++allocations;
    return __libc_malloc(size);
}
void* calloc(size_t n, size_t size) {
    ++allocations;
    return __libc_calloc(n, size);
}
void* realloc(void* p, size_t size) {
    ++allocations;
    return __libc_realloc(p, size);
}
void* memalign(size_t alignment, size_t size) {
    ++allocations;
    return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) {
    ++allocations;
    return __libc_memalign(alignment, size);
}
int posix_memalign(void** p, size_t alignment, size_t size) {
    ++allocations;
    *p = __libc_memalign(alignment, size);
    return *p ? 0 : 12;
}
}
#pragma GCC visibility pop
#endif

namespace {

std::atomic<int> passed{0}, failed{0};

void check(bool ok, const char* what, int line) {
    ++(ok ? passed : failed);
    if (!ok && failed.load() <= 40) std::fprintf(stderr, "line %d: %s\n", line, what);
}
#define CHECK(condition) check(condition, #condition, __LINE__)

std::string bytes_of(const char* path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

struct Evaluator {
    fastmaf_evaluator* get = nullptr;
    explicit Evaluator(const fastmaf_model* model, int threads = 1) {
        char text[200];
        if (fastmaf_evaluator_create(model, threads, &get, text, sizeof text)) std::fprintf(stderr, "%s\n", text);
    }
    ~Evaluator() { fastmaf_evaluator_free(get); }
};

// Arrays for `rows` rows of a model, and every call on them.
struct Calls {
    const fastmaf_model* const model;
    fastmaf_evaluator* const evaluator;
    const int64_t rows, features = fastmaf_model_features(model), context = fastmaf_model_context_features(model);
    const bool discrete = fastmaf_model_most_values(model) > 0, ensemble = fastmaf_model_members(model) > 0;
    std::vector<double> x = std::vector<double>(size_t(rows * features)), contexts = std::vector<double>(size_t(rows * context) + 1),
                        d_x = x, d_context = contexts, noise = x;
    std::vector<float> single = std::vector<float>(size_t(2 * rows * features)), density = std::vector<float>(size_t(rows)),
                       probabilities = std::vector<float>(size_t(rows * features * std::max<int64_t>(1, fastmaf_model_most_values(model))));
    int failures = 0;

    Calls(const fastmaf_model* model, fastmaf_evaluator* evaluator, int64_t rows) : model(model), evaluator(evaluator), rows(rows) {
        for (size_t i = 0; i < contexts.size(); ++i) contexts[i] = 0.1 * double(i % 7) - 0.3;
    }

    // The gradient of rows that hold no number.
    void spoilt() {
        std::fill(x.begin(), x.end(), NAN);
        const fastmaf_array of_x = fastmaf_rows(x.data(), FASTMAF_FLOAT64, rows, features);
        const fastmaf_array of_contexts = fastmaf_shared_row(contexts.data(), FASTMAF_FLOAT64);
        const fastmaf_output to_density = fastmaf_into(density.data(), FASTMAF_FLOAT32, 1),
                             to_dx = fastmaf_into(d_x.data(), FASTMAF_FLOAT64, features);
        if (discrete) return;
        failures += fastmaf_log_prob_and_grad(evaluator, 1, rows, &of_x, context ? &of_contexts : nullptr, &to_density, &to_dx, nullptr) !=
                    FASTMAF_OK;
        failures += !std::isnan(density[0]);
    }

    void run(uint64_t seed, bool shared) {
        const fastmaf_array of_contexts =
            shared ? fastmaf_shared_row(contexts.data(), FASTMAF_FLOAT64) : fastmaf_rows(contexts.data(), FASTMAF_FLOAT64, rows, context);
        const fastmaf_array* const c = context ? &of_contexts : nullptr;
        const fastmaf_array of_groups = fastmaf_rows(contexts.data(), FASTMAF_FLOAT64, 1, context);
        const fastmaf_array* const g = context ? &of_groups : nullptr;
        const fastmaf_array of_x = fastmaf_rows(x.data(), FASTMAF_FLOAT64, rows, features);
        const fastmaf_output to_x = fastmaf_into(x.data(), FASTMAF_FLOAT64, features),
                             to_density = fastmaf_into(density.data(), FASTMAF_FLOAT32, 1);
        const fastmaf_output strided{single.data(), FASTMAF_FLOAT32, 1, rows};  // column-major
        const fastmaf_output to_noise = fastmaf_into(noise.data(), FASTMAF_FLOAT64, features);
        const fastmaf_array of_noise = fastmaf_rows(noise.data(), FASTMAF_FLOAT64, rows, features);
        const fastmaf_output to_dx = fastmaf_into(d_x.data(), FASTMAF_FLOAT64, features),
                             to_dc = fastmaf_into(d_context.data(), FASTMAF_FLOAT64, context);
        const fastmaf_output to_p =
            fastmaf_into(probabilities.data(), FASTMAF_FLOAT32, int64_t(probabilities.size()) / std::max<int64_t>(1, rows));
        auto done = [&](fastmaf_status status) {
            if (status == FASTMAF_OK) return;
            if (!failures++) std::fprintf(stderr, "status %d: %s\n", status, fastmaf_message(evaluator));
        };
        // One sample for each context, or all for the shared one.
        done(fastmaf_sample(evaluator, shared ? 1 : rows, shared ? rows : 1, g, seed, 3, 0, &to_x, &to_density));
        done(fastmaf_sample(evaluator, shared ? 1 : rows, shared ? rows : 1, g, seed, 3, 0, &strided, nullptr));
        done(fastmaf_log_prob(evaluator, 1, rows, &of_x, c, &to_density));
        if (discrete && ensemble) return;
        if (discrete) return done(fastmaf_conditional_probs(evaluator, 1, rows, &of_x, c, &to_p));
        done(fastmaf_log_prob_and_grad(evaluator, 1, rows, &of_x, c, &to_density, &to_dx, context ? &to_dc : nullptr));
        if (ensemble) return;
        done(fastmaf_to_noise(evaluator, 1, rows, &of_x, c, &to_noise));
        done(fastmaf_from_noise(evaluator, 1, rows, &of_noise, c, &strided));
    }
};

void nothing_is_allocated(const fastmaf_model* model, int calls) {
#ifdef COUNTS_ALLOCATIONS
    for (int64_t rows : {1, 2, 3, 100}) {
        Evaluator evaluator(model);
        Calls all(model, evaluator.get, rows);
        for (bool shared : {false, true}) all.run(1, shared);
        const long before = allocations;
        for (int i = 0; i < (rows < 4 ? calls : calls / 100 + 1); ++i) all.run(uint64_t(i), i % 2);
        all.spoilt();
        CHECK(allocations == before);
        CHECK(all.failures == 0);
    }
#else
    (void)model;
    (void)calls;
#endif
}

// Of a model that nobody has used: after one sample all is there, whichever member of an ensemble the next ones come from.
void the_first_sample_brings_all(const char* path) {
#ifdef COUNTS_ALLOCATIONS
    std::thread([&] {  // which has no scratch yet
        fastmaf_model* model = nullptr;
        char text[200];
        CHECK(fastmaf_model_open(path, &model, text, sizeof text) == FASTMAF_OK);
        Evaluator evaluator(model);
        const Calls arrays(model, evaluator.get, 1);
        std::vector<double> x(size_t(arrays.features));
        const fastmaf_array context = fastmaf_shared_row(arrays.contexts.data(), FASTMAF_FLOAT64);
        const fastmaf_output out = fastmaf_into(x.data(), FASTMAF_FLOAT64, arrays.features);
        long before = 0;
        for (uint64_t seed = 0; seed < 100; ++seed) {
            CHECK(fastmaf_sample(evaluator.get, 1, 1, arrays.context ? &context : nullptr, seed, 0, 0, &out, nullptr) == FASTMAF_OK);
            if (!seed) before = allocations;
        }
        CHECK(allocations == before);
        fastmaf_model_free(model);
    })
        .join();
#else
    (void)path;
#endif
}

void threads_share_a_model(const fastmaf_model* model) {
    constexpr int count = 8;
    std::vector<std::vector<float>> densities(count);
    std::vector<std::vector<double>> samples(count);
    std::vector<std::thread> threads;
    for (int t = 0; t < count; ++t)
        threads.emplace_back([&, t] {
            Evaluator evaluator(model, 1 + t % 3);
            Calls all(model, evaluator.get, 301);
            for (int i = 0; i < 5; ++i) all.run(7, true);
            CHECK(all.failures == 0);
            densities[size_t(t)] = all.density;
            samples[size_t(t)] = all.x;
        });
    for (auto& thread : threads) thread.join();
    for (int t = 1; t < count; ++t) {
        CHECK(densities[size_t(t)] == densities[0]);
        CHECK(samples[size_t(t)] == samples[0]);
    }
}

void the_callers_floats_stay(const fastmaf_model* model) {
#if defined(__x86_64__)
    Evaluator evaluator(model);
    Calls plain(model, evaluator.get, 5), flushed(model, evaluator.get, 5);
    plain.run(3, true);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
    flushed.run(3, true);
    CHECK(memcheck || _mm_getcsr() == (before | 0x8040));
    _mm_setcsr(before);
    CHECK(plain.x == flushed.x && plain.density == flushed.density);
#else
    (void)model;
#endif
}

void parts_are_the_whole(const fastmaf_model* model) {
    Evaluator evaluator(model);
    Calls all(model, evaluator.get, 9001);
    all.run(11, true);
    const int64_t n = all.rows, d = all.features;
    std::vector<double> parts(size_t(n * d));
    const fastmaf_array shared = fastmaf_shared_row(all.contexts.data(), FASTMAF_FLOAT64);
    for (int64_t begin = 0; begin < n; begin += 4000) {
        const fastmaf_output out = fastmaf_into(parts.data() + begin * d, FASTMAF_FLOAT64, d);
        const uint64_t offset = 3 + uint64_t(begin);
        CHECK(fastmaf_sample(evaluator.get, 1, std::min<int64_t>(4000, n - begin), all.context ? &shared : nullptr, 11, offset, 0, &out,
                             nullptr) == 0);
    }
    CHECK(parts == all.x);
    // What went through pieces into a column-major array of float.
    std::vector<float> single(size_t(n * d)), rows(single.size());
    const fastmaf_output columns{single.data(), FASTMAF_FLOAT32, 1, n}, plain = fastmaf_into(rows.data(), FASTMAF_FLOAT32, d);
    for (const fastmaf_output* out : {&columns, &plain})
        CHECK(fastmaf_sample(evaluator.get, 1, n, all.context ? &shared : nullptr, 11, 3, 0, out, nullptr) == 0);
    bool equal = true;
    for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < d; ++c) equal = equal && single[size_t(c * n + r)] == rows[size_t(r * d + c)];
    CHECK(equal);
}

// What is no value of its variable makes the probabilities behind it NaN, and no others: of none of them, of one, and so on to all others.
void impossible_values(const fastmaf_model* model) {
    const int64_t d = fastmaf_model_features(model), c = fastmaf_model_context_features(model), most = fastmaf_model_most_values(model);
    if (!most || fastmaf_model_members(model)) return;
    const Evaluator evaluator(model);
    const std::vector<double> context(size_t(c) + 1, 0.2);
    const fastmaf_array given = fastmaf_shared_row(context.data(), FASTMAF_FLOAT64);
    const int64_t rows = 5000;  // more than go together
    std::vector<double> x(size_t(rows * d));
    const fastmaf_array of_x = fastmaf_rows(x.data(), FASTMAF_FLOAT64, rows, d);
    auto probabilities = [&](bool strided) {
        std::vector<double> found(size_t(rows * d * most));
        fastmaf_output out = fastmaf_into(found.data(), FASTMAF_FLOAT64, d * most);
        if (strided) out = {found.data(), FASTMAF_FLOAT64, 1, rows};
        CHECK(fastmaf_conditional_probs(evaluator.get, 1, rows, &of_x, c ? &given : nullptr, &out) == FASTMAF_OK);
        return found;
    };
    const std::vector<double> right = probabilities(false);
    for (double wrong : {double(NAN), 99.0, -1.0, 0.5}) {
        std::vector<int64_t> lost;
        for (int64_t j = 0; j < d; ++j) {
            const bool any_number = std::isnan(right[size_t(j * most)]);
            const double none = any_number ? double(NAN) : wrong;
            std::fill(x.begin(), x.end(), 0.0);
            for (int64_t r : {int64_t(0), int64_t(17), rows - 1}) x[size_t(r * d + j)] = none;
            for (bool strided : {false, true}) {
                const std::vector<double> found = probabilities(strided);
                int64_t count = 0;
                bool others = true;
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t k = 0; k < d * most; ++k) {
                        const double value = found[size_t(strided ? k * rows + r : r * d * most + k)];
                        if (value == right[size_t(r * d * most + k)] || std::isnan(right[size_t(k)])) continue;
                        others = others && std::isnan(value) && x[size_t(r * d + j)] != 0 && k / most != j;
                        count += std::isnan(value);
                    }
                CHECK(others && count % (3 * most) == 0);
                lost.push_back(count / (3 * most));
            }
        }
        std::sort(lost.begin(), lost.end());
        const bool all_discrete = std::none_of(right.begin(), right.end(), [](double p) { return std::isnan(p); });
        CHECK(lost.front() == 0 && (!all_discrete || lost.back() == d - 1));
    }
}

void errors(const char* path) {
    char text[200] = "";
    fastmaf_model* model = nullptr;
    CHECK(fastmaf_model_open("/no/such/file", &model, text, sizeof text) == FASTMAF_CANNOT_READ && !model &&
          std::strstr(text, "/no/such/file"));
    CHECK(fastmaf_model_open("/", &model, text, sizeof text) == FASTMAF_CANNOT_READ);
    CHECK(fastmaf_model_open(nullptr, &model, text, sizeof text) == FASTMAF_INVALID_ARGUMENT && std::strstr(text, "path"));
    CHECK(fastmaf_model_open(path, nullptr, nullptr, 0) == FASTMAF_INVALID_ARGUMENT);
    CHECK(fastmaf_model_from_memory("abc", 3, &model, text, 5) == FASTMAF_INVALID_FILE && std::strlen(text) == 4);
    CHECK(fastmaf_model_from_memory(nullptr, 3, &model, text, sizeof text) == FASTMAF_INVALID_ARGUMENT);
    std::string bytes = bytes_of(path);
    for (size_t length = 0; length < bytes.size(); length += 1 + length / 50)
        CHECK(fastmaf_model_from_memory(bytes.data(), length, &model, text, sizeof text) == FASTMAF_INVALID_FILE && *text);
    CHECK(fastmaf_model_from_memory(bytes.data(), bytes.size(), &model, text, sizeof text) == FASTMAF_OK && model);

    fastmaf_evaluator* evaluator = nullptr;
    CHECK(fastmaf_evaluator_create(nullptr, 1, &evaluator, text, sizeof text) == FASTMAF_INVALID_ARGUMENT);
    CHECK(fastmaf_evaluator_create(model, 0, &evaluator, text, sizeof text) == FASTMAF_INVALID_ARGUMENT && !evaluator);
    CHECK(fastmaf_evaluator_create(model, 1, &evaluator, text, sizeof text) == FASTMAF_OK);
    const int64_t d = fastmaf_model_features(model), c = fastmaf_model_context_features(model), most = fastmaf_model_most_values(model);
    const bool ensemble = fastmaf_model_members(model) > 0;
    fastmaf_model_free(model);  // the evaluator goes on
    std::vector<double> x(size_t(d), 0.5), context(size_t(c) + 1, 0.5);
    double value = 0;
    const fastmaf_array of_x = fastmaf_rows(x.data(), FASTMAF_FLOAT64, 1, d), none = fastmaf_rows(nullptr, FASTMAF_FLOAT64, 1, d);
    const fastmaf_array of_context = fastmaf_shared_row(context.data(), FASTMAF_FLOAT64);
    fastmaf_array other = of_x;
    other.dtype = 7;
    const fastmaf_array *right = c ? &of_context : nullptr, *wrong = c ? nullptr : &of_context;
    const fastmaf_output out = fastmaf_into(&value, FASTMAF_FLOAT64, 1), nowhere = fastmaf_into(nullptr, FASTMAF_FLOAT64, 1);
    auto refused = [&](fastmaf_status status, const char* word) {
        const bool named = std::strstr(fastmaf_message(evaluator), word) != nullptr;
        if (status != FASTMAF_INVALID_ARGUMENT || !named) std::fprintf(stderr, "%d %s\n", status, fastmaf_message(evaluator));
        return status == FASTMAF_INVALID_ARGUMENT && named;
    };
    CHECK(refused(fastmaf_log_prob(evaluator, -1, 1, &of_x, right, &out), "groups"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, -1, &of_x, right, &out), "rows"));
    CHECK(refused(fastmaf_log_prob(evaluator, int64_t(1) << 40, int64_t(1) << 40, &of_x, right, &out), "too large"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, nullptr, right, &out), "x is"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, &none, right, &out), "x is"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, &other, right, &out), "dtype"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, &of_x, wrong, &out), "context"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, &of_x, right, nullptr), "log_prob"));
    CHECK(refused(fastmaf_log_prob(evaluator, 1, 1, &of_x, right, &nowhere), "log_prob"));
    CHECK(refused(fastmaf_sample(evaluator, 1, 2, right, 0, ~uint64_t(0), 0, &out, nullptr), "offset"));
    CHECK(refused(fastmaf_sample(evaluator, 2, 1, right, 0, 0, ~uint32_t(0), &out, nullptr), "context_offset"));
    const fastmaf_output of_noise = fastmaf_into(x.data(), FASTMAF_FLOAT64, d);
    const fastmaf_status status =
        most ? fastmaf_to_noise(evaluator, 1, 1, &of_x, right, &of_noise) : fastmaf_conditional_probs(evaluator, 1, 1, &of_x, right, &out);
    CHECK(status == FASTMAF_UNSUPPORTED && std::strstr(fastmaf_message(evaluator), most ? "discrete" : "continuous"));
    if (ensemble && !most) {
        CHECK(fastmaf_to_noise(evaluator, 1, 1, &of_x, right, &of_noise) == FASTMAF_UNSUPPORTED &&
              std::strstr(fastmaf_message(evaluator), "ensemble has no noise"));
        CHECK(fastmaf_from_noise(evaluator, 1, 1, &of_x, right, &of_noise) == FASTMAF_UNSUPPORTED &&
              std::strlen(fastmaf_message(evaluator)) < 200);
    } else if (ensemble) {
        CHECK(fastmaf_conditional_probs(evaluator, 1, 1, &of_x, right, &of_noise) == FASTMAF_UNSUPPORTED &&
              std::strstr(fastmaf_message(evaluator), "no probabilities"));
    }
    CHECK(fastmaf_log_prob(evaluator, 0, 1, &of_x, right, &out) == FASTMAF_OK &&
          fastmaf_log_prob(evaluator, 1, 0, &none, right, &nowhere) == FASTMAF_OK);
    CHECK(fastmaf_log_prob(nullptr, 1, 1, &of_x, right, &out) == FASTMAF_INVALID_ARGUMENT);
    CHECK(fastmaf_log_prob(evaluator, 1, 1, &of_x, right, &out) == FASTMAF_OK && !*fastmaf_message(evaluator));
    fastmaf_evaluator_free(evaluator);
    fastmaf_evaluator_free(nullptr);
    fastmaf_model_free(nullptr);
}

// Where there is no GPU the library says why; where there is one, the host's arrays are streamed there (see device_c_api.cpp).
void devices(const fastmaf_model* model) {
    char reason[300] = "", text[300] = "";
    fastmaf_evaluator* evaluator = nullptr;
    const int count = fastmaf_devices(reason, sizeof reason);
    CHECK((count == 0) == (*reason != 0) && fastmaf_devices(nullptr, 0) == count);
    CHECK(fastmaf_evaluator_create_on_device(model, -1, FASTMAF_HIGH, &evaluator, text, sizeof text) == FASTMAF_INVALID_ARGUMENT &&
          std::strstr(text, "device"));
    CHECK(fastmaf_evaluator_create_on_device(model, 0, 7, &evaluator, text, sizeof text) == FASTMAF_INVALID_ARGUMENT &&
          std::strstr(text, "precision"));
    const fastmaf_status status = fastmaf_evaluator_create_on_device(model, count, FASTMAF_HIGH, &evaluator, text, sizeof text);
    CHECK(!evaluator && *text);
    if (count)
        CHECK(status == FASTMAF_DEVICE_ERROR && std::strstr(text, "there is no cuda:"));
    else
        CHECK((status == FASTMAF_UNSUPPORTED || status == FASTMAF_DEVICE_ERROR) && !std::strcmp(text, reason));
}

}  // namespace

int main(int argc, char** argv) {
    const int calls = std::getenv("FASTMAF_CALLS") ? std::atoi(std::getenv("FASTMAF_CALLS")) : 2000;
    CHECK(fastmaf_abi_version() == FASTMAF_ABI_VERSION);
#ifdef COUNTS_ALLOCATIONS
    ::operator delete(::operator new(100));  // called by name: a new-expression may be left out by the compiler
    CHECK(memcheck || allocations > 0);
#endif
    CHECK(std::strlen(fastmaf_version()) > 0);
    for (int i = 1; i < argc; ++i) {
        char text[300];
        fastmaf_model* model = nullptr;
        if (fastmaf_model_open(argv[i], &model, text, sizeof text)) {
            std::fprintf(stderr, "%s\n", text);
            CHECK(false);
            continue;
        }
        CHECK(fastmaf_model_features(model) > 0 && fastmaf_model_layers(model) > 0 && fastmaf_model_parameters(model) > 0);
        CHECK(fastmaf_model_memory(model) > 0 && !fastmaf_model_name(model, -1) &&
              !fastmaf_model_name(model, fastmaf_model_features(model)));
        the_first_sample_brings_all(argv[i]);
        threads_share_a_model(model);
        nothing_is_allocated(model, calls);
        the_callers_floats_stay(model);
        parts_are_the_whole(model);
        impossible_values(model);
        devices(model);
        fastmaf_model_free(model);
        errors(argv[i]);
    }
    std::printf("%d passed, %d failed\n", passed.load(), failed.load());
    return failed > 0;
}
