// What ops need of a vector; csrc/cuda/vec.inl.hpp offers the same with the threads of a warp for lanes.
// Vectors of the instruction set being compiled: Lanes<T>::V holds W values of T, I the integers of the same width.
// Arithmetic is that of the compiler's vector types; what they lack, or what must round the same everywhere, stands here.
// The baseline of x86 has no fused multiply-add, so its results differ from avx2 and avx512 in the last bits.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>

namespace fastmaf {
namespace FASTMAF_ISA {

#if defined(__AVX512F__)
#define FASTMAF_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTMAF_VECTOR_BYTES 32
#else
#define FASTMAF_VECTOR_BYTES 16
#endif
#define FASTMAF_FN static
#define FASTMAF_INLINE static inline __attribute__((always_inline))
#define FASTMAF_GLOBAL(pointer)  // what a GPU must be told of an address
#define FASTMAF_MEMBER inline __attribute__((always_inline))
#define FASTMAF_PRAGMA(text) _Pragma(#text)
#define FASTMAF_UNROLL(n) FASTMAF_PRAGMA(GCC unroll n)

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(FASTMAF_VECTOR_BYTES), may_alias));
    typedef float Loose __attribute__((vector_size(FASTMAF_VECTOR_BYTES), aligned(4), may_alias));
    typedef uint32_t I __attribute__((vector_size(FASTMAF_VECTOR_BYTES), may_alias));
    typedef double Wide __attribute__((vector_size(2 * FASTMAF_VECTOR_BYTES)));
    static constexpr int W = FASTMAF_VECTOR_BYTES / 4;
};

template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(FASTMAF_VECTOR_BYTES), may_alias));
    typedef double Loose __attribute__((vector_size(FASTMAF_VECTOR_BYTES), aligned(8), may_alias));
    typedef uint64_t I __attribute__((vector_size(FASTMAF_VECTOR_BYTES), may_alias));
    typedef V Wide;
    static constexpr int W = FASTMAF_VECTOR_BYTES / 8;
};

// A sub-tile of rows is three vectors wide.
constexpr int kVectors = 3;
constexpr bool kPrefetches = true;
constexpr bool kTrims = true;  // a strip sums the rows that it has, and none beyond
// Rows of a panel that are summed at once.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
template <class T>
constexpr int lanes_of() {
    return kVectors * Lanes<T>::W;
}

template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
using Bits = typename Lanes<T>::I;

