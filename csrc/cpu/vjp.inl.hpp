// Gradients of log_prob: the stages of a tile forward and backward, and what a batch of tiles gives the weights; see ops/vjp.
//
// Weight gradients: rows of the batch are the inner index, and delta is read where backward left it. There are two ways, by the map:
//     wide     inputs lie in lanes, which needs them transposed; the sum runs over rows in index order
//     narrow   rows lie in lanes, so that a staircase of few inputs, or few units, leaves none idle; 16 (float) or 8 (double) interleaved
//              sums, of the rows that are equal modulo that, are added up as a tree
// so bits depend neither on threads nor on tiles.
#pragma once

#include "../ops/vjp.inl.hpp"
#include "tile.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

template <class T>
static void forward(const StageView<T>& stage, const Trace<T>& here, const Trace<T>& next, int lanes, double* log_det) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    T* const behind = next.x + stage.context * L;
    if (here.read != here.x) traced_inputs<T>(stage, here, 0, vectors);
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::law)
            traced_law<T>(stage, step, here, behind, 0, vectors, log_det);
        else
            traced_panel<T>(stage, step, here, vectors);
    }
}

template <class T>
static void backward(const StageView<T>& stage, const Trace<T>& here, int lanes, const T* cotangent, const T* above, T* below, int inner) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    const T zeros[8] = {};
    for (int i = 0; i < stage.context; ++i)
        for (int j = 0; j < vectors; ++j) at(below + i * L + j * W) = at(above + i * L + j * W);
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j)
            if (stage.reads_noise)
                at(below + (stage.context + s) * L + j * W) = Vec<T>{};
            else
                law_gradient<T>(stage, here, s, j * W, at(cotangent + j * W), above, below);
    const bool clips = here.read != here.x && !stage.reads_noise && inner < 2;
    for (int s = 0; clips && s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) part_clipped<T>(stage, here, s, j * W, below);
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::panel)
            gradient_panel<T>(stage, step, here, zeros, below, inner, vectors);
        else
            backward_law<T>(stage, step, here, 0, vectors, cotangent, above, below);
    }
    for (int s = 0; clips && s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) join_clipped<T>(stage, here, s, j * W, below);
}

template <class T>
static void backward_sampler(const StageView<T>& stage, const Trace<T>& here, int lanes, T* below, T* above, int inner) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    const int vectors = (lanes + W - 1) / W;
    const T zeros[8] = {};
    for (int s = 0; s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j) begin_drawn<T>(stage, here, s, j * W, below, above);
    for (int i = 0; i < stage.step_count; ++i) {
        const Step& step = stage.steps[i];
        if (step.kind == Kind::panel)
            gradient_panel<T>(stage, step, here, zeros, below, inner, vectors);
        else
            drawn_law<T>(stage, step, here, 0, vectors, below, above);
    }
    for (int s = 0; stage.reads_noise && s < stage.features; ++s)
        for (int j = 0; j < vectors; ++j)
            at(above + (stage.context + stage.next[s]) * L + j * W) += through_maps<T>(stage, here, s, j * W, below);
    for (int i = 0; i < stage.context; ++i)
        for (int j = 0; j < vectors; ++j) at(above + i * L + j * W) = at(below + i * L + j * W);
}

// One stage of a transpose: swap the off-diagonal blocks of size B of a W x W matrix held in W vectors.
template <class T, int B>
FASTMAF_INLINE void swap_blocks(Vec<T> (&v)[Lanes<T>::W]) {
    constexpr int W = Lanes<T>::W;
    if constexpr (B < W) {
        Bits<T> low, high;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            low[i] = i & B ? W + i - B : i;
            high[i] = i & B ? W + i : i + B;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & B)) {
                const Vec<T> a = v[i], b = v[i + B];
                v[i] = shuffle<T>(a, b, low);
                v[i + B] = shuffle<T>(a, b, high);
            }
        swap_blocks<T, 2 * B>(v);
    }
}

