// The C face: fastmaf.h over the record, the weights and the backends. Exceptions end here.
#include "../include/fastmaf.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../core/device.hpp"
#include "../core/floats.hpp"
#include "../core/lazy.hpp"
#include "../cpu/backend.hpp"
#include "../cpu/isa.hpp"
#include "../cpu/rows.hpp"
#include "../cpu/tile.hpp"
#include "../record/lower.hpp"
#include "../record/record.hpp"

namespace {

using namespace fastmaf;

constexpr int64_t kPiece = 4096;  // rows between a caller's array and one that backends write
constexpr int64_t kPieceOfGpu = 65536;

struct Failure : std::runtime_error {
    Failure(fastmaf_status status, const std::string& text) : std::runtime_error(text), status(status) {}
    const fastmaf_status status;
};

[[noreturn]] void refuse(const std::string& text) { throw Failure(FASTMAF_INVALID_ARGUMENT, text); }

template <class T>
using AllWeights = std::vector<std::shared_ptr<Weights<T>>>;  // one, or those of the members of an ensemble

template <class T>
using Copies = std::map<std::tuple<size_t, int, device::Precision>, std::shared_ptr<const device::Flow<T>>>;

struct Inner {
    std::variant<AllWeights<float>, AllWeights<double>> weights;
    mutable std::tuple<Copies<float>, Copies<double>> copies;  // of members on GPUs, each made with its first evaluator
    bool ensemble = false;
    std::vector<std::string> names;
    int64_t layers = 0, parameters = 0;

    // Of the first member.
    const Plan& plan() const {
        return std::visit([](const auto& all) -> const Plan& { return all[0]->plan(); }, weights);
    }
};

template <class T>
struct Member {
    std::shared_ptr<Weights<T>> weights;
    Workspace<T> workspace;
    std::shared_ptr<const device::Flow<T>> gpu;  // null where the CPU computes
};

template <class T>
struct State {
    std::vector<Member<T>> members;
    bool ensemble = false, drew = false;
    int device = -1;  // of the GPU that computes
    uintptr_t stream = 0;
    device::Place where;          // of the arrays of the call
    AlignedVector<T> results[3];  // of a piece: what has another dtype or other strides than its output
    AlignedVector<float> single;
    AlignedVector<double> twice, sums, total;
    AlignedVector<T> ones;

    // Of an ensemble, for a piece.
    AlignedVector<T> densities, share, part_x, part_context;  // densities [members][rows]
    AlignedVector<double> mixed, whole_x, whole_context, contexts;
    std::vector<uint32_t> chosen;
    std::vector<uint64_t> index, group;
    std::vector<int64_t> place;
    std::tuple<AlignedVector<float>, AlignedVector<double>> drawn;

    const Weights<T>& weights() const { return *members[0].weights; }
    const Plan& plan() const { return weights().plan(); }
    bool on_gpu() const { return device >= 0; }
    int64_t piece() const { return on_gpu() ? kPieceOfGpu : kPiece; }
};

// Room for `count` numbers, which grows and never shrinks.
template <class V>
auto* room(V& buffer, int64_t count) {
    if (int64_t(buffer.size()) < count) buffer.resize(size_t(count));
    return buffer.data();
}

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
        } catch (const device::Error& error) {
            status = error.of_memory ? FASTMAF_OUT_OF_MEMORY : FASTMAF_DEVICE_ERROR;
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
    std::vector<const record::Record*> flows{&record};
    for (const record::Record& other : record.others) flows.push_back(&other);
    for (const record::Record* flow : flows)
        if (const std::string missing = record::unsupported(*flow); !missing.empty())
            throw Failure(FASTMAF_UNSUPPORTED, "the flow has " + missing + ", for which this library has no code");
    auto inner = std::make_shared<Inner>();
    auto pack = [&](auto zero) {
        using T = decltype(zero);
        AllWeights<T> all;
        for (const record::Record* flow : flows) {
            for (size_t k = 0; k < std::max<size_t>(1, flow->members.size()); ++k) {
                all.push_back(std::make_shared<Weights<T>>(record::lower(*flow, k)));
                all.back()->set_parameters(record::parameters(*flow));
            }
            inner->parameters += all.back()->plan().parameter_count();  // members that differ in their masks share them
        }
        inner->layers = int64_t(all[0]->plan().stages());
        inner->weights = std::move(all);
    };
    inner->ensemble = flows.size() > 1 || !record.members.empty();
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
    if (array->dtype != FASTMAF_FLOAT32 && array->dtype != FASTMAF_FLOAT64)
        refuse(std::string(name) + ": its dtype is none of fastmaf_dtype");
    const int64_t size = size_of(array->dtype);
    return {static_cast<const char*>(array->data), array->dtype == FASTMAF_FLOAT32 ? DType::f32 : DType::f64, array->group_stride * size,
            array->row_stride * size, array->column_stride * size};
}

