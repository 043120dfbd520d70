#include <pybind11/stl.h>

#include <cmath>

#include "../cpu/isa.hpp"
#include "../cpu/scratch.hpp"
#include "../cpu/threads.hpp"
#include "arrays.hpp"

#ifndef FASTMAF_VERSION
#define FASTMAF_VERSION "unknown"
#endif

namespace fastmaf {

void bind_config(py::module_& module) {
    // A context variable, so that a number holds for its own thread, and for its own task where tasks take turns on one.
    module.attr("threads_of_context") = py::reinterpret_borrow<py::object>(threads_of_context());
    module.def("num_threads", [] {
        const ThreadsOfScope scope(wanted_threads());
        return num_threads();
    });
    module.def("set_num_threads", &set_num_threads, py::arg("threads"));
    module.def("isa", &isa);
    module.def("set_isa", &set_isa, py::arg("name"));
    module.def("available_isas", &available_isas);
    module.def("set_poison", &set_poison, py::arg("on"));
    module.def("build_info", [] {
        py::dict info;
        info["version"] = FASTMAF_VERSION;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
        info["compiler"] = "gcc " __VERSION__;
#else
        info["compiler"] = "unknown";
#endif
#ifdef FASTMAF_HAS_X86
        info["built_isas"] = std::vector<std::string>{"avx512", "avx2", "baseline"};
#else
        info["built_isas"] = std::vector<std::string>{"baseline"};
#endif
        return info;
    });
    module.def("exp", py::vectorize([](double x) { return std::exp(x); }));  // that of libfastmaf, which NumPy's is not
    module.def(
        "shuffle",
        [](uint64_t seed, uint32_t stream, uint32_t epoch, int64_t rows) {
            py::array_t<int64_t> order(rows);
            shuffle(seed, stream, epoch, rows, order.mutable_data());
            return order;
        },
        py::arg("seed"), py::arg("stream"), py::arg("epoch"), py::arg("rows"));
    module.def(
        "peak",
        [](const std::string& dtype, int threads, double seconds) {
            Peak result{};
            {
                Unlocked unlocked;
                result = dtype == "float64" ? peak<double>(seconds, threads) : peak<float>(seconds, threads);
            }
            py::dict rates;
            rates["kernel"] = result.kernel;
            rates["fma"] = result.registers;
            return rates;
        },
        py::arg("dtype"), py::arg("threads"), py::arg("seconds"));
}

}  // namespace fastmaf
