// Arrays of the host that travel through pinned buffers.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "launch.hpp"
#include "station.hpp"

namespace fastmaf {
namespace device {

#ifndef FASTMAF_CUDA_CHUNK
#define FASTMAF_CUDA_CHUNK (int64_t(16) << 20)
#endif
constexpr int64_t kChunk = FASTMAF_CUDA_CHUNK;  // bytes of arrays of the host that travel together

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

// Rows of the host in an order, too many for the device: a window of them lies there, and the next one may be on its way.
class Windows {
public:
    explicit Windows(std::vector<RowsIn> inputs) : inputs_(std::move(inputs)) {}
    ~Windows() { cudaStreamSynchronize(travel_); }
    void set_order(const int64_t* order, int64_t rows);
    // Turns to a window with rows [begin, begin + count) of the order. If it has to be brought, what `reader` still reads is waited for.
    void enter(int64_t begin, int64_t count, cudaStream_t reader);
    // Sends the next one on its way, into the place of the one before, which nothing may read any more.
    void prepare(int64_t begin, int64_t count);
    // Where row number `place` of the order begins, in the window.
    const char* at(size_t input, int64_t place) const;

private:
    struct Window {
        Buffer host{true}, there{false, "a part of the rows to train on"};
        std::vector<int64_t> at;
        int64_t begin = 0, count = 0;
        bool holds(int64_t first, int64_t rows) const { return count > 0 && begin <= first && first + rows <= begin + count; }
    };
    void bring(Window& window, int64_t begin, int64_t count);

    const std::vector<RowsIn> inputs_;
    std::vector<int64_t> order_;
    Window of_[2];
    int current_ = 0;
    Stream travel_;
};

}  // namespace device
}  // namespace fastmaf