void check_output(const char* name, const fastmaf_output* output, int64_t total) {
    if (!output || (!output->data && total > 0)) refuse(std::string(name) + " is a null pointer");
    if (output->dtype != FASTMAF_FLOAT32 && output->dtype != FASTMAF_FLOAT64)
        refuse(std::string(name) + ": its dtype is none of fastmaf_dtype");
}

// Whether a backend that writes numbers of T, `width` in a row, can write to an output itself.
template <class T>
bool is_plain(const fastmaf_output& output, int64_t rows, int64_t width) {
    return output.dtype == kDtype<T> && (output.row_stride == width || rows == 1) && (output.column_stride == 1 || width == 1);
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
    Target(const fastmaf_output* output, int64_t rows, int64_t width, AlignedVector<T>& buffer)
        : output_(output), rows_(rows), width_(width), buffer_(buffer) {}
    bool direct() const { return !output_ || is_plain<T>(*output_, rows_, width_); }
    T* at(int64_t begin, int64_t rows) {
        if (!output_) return nullptr;
        if (direct()) return static_cast<T*>(output_->data) + begin * width_;
        return room(buffer_, rows * width_);
    }
    void done(int64_t begin, int64_t rows) {
        if (!direct()) scatter(buffer_.data(), begin, rows, width_, *output_);
    }

private:
    const fastmaf_output* const output_;
    const int64_t rows_, width_;
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

Batch batch_of(const Plan& plan, int64_t groups, int64_t rows, const char* name, const fastmaf_array* x, const fastmaf_array* context) {
    check_counts(groups, rows);
    Batch batch;
    batch.outer = groups;
    batch.inner = rows;
    batch.x = rows_of(name, x, groups, rows);
    if (plan.context())
        batch.context = rows_of("context", context, groups, rows);
    else if (context)
        refuse("context is given, but the model has none");
    return batch;
}

constexpr int64_t kAll = std::numeric_limits<int64_t>::max() / 64;

const Poll kNoPoll;

void refuse_discrete(const Plan& plan, const char* what) {
    if (plan.discrete()) throw Failure(FASTMAF_UNSUPPORTED, std::string("the variables are discrete: they have no ") + what);
}

template <class T>
void refuse_ensemble(const State<T>& state, const char* what) {
    if (state.ensemble)
        throw Failure(FASTMAF_UNSUPPORTED, std::string("an ensemble has no ") + what +
                                               ", since each member has an order of its own: save a member, ensemble.member(k)");
}

// An array of a call; without data where there is none.
struct Named {
    Named(const char* name, const fastmaf_array* array)
        : name(name), data(array ? array->data : nullptr), size(array ? size_of(array->dtype) : 1) {}
    Named(const char* name, const fastmaf_output* array)
        : name(name), data(array ? array->data : nullptr), size(array ? size_of(array->dtype) : 1) {}
    const char* name;
    const void* data;
    int64_t size;
};

// Finds where the arrays of a call lie: all on the evaluator's GPU, or all on the host.
template <class T>
void locate(State<T>& state, std::initializer_list<Named> arrays) {
    if (!state.on_gpu()) return;
    auto place = [](int device) { return device < 0 ? std::string("the host") : "cuda:" + std::to_string(device); };
    const Named* before = nullptr;
    int device = -1;
    for (const Named& array : arrays) {
        if (!array.data) continue;
        const auto address = reinterpret_cast<uintptr_t>(array.data);
        const int own = device::device_of(address);
        if (own >= 0 && own != state.device)
            refuse(std::string(array.name) + " lies on " + place(own) + ", the evaluator computes on " + place(state.device));
        if (before && own != device)
            refuse(std::string(before->name) + " lies on " + place(device) + ", " + array.name + " on " + place(own) +
                   ": all arrays of a call lie on one of them");
        if (own >= 0 && address % uintptr_t(array.size))
            refuse(std::string(array.name) + " is not aligned to its " + std::to_string(array.size) + " bytes");
        before = &array;
        device = own;
    }
    state.where = {device >= 0, state.stream};
    if (state.ensemble && state.where.on_device)
        throw Failure(FASTMAF_UNSUPPORTED,
                      std::string(before->name) + " lies on " + place(device) + ": an ensemble takes arrays of the host");
}

// Kernels write without gaps.
template <class T>
void check_direct(const device::Place& place, const char* name, bool direct, int64_t width) {
    if (!place.on_device || direct) return;
    throw Failure(FASTMAF_UNSUPPORTED, std::string("on a GPU ") + name + " is written in " + (sizeof(T) == 4 ? "float32" : "float64") +
                                           " without gaps: row_stride " + std::to_string(width) + ", column_stride 1");
}

// What a member computes, where it does.

template <class T>
void density(State<T>& state, Member<T>& member, const Batch& batch, T* out) {
    if (member.gpu) return member.gpu->log_prob(batch, out, state.where, kNoPoll);
    log_prob<T>(*member.weights, batch, out, kNoPoll, &member.workspace);
}

// factor: [rows].
template <class T>
void pull_back(State<T>& state, Member<T>& member, const Batch& batch, const T* factor, T* value, T* d_x, T* d_context) {
    if (!member.gpu) return vjp<T>(*member.weights, batch, factor, value, d_x, d_context, nullptr, kNoPoll, &member.workspace);
    device::Gradients<T> out;
    out.value = value;
    out.x = d_x;
    out.context = d_context;
    constexpr int64_t size = sizeof(T);
    const Rows factors{reinterpret_cast<const char*>(factor), size == 4 ? DType::f32 : DType::f64, batch.inner * size, size, size};
    member.gpu->vjp(batch, factors, out, state.where, kNoPoll);
}

template <class T, class Out>
void draw_rows(State<T>& state, Member<T>& member, const Draw& draw, Out* out, T* value) {
    if (member.gpu) return member.gpu->sample(draw, out, value, state.where, kNoPoll);
    sample<T>(*member.weights, draw, out, value, kNoPoll, &member.workspace);
}

// Of an ensemble: the density is the mean of those of its members, and each row is drawn from a member drawn for it. Everything is summed
// over the members one after the other in double, as fastmaf/ensemble.py does it.

double log_add_exp(double x, double y) {
    if (x == y) return x + 0.693147180559945309417232121458176568;
    const double distance = x - y;
    if (distance > 0) return x + std::log1p(std::exp(-distance));
    if (distance <= 0) return y + std::log1p(std::exp(distance));
    return distance;  // NaN
}

// The densities of all members, the sum of them, and their mean.
template <class T>
void mix(State<T>& state, const Batch& batch, T* out) {
    const PlainFloats floats;
    const int64_t rows = batch.rows(), members = int64_t(state.members.size());
    T* const densities = room(state.densities, members * rows);
    double* const mixed = room(state.mixed, rows);
    std::fill(mixed, mixed + rows, -std::numeric_limits<double>::infinity());
    for (int64_t k = 0; k < members; ++k) {
        Member<T>& member = state.members[size_t(k)];
        T* const own = densities + k * rows;
        density(state, member, batch, own);
        for (int64_t r = 0; r < rows; ++r) mixed[r] = log_add_exp(mixed[r], double(own[r]));
    }
    const double count = std::log(double(members));
    for (int64_t r = 0; r < rows; ++r) out[r] = T(mixed[r] - count);
}

template <class T>
void density(State<T>& state, const Batch& batch, T* out) {
    if (state.ensemble) return mix(state, batch, out);
    density(state, state.members[0], batch, out);
}

// f(member, groups x rows of gradients in the context) for each member, whose d_x go into the sum.
template <class T, class F>
void mixed_gradient(State<T>& state, const Batch& batch, T* value, T* d_x, bool of_context, F f) {
    const PlainFloats floats;
    const int64_t rows = batch.rows(), size = rows * state.plan().features();
    mix(state, batch, value);
    T* const share = room(state.share, rows);  // of the member in the density of the row
    T* const part = d_x ? room(state.part_x, size) : nullptr;
    T* const part_context = of_context ? room(state.part_context, rows * state.plan().context()) : nullptr;
    double* const whole = d_x ? room(state.whole_x, size) : nullptr;
    if (d_x) std::fill(whole, whole + size, 0.0);
    for (size_t k = 0; k < state.members.size(); ++k) {
        Member<T>& member = state.members[k];
        const T* const own = state.densities.data() + int64_t(k) * rows;
        for (int64_t r = 0; r < rows; ++r) {
            const double sum = state.mixed[size_t(r)];
            share[r] = sum == -std::numeric_limits<double>::infinity() ? T(0) : T(std::exp(double(own[r]) - sum));
        }
        pull_back(state, member, batch, share, static_cast<T*>(nullptr), part, part_context);
        for (int64_t i = 0; d_x && i < size; ++i) whole[i] += double(part[i]);
        if (of_context) f(k, part_context);
    }
    for (int64_t i = 0; d_x && i < size; ++i) d_x[i] = T(whole[i]);
}

constexpr uint32_t kComponents = 2u << 24;  // the stream of choices among components

// Which member each row comes from: a number of that stream, in the column behind the last variable.
template <class T>
void choose(State<T>& state, const Draw& draw) {
    const auto& words = state.members[0].workspace.kernels->words;
    const uint32_t features = uint32_t(state.plan().features());
    uint32_t* chosen = room(state.chosen, draw.contexts * draw.rows);
    uint32_t word[4][64];
    for (int64_t g = 0; g < draw.contexts; ++g)
        for (int64_t r = 0; r < draw.rows; r += 64) {
            const int count = int(std::min<int64_t>(64, draw.rows - r));
            words(draw.seed, draw.offset + uint64_t(r), count, draw.context_offset + uint32_t(g), features / 4 | kComponents, word);
            for (int i = 0; i < count; ++i) *chosen++ = uint32_t(uint64_t(word[features % 4][i]) * state.members.size() >> 32);
        }
}

template <class T, class Out>
void draw_member(State<T>& state, size_t k, const Draw& draw, int64_t rows, Out* out) {
    Draw own;
    own.seed = draw.seed;
    own.rows = rows;
    own.index = state.index.data();
    own.group = state.group.data();
    if (const int64_t width = state.plan().context())
        own.context = {reinterpret_cast<const char*>(state.contexts.data()), DType::f64, 0, width * int64_t(sizeof(double)),
                       sizeof(double)};
    draw_rows(state, state.members[k], own, out, static_cast<T*>(nullptr));
}

template <class T, class Out>
void mixed_sample(State<T>& state, const Draw& draw, Out* out) {
    const int64_t total = draw.contexts * draw.rows, features = state.plan().features(), width = state.plan().context();
    choose(state, draw);
    uint64_t* const index = room(state.index, total);
    uint64_t* const group = room(state.group, total);
    int64_t* const place = room(state.place, total);
    double* const contexts = room(state.contexts, total * width);
    Out* const drawn = room(std::get<AlignedVector<Out>>(state.drawn), total * features);
    auto take = [&](int64_t row, int64_t i) {  // row number i of a member
        const int64_t g = row / draw.rows;
        index[i] = draw.offset + uint64_t(row % draw.rows);
        group[i] = draw.context_offset + uint64_t(g);
        place[i] = row;
        for (int64_t c = 0; c < width; ++c)
            contexts[i * width + c] = read(moved(draw.context, g, 0).data + c * draw.context.column, draw.context.dtype);
    };
    // What a member needs is there before a row happens to be drawn from it.
    for (size_t k = 0; !state.drew && k < state.members.size(); ++k) {
        take(0, 0);
        draw_member(state, k, draw, 1, drawn);
    }
    state.drew = true;
    for (size_t k = 0; k < state.members.size(); ++k) {
        int64_t count = 0;
        for (int64_t row = 0; row < total; ++row)
            if (state.chosen[size_t(row)] == k) take(row, count++);
        if (count) draw_member(state, k, draw, count, drawn);
        for (int64_t i = 0; i < count; ++i) std::copy_n(drawn + i * features, features, out + place[i] * features);
    }
}

// A method whose only output has `width` numbers in a row.
template <class T, class F>
void evaluate(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context,
              const fastmaf_output* output, const char* name, int64_t width, F call) {
    const Batch batch = batch_of(state.plan(), groups, rows, "x", x, context);
    check_output(name, output, batch.rows());
    Target<T> target(output, batch.rows(), width, state.results[0]);
    locate(state, {{"x", x}, {"context", context}, {name, output}});
    check_direct<T>(state.where, name, target.direct(), width);
    each_piece(groups, rows, target.direct() && !state.ensemble ? kAll : state.piece(), [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        const int64_t begin = g * rows + r, count = gs * rs;
        call(piece_of(batch, g, gs, r, rs), target.at(begin, count));
        target.done(begin, count);
    });
}

template <class T>
void gradient(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* x, const fastmaf_array* context,
              const fastmaf_output* value, const fastmaf_output* d_x, const fastmaf_output* d_context) {
    const Plan& plan = state.plan();
    const Batch batch = batch_of(plan, groups, rows, "x", x, context);
    const int64_t total = batch.rows(), width = plan.context();
    check_output("log_prob", value, total);
    if (d_x) {
        refuse_discrete(plan, "gradient in x");
        check_output("d_x", d_x, total);
    }
    const bool summed = width && batch.context.inner == 0;
    if (d_context) {
        if (!width) refuse("d_context is given, but the model has no context");
        check_output("d_context", d_context, summed ? groups : total);
    }
    Target<T> values(value, total, 1, state.results[0]), of_x(d_x, total, plan.features(), state.results[1]);
    Target<T> of_context(summed ? nullptr : d_context, total, width, state.results[2]);
    locate(state, {{"x", x}, {"context", context}, {"log_prob", value}, {"d_x", d_x}, {"d_context", d_context}});
    if (state.where.on_device) {
        check_direct<T>(state.where, "log_prob", values.direct(), 1);
        check_direct<T>(state.where, "d_x", of_x.direct(), plan.features());
        check_direct<T>(state.where, "d_context", !d_context || is_plain<T>(*d_context, summed ? groups : total, width), width);
        device::Gradients<T> out;
        out.value = static_cast<T*>(value->data);
        out.x = of_x.at(0, total);
        out.context = d_context ? static_cast<T*>(d_context->data) : nullptr;
        out.of_context.inner = summed;
        return state.members[0].gpu->vjp(batch, Rows{}, out, state.where, kNoPoll);
    }
    const int64_t most = state.piece();
    if (state.ones.size() < size_t(std::min(total, most))) state.ones.assign(size_t(std::min(total, most)), T(1));
    const int64_t members = int64_t(state.members.size());
    double* sums = nullptr;  // [groups of a piece][members][width], each rounded like the gradients of its member before they are added
    T* by_row = nullptr;
    if (summed && d_context) {
        sums = room(state.sums, members * width * (rows ? std::clamp<int64_t>(most / rows, 1, std::max<int64_t>(1, groups)) : 1));
        by_row = state.ensemble ? nullptr : room(state.results[2], std::min(total, most) * width);
        room(state.total, width);
    }
    auto add_up = [&](double* group, bool last, int64_t number) {
        if (!last) return;
        for (int64_t c = 0; c < width; ++c) {
            double& total = state.total[size_t(c)] = state.ensemble ? 0 : group[c];
            for (int64_t k = 0; state.ensemble && k < members; ++k) total += double(T(group[k * width + c]));
        }
        scatter(state.total.data(), number, 1, width, *d_context);
    };
    if (sums && rows == 0) {
        std::fill(sums, sums + members * width, 0.0);
        for (int64_t g = 0; g < groups; ++g) add_up(sums, true, g);
    }
    each_piece(groups, rows, most, [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        const int64_t begin = g * rows + r, count = gs * rs;
        const Batch piece = piece_of(batch, g, gs, r, rs);
        T* const own = sums ? by_row : of_context.at(begin, count);
        if (sums && r == 0) std::fill(sums, sums + gs * members * width, 0.0);
        auto sum_up = [&](size_t k, const T* parts) {
            for (int64_t group = 0; group < gs; ++group) {
                double* const to = sums + (group * members + int64_t(k)) * width;
                for (int64_t i = group * rs; i < (group + 1) * rs; ++i)
                    for (int64_t c = 0; c < width; ++c) to[c] += double(parts[i * width + c]);
            }
        };
        if (state.ensemble) {
            double* const whole = own ? room(state.whole_context, count * width) : nullptr;
            if (own) std::fill(whole, whole + count * width, 0.0);
            mixed_gradient(state, piece, values.at(begin, count), of_x.at(begin, count), d_context, [&](size_t k, const T* parts) {
                if (sums) return sum_up(k, parts);
                for (int64_t i = 0; i < count * width; ++i) whole[i] += double(parts[i]);
            });
            for (int64_t i = 0; own && i < count * width; ++i) own[i] = T(whole[i]);
        } else {
            pull_back(state, state.members[0], piece, state.ones.data(), values.at(begin, count), of_x.at(begin, count), own);
            if (sums) sum_up(0, own);
        }
        values.done(begin, count);
        of_x.done(begin, count);
        if (sums)
            for (int64_t group = 0; group < gs; ++group) add_up(sums + group * members * width, r + rs == rows, g + group);
        else if (d_context)
            of_context.done(begin, count);
    });
}

template <class T, class Out>
void draw_into(State<T>& state, int64_t groups, int64_t rows, const Draw& whole, const fastmaf_output& samples,
               const fastmaf_output* log_prob, AlignedVector<Out>& buffer) {
    Target<Out> x(&samples, groups * rows, state.plan().features(), buffer);
    Target<T> value(log_prob, groups * rows, 1, state.results[0]);
    check_direct<Out>(state.where, "samples", x.direct(), state.plan().features());
    check_direct<T>(state.where, "log_prob", value.direct(), 1);
    each_piece(groups, rows, x.direct() && value.direct() && !state.ensemble ? kAll : state.piece(),
               [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
                   const int64_t begin = g * rows + r, count = gs * rs;
                   Draw draw = whole;
                   draw.contexts = gs;
                   draw.rows = rs;
                   draw.offset += uint64_t(r);
                   draw.context_offset += uint32_t(g);
                   draw.context = moved(whole.context, g, 0);
                   Out* const own = x.at(begin, count);
                   T* const own_value = value.at(begin, count);
                   if (state.ensemble) {
                       mixed_sample(state, draw, own);
                       constexpr int64_t size = sizeof(Out);
                       const int64_t width = state.plan().features() * size;
                       Batch drawn;
                       drawn.outer = gs;
                       drawn.inner = rs;
                       drawn.x = {reinterpret_cast<const char*>(own), size == 4 ? DType::f32 : DType::f64, rs * width, width, size};
                       drawn.context = draw.context;
                       if (own_value) mix(state, drawn, own_value);
                   } else {
                       draw_rows(state, state.members[0], draw, own, own_value);
                   }
                   x.done(begin, count);
                   value.done(begin, count);
               });
}

template <class T>
void draw(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* context, uint64_t seed, uint64_t offset,
          uint32_t context_offset, const fastmaf_output* samples, const fastmaf_output* log_prob) {
    check_counts(groups, rows);
    const int64_t total = groups * rows;
    check_output("samples", samples, total);
    if (log_prob) check_output("log_prob", log_prob, total);
    if (rows && offset > std::numeric_limits<uint64_t>::max() - uint64_t(rows - 1)) refuse("offset + rows is too large");
    if (groups && uint64_t(context_offset) + uint64_t(groups - 1) > std::numeric_limits<uint32_t>::max())
        refuse("context_offset + groups is too large");
    Draw whole;
    whole.seed = seed;
    whole.offset = offset;
    whole.context_offset = context_offset;
    if (state.plan().context()) {
        whole.context = rows_of("context", context, groups, 1);
        whole.context.inner = 0;
    } else if (context) {
        refuse("context is given, but the model has none");
    }
    locate(state, {{"context", context}, {"samples", samples}, {"log_prob", log_prob}});
    if (samples->dtype == FASTMAF_FLOAT32)
        draw_into<T, float>(state, groups, rows, whole, *samples, log_prob, state.single);
    else
        draw_into<T, double>(state, groups, rows, whole, *samples, log_prob, state.twice);
}

template <class T>
void back(State<T>& state, int64_t groups, int64_t rows, const fastmaf_array* noise, const fastmaf_array* context,
          const fastmaf_output* x) {
    refuse_discrete(state.plan(), "noise");
    refuse_ensemble(state, "noise");
    const Batch batch = batch_of(state.plan(), groups, rows, "noise", noise, context);
    check_output("x", x, batch.rows());
    locate(state, {{"noise", noise}, {"context", context}, {"x", x}});
    auto into = [&](auto& buffer) {
        using Out = typename std::decay_t<decltype(buffer)>::value_type;
        Target<Out> target(x, batch.rows(), state.plan().features(), buffer);
        check_direct<Out>(state.where, "x", target.direct(), state.plan().features());
        each_piece(groups, rows, target.direct() ? kAll : state.piece(), [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
            const int64_t begin = g * rows + r, count = gs * rs;
            const Batch piece = piece_of(batch, g, gs, r, rs);
            Out* const own = target.at(begin, count);
            if (state.on_gpu())
                state.members[0].gpu->from_noise(piece, own, state.where, kNoPoll);
            else
                from_noise<T>(state.weights(), piece, own, kNoPoll, &state.members[0].workspace);
            target.done(begin, count);
        });
    };
    if (x->dtype == FASTMAF_FLOAT32)
        into(state.single);
    else
        into(state.twice);
}

// A row in which every variable is what it can be has its probabilities whole. What is none (NaN, 0.5, a category too large, a number on
// or outside a bound) makes those of the variables behind it NaN, and no others.
template <class T>
void probabilities_of(State<T>& state, const Batch& batch, T* out) {
    const auto call = [&](const Batch& part, T* to) {
        if (state.on_gpu()) return state.members[0].gpu->conditional_probs(part, to, state.where, kNoPoll);
        conditional_probs(state.weights(), part, to, kNoPoll, &state.members[0].workspace);
    };
    if (state.where.on_device) return call(batch, out);  // the host does not look at them
    const Plan& plan = state.plan();
    const StageSpec& base = plan.spec().stages.back();
    const Columns& columns = plan.spec().columns;
    const int64_t features = plan.features(), most = plan.most_values();
    constexpr int64_t size = sizeof(double);
    each_piece(batch.outer, batch.inner, state.piece(), [&](int64_t g, int64_t gs, int64_t r, int64_t rs) {
        Batch part = piece_of(batch, g, gs, r, rs);
        double* const x = room(state.whole_x, gs * rs * features);
        int64_t* const unknown = room(state.place, gs * rs);  // the lowest rank of what is none in each row
        for (int64_t row = 0; row < gs * rs; ++row) {
            const Rows from = moved(part.x, row / rs, row % rs);
            unknown[row] = std::numeric_limits<int64_t>::max();
            for (int64_t i = 0; i < features; ++i) {
                const size_t v = size_t(base.variable[size_t(i)]);
                const double low = columns.lower[v], high = columns.upper[v], count = base.values[size_t(i)];
                double& value = x[row * features + int64_t(v)] = read(from.data + int64_t(v) * from.column, from.dtype);
                const bool known = count > 0 ? value >= 0 && value < count && value == std::floor(value) : value > low && value < high;
                if (known) continue;
                unknown[row] = std::min(unknown[row], base.ranks[size_t(i)]);
                if (count > 0 || (std::isinf(low) && std::isinf(high)))
                    value = 0;
                else if (std::isinf(low))
                    value = high - std::max(1.0, std::fabs(high));
                else
                    value = std::isinf(high) ? low + std::max(1.0, std::fabs(low)) : low / 2 + high / 2;
            }
        }
        part.x = {reinterpret_cast<const char*>(x), DType::f64, rs * features * size, features * size, size};
        T* const to = out + (g * batch.inner + r) * features * most;
        call(part, to);
        for (int64_t row = 0; row < gs * rs; ++row)
            for (int64_t i = 0; i < features; ++i)
                if (base.ranks[size_t(i)] > unknown[row])
                    std::fill_n(to + (row * features + base.variable[size_t(i)]) * most, most, std::numeric_limits<T>::quiet_NaN());
    });
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

std::unique_ptr<fastmaf_evaluator> evaluator_of(const fastmaf_model& model, int threads) {
    auto made = std::make_unique<fastmaf_evaluator>();
    std::visit(
        [&](const auto& all) {
            using T = typename std::decay_t<decltype(*all[0])>::Value;
            auto& state = made->state.template emplace<State<T>>();
            state.ensemble = model.inner->ensemble;
            state.members.resize(all.size());
            for (size_t k = 0; k < all.size(); ++k) {
                Member<T>& member = state.members[k];
                member.weights = all[k];
                member.workspace.kernels = &kernels<T>();
                member.workspace.threads = threads;
            }
        },
        model.inner->weights);
    return made;
}

device::Precision precision_of(int32_t precision) {
    switch (precision) {
        case FASTMAF_HIGHEST: return device::Precision::highest;
        case FASTMAF_HIGH: return device::Precision::high;
        case FASTMAF_MEDIUM: return device::Precision::medium;
        default: refuse("precision is none of fastmaf_precision");
    }
}

// The weights on a GPU, which all evaluators of the model there share.
template <class T>
std::shared_ptr<const device::Flow<T>> copy_of(const Inner& inner, size_t member, const std::shared_ptr<Weights<T>>& weights, int device,
                                               device::Precision precision) {
    if constexpr (std::is_same_v<T, double>) precision = device::Precision::highest;  // there is no other one
    const std::lock_guard<std::mutex> lock(making());
    auto& copy = std::get<Copies<T>>(inner.copies)[{member, device, precision}];
    if (copy) return copy;
    if (const device::State found = device::state(); !found.built) throw Failure(FASTMAF_UNSUPPORTED, found.reason);
    return copy = std::make_shared<const device::Flow<T>>(weights, device, precision);
}

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
        } catch (const Failure& failure) { throw Failure(failure.status, std::string(path) + ": " + failure.what()); }
    });
}

