// What the backend hands to the kernels of an instruction set. Plain pointers, no code.
#pragma once

#include "../core/optimizer.hpp"
#include "../ops/tile.hpp"
#include "../ops/trace.hpp"

namespace fastmaf {

// Threads that work on one row together, map by map: the one that has the row takes groups of panels from the front, the others from
// the back, so that each core meets mostly the same weights again, in its own cache. Those who come late find less to do.
struct Crew {
    alignas(64) uint64_t claims;  // job << 32 | front << 16 | back: what nobody has taken of a map
    alignas(64) uint64_t done;    // groups that the others have finished, over all maps
    void (*yield)();              // lets another thread run where a wait is long
};
constexpr int kCrewPanels = 4;               // panels in a group
constexpr int kCrewGroups = 0xffff;          // most groups of a map
constexpr uint64_t kCrewOver = ~0ull << 32;  // the claims that send the others home

// Numbers of a row whose units lie in lanes, with room for whole vectors and for whole pairs of them that begin at any of its numbers.
constexpr int row_size(int numbers) { return (numbers + 15) / 16 * 16 + 16; }
// Where, in Trace::scaled of such a row, its e^-s and its ds/dr begin, the second twice as far.
constexpr int row_stride(int features) { return (features + 15) / 16 * 16; }

// Most rows of a map whose weight gradients are summed together: its inputs, which may come from far away, are read once for all of them.
constexpr int kTaskRows = 128;

template <class T>
struct Kernels {
    int width;  // W: rows per vector; a sub-tile has 3 W lanes
    // Fold one context row into the bias of map 0: folded [padded_rows of map 0].
    void (*fold)(const StageView<T>& stage, const T* context, T* folded);
    // Load n values of a column: bijection and affine in double, narrowed; log|dz/dx| of the bijection is added to log_det.
    void (*load)(const double* in, int n, Bijection kind, double lower, double upper, double loc, double scale, T* out, double* log_det);
    // log_det becomes -inf where a discrete variable has another value than 0, 1, ... `values` - 1. Reads and writes whole vectors.
    void (*refuse_other)(const double* in, int n, int values, double* log_det);
    // Back from z to x, in double.
    void (*store)(const T* in, int n, Bijection kind, double lower, double upper, double loc, double scale, double* out, double* log_det);
    // x[0] -> noise tile; returns which of x[0], x[1] holds it ([features][lanes] after the context rows). log_det gets -sum a.
    int (*to_noise)(const StageView<T>* stages, int count, const Tile<T>& tile);
    // The same for one row: x [context + features] in, noise out, contiguous units; scratch as long as all units together. Those who
    // call assist_row at the same time, with the same arguments, take a part of it; `crew` is null without them.
    int (*to_noise_row)(const StageView<T>* stages, int count, T* const x[2], T* read, T* const* units, double* log_det,
                        const T* const* folded, Crew* crew);
    void (*assist_row)(const StageView<T>* stages, int count, T* const x[2], T* read, T* const* units, const T* const* folded, Crew* crew);
    // x[count % 2] holds the noise; returns which tile holds x.
    int (*from_noise)(const StageView<T>* stages, int count, const Tile<T>& tile);
    // After to_noise: the final rows of discrete variables become the probabilities of their values.
    void (*probabilities)(const StageView<T>& stage, T* rows, int vectors);
    // log_det [n] -= |z|^2 / 2.
    void (*base)(const T* z, int features, int lanes, int n, double* log_det);
    // Noise of `lanes` rows: out [features][lanes]; index, context: counters per lane.
    void (*normals)(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out);
    void (*uniforms)(uint64_t seed, const uint64_t* index, const uint32_t* context, int features, int lanes, T* out);
    // The four Philox words of counters (index + i, third, fourth), i < count <= 64.
    void (*words)(uint64_t seed, uint64_t index, int count, uint32_t third, uint32_t fourth, uint32_t out[4][64]);
    // A stage with everything kept: from here to the tile of `next`.
    void (*forward)(const StageView<T>& stage, const Trace<T>& here, const Trace<T>& next, int lanes, double* log_det);
    // Its part of the gradient of sum_r cotangent_r log_prob_r: from the gradient in the next tile to that in this one, both
    // [context + features][lanes]; that of the context is a sum over stages. `inner` leaves out rows that nobody asked for: 1 the
    // context, 2 the whole tile.
    void (*backward)(const StageView<T>& stage, const Trace<T>& here, int lanes, const T* cotangent, const T* above, T* below, int inner);
    // Of the sampler, at the rows that it made: from the gradient in this tile, which it spoils, to that in the next one.
    void (*backward_sampler)(const StageView<T>& stage, const Trace<T>& here, int lanes, T* below, T* above, int inner);
    // Forward and backward for one row: everything in `here` is contiguous, with room for row_size of its numbers. `of_context`: whether
    // anybody asked for the gradient in the context.
    void (*forward_row)(const StageView<T>& stage, const Trace<T>& here, T* next, double* log_det);
    void (*backward_row)(const StageView<T>& stage, const Trace<T>& here, T cotangent, const T* above, T* below, bool of_context);
    // Units [n][lanes of a tile] -> [chunk of 3 W units][capacity][3 W], rows row..row + lanes.
    void (*transpose)(const T* in, int units, int lanes, T* out, int64_t row, int64_t capacity);
    // Gradient of `rows` rows of a map: sum over tiles of delta times inputs, transposed or as they lie in the tiles; limit: entries per row.
    void (*wide_gradient)(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, const T* inputs,
                          int64_t capacity, const int* limit, const int64_t* offset, bool add, T* gradient);
    void (*narrow_gradient)(const T* const* delta, const T* const* inputs, const int* tile_rows, const int64_t* tile_begin, int tiles,
                            int rows, const int* limit, const int64_t* offset, bool add, T* gradient);
    // Sum over rows of delta: 16 (float) or 8 (double) interleaved sums, added up as a tree.
    void (*bias_gradient)(const T* const* delta, const int* tile_rows, const int64_t* tile_begin, int tiles, int rows, bool add,
                          T* gradient);
    // out [n] = or += the sum of `count` rows of `blocks`, which lie `stride` apart, in order.
    void (*sum_blocks)(const T* blocks, int64_t stride, int count, int64_t n, bool add, T* out);
    void (*adam)(T* w, T* m, T* v, const T* g, int64_t n, const AdamStep<T>& step);
    double (*sum_squares)(const T* g, const T* w, T l2, int64_t n);
    // Measurements: repetitions of the micro-kernel on a block in L1, or of fused multiply-adds in registers; returns FLOP.
    double (*peak)(int repetitions, bool registers, T* scratch);
};

}  // namespace fastmaf
