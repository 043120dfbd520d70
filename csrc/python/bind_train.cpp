#include <pybind11/stl.h>

#include "../core/device.hpp"
#include "flow.hpp"

namespace fastmaf {

namespace {

// A trainer of either dtype, on the CPU or on a device.
template <template <class> class Trainer>
struct PyTrainer {
    std::variant<std::unique_ptr<Trainer<float>, DeleteUnlocked>, std::unique_ptr<Trainer<double>, DeleteUnlocked>> trainer;

    template <class F>
    auto visit(F f) const {
        return std::visit([&](const auto& t) { return f(*t); }, trainer);
    }
};
using CpuTrainer = PyTrainer<Trainer>;
using DeviceTrainer = PyTrainer<device::Trainer>;

template <class T>
std::vector<std::shared_ptr<Weights<T>>> weights_of(const std::vector<PackedFlow>& flows) {
    std::vector<std::shared_ptr<Weights<T>>> result;
    for (const PackedFlow& flow : flows) result.push_back(std::get<std::shared_ptr<Weights<T>>>(flow.weights));
    return result;
}

// What make_one(weights of the flows) returns, in the dtype of the flows.
template <class Py, class F>
void make(Py& self, const std::vector<PackedFlow>& flows, bool shared, F make_one) {
    if (flows.empty() || (flows.size() > 1 && !shared))
        throw std::invalid_argument("a trainer has " + std::to_string(flows.size()) + " flows");
    flows[0].visit([&](const auto& weights) {
        using T = typename std::decay_t<decltype(weights)>::Value;
        auto* const made = make_one(weights_of<T>(flows));
        self.trainer = std::unique_ptr<std::remove_pointer_t<decltype(made)>, DeleteUnlocked>(made);
    });
}

using Order = py::array_t<int64_t, py::array::c_style>;
using Rates = py::array_t<double, py::array::c_style>;

void check_steps(const Order& rows, const Order& ends, const Rates& mass, const Rates& rates) {
    if (ends.size() != rates.size() || mass.size() != rates.size())
        throw std::invalid_argument(std::to_string(rates.size()) + " rates have " + std::to_string(ends.size()) + " ends and " +
                                    std::to_string(mass.size()) + " masses");
    int64_t before = 0;
    for (py::ssize_t s = 0; s < ends.size(); before = ends.data()[s++])
        if (ends.data()[s] < before || ends.data()[s] > rows.size())
            throw std::invalid_argument("step " + std::to_string(s) + " ends at row " + std::to_string(ends.data()[s]) + " of " +
                                        std::to_string(rows.size()));
}

const double* weights_or_none(const py::object& weights, int64_t rows) {
    return weights.is_none() ? nullptr : input<double>(py::reinterpret_borrow<py::array>(weights), rows);
}

// Signals, then what Python asks for. The object outlives the call.
Poll polls(const py::object& user_poll) {
    if (user_poll.is_none()) return check_signals;
    return [&user_poll] {
        check_signals();
        or_rest([&] {
            py::gil_scoped_acquire gil;
            user_poll();
        });
    };
}

// Calls total(gradient, loss) with arrays that are those of the trainer.
template <class T>
std::function<void(T*, int64_t, double*)> totals(const py::object& user_total) {
    if (user_total.is_none()) return {};
    return [&user_total](T* gradient, int64_t size, double* loss) {
        or_rest([&] {
            py::gil_scoped_acquire gil;
            user_total(py::array_t<T>(size, gradient, py::none()), py::array_t<double>(1, loss, py::none()));
        });
    };
}

// The weights, the moments and the number of steps, and whose they are.
template <class Py>
void bind_state(py::class_<Py>& type) {
    type.def("parameters",
             [](const Py& self) -> py::array {
                 return self.visit([](auto& trainer) -> py::array {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     py::array_t<T> result(py::ssize_t(trainer.parameter_count()));
                     trainer.get_parameters(result.mutable_data());
                     return result;
                 });
             })
        .def("set_parameters",
             [](const Py& self, const py::array& parameters) {
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_parameters(input<T>(parameters, trainer.parameter_count()));
                 });
             })
        .def("moments",
             [](const Py& self) {
                 return self.visit([](auto& trainer) -> py::tuple {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     py::array_t<T> first(py::ssize_t(trainer.parameter_count())), second(py::ssize_t(trainer.parameter_count()));
                     trainer.get_moments(first.mutable_data(), second.mutable_data());
                     return py::make_tuple(first, second);
                 });
             })
        .def("set_moments",
             [](const Py& self, const py::array& first, const py::array& second) {
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_moments(input<T>(first, trainer.parameter_count()), input<T>(second, trainer.parameter_count()));
                 });
             })
        .def("set_members",
             [](const Py& self, const std::vector<PackedFlow>& flows) {
                 if (flows.empty()) throw std::invalid_argument("a trainer needs a flow");
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     trainer.set_members(weights_of<T>(flows));
                 });
             })
        .def_property(
            "steps", [](const Py& self) { return self.visit([](auto& trainer) { return trainer.steps(); }); },
            [](const Py& self, int64_t steps) { self.visit([&](auto& trainer) { trainer.set_steps(steps); }); });
}