void fastmaf_model_free(fastmaf_model* model) { delete model; }

int64_t fastmaf_model_features(const fastmaf_model* model) { return model ? model->inner->plan().features() : -1; }
int64_t fastmaf_model_context_features(const fastmaf_model* model) { return model ? model->inner->plan().context() : -1; }
int64_t fastmaf_model_layers(const fastmaf_model* model) { return model ? model->inner->layers : -1; }
int64_t fastmaf_model_members(const fastmaf_model* model) {
    if (!model) return -1;
    return model->inner->ensemble ? std::visit([](const auto& all) { return int64_t(all.size()); }, model->inner->weights) : 0;
}
int64_t fastmaf_model_parameters(const fastmaf_model* model) { return model ? model->inner->parameters : -1; }
int64_t fastmaf_model_most_values(const fastmaf_model* model) {
    if (!model) return -1;
    const Plan& plan = model->inner->plan();
    return plan.discrete() ? plan.most_values() : 0;
}
fastmaf_dtype fastmaf_model_dtype(const fastmaf_model* model) {
    return model && model->inner->weights.index() == 0 ? FASTMAF_FLOAT32 : FASTMAF_FLOAT64;
}
const char* fastmaf_model_name(const fastmaf_model* model, int64_t feature) {
    if (!model || feature < 0 || feature >= int64_t(model->inner->names.size())) return nullptr;
    return model->inner->names[size_t(feature)].c_str();
}
size_t fastmaf_model_memory(const fastmaf_model* model) {
    size_t bytes = 0;
    if (model)
        std::visit(
            [&](const auto& all) {
                for (const auto& weights : all) bytes += weights->memory() + weights->plan().memory();
            },
            model->inner->weights);
    return bytes;
}

