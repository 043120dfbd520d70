// Reads rows of any real dtype, stride and broadcast, a column at a time, as double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend.hpp"

namespace fastmaf {

inline double read_half(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

template <class S>
inline double read_as(const char* p) {
    S value;
    std::memcpy(&value, p, sizeof value);
    return double(value);
}

// Calls f with a function that reads one element of the dtype.
template <class F>
inline void with_reader(DType dtype, F f) {
    switch (dtype) {
        case DType::f16: return f([](const char* p) { uint16_t h; std::memcpy(&h, p, 2); return read_half(h); });
        case DType::f32: return f(read_as<float>);
        case DType::f64: return f(read_as<double>);
        case DType::i8: return f(read_as<int8_t>);
        case DType::i16: return f(read_as<int16_t>);
        case DType::i32: return f(read_as<int32_t>);
        case DType::i64: return f(read_as<int64_t>);
        case DType::u8: return f(read_as<uint8_t>);
        case DType::u16: return f(read_as<uint16_t>);
        case DType::u32: return f(read_as<uint32_t>);
        case DType::u64: return f(read_as<uint64_t>);
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

// A value that a discrete variable cannot have: 0, 1, ... `values` - 1 it can.
template <class T>
inline void refuse_other(const double* column, int64_t n, int values, double* log_det) {
    constexpr double shift = 0x1.8p52;  // rounds what is added to it and taken away again to an integer
    const double end = values;
    auto possible = [&](double x) { return (x >= 0) & (x < end) & (x == (x + shift) - shift); };
    int64_t others = 0;  // seldom any
    for (int64_t r = 0; r < n; ++r) others |= possible(double(T(column[r]))) ? 0 : 1;
    for (int64_t r = 0; r < n && others > 0; ++r)
        if (!possible(double(T(column[r]))) && column[r] == column[r]) log_det[r] = -INFINITY;
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

class RowReader {
public:
    explicit RowReader(const Batch& batch) : batch_(batch) {}

    // All rows have the same context: it does not move with the row.
    bool shared_context() const {
        const Rows& context = batch_.context;
        return (batch_.outer == 1 || context.outer == 0) && (batch_.inner == 1 || context.inner == 0);
    }
    void column(int64_t begin, int64_t n, int c, double* out) const { gather(batch_.x, begin, n, c, out); }
    void context_column(int64_t begin, int64_t n, int c, double* out) const { gather(batch_.context, begin, n, c, out); }

private:
    const char* address(const Rows& rows, int64_t row) const {
        if (batch_.index) return rows.data + batch_.index[row] * rows.inner;
        return rows.data + row / batch_.inner * rows.outer + row % batch_.inner * rows.inner;
    }
    void gather(const Rows& rows, int64_t begin, int64_t n, int c, double* out) const {
        const int64_t shift = c * rows.column;
        with_reader(rows.dtype, [&](auto reader) {
            if (batch_.index) {
                for (int64_t i = 0; i < n; ++i) out[i] = reader(rows.data + batch_.index[begin + i] * rows.inner + shift);
                return;
            }
            // Runs of rows with the same outer index.
            for (int64_t i = 0; i < n;) {
                const int64_t o = (begin + i) / batch_.inner, first = (begin + i) % batch_.inner;
                const int64_t run = n - i < batch_.inner - first ? n - i : batch_.inner - first;
                const char* p = rows.data + o * rows.outer + first * rows.inner + shift;
                for (int64_t j = 0; j < run; ++j, p += rows.inner) out[i + j] = reader(p);
                i += run;
            }
        });
    }
    const Batch& batch_;
};

}  // namespace fastmaf