void bind_cpu(py::module_& module) {
    py::class_<CpuTrainer> type(module, "Trainer");
    type.def(py::init([](const std::vector<PackedFlow>& flows, bool shared, double beta1, double beta2, double eps, double l2,
                         double weight_decay, double clip_norm) {
                 const AdamSettings settings{beta1, beta2, eps, l2, weight_decay, clip_norm};
                 CpuTrainer self;
                 make(self, flows, shared, [&](auto weights) {
                     using T = typename decltype(weights)::value_type::element_type::Value;
                     return new Trainer<T>(std::move(weights), shared, settings);
                 });
                 return self;
             }),
             py::arg("flows"), py::arg("shared"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("l2"),
             py::arg("weight_decay"), py::arg("clip_norm"))
        .def(
            "epoch",
            [](const CpuTrainer& self, const py::array& x, const py::object& context, const py::object& weights, const Order& rows,
               const Order& ends, const Rates& mass, const Rates& rates, const py::object& user_poll, const py::object& user_total) {
                Batch batch = batch_of(x, context);
                check_steps(rows, ends, mass, rates);
                const double* w = weights_or_none(weights, x.shape(0));
                for (py::ssize_t i = 0; i < rows.size(); ++i)
                    if (rows.data()[i] < 0 || rows.data()[i] >= x.shape(0))
                        throw std::invalid_argument("row " + std::to_string(rows.data()[i]) + " is not in x");
                batch.index = rows.data();
                batch.outer = 1;
                batch.inner = rows.size();
                // A batch of one row of one array has no strides; the index is 0 there.
                const Poll poll = polls(user_poll);
                int64_t done = 0;
                double sum = 0;
                self.visit([&](auto& trainer) {
                    using Trained = std::decay_t<decltype(trainer)>;
                    const Steps steps{rates.size(), ends.data(), mass.data(), rates.data()};
                    const auto total = totals<typename Trained::Value>(user_total);
                    Unlocked unlocked;
                    sum = trainer.epoch(batch, w, steps, done, poll, total);
                });
                return py::make_tuple(sum, done);
            },
            py::arg("x"), py::arg("context"), py::arg("weights"), py::arg("rows"), py::arg("ends"), py::arg("mass"), py::arg("rates"),
            py::arg("poll"), py::arg("total"));
    bind_state(type);
}

void bind_device(py::module_& module) {
    py::class_<DeviceTrainer> type(module, "DeviceTrainer");
    type.def(py::init([](const std::vector<PackedFlow>& flows, bool shared, int device, double beta1, double beta2, double eps, double l2,
                         double weight_decay, double clip_norm) {
                 const AdamSettings settings{beta1, beta2, eps, l2, weight_decay, clip_norm};
                 DeviceTrainer self;
                 make(self, flows, shared, [&](auto weights) {
                     using T = typename decltype(weights)::value_type::element_type::Value;
                     return new device::Trainer<T>(weights, shared, device, settings);
                 });
                 return self;
             }),
             py::arg("flows"), py::arg("shared"), py::arg("device"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("l2"),
             py::arg("weight_decay"), py::arg("clip_norm"))
        .def("set_rows",
             [](const DeviceTrainer& self, const py::array& x, const py::object& context, const py::object& weights, int64_t most) {
                 Batch batch = batch_of(x, context);
                 const double* w = weights_or_none(weights, x.shape(0));
                 self.visit([&](auto& trainer) {
                     Unlocked unlocked;
                     trainer.set_rows(batch, w, check_signals, most);
                 });
             })
        .def("epoch",
             [](const DeviceTrainer& self, const Order& rows, const Order& ends, const Rates& mass, const Rates& rates,
                const py::object& user_poll, const py::object& user_total) {
                 check_steps(rows, ends, mass, rates);
                 const Poll poll = polls(user_poll);
                 int64_t done = 0;
                 double sum = 0;
                 self.visit([&](auto& trainer) {
                     using Trained = std::decay_t<decltype(trainer)>;
                     const Steps steps{rates.size(), ends.data(), mass.data(), rates.data()};
                     const auto total = totals<typename Trained::Value>(user_total);
                     Unlocked unlocked;
                     sum = trainer.epoch(rows.data(), rows.size(), steps, done, poll, total);
                 });
                 return py::make_tuple(sum, done);
             })
        .def("log_prob",
             [](const DeviceTrainer& self, size_t member, const py::array& x, const py::object& context, const py::object& out) {
                 const Batch batch = batch_of(x, context);
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer)>::Value;
                     T* const result = output<T>(out, batch.rows());
                     Unlocked unlocked;
                     trainer.log_prob(member, batch, result, check_signals);
                 });
             })
        .def("set_statistics", [](const DeviceTrainer& self, size_t stage, const Rates& mean, const Rates& var) {
            self.visit([&](auto& trainer) {
                if (mean.size() != trainer.features() || var.size() != mean.size())
                    throw std::invalid_argument("statistics have other columns");
                trainer.set_statistics(stage, mean.data(), var.data());
            });
        });
    bind_state(type);
}

}  // namespace

void bind_train(py::module_& module) {
    bind_cpu(module);
    bind_device(module);
}

}  // namespace fastmaf