fastmaf_status fastmaf_evaluator_create(const fastmaf_model* model, int32_t threads, fastmaf_evaluator** evaluator, char* message,
                                        size_t size) {
    return with_buffer(message, size, [&] {
        if (!evaluator) refuse("evaluator is a null pointer");
        *evaluator = nullptr;
        if (!model) refuse("model is a null pointer");
        if (threads < 1) refuse("threads must be at least 1");
        *evaluator = evaluator_of(*model, threads).release();
    });
}

int32_t fastmaf_devices(char* message, size_t size) {
    int32_t count = 0;
    with_buffer(message, size, [&] {
        const device::State found = device::state();
        if (!found.reason.empty()) throw device::Error(found.reason);
        count = int32_t(found.gpus.size());
    });
    return count;
}

fastmaf_status fastmaf_evaluator_create_on_device(const fastmaf_model* model, int32_t device, int32_t precision,
                                                  fastmaf_evaluator** evaluator, char* message, size_t size) {
    return with_buffer(message, size, [&] {
        if (!evaluator) refuse("evaluator is a null pointer");
        *evaluator = nullptr;
        if (!model) refuse("model is a null pointer");
        if (device < 0) refuse("device is negative");
        const device::Precision asked = precision_of(precision);
        auto made = evaluator_of(*model, 1);
        std::visit(
            [&](auto& state) {
                for (size_t k = 0; k < state.members.size(); ++k)
                    state.members[k].gpu = copy_of(*model->inner, k, state.members[k].weights, device, asked);
                state.device = device;
            },
            made->state);
        *evaluator = made.release();
    });
}

