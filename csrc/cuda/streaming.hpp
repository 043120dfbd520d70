// Arrays of the host that travel through pinned buffers.
#pragma once

#include <functional>
#include <vector>

#include "launch.hpp"
#include "station.hpp"

namespace fastmaf {
namespace device {

int64_t size_of(DType dtype);
constexpr int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Rows of the host on their way in: `width` numbers each, or one row for all; and on their way out, so many bytes each.
struct RowsIn {
    Source source;
    int width;
    bool once;
    int64_t row() const { return width * size_of(source.rows.dtype); }
};
struct RowsOut {
    char* rows;  // null: none are wanted
    int64_t row;
};

// Of a part of the rows, where they lie on the device: inputs, outputs, which rows, the stream.
using Launch =
    std::function<void(const std::vector<Source>& in, const std::vector<char*>& out, int64_t begin, int64_t count, cudaStream_t stream)>;

// Rows of the host, in chunks of a multiple of `together`: while one is computed, its neighbours travel; or one after the other,
// `slots_used` being 1. launch(inputs, outputs, begin, count, stream) gets them where they are on the device.
void stream_rows(Station& station, int64_t rows, const std::vector<RowsIn>& inputs, const std::vector<RowsOut>& outputs, int64_t together,
                 int slots_used, const Poll& poll, const Launch& launch);

}  // namespace device
}  // namespace fastmaf
