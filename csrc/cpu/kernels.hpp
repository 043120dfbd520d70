// One table of kernels per instruction set and dtype; kernels.cpp is compiled once for each set.
#pragma once

#include "tile.hpp"

namespace fastmaf {

#define FASTMAF_DECLARE_ISA(name) \
    namespace name { \
    extern const Kernels<float> kernels_f32; \
    extern const Kernels<double> kernels_f64; \
    }
FASTMAF_DECLARE_ISA(baseline)
#ifdef FASTMAF_HAS_X86
FASTMAF_DECLARE_ISA(avx2)
FASTMAF_DECLARE_ISA(avx512)
#endif
#undef FASTMAF_DECLARE_ISA

}  // namespace fastmaf