fastmaf_status fastmaf_evaluator_set_stream(fastmaf_evaluator* evaluator, void* stream) {
    return run(evaluator, [&](auto& state) {
        if (!state.on_gpu()) refuse("the evaluator computes on the CPU, which has no streams");
        state.stream = reinterpret_cast<uintptr_t>(stream);
    });
}

void fastmaf_evaluator_free(fastmaf_evaluator* evaluator) { delete evaluator; }

const char* fastmaf_message(const fastmaf_evaluator* evaluator) {
    return evaluator ? evaluator->message.c_str() : "evaluator is a null pointer";
}

fastmaf_status fastmaf_log_prob(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                const fastmaf_array* context, const fastmaf_output* log_prob) {
    return run(evaluator, [&](auto& state) {
        evaluate(state, groups, rows, x, context, log_prob, "log_prob", 1,
                 [&](const Batch& batch, auto* out) { density(state, batch, out); });
    });
}

fastmaf_status fastmaf_log_prob_and_grad(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                         const fastmaf_array* context, const fastmaf_output* log_prob, const fastmaf_output* d_x,
                                         const fastmaf_output* d_context) {
    return run(evaluator, [&](auto& state) { gradient(state, groups, rows, x, context, log_prob, d_x, d_context); });
}

fastmaf_status fastmaf_sample(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* context, uint64_t seed,
                              uint64_t offset, uint32_t context_offset, const fastmaf_output* samples, const fastmaf_output* log_prob) {
    return run(evaluator, [&](auto& state) { draw(state, groups, rows, context, seed, offset, context_offset, samples, log_prob); });
}

