// The C face: fastmaf.h over the record, the programs and the CPU backend. Exceptions end here.
#include "../include/fastmaf.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "../cpu/backend.hpp"
#include "../cpu/isa.hpp"
#include "../record/lower.hpp"
#include "../record/record.hpp"

namespace {

using namespace fastmaf;

constexpr int64_t kPiece = 4096;  // rows between a caller's array and one that backends write

struct Failure : std::runtime_error {
    Failure(fastmaf_status status, const std::string& text) : std::runtime_error(text), status(status) {}
    const fastmaf_status status;
};

[[noreturn]] void refuse(const std::string& text) { throw Failure(FASTMAF_INVALID_ARGUMENT, text); }

struct Inner {
    std::variant<std::shared_ptr<Program<float>>, std::shared_ptr<Program<double>>> program;
    std::vector<std::string> names;
    int64_t layers = 0;

    template <class F>
    auto visit(F f) const {
        return std::visit([&](const auto& program) { return f(*program); }, program);
    }
};

template <class T>
struct State {
    std::shared_ptr<Program<T>> program;
    Workspace<T> workspace;
    AlignedVector<T> results[3];  // of a piece: what has another dtype or other strides than its output
    AlignedVector<float> single;
    AlignedVector<double> twice, sums;
    AlignedVector<T> ones;
};

// Runs `body` and turns what it throws into a status and a text for `report`.
template <class F, class R>
fastmaf_status guarded(F body, R report) noexcept {
    fastmaf_status status = FASTMAF_INTERNAL;
    const char* text = "unknown error";
    try {
        try {
            body();
            return FASTMAF_OK;
        } catch (const Failure& failure) {
            report(failure.status, failure.what());
            return failure.status;
        } catch (const record::Error& error) {
            status = FASTMAF_INVALID_FILE;
            report(status, error.what());
            return status;
        } catch (const std::bad_alloc&) {
            status = FASTMAF_OUT_OF_MEMORY;
            text = "out of memory";
        } catch (const std::length_error&) {
            status = FASTMAF_OUT_OF_MEMORY;
            text = "out of memory";
        } catch (const std::exception& error) {
            report(status, error.what());
            return status;
        }
        report(status, text);
    } catch (...) {  // there was no room for the text
        return status == FASTMAF_INTERNAL ? FASTMAF_OUT_OF_MEMORY : status;
    }
    return status;
}

template <class F>
fastmaf_status with_buffer(char* message, size_t size, F body) noexcept {
    if (message && size) *message = 0;
    return guarded(body, [&](fastmaf_status, const char* text) {
        if (message && size) std::snprintf(message, size, "%s", text);
    });
}

std::shared_ptr<const Inner> inner_of(const void* bytes, size_t count) {
    const record::Record record = record::read({static_cast<const char*>(bytes), count});
    if (!record.members.empty())
        throw Failure(FASTMAF_UNSUPPORTED, "the file holds an ensemble of masks, for which this library has no code: save its members one by one");
    if (const std::string missing = record::unsupported(record); !missing.empty())
        throw Failure(FASTMAF_UNSUPPORTED, "the flow has " + missing + ", for which this library has no code");
    auto inner = std::make_shared<Inner>();
    auto pack = [&](auto zero) {
        using T = decltype(zero);
        auto program = std::make_shared<Program<T>>(record::lower(record));
        program->set_parameters(record::parameters(record));
        inner->layers = int64_t(program->stages());
        inner->program = std::move(program);
    };
    if (record.is_double)
        pack(0.0);
    else
        pack(0.0f);
    inner->names = record.names;
    return inner;
}

template <class T>
constexpr int32_t kDtype = std::is_same_v<T, float> ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64;

int64_t size_of(int32_t dtype) { return dtype == FASTMAF_FLOAT32 ? 4 : 8; }

// An array of the caller, checked.
Rows rows_of(const char* name, const fastmaf_array* array, int64_t groups, int64_t rows) {
    if (!array || (!array->data && groups * rows > 0)) refuse(std::string(name) + " is a null pointer");
    if (array->dtype != FASTMAF_FLOAT32 && array->dtype != FASTMAF_FLOAT64) refuse(std::string(name) + ": its dtype is none of fastmaf_dtype");
    const int64_t size = size_of(array->dtype);
    return {static_cast<const char*>(array->data), array->dtype == FASTMAF_FLOAT32 ? DType::f32 : DType::f64, array->group_stride * size,
            array->row_stride * size, array->column_stride * size};
}

void check_output(const char* name, const fastmaf_output* output, int64_t total) {
    if (!output || (!output->data && total > 0)) refuse(std::string(name) + " is a null pointer");
    if (output->dtype != FASTMAF_FLOAT32 && output->dtype != FASTMAF_FLOAT64) refuse(std::string(name) + ": its dtype is none of fastmaf_dtype");
}

// Whether a backend that writes numbers of T, `width` in a row, can write to an output itself.
template <class T>
bool is_plain(const fastmaf_output& output, int64_t width) {
    return output.dtype == kDtype<T> && output.row_stride == width && (output.column_stride == 1 || width == 1);
}

template <class T>
void scatter(const T* from, int64_t begin, int64_t rows, int64_t width, const fastmaf_output& output) {
    auto copy = [&](auto* to) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < width; ++c)
                to[(begin + r) * output.row_stride + c * output.column_stride] = std::remove_pointer_t<decltype(to)>(from[r * width + c]);
    };
    if (output.dtype == FASTMAF_FLOAT32)
        copy(static_cast<float*>(output.data));
    else
        copy(static_cast<double*>(output.data));
}

