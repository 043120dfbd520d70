#include <pybind11/stl.h>

#include "flow.hpp"

namespace fastmaf {

namespace {

template <class E>
E index_in(const std::string& name, std::initializer_list<const char*> names) {
    int i = 0;
    for (const char* each : names) {
        if (name == each) return E(i);
        ++i;
    }
    throw std::invalid_argument("the compiled core does not know '" + name + "'");
}

Columns read_columns(const py::dict& d) {
    Columns columns;
    for (const auto& kind : d["kinds"].cast<std::vector<std::string>>())
        columns.kind.push_back(index_in<Bijection>(kind, {"identity", "logit", "log_above", "log_below"}));
    columns.lower = d["lower"].cast<std::vector<double>>();
    columns.upper = d["upper"].cast<std::vector<double>>();
    columns.loc = d["loc"].cast<std::vector<double>>();
    columns.scale = d["scale"].cast<std::vector<double>>();
    return columns;
}

StageSpec read_stage(const py::dict& d) {
    StageSpec stage;
    stage.output = index_in<Output>(d["output"].cast<std::string>(), {"transform", "mixture", "bernoulli", "categorical", "linear", "norm"});
    stage.variable = d["variable"].cast<std::vector<int>>();
    if (d.contains("scale")) {
        stage.loc = d["loc"].cast<std::vector<double>>();
        stage.scale = d["scale"].cast<std::vector<double>>();
    }
    if (d.contains("var")) {
        stage.trainable = true;
        stage.of_batch = d["of_batch"].cast<bool>();
        stage.mean = d["mean"].cast<std::vector<double>>();
        stage.var = d["var"].cast<std::vector<double>>();
        stage.eps = d["eps"].cast<double>();
    }
    if (!is_network(stage.output)) return stage;
    stage.ranks = d["ranks"].cast<std::vector<int64_t>>();
    stage.rows = d["rows"].cast<std::vector<int>>();
    stage.skip = d["skip"].cast<bool>();
    stage.components = d["components"].cast<int>();
    stage.activation = index_in<Activation>(d["activation"].cast<std::string>(), {"relu", "tanh", "elu", "gelu", "silu"});
    stage.law = index_in<Law>(d["law"].cast<std::string>(), {"exp", "exp_soft"});
    stage.form = index_in<Form>(d["form"].cast<std::string>(), {"standardize", "affine"});
    stage.clip = d["clip"].cast<double>();
    stage.input_clip = d["input_clip"].cast<double>();
    for (const auto& item : d["maps"].cast<py::list>()) {
        const auto map = item.cast<py::dict>();
        stage.maps.push_back({map["rows"].cast<int>(), map["inputs"].cast<int>(), map["degrees"].cast<std::vector<int64_t>>(),
                              map["context"].cast<bool>(), map["activated"].cast<bool>(), map["adds"].cast<int>()});
    }
    return stage;
}

PackedFlow pack(const py::dict& description, const py::array& parameters) {
    FlowSpec spec;
    spec.features = description["features"].cast<int>();
    spec.context = description["context_features"].cast<int>();
    spec.columns = read_columns(description["columns"].cast<py::dict>());
    spec.context_columns = read_columns(description["context_columns"].cast<py::dict>());
    spec.noise_variable = description["noise_variable"].cast<std::vector<int>>();
    for (const auto& stage : description["stages"].cast<py::list>()) spec.stages.push_back(read_stage(stage.cast<py::dict>()));
    PackedFlow flow;
    auto make = [&](auto zero) {
        using T = decltype(zero);
        const T* values = input<T>(parameters, parameters.size());
        auto program = std::make_shared<Program<T>>(spec);
        if (parameters.size() != program->parameter_count())
            throw std::invalid_argument("the flow has " + std::to_string(program->parameter_count()) + " parameters; " +
                                        std::to_string(parameters.size()) + " are given");
        program->set_parameters(values);
        flow.program = std::move(program);
    };
    if (py::isinstance<py::array_t<float>>(parameters))
        make(0.0f);
    else
        make(0.0);
    return flow;
}

// A method evaluate(program, batch, out) whose output has width(program) numbers per row.
template <class Width, class F>
auto by_rows(Width width, F evaluate) {
    return [width, evaluate](const PackedFlow& self, const py::array& x, const py::object& context, const py::object& out) {
        const Batch batch = batch_of(x, context);
        self.visit([&](const auto& program) {
            using T = typename std::decay_t<decltype(program)>::Value;
            T* result = output<T>(out, batch.rows() * width(program));
            Unlocked unlocked;
            evaluate(program, batch, result);
        });
    };
}

}  // namespace

void bind_flow(py::module_& module) {
    const Poll poll = check_signals;
    py::class_<PackedFlow>(module, "Flow")
        .def(py::init(&pack), py::arg("description"), py::arg("parameters"))
        .def("log_prob", by_rows(one_number, [poll](const auto& program, const Batch& x, auto* out) { log_prob(program, x, out, poll); }))
        .def("conditional_probs",
             by_rows(all_probabilities, [poll](const auto& program, const Batch& x, auto* out) { conditional_probs(program, x, out, poll); }))
        .def("to_noise", by_rows(all_variables, [poll](const auto& program, const Batch& x, auto* out) { to_noise(program, x, out, poll); }))
        .def("from_noise",
             [poll](const PackedFlow& self, const py::array& u, const py::object& context, const py::object& out) {
                 const Batch batch = batch_of(u, context);
                 self.visit([&](const auto& program) {
                     with_output(out, batch.rows() * program.features(), [&](auto* x) {
                         Unlocked unlocked;
                         from_noise(program, batch, x, poll);
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
                 self.visit([&](const auto& program) {
                     using T = typename std::decay_t<decltype(program)>::Value;
                     T* density = output<T>(log_prob_out, contexts * rows);
                     with_output(out, contexts * rows * program.features(), [&](auto* x) {
                         Unlocked unlocked;
                         sample<T>(program, draw, x, density, poll);
                     });
                 });
             })
        .def("sample_rows",
             [poll](const PackedFlow& self, const py::array_t<uint64_t, py::array::c_style>& index,
                    const py::array_t<uint64_t, py::array::c_style>& group, const py::object& context, uint64_t seed, const py::object& out) {
                 const Draw draw = scattered_draw(index, group, context, seed);
                 self.visit([&](const auto& program) {
                     using T = typename std::decay_t<decltype(program)>::Value;
                     with_output(out, draw.rows * program.features(), [&](auto* x) {
                         Unlocked unlocked;
                         sample<T>(program, draw, x, static_cast<T*>(nullptr), poll);
                     });
                 });
             })
        .def("norms",  // the stages that have statistics
             [](const PackedFlow& self) {
                 std::vector<size_t> stages;
                 self.visit([&](const auto& program) {
                     for (size_t k = 0; k < program.stages(); ++k)
                         if (program.spec().stages[k].trainable) stages.push_back(k);
                 });
                 return stages;
             })
        .def("set_statistics",
             [](const PackedFlow& self, size_t stage, const py::array& mean, const py::array& var) {
                 self.visit([&](auto& program) {
                     if (stage >= program.stages() || !program.spec().stages[stage].trainable)
                         throw std::invalid_argument("stage " + std::to_string(stage) + " has no statistics");
                     program.set_statistics(stage, input<double>(mean, program.features()), input<double>(var, program.features()));
                 });
             })
        .def("set_parameters",
             [](const PackedFlow& self, const py::array& parameters) {
                 self.visit([&](auto& program) {
                     using T = typename std::decay_t<decltype(program)>::Value;
                     program.set_parameters(input<T>(parameters, program.parameter_count()));
                 });
             })
        .def("vjp", [poll](const PackedFlow& self, const py::array& x, const py::object& context, const py::array& cotangent,
                           const py::object& value, const py::object& d_x, const py::object& d_context, const py::object& d_parameters) {
            const Batch batch = batch_of(x, context);
            self.visit([&](const auto& program) {
                using T = typename std::decay_t<decltype(program)>::Value;
                const T* g = input<T>(cotangent, batch.rows());
                T* const values = output<T>(value, batch.rows());
                T* const of_x = output<T>(d_x, batch.rows() * program.features());
                T* const of_context = output<T>(d_context, batch.rows() * program.context());
                T* const of_parameters = output<T>(d_parameters, program.parameter_count());
                Unlocked unlocked;
                vjp<T>(program, batch, g, values, of_x, of_context, of_parameters, poll);
            });
        });
}

}  // namespace fastmaf