template <class T>
static void transpose(const T* in, int units, int lanes, T* out, int64_t row, int64_t capacity) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    for (int u = 0; u < units; u += W) {
        T* chunk = out + (u / L) * capacity * L + u % L;
        for (int r = 0; r < lanes; r += W) {
            Vec<T> v[W];
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) v[i] = u + i < units ? at(in + (u + i) * L + r) : Vec<T>{};
            swap_blocks<T, 1>(v);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) at(chunk + (row + r + i) * L) = v[i];
        }
    }
}

// kRows rows of delta times NV vectors of inputs; sums [kRows][lanes] go on from what is there unless they begin.
template <class T, int NV>
static void wide_gradient_block(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int top, const T* inputs,
                                bool begin, T* sums) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>();
    Vec<T> acc[kRows][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = begin ? Vec<T>{} : at(sums + i * L + j * W);
    for (int t = 0; t < tiles; ++t) accumulate<T, kRows, NV, 1, L>(acc, delta[t] + top * L, inputs + tile_begin[t] * L, L, tile_rows[t]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) at(sums + i * L + j * W) = acc[i][j];
}

// At most kTaskRows rows of a map. A few tiles of one chunk of inputs stay in L1 while all rows pass over them.
template <class T>
static void wide_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, const T* inputs,
                          int64_t capacity, const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), together = 4;
    T sums[kTaskRows * L] __attribute__((aligned(64)));
    for (int first = 0; first < limit[rows - 1]; first += L) {
        const T* chunk = inputs + (first / L) * capacity * L;
        for (int t = 0; t < tiles; t += together)
            for (int top = 0; top < rows; top += kRows) {
                const int left = limit[(top + kRows < rows ? top + kRows : rows) - 1] - first;
                if (left <= 0) continue;
                auto run = left > 2 * W ? wide_gradient_block<T, 3> : left > W ? wide_gradient_block<T, 2> : wide_gradient_block<T, 1>;
                run(delta + t, tile_rows + t, tile_begin + t, tiles - t < together ? tiles - t : together, top, chunk, t == 0,
                    sums + top * L);
            }
        for (int i = 0; i < rows; ++i) {
            T* out = gradient + offset[i] + first;
            for (int j = 0; j < kVectors; ++j) store_first<T>(out + j * W, at(sums + i * L + j * W), limit[i] - first - j * W, add);
        }
    }
}

// The lanes of N vectors added up, as a tree that halves them. v[0] has the N sums side by side, each in W / N lanes.
template <class T, int N, int D = Lanes<T>::W / 2>
FASTMAF_INLINE void add_lanes(Vec<T>* v) {
    constexpr int W = Lanes<T>::W;
    if constexpr (D > 0) {
        constexpr int half = N > 1 ? N / 2 : 1;
        Bits<T> low{}, high{};
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
            const bool second = l % (2 * D) >= D;
            low[l] = second ? (N > 1 ? W : 0) + l - D : l;
            high[l] = second ? (N > 1 ? W : 0) + l : l + D;
        }
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) {
            const Vec<T> a = v[i], b = v[N > 1 ? i + half : i];
            v[i] = shuffle<T>(a, b, low) + shuffle<T>(a, b, high);
        }
        add_lanes<T, half, D / 2>(v);
    }
}

// Sums over rows of the batch, which lie in lanes: of R numbers for each of NI inputs.
template <class T, int R, int NI>
struct RowSums {
    static constexpr int W = Lanes<T>::W, parts = 64 / int(sizeof(T)) / W;
    static constexpr int together = R < W ? R : W;  // sums that end in one vector
    Vec<T> part[parts][NI][R];

    // The first vector of a tile that belongs to a part.
    static int64_t first(int p, int64_t tile_begin) { return (p + parts - tile_begin / W % parts) % parts * W; }

    FASTMAF_MEMBER void finish() {
        for (int half = parts / 2; half > 0; half /= 2)
            for (int p = 0; p < half; ++p)
                for (int j = 0; j < NI; ++j)
                    for (int i = 0; i < R; ++i) part[p][j][i] += part[p + half][j][i];
#pragma GCC unroll 8
        for (int j = 0; j < NI; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < R; i += together) add_lanes<T, together>(part[0][j] + i);
    }
    T operator()(int i, int j) const { return part[0][j][i / together * together][i % together * (W / together)]; }
};

