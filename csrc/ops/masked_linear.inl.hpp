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
    FASTMAF_GLOBAL(w);
    FASTMAF_GLOBAL(in);
    FASTMAF_GLOBAL(out);
    Vec<T> acc[R][NV];
    FASTMAF_UNROLL(8)
    for (int i = 0; i < R; ++i) FASTMAF_UNROLL(4)
    for (int j = 0; j < NV; ++j) acc[i][j] = bias ? splat<T>(bias[i]) : i < rows ? at(out + i * lanes + j * W) : Vec<T>{};
    accumulate<T, R, NV, WIDTH, 1, AHEAD>(acc, w, in, lanes, n);
    if (rectify) {
        FASTMAF_UNROLL(8)
        for (int i = 0; i < R; ++i) FASTMAF_UNROLL(4)
        for (int j = 0; j < NV; ++j) acc[i][j] = relu(acc[i][j]);
    }
    FASTMAF_UNROLL(8)
    for (int i = 0; i < R; ++i)
        if (i < rows) FASTMAF_UNROLL(4)
    for (int j = 0; j < NV; ++j) at(out + i * lanes + j * W) = acc[i][j];
}

// As many rows as there are, of R at most; FEWEST come together in any case.
template <class T, int R, int FEWEST, int WIDTH, int NV, bool AHEAD>
FASTMAF_INLINE void trimmed(const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    if constexpr (kTrims && R > FEWEST)
        if (rows < R) return trimmed<T, R - 1, FEWEST, WIDTH, NV, AHEAD>(w, in, n, rows, bias, rectify, out);
    strip<T, R, WIDTH, NV, AHEAD>(w, in, n, rows, bias, rectify, out);
}

