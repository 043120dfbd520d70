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

// How many numbers a call writes for each row.
inline constexpr auto one_number = [](const auto&) { return int64_t(1); };
inline constexpr auto all_variables = [](const auto& program) { return int64_t(program.features()); };
inline constexpr auto all_probabilities = [](const auto& program) {
    if (!program.discrete()) throw std::invalid_argument("the variables are not discrete");
    return int64_t(program.features()) * program.most_values();
};

}  // namespace fastmaf
