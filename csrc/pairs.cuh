// Two neighbouring channels in the model's type T, which a thread handles together: float2, __nv_bfloat162 or __half2
// behind one set of names. Results are rounded to T once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace kivi::cuda {

template <class T>
struct Number;

template <>
struct Number<float> {
  using Pair = float2;
  static constexpr float kMax = 3.40282346638528859812e+38f;
  static __device__ Pair pair(float first, float second) { return {first, second}; }
};

template <>
struct Number<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static constexpr float kMax = 3.38953138925153547590e+38f;
  static __device__ Pair pair(float first, float second) { return __floats2bfloat162_rn(first, second); }
};

template <>
struct Number<__half> {
  using Pair = __half2;
  static constexpr float kMax = 65504.0f;
  static __device__ Pair pair(float first, float second) { return __floats2half2_rn(first, second); }
};

template <class T>
using Pair = typename Number<T>::Pair;

__device__ inline float2 to_floats(float2 x) { return x; }
__device__ inline float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 to_floats(__half2 x) { return __half22float2(x); }

template <class T>
__device__ inline float rounded(float x) {
  return to_floats(Number<T>::pair(x, 0.0f)).x;
}

template <class P>
__device__ inline uint32_t bits_of(P x) {
  return reinterpret_cast<const uint32_t&>(x);
}
template <class P>
__device__ inline P from_bits(uint32_t bits) {
  return reinterpret_cast<const P&>(bits);
}

// The same for float2 and, as templates, for the pairs of 16-bit numbers.
__device__ inline float2 smaller(float2 a, float2 b) { return {fminf(a.x, b.x), fminf(a.y, b.y)}; }
__device__ inline float2 larger(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
__device__ inline float2 multiply_add(float2 a, float2 b, float2 c) {
  return {__fmaf_rn(a.x, b.x, c.x), __fmaf_rn(a.y, b.y, c.y)};
}
__device__ inline float2 firsts(float2 a, float2 b) { return {a.x, b.x}; }
__device__ inline float2 seconds(float2 a, float2 b) { return {a.y, b.y}; }
__device__ inline float2 second_negated(float2 x) { return {x.x, -x.y}; }
__device__ inline float2 nan_as_zero(float2 x) { return {x.x == x.x ? x.x : 0.0f, x.y == x.y ? x.y : 0.0f}; }
__device__ inline float2 from_lane_xor(float2 x, int mask) {
  return {__shfl_xor_sync(~0u, x.x, mask), __shfl_xor_sync(~0u, x.y, mask)};
}
__device__ inline float2 from_lane(float2 x, int lane) {
  return {__shfl_sync(~0u, x.x, lane), __shfl_sync(~0u, x.y, lane)};
}

__device__ inline uint32_t from_lane_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

template <class P>
__device__ inline P smaller(P a, P b) {
  return __hmin2(a, b);
}
template <class P>
__device__ inline P larger(P a, P b) {
  return __hmax2(a, b);
}
template <class P>
__device__ inline P multiply_add(P a, P b, P c) {
  return __hfma2(a, b, c);
}
template <class P>
__device__ inline P firsts(P a, P b) {
  return from_bits<P>(__byte_perm(bits_of(a), bits_of(b), 0x5410));
}
template <class P>
__device__ inline P seconds(P a, P b) {
  return from_bits<P>(__byte_perm(bits_of(a), bits_of(b), 0x7632));
}
template <class P>
__device__ inline P second_negated(P x) {
  return from_bits<P>(bits_of(x) ^ 0x80000000u);
}
template <class P>
__device__ inline P nan_as_zero(P x) {
  return from_bits<P>(bits_of(x) & __heq2_mask(x, x));
}
template <class P>
__device__ inline P from_lane_xor(P x, int mask) {
  return from_bits<P>(__shfl_xor_sync(~0u, bits_of(x), mask));
}
template <class P>
__device__ inline P from_lane(P x, int lane) {
  return from_bits<P>(__shfl_sync(~0u, bits_of(x), lane));
}

// The expression alone would choose an address, and so put both into memory.
template <class P>
__device__ inline P chosen(bool condition, P a, P b) {
  return condition ? a : b;
}

// Of both elements {minimum, -maximum}. Of two such ranges the smaller pair is that of all elements.
template <class P>
__device__ inline P range_of(P x) {
  return smaller(second_negated(firsts(x, x)), second_negated(seconds(x, x)));
}

template <class T>
__device__ inline Pair<T> largest() {
  return Number<T>::pair(Number<T>::kMax, Number<T>::kMax);
}
template <class T>
__device__ inline Pair<T> lowest() {
  return Number<T>::pair(-Number<T>::kMax, -Number<T>::kMax);
}

// What a quantizer sees: NaN counts as 0, infinities as the largest finite number.
template <class T>
__device__ inline Pair<T> finite(Pair<T> x) {
  return smaller(larger(nan_as_zero(x), lowest<T>()), largest<T>());
}

}  // namespace kivi::cuda
