// Halves, and where the numbers of a product of matrices of halves lie in a warp: mma.sync.m16n8k16, as the PTX ISA defines it.
//
// Lane l has g = l / 4 and t = l % 4. A register holds two neighbours: of a row of A, of a column of B.
//
//     A (16 x 16)  4 registers  row g, g + 8, g, g + 8    columns 2t, 2t, 2t + 8, 2t + 8 and the next one
//     B (16 x 8)   2 registers  column g                  rows 2t, 2t + 8 and the next one
//     C (16 x 8)   4 floats     row g, g, g + 8, g + 8    column 2t, 2t + 1, 2t, 2t + 1
//
// A fragment of A is loaded as four matrices of 8 x 8 halves (ldmatrix): lane l says where row l % 8 of matrix l / 8 begins.
// The functions take a lane, or a vector of lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fastmaf {
namespace fragments {

template <class L>
constexpr L a_row(L lane, unsigned r) {
    return lane / 4u + r % 2u * 8u;
}
template <class L>
constexpr L a_column(L lane, unsigned r) {
    return lane % 4u * 2u + r / 2u * 8u;
}
template <class L>
constexpr L b_row(L lane, unsigned r) {
    return lane % 4u * 2u + r * 8u;
}
template <class L>
constexpr L b_column(L lane) {
    return lane / 4u;
}
template <class L>
constexpr L c_row(L lane, unsigned r) {
    return lane / 4u + r / 2u * 8u;
}
template <class L>
constexpr L c_column(L lane, unsigned r) {
    return lane % 4u * 2u + r % 2u;
}
// Where the row of an 8 x 8 matrix begins that a lane names, in the 16 x 16 of A: the matrices are the registers.
template <class L>
constexpr L matrix_row(L lane) {
    return lane % 8u + lane / 8u % 2u * 8u;
}
template <class L>
constexpr L matrix_column(L lane) {
    return lane / 16u * 8u;
}

// ---- halves on the host ------------------------------------------------------------------------------------------------------------

// To the nearest half, to the even one of two; beyond the largest to infinity.
inline uint16_t half_of(double x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(x);
    if (size != size) return uint16_t(sign | 0x7E00);
    if (size >= 65520) return uint16_t(sign | 0x7C00);
    if (size < 0x1p-14) return uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24)));
    int exponent = 0;
    const double mantissa = std::frexp(size, &exponent);  // in [1/2, 1)
    return uint16_t(sign | (uint16_t((exponent + 13) << 10) + uint16_t(std::nearbyint(mantissa * 0x1p11))));
}
inline float number_of(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31  ? (mantissa ? std::nan("") : HUGE_VAL)
                        : exponent == 0 ? mantissa * 0x1p-24
                                        : std::ldexp(1024 + mantissa, exponent - 25);
    return float(half & 0x8000 ? -size : size);
}

}  // namespace fragments
}  // namespace fastmaf
