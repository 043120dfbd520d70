// What the tensor-core kernel takes beside the packed flow: halves of the weights in the order in which warps use them. Plain structures.
//
// A map's units are cut into strips of at most four tiles of 8 units. A strip belongs to a team of warps, which computes it for the rows
// of a tile: each warp of the team for 16 row_tiles of them. The tape of a team holds, for all its strips one after the other,
//
//     [32 inputs][tile of the strip that reads one of them][part: high, low][lane][4 registers of B: inputs 0..15, inputs 16..31]
//
// so a lane copies and reads 16 bytes at a time, and no tile is stored whose weights are all masked. Units are sorted by degree: each
// tile reads the inputs before its end, in steps of 16.
//
//     weights  w 2^e = high + low,  e for each unit such that the largest has high in [2^14, 2^15]
//     inputs   16 a  = high + low,  |a| <= 4094, so that no half overflows, and parts of numbers of order one are no subnormals
//
// `medium` has the high parts alone (of the variables both, where they are few), `high` multiplies all but low with low.
#pragma once

#include "launch.hpp"

namespace fastmaf {

constexpr int kTileUnits = 8, kTileInputs = 32, kStripTiles = 4;
constexpr int kTileBytes = 512;  // of one part of a tile
constexpr float kHalfScale = 16, kHalfLimit = 65504 / kHalfScale;
constexpr int kNowhere = 1 << 30;

// How many tiles of weights a warp has under way, by parts.
constexpr int slots_of(int parts) { return parts == 1 ? 8 : 4; }

struct Strip {
    int row, tiles;
    int end[kStripTiles];  // steps of 16 inputs that a tile reads
};

struct TensorMap {
    int inputs, stride;   // halves from one row of its inputs to the next: an odd number of 16 bytes, so that ldmatrix meets no bank twice
    int parts;            // of its inputs
    const Strip* strips;  // those of team i from first[i]
    const int* first;     // [teams + 1]
    const float* affine;  // [units, to whole tiles][2] scale and bias of each
    const int* reader;    // [inputs + 1] the first unit that reads input i; behind the last the number of units
};

struct TensorStage {
    int maps = 0;  // 0: the stage runs as without tensor cores
    const TensorMap* map = nullptr;
};

// rows = 16 row_tiles groups of a block's tile; its warps = groups x teams: warp w is of team w / groups and has the rows of group w % groups.
struct TensorShape {
    int rows = 0;  // 0: no tensor cores
    int row_tiles = 0, groups = 0, teams = 0, parts = 0;
};

struct TensorView {
    TensorShape shape;
    const TensorStage* stages = nullptr;
    const char* const* tape = nullptr;  // [teams + 1] where that of each team begins
    // In shared memory, in bytes: inputs of even and odd maps [part][rows][stride]; for each map of a stage and row the first lost input;
    // log-determinants [teams][rows]; and weights under way [warps][slots].
    int64_t units[2] = {}, lost = 0, sums = 0, ring = 0, shared = 0;
};

}  // namespace fastmaf
