// What a call computes with: that of a workspace, or else what is taken once when it begins, so that set_isa and set_num_threads are for the
// calls after it. As long as it lives, the calling thread computes with plain floats.
#pragma once

#include "../core/floats.hpp"
#include "backend.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace fastmaf {

template <class T>
struct Call {
    explicit Call(const Workspace<T>* workspace = nullptr)
        : kernels(workspace ? *workspace->kernels : fastmaf::kernels<T>()), threads(workspace ? workspace->threads : num_threads()) {}
    const Kernels<T>& kernels;
    const int threads;
    const PlainFloats floats;
};

}  // namespace fastmaf
