// Reads rows of any real dtype, stride and broadcast, a few columns at a time, as double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend.hpp"

namespace fastmaf {

inline double read_half(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                       : std::ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

// Function objects, since pointers to functions would not be inlined.
template <class S>
struct ReadAs {
    double operator()(const char* p) const {
        S value;
        std::memcpy(&value, p, sizeof value);
        return double(value);
    }
};

// Calls f with a function that reads one element of the dtype.
template <class F>
inline void with_reader(DType dtype, F f) {
    switch (dtype) {
        case DType::f16:
            return f([](const char* p) {
                uint16_t h;
                std::memcpy(&h, p, 2);
                return read_half(h);
            });
        case DType::f32: return f(ReadAs<float>{});
        case DType::f64: return f(ReadAs<double>{});
        case DType::i8: return f(ReadAs<int8_t>{});
        case DType::i16: return f(ReadAs<int16_t>{});
        case DType::i32: return f(ReadAs<int32_t>{});
        case DType::i64: return f(ReadAs<int64_t>{});
        case DType::u8: return f(ReadAs<uint8_t>{});
        case DType::u16: return f(ReadAs<uint16_t>{});
        case DType::u32: return f(ReadAs<uint32_t>{});
        case DType::u64: return f(ReadAs<uint64_t>{});
        case DType::boolean: return f([](const char* p) { return *p ? 1.0 : 0.0; });
    }
}

inline double read(const char* p, DType dtype) {
    double value = 0;
    with_reader(dtype, [&](auto reader) { value = reader(p); });
    return value;
}

// A context at or outside a bound has no meaning: NaN, which spoils its own row and no other.
template <class T>
inline void spoil_outside(const double* log_det, int64_t n, T* lane) {
    for (int64_t r = 0; r < n; ++r)
        if (log_det[r] == -INFINITY) lane[r] = T(NAN);
}

// Whether a column has no meaning at x: NaN, or a number at or outside a bound.
inline bool outside(const Columns& columns, size_t c, double x) {
    const Bijection kind = columns.kind[c];
    if (kind == Bijection::identity) return std::isnan(x);
    const double above = kind == Bijection::log_below ? 1 : x - columns.lower[c],
                 below = kind == Bijection::log_above ? 1 : columns.upper[c] - x;
    return !(above > 0 && below > 0 && std::isfinite(above) && std::isfinite(below));
}

// A row at or outside a bound goes on as zeros, so that nothing beside the bound matters: its density stays zero, its gradient too. Only
// a NaN stays. x: [variables][lanes]; lanes from n to `padded` are copies of the last row.
template <class T>
inline void zero_outside(const double* log_det, int64_t n, int64_t padded, int variables, int lanes, T* x) {
    for (int64_t r = 0; r < padded; ++r)
        if (log_det[r < n ? r : n - 1] == -INFINITY)
            for (int v = 0; v < variables; ++v) {
                T& value = x[v * lanes + r];
                if (value == value) value = 0;
            }
}

constexpr int kColumns = 8;  // read together: more would leave too little of the nearest cache to what is made of them

class RowReader {
public:
    explicit RowReader(const Batch& batch) : batch_(batch) {}

    // All rows have the same context: it does not move with the row.
    bool shared_context() const {
        const Rows& context = batch_.context;
        return (batch_.outer == 1 || context.outer == 0) && (batch_.inner == 1 || context.inner == 0);
    }
    void column(int64_t begin, int64_t n, int c, double* out) const { gather(batch_.x, begin, n, c, 1, n, out); }
    void context_column(int64_t begin, int64_t n, int c, double* out) const { gather(batch_.context, begin, n, c, 1, n, out); }
    // Columns [c, c + count) to out [count][stride].
    void columns(int64_t begin, int64_t n, int c, int count, int64_t stride, double* out) const {
        gather(batch_.x, begin, n, c, count, stride, out);
    }
    void context_columns(int64_t begin, int64_t n, int c, int count, int64_t stride, double* out) const {
        gather(batch_.context, begin, n, c, count, stride, out);
    }

    // The density of a row of which the sums say NaN or infinity: NaN where a number is missing in it or in its context, else zero.
    // Far out and at infinity the sums meet inf - inf.
    template <class T>
    T lost_density(const Plan& plan, int64_t row) const {
        double value = 0;
        for (int v = 0; v < plan.features(); ++v) {
            column(row, 1, v, &value);
            if (std::isnan(value)) return T(NAN);
        }
        for (int c = 0; c < plan.context(); ++c) {
            context_column(row, 1, c, &value);
            if (outside(plan.spec().context_columns, size_t(c), value)) return T(NAN);
        }
        return T(-INFINITY);
    }

private:
    // Row by row, so that what lies together is read together.
    void gather(const Rows& rows, int64_t begin, int64_t n, int c, int count, int64_t stride, double* out) const {
        const int64_t shift = c * rows.column;
        with_reader(rows.dtype, [&](auto reader) {
            auto row = [&](const char* p, double* to) {
                for (int k = 0; k < count; ++k, p += rows.column) to[k * stride] = reader(p);
            };
            if (batch_.index) {
                for (int64_t i = 0; i < n; ++i) row(rows.data + batch_.index[begin + i] * rows.inner + shift, out + i);
                return;
            }
            // Runs of rows with the same outer index.
            for (int64_t i = 0; i < n;) {
                const int64_t o = (begin + i) / batch_.inner, first = (begin + i) % batch_.inner;
                const int64_t run = n - i < batch_.inner - first ? n - i : batch_.inner - first;
                const char* p = rows.data + o * rows.outer + first * rows.inner + shift;
                for (int64_t j = 0; j < run; ++j, p += rows.inner) row(p, out + i + j);
                i += run;
            }
        });
    }
    const Batch& batch_;
};

}  // namespace fastmaf
