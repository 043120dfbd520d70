// The constants of a step of the optimizer, as kernels take them.
#pragma once

namespace fastmaf {

// Of one Adam step (Kingma and Ba 2015), each rounded once from double: 1 - beta taken in float would be off by 1e-5.
template <class T>
struct AdamStep {
    T scale, l2, keep;      // gradient: (g + l2 w) scale; weights: keep w first (decoupled decay)
    T gain1, keep2, gain2;  // 1 - beta1, beta2, 1 - beta2
    T rate, root_correction, eps;
};

}  // namespace fastmaf
