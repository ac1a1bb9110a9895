// The running state of a few query rows in decode.
#pragma once

#include "page.h"
#include "softmax.h"

namespace kivi::cpu::KIVI_ISA {

#if defined(__AVX512F__)
constexpr int kMaxRows = 4;
#else
constexpr int kMaxRows = 3;  // more would not fit in 16 registers
#endif
constexpr int kBlockTokens = 256;
constexpr int kBlockTiles = kBlockTokens / 32;

// Calls f<rows>().
template <int MAX, class F>
KIVI_INLINE void with_rows(int rows, const F& f) {
  if constexpr (MAX > 1) {
    if (rows < MAX) return with_rows<MAX - 1>(rows, f);
  }
  f.template operator()<MAX>();
}

// Fetches the tiles of the next block, a few cache lines at each step of the work on this one: in a burst they would
// fill the core's line buffers and stall it.
struct Prefetcher {
  const char* const* tiles;  // as many as this block has; null where there is none
  int lines_per_step;

  // Scores and values each take a step for 32 tokens of 16 channels.
  KIVI_INLINE static int steps_per_tile(const Layout& layout) {
    return 2 * (layout.group_size / 32) * (layout.head_dim / 16);
  }

  KIVI_INLINE void step(int tile, int index) const {
    const char* lines = tiles[tile] + index * lines_per_step * 64;
    for (int i = 0; i < lines_per_step; ++i) __builtin_prefetch(lines + i * 64);
  }
};

// Up to kMaxRows query rows of one KV head, and what they need for a block of tokens.
struct alignas(64) RowBlock {
  float query[kMaxRows][kMaxHeadDim];     // times softmax scale (and log2 e)
  float scores[kMaxRows][kBlockTokens];   // and, after the softmax step, weights
  float weights[kMaxRows][kBlockTokens];  // times the value scale
  float sums[kMaxRows][kMaxHeadDim];      // weighted values, not yet divided by row_sum
  float row_max[kMaxRows];
  float row_sum[kMaxRows];
};

}  // namespace kivi::cpu::KIVI_ISA
