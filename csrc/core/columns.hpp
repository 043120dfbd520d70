// What a column of data admits.
#pragma once

#include <cmath>
#include <limits>

#include "types.hpp"

namespace fastmaf {

// The range of T strictly inside the bounds of a column, infinity excluded where there is one: there the density is zero.
template <class T>
void inner_range(const Columns& columns, size_t v, T& low, T& high) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    const Bijection kind = columns.kind[v];
    high = kind == Bijection::identity ? infinity : std::numeric_limits<T>::max();
    low = -high;
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
