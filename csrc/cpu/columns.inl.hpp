// Loads and stores n values of a column.
#pragma once

#include "../ops/columns.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
static void load(const double* in, int n, Bijection kind, double lower, double upper, double loc, double scale, T* out, double* log_det) {
    constexpr int W = Lanes<double>::W;
    if (kind == Bijection::identity) {
        for (int i = 0; i < n; ++i) out[i] = T((in[i] - loc) * scale);
        return;
    }
    const double range = kind == Bijection::logit ? __builtin_log(upper - lower) : 0;
    for (int i = 0; i < n; i += W) {
        double buffer[W] __attribute__((aligned(64)));
        for (int j = 0; j < W; ++j) buffer[j] = i + j < n ? in[i + j] : in[n - 1];
        D slope;
        const D z = to_line(at(static_cast<const double*>(buffer)), kind, lower, upper, range, slope);
        for (int j = 0; j < W && i + j < n; ++j) {
            out[i + j] = T((z[j] - loc) * scale);
            log_det[i + j] += slope[j];
        }
    }
}

template <class T>
static void refuse_other(const double* in, int n, int values, double* log_det) {
    constexpr int W = Lanes<double>::W;
    typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
    for (int i = 0; i < n; i += W) {
        const D x = __builtin_convertvector(__builtin_convertvector(at(in + i), Narrow), D);
        const D whole = (x + Constants<double>::shifter) - Constants<double>::shifter;
        const D least = at(log_det + i), never = splat<double>(-__builtin_inf());
        at(log_det + i) = x == x ? (x >= 0 ? (x < double(values) ? (x == whole ? least : never) : never) : never) : least;
    }
}

template <class T>
static void store(const T* in, int n, Bijection kind, double lower, double upper, double loc, double scale, double* out, double* log_det) {
    constexpr int W = Lanes<double>::W;
    if (kind == Bijection::identity) {
        for (int i = 0; i < n; ++i) out[i] = double(in[i]) / scale + loc;
        return;
    }
    const double range = kind == Bijection::logit ? __builtin_log(upper - lower) : 0;
    for (int i = 0; i < n; i += W) {
        D z, slope;
        for (int j = 0; j < W; ++j) z[j] = double(in[i + j < n ? i + j : n - 1]) / scale + loc;
        const D x = from_line(z, kind, lower, upper, range, slope);
        for (int j = 0; j < W && i + j < n; ++j) {
            out[i + j] = x[j];
            log_det[i + j] += slope[j];
        }
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
