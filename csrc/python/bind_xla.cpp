// Operations as foreign functions of XLA, which fastmaf.jax puts into compiled programs: they run on the threads of XLA, without Python.
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>

#include "flow.hpp"
#include "xla.hpp"

namespace fastmaf {

namespace {

// Compiled programs name flows by number: one that outlives its flow fails by name instead of reading freed memory.
class Registry {
public:
    int64_t add(const PackedFlow& flow) {
        const std::lock_guard<std::mutex> lock(mutex_);
        flows_.emplace(++last_, flow);
        return last_;
    }
    void remove(int64_t key) {
        const std::lock_guard<std::mutex> lock(mutex_);
        flows_.erase(key);
    }
    PackedFlow at(int64_t key) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = flows_.find(key);
        if (found == flows_.end())
            throw std::invalid_argument("the fastmaf.jax.Flow of this compiled function is gone: keep it as long as the function");
        return found->second;
    }

private:
    std::mutex mutex_;
    std::unordered_map<int64_t, PackedFlow> flows_;
    int64_t last_ = 0;
};

Registry& registry() {
    static Registry* const registry = new Registry;  // for ever: threads of XLA may be at work when the process ends
    return *registry;
}

[[noreturn]] void refuse(const char* what) {
    throw std::invalid_argument(std::string("fastmaf: ") + what + " of a foreign function does not fit the flow");
}

int64_t attribute(const xla::Attributes& attributes, const char* name) {
    for (int64_t i = 0; i < attributes.count; ++i) {
        const xla::Name& own = *attributes.names[i];
        if (attributes.types[i] != xla::kScalar || std::string(own.data, own.size) != name) continue;
        const auto& scalar = *static_cast<const xla::Scalar*>(attributes.values[i]);
        if (scalar.dtype == xla::kSigned64) return *static_cast<const int64_t*>(scalar.value);
    }
    throw std::invalid_argument(std::string("fastmaf: a foreign function has no attribute ") + name);
}

int64_t count_of(const xla::Buffer& buffer, int64_t axes) {
    int64_t count = 1;
    for (int64_t i = 0; i < axes; ++i) count *= buffer.dims[i];
    return count;
}

// An array (..., width), without gaps.
struct Matrix {
    char* data;
    DType dtype;
    int64_t rows, stride;  // in bytes

    Matrix(const xla::Buffer& buffer, int64_t width) {
        if (buffer.rank < 1 || buffer.dims[buffer.rank - 1] != width) refuse("the width");
        if (buffer.dtype != xla::kFloat32 && buffer.dtype != xla::kFloat64) refuse("the dtype");
        data = static_cast<char*>(buffer.data);
        dtype = buffer.dtype == xla::kFloat32 ? DType::f32 : DType::f64;
        rows = count_of(buffer, buffer.rank - 1);
        stride = width * size();
    }
    int64_t size() const { return dtype == DType::f32 ? 4 : 8; }
};

Batch batch_of(const Plan& plan, const xla::Buffers& arguments) {
    if (arguments.count != 1 + (plan.context() > 0)) refuse("the number of arguments");
    const Matrix x(*arguments.buffers[0], plan.features());
    Batch batch;
    batch.inner = x.rows;
    batch.x = {x.data, x.dtype, 0, x.stride, x.size()};
    if (!plan.context()) return batch;
    const Matrix context(*arguments.buffers[1], plan.context());
    if (context.rows == 1 || x.rows == 0) {
        batch.context = {context.data, context.dtype, 0, 0, context.size()};
    } else if (context.rows == x.rows) {
        batch.context = {context.data, context.dtype, 0, context.stride, context.size()};
    } else {
        if (context.rows == 0 || x.rows % context.rows) refuse("the number of contexts");
        batch.outer = context.rows;
        batch.inner = x.rows / context.rows;
        batch.x.outer = batch.inner * x.stride;
        batch.context = {context.data, context.dtype, context.stride, 0, context.size()};
    }
    return batch;
}

// Room for a result in T, which is the buffer itself if that has this dtype; `put` converts where it has not.
template <class T>
class Result {
public:
    Result(const xla::Buffers& results, int64_t i, int64_t count) : count_(count) {
        if (i >= results.count) return;
        buffer_ = results.buffers[i];
        if (count_of(*buffer_, buffer_->rank) != count) refuse("the size of a result");
        if (buffer_->dtype != xla::kFloat32 && buffer_->dtype != xla::kFloat64) refuse("the dtype of a result");
        if (!direct()) own_.resize(size_t(count));
    }
    T* data() { return !buffer_ ? nullptr : direct() ? static_cast<T*>(buffer_->data) : own_.data(); }
    void put() {
        if (!buffer_ || direct()) return;
        if (buffer_->dtype == xla::kFloat32)
            std::copy(own_.begin(), own_.end(), static_cast<float*>(buffer_->data));
        else
            std::copy(own_.begin(), own_.end(), static_cast<double*>(buffer_->data));
    }

private:
    bool direct() const { return buffer_->dtype == (sizeof(T) == 4 ? xla::kFloat32 : xla::kFloat64); }

