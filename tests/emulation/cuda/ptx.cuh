// Stands in for csrc/ptx.cuh: the same functions, whose comments are there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "copies.h"

namespace emulation {

template <class T, int PAIRS>
inline auto to_floats(const uint32_t (&pairs)[PAIRS]) {
  struct {
    float values[2 * PAIRS];
  } floats;
  for (int i = 0; i < 2 * PAIRS; ++i) floats.values[i] = to_float(T{uint16_t(pairs[i / 2] >> i % 2 * 16)});
  return floats;
}

}  // namespace emulation

namespace kivi::cuda {

inline uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }

inline uint32_t multiply(uint32_t a, uint32_t b) {
  const float2 x = __half22float2(std::bit_cast<__half2>(a)), y = __half22float2(std::bit_cast<__half2>(b));
  return std::bit_cast<uint32_t>(emulation::pair<__half2>(double(x.x) * y.x, double(x.y) * y.y));
}

template <class T>
inline void mma_k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  using emulation::to_floats;
  emulation::multiply_matrices(d, to_floats<T, 4>({a0, a1, a2, a3}).values, to_floats<T, 2>({b0, b1}).values, 16);
}

template <class T>
inline void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  using emulation::to_floats;
  emulation::multiply_matrices(d, to_floats<T, 4>({a0, a1}).values, to_floats<T, 2>({b0}).values, 8);
}

inline void ldmatrix(uint32_t (&out)[4], uint32_t address) { emulation::load_matrices(out, 4, false, address); }

template <int COUNT>
inline void ldmatrix_transposed(uint32_t (&out)[COUNT], uint32_t address) {
  emulation::load_matrices(out, COUNT, true, address);
}

inline uint32_t movmatrix(uint32_t in) { return emulation::transpose_matrix(in); }

inline int opaque(int value) { return value; }

template <class T>
inline T* shuffle(T* pointer, int lane) {
  return __shfl_sync(~0u, pointer, lane);
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

inline int load_acquire(const int* from) {
  emulation::yield();
  return *from;
}

constexpr bool kBulkCopies = KIVI_BULK_COPIES;

inline void mbarrier_init(uint32_t barrier) { emulation::init_barrier(barrier, 1); }
inline void expect_bytes(uint32_t barrier, uint32_t bytes) { emulation::expect_bytes(barrier, bytes); }
inline void bulk_copy(uint32_t to, const char* from, uint32_t bytes, uint32_t barrier) {
  emulation::copy_to_barrier({emulation::shared_pointer(to), from, bytes}, barrier);
}
inline void copy16(uint32_t to, const char* from) {
  emulation::copy_of_lane({emulation::shared_pointer(to), from, 16});
}
inline void end_copies(uint32_t barrier) {
  emulation::copies_of_lane_arrive(barrier);
  __syncwarp();
  if (threadIdx.x % 32 == 0) emulation::arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulation::wait(barrier, parity); }
inline void fence_before_copies() {}

}  // namespace kivi::cuda
