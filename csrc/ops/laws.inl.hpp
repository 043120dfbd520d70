// Scale laws: the log-scale a of the raw parameter r, and da/dr.  z = (x - m) e^-a, x = z e^a + m, log|dz/dx| = -a.
//     exp       a = r
//     exp_soft  a = r / (1 + |r| / clip)
#pragma once

#include "../core/types.hpp"
#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
FASTMAF_INLINE Vec<T> log_scale(Law law, T clip, Vec<T> raw) {
    return law == Law::exp ? raw : raw / fma(magnitude<T>(raw), splat<T>(1 / clip), splat<T>(1));
}

template <class T>
FASTMAF_INLINE Vec<T> log_scale_slope(Law law, T clip, Vec<T> a) {
    const Vec<T> root = 1 - magnitude<T>(a) * (1 / clip);
    return law == Law::exp ? splat<T>(1) : root * root;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
