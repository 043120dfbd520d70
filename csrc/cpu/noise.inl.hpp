// Random numbers of a tile of rows, each with a counter of its own.
#pragma once

#include "../ops/rng.inl.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

static void words(uint64_t seed, uint64_t index, int count, uint32_t third, uint32_t fourth, uint32_t out[4][64]) {
    constexpr int W = FASTMAF_VECTOR_BYTES / 4;
    for (int r = 0; r < count; r += W) {
        Words word[4] = {{}, {}, Words{} + third, Words{} + fourth};
        for (int i = 0; i < W; ++i) {
            word[0][i] = uint32_t(index + uint64_t(r + i));
            word[1][i] = uint32_t((index + uint64_t(r + i)) >> 32);
        }
        philox(word, uint32_t(seed), uint32_t(seed >> 32));
        for (int w = 0; w < 4; ++w)
            for (int i = 0; i < W; ++i) out[w][r + i] = word[w][i];
    }
}

// f(counters, block, columns, rows, r) for each block of four columns of the rows from r.
template <class F>
FASTMAF_INLINE void each_block(const uint64_t* index, const uint32_t* context, int features, int lanes, F f) {
    constexpr int W = FASTMAF_VECTOR_BYTES / 4;
    for (int r = 0; r < lanes; r += W) {
        const int rows = lanes - r < W ? lanes - r : W;
        Counters counters{};
        for (int i = 0; i < rows; ++i) {
            counters.low[i] = uint32_t(index[r + i]);
            counters.high[i] = uint32_t(index[r + i] >> 32);
            counters.row[i] = context[r + i];
        }
        for (int block = 0; 4 * block < features; ++block) f(counters, block, features - 4 * block < 4 ? features - 4 * block : 4, rows, r);
    }
}

template <class T>
static void normals(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out) {
    each_block(index, context, features, lanes, [&](const Counters& counters, int block, int columns, int rows, int r) {
        normal_block<T>(counters, seed, block, columns, lanes, rows, out + r);
    });
}

template <class T>
static void uniforms(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out) {
    each_block(index, context, features, lanes, [&](const Counters& counters, int block, int columns, int rows, int r) {
        uniform_block<T>(counters, seed, block, columns, lanes, rows, out + r);
    });
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
