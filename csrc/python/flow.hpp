// The packed flow as Python holds it: one class for both dtypes.
#pragma once

#include <memory>
#include <variant>

#include "arrays.hpp"

namespace fastmaf {

struct PackedFlow {
    std::variant<std::shared_ptr<Program<float>>, std::shared_ptr<Program<double>>> program;

    template <class F>
    auto visit(F f) const {
        return std::visit([&](const auto& p) { return f(*p); }, program);
    }
};

}  // namespace fastmaf