// An output as a backend sees it: the caller's memory, or a buffer that is copied there piece by piece.
template <class T>
class Target {
public:
    Target(const fastmaf_output* output, int64_t width, AlignedVector<T>& buffer) : output_(output), width_(width), buffer_(buffer) {}
    bool direct() const { return !output_ || is_plain<T>(*output_, width_); }
    T* at(int64_t begin, int64_t rows) {
        if (!output_) return nullptr;
        if (direct()) return static_cast<T*>(output_->data) + begin * width_;
        if (int64_t(buffer_.size()) < rows * width_) buffer_.resize(size_t(rows * width_));
        return buffer_.data();
    }
    void done(int64_t begin, int64_t rows) {
        if (!direct()) scatter(buffer_.data(), begin, rows, width_, *output_);
    }

private:
    const fastmaf_output* const output_;
    const int64_t width_;
    AlignedVector<T>& buffer_;
};

void check_counts(int64_t groups, int64_t rows) {
    if (groups < 0) refuse("groups is negative");
    if (rows < 0) refuse("rows is negative");
    if (rows && groups > std::numeric_limits<int64_t>::max() / 64 / rows) refuse("groups x rows is too large");
}

// f(first group, groups, first row, rows): whole groups, or parts of one, of at most `most` rows.
template <class F>
void each_piece(int64_t groups, int64_t rows, int64_t most, F f) {
    if (groups == 0 || rows == 0) return;
    if (rows > most) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t r = 0; r < rows; r += most) f(g, int64_t(1), r, std::min(most, rows - r));
    } else {
        const int64_t together = most / rows;
        for (int64_t g = 0; g < groups; g += together) f(g, std::min(together, groups - g), int64_t(0), rows);
    }
}

Rows moved(Rows rows, int64_t group, int64_t row) {
    if (rows.data) rows.data += group * rows.outer + row * rows.inner;
    return rows;
}

Batch piece_of(const Batch& batch, int64_t group, int64_t groups, int64_t row, int64_t rows) {
    Batch part = batch;
    part.outer = groups;
    part.inner = rows;
    part.x = moved(batch.x, group, row);
    part.context = moved(batch.context, group, row);
    return part;
}

template <class T>
Batch batch_of(const Program<T>& program, int64_t groups, int64_t rows, const char* name, const fastmaf_array* x, const fastmaf_array* context) {
    check_counts(groups, rows);
    Batch batch;
    batch.outer = groups;
    batch.inner = rows;
    batch.x = rows_of(name, x, groups, rows);
    if (program.context())
        batch.context = rows_of("context", context, groups, rows);
    else if (context)
        refuse("context is given, but the model has none");
    return batch;
}

constexpr int64_t kAll = std::numeric_limits<int64_t>::max() / 64;

const Poll kNoPoll;

template <class T>
void refuse_discrete(const Program<T>& program, const char* what) {
    if (program.discrete()) throw Failure(FASTMAF_UNSUPPORTED, std::string("the variables are discrete: they have no ") + what);
}

