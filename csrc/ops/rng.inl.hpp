// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011), and the normal quantile by AS241 (Wichura 1988).
//
// key = seed; counter = (sample index: 64 bits, context row: 32, stream: 8 | block of four columns: 24); word = column mod 4.
// One word gives one normal: the lowest bit is its sign, the other 31 the lower tail p = (m + 1/2) / 2^32. In double a second stream
// gives 32 more bits of p, so that a double draw refines the float draw of the same counter.
#pragma once

#include "math.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

FASTMAF_INLINE void philox(Words (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        Words low0, high0, low1, high1;
        multiply(c[0], 0xD2511F53u, low0, high0);
        multiply(c[2], 0xCD9E8D57u, low1, high1);
        c[0] = high1 ^ c[1] ^ key0;
        c[2] = high0 ^ c[3] ^ key1;
        c[1] = low1;
        c[3] = low0;
    }
}

template <class T, int N, int M>
FASTMAF_INLINE Vec<T> ratio(const T (&top)[N], const T (&bottom)[M], Vec<T> x) {
    return polynomial<T>(top, x) / polynomial<T>(bottom, x);
}

// Phi^-1(p) for p in (0, 1/2].
FASTMAF_INLINE Vec<float> normal_quantile(Vec<float> p) {
    constexpr float a[] = {3.3871327179f, 50.434271938f, 159.29113202f, 59.109374720f};
    constexpr float b[] = {1.0f, 17.895169469f, 78.757757664f, 67.187563600f};
    constexpr float c[] = {1.4234372777f, 2.7568153900f, 1.3067284816f, 0.17023821103f};
    constexpr float d[] = {1.0f, 0.73700164250f, 0.12021132975f};
    const Vec<float> q = p - 0.5f;
    const Vec<float> centre = q * ratio<float>(a, b, fma(-q, q, splat<float>(0.180625f)));
    const Vec<float> r = root(-log<float>(p));
    return q > -0.425f ? centre : -ratio<float>(c, d, r - 1.6f);
}

FASTMAF_INLINE Vec<double> normal_quantile(Vec<double> p) {
    constexpr double a[] = {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
                            4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3};
    constexpr double b[] = {1.0,
                            4.2313330701600911252e1,
                            6.8718700749205790830e2,
                            5.3941960214247511077e3,
                            2.1213794301586595867e4,
                            3.9307895800092710610e4,
                            2.8729085735721942674e4,
                            5.2264952788528545610e3};
    constexpr double c[] = {1.42343711074968357734e0, 4.63033784615654529590e0,  5.76949722146069140550e0,  3.64784832476320460504e0,
                            1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
    constexpr double d[] = {1.0,
                            2.05319162663775882187e0,
                            1.67638483018380384940e0,
                            6.89767334985100004550e-1,
                            1.48103976427480074590e-1,
                            1.51986665636164571966e-2,
                            5.47593808499534494600e-4,
                            1.05075007164441684324e-9};
    constexpr double e[] = {6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,  2.96560571828504891230e-1,
                            2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7};
    constexpr double f[] = {1.0,
                            5.99832206555887937690e-1,
                            1.36929880922735805310e-1,
                            1.48753612908506148525e-2,
                            7.86869131145613259100e-4,
                            1.84631831751005468180e-5,
                            1.42151175831644588870e-7,
                            2.04426310338993978564e-15};
    const Vec<double> q = p - 0.5;
    const Vec<double> centre = q * ratio<double>(a, b, fma(-q, q, splat<double>(0.180625)));
    const Vec<double> r = root(-log<double>(p));
    const Vec<double> tail = r > 5 ? ratio<double>(e, f, r - 5) : ratio<double>(c, d, r - 1.6);
    return q > -0.425 ? centre : -tail;
}

FASTMAF_INLINE Vec<float> to_normal(Words word) {
    const Vec<float> z = normal_quantile(fma(float_of(word >> 1), splat<float>(0x1p-32f), splat<float>(0x1p-33f)));
    return from_bits<float>(bits<float>(z) ^ (Bits<float>)(word << 31));
}

// The counters of as many rows as a vector of words has lanes.
struct Counters {
    Words low, high, row;
};

FASTMAF_INLINE void words_of(const Counters& c, uint64_t seed, uint32_t stream, Words (&word)[4]) {
    word[0] = c.low;
    word[1] = c.high;
    word[2] = c.row;
    word[3] = Words{} + stream;
    philox(word, uint32_t(seed), uint32_t(seed >> 32));
}

// Normal numbers of the columns [4 block, 4 block + columns), which lie `lanes` apart; of the first `rows` rows, a multiple of the vector.
template <class T>
FASTMAF_INLINE void normal_block(const Counters& counters, uint64_t seed, int block, int columns, int lanes, int rows, T* out) {
    Words word[4];
    words_of(counters, seed, uint32_t(block), word);
    if constexpr (sizeof(T) == 4) {
        for (int d = 0; d < columns; ++d) at(out + (4 * block + d) * lanes) = to_normal(word[d]);
    } else {
        Words fine[4];
        words_of(counters, seed, uint32_t(block) | 1u << 24, fine);
        for (int d = 0; d < columns; ++d)
            for (int h = 0; h < rows; h += Lanes<T>::W) {
                const Vec<double> p = (double_of(word[d] >> 1, h) + (double_of(fine[d], h) + 0.5) * 0x1p-32) * 0x1p-32;
                at(out + (4 * block + d) * lanes + h) = normal_quantile(p) * (1 - 2 * double_of(word[d] & 1u, h));
            }
    }
}

// Uniform numbers in (0, 1), laid out like the noise: the third stream of random words. In float the largest would round to 1.
template <class T>
FASTMAF_INLINE void uniform_block(const Counters& counters, uint64_t seed, int block, int columns, int lanes, int rows, T* out) {
    constexpr double most = sizeof(T) == 4 ? 1 - 0x1p-24 : 1;
    Words word[4];
    words_of(counters, seed, uint32_t(block) | 2u << 24, word);
    for (int d = 0; d < columns; ++d)
        for (int h = 0; h < rows; h += Lanes<double>::W)
            store_as(out + (4 * block + d) * lanes + h, at_most<double>((double_of(word[d], h) + 0.5) * 0x1p-32, most));
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
