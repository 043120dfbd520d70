// Adam (Kingma and Ba 2015) with decoupled decay (Loshchilov and Hutter 2019) on entries of the master, one or a vector of them.
#pragma once

#include FASTMAF_VEC
#include "../core/optimizer.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// Zero in place of what is too small to matter. The moments of a unit that is never active fade for ever, and arithmetic on denormal numbers
// is a hundred times slower.
template <class T, class V>
FASTMAF_INLINE V faded(V x, T least) {
    return ((x < least) & (x > -least)) ? V{} : x;
}

// Weights, moments and the gradient; `root`: the square root of such a V. write(weights, first, second).
template <class T, class V, class Root, class Write>
FASTMAF_INLINE void adam_entry(const AdamStep<T>& s, V w, V m, V v, V g, Root root, Write write) {
    constexpr T small = sizeof(T) == 4 ? T(1e-18) : T(1e-150);  // its square is normal
    const auto gradient = faded<T>((g + s.l2 * w) * s.scale, small);
    const auto first = faded<T>(m + s.gain1 * (gradient - m), small);
    const auto second = faded<T>(s.keep2 * v + s.gain2 * (gradient * gradient), small * small);
    write(w * s.keep - s.rate * first / (root(second) * s.root_correction + s.eps), first, second);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
