// A CUDA runtime on the host, for tests of what calls it: two devices whose memory is the host's. Streams run what was enqueued only
// when someone waits for them, so that a wait that is missing shows.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace fastmaf {

void enqueue(cudaStream_t stream, std::function<void()> work);
int runtime_blocks();                   // allocations of any kind that were not freed
void runtime_limit(int64_t bytes);      // of one allocation; more is out of memory
void runtime_pools(bool there);         // whether devices have memory pools
void runtime_break(cudaError_t error);  // what the next wait for a stream answers

}  // namespace fastmaf
