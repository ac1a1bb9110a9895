// 16-bit numbers and pairs of them. Every operation is computed in float64 and rounded once.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace emulation {

inline float to_float(__half x) { return std::bit_cast<_Float16>(x); }
inline float to_float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Rounds to odd, as all steps must but the last, so that the result is as if it had been rounded once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (!std::isfinite(sum) || error == 0 || bits % 2 == 1) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  return std::bit_cast<double>(bits);
}
inline float to_float_to_odd(double x) {
  const float rounded = float(x);
  uint32_t bits = std::bit_cast<uint32_t>(rounded);
  if (std::isnan(x) || rounded == x || bits % 2 == 1) return rounded;
  bits += std::abs(double(rounded)) < std::abs(x) ? 1 : -1;
  return std::bit_cast<float>(bits);
}

template <class T>
inline T rounded(double x);
template <>
inline __half rounded<__half>(double x) {
  return std::bit_cast<__half>(_Float16(x));
}
template <>
inline __nv_bfloat16 rounded<__nv_bfloat16>(double x) {
  if (std::isnan(x)) return {0x7FFF};
  const uint32_t bits = std::bit_cast<uint32_t>(to_float_to_odd(x));
  return {uint16_t((bits + 0x7FFF + (bits >> 16) % 2) >> 16)};
}

template <class Pair>
inline Pair pair(double x, double y) {
  using T = decltype(Pair::x);
  return {rounded<T>(x), rounded<T>(y)};
}

// A NaN loses against a number.
template <class T>
inline T smaller(T a, T b) {
  const float x = to_float(a), y = to_float(b);
  return std::isnan(x) || y < x ? b : a;
}
template <class T>
inline T larger(T a, T b) {
  const float x = to_float(a), y = to_float(b);
  return std::isnan(x) || y > x ? b : a;
}
// Products of two 16-bit numbers are exact in float64.
template <class T>
inline double multiply_add(T a, T b, T c) {
  return add_to_odd(double(to_float(a)) * to_float(b), to_float(c));
}

}  // namespace emulation

inline float2 __half22float2(__half2 x) { return {emulation::to_float(x.x), emulation::to_float(x.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {emulation::to_float(x.x), emulation::to_float(x.y)}; }
inline __half __float2half_rn(float x) { return emulation::rounded<__half>(x); }
inline __half2 __float2half2_rn(float x) { return emulation::pair<__half2>(x, x); }
inline __half2 __floats2half2_rn(float x, float y) { return emulation::pair<__half2>(x, y); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return emulation::pair<__nv_bfloat162>(x, y); }

template <class Pair>
inline Pair __hmin2(Pair a, Pair b) {
  return {emulation::smaller(a.x, b.x), emulation::smaller(a.y, b.y)};
}
template <class Pair>
inline Pair __hmax2(Pair a, Pair b) {
  return {emulation::larger(a.x, b.x), emulation::larger(a.y, b.y)};
}
template <class Pair>
inline Pair __hadd2_rn(Pair a, Pair b) {
  using emulation::to_float;
  return emulation::pair<Pair>(emulation::add_to_odd(to_float(a.x), to_float(b.x)),
                               emulation::add_to_odd(to_float(a.y), to_float(b.y)));
}
template <class Pair>
inline Pair __hfma2(Pair a, Pair b, Pair c) {
  return emulation::pair<Pair>(emulation::multiply_add(a.x, b.x, c.x), emulation::multiply_add(a.y, b.y, c.y));
}
template <class Pair>
inline unsigned __heq2_mask(Pair a, Pair b) {
  using emulation::to_float;
  return (to_float(a.x) == to_float(b.x) ? 0xFFFF : 0) | (to_float(a.y) == to_float(b.y) ? 0xFFFF0000 : 0);
}
