// The vectors of csrc/cuda/vec.inl.hpp on a host: 32 lanes in the compiler's vector types, every operation rounded alike. With them the
// host runs what a GPU would.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "cpu/rows.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

#define FASTMAF_FN static
#define FASTMAF_INLINE static inline __attribute__((always_inline))
#define FASTMAF_GLOBAL(pointer)
#define FASTMAF_MEMBER inline __attribute__((always_inline))
#define FASTMAF_UNROLL(n)
#define FASTMAF_ROLLED

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(128), aligned(64), may_alias));
    typedef uint32_t I __attribute__((vector_size(128), aligned(64), may_alias));
    typedef double Wide __attribute__((vector_size(256), aligned(64), may_alias));
    static constexpr int W = 32;
};

template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(256), aligned(64), may_alias));
    typedef uint64_t I __attribute__((vector_size(256), aligned(64), may_alias));
    typedef V Wide;
    static constexpr int W = 32;
};

constexpr int kVectors = 4;
constexpr bool kPrefetches = false;
constexpr bool kTrims = false;
constexpr int kRows = 8;
template <class T>
constexpr int lanes_of() {
    return kVectors * Lanes<T>::W;
}

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using Bits = typename Lanes<T>::I;
using Words = Lanes<float>::I;
using Index = Lanes<double>::I;

template <class T>
FASTMAF_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};
}
template <class T>
FASTMAF_INLINE Vec<T>& at(T* p) {
    return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
FASTMAF_INLINE const Vec<T>& at(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
FASTMAF_INLINE Bits<T> bits(Vec<T> x) {
    return (Bits<T>)x;
}
template <class T>
FASTMAF_INLINE Vec<T> from_bits(Bits<T> x) {
    return (Vec<T>)x;
}

template <class T>
FASTMAF_INLINE T fma_one(T a, T b, T c) {
    return std::fma(a, b, c);
}
template <class V>
FASTMAF_INLINE V fma(V a, V b, V c) {
    V result;
    for (int i = 0; i < 32; ++i) result[i] = std::fma(a[i], b[i], c[i]);
    return result;
}
template <class V>
FASTMAF_INLINE V relu(V x) {
    return x < 0 ? V{} : x;
}
template <class V>
FASTMAF_INLINE V root(V x) {
    for (int i = 0; i < 32; ++i) x[i] = std::sqrt(x[i]);
    return x;
}

// A GPU loads those side by side together, so they must be aligned.
template <class T, int R, int IS>
struct Weights {
    const T* w;
    explicit Weights(const T* w) : w(w) {
        constexpr size_t together = std::min<size_t>(16, R * sizeof(T));
        if (IS == 1 && reinterpret_cast<uintptr_t>(w) % together) throw std::logic_error("weights are not aligned");
    }
    T operator[](int i) const { return w[i * IS]; }
};

template <class T>
FASTMAF_INLINE Vec<T> magnitude(Vec<T> x) {
    return from_bits<T>(bits<T>(x) & ~bits<T>(splat<T>(T(-0.0))));
}
template <class T>
FASTMAF_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> sign) {
    return from_bits<T>(bits<T>(x) | (bits<T>(sign) & bits<T>(splat<T>(T(-0.0)))));
}
template <class T>
FASTMAF_INLINE Vec<T> at_most(Vec<T> x, T high) {
    return x > high ? splat<T>(high) : x;
}
template <class T>
FASTMAF_INLINE Vec<T> at_least(Vec<T> x, T low) {
    return x < low ? splat<T>(low) : x;
}

FASTMAF_INLINE void multiply(Words a, uint32_t m, Words& low, Words& high) {
    for (int i = 0; i < 32; ++i) {
        const uint64_t product = uint64_t(a[i]) * m;
        low[i] = uint32_t(product);
        high[i] = uint32_t(product >> 32);
    }
}
FASTMAF_INLINE Vec<float> float_of(Words w) { return __builtin_convertvector(w, Vec<float>); }
FASTMAF_INLINE Vec<double> double_of(Words w, int) { return __builtin_convertvector(w, Vec<double>); }
template <class T>
FASTMAF_INLINE Vec<T> narrow(Vec<double> v) {
    return __builtin_convertvector(v, Vec<T>);
}
template <class T>
FASTMAF_INLINE void store_as(T* p, Vec<double> v) {
    at(p) = narrow<T>(v);
}
FASTMAF_INLINE Vec<double> widen(Vec<float> v) { return __builtin_convertvector(v, Vec<double>); }
FASTMAF_INLINE Vec<double> widen(Vec<double> v) { return v; }
template <class T>
FASTMAF_INLINE void add_to(double* sums, Vec<double> v) {
    at(sums) += v;
}

FASTMAF_INLINE Index counted(uint64_t first, uint64_t last) {
    Index result;
    for (int i = 0; i < 32; ++i) result[i] = std::min(first + uint64_t(i), last);
    return result;
}
FASTMAF_INLINE Words low_words(Index i) { return __builtin_convertvector(i & 0xFFFFFFFFull, Words); }
FASTMAF_INLINE Words high_words(Index i) { return __builtin_convertvector(i >> 32, Words); }
FASTMAF_INLINE Index gather_index(const uint64_t* p, Index i) {
    Index result;
    for (int r = 0; r < 32; ++r) result[r] = p[i[r]];
    return result;
}
FASTMAF_FN Vec<double> gather(DType dtype, const char* data, Index offset) {
    Vec<double> result;
    for (int r = 0; r < 32; ++r) result[r] = read(data + int64_t(offset[r]), dtype);
    return result;
}
template <class T>
FASTMAF_INLINE Vec<T> read_back(const T* p, Index offset) {
    Vec<T> result;
    for (int r = 0; r < 32; ++r) result[r] = p[offset[r]];
    return result;
}
template <class M>
FASTMAF_INLINE bool any(M condition) {
    for (int r = 0; r < 32; ++r)
        if (condition[r]) return true;
    return false;
}
template <class T>
FASTMAF_INLINE void scatter(T* p, Index offset, Vec<T> v, int64_t n) {
    for (int r = 0; r < 32 && r < n; ++r) p[offset[r]] = v[r];
}
template <class T>
FASTMAF_INLINE T lane_sum(Vec<T> v) {
    for (int step = 16; step > 0; step /= 2) {
        Vec<T> other;
        for (int l = 0; l < 32; ++l) other[l] = v[l ^ step];
        v += other;
    }
    return v[0];
}
template <class T>
FASTMAF_INLINE void store_one(T* p, T v) {
    *p = v;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
