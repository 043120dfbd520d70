// Laws: how the shift m and the raw log-scale r of a variable act on it.
//
//     standardize  z = (x - m) e^-a        affine  z = x e^a + m
//     exp  a = r                           exp_soft  a = r / (1 + |r| / clip)
//
// Both forms are written with s = log|dx/dz|, which is a in the first and -a in the second.
#pragma once

#include "../core/program.hpp"
#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
FASTMAF_INLINE Vec<T> log_scale(const MadeView<T>& made, Vec<T> raw) {
    const Vec<T> a = made.law == Law::exp ? raw : raw / fma(magnitude<T>(raw), splat<T>(1 / made.clip), splat<T>(1));
    return made.form == Form::affine ? -a : a;
}

// ds/dr.
template <class T>
FASTMAF_INLINE Vec<T> log_scale_slope(const MadeView<T>& made, Vec<T> s) {
    const Vec<T> root = 1 - magnitude<T>(s) * (1 / made.clip);
    const Vec<T> slope = made.law == Law::exp ? splat<T>(1) : root * root;
    return made.form == Form::affine ? -slope : slope;
}

template <class T>
FASTMAF_INLINE Vec<T> to_z(const MadeView<T>& made, Vec<T> x, Vec<T> m, Vec<T> s) {
    const Vec<T> e = exp<T>(-s);
    return made.form == Form::affine ? fma(x, e, m) : (x - m) * e;
}

template <class T>
FASTMAF_INLINE Vec<T> to_x(const MadeView<T>& made, Vec<T> z, Vec<T> m, Vec<T> s) {
    const Vec<T> e = exp<T>(s);
    return made.form == Form::affine ? (z - m) * e : fma(z, e, m);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