// A method whose only output has `width` numbers in a row.
template <class T, class F>
void evaluate(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context, const fastmaf_output* output,
              const char* name, int64_t width, F call) {
    const Batch batch = batch_of(*state.program, groups, rows, "x", x, context);
    check_output(name, output, batch.rows());
    Target<T> target(output, width, state.results[0]);
    each_piece(groups, rows, target.direct() ? kAll : kPiece, [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        const int64_t begin = g * rows + r, count = gs * rs;
        call(*state.program, piece_of(batch, g, gs, r, rs), target.at(begin, count), kNoPoll, &state.workspace);
        target.done(begin, count);
    });
}

template <class T>
void gradient(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context, const fastmaf_output* value,
              const fastmaf_output* d_x, const fastmaf_output* d_context) {
    const Program<T>& program = *state.program;
    const Batch batch = batch_of(program, groups, rows, "x", x, context);
    const int64_t total = batch.rows(), width = program.context();
    check_output("log_prob", value, total);
    if (d_x) {
        refuse_discrete(program, "gradient in x");
        check_output("d_x", d_x, total);
    }
    const bool summed = width && batch.context.inner == 0;
    if (d_context) {
        if (!width) refuse("d_context is given, but the model has no context");
        check_output("d_context", d_context, summed ? groups : total);
    }
    Target<T> values(value, 1, state.results[0]), of_x(d_x, program.features(), state.results[1]);
    Target<T> of_context(summed ? nullptr : d_context, width, state.results[2]);
    if (state.ones.size() < size_t(std::min(total, kPiece))) state.ones.assign(size_t(std::min(total, kPiece)), T(1));
    if (summed && d_context) {
        if (state.results[2].size() < size_t(kPiece * width)) state.results[2].resize(size_t(kPiece * width));
        state.sums.assign(size_t(width), 0.0);
        if (rows == 0)
            for (int64_t g = 0; g < groups; ++g) scatter(state.sums.data(), g, 1, width, *d_context);
    }
    each_piece(groups, rows, kPiece, [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        const int64_t begin = g * rows + r, count = gs * rs;
        T* const own = d_context && summed ? state.results[2].data() : of_context.at(begin, count);
        vjp<T>(program, piece_of(batch, g, gs, r, rs), state.ones.data(), values.at(begin, count), of_x.at(begin, count), own, nullptr, kNoPoll,
               &state.workspace);
        values.done(begin, count);
        of_x.done(begin, count);
        if (!d_context) return;
        if (!summed) return of_context.done(begin, count);
        for (int64_t group = 0; group < gs; ++group) {
            if (r == 0) std::fill(state.sums.begin(), state.sums.end(), 0.0);
            for (int64_t i = group * rs; i < (group + 1) * rs; ++i)
                for (int64_t c = 0; c < width; ++c) state.sums[size_t(c)] += double(own[i * width + c]);
            if (r + rs == rows) scatter(state.sums.data(), g + group, 1, width, *d_context);
        }
    });
}

template <class T, class Out>
void draw_into(State<T>& state, int64_t groups, int64_t rows, const Draw& whole, const fastmaf_output& samples, const fastmaf_output* log_prob,
               AlignedVector<Out>& buffer) {
    Target<Out> x(&samples, state.program->features(), buffer);
    Target<T> density(log_prob, 1, state.results[0]);
    each_piece(groups, rows, x.direct() && density.direct() ? kAll : kPiece, [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        const int64_t begin = g * rows + r, count = gs * rs;
        Draw draw = whole;
        draw.contexts = gs;
        draw.rows = rs;
        draw.offset += uint64_t(r);
        draw.context_offset += uint32_t(g);
        draw.context = moved(whole.context, g, 0);
        sample<T>(*state.program, draw, x.at(begin, count), density.at(begin, count), kNoPoll, &state.workspace);
        x.done(begin, count);
        density.done(begin, count);
    });
}

