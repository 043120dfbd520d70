// The optimizer entry by entry over the master vector.
#pragma once

#include "tile.hpp"
#include "vec.inl.hpp"
#include "../ops/optimizer.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
static void sum_blocks(const T* blocks, int64_t stride, int count, int64_t n, bool add, T* out) {
    int64_t i = 0;
    for (; i + Lanes<T>::W <= n; i += Lanes<T>::W) {
        Vec<T> sum = add ? load_loose(out + i) : Vec<T>{};
        for (int b = 0; b < count; ++b) sum += load_loose(blocks + b * stride + i);
        store_loose<T>(out + i, sum);
    }
    for (; i < n; ++i) {
        T sum = add ? out[i] : T(0);
        for (int b = 0; b < count; ++b) sum += blocks[b * stride + i];
        out[i] = sum;
    }
}

template <class T>
static void adam(T* w, T* m, T* v, const T* g, int64_t n, const AdamStep<T>& s) {
    int64_t i = 0;
    for (; i + Lanes<T>::W <= n; i += Lanes<T>::W)
        adam_entry<T>(
            s, load_loose(w + i), load_loose(m + i), load_loose(v + i), load_loose(g + i), [](Vec<T> x) { return root(x); },
            [&](Vec<T> a, Vec<T> b, Vec<T> c) {
                store_loose<T>(w + i, a);
                store_loose<T>(m + i, b);
                store_loose<T>(v + i, c);
            });
    for (; i < n; ++i)
        adam_entry<T>(
            s, w[i], m[i], v[i], g[i], [](T x) { return sizeof(T) == 4 ? T(__builtin_sqrtf(float(x))) : T(__builtin_sqrt(x)); },
            [&](T a, T b, T c) {
                w[i] = a;
                m[i] = b;
                v[i] = c;
            });
}

// Sum of (g + l2 w)^2 in double, eight interleaved sums.
template <class T>
static double sum_squares(const T* g, const T* w, T l2, int64_t n) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) {
            const T x = g[i + j] + l2 * w[i + j];
            sums[j] += double(x) * double(x);
        }
    for (; i < n; ++i) {
        const T x = g[i] + l2 * w[i];
        sums[0] += double(x) * double(x);
    }
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
