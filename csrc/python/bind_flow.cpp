#include <pybind11/stl.h>

#include "../record/lower.hpp"
#include "flow.hpp"

namespace fastmaf {

namespace {

// A flow as a file holds it, and the bytes of the file, into which it points.
struct File {
    py::bytes bytes;
    record::Record record;
};

std::unique_ptr<File> read(const py::bytes& bytes) {
    const auto data = bytes.cast<std::string_view>();
    Unlocked unlocked;
    auto parsed = record::read(data);
    return std::unique_ptr<File>(new File{py::reinterpret_borrow<py::bytes>(bytes), std::move(parsed)});
}

template <class T>
std::shared_ptr<Weights<T>> weights_of(const record::Record& record, size_t member) {
    auto weights = std::make_shared<Weights<T>>(record::lower(record, member));
    weights->set_parameters(record::parameters(record));
    return weights;
}

PackedFlow pack(const File& file, size_t member) {
    const std::string missing = record::unsupported(file.record);
    if (!missing.empty()) {
        PyErr_SetString(PyExc_NotImplementedError, ("the compiled core has no kernel for " + missing).c_str());
        throw py::error_already_set();
    }
    Unlocked unlocked;
    if (file.record.is_double) return {weights_of<double>(file.record, member)};
    return {weights_of<float>(file.record, member)};
}

// Another one with the same weights, to be trained apart. The plan is shared.
PackedFlow copy(const PackedFlow& flow) {
    Unlocked unlocked;
    return flow.visit([](const auto& weights) -> PackedFlow { return {std::make_shared<std::decay_t<decltype(weights)>>(weights)}; });
}

// A method evaluate(weights, batch, out) whose output has width(weights) numbers per row.
template <class Width, class F>
auto by_rows(Width width, F evaluate) {
    return [width, evaluate](const PackedFlow& self, const py::array& x, const py::object& context, const py::object& out) {
        const Batch batch = batch_of(x, context);
        self.visit([&](const auto& weights) {
            using T = typename std::decay_t<decltype(weights)>::Value;
            T* result = output<T>(out, batch.rows() * width(weights));
            Unlocked unlocked;
            evaluate(weights, batch, result);
        });
    };
}

}  // namespace

void bind_flow(py::module_& module) {
    const Poll poll = check_signals;
    py::class_<File>(module, "File")
        .def(py::init(&read), py::arg("bytes"))
        .def_property_readonly("features", [](const File& file) { return file.record.features; })
        .def_property_readonly("context_features", [](const File& file) { return file.record.context_features; })
        .def_property_readonly("dtype", [](const File& file) { return file.record.is_double ? "float64" : "float32"; })
        .def_property_readonly("names", [](const File& file) { return file.record.names; })
        .def_property_readonly("layers",
                               [](const File& file) {
                                   std::vector<std::string> names;
                                   for (const record::Layer& layer : file.record.layers) names.push_back(record::name_of(layer));
                                   return names;
                               })
        .def_property_readonly("members", [](const File& file) { return file.record.members.size(); })
        .def_property_readonly("unsupported", [](const File& file) { return record::unsupported(file.record); });
    py::implicitly_convertible<py::bytes, File>();
    py::class_<PackedFlow>(module, "Flow")
        .def(py::init(&pack), py::arg("file"), py::arg("member") = 0)
        .def("copy", &copy)
        .def("log_prob", by_rows(one_number, [poll](const auto& weights, const Batch& x, auto* out) { log_prob(weights, x, out, poll); }))
        .def("conditional_probs", by_rows(all_probabilities, [poll](const auto& weights, const Batch& x,
                                                                    auto* out) { conditional_probs(weights, x, out, poll); }))
        .def("to_noise",
             [poll](const PackedFlow& self, const py::array& x, const py::object& context, const py::object& out,
                    const py::object& log_det) {
                 const Batch batch = batch_of(x, context);
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     T* const noise = output<T>(out, batch.rows() * weights.plan().features());
                     T* const of_map = output<T>(log_det, batch.rows());
                     Unlocked unlocked;
                     to_noise<T>(weights, batch, noise, poll, nullptr, of_map);
                 });
             })
        .def("from_noise",
             [poll](const PackedFlow& self, const py::array& u, const py::object& context, const py::object& out,
                    const py::object& log_det) {
                 const Batch batch = batch_of(u, context);
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     T* const of_map = output<T>(log_det, batch.rows());
                     with_output(out, batch.rows() * weights.plan().features(), [&](auto* x) {
                         Unlocked unlocked;
                         from_noise<T>(weights, batch, x, poll, nullptr, of_map);
                     });
                 });
             })
        .def("sample",
             [poll](const PackedFlow& self, int64_t contexts, int64_t rows, const py::object& context, uint64_t seed, uint64_t offset,
                    uint64_t context_offset, const py::object& out, const py::object& log_prob_out) {
                 Draw draw = numbered_draw(contexts, rows, seed, offset, context_offset);
                 if (!context.is_none()) {
                     int64_t outer = 1, inner = 1;  // (C,) or (contexts, C)
                     draw.context = rows_of(py::reinterpret_borrow<py::array>(context), outer, inner);
                     std::swap(draw.context.outer, draw.context.inner);
                 }
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     T* density = output<T>(log_prob_out, contexts * rows);
                     with_output(out, contexts * rows * weights.plan().features(), [&](auto* x) {
                         Unlocked unlocked;
                         sample<T>(weights, draw, x, density, poll);
                     });
                 });
             })
        .def("sample_rows",
             [poll](const PackedFlow& self, const py::array_t<uint64_t, py::array::c_style>& index,
                    const py::array_t<uint64_t, py::array::c_style>& group, const py::object& context, uint64_t seed,
                    const py::object& out) {
                 const Draw draw = scattered_draw(index, group, context, seed);
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     with_output(out, draw.rows * weights.plan().features(), [&](auto* x) {
                         Unlocked unlocked;
                         sample<T>(weights, draw, x, static_cast<T*>(nullptr), poll);
                     });
                 });
             })
        .def("norms",  // the stages that have statistics
             [](const PackedFlow& self) {
                 std::vector<size_t> stages;
                 self.visit([&](const auto& weights) {
                     for (size_t k = 0; k < weights.plan().stages(); ++k)
                         if (weights.plan().spec().stages[k].trainable) stages.push_back(k);
                 });
                 return stages;
             })
        .def("set_statistics",
             [](const PackedFlow& self, size_t stage, const py::array& mean, const py::array& var) {
                 self.visit([&](auto& weights) {
                     if (stage >= weights.plan().stages() || !weights.plan().spec().stages[stage].trainable)
                         throw std::invalid_argument("stage " + std::to_string(stage) + " has no statistics");
                     weights.set_statistics(stage, input<double>(mean, weights.plan().features()),
                                            input<double>(var, weights.plan().features()));
                 });
             })
        .def("set_parameters",
             [](const PackedFlow& self, const py::array& parameters) {
                 self.visit([&](auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     weights.set_parameters(input<T>(parameters, weights.plan().parameter_count()));
                 });
             })
        .def("vjp",
             [poll](const PackedFlow& self, const py::array& x, const py::object& context, const py::array& cotangent,
                    const py::object& value, const py::object& d_x, const py::object& d_context, const py::object& d_parameters) {
                 const Batch batch = batch_of(x, context);
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     const T* g = input<T>(cotangent, batch.rows());
                     T* const values = output<T>(value, batch.rows());
                     T* const of_x = output<T>(d_x, batch.rows() * weights.plan().features());
                     T* const of_context = output<T>(d_context, batch.rows() * weights.plan().context());
                     T* const of_parameters = output<T>(d_parameters, weights.plan().parameter_count());
                     Unlocked unlocked;
                     vjp<T>(weights, batch, g, values, of_x, of_context, of_parameters, poll);
                 });
             })
        .def("to_noise_vjp",
             [poll](const PackedFlow& self, const py::array& x, const py::object& context, const py::array& cotangent,
                    const py::object& of_log_det, const py::object& d_x, const py::object& d_context, const py::object& d_parameters) {
                 const Batch batch = batch_of(x, context);
                 self.visit([&](const auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     const T* const g = input<T>(cotangent, batch.rows() * weights.plan().features());
                     const T* const of_map =
                         of_log_det.is_none() ? nullptr : input<T>(py::reinterpret_borrow<py::array>(of_log_det), batch.rows());
                     T* const of_x = output<T>(d_x, batch.rows() * weights.plan().features());
                     T* const of_context = output<T>(d_context, batch.rows() * weights.plan().context());
                     T* const of_parameters = output<T>(d_parameters, weights.plan().parameter_count());
                     Unlocked unlocked;
                     to_noise_vjp<T>(weights, batch, g, of_map, of_x, of_context, of_parameters, poll);
                 });
             })
        .def("from_noise_vjp", [poll](const PackedFlow& self, const py::array& x, const py::object& context, const py::array& cotangent,
                                      const py::object& d_noise, const py::object& d_context, const py::object& d_parameters) {
            const Batch batch = batch_of(x, context);
            self.visit([&](const auto& weights) {
                using T = typename std::decay_t<decltype(weights)>::Value;
                const T* const g = input<T>(cotangent, batch.rows() * weights.plan().features());
                T* const of_noise = output<T>(d_noise, batch.rows() * weights.plan().features());
                T* const of_context = output<T>(d_context, batch.rows() * weights.plan().context());
                T* const of_parameters = output<T>(d_parameters, weights.plan().parameter_count());
                Unlocked unlocked;
                from_noise_vjp<T>(weights, batch, g, of_noise, of_context, of_parameters, poll);
            });
        });
}

}  // namespace fastmaf
