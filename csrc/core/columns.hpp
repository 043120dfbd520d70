// What a column of data admits.
#pragma once

#include <cmath>
#include <limits>

#include "view.hpp"

namespace fastmaf {

// The range of T strictly inside the bounds of a column, infinity excluded where there is one: there the density is zero.
template <class T>
void inner_range(Bijection kind, double lower, double upper, T& low, T& high) {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    high = kind == Bijection::identity ? infinity : std::numeric_limits<T>::max();
    low = -high;
    if (kind == Bijection::logit || kind == Bijection::log_above) {
        low = T(lower);
        while (!(double(low) > lower)) low = std::nextafter(low, infinity);
    }
    if (kind == Bijection::logit || kind == Bijection::log_below) {
        high = T(upper);
        while (!(double(high) < upper)) high = std::nextafter(high, -infinity);
    }
}

}  // namespace fastmaf
