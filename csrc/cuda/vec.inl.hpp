// Vectors of a GPU: a warp is the vector. Vec<T> is one number, that of the lane that a thread has in its warp, and at(p) the lane's
// element of the 32 at p. Compiled without contraction, so the operations round as those of avx2 and avx512 do.
#pragma once

#include <cstdint>

namespace fastmaf {
namespace FASTMAF_ISA {

#define FASTMAF_FN static __device__
#define FASTMAF_INLINE static __device__ __forceinline__
#ifndef FASTMAF_GLOBAL
#define FASTMAF_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))  // loads need not find out where it lies
#endif
#define FASTMAF_MEMBER __device__ __forceinline__
#define FASTMAF_PRAGMA(text) _Pragma(#text)
#define FASTMAF_UNROLL(n) FASTMAF_PRAGMA(unroll)
#define FASTMAF_ROLLED FASTMAF_PRAGMA(unroll 1)

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using V = float;
    using I = uint32_t;
    using Wide = double;
    static constexpr int W = 32;
};

template <>
struct Lanes<double> {
    using V = double;
    using I = uint64_t;
    using Wide = double;
    static constexpr int W = 32;
};

// A tile of rows is one, two or four vectors wide.
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
using Words = uint32_t;
using Index = uint64_t;  // a number of each row

FASTMAF_INLINE int lane() { return int(threadIdx.x % 32); }

template <class T>
FASTMAF_INLINE Vec<T> splat(T x) {
    return x;
}
template <class T>
FASTMAF_INLINE T& at(T* p) {
    return p[lane()];
}

FASTMAF_INLINE uint32_t bits_of(float x) { return __float_as_uint(x); }
FASTMAF_INLINE uint64_t bits_of(double x) { return uint64_t(__double_as_longlong(x)); }
FASTMAF_INLINE float number_of(uint32_t x) { return __uint_as_float(x); }
FASTMAF_INLINE double number_of(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }
template <class T>
FASTMAF_INLINE Bits<T> bits(Vec<T> x) {
    return bits_of(x);
}
template <class T>
FASTMAF_INLINE Vec<T> from_bits(Bits<T> x) {
    return number_of(x);
}

FASTMAF_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FASTMAF_INLINE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
template <class T>
FASTMAF_INLINE T fma_one(T a, T b, T c) {
    return fma(a, b, c);
}
FASTMAF_INLINE float relu(float x) { return x < 0 ? 0 : x; }
FASTMAF_INLINE double relu(double x) { return x < 0 ? 0 : x; }
FASTMAF_INLINE float root(float x) { return __fsqrt_rn(x); }
FASTMAF_INLINE double root(double x) { return __dsqrt_rn(x); }

// R weights that lie IS apart; those side by side are loaded together, which the alignment of the panels of a tape allows.
template <class T, int R, int IS>
struct Weights {
    T value[R];
    FASTMAF_MEMBER explicit Weights(const T* w) {
        constexpr int together = R * int(sizeof(T)) >= 16 ? 16 / int(sizeof(T)) : R;
        if constexpr (IS != 1) {
            FASTMAF_UNROLL(8)
            for (int i = 0; i < R; ++i) value[i] = w[i * IS];
        } else {
            struct alignas(sizeof(T) * together) Group {
                T value[together];
            };
            FASTMAF_UNROLL(8)
            for (int i = 0; i < R; i += together) {
                const Group group = reinterpret_cast<const Group*>(w)[i / together];
                FASTMAF_UNROLL(4)
                for (int k = 0; k < together; ++k) value[i + k] = group.value[k];
            }
        }
    }
    FASTMAF_MEMBER T operator[](int i) const { return value[i]; }
};

template <class T>
FASTMAF_INLINE Vec<T> magnitude(Vec<T> x) {
    return from_bits<T>(bits<T>(x) & ~bits<T>(T(-0.0)));
}
template <class T>
FASTMAF_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> sign) {
    return from_bits<T>(bits<T>(x) | (bits<T>(sign) & bits<T>(T(-0.0))));
}
// Limits that let NaN through.
template <class T>
FASTMAF_INLINE Vec<T> at_most(Vec<T> x, T high) {
    return x > high ? high : x;
}
template <class T>
FASTMAF_INLINE Vec<T> at_least(Vec<T> x, T low) {
    return x < low ? low : x;
}

FASTMAF_INLINE void multiply(Words a, uint32_t m, Words& low, Words& high) {
    low = a * m;
    high = __umulhi(a, m);
}
FASTMAF_INLINE float float_of(Words w) { return __uint2float_rn(w); }
FASTMAF_INLINE double double_of(Words w, int) { return double(w); }
template <class T>
FASTMAF_INLINE void store_as(T* p, double v) {
    at(p) = T(v);
}
template <class T>
FASTMAF_INLINE Vec<T> narrow(double v) {
    return T(v);
}
FASTMAF_INLINE double widen(float v) { return v; }
FASTMAF_INLINE double widen(double v) { return v; }
template <class T>
FASTMAF_INLINE void add_to(double* sums, double v) {
    at(sums) += v;
}

// ---- rows of callers' arrays -----------------------------------------------------------------------------------------------------

// first, first + 1, ..., none of them above `last`.
FASTMAF_INLINE Index counted(uint64_t first, uint64_t last) {
    const uint64_t row = first + uint64_t(lane());
    return row < last ? row : last;
}
FASTMAF_INLINE Words low_words(Index i) { return uint32_t(i); }
FASTMAF_INLINE Words high_words(Index i) { return uint32_t(i >> 32); }
FASTMAF_INLINE Index gather_index(const uint64_t* p, Index i) { return p[i]; }

template <class S>
FASTMAF_INLINE double read_as(const char* p) {
    return double(*reinterpret_cast<const S*>(p));
}
// One element for each row, from so many bytes behind `data`.
FASTMAF_FN double gather(DType dtype, const char* data, Index offset) {
    const char* p = data + int64_t(offset);
    switch (dtype) {
        case DType::f16: {
            float value;
            asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(*reinterpret_cast<const unsigned short*>(p)));
            return value;
        }
        case DType::f32: return read_as<float>(p);
        case DType::f64: return read_as<double>(p);
        case DType::i8: return read_as<signed char>(p);
        case DType::i16: return read_as<int16_t>(p);
        case DType::i32: return read_as<int32_t>(p);
        case DType::i64: return read_as<int64_t>(p);
        case DType::u8: return read_as<uint8_t>(p);
        case DType::u16: return read_as<uint16_t>(p);
        case DType::u32: return read_as<uint32_t>(p);
        case DType::u64: return read_as<uint64_t>(p);
        default: return *p ? 1.0 : 0.0;
    }
}
template <class T>
FASTMAF_INLINE Vec<T> read_back(const T* p, Index offset) {
    return p[offset];
}
// Whether a condition holds in any lane.
FASTMAF_INLINE bool any(bool condition) { return __any_sync(0xFFFFFFFFu, condition); }
// p[offset] = v for the first n rows.
template <class T>
FASTMAF_INLINE void scatter(T* p, Index offset, Vec<T> v, int64_t n) {
    if (lane() < n) p[offset] = v;
}
// The sum over the lanes, as a tree: the same in all of them.
template <class T>
FASTMAF_INLINE T lane_sum(T v) {
    FASTMAF_UNROLL(5)
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
    return v;
}
// What all lanes have alike.
template <class T>
FASTMAF_INLINE void store_one(T* p, T v) {
    if (lane() == 0) *p = v;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
