// How a call's rows are cut into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmaf {

constexpr int kRowPath = 2;  // up to this many rows go one by one, units in lanes

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How rows are cut: tiles of `rows`, a multiple of the vector width, few enough idle lanes and enough tiles for all threads.
struct Cut {
    int64_t rows, tiles;
    Cut(int64_t total, int width, int64_t most, int threads) {
        int64_t count = (total + most - 1) / most;
        if (count < int64_t(8) * threads) count = round_up(count, threads);
        rows = std::max<int64_t>(width, std::min(most, round_up((total + count - 1) / std::max<int64_t>(1, count), width)));
        tiles = (total + rows - 1) / rows;
    }
    int64_t begin(int64_t tile) const { return tile * rows; }
    int64_t size(int64_t tile, int64_t total) const { return std::min(rows, total - begin(tile)); }
};

}  // namespace fastmaf
