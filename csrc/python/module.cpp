#include <pybind11/pybind11.h>

namespace fastmaf {
void bind_config(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_flow(pybind11::module_& module);
void bind_train(pybind11::module_& module);
void bind_xla(pybind11::module_& module);
}  // namespace fastmaf

PYBIND11_MODULE(_core, module) {
    fastmaf::bind_config(module);
    fastmaf::bind_flow(module);
    fastmaf::bind_cuda(module);
    fastmaf::bind_train(module);
    fastmaf::bind_xla(module);
}
