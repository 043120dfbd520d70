// What a call computes with, taken once when it begins: set_isa and set_num_threads are for the calls after it. As long as it lives, the
// calling thread computes with plain floats.
#pragma once

#include "../core/floats.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace fastmaf {

template <class T>
struct Call {
    const Kernels<T>& kernels = fastmaf::kernels<T>();
    const int threads = num_threads();
    const PlainFloats floats;
};

}  // namespace fastmaf
