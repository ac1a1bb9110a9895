// The CUDA kernels as bindings.cpp sees them. All pointers in the parameters are device memory, nothing is allocated
// and nothing waits for the device. Each returns null, or what went wrong.
#pragma once

#include <cstddef>

#include "params.h"

struct CUstream_st;

namespace kivi::cuda {

using Stream = CUstream_st*;

// max_new_tokens: rows of key, an upper bound of query_start_loc[num_reqs] that the host knows.
const char* store(const StoreParams& params, int max_new_tokens, Stream stream);

const char* decode(const AttentionParams& params, Stream stream);
size_t decode_workspace_bytes(const Layout& layout);  // zeroed once, and left as found

const char* gather(const GatherParams& params, int num_tokens, Stream stream);

}  // namespace kivi::cuda
