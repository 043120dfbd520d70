// Laws: how the shift m and the raw log-scale r of a variable act on it.
//
//     standardize  z = (x - m) e^-a        affine  z = x e^a + m
//     exp  a = r                           exp_soft  a = r / (1 + |r| / c0)
//     softplus  a = log(log(1 + e^r) + c0)    sigmoid  a = log(1 / (1 + e^-(r + c1)) + c0)
//     clamp  a = min(max(r, c0), c1)       log_precision  a = -r / 2, in form affine r / 2
//
// Both forms are written with s = log|dx/dz|, which is a in the first and -a in the second.
#pragma once

#include "../core/view.hpp"
#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// What maps read of a variable: all of it, or no more than the clip of the stage. NaN stays NaN.
template <class T>
FASTMAF_INLINE Vec<T> clipped(const StageView<T>& stage, Vec<T> x) {
    const Vec<T> high = splat<T>(stage.input_clip > 0 ? stage.input_clip : T(__builtin_inf())), low = -high;
    const Vec<T> above = x < low ? low : x;
    return above > high ? high : above;
}

// e^a of the laws that give the scale itself.
template <class T>
FASTMAF_INLINE Vec<T> own_scale(const StageView<T>& stage, Vec<T> raw) {
    return (stage.law == Law::softplus ? softplus<T>(raw) : sigmoid<T>(raw + stage.constant[1])) + stage.constant[0];
}

// a of the laws that flows made here do not have: calls, so that those which they have stay short.
template <class T>
FASTMAF_FN Vec<T> foreign_log_scale(const StageView<T>& stage, Vec<T> raw) {
    if (stage.law == Law::clamp) return at_most<T>(at_least<T>(raw, stage.constant[0]), stage.constant[1]);
    if (stage.law == Law::log_precision) return (stage.form == Form::affine ? T(0.5) : T(-0.5)) * raw;
    const Vec<T> scale = own_scale<T>(stage, raw);
    return scale < T(__builtin_inf()) ? log<T>(scale) : scale;
}

template <class T>
FASTMAF_FN Vec<T> foreign_slope(const StageView<T>& stage, Vec<T> raw) {
    if (stage.law == Law::clamp) return raw > stage.constant[0] ? (raw < stage.constant[1] ? splat<T>(1) : Vec<T>{}) : Vec<T>{};
    if (stage.law == Law::log_precision) return splat<T>(stage.form == Form::affine ? T(0.5) : T(-0.5));
    const Vec<T> scale = own_scale<T>(stage, raw), shifted = stage.law == Law::softplus ? raw : raw + stage.constant[1];
    const Vec<T> slope = sigmoid<T>(shifted) / scale;
    return stage.law == Law::softplus ? slope : sigmoid<T>(-shifted) * slope;
}

template <class T>
FASTMAF_INLINE Vec<T> log_scale(const StageView<T>& stage, Vec<T> raw) {
    const Vec<T> a = stage.law == Law::exp        ? raw
                     : stage.law == Law::exp_soft ? raw / fma(magnitude<T>(raw), splat<T>(1 / stage.constant[0]), splat<T>(1))
                                                  : foreign_log_scale<T>(stage, raw);
    return stage.form == Form::affine ? -a : a;
}

// ds/dr; not from s, which cannot tell raw log-scales far beyond the clip apart.
template <class T>
FASTMAF_INLINE Vec<T> log_scale_slope(const StageView<T>& stage, Vec<T> raw) {
    const Vec<T> root = 1 / fma(magnitude<T>(raw), splat<T>(1 / stage.constant[0]), splat<T>(1));
    const Vec<T> slope = stage.law == Law::exp ? splat<T>(1) : stage.law == Law::exp_soft ? root * root : foreign_slope<T>(stage, raw);
    return stage.form == Form::affine ? -slope : slope;
}

// e^x; infinite or zero where `exp` would stop at a number, which far out might make a density of a row that has none.
template <class T>
FASTMAF_INLINE Vec<T> scale_of(Vec<T> x) {
    const Vec<T> e = exp<T>(x);
    return x > Constants<T>::exp_high ? splat<T>(T(__builtin_inf())) : x < Constants<T>::exp_low ? Vec<T>{} : e;
}

template <class T>
FASTMAF_INLINE Vec<T> to_z(const StageView<T>& stage, Vec<T> x, Vec<T> m, Vec<T> s) {
    const Vec<T> e = scale_of<T>(-s);
    return stage.form == Form::affine ? fma(x, e, m) : (x - m) * e;
}

template <class T>
FASTMAF_INLINE Vec<T> to_x(const StageView<T>& stage, Vec<T> z, Vec<T> m, Vec<T> s) {
    const Vec<T> e = scale_of<T>(s);
    return stage.form == Form::affine ? (z - m) * e : fma(z, e, m);
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
