// What a column of data admits.
#pragma once

#include <cmath>
#include <limits>

#include "types.hpp"

namespace fastmaf {

// The range of T strictly inside the bounds of a column.
template <class T>
void inner_range(const Columns& columns, size_t v, T& low, T& high) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    low = -infinity;
    high = infinity;
    const Bijection kind = columns.kind[v];
    if (kind == Bijection::logit || kind == Bijection::log_above) {
        low = T(columns.lower[v]);
        while (!(double(low) > columns.lower[v])) low = std::nextafter(low, infinity);
    }
    if (kind == Bijection::logit || kind == Bijection::log_below) {
        high = T(columns.upper[v]);
        while (!(double(high) < columns.upper[v])) high = std::nextafter(high, -infinity);
    }
}

}  // namespace fastmaf