// R rows of delta times NI inputs from `first` on.
template <class T, int R, int NI>
static void narrow_gradient_block(const T* const* delta, const T* const* inputs, const int* tile_rows, const int64_t* tile_begin, int tiles,
                                  int top, int rows, int first, const int* limit, const int64_t* offset, bool add, T* gradient) {
    using Sums = RowSums<T, R, NI>;
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), step = Sums::parts * W;
    Sums sums;
    for (int p = 0; p < Sums::parts; ++p) {
        Vec<T> acc[R][NI];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NI; ++j) acc[i][j] = Vec<T>{};
        for (int t = 0; t < tiles; ++t) {
            const T *d = delta[t] + top * L, *x = inputs[t] + first * L;
            for (int64_t r = Sums::first(p, tile_begin[t]); r < tile_rows[t]; r += step) {
                Vec<T> in[NI];
#pragma GCC unroll 8
                for (int j = 0; j < NI; ++j) in[j] = at(x + j * L + r);
#pragma GCC unroll 8
                for (int i = 0; i < R; ++i) {
                    const Vec<T> own = loaded<T>(d + i * L + r);
#pragma GCC unroll 8
                    for (int j = 0; j < NI; ++j) acc[i][j] = fma(own, in[j], acc[i][j]);
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NI; ++j) sums.part[p][j][i] = acc[i][j];
    }
    sums.finish();
    for (int i = 0; i < R && top + i < rows; ++i) {
        T* const out = gradient + offset[top + i] + first;
        const int left = limit[top + i] - first;
#pragma GCC unroll 8
        for (int j = 0; j < NI; ++j)
            if (j < left) out[j] = add ? out[j] + sums(i, j) : sums(i, j);
    }
}

// At most kTaskRows rows of a map. delta, inputs: [units of the map, its inputs][lanes] of each tile. All rows pass over a few inputs before
// the next ones, so that these stay in L2. The last few rows take more inputs at a time instead of idle rows.
template <class T>
static void narrow_gradient(const T* const* delta, const T* const* inputs, const int* tile_rows, const int64_t* tile_begin, int tiles,
                            int rows, const int* limit, const int64_t* offset, bool add, T* gradient) {
    constexpr int R = kRows, few = kRows / 2, together = 24;
    for (int begin = 0; begin < limit[rows - 1]; begin += together)
        for (int top = 0; top < rows; top += R) {
            const int all = limit[(top + R < rows ? top + R : rows) - 1], end = all < begin + together ? all : begin + together;
            const bool last = rows - top <= few;
            for (int first = begin; first < end; first += last ? 6 : 3) {
                const int left = end - first;
                auto run = last       ? left > 3 ? narrow_gradient_block<T, few, 6> : narrow_gradient_block<T, few, 3>
                                 : left > 2 ? narrow_gradient_block<T, R, 3>
                           : left > 1 ? narrow_gradient_block<T, R, 2>
                                      : narrow_gradient_block<T, R, 1>;
                run(delta, inputs, tile_rows, tile_begin, tiles, top, rows, first, limit, offset, add, gradient);
            }
        }
}

template <class T>
static void bias_gradient(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, bool add,
                          T* gradient) {
    using Sums = RowSums<T, kRows, 1>;
    constexpr int W = Lanes<T>::W, L = lanes_of<T>(), step = Sums::parts * W;
    for (int top = 0; top < rows; top += kRows) {
        Sums sums;
        for (int p = 0; p < Sums::parts; ++p) {
            Vec<T> acc[kRows] = {};
            for (int t = 0; t < tiles; ++t)
                for (int64_t r = Sums::first(p, tile_begin[t]); r < tile_rows[t]; r += step)
#pragma GCC unroll 8
                    for (int i = 0; i < kRows; ++i) acc[i] += at(delta[t] + (top + i) * L + r);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) sums.part[p][0][i] = acc[i];
        }
        sums.finish();
        for (int i = 0; i < kRows && top + i < rows; ++i) gradient[top + i] = add ? gradient[top + i] + sums(i, 0) : sums(i, 0);
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
