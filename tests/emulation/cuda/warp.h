// What the lanes of a warp do together. Lanes run ahead of each other up to such an operation, and no further: a
// missing
// __syncwarp shows as a wrong result, an operation that some lanes do not reach as a deadlock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace emulation {

inline int lane() { return current % kLanes; }

// Out of line, so that kernels compile in less time.
uint64_t shuffle(const char* operation, uint32_t mask, uint64_t value, int source);
uint32_t reduce(const char* operation, uint32_t mask, uint32_t value, uint32_t (*function)(uint32_t, uint32_t));
// d += a b, with the fragments of csrc/ptx.cuh; k is 8 or 16.
void multiply_matrices(float (&d)[4], const float (&a)[8], const float (&b)[4], int k);
void load_matrices(uint32_t* out, int count, bool transposed, uint32_t address);
uint32_t transpose_matrix(uint32_t pair);

// For fibers.cpp: what lanes wait in, and the begin of a block.
size_t describe_waiting(int warp, char* text, size_t size);
void forget_warps();

template <class V>
inline V shuffle(const char* operation, uint32_t mask, V value, int source) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t slot = 0;
  memcpy(&slot, &value, sizeof value);
  slot = shuffle(operation, mask, slot, source);
  memcpy(&value, &slot, sizeof value);
  return value;
}

}  // namespace emulation

template <class V>
inline V __shfl_sync(unsigned mask, V value, int source) {
  return emulation::shuffle("__shfl_sync", mask, value, source % emulation::kLanes);
}
template <class V>
inline V __shfl_xor_sync(unsigned mask, V value, int lane_mask) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, (emulation::lane() ^ lane_mask) % emulation::kLanes);
}
template <class V>
inline V __shfl_up_sync(unsigned mask, V value, int distance) {
  const int source = emulation::lane() - distance;
  return emulation::shuffle("__shfl_up_sync", mask, value, source < 0 ? emulation::lane() : source);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return emulation::reduce("__ballot_sync", mask, unsigned(vote) << emulation::lane(),
                           [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(unsigned mask, bool vote) {
  return emulation::reduce("__any_sync", mask, vote, [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return emulation::reduce("__reduce_add_sync", mask, value, [](uint32_t a, uint32_t b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulation::reduce("__reduce_max_sync", mask, value, [](uint32_t a, uint32_t b) { return a < b ? b : a; });
}

inline void __syncwarp(unsigned mask = ~0u) {
  emulation::reduce("__syncwarp", mask, 0, [](uint32_t a, uint32_t) { return a; });
}
inline void __syncthreads() { emulation::wait_for_block("__syncthreads"); }
inline int __syncthreads_or(int value) { return emulation::any_of_block(value); }
