#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "../core/device.hpp"
#include "flow.hpp"

namespace fastmaf {

namespace {

DType dtype_named(const std::string& name) {
    static const std::pair<const char*, DType> names[] = {{"float16", DType::f16}, {"float32", DType::f32}, {"float64", DType::f64},
                                                          {"int8", DType::i8},     {"int16", DType::i16},   {"int32", DType::i32},
                                                          {"int64", DType::i64},   {"uint8", DType::u8},    {"uint16", DType::u16},
                                                          {"uint32", DType::u32},  {"uint64", DType::u64},  {"bool", DType::boolean}};
    for (const auto& [known, dtype] : names)
        if (name == known) return dtype;
    throw std::invalid_argument("an array has dtype " + name + ", which the CUDA kernels do not read");
}

device::Precision precision_named(const std::string& name) {
    return name == "medium" ? device::Precision::medium : name == "high" ? device::Precision::high : device::Precision::highest;
}

// An array of the device: (address, dtype, shape, strides in bytes), as fastmaf.backends.cuda gives it.
using Description = std::tuple<uintptr_t, std::string, std::vector<int64_t>, std::vector<int64_t>>;

Rows rows_at(const Description& array, int64_t& outer, int64_t& inner) {
    const auto& [address, dtype, shape, strides] = array;
    const size_t ndim = shape.size();
    if (ndim < 1 || ndim > 3 || strides.size() != ndim) throw std::invalid_argument("an array has " + std::to_string(ndim) + " dimensions");
    Rows rows;
    rows.data = reinterpret_cast<const char*>(address);
    rows.dtype = dtype_named(dtype);
    rows.column = strides[ndim - 1];
    auto axis = [&, &shape = shape, &strides = strides](size_t back, int64_t& extent, int64_t& stride) {
        if (ndim < back || shape[ndim - back] == 1) return;
        extent = shape[ndim - back];
        stride = strides[ndim - back];
    };
    axis(2, inner, rows.inner);
    axis(3, outer, rows.outer);
    return rows;
}

struct PyDeviceFlow {
    std::variant<std::unique_ptr<device::Flow<float>, DeleteUnlocked>, std::unique_ptr<device::Flow<double>, DeleteUnlocked>> flow;

