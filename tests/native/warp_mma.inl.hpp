// csrc/cuda/mma.inl.hpp on a host, over the vectors of warp_vec.inl.hpp. Copies under way arrive when they are waited for and no sooner, so
// that a wait that is missing shows. Sums of products are not documented; here eight terms and the sum so far are cut off one bit behind the
// 24 of the largest of them, added, and cut off to a float.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "cuda/fragments.hpp"
#include FASTMAF_VEC

namespace fastmaf {
namespace FASTMAF_ISA {

using Half = uint16_t;

FASTMAF_INLINE uint32_t word_at(const void* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}
FASTMAF_INLINE void store_word(void* p, uint32_t word) { std::memcpy(p, &word, 4); }

FASTMAF_INLINE Words lane_words() {
    Words result;
    for (int l = 0; l < 32; ++l) result[l] = uint32_t(l);
    return result;
}
FASTMAF_INLINE Vec<float> take(const float* p, Words i) {
    Vec<float> result;
    for (int l = 0; l < 32; ++l) result[l] = p[i[l]];
    return result;
}
FASTMAF_INLINE Words take(const int* p, Words i) {
    Words result;
    for (int l = 0; l < 32; ++l) result[l] = uint32_t(__atomic_load_n(p + i[l], __ATOMIC_RELAXED));
    return result;
}
FASTMAF_INLINE Vec<double> take_wide(const double* p, Words i) {
    Vec<double> result;
    for (int l = 0; l < 32; ++l) result[l] = p[i[l]];
    return result;
}
template <class T, class M>
FASTMAF_INLINE void put(T* p, Words i, Vec<T> v, M where) {
    for (int l = 0; l < 32; ++l)
        if (where[l]) p[i[l]] = v[l];
}
template <class M>
FASTMAF_INLINE Vec<float> select(M where, Vec<float> a, Vec<float> b) {
    return where ? a : b;
}
template <class M>
FASTMAF_INLINE Words select_words(M where, Words a, Words b) {
    return where ? a : b;
}
template <class M>
FASTMAF_INLINE Vec<double> select_wide(M where, Vec<double> a) {
    for (int l = 0; l < 32; ++l)
        if (!where[l]) a[l] = 0;
    return a;
}
template <class M>
FASTMAF_INLINE void lower(int* p, Words i, Words v, M where) {
    for (int l = 0; l < 32; ++l) {
        if (!where[l]) continue;
        int own = __atomic_load_n(p + i[l], __ATOMIC_RELAXED);
        while (int(v[l]) < own && !__atomic_compare_exchange_n(p + i[l], &own, int(v[l]), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
}

inline const std::vector<float> numbers_of_halves = [] {
    std::vector<float> all;
    for (unsigned h = 0; h < 65536; ++h) all.push_back(fragments::number_of(uint16_t(h)));
    return all;
}();

FASTMAF_INLINE Words halves(Vec<float> low, Vec<float> high) {
    Words result;
    for (int l = 0; l < 32; ++l) result[l] = fragments::half_of(double(low[l])) | uint32_t(fragments::half_of(double(high[l]))) << 16;
    return result;
}
FASTMAF_INLINE Vec<float> low_half(Words word) {
    Vec<float> result;
    for (int l = 0; l < 32; ++l) result[l] = numbers_of_halves[word[l] & 0xFFFF];
    return result;
}
FASTMAF_INLINE Vec<float> high_half(Words word) { return low_half(word >> 16); }
template <class M>
FASTMAF_INLINE void put_halves(Half* p, Words i, Words word, M where) {
    for (int l = 0; l < 32; ++l) {
        if (!where[l]) continue;
        if (reinterpret_cast<uintptr_t>(p + i[l]) % 4) throw std::logic_error("two halves are not aligned");
        store_word(p + i[l], word[l]);
    }
}
FASTMAF_INLINE void put_halves(Half* p, Words i, Words word) { put_halves(p, i, word, Words{} == 0u); }
template <class M>
FASTMAF_INLINE void put_half(Half* p, Words i, Words word, M where) {
    for (int l = 0; l < 32; ++l)
        if (where[l]) p[i[l]] = Half(word[l]);
}
template <class M>
FASTMAF_INLINE void put_eight(Half* p, Words i, const Words (&words)[4], M where) {
    for (int l = 0; l < 32; ++l) {
        if (!where[l]) continue;
        if (reinterpret_cast<uintptr_t>(p + i[l]) % 16) throw std::logic_error("eight halves are not aligned");
        for (int k = 0; k < 4; ++k) store_word(p + i[l] + 2 * k, words[k][l]);
    }
}
FASTMAF_INLINE void load_four(Words (&words)[4], const char* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) throw std::logic_error("four words are not aligned");
    for (int l = 0; l < 32; ++l)
        for (int k = 0; k < 4; ++k) words[k][l] = word_at(p + 16 * l + 4 * k);
}
FASTMAF_INLINE void take_four(Vec<float> (&values)[4], const float* p, Words i) {
    for (int l = 0; l < 32; ++l) {
        if (reinterpret_cast<uintptr_t>(p + i[l]) % 16) throw std::logic_error("four numbers are not aligned");
        for (int k = 0; k < 4; ++k) values[k][l] = p[i[l] + uint32_t(k)];
    }
}

struct Copy {
    char* to;
    const char* from;
};
inline thread_local std::vector<Copy> asked;
inline thread_local std::deque<std::vector<Copy>> groups;

FASTMAF_FN void copy_async(char* to, const char* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) throw std::logic_error("a copy is not aligned");
    std::memset(to, 0xFF, 512);  // while it is under way nothing can be read there
    asked.push_back({to, from});
}
FASTMAF_FN void commit_copies() {
    groups.push_back(std::move(asked));
    asked.clear();
}
template <int N>
FASTMAF_FN void wait_copies() {
    for (; groups.size() > size_t(N); groups.pop_front())
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 512);
}

FASTMAF_INLINE void load_a(Words (&a)[4], const Half* p, int stride) {
    for (unsigned r = 0; r < 4; ++r)
        for (unsigned l = 0; l < 32; ++l) {  // lane l gets numbers 2 (l % 4) and on of row l / 4 of matrix r
            const unsigned names = 8 * r + l / 4;
            const Half* const row = p + int(fragments::matrix_row(names)) * stride + fragments::matrix_column(names);
            if (reinterpret_cast<uintptr_t>(row) % 16) throw std::logic_error("a row of a matrix is not aligned");
            a[r][l] = word_at(row + 2 * (l % 4));
        }
}

FASTMAF_INLINE float truncated(double x) {
    const float nearest = float(x);
    return std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

FASTMAF_FN void multiply_add(Vec<float> (&c)[4], const Words (&a)[4], Words b0, Words b1) {
    double left[16][16], right[16][8];
    for (unsigned l = 0; l < 32; ++l)
        for (unsigned r = 0; r < 4; ++r)
            for (unsigned i = 0; i < 2; ++i) {
                left[fragments::a_row(l, r)][fragments::a_column(l, r) + i] = double(numbers_of_halves[a[r][l] >> 16 * i & 0xFFFF]);
                if (r < 2)
                    right[fragments::b_row(l, r) + i][fragments::b_column(l)] =
                        double(numbers_of_halves[(r ? b1 : b0)[l] >> 16 * i & 0xFFFF]);
            }
    for (unsigned r = 0; r < 4; ++r)
        for (unsigned l = 0; l < 32; ++l) {
            double sum = double(c[r][l]);
            for (int begin = 0; begin < 16; begin += 8) {
                double terms[9], largest = std::fabs(sum);
                for (int k = 0; k < 8; ++k) {
                    terms[k] = left[fragments::c_row(l, r)][begin + k] * right[begin + k][fragments::c_column(l, r)];
                    if (!std::isfinite(terms[k])) throw std::logic_error("a product is not finite");
                    largest = std::max(largest, std::fabs(terms[k]));
                }
                if (largest == 0) continue;
                terms[8] = sum;
                int exponent = 0;
                std::frexp(largest, &exponent);
                const double unit = std::ldexp(1.0, exponent - 25);
                int64_t whole = 0;
                for (double term : terms) whole += int64_t(term / unit);
                sum = double(truncated(double(whole) * unit));
            }
            c[r][l] = float(sum);
        }
}

FASTMAF_INLINE Vec<double> quad_sum(Vec<double> v) {
    for (int step : {1, 2}) {
        Vec<double> other;
        for (int l = 0; l < 32; ++l) other[l] = v[l ^ step];
        v += other;
    }
    return v;
}

FASTMAF_INLINE Words quad_or(Words v) {
    Words result;
    for (int l = 0; l < 32; ++l) result[l] = v[l] | v[l ^ 1] | v[l ^ 2] | v[l ^ 3];
    return result;
}
FASTMAF_INLINE void sync_warp() {}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