template <class T>
FASTMAF_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};  // a sum with zero would lose the sign of -0
}
template <class T>
FASTMAF_INLINE Vec<T>& at(T* p) {
    return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
FASTMAF_INLINE const Vec<T>& at(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
// A register whose origin the compiler no longer knows.
template <class V>
FASTMAF_INLINE void opaque(V& v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}
// at(p) in a register. GCC likes to read a vector again for every use, which takes the ports that other loads need.
template <class T>
FASTMAF_INLINE Vec<T> loaded(const T* p) {
    Vec<T> v = at(p);
    opaque(v);
    return v;
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
FASTMAF_INLINE Vec<T> load_loose(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::Loose*>(p);
}
template <class T>
FASTMAF_INLINE void store_loose(T* p, Vec<T> v) {
    *reinterpret_cast<typename Lanes<T>::Loose*>(p) = v;
}

// p[0 .. n) = or += the first n lanes of v.
template <class T>
FASTMAF_INLINE void store_first(T* p, Vec<T> v, int n, bool add) {
    if (n >= Lanes<T>::W) return store_loose<T>(p, add ? load_loose(p) + v : v);
    if (n <= 0) return;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __mmask16 first = __mmask16((1u << n) - 1);
        if (add) v += (Vec<T>)_mm512_maskz_loadu_ps(first, p);
        _mm512_mask_storeu_ps(p, first, (__m512)v);
    } else {
        const __mmask8 first = __mmask8((1u << n) - 1);
        if (add) v += (Vec<T>)_mm512_maskz_loadu_pd(first, p);
        _mm512_mask_storeu_pd(p, first, (__m512d)v);
    }
#else
    for (int i = 0; i < n; ++i) p[i] = add ? p[i] + v[i] : v[i];
#endif
}

// fma(a, b, c) = a b + c; relu keeps NaN, so the maximum takes its second operand where the two do not compare.
#if defined(__AVX512F__)
FASTMAF_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTMAF_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
FASTMAF_INLINE Vec<float> relu(Vec<float> x) { return (Vec<float>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x); }
FASTMAF_INLINE Vec<double> relu(Vec<double> x) { return (Vec<double>)_mm512_max_pd(_mm512_setzero_pd(), (__m512d)x); }
FASTMAF_INLINE Vec<float> root(Vec<float> x) { return (Vec<float>)_mm512_sqrt_ps((__m512)x); }
FASTMAF_INLINE Vec<double> root(Vec<double> x) { return (Vec<double>)_mm512_sqrt_pd((__m512d)x); }
#elif defined(__AVX2__)
FASTMAF_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTMAF_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
FASTMAF_INLINE Vec<float> relu(Vec<float> x) { return (Vec<float>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x); }
FASTMAF_INLINE Vec<double> relu(Vec<double> x) { return (Vec<double>)_mm256_max_pd(_mm256_setzero_pd(), (__m256d)x); }
FASTMAF_INLINE Vec<float> root(Vec<float> x) { return (Vec<float>)_mm256_sqrt_ps((__m256)x); }
FASTMAF_INLINE Vec<double> root(Vec<double> x) { return (Vec<double>)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__aarch64__)
FASTMAF_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTMAF_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
template <class V>
FASTMAF_INLINE V relu(V x) {
    return x < 0 ? V{} : x;
}
FASTMAF_INLINE Vec<float> root(Vec<float> x) { return (Vec<float>)vsqrtq_f32((float32x4_t)x); }
FASTMAF_INLINE Vec<double> root(Vec<double> x) { return (Vec<double>)vsqrtq_f64((float64x2_t)x); }
#else
template <class V>
FASTMAF_INLINE V fma(V a, V b, V c) {
    return a * b + c;
}
template <class V>
FASTMAF_INLINE V relu(V x) {
    return x < 0 ? V{} : x;
}
FASTMAF_INLINE Vec<float> root(Vec<float> x) {
    for (int i = 0; i < Lanes<float>::W; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
FASTMAF_INLINE Vec<double> root(Vec<double> x) {
    for (int i = 0; i < Lanes<double>::W; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
}
#endif

template <class T>
FASTMAF_INLINE T fma_one(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
    return sizeof(T) == 4 ? T(__builtin_fmaf(float(a), float(b), float(c))) : T(__builtin_fma(double(a), double(b), double(c)));
#else
    return a * b + c;
#endif
}

// R weights that lie IS apart.
template <class T, int R, int IS>
struct Weights {
    const T* w;
    FASTMAF_MEMBER explicit Weights(const T* w) : w(w) {}
    FASTMAF_MEMBER T operator[](int i) const { return w[i * IS]; }
};

template <class T>
FASTMAF_INLINE Vec<T> magnitude(Vec<T> x) {
    return (Vec<T>)((Bits<T>)x & ~(Bits<T>)splat<T>(T(-0.0)));
}
template <class T>
FASTMAF_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> sign) {
    return (Vec<T>)((Bits<T>)x | ((Bits<T>)sign & (Bits<T>)splat<T>(T(-0.0))));
}
// Limits that let NaN through.
template <class T>
FASTMAF_INLINE Vec<T> at_most(Vec<T> x, T high) {
    return x > high ? splat<T>(high) : x;
}
template <class T>
FASTMAF_INLINE Vec<T> at_least(Vec<T> x, T low) {
    return x < low ? splat<T>(low) : x;
}

// Lanes of a and b side by side, picked by index.
template <class T>
FASTMAF_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Bits<T> index) {
#if defined(__clang__)
    Vec<T> result;
#pragma unroll
    for (int i = 0; i < Lanes<T>::W; ++i) result[i] = index[i] < Lanes<T>::W ? a[index[i]] : b[index[i] - Lanes<T>::W];
    return result;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

// 32 x 32 -> 64 bit products of every lane: low and high words.
typedef uint32_t Words __attribute__((vector_size(FASTMAF_VECTOR_BYTES), may_alias));
FASTMAF_INLINE void multiply(Words a, uint32_t m, Words& low, Words& high) {
#if defined(__AVX512F__)
    const __m512i f = _mm512_set1_epi64(m), x = (__m512i)a;
    const __m512i even = _mm512_mul_epu32(x, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), f);
    low = (Words)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    high = (Words)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
    const __m256i f = _mm256_set1_epi64x(m), x = (__m256i)a;
    const __m256i even = _mm256_mul_epu32(x, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), f);
    low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
    for (int i = 0; i < FASTMAF_VECTOR_BYTES / 4; ++i) {
        const uint64_t product = uint64_t(a[i]) * m;
        low[i] = uint32_t(product);
        high[i] = uint32_t(product >> 32);
    }
#endif
}

// Words below 2^31 as float; words [h, h + W) as double.
FASTMAF_INLINE Vec<float> float_of(Words w) {
    typedef int32_t Signed __attribute__((vector_size(FASTMAF_VECTOR_BYTES)));
    return __builtin_convertvector((Signed)w, Vec<float>);
}
FASTMAF_INLINE Vec<double> double_of(Words w, int h) {
    Vec<double> x;
    for (int i = 0; i < Lanes<double>::W; ++i) x[i] = double(w[h + i]);
    return x;
}
template <class T>
FASTMAF_INLINE void store_as(T* p, Vec<double> v) {
    for (int i = 0; i < Lanes<double>::W; ++i) p[i] = T(v[i]);
}

FASTMAF_INLINE Lanes<float>::Wide widen(Vec<float> v) { return __builtin_convertvector(v, Lanes<float>::Wide); }
FASTMAF_INLINE Lanes<double>::Wide widen(Vec<double> v) { return v; }
template <class T>
FASTMAF_INLINE void add_to(double* sums, typename Lanes<T>::Wide v) {
    typedef typename Lanes<T>::Wide Loose __attribute__((aligned(8), may_alias));
    *reinterpret_cast<Loose*>(sums) += v;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