    const xla::Buffer* buffer_ = nullptr;
    int64_t count_;
    AlignedVector<T> own_;
};

const Poll kNoPoll;

struct LogProb {
    template <class T>
    void operator()(const Weights<T>& weights, const xla::Call& call) const {
        const Batch batch = batch_of(weights.plan(), call.arguments);
        Result<T> value(call.results, 0, batch.rows());
        log_prob<T>(weights, batch, value.data(), kNoPoll);
        value.put();
    }
};

// Results: the value, and the gradients in x and in the context row by row, those that there are results for.
struct Gradient {
    template <class T>
    void operator()(const Weights<T>& weights, const xla::Call& call) const {
        const Plan& plan = weights.plan();
        const Batch batch = batch_of(plan, call.arguments);
        const int64_t of_x = attribute(call.attributes, "of_x"), of_context = attribute(call.attributes, "of_context");
        Result<T> value(call.results, 0, batch.rows());
        Result<T> d_x(call.results, of_x ? 1 : call.results.count, batch.rows() * plan.features());
        Result<T> d_context(call.results, of_context ? 1 + (of_x != 0) : call.results.count, batch.rows() * plan.context());
        const AlignedVector<T> ones(size_t(batch.rows()), T(1));
        vjp<T>(weights, batch, ones.data(), value.data(), d_x.data(), d_context.data(), static_cast<T*>(nullptr), kNoPoll);
        for (Result<T>* result : {&value, &d_x, &d_context}) result->put();
    }
};

// Either map, and log|det| of it.
template <bool TO_NOISE>
struct Mapped {
    template <class T>
    void operator()(const Weights<T>& weights, const xla::Call& call) const {
        const Batch batch = batch_of(weights.plan(), call.arguments);
        Result<T> out(call.results, 0, batch.rows() * weights.plan().features()), log_det(call.results, 1, batch.rows());
        if constexpr (TO_NOISE)
            to_noise<T>(weights, batch, out.data(), kNoPoll, nullptr, log_det.data());
        else
            from_noise<T>(weights, batch, out.data(), kNoPoll, nullptr, log_det.data());
        out.put();
        log_det.put();
    }
};

// Seeds (..., 2), each two halves of one, and contexts (..., C) or (..., c, C): samples (..., n, D) or (..., c, n, D), and their densities.
struct Sample {
    template <class T>
    void operator()(const Weights<T>& weights, const xla::Call& call) const {
        const Plan& plan = weights.plan();
        const int64_t features = plan.features(), rows = attribute(call.attributes, "n");
        if (call.arguments.count != 1 + (plan.context() > 0)) refuse("the number of arguments");
        const xla::Buffer& seed = *call.arguments.buffers[0];
        if (seed.dtype != xla::kUnsigned32 || seed.rank < 1 || seed.dims[seed.rank - 1] != 2) refuse("the seed");
        const int64_t seeds = count_of(seed, seed.rank - 1);
        int64_t contexts = 1;
        Rows given;
        if (plan.context()) {
            const Matrix context(*call.arguments.buffers[1], plan.context());
            if (seeds == 0 || context.rows % seeds) refuse("the number of contexts");
            contexts = context.rows / seeds;
            given = {context.data, context.dtype, context.stride, 0, context.size()};
        }
        const int64_t each = contexts * rows;
        Result<T> out(call.results, 0, seeds * each * features), density(call.results, 1, seeds * each);
        for (int64_t s = 0; s < seeds; ++s) {
            const uint32_t* const halves = static_cast<const uint32_t*>(seed.data) + 2 * s;
            Draw draw;
            draw.contexts = contexts;
            draw.rows = rows;
            draw.seed = uint64_t(halves[0]) << 32 | halves[1];
            draw.context = given;
            if (given.data) draw.context.data += s * contexts * given.outer;
            T* const value = density.data();
            sample<T>(weights, draw, out.data() + s * each * features, value ? value + s * each : nullptr, kNoPoll);
        }
        out.put();
        density.put();
    }
};

template <class F>
xla::Error* handle(xla::Call* call) {
    for (xla::Extension* extension = call->extensions; extension; extension = extension->next) {
        if (extension->type != xla::kMetadata) continue;
        xla::Version& version = reinterpret_cast<xla::MetadataExtension*>(extension)->metadata->version;
        version.major = 0;
        version.minor = call->api && call->api->version.major == 0 ? call->api->version.minor : 1;
        return nullptr;
    }
    auto failed = [&](const char* message, int32_t code) {
        xla::ErrorArguments arguments{sizeof(xla::ErrorArguments), nullptr, message, code};
        return call->api->make_error(&arguments);
    };
    try {
        const PackedFlow flow = registry().at(attribute(call->attributes, "flow"));
        flow.visit([&](const auto& weights) { F()(weights, *call); });
        return nullptr;
    } catch (const std::invalid_argument& error) { return failed(error.what(), xla::kInvalidArgument); } catch (const std::bad_alloc&) {
        return failed("fastmaf: out of memory", xla::kResourceExhausted);
    } catch (const std::exception& error) { return failed(error.what(), xla::kInternal); }
}

py::capsule capsule(xla::Handler* handler) { return py::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET"); }

}  // namespace

void bind_xla(py::module_& module) {
    module.def("xla_add", [](const PackedFlow& flow) { return registry().add(flow); });
    module.def("xla_remove", [](int64_t key) { registry().remove(key); });
    module.def("xla_handlers", [] {
        py::dict handlers;
        handlers["log_prob"] = capsule(&handle<LogProb>);
        handlers["log_prob_and_grad"] = capsule(&handle<Gradient>);
        handlers["to_noise"] = capsule(&handle<Mapped<true>>);
        handlers["from_noise"] = capsule(&handle<Mapped<false>>);
        handlers["sample"] = capsule(&handle<Sample>);
        return handlers;
    });
}

}  // namespace fastmaf