template <class T>
void draw(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* context, uint64_t seed, uint64_t offset, uint32_t context_offset,
          const fastmaf_output* samples, const fastmaf_output* log_prob) {
    check_counts(groups, rows);
    const int64_t total = groups * rows;
    check_output("samples", samples, total);
    if (log_prob) check_output("log_prob", log_prob, total);
    if (rows && offset > std::numeric_limits<uint64_t>::max() - uint64_t(rows - 1)) refuse("offset + rows is too large");
    if (groups && uint64_t(context_offset) + uint64_t(groups - 1) > std::numeric_limits<uint32_t>::max()) refuse("context_offset + groups is too large");
    Draw whole;
    whole.seed = seed;
    whole.offset = offset;
    whole.context_offset = context_offset;
    if (state.program->context()) {
        whole.context = rows_of("context", context, groups, 1);
        whole.context.inner = 0;
    } else if (context) {
        refuse("context is given, but the model has none");
    }
    if (samples->dtype == FASTMAF_FLOAT32)
        draw_into<T, float>(state, groups, rows, whole, *samples, log_prob, state.single);
    else
        draw_into<T, double>(state, groups, rows, whole, *samples, log_prob, state.twice);
}

template <class T>
void back(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* noise, const fastmaf_array* context, const fastmaf_output* x) {
    refuse_discrete(*state.program, "noise");
    const Batch batch = batch_of(*state.program, groups, rows, "noise", noise, context);
    check_output("x", x, batch.rows());
    auto into = [&](auto& buffer) {
        using Out = typename std::decay_t<decltype(buffer)>::value_type;
        Target<Out> target(x, state.program->features(), buffer);
        each_piece(groups, rows, target.direct() ? kAll : kPiece, [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
            const int64_t begin = g * rows + r, count = gs * rs;
            from_noise<T>(*state.program, piece_of(batch, g, gs, r, rs), target.at(begin, count), kNoPoll, &state.workspace);
            target.done(begin, count);
        });
    };
    if (x->dtype == FASTMAF_FLOAT32)
        into(state.single);
    else
        into(state.twice);
}

}  // namespace

struct fastmaf_model {
    std::shared_ptr<const Inner> inner;
};

struct fastmaf_evaluator {
    std::variant<State<float>, State<double>> state;
    std::string message;
};

namespace {

template <class F>
fastmaf_status run(fastmaf_evaluator* evaluator, F body) noexcept {
    if (!evaluator) return FASTMAF_INVALID_ARGUMENT;
    evaluator->message.clear();
    return guarded([&] { std::visit(body, evaluator->state); }, [&](fastmaf_status, const char* text) { evaluator->message = text; });
}

}  // namespace

