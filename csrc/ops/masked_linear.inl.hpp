// The micro-kernel and the panel step: up to 8 rows of a map times a range of its inputs, for the rows of one sub-tile.
//
//     acc[i][j] += w[k * KS + i * IS] * a[k * stride + j * W ...]      i < R rows of the panel, j < NV vectors of rows
//
// R x NV accumulators, NV vectors of inputs and one broadcast weight stay in registers: 8 x 3 with 32 registers, 4 x 3 with 16,
// and 8 x 4 with those of a GPU, where three vectors run as four.
// Each sum runs over k upwards with fused multiply-adds, whatever the tile, so a row's bits do not depend on where it stands.
#pragma once

#include "activations.inl.hpp"
#include "tile.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

// AHEAD: fetches weights 4 KB before they are used, which pays where the tape comes from beyond a core's own cache.
template <class T, int R, int NV, int KS, int IS, bool AHEAD = false>
FASTMAF_INLINE void accumulate(Vec<T> (&acc)[R][NV], const T* w, const T* a, int stride, int n) {
    constexpr int W = Lanes<T>::W;
    for (int k = 0; k < n; ++k) {
        if constexpr (AHEAD) __builtin_prefetch(w + 4096 / sizeof(T));
        const Weights<T, R, IS> weights(w);
        Vec<T> in[NV];
FASTMAF_UNROLL(4)
        for (int j = 0; j < NV; ++j) in[j] = at(a + j * W);
FASTMAF_UNROLL(8)
        for (int i = 0; i < R; ++i) {
            const Vec<T> weight = splat<T>(weights[i]);
FASTMAF_UNROLL(4)
            for (int j = 0; j < NV; ++j) acc[i][j] = fma(weight, in[j], acc[i][j]);
        }
        w += KS;
        a += stride;
    }
}

// One strip of R rows of a panel whose tape holds WIDTH rows. `bias` null: the sum continues what lies in out.
template <class T, int R, int WIDTH, int NV, bool AHEAD>
FASTMAF_FN void strip(const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    constexpr int W = Lanes<T>::W, lanes = lanes_of<T>();
    Vec<T> acc[R][NV];
FASTMAF_UNROLL(8)
    for (int i = 0; i < R; ++i)
FASTMAF_UNROLL(4)
        for (int j = 0; j < NV; ++j) acc[i][j] = bias ? splat<T>(bias[i]) : i < rows ? at(out + i * lanes + j * W) : Vec<T>{};
    accumulate<T, R, NV, WIDTH, 1, AHEAD>(acc, w, in, lanes, n);
    if (rectify) {
FASTMAF_UNROLL(8)
        for (int i = 0; i < R; ++i)
FASTMAF_UNROLL(4)
            for (int j = 0; j < NV; ++j) acc[i][j] = relu(acc[i][j]);
    }
FASTMAF_UNROLL(8)
    for (int i = 0; i < R; ++i)
        if (i < rows)
FASTMAF_UNROLL(4)
            for (int j = 0; j < NV; ++j) at(out + i * lanes + j * W) = acc[i][j];
}

template <class T, int WIDTH, int NV, bool AHEAD>
FASTMAF_FN void strips(const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    constexpr int R = WIDTH < kRows ? WIDTH : kRows;
FASTMAF_UNROLL(2)
    for (int i = 0; i < WIDTH; i += R)
        if (i < rows) strip<T, R, WIDTH, NV, AHEAD>(w + i, in, n, rows - i, bias ? bias + i : nullptr, rectify, out + i * lanes_of<T>());
}

template <class T, int NV>
FASTMAF_FN void panel(int width, bool ahead, const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    if constexpr (kPrefetches)
        if (width == 8 && ahead) return strips<T, 8, NV, true>(w, in, n, rows, bias, rectify, out);
    if (width == 8) return strips<T, 8, NV, false>(w, in, n, rows, bias, rectify, out);
    if (width == 4) return strips<T, 4, NV, false>(w, in, n, rows, bias, rectify, out);
    return strips<T, 2, NV, false>(w, in, n, rows, bias, rectify, out);
}

template <class T>
FASTMAF_INLINE void panel(int vectors, int width, bool ahead, const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    if constexpr (kVectors == 4)
        if (vectors > 2) return panel<T, 4>(width, ahead, w, in, n, rows, bias, rectify, out);
    if constexpr (kVectors == 3)
        if (vectors == 3) return panel<T, 3>(width, ahead, w, in, n, rows, bias, rectify, out);
    if (vectors == 2) return panel<T, 2>(width, ahead, w, in, n, rows, bias, rectify, out);
    return panel<T, 1>(width, ahead, w, in, n, rows, bias, rectify, out);
}

// The tile or the units that a panel reads or writes.
template <class T, class P>
FASTMAF_INLINE P* buffer(const StageView<T>& stage, int wire, P* tile, P* const* units) {
    return wire >= 0 ? units[wire] : wire == kTile ? tile : tile + stage.context * lanes_of<T>();
}

// A panel step of the density or the sampler. `in` holds the map's inputs and `out` takes its units; `raw` takes their sums if these are
// kept beside the activations; `add` holds the sums that are added. `folded` as in Tile.
template <class T>
FASTMAF_FN void run_panel(const StageView<T>& stage, const Step& step, const T* in, T* out, T* raw, const T* add, int vectors, const T* folded) {
    constexpr int lanes = lanes_of<T>(), W = Lanes<T>::W;
    const int skip = folded && step.in == kTile && step.start == Start::bias ? stage.context : 0;  // already in the folded bias
    const T* bias = step.start == Start::partial ? nullptr : (skip ? folded : stage.bias[step.map]) + step.row;
    const bool activated = step.finish == Finish::unit && stage.activated[step.map];
    const bool rectify = activated && !raw && !add && stage.activation == Activation::relu;
    T* const rows = out + step.row * lanes;
    T* const sums = raw ? raw + step.row * lanes : rows;
    panel<T>(vectors, step.width, stage.far, stage.tape + step.tape + skip * step.width, in + (step.begin + skip) * lanes,
             step.end - step.begin - skip, step.rows, bias, rectify, sums);
    if (step.finish == Finish::raw || rectify) return;
    if (add || raw)
        for (int r = 0; r < step.rows; ++r)
            for (int j = 0; j < vectors; ++j) {
                Vec<T> sum = at(sums + r * lanes + j * W);
                if (add) at(sums + r * lanes + j * W) = sum += at(add + (step.row + r) * lanes + j * W);
                if (raw) at(rows + r * lanes + j * W) = sum;
            }
    if (activated) activate<T>(stage.activation, rows, step.rows, vectors, lanes);
}

// Whether a step begins with the context, so that a context that all rows share can be added to its bias.
FASTMAF_INLINE bool folds(const Step& step) { return step.kind == Kind::panel && step.in == kTile && step.start == Start::bias; }

// One context, whose numbers lie `stride` apart, added to the biases of such a step.
template <class T>
FASTMAF_FN void fold_step(const StageView<T>& stage, const Step& step, const T* context, int stride, T* folded) {
    for (int i = 0; i < step.rows; ++i) {
        T sum = stage.bias[step.map][step.row + i];
        for (int k = 0; k < stage.context; ++k) sum = fma_one(stage.tape[step.tape + k * step.width + i], context[k * stride], sum);
        folded[step.row + i] = sum;
    }
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
