// What nvcc includes by itself before a source: keywords, vectors, thread indices, intrinsics, and the part of the
// runtime that csrc/instantiate uses. Only what the kernels need.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "warp.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 blockIdx, blockDim, gridDim;
constexpr struct {
  struct {
    operator unsigned() const { return emulation::current; }
  } x;
} threadIdx;

// ------------------------------------------------------------------------------------------------------ arithmetic

template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(b) < Common(a) ? Common(b) : Common(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(a) < Common(b) ? Common(b) : Common(a);
}

template <class T>
inline T __ldg(const T* from) {
  return *from;
}
template <class T>
inline T __ldcg(const T* from) {
  return *from;
}
inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}
inline void __threadfence() {}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }

inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return max(a & 0xFFFF, b & 0xFFFF) | max(a & 0xFFFF0000u, b & 0xFFFF0000u);
}
inline unsigned __viaddmax_s16x2(unsigned a, unsigned b, unsigned c) {
  const auto half = [](unsigned x, unsigned y, unsigned z) -> unsigned {
    return uint16_t(max(int16_t(uint16_t(x + y)), int16_t(z)));
  };
  return half(a, b, c) | half(a >> 16, b >> 16, c >> 16) << 16;
}

// --------------------------------------------------------------------------------------------------------- runtime

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

cudaError_t cudaGetDevice(int* id);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int id);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
// Only of decode: what `arguments` point at is not known here.
cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments, size_t shared_bytes,
                             cudaStream_t stream);

namespace emulation {

extern char dynamic_shared[];

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

// The kernel in `kernel<<<blocks, threads, shared_bytes, stream>>>(arguments)`, which build.py writes as a call of
// this.
template <class Kernel>
auto configured(Kernel kernel, dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t) {
  return [=](const auto&... arguments) { launch(blocks, threads, shared_bytes, [&] { kernel(arguments...); }); };
}

}  // namespace emulation
