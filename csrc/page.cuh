// Where a token lies: the only device code that adds an offset. The byte map itself is in vllm_kivi/format.py.
#pragma once

#include "params.h"

namespace kivi::cuda {

constexpr int kMaxGroup = 128, kMaxHeadDim = 256;

// Tokens below it are read from quantized pages when a request has num_tokens tokens (sinks apart).
__device__ inline int boundary(const Layout& layout, int num_tokens) {
  return max(num_tokens - layout.residual_length, 0) & -layout.group_size;  // a power of two
}

__device__ inline int block_of(const Pages& pages, int request, int page) {
  return __ldg(pages.table + request * pages.table_stride + page);
}

__device__ inline char* page_of(const Pages& pages, int block, int head) {
  return pages.data + block * pages.block_stride + head * pages.head_stride;
}

// The tile of a page that holds its token `offset`.
__device__ inline char* tile_at(const Layout& layout, const Pages& pages, int block, int head, int offset) {
  return page_of(pages, block, head) + int64_t(offset >> (31 - __clz(layout.group_size))) * layout.tile_bytes;
}

// The key of a page's token `offset` in full precision; its value follows.
__device__ inline char* full_token_at(const Layout& layout, const Pages& pages, int block, int head, int offset,
                                      int element_bytes) {
  return page_of(pages, block, head) + int64_t(offset) * (2 * layout.head_dim * element_bytes);
}

// The same by positions in a request.
__device__ inline char* tile_of(const Layout& layout, const Pages& pages, int block, int head, int position) {
  return tile_at(layout, pages, block, head, position % layout.page_tokens);
}

__device__ inline char* full_token_of(const Layout& layout, const Pages& pages, int block, int head, int position,
                                      int element_bytes) {
  return full_token_at(layout, pages, block, head, position % layout.full_page_tokens, element_bytes);
}

}  // namespace kivi::cuda
