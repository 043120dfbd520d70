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
py::array_t<T> copy_of(const AlignedVector<T>& values) {
    return py::array_t<T>(py::ssize_t(values.size()), values.data());
}

template <class T>
void assign(AlignedVector<T>& to, const py::array& from) {
    std::copy_n(input<T>(from, int64_t(to.size())), to.size(), to.data());
}

}  // namespace

void bind_train(py::module_& module) {
    const Poll poll = check_signals;
    py::class_<PyTrainer>(module, "Trainer")
        .def(py::init([](const PackedFlow& flow, double beta1, double beta2, double eps, double l2, double weight_decay, double clip_norm) {
                 const AdamSettings settings{beta1, beta2, eps, l2, weight_decay, clip_norm};
                 PyTrainer self;
                 std::visit(
                     [&](const auto& program) {
                         using T = typename std::decay_t<decltype(*program)>::Value;
                         self.trainer = std::make_unique<Trainer<T>>(program, settings);
                     },
                     flow.program);
                 return self;
             }),
             py::arg("flow"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("l2"), py::arg("weight_decay"), py::arg("clip_norm"))
        .def("epoch",
             [poll](const PyTrainer& self, const py::array& x, const py::object& context, const py::object& weights,
                    const py::array_t<int64_t, py::array::c_style>& rows, int64_t batch_size, const py::array_t<double, py::array::c_style>& rates,
                    double mean_weight, const py::object& user_poll) {
                 Batch batch = batch_of(x, context);
                 if (batch_size < 1 || rates.size() < (rows.size() + batch_size - 1) / batch_size)
                     throw std::invalid_argument("an epoch of " + std::to_string(rows.size()) + " rows has " + std::to_string(rates.size()) + " rates");
                 const double* w = weights.is_none() ? nullptr : input<double>(py::reinterpret_borrow<py::array>(weights), x.shape(0));
                 for (py::ssize_t i = 0; i < rows.size(); ++i)
                     if (rows.data()[i] < 0 || rows.data()[i] >= x.shape(0)) throw std::invalid_argument("row " + std::to_string(rows.data()[i]) + " is not in x");
                 batch.index = rows.data();
                 batch.outer = 1;
                 batch.inner = rows.size();
                 // A batch of one row of one array has no strides; the index is 0 there.
                 Poll ask = poll;
                 if (!user_poll.is_none()) ask = [poll, &user_poll] {
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
                     using T = typename std::decay_t<decltype(trainer.program())>::Value;
                     py::array_t<T> result(py::ssize_t(trainer.program().parameter_count()));
                     trainer.program().get_parameters(result.mutable_data());
                     return result;
                 });
             })
        .def("set_parameters",
             [](const PyTrainer& self, const py::array& parameters) {
                 self.visit([&](auto& trainer) {
                     using T = typename std::decay_t<decltype(trainer.program())>::Value;
                     trainer.program().set_parameters(input<T>(parameters, trainer.program().parameter_count()));
                 });
             })
        .def("moments",
             [](const PyTrainer& self) {
                 return self.visit([](auto& trainer) -> py::tuple { return py::make_tuple(copy_of(trainer.first_moment()), copy_of(trainer.second_moment())); });
             })
        .def("set_moments",
             [](const PyTrainer& self, const py::array& first, const py::array& second) {
                 self.visit([&](auto& trainer) {
                     assign(trainer.first_moment(), first);
                     assign(trainer.second_moment(), second);
                 });
             })
        .def_property(
            "steps", [](const PyTrainer& self) { return self.visit([](auto& trainer) { return trainer.steps(); }); },
            [](const PyTrainer& self, int64_t steps) { self.visit([&](auto& trainer) { trainer.set_steps(steps); }); });
}

}  // namespace fastmaf