fastmaf_status fastmaf_to_noise(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                const fastmaf_array* context, const fastmaf_output* noise) {
    return run(evaluator, [&](auto& state) {
        refuse_discrete(state.plan(), "noise");
        refuse_ensemble(state, "noise");
        evaluate(state, groups, rows, x, context, noise, "noise", state.plan().features(), [&](const Batch& batch, auto* out) {
            if (state.on_gpu()) return state.members[0].gpu->to_noise(batch, out, state.where, kNoPoll);
            fastmaf::to_noise(state.weights(), batch, out, kNoPoll, &state.members[0].workspace);
        });
    });
}

fastmaf_status fastmaf_from_noise(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* noise,
                                  const fastmaf_array* context, const fastmaf_output* x) {
    return run(evaluator, [&](auto& state) { back(state, groups, rows, noise, context, x); });
}

fastmaf_status fastmaf_conditional_probs(fastmaf_evaluator* evaluator, int64_t groups, int64_t rows, const fastmaf_array* x,
                                         const fastmaf_array* context, const fastmaf_output* probabilities) {
    return run(evaluator, [&](auto& state) {
        if (!state.plan().discrete())
            throw Failure(FASTMAF_UNSUPPORTED, "the variables are continuous: their values have no probabilities");
        refuse_ensemble(state, "probabilities");
        const int64_t width = state.plan().features() * int64_t(state.plan().most_values());
        evaluate(state, groups, rows, x, context, probabilities, "probabilities", width,
                 [&](const Batch& batch, auto* out) { probabilities_of(state, batch, out); });
    });
}

}  // extern "C"
