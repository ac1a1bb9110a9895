// Rows of a batch: whose they are, where they lie, and how they are copied.
#pragma once

#include <cstdint>

#include "params.h"

namespace kivi::cuda {

// Whether all rows can be read and written 16 bytes at a time.
inline bool are_aligned(const Rows& rows, int element_bytes) {
  return (reinterpret_cast<uintptr_t>(rows.data) | rows.token_stride * element_bytes |
          rows.head_stride * element_bytes) %
             16 ==
         0;
}

template <class T>
__device__ inline char* row_of(const Rows& rows, int row, int head) {
  return static_cast<char*>(rows.data) + (row * rows.token_stride + head * rows.head_stride) * int64_t(sizeof(T));
}

// The request r with starts[r] <= row < starts[r + 1], or -1.
__device__ inline int request_of(const int32_t* starts, int num_reqs, int row) {
  if (row < __ldg(starts) || row >= __ldg(starts + num_reqs)) return -1;
  int low = 0, high = num_reqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (__ldg(starts + middle) <= row ? low : high) = middle;
  }
  return low;
}

// A warp copies `count` elements, 16 bytes at a time where both sides are aligned.
template <class T>
__device__ inline void copy_row(char* to, const char* from, int count, bool aligned, int lane) {
  if (aligned) {
#pragma unroll 1
    for (int i = lane * 16; i < count * int(sizeof(T)); i += 32 * 16) {
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < count; i += 32) reinterpret_cast<T*>(to)[i] = reinterpret_cast<const T*>(from)[i];
  }
}

}  // namespace kivi::cuda
