// Elementary functions of vectors from IEEE operations alone, so that every instruction set with a fused multiply-add gives the same
// bits. Polynomials are Chebyshev fits made for this file; arguments are limited so that results stay normal numbers. NaN stays NaN.
//
//     exp, expm1    x = n ln 2 + r, |r| <= ln 2 / 2;  e^r - 1 = r + r^2 P(r)
//     log           x = 2^n m, m in [sqrt(1/2), sqrt(2));  log m = 2 s + s^3 P(s^2), s = (m - 1) / (m + 1)
//     erfc          e^(-x^2) t P(t), t = 1 / (1 + x / 2)
#pragma once

#include FASTMAF_VEC

namespace fastmaf {
namespace FASTMAF_ISA {

// Device code cannot refer to a static member, but a function may begin with a copy of it.
template <class T, int N>
struct Polynomial {
    T c[N];
};

template <class T>
struct Constants;

template <>
struct Constants<float> {
    static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float exp_low = -87.0f, exp_high = 88.0f;
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr float tanh_limit = 9.1f;
    static constexpr Polynomial<float, 5> exp_poly{
        {0.5f, 0.166665769896987757f, 0.0416665546172045742f, 0.00836317905272257737f, 0.00139261835877134945f}};
    static constexpr Polynomial<float, 3> log_poly{{0.666666850451560291f, 0.399887782821628077f, 0.295800530431884422f}};
    static constexpr Polynomial<float, 11> erfc_poly{{0.555955140633615179f, 0.331870647074672438f, 0.11140093552227091f,
                                                      0.00830818903108421958f, -0.00726556979345894559f, -0.00101952258339506657f,
                                                      0.000792434954731634284f, 0.0000466178026852377867f, -0.000103947164402522075f,
                                                      5.156698866395428e-6f, 9.92113690045469202e-6f}};
};

template <>
struct Constants<double> {
    static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double exp_low = -708.0, exp_high = 709.0;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
    static constexpr double tanh_limit = 20.0;
    static constexpr Polynomial<double, 11> exp_poly{
        {0.5, 0.16666666666666671, 0.0416666666666666698, 0.00833333333332613513, 0.00138888888888837483, 0.000198412698748206253,
         0.0000248015873255477412, 2.75572554002064244e-6, 2.75572736431102953e-7, 2.51052170047207452e-8, 2.09146869680868772e-9}};
    static constexpr Polynomial<double, 8> log_poly{{0.666666666666666665, 0.400000000000008776, 0.2857142857080323, 0.222222223918004693,
                                                     0.181817956308847532, 0.153862402058134779, 0.132687596685606127,
                                                     0.130867670099481738}};
    static constexpr Polynomial<double, 23> erfc_poly{
        {0.555955140633615179,     0.331870683233227132,     0.111400941840481822,     0.00830745774298222874,   -0.00726569432576719541,
         -0.00101530974419102816,  0.000793105311245723919,  0.0000364374327279175973, -0.000105346493543288851, 0.0000165712989680575943,
         0.0000109961990967249631, -5.61639552939636418e-6,  5.24070637103562565e-8,   9.01703805716316719e-7,   -3.49453348699783001e-7,
         -1.60384855966973086e-8,  7.13344498662807402e-8,   -3.06149088430798624e-8,  -7.82579387872153861e-10, 7.44713060660932444e-9,
         -2.46428222582612553e-9,  -6.66590635415254193e-10, 3.94441622680940893e-10}};
};

template <class T, int N>
FASTMAF_INLINE Vec<T> polynomial(const T (&c)[N], Vec<T> x) {
    Vec<T> sum = splat<T>(c[N - 1]);
    FASTMAF_UNROLL(32)
    for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, splat<T>(c[i]));
    return sum;
}

// e^x = scale (1 + q), with scale a power of two.
template <class T>
FASTMAF_INLINE void split_exp(Vec<T> x, Vec<T>& scale, Vec<T>& q) {
    using C = Constants<T>;
    constexpr auto poly = C::exp_poly;
    x = at_least<T>(at_most<T>(x, C::exp_high), C::exp_low);
    const Vec<T> shifted = fma(x, splat<T>(T(1.4426950408889634)), splat<T>(C::shifter));
    const Vec<T> n = shifted - C::shifter;
    Vec<T> r = fma(n, splat<T>(-C::ln2_high), x);
    r = fma(n, splat<T>(-C::ln2_low), r);
    q = fma(polynomial<T>(poly.c, r), r * r, r);
    scale = from_bits<T>((bits<T>(shifted) + C::bias) << C::mantissa);
}

template <class T>
FASTMAF_INLINE Vec<T> exp(Vec<T> x) {
    Vec<T> scale, q;
    split_exp<T>(x, scale, q);
    return fma(scale, q, scale);
}

template <class T>
FASTMAF_INLINE Vec<T> expm1(Vec<T> x) {
    Vec<T> scale, q;
    split_exp<T>(x, scale, q);
    return fma(scale, q, scale - 1);
}

template <class T>
FASTMAF_INLINE Vec<T> tanh(Vec<T> x) {
    const Vec<T> e = expm1<T>(at_most<T>(2 * magnitude<T>(x), 2 * Constants<T>::tanh_limit));
    return with_sign<T>(e / (e + 2), x);
}

template <class T>
FASTMAF_INLINE Vec<T> sigmoid(Vec<T> x) {
    return 1 / (1 + exp<T>(-x));
}

// The natural logarithm of positive normal numbers.
template <class T>
FASTMAF_INLINE Vec<T> log(Vec<T> x) {
    using C = Constants<T>;
    constexpr auto poly = C::log_poly;
    const Bits<T> one = bits<T>(splat<T>(1)), half_root = bits<T>(splat<T>(T(0.70710678118654752)));
    const Bits<T> shifted = bits<T>(x) + (one - half_root);
    const Bits<T> exponent = shifted >> C::mantissa;
    const Bits<T> below = ((Bits<T>{} + 1) << C::mantissa) - 1;
    const Vec<T> m = from_bits<T>((shifted & below) + half_root);
    // Small integers become floats through the shifter, with no conversion that an instruction set might lack.
    const Vec<T> n = from_bits<T>(exponent + bits<T>(splat<T>(C::shifter))) - (C::shifter + T(C::bias));
    const Vec<T> f = m - 1, s = f / (m + 1), s2 = s * s;
    const Vec<T> tail = s2 * polynomial<T>(poly.c, s2);
    const Vec<T> log_m = f - s * (f - tail);
    return fma(n, splat<T>(C::ln2_high), fma(n, splat<T>(C::ln2_low), log_m));
}

// log(1 + e) for e in [0, 1]: what rounding takes from 1 + e, or puts there, is made good.
template <class T>
FASTMAF_INLINE Vec<T> log1p(Vec<T> e) {
    const Vec<T> whole = 1 + e;
    return log<T>(whole) + (e - (whole - 1)) / whole;
}

// log(1 + e^x).
template <class T>
FASTMAF_INLINE Vec<T> softplus(Vec<T> x) {
    const Vec<T> value = (x > 0 ? x : Vec<T>{}) + log1p<T>(exp<T>(-magnitude<T>(x)));
    return x == x ? value : x;
}

// Phi(x), the normal distribution function, by way of erfc(|x| / sqrt 2) / 2.
template <class T>
FASTMAF_INLINE Vec<T> normal_cdf(Vec<T> x) {
    constexpr auto poly = Constants<T>::erfc_poly;
    const Vec<T> a = magnitude<T>(x) * T(0.70710678118654752);
    const Vec<T> t = 1 / fma(at_most<T>(a, T(14)), splat<T>(T(0.5)), splat<T>(1));
    const Vec<T> u = fma(t, splat<T>(T(2 / 0.875)), splat<T>(T(-1.125 / 0.875)));
    const Vec<T> upper = T(0.5) * t * polynomial<T>(poly.c, u) * exp<T>(-a * a);
    return x < 0 ? upper : 1 - upper;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
