// Columns of data on their way into and out of a tile: bijection and affine in double, whatever the dtype of the flow.
#pragma once

#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

using D = Vec<double>;

// Of a distance: denormal numbers are raised first; at or below zero any number will do.
FASTMAF_INLINE D log_or_nan(D x) {
    const D raised = x < 0x1p-1000 ? x * 0x1p100 : x;
    const D value = log<double>(at_least<double>(raised, 1e-300)) - (x < 0x1p-1000 ? splat<double>(100 * 0.69314718055994531) : D{});
    return x == x ? value : x;
}

// To the real line; slope = log|dz/dx|. `range` is log(upper - lower) of a logit.
FASTMAF_INLINE D to_line(D x, Bijection kind, double lower, double upper, double range, D& slope) {
    // Distances to the bounds; where a bound is absent the distance plays no part.
    const D above_lower = kind == Bijection::log_below ? splat<double>(1) : x - lower;
    const D below_upper = kind == Bijection::log_above ? splat<double>(1) : upper - x;
    const D low = log_or_nan(above_lower), high = log_or_nan(below_upper);
    // z = low - high, log|dz/dx| = log(upper - lower) - low - high, or without the part of the absent bound. At or outside a bound
    // the density is zero whatever the rest says: the row goes on with z = 0.
    const double infinity = __builtin_inf();
    const D nearest = above_lower < below_upper ? above_lower : below_upper;
    const D farthest = above_lower < below_upper ? below_upper : above_lower;
    const D z = low - high;
    slope = (kind == Bijection::logit ? range : 0.0) - low - high;
    slope = nearest <= 0 ? splat<double>(-infinity) : slope;
    slope = farthest == infinity ? splat<double>(-infinity) : slope;
    return slope == -infinity ? D{} : z;
}

// e^x from the smallest to the largest number: `exp` keeps to the normal ones.
FASTMAF_INLINE D whole_exp(D x) {
    const D half = exp<double>(0.5 * x);
    return magnitude<double>(x) > 708 ? half * half : exp<double>(x);
}

// Back inside the bounds.
FASTMAF_INLINE D from_line(D z, Bijection kind, double lower, double upper, double range, D& slope) {
    if (kind == Bijection::logit) {
        const D size = magnitude<double>(z), e = whole_exp(-size), step = (upper - lower) * (e / (1 + e));
        slope = size + 2 * log<double>(1 + e) - range;
        return z > 0 ? upper - step : lower + step;
    }
    const D e = whole_exp(kind == Bijection::log_above ? z : -z);
    slope = kind == Bijection::log_above ? -z : z;
    return kind == Bijection::log_above ? lower + e : upper - e;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
