// The steps of an epoch over rows in batches of one size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/training.hpp"

namespace {

class Batches {
public:
    Batches(int64_t rows, int64_t batch_size, std::vector<double> rates, double mean_weight) : rates_(std::move(rates)) {
        for (int64_t begin = 0; begin < rows; begin = ends_.back()) {
            ends_.push_back(std::min(rows, begin + batch_size));
            mass_.push_back(double(ends_.back() - begin) * mean_weight);
        }
    }
    operator fastmaf::Steps() const { return {int64_t(ends_.size()), ends_.data(), mass_.data(), rates_.data()}; }

private:
    std::vector<int64_t> ends_;
    std::vector<double> mass_, rates_;
};

}  // namespace
