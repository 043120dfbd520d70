// What callers ask of a backend.
#pragma once

#include <cstdint>
#include <functional>

#include "view.hpp"

namespace fastmaf {

// The rows of a call: outer x inner of them, row (o, i) at x.data + o * x.outer + i * x.inner, likewise its context. With an index,
// row i is row index[i] of the arrays.
struct Batch {
    int64_t outer = 1, inner = 0;
    Rows x, context;
    const int64_t* index = nullptr;
    int64_t rows() const { return outer * inner; }
};

struct Draw {
    int64_t contexts = 1, rows = 0;  // rows per context
    Rows context;
    uint64_t seed = 0, offset = 0;
    uint32_t context_offset = 0;
    const uint64_t *index = nullptr, *group = nullptr;  // [rows] counters of scattered rows, each with a context of its own
};

using Poll = std::function<void()>;

}  // namespace fastmaf
