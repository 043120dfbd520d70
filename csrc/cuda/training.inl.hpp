// A step of training beside its gradients, number by number: the whole of the device's arithmetic of it.
#pragma once

#include "../ops/optimizer.inl.hpp"
#include "gradient.inl.hpp"
#include "training.hpp"

namespace fastmaf {
namespace FASTMAF_ISA {

FASTMAF_INLINE void copy_number(char* to, const char* from, int64_t size) {
    switch (size) {
        case 8: *reinterpret_cast<uint64_t*>(to) = *reinterpret_cast<const uint64_t*>(from); break;
        case 4: *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from); break;
        case 2: *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from); break;
        default: *to = *from;
    }
}

template <class T>
FASTMAF_INLINE void copy_of_row(const typename TakeJob<T>::Part& part, int64_t row, int64_t place, int64_t number) {
    copy_number(part.to + (place * part.width + number) * part.size, part.from + (row * part.width + number) * part.size, part.size);
}

template <class T>
FASTMAF_INLINE void run(const TakeJob<T>& job, int64_t i) {
    const int64_t width = job.x.width + job.context.width + 1, place = i / width, number = i % width;
    const int64_t row = job.rows ? job.rows[place] : place;
    if (number < job.x.width) return copy_of_row<T>(job.x, row, place, number);
    if (number < width - 1) return copy_of_row<T>(job.context, row, place, number - job.x.width);
    const double weight = job.weights ? job.weights[row] : 1.0;
    job.weight[place] = weight;
    job.cotangent[place] = T(-weight / job.mass);
}

template <class T>
FASTMAF_INLINE void run(const LossJob<T>& job, int64_t i) {
    const int64_t begin = i * job.slice, end = begin + job.slice < job.rows ? begin + job.slice : job.rows;
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) sum -= job.weight[row] * (double(job.value[row]) + *job.shared);
    job.out[i] = sum;
}

template <class T>
FASTMAF_INLINE void run(const EntryJob<T>& job, int64_t i) {
    const uint32_t place = job.view.index[i];
    double value = job.sums[i];
    if (diagonal_of(job.view, i) >= 0) value += job.sums[job.view.size] / double(job.weights[place]);
    job.out[place] = T(value);
}

template <class T>
FASTMAF_INLINE void run(const SquaresJob<T>& job, int64_t i) {
    double sum = 0;
    for (int64_t k = i; k < job.size; k += job.count) {
        const T x = job.gradient[k] + job.l2 * job.weights[k];
        sum += double(x) * double(x);
    }
    job.out[i] = sum;
}

FASTMAF_INLINE double root_of(double x) { return ::sqrt(x); }
FASTMAF_INLINE float root_of(float x) { return ::sqrtf(x); }

template <class T>
FASTMAF_INLINE void run(const JudgeJob<T>& job, int64_t) {
    if (!(*job.loss - *job.loss == 0)) *job.halted = 1;
    const double scale = job.squares ? job.clip_norm / (root_of(*job.squares) + 1e-6) : 1.0;
    *job.scale = T(scale < 1 ? scale : 1.0);
}

template <class T>
FASTMAF_INLINE void run(const AdamJob<T>& job, int64_t i) {
    if (*job.halted) return;
    AdamStep<T> step = job.step;
    step.scale = *job.scale;
    adam_entry<T>(
        step, job.weights[i], job.first[i], job.second[i], job.gradient[i], [](T x) { return root_of(x); },
        [&](T w, T first, T second) {
            job.weights[i] = w;
            job.first[i] = first;
            job.second[i] = second;
        });
}

template <class T>
FASTMAF_INLINE void run(const RepackJob<T>& job, int64_t i) {
    const int direction = i < job.size ? 0 : 1;
    const int64_t place = direction ? i - job.size : i;
    const uint32_t source = job.sources[direction][place];
    if (source != job.nothing) job.to[direction][place] = job.weights[source];
}

template <class T>
FASTMAF_INLINE void run(const ScaleJob<T>& job, int64_t i) {
    const SharedScale<T> own = job.scales[i];
    const double weight = double(job.weights[own.place]);
    job.out[i] = own.scale[0] ? weight : ::log(::fabs(weight));
    for (int d = 0; own.scale[0] && d < 2; ++d) {
        *own.scale[d] = T(::exp(weight) / own.root);
        *own.loc[d] = T(own.mean);
    }
}

// Where the number of variable v of a row lies; `first`: where variables begin in the scratch of a tile.
template <class T>
FASTMAF_INLINE const T* number_of_row(const NormRows<T>& rows, int64_t first, int64_t row, int64_t v) {
    const char* const tile = rows.tiles + row / rows.width * rows.scratch + first;
    return reinterpret_cast<const T*>(tile) + v * rows.lanes + row % rows.width;
}

template <class T>
FASTMAF_INLINE void run(const MomentJob<T>& job, int64_t i) {
    const NormRows<T>& rows = job.rows;
    const int64_t v = i / job.slices, begin = i % job.slices * job.slice,
                  end = begin + job.slice < rows.rows ? begin + job.slice : rows.rows;
    const double mean = job.moment == Moment::mean ? 0 : job.mean[v];
    double sum = 0, other = 0;
    for (int64_t row = begin; row < end; ++row) {
        const double x = double(*number_of_row(rows, rows.x, row, v));
        if (job.moment == Moment::gradients) {
            const double d = double(*number_of_row(rows, rows.d, row, v));
            sum -= d;
            other += d * (x - mean);
            continue;
        }
        const double share = double(rows.cotangent[row]) / *rows.total;
        sum += job.moment == Moment::mean ? share * x : share * (x - mean) * (x - mean);
    }
    job.out[i] = sum;
    if (job.moment == Moment::gradients) job.out[job.count + i] = other;
}

template <class T>
FASTMAF_INLINE void run(const NormJob<T>& job, int64_t v) {
    const SharedScale<T> own = job.scales[v];
    const double weight = double(job.weights[own.place]), variance = job.variance[v] + job.eps;
    job.out[v] = weight - 0.5 * ::log(variance);
    for (int d = 0; d < 2; ++d) {
        *own.scale[d] = T(::exp(weight) / ::sqrt(variance));
        *own.loc[d] = T(job.mean[v]);
    }
}

template <class T>
FASTMAF_INLINE void run(const ThroughJob<T>& job, int64_t i) {
    const NormRows<T>& rows = job.rows;
    const int64_t row = i / rows.features, v = i % rows.features;
    const double share = double(rows.cotangent[row]) / *rows.total, shift = job.sums[v];
    const double bend = -(job.sums[rows.features + v] + *rows.total) / (job.variance[v] + job.eps);
    const double x = double(*number_of_row(rows, rows.x, row, v));
    T* const d = const_cast<T*>(number_of_row(rows, rows.d, row, v));
    *d += T(share * (shift + bend * (x - job.mean[v])));
}

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