template <class T, int WIDTH, int NV, bool AHEAD>
FASTMAF_FN void strips(const T* w, const T* in, int n, int rows, const T* bias, bool rectify, T* out) {
    constexpr int R = WIDTH < kRows ? WIDTH : kRows, fewest = R < WIDTH ? 1 : WIDTH / 2 + (WIDTH > 2);
    FASTMAF_UNROLL(2)
    for (int i = 0; i < WIDTH; i += R)
        if (i < rows)
            trimmed<T, R, fewest, WIDTH, NV, AHEAD>(w + i, in, n, rows - i, bias ? bias + i : nullptr, rectify, out + i * lanes_of<T>());
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
FASTMAF_INLINE void panel(int vectors, int width, bool ahead, const T* w, const T* in, int n, int rows, const T* bias, bool rectify,
                          T* out) {
    if constexpr (kVectors == 4)
        if (vectors > 2) return panel<T, 4>(width, ahead, w, in, n, rows, bias, rectify, out);
    if constexpr (kVectors == 3)
        if (vectors == 3) return panel<T, 3>(width, ahead, w, in, n, rows, bias, rectify, out);
    if (vectors == 2) return panel<T, 2>(width, ahead, w, in, n, rows, bias, rectify, out);
    return panel<T, 1>(width, ahead, w, in, n, rows, bias, rectify, out);
}

// The tile or the units that a panel reads or writes.
template <class T, class P>
FASTMAF_INLINE P* buffer(const StageView<T>& stage, int wire, P* tile, P* const* units, int lanes = lanes_of<T>()) {
    return wire >= 0 ? units[wire] : wire == kTile ? tile : tile + stage.context * lanes;
}

// Whether a step begins with the context, so that a context that all rows share can be added to its bias.
FASTMAF_INLINE bool folds(const Step& step) {
    return step.kind == Kind::panel && step.in == kTile && step.start == Start::bias && step.map == 0;
}

// What meets the sums of a map, from its first unit on; null where there is none.
template <class T>
struct Beside {
    T* raw;        // takes the sums, where they are kept beside the units
    const T* add;  // the sums that are added
    T* context;    // the units of a context that join the sums; gradients find in them what times_derivative asks for, or the gate
    T* alone;      // takes the sums that a gate meets, for gradients

    // Itself, or null where a map has nothing beside its sums.
    FASTMAF_MEMBER const Beside* of(const StageView<T>& stage, const Step& step) const {
        const bool complete = step.finish == Finish::unit;
        return raw || add || context || (complete && stage.norm_scale[step.map]) ? this : nullptr;
    }
};

// The units of a context join the rows of a step.
template <class T>
FASTMAF_FN void join(const StageView<T>& stage, const Step& step, T* sums, const Beside<T>& beside, int vectors) {
    constexpr int lanes = lanes_of<T>(), W = Lanes<T>::W;
    T* const units = beside.context + step.row * lanes;
    auto each_unit = [&](auto f) {
        for (int r = 0; r < step.rows; ++r)
            for (int j = 0; j < vectors; ++j) f(r * lanes + j * W);
    };
    const Joins joins = stage.joins[step.map];
    if (joins == Joins::added) return each_unit([&](int place) { at(sums + place) += at(units + place); });
    if (joins == Joins::gated)
        return each_unit([&](int place) {
            const Vec<T> gate = sigmoid<T>(at(units + place)), sum = at(sums + place);
            at(units + place) = gate;
            if (beside.alone) at(beside.alone + step.row * lanes + place) = sum;
            at(sums + place) = sum * gate;
        });
    with_activation<T>(stage.activation, [&](auto f) {
        each_unit([&](int place) {
            const Vec<T> unit = f(at(units + place));
            if (!keeps_argument(stage.activation)) at(units + place) = unit;
            at(sums + place) += unit;
        });
    });
}

// What becomes of complete sums before they are activated: they meet what is beside them.
template <class T>
FASTMAF_FN void meet(const StageView<T>& stage, const Step& step, T* sums, T* rows, const Beside<T>& beside, int vectors) {
    constexpr int lanes = lanes_of<T>(), W = Lanes<T>::W;
    const T* const scale = stage.norm_scale[step.map];
    const int* const added = stage.added[step.map];
    if (beside.context) join<T>(stage, step, sums, beside, vectors);
    for (int r = 0; r < step.rows; ++r) {
        const int row = step.row + r, from = added ? added[row] : row;
        for (int j = 0; j < vectors; ++j) {
            Vec<T> sum = at(sums + r * lanes + j * W);
            if (beside.add) at(sums + r * lanes + j * W) = sum += at(beside.add + from * lanes + j * W);
            if (scale) sum = fma(sum, splat<T>(scale[row]), splat<T>(stage.norm_shift[step.map][row]));
            if (beside.raw || scale) at(rows + r * lanes + j * W) = sum;
        }
    }
}

// A panel step of the density or the sampler. `in` holds the map's inputs and `out` takes its units. `beside` is null where there is
// nothing beside the sums. `folded` as in Tile.
template <class T>
FASTMAF_FN void run_panel(const StageView<T>& stage, const Step& step, const T* in, T* out, const Beside<T>* beside, int vectors,
                          const T* folded) {
    constexpr int lanes = lanes_of<T>();
    const int skip = folded && folds(step) ? stage.context : 0;  // already in the folded bias
    const T* bias = step.start == Start::partial ? nullptr : (skip ? folded : stage.bias[step.map]) + step.row;
    const bool complete = step.finish == Finish::unit, activated = complete && stage.activated[step.map];
    const bool rectify = activated && !beside && stage.activation == Activation::relu;
    T* const rows = out + step.row * lanes;
    T* const sums = beside && beside->raw ? beside->raw + step.row * lanes : rows;
    panel<T>(vectors, step.width, stage.far, stage.tape + step.tape + skip * step.width, in + (step.begin + skip) * lanes,
             step.end - step.begin - skip, step.rows, bias, rectify, sums);
    if (!complete || rectify) return;
    if (beside) meet<T>(stage, step, sums, rows, *beside, vectors);
    if (activated) activate<T>(stage.activation, rows, step.rows, vectors, lanes);
}

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
