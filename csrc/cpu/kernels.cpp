// The one file that is compiled once per instruction set, as namespace FASTMAF_ISA. Everything it includes below is local to it: no
// standard containers, no inline function that another file shares, so no code of one set can be linked into another's path.
#include "kernels.hpp"

#define FASTMAF_VEC "../cpu/vec.inl.hpp"
#include "columns.inl.hpp"
#include "noise.inl.hpp"
#include "optimizer.inl.hpp"
#include "row_vjp.inl.hpp"
#include "tiles.inl.hpp"
#include "vjp.inl.hpp"

#if defined(_GLIBCXX_VECTOR) || defined(_LIBCPP_VECTOR)
#error "kernels.cpp includes a container"
#endif

namespace fastmaf {
namespace FASTMAF_ISA {

// The micro-kernel on a block that fits in L1, or fused multiply-adds alone; returns the FLOP done.
template <class T>
static double peak(int repetitions, bool registers, T* scratch) {
    constexpr int W = Lanes<T>::W, depth = 64;
    constexpr int R = kRows;
    T* const w = scratch;
    T* const in = scratch + 8 * depth;
    T* const out = in + depth * lanes_of<T>();
    if (!registers) {
        for (int i = 0; i < repetitions; ++i) panel<T>(3, 8, false, w, in, depth, 8, w, true, out);
        return 2.0 * repetitions * 8 * depth * lanes_of<T>();
    }
    Vec<T> acc[R][kVectors];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kVectors; ++j) acc[r][j] = at(in + (r * kVectors + j) * W);
    Vec<T> a = at(in), b = at(in + W);
    for (int i = 0; i < repetitions; ++i)
        for (int k = 0; k < depth; ++k) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < kVectors; ++j) acc[r][j] = fma(a, b, acc[r][j]);
            opaque(a);
            opaque(b);
        }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < kVectors; ++j) at(out + (r * kVectors + j) * W) = acc[r][j];
    return 2.0 * repetitions * depth * R * lanes_of<T>();
}

#define FASTMAF_TABLE(T) \
    { \
        Lanes<T>::W, fold<T>, load<T>, refuse_other<T>, store<T>, to_noise<T>, to_noise_row<T>, assist_row<T>, from_noise<T>, \
            probabilities<T>, base<T>, normals<T>, uniforms<T>, words, forward<T>, backward<T>, backward_sampler<T>, forward_row<T>, \
            backward_row<T>, transpose<T>, wide_gradient<T>, narrow_gradient<T>, bias_gradient<T>, sum_blocks<T>, adam<T>, sum_squares<T>, \
            peak<T> \
    }
extern const Kernels<float> kernels_f32 = FASTMAF_TABLE(float);
extern const Kernels<double> kernels_f64 = FASTMAF_TABLE(double);

}  // namespace FASTMAF_ISA
}  // namespace fastmaf