    template <class F>
    void visit(F f) const {
        std::visit([&](const auto& p) { f(*p, typename std::decay_t<decltype(*p)>::Value()); }, flow);
    }
};

// Rows of the host, or of the device.
Batch batch_at(const py::object& x, const py::object& context, bool on_device) {
    if (!on_device) return batch_of(py::reinterpret_borrow<py::array>(x), context);
    Batch batch;
    batch.outer = batch.inner = 1;
    batch.x = rows_at(x.cast<Description>(), batch.outer, batch.inner);
    if (!context.is_none()) batch.context = rows_at(context.cast<Description>(), batch.outer, batch.inner);
    return batch;
}

// The extents of the axes of rows that an array of the device has, 1 where it has none.
std::pair<int64_t, int64_t> extents_of(const py::object& array) {
    int64_t outer = 1, inner = 1;
    if (!array.is_none()) rows_at(array.cast<Description>(), outer, inner);
    return {outer, inner};
}

// Numbers of the device, one a row: (n,) or (c, n); none are ones.
Rows numbers_at(const py::object& array) {
    Rows rows;
    if (array.is_none()) return rows;
    auto [address, dtype, shape, strides] = array.cast<Description>();
    shape.push_back(1);
    strides.push_back(0);
    int64_t outer = 1, inner = 1;
    return rows_at({address, dtype, shape, strides}, outer, inner);
}

// Over which axes of the rows a gradient in an array is a sum.
device::Summed summed(const py::object& array, const Batch& batch) {
    const auto [outer, inner] = extents_of(array);
    return {outer != batch.outer, inner != batch.inner};
}

// An output of `count` contiguous elements: an array of the host, or an address that Python answers for.
template <class T>
T* output_at(const py::object& out, int64_t count, bool on_device) {
    if (out.is_none()) return nullptr;
    return on_device ? reinterpret_cast<T*>(out.cast<uintptr_t>()) : output<T>(out, count);
}

// f with where samples go, of which Python says the dtype where it cannot be seen.
template <class F>
void with_samples(const py::object& out, int64_t count, bool on_device, const std::string& dtype, F f) {
    if (!on_device)
        with_output(out, count, [&](auto* x) { f(device::Samples(x)); });
    else if (dtype == "float32")
        f(device::Samples(reinterpret_cast<float*>(out.cast<uintptr_t>())));
    else
        f(device::Samples(reinterpret_cast<double*>(out.cast<uintptr_t>())));
}

device::Place place_of(const std::optional<uintptr_t>& stream) { return {stream.has_value(), stream.value_or(0)}; }

// A method evaluate(flow, batch, out, place) whose output has width(weights) numbers per row.
template <class Width, class F>
auto by_rows(Width width, F evaluate) {
    return [width, evaluate](const PyDeviceFlow& self, const py::object& x, const py::object& context, const py::object& out,
                             std::optional<uintptr_t> stream) {
        const Batch batch = batch_at(x, context, stream.has_value());
        self.visit([&](const auto& flow, auto zero) {
            using T = decltype(zero);
            T* result = output_at<T>(out, batch.rows() * width(flow.weights()), stream.has_value());
            Unlocked unlocked;
            evaluate(flow, batch, result, place_of(stream));
        });
    };
}

}  // namespace

void bind_cuda(py::module_& module) {
    const Poll poll = check_signals;
    module.def("device_state", [] {
        const device::State state = device::state();
        py::dict result;
        result["built"] = state.built;
        result["reason"] = state.reason;
        result["versions"] = state.versions;
        result["architectures"] = state.architectures;
        result["gpus"] = state.gpus;
        return result;
    });
    module.def("device_of", &device::device_of);
    module.def(
        "synchronize", [](int device, uintptr_t stream) { device::synchronize(device, stream); }, py::call_guard<py::gil_scoped_release>());
    module.def("copy_to_host", [](int device, uintptr_t from, py::array_t<uint8_t, py::array::c_style> to, uintptr_t stream) {
        uint8_t* const out = to.mutable_data();
        const int64_t bytes = to.size();
        py::gil_scoped_release unlocked;
        device::copy_to_host(device, from, out, bytes, stream);
    });
    module.def("copy_from_host", [](int device, py::array_t<uint8_t, py::array::c_style> from, uintptr_t to, uintptr_t stream) {
        const uint8_t* const in = from.data();
        const int64_t bytes = from.size();
        py::gil_scoped_release unlocked;
        device::copy_from_host(device, in, to, bytes, stream);
    });
    // With a stream, arrays are descriptions or addresses on the device; without one, NumPy arrays.
    py::class_<PyDeviceFlow>(module, "DeviceFlow")
        .def(py::init([](const PackedFlow& flow, int device, const std::string& precision) {
                 PyDeviceFlow self;
                 std::visit(
                     [&](const auto& weights) {
                         using T = typename std::decay_t<decltype(*weights)>::Value;
                         self.flow = std::unique_ptr<device::Flow<T>, DeleteUnlocked>(
                             new device::Flow<T>(weights, device, precision_named(precision)));
                     },
                     flow.weights);
                 return self;
             }),
             py::arg("flow"), py::arg("device"), py::arg("precision"))
        .def("log_prob",
             by_rows(one_number, [poll](const auto& flow, const Batch& x, auto* out, auto at) { flow.log_prob(x, out, at, poll); }))
        .def("to_noise",
             [poll](const PyDeviceFlow& self, const py::object& x, const py::object& context, const py::object& out,
                    const py::object& log_det, std::optional<uintptr_t> stream) {
                 const Batch batch = batch_at(x, context, stream.has_value());
                 self.visit([&](const auto& flow, auto zero) {
                     using T = decltype(zero);
                     T* const noise = output_at<T>(out, batch.rows() * flow.weights().plan().features(), stream.has_value());
                     T* const of_map = output_at<T>(log_det, batch.rows(), stream.has_value());
                     Unlocked unlocked;
                     flow.to_noise(batch, noise, place_of(stream), poll, of_map);
                 });
             })
        .def("conditional_probs", by_rows(all_probabilities, [poll](const auto& flow, const Batch& x, auto* out,
                                                                    auto at) { flow.conditional_probs(x, out, at, poll); }))
        .def("from_noise",
             [poll](const PyDeviceFlow& self, const py::object& u, const py::object& context, const py::object& out,
                    const py::object& log_det, std::optional<uintptr_t> stream, const std::string& dtype) {
                 const Batch batch = batch_at(u, context, stream.has_value());
                 self.visit([&](const auto& flow, auto zero) {
                     auto* const of_map = output_at<decltype(zero)>(log_det, batch.rows(), stream.has_value());
                     with_samples(out, batch.rows() * flow.weights().plan().features(), stream.has_value(), dtype,
                                  [&](const device::Samples& x) {
                                      Unlocked unlocked;
                                      flow.from_noise(batch, x, place_of(stream), poll, of_map);
                                  });
                 });
             })
        .def("sample",
             [poll](const PyDeviceFlow& self, int64_t contexts, int64_t rows, const py::object& context, uint64_t seed, uint64_t offset,
                    uint64_t context_offset, const py::object& out, const py::object& log_prob_out, std::optional<uintptr_t> stream,
                    const std::string& dtype) {
                 Draw draw = numbered_draw(contexts, rows, seed, offset, context_offset);
                 if (!context.is_none()) {
                     int64_t outer = 1, inner = 1;  // (C,) or (contexts, C)
                     draw.context = stream ? rows_at(context.cast<Description>(), outer, inner)
                                           : rows_of(py::reinterpret_borrow<py::array>(context), outer, inner);
                     std::swap(draw.context.outer, draw.context.inner);
                 }
                 self.visit([&](const auto& flow, auto zero) {
                     using T = decltype(zero);
                     T* density = output_at<T>(log_prob_out, contexts * rows, stream.has_value());
                     with_samples(out, contexts * rows * flow.weights().plan().features(), stream.has_value(), dtype,
                                  [&](const device::Samples& x) {
                                      Unlocked unlocked;
                                      flow.sample(draw, x, density, place_of(stream), poll);
                                  });
                 });
             })
        // Arrays of the host are as for Flow.vjp. Gradients of the device have the shapes of x and of the context; its cotangents may be
        // None, for ones.
        .def("vjp",
             [poll](const PyDeviceFlow& self, const py::object& x, const py::object& context, const py::object& cotangent,
                    const py::object& value, const py::object& d_x, const py::object& d_context, const py::object& d_parameters,
                    std::optional<uintptr_t> stream) {
                 const bool on_device = stream.has_value();
                 const Batch batch = batch_at(x, context, on_device);
                 self.visit([&](const auto& flow, auto zero) {
                     using T = decltype(zero);
                     const Plan& plan = flow.weights().plan();
                     Rows g;
                     device::Gradients<T> out;
                     if (on_device) {
                         g = numbers_at(cotangent);
                         out.of_x = summed(x, batch);
                         out.of_context = summed(context, batch);
                     } else {
                         g.data = reinterpret_cast<const char*>(input<T>(cotangent, batch.rows()));
                         g.dtype = sizeof(T) == 4 ? DType::f32 : DType::f64;
                         g.inner = sizeof(T);
                         g.outer = batch.inner * g.inner;
                     }
                     out.value = output_at<T>(value, batch.rows(), on_device);
                     out.x = output_at<T>(d_x, batch.rows() * plan.features(), on_device);
                     out.context = output_at<T>(d_context, batch.rows() * plan.context(), on_device);
                     out.parameters = output_at<T>(d_parameters, plan.parameter_count(), on_device);
                     Unlocked unlocked;
                     flow.vjp(batch, g, out, place_of(stream), poll);
                 });
             })
        .def("sample_rows", [poll](const PyDeviceFlow& self, const py::array_t<uint64_t, py::array::c_style>& index,
                                   const py::array_t<uint64_t, py::array::c_style>& group, const py::object& context, uint64_t seed,
                                   const py::object& out) {
            const Draw draw = scattered_draw(index, group, context, seed);
            self.visit([&](const auto& flow, auto) {
                with_samples(out, draw.rows * flow.weights().plan().features(), false, "", [&](const device::Samples& x) {
                    Unlocked unlocked;
                    flow.sample(draw, x, nullptr, {}, poll);
                });
            });
        });
}

}  // namespace fastmaf
