#include <pybind11/stl.h>

#include "flow.hpp"

namespace fastmaf {

namespace {

struct PyTrainer {
    std::variant<std::unique_ptr<Trainer<float>>, std::unique_ptr<Trainer<double>>> trainer;

    template <class F>
    auto visit(F f) const {
        return std::visit([&](const auto& t) { return f(*t); }, trainer);
    }
};

template <class T>
std::vector<std::shared_ptr<Weights<T>>> weights_of(const std::vector<PackedFlow>& flows) {
    std::vector<std::shared_ptr<Weights<T>>> result;
    for (const PackedFlow& flow : flows) result.push_back(std::get<std::shared_ptr<Weights<T>>>(flow.weights));
    return result;
}

}  // namespace

void bind_train(py::module_& module) {
    const Poll poll = check_signals;
    py::class_<PyTrainer>(module, "Trainer")
        .def(py::init([](const std::vector<PackedFlow>& flows, bool shared, double beta1, double beta2, double eps, double l2,
                         double weight_decay, double clip_norm) {
                 const AdamSettings settings{beta1, beta2, eps, l2, weight_decay, clip_norm};
                 PyTrainer self;
                 if (flows.empty() || (flows.size() > 1 && !shared))
                     throw std::invalid_argument("a trainer has " + std::to_string(flows.size()) + " flows");
                 flows[0].visit([&](auto& weights) {
                     using T = typename std::decay_t<decltype(weights)>::Value;
                     self.trainer = std::make_unique<Trainer<T>>(weights_of<T>(flows), shared, settings);
                 });
                 return self;
             }),
             py::arg("flows"), py::arg("shared"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("l2"),
             py::arg("weight_decay"), py::arg("clip_norm"))
        .def(
            "epoch",
            [poll](const PyTrainer& self, const py::array& x, const py::object& context, const py::object& weights,
                   const py::array_t<int64_t, py::array::c_style>& rows, int64_t batch_size,
                   const py::array_t<double, py::array::c_style>& rates, double mean_weight, const py::object& user_poll) {
                Batch batch = batch_of(x, context);
                if (batch_size < 1 || rates.size() < (rows.size() + batch_size - 1) / batch_size)
                    throw std::invalid_argument("an epoch of " + std::to_string(rows.size()) + " rows has " + std::to_string(rates.size()) +
                                                " rates");
                const double* w = weights.is_none() ? nullptr : input<double>(py::reinterpret_borrow<py::array>(weights), x.shape(0));
                for (py::ssize_t i = 0; i < rows.size(); ++i)
                    if (rows.data()[i] < 0 || rows.data()[i] >= x.shape(0))
                        throw std::invalid_argument("row " + std::to_string(rows.data()[i]) + " is not in x");
                batch.index = rows.data();
                batch.outer = 1;
                batch.inner = rows.size();
                // A batch of one row of one array has no strides; the index is 0 there.
                Poll ask = poll;
                if (!user_poll.is_none())
                    ask = [poll, &user_poll] {
                        poll();
                        or_rest([&] {
                            py::gil_scoped_acquire gil;
                            user_poll();
                        });
                    };
                int64_t done = 0;
                double sum = 0;
                self.visit([&](auto& trainer) {
                    Unlocked unlocked;
                    sum = trainer.epoch(batch, w, batch_size, rates.data(), mean_weight, done, ask);
                });
                return py::make_tuple(sum, done);
            },
            py::arg("x"), py::arg("context"), py::arg("weights"), py::arg("rows"), py::arg("batch_size"), py::arg("rates"),
            py::arg("mean_weight"), py::arg("poll"))
        .def("parameters",
             [](const PyTrainer& self) -> py::array {
                 return self.visit([](auto& trainer) -> py::array {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     py::array_t<T> result(py::ssize_t(trainer.parameter_count()));
                     trainer.get_parameters(result.mutable_data());
                     return result;
                 });
             })
        .def("set_parameters",
             [](const PyTrainer& self, const py::array& parameters) {
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_parameters(input<T>(parameters, trainer.parameter_count()));
                 });
             })
        .def("set_members",
             [](const PyTrainer& self, const std::vector<PackedFlow>& flows) {
                 if (flows.empty()) throw std::invalid_argument("a trainer needs a flow");
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_members(weights_of<T>(flows));
                 });
             })
        .def("moments",
             [](const PyTrainer& self) {
                 return self.visit([](auto& trainer) -> py::tuple {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     py::array_t<T> first(py::ssize_t(trainer.parameter_count())), second(py::ssize_t(trainer.parameter_count()));
                     trainer.get_moments(first.mutable_data(), second.mutable_data());
                     return py::make_tuple(first, second);
                 });
             })
        .def("set_moments",
             [](const PyTrainer& self, const py::array& first, const py::array& second) {
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_moments(input<T>(first, trainer.parameter_count()), input<T>(second, trainer.parameter_count()));
                 });
             })
        .def_property(
            "steps", [](const PyTrainer& self) { return self.visit([](auto& trainer) { return trainer.steps(); }); },
            [](const PyTrainer& self, int64_t steps) { self.visit([&](auto& trainer) { trainer.set_steps(steps); }); });
}

}  // namespace fastmaf
