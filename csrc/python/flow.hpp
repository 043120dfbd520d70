// The packed flow as Python holds it: one class for both dtypes.
#pragma once

#include <memory>
#include <variant>

#include "arrays.hpp"

namespace fastmaf {

struct PackedFlow {
    std::variant<std::shared_ptr<Weights<float>>, std::shared_ptr<Weights<double>>> weights;

    template <class F>
    auto visit(F f) const {
        return std::visit([&](const auto& p) { return f(*p); }, weights);
    }
};

// How many numbers a call writes for each row.
inline constexpr auto one_number = [](const auto&) { return int64_t(1); };
inline constexpr auto all_variables = [](const auto& weights) { return int64_t(weights.plan().features()); };
inline constexpr auto all_probabilities = [](const auto& weights) {
    const Plan& plan = weights.plan();
    if (!plan.discrete()) throw std::invalid_argument("the variables are not discrete");
    return int64_t(plan.features()) * plan.most_values();
};

}  // namespace fastmaf