extern "C" {

int32_t fastmaf_abi_version(void) { return FASTMAF_ABI_VERSION; }

const char* fastmaf_version(void) { return FASTMAF_VERSION; }

fastmaf_status fastmaf_model_from_memory(const void* bytes, size_t count, fastmaf_model** model, char* message, size_t size) {
    return with_buffer(message, size, [&] {
        if (!model) refuse("model is a null pointer");
        *model = nullptr;
        if (!bytes) refuse("bytes is a null pointer");
        *model = new fastmaf_model{inner_of(bytes, count)};
    });
}

fastmaf_status fastmaf_model_open(const char* path, fastmaf_model** model, char* message, size_t size) {
    return with_buffer(message, size, [&] {
        if (!model) refuse("model is a null pointer");
        *model = nullptr;
        if (!path) refuse("path is a null pointer");
        const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
        std::string bytes;
        bool read = file != nullptr;
        char block[1 << 16];
        while (read) {
            const size_t got = std::fread(block, 1, sizeof block, file.get());
            bytes.append(block, got);
            if (got < sizeof block) break;
        }
        if (!read || std::ferror(file.get())) throw Failure(FASTMAF_CANNOT_READ, std::string(path) + ": " + std::strerror(errno));
        try {
            *model = new fastmaf_model{inner_of(bytes.data(), bytes.size())};
        } catch (const record::Error& error) {
            throw record::Error(std::string(path) + ": " + error.what());
        } catch (const Failure& failure) {
            throw Failure(failure.status, std::string(path) + ": " + failure.what());
        }
    });
}

void fastmaf_model_free(fastmaf_model* model) { delete model; }

int64_t fastmaf_model_features(const fastmaf_model* model) {
    return model ? model->inner->visit([](const auto& program) { return int64_t(program.features()); }) : -1;
}
int64_t fastmaf_model_context_features(const fastmaf_model* model) {
    return model ? model->inner->visit([](const auto& program) { return int64_t(program.context()); }) : -1;
}
int64_t fastmaf_model_layers(const fastmaf_model* model) { return model ? model->inner->layers : -1; }
int64_t fastmaf_model_parameters(const fastmaf_model* model) {
    return model ? model->inner->visit([](const auto& program) { return program.parameter_count(); }) : -1;
}
int64_t fastmaf_model_most_values(const fastmaf_model* model) {
    return model ? model->inner->visit([](const auto& program) { return program.discrete() ? int64_t(program.most_values()) : 0; }) : -1;
}
fastmaf_dtype fastmaf_model_dtype(const fastmaf_model* model) { return model && model->inner->program.index() == 0 ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64; }
const char* fastmaf_model_name(const fastmaf_model* model, int64_t feature) {
    if (!model || feature < 0 || feature >= int64_t(model->inner->names.size())) return nullptr;
    return model->inner->names[size_t(feature)].c_str();
}
size_t fastmaf_model_memory(const fastmaf_model* model) {
    return model ? model->inner->visit([](const auto& program) { return program.memory(); }) : 0;
}

fastmaf_status fastmaf_evaluator_create(const fastmaf_model* model, int32_t threads, fastmaf_evaluator** evaluator, char* message, size_t size) {
    return with_buffer(message, size, [&] {
        if (!evaluator) refuse("evaluator is a null pointer");
        *evaluator = nullptr;
        if (!model) refuse("model is a null pointer");
        if (threads < 1) refuse("threads must be at least 1");
        auto made = std::make_unique<fastmaf_evaluator>();
        std::visit(
            [&](const auto& program) {
                using T = typename std::decay_t<decltype(*program)>::Value;
                auto& state = made->state.template emplace<State<T>>();
                state.program = program;
                state.workspace.kernels = &kernels<T>();
                state.workspace.threads = threads;
            },
            model->inner->program);
        *evaluator = made.release();
    });
}

void fastmaf_evaluator_free(fastmaf_evaluator* evaluator) { delete evaluator; }

const char* fastmaf_message(const fastmaf_evaluator* evaluator) { return evaluator ? evaluator->message.c_str() : "evaluator is a null pointer"; }

fastmaf_status fastmaf_log_prob(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context,
                                const fastmaf_output* log_prob) {
    return run(evaluator, [&](auto& state) {
        using T = typename std::decay_t<decltype(*state.program)>::Value;
        evaluate(state, groups, rows, x, context, log_prob, "log_prob", 1, fastmaf::log_prob<T>);
    });
}

fastmaf_status fastmaf_log_prob_and_grad(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                         const fastmaf_array* context, const fastmaf_output* log_prob, const fastmaf_output* d_x,
                                         const fastmaf_output* d_context) {
    return run(evaluator, [&](auto& state) { gradient(state, groups, rows, x, context, log_prob, d_x, d_context); });
}

fastmaf_status fastmaf_sample(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* context, uint64_t seed, uint64_t offset,
                              uint32_t context_offset, const fastmaf_output* samples, const fastmaf_output* log_prob) {
    return run(evaluator, [&](auto& state) { draw(state, groups, rows, context, seed, offset, context_offset, samples, log_prob); });
}

fastmaf_status fastmaf_to_noise(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context,
                                const fastmaf_output* noise) {
    return run(evaluator, [&](auto& state) {
        using T = typename std::decay_t<decltype(*state.program)>::Value;
        refuse_discrete(*state.program, "noise");
        evaluate(state, groups, rows, x, context, noise, "noise", state.program->features(), fastmaf::to_noise<T>);
    });
}

fastmaf_status fastmaf_from_noise(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* noise, const fastmaf_array* context,
                                  const fastmaf_output* x) {
    return run(evaluator, [&](auto& state) { back(state, groups, rows, noise, context, x); });
}

fastmaf_status fastmaf_conditional_probs(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                         const fastmaf_array* context, const fastmaf_output* probabilities) {
    return run(evaluator, [&](auto& state) {
        using T = typename std::decay_t<decltype(*state.program)>::Value;
        if (!state.program->discrete()) throw Failure(FASTMAF_UNSUPPORTED, "the variables are continuous: their values have no probabilities");
        evaluate(state, groups, rows, x, context, probabilities, "probabilities", state.program->features() * int64_t(state.program->most_values()),
                 fastmaf::conditional_probs<T>);
    });
}

}  // extern "C"
