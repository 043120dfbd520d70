// Each activation: its value, and its derivative as a function of the value (relu, tanh, elu) or of the argument (gelu, silu).
#pragma once

#include "../core/view.hpp"
#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T, class F>
FASTMAF_INLINE void each(T* p, int rows, int vectors, int stride, F f) {
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < vectors; ++j) at(p + r * stride + j * Lanes<T>::W) = f(at(p + r * stride + j * Lanes<T>::W));
}

// use(f), f the activation of a vector.
template <class T, class F>
FASTMAF_INLINE void with_activation(Activation activation, F use) {
    using V = Vec<T>;
    switch (activation) {
        case Activation::relu: return use([](V x) { return relu(x); });
        case Activation::tanh: return use([](V x) { return tanh<T>(x); });
        case Activation::elu: return use([](V x) { return x > 0 ? x : expm1<T>(at_most<T>(x, 0)); });
        case Activation::gelu: return use([](V x) { return x * normal_cdf<T>(x); });
        case Activation::silu: return use([](V x) { return x * sigmoid<T>(x); });
    }
}

// Applied in place to `rows` x `vectors` vectors; rows lie `stride` apart.
template <class T>
FASTMAF_FN void activate(Activation activation, T* p, int rows, int vectors, int stride) {
    with_activation<T>(activation, [&](auto f) { each<T>(p, rows, vectors, stride, f); });
}

// use(f), f the derivative as a function of values or of arguments, see keeps_argument.
template <class T, class F>
FASTMAF_INLINE void with_derivative(Activation activation, F use) {
    using V = Vec<T>;
    switch (activation) {
        case Activation::relu: return use([](V h) { return h > 0 ? splat<T>(1) : V{}; });
        case Activation::tanh: return use([](V h) { return fma(-h, h, splat<T>(1)); });
        case Activation::elu: return use([](V h) { return h > 0 ? splat<T>(1) : h + 1; });
        case Activation::gelu: return use([](V x) { return fma(x, T(0.39894228040143268) * exp<T>(T(-0.5) * x * x), normal_cdf<T>(x)); });
        case Activation::silu:
            return use([](V x) {
                const V s = sigmoid<T>(x);
                return s * fma(x, 1 - s, splat<T>(1));
            });
    }
}

// delta *= derivative at `unit`.
template <class T>
FASTMAF_FN void times_derivative(Activation activation, T* delta, const T* unit, int rows, int vectors, int stride) {
    with_derivative<T>(activation, [&](auto derivative) {
        for (int r = 0; r < rows; ++r)
            for (int j = 0; j < vectors; ++j)
                at(delta + r * stride + j * Lanes<T>::W) *= derivative(at(unit + r * stride + j * Lanes<T>::W));
    });
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
