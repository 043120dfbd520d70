// Columns of data on their way into and out of a tile: bijection and affine in double, whatever the dtype of the flow.
#pragma once

#include "../ops/math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

using D = Vec<double>;

// Of a distance: denormal numbers are raised first; at or below zero any number will do.
FASTMAF_INLINE D log_or_nan(D x) {
    const D raised = x < 0x1p-1000 ? x * 0x1p100 : x;
    const D value = log<double>(at_least<double>(raised, 1e-300)) - (x < 0x1p-1000 ? splat<double>(100 * 0.69314718055994531) : D{});
    return x == x ? value : x;
}

template <class T>
static void load(const double* in, int n, Bijection kind, double lower, double upper, double loc, double scale, T* out, double* log_det) {
    constexpr int W = Lanes<double>::W;
    if (kind == Bijection::identity) {
        for (int i = 0; i < n; ++i) out[i] = T((in[i] - loc) * scale);
        return;
    }
    for (int i = 0; i < n; i += W) {
        double buffer[W] __attribute__((aligned(64)));
        for (int j = 0; j < W; ++j) buffer[j] = i + j < n ? in[i + j] : in[n - 1];
        const D x = at(static_cast<const double*>(buffer));
        // Distances to the bounds; where a bound is absent the distance plays no part.
        const D above_lower = kind == Bijection::log_below ? splat<double>(1) : x - lower;
        const D below_upper = kind == Bijection::log_above ? splat<double>(1) : upper - x;
        const D low = log_or_nan(above_lower), high = log_or_nan(below_upper);
        // z = low - high, log|dz/dx| = log(upper - lower) - low - high, or without the part of the absent bound. At or outside a bound
        // the density is zero whatever the rest says: the row goes on with z = 0.
        const double range = kind == Bijection::logit ? __builtin_log(upper - lower) : 0;
        const double infinity = __builtin_inf();
        const D nearest = above_lower < below_upper ? above_lower : below_upper, farthest = above_lower < below_upper ? below_upper : above_lower;
        D z = low - high, slope = range - low - high;
        slope = nearest <= 0 ? splat<double>(-infinity) : slope;
        slope = farthest == infinity ? splat<double>(-infinity) : slope;
        z = slope == -infinity ? D{} : z;
        for (int j = 0; j < W && i + j < n; ++j) {
            out[i + j] = T((z[j] - loc) * scale);
            log_det[i + j] += slope[j];
        }
    }
}

template <class T>
static void store(const T* in, int n, Bijection kind, double lower, double upper, double loc, double scale, T* out, double* log_det) {
    constexpr int W = Lanes<double>::W;
    if (kind == Bijection::identity) {
        for (int i = 0; i < n; ++i) out[i] = T(double(in[i]) / scale + loc);
        return;
    }
    for (int i = 0; i < n; i += W) {
        D z;
        for (int j = 0; j < W; ++j) z[j] = double(in[i + j < n ? i + j : n - 1]) / scale + loc;
        D x, slope;
        if (kind == Bijection::logit) {
            const D size = magnitude<double>(z), e = exp<double>(-size), step = (upper - lower) * (e / (1 + e));
            x = z > 0 ? upper - step : lower + step;
            slope = size + 2 * log<double>(1 + e) - __builtin_log(upper - lower);
        } else {
            const D e = exp<double>(kind == Bijection::log_above ? z : -z);
            x = kind == Bijection::log_above ? lower + e : upper - e;
            slope = kind == Bijection::log_above ? -z : z;
        }
        for (int j = 0; j < W && i + j < n; ++j) {
            out[i + j] = T(x[j]);
            log_det[i + j] += slope[j];
        }
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
