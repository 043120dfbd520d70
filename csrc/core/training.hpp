// What training asks of every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "optimizer.hpp"

namespace fastmaf {

struct AdamSettings {
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, l2 = 0, weight_decay = 0, clip_norm = 0;  // clip_norm 0: none
};

// Of an epoch: step s takes the rows [ends[s - 1], ends[s]) of the order, from 0 at first, divides their gradient by mass[s], and has the
// rate rates[s].
struct Steps {
    int64_t count;
    const int64_t* ends;
    const double *mass, *rates;
};

// The constants of step number `step`, from 1; gradients as they are.
template <class T>
AdamStep<T> adam_step(const AdamSettings& a, int64_t step, double rate) {
    const double root_correction = 1 / std::sqrt(1 - std::pow(a.beta2, double(step)));
    return {T(1),
            T(2 * a.l2),
            T(1 - rate * a.weight_decay),
            T(1 - a.beta1),
            T(a.beta2),
            T(1 - a.beta2),
            T(rate / (1 - std::pow(a.beta1, double(step)))),
            T(root_correction),
            T(a.eps)};
}

}  // namespace fastmaf
