// store with scale_search, boosted channels or rotate_values: the same bytes and batches as store.cuh, where what is
// quantized, or for which range, takes some work to find out. docs/FORMAT.md defines all of it to the bit.
//
// A block takes the keys or the values of a run of rows of one head, so that two multiprocessors share the work when a
// step of decoding completes one group.
//
// Choosing. Eight neighbouring lanes hold the eight ranges of a group and read all of its elements: no lane needs
// another one's until the smallest loss is taken. Losses are integers, so that no order matters.
// - keys: a warp has eight channels. With boosted channels the block then ranks the channels by their errors, and a
//   second round chooses again at 4 bits for those that are boosted, four of them a warp.
// - values: 32 tokens at a time lie in shared memory, rotated by a warp a token; a warp has four tokens of one group.
// Encoding. As in store.cuh, with what was chosen in shared memory; a thread puts together a word of low bits.
//
// Bound by instructions: about 100 an element with a search.
#pragma once

#include "rotation.h"
#include "store.cuh"

namespace kivi::cuda {

constexpr int kTunedThreads = 512, kTunedWarps = kTunedThreads / 32;
constexpr int kRotatedTokens = 32;  // that lie in shared memory at once

// Of a group: what its Quantizer needs, and what is stored.
template <class T>
struct Chosen {
  Pair<T> terms;  // factor, minus_low
  float divisor, scale, zero;

  Chosen() = default;
  template <int BITS>
  __device__ explicit Chosen(const Scale<T, BITS>& from)
      : terms(Number<T>::pair(from.factor, from.minus_low)),
        divisor(from.divisor),
        scale(from.scale),
        zero(from.zero) {}
};

// Of two elements, of the group of each.
template <class T, int BITS>
__device__ inline Quantizer<T, BITS, true> quantizer_of(const Chosen<T>& first, const Chosen<T>& second) {
  return {first.terms, second.terms, first.divisor, second.divisor};
}

// 8-bit codes are not searched.
template <int BITS>
__device__ inline bool is_searched(const Layout& layout) {
  return BITS < 8 && layout.scale_search;
}

// A group's range and the one of eight candidates that this lane tries, number lane % 8: the range itself, or one of
// seven that are narrower.
template <class T, int BITS>
struct Candidate {
  int index;
  float span, units;  // of the range; errors are counted in 1 / units
  bool in_bounds;     // whether losses mean something
  Chosen<T> chosen;

  __device__ Candidate(float low, float high, int index) : index(index) {
    span = __fsub_rn(high + 0.0f, low + 0.0f);
    units = __uint_as_float(((127u + 127u + 11u) << 23) - (__float_as_uint(span) & 0x7f800000u));
    in_bounds = span >= 0x1p-14f && span <= 0x1p15f;
    if (index == 0) {
      chosen = Chosen<T>(Scale<T, BITS>(low, high));
    } else {
      const float part = __fdiv_rn(span, 40.0f);
      float cut = part;
      for (int i = 1; i < index; ++i) cut = __fadd_rn(cut, part);
      chosen = Chosen<T>(Scale<T, BITS>(low + 0.0f, span, cut));
    }
  }

  // Whether this lane's loses least. Ties keep the wider range; the range itself is given 1/64.
  __device__ bool is_best(uint32_t loss, bool search) const {
    uint32_t order = index == 0 ? (loss - loss / 64) * 8 : loss * 8 + index;
    if (!search || !in_bounds) order = index;
#pragma unroll
    for (int width = 1; width < 8; width *= 2) order = min(order, __shfl_xor_sync(~0u, order, width));
    return order % 8 == index;
  }

  // The squared error as a number that can be compared with that of other groups.
  __device__ float error(uint32_t loss) const {
    if (!in_bounds) return span < 1.0f ? 0.0f : INFINITY;
    const float unit = __uint_as_float((127u + 127u << 23) - __float_as_uint(units));
    return __fmul_rn(__fmul_rn(__uint2float_rn(loss), unit), unit);
  }
};

// Keys of channels 8 * unit to 8 * unit + 7: chosen and, for their ranking, errors of each.
template <class T, int BITS>
__device__ inline void choose_keys(const Layout& layout, const char* const* rows, bool aligned, int unit, int lane,
                                   Chosen<T>* chosen, float* errors) {
  const int index = lane % 8, channel = 8 * unit + lane / 8 * 2, offset = channel * int(sizeof(T));
  Pair<T> low = largest<T>(), high = lowest<T>();
  for (int t = index; t < layout.group_size; t += 8) {
    const Pair<T> x = load_pair<T>(rows[t] + offset, aligned);
    low = smaller(low, x);
    high = larger(high, x);
  }
#pragma unroll
  for (int width = 1; width < 8; width *= 2) {
    low = smaller(low, from_lane_xor(low, width));
    high = larger(high, from_lane_xor(high, width));
  }
  const float2 lows = to_floats(low), highs = to_floats(high);
  const Candidate<T, BITS> first(lows.x, highs.x, index), second(lows.y, highs.y, index);
  const Quantizer<T, BITS, true> quantizer = quantizer_of<T, BITS>(first.chosen, second.chosen);
  const bool search = is_searched<BITS>(layout);
  uint32_t first_loss = 0, second_loss = 0;
#pragma unroll 8
  for (int t = 0; t < (search || layout.boosted_channels > 0 ? layout.group_size : 0); ++t) {
    const uint2 losses =
        quantizer.squared_errors(load_pair<T>(rows[t] + offset, aligned), {first.chosen.scale, second.chosen.scale},
                                 {first.units, second.units});
    first_loss += losses.x;
    second_loss += losses.y;
  }
  if (first.is_best(first_loss, search)) {
    chosen[channel] = first.chosen;
    errors[channel] = first.error(first_loss);
  }
  if (second.is_best(second_loss, search)) {
    chosen[channel + 1] = second.chosen;
    errors[channel + 1] = second.error(second_loss);
  }
}

// A channel's keys of tokens t and t + 1.
template <class T>
__device__ inline Pair<T> load_tokens(const char* const* rows, int t, int channel) {
  Pair<T> x;
  x.x = __ldg(reinterpret_cast<const T*>(rows[t]) + channel);
  x.y = __ldg(reinterpret_cast<const T*>(rows[t + 1]) + channel);
  return finite<T>(x);
}

// Chooses again, at 4 bits, for channels that are boosted: four of the list from 4 * unit on.
template <class T>
__device__ inline void choose_boosted_keys(const Layout& layout, const char* const* rows, int unit, int lane,
                                           const int* boosted, Chosen<T>* chosen) {
  const int index = lane % 8, channel = boosted[4 * unit + lane / 8];
  Pair<T> low = largest<T>(), high = lowest<T>();
  for (int t = 2 * index; t < layout.group_size; t += 16) {
    const Pair<T> x = load_tokens<T>(rows, t, channel);
    low = smaller(low, x);
    high = larger(high, x);
  }
#pragma unroll
  for (int width = 1; width < 8; width *= 2) {
    low = smaller(low, from_lane_xor(low, width));
    high = larger(high, from_lane_xor(high, width));
  }
  const float2 lows = to_floats(low), highs = to_floats(high);
  const Candidate<T, 4> own(fminf(lows.x, lows.y), fmaxf(highs.x, highs.y), index);
  uint32_t loss = 0;
  if (layout.scale_search) {
    const Quantizer<T, 4, true> quantizer = quantizer_of<T, 4>(own.chosen, own.chosen);
#pragma unroll 8
    for (int t = 0; t < layout.group_size; t += 2) {
      const uint2 losses = quantizer.squared_errors(load_tokens<T>(rows, t, channel),
                                                    {own.chosen.scale, own.chosen.scale}, {own.units, own.units});
      loss += losses.x + losses.y;
    }
  }
  if (own.is_best(loss, layout.scale_search)) chosen[channel] = own.chosen;
}

// By a block: lists the boosted channels, those with the largest errors, in ascending order, and sets their flags.
__device__ inline void rank_channels(const Layout& layout, const float* errors, int* boosted, unsigned* flags) {
  __shared__ unsigned masks[kMaxHeadDim / 32];
  const int channel = threadIdx.x, lane = threadIdx.x % 32;
  bool is_boosted = false;
  if (channel < layout.head_dim) {
    const float error = errors[channel];
    int rank = 0;
#pragma unroll 4
    for (int other = 0; other < layout.head_dim; ++other) {
      rank += errors[other] > error || (errors[other] == error && other < channel);
    }
    is_boosted = rank < layout.boosted_channels;
  }
  const unsigned mask = __ballot_sync(~0u, is_boosted);
  if (channel < layout.head_dim) {
    flags[channel] = is_boosted;
    if (lane == 0) masks[channel / 32] = mask;
  }
  __syncthreads();
  if (is_boosted) {
    int index = __popc(mask & ((1u << lane) - 1));
    for (int i = 0; i < channel / 32; ++i) index += __popc(masks[i]);
    boosted[index] = channel;
  }
}

// Scales and codes of channels 16 * unit to 16 * unit + 15 and 32 tokens.
template <class T, int BITS>
__device__ inline void encode_keys(const Layout& layout, const char* const* rows, bool aligned, int unit, int run,
                                   int lane, const Chosen<T>* chosen, const unsigned* flags, char* tile) {
  using Codes = KeyCodes<BITS>;
  constexpr int kTokens = Halves<BITS>::kTokens;
  constexpr bool kMayBoost = BITS == 2;
  const int channel = 16 * unit + lane % 8 * 2;
  Pair<T> x[8];
  load_tokens<T>(x, rows + 32 * run + lane / 8 * 8, channel, aligned);
  const Chosen<T>&first = chosen[channel], &second = chosen[channel + 1];
  const bool any = kMayBoost && layout.boosted_channels > 0;
  const bool first_boosted = any && flags[channel], second_boosted = any && flags[channel + 1];
  Halves<BITS> halves;
  if (kMayBoost && any) {
    const Quantizer<T, 4, true> quantizer = quantizer_of<T, 4>(first, second);
    const Pair<T> levels = Number<T>::pair(first_boosted ? 15.0f : 3.0f, second_boosted ? 15.0f : 3.0f);
    const int first_shift = first_boosted ? 2 : 0, second_shift = second_boosted ? 2 : 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t codes = quantizer.codes(x[i], levels);
      halves.add(i, (codes & 0xFFFF) >> first_shift | codes >> 16 >> second_shift << 16);
    }
  } else {
    const Quantizer<T, BITS, true> quantizer = quantizer_of<T, BITS>(first, second);
#pragma unroll
    for (int i = 0; i < 8; ++i) halves.add(i, quantizer.codes(x[i]));
  }
#pragma unroll
  for (int i = 0; i < 8; i += kTokens) {
    const int token = 32 * run + lane / 8 * 8 + i + lane % kTokens;
    *reinterpret_cast<uint32_t*>(tile + Codes::offset(layout, channel, token)) =
        Codes::word(halves.words[i / kTokens], lane);
  }
  if (run == 0 && lane < 16) {
    const bool is_second = lane >= 8;
    const Chosen<T>& own = is_second ? second : first;
    const bool boosted = is_second ? second_boosted : first_boosted;
    const Pair<T> stored = Number<T>::pair(boosted ? -own.scale : own.scale, own.zero);
    const int offset = (channel + is_second) * int(sizeof(T));
    *reinterpret_cast<T*>(tile + layout.k_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.k_zero_offset + offset) = stored.y;
  }
}

// A word of low bits: of two tokens and a block of eight boosted channels.
template <class T>
__device__ inline void encode_low_bits(const Layout& layout, const char* const* rows, int word, const int* boosted,
                                       const Chosen<T>* chosen, char* tile) {
  const int pairs = layout.group_size / 2, block = word / pairs, token = word % pairs * 2;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < BoostCodes::kChannels; ++i) {
    const int channel = boosted[BoostCodes::kChannels * block + i];
    const uint32_t codes =
        quantizer_of<T, 4>(chosen[channel], chosen[channel]).codes(load_tokens<T>(rows, token, channel));
    bits |= ((codes & 3) | (codes >> 16 & 3) << BoostCodes::kTokenBits) << BoostCodes::bit_of(i);
  }
  *reinterpret_cast<uint32_t*>(tile + BoostCodes::offset(layout, block, token)) = bits;
}

// By a block.
template <class T, int BITS>
__device__ inline void quantize_keys(const Layout& layout, const char* const* rows, bool aligned, Chosen<T>* chosen,
                                     char* tile) {
  __shared__ float errors[kMaxHeadDim];
  __shared__ unsigned flags[kMaxHeadDim];
  __shared__ int boosted[kMaxHeadDim / 4];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head_dim = layout.head_dim;
  const bool boosts = BITS == 2 && layout.boosted_channels > 0;
  for (int unit = warp; unit < head_dim / 8; unit += kTunedWarps) {
    choose_keys<T, BITS>(layout, rows, aligned, unit, lane, chosen, errors);
  }
  __syncthreads();
  if (boosts) {
    rank_channels(layout, errors, boosted, flags);
    __syncthreads();
    for (int unit = warp; unit < layout.boosted_channels / 4; unit += kTunedWarps) {
      choose_boosted_keys<T>(layout, rows, unit, lane, boosted, chosen);
    }
    __syncthreads();
    const int num_words = layout.boosted_channels / BoostCodes::kChannels * (layout.group_size / 2);
    for (int word = threadIdx.x; word < num_words; word += kTunedThreads) {
      encode_low_bits<T>(layout, rows, word, boosted, chosen, tile);
    }
  }
  const int runs = layout.group_size / 32;
  for (int unit = warp; unit < head_dim / 16 * runs; unit += kTunedWarps) {
    encode_keys<T, BITS>(layout, rows, aligned, unit / runs, unit % runs, lane, chosen, flags, tile);
  }
}

// A row, rotated if that is asked for, into shared memory. Lane l has channels l, l + 32 and so on; stages follow the
// order of docs/FORMAT.md.
template <class T>
__device__ inline void rotate_row(const Layout& layout, const char* from, int lane, T* to) {
  constexpr int kParts = kMaxHeadDim / 32;
  const int head_dim = layout.head_dim, size = rotation_size(head_dim);
  float x[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int channel = 32 * i + lane;
    const T element = channel < head_dim ? __ldg(reinterpret_cast<const T*>(from) + channel) : T(0.0f);
    Pair<T> pair;
    pair.x = pair.y = element;
    x[i] = to_floats(finite<T>(pair)).x;
  }
  if (layout.rotate_values) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      if (distance >= size) break;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const float other = __shfl_xor_sync(~0u, x[i], distance);
        x[i] = lane & distance ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
      }
    }
#pragma unroll
    for (int step = 1; step < kParts; step *= 2) {
      if (32 * step >= size) break;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        if (i & step) continue;
        const float difference = __fsub_rn(x[i], x[i + step]);
        x[i] = __fadd_rn(x[i], x[i + step]);
        x[i + step] = difference;
      }
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) x[i] = __fmul_rn(x[i], rotation_norm(size));
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int channel = 32 * i + lane;
    if (channel < head_dim) to[channel] = finite<T>(Number<T>::pair(x[i], x[i])).x;
  }
}

// Values of four tokens, from 4 * quad on, and one group of channels.
template <class T, int BITS>
__device__ inline void choose_values(const Layout& layout, const T* rows, int stride, int quad, int group, int lane,
                                     int first_token, Chosen<T>* chosen, char* tile) {
  const int index = lane % 8, token = 4 * quad + lane / 8, first = group * layout.group_size;
  const int num_pairs = min(layout.group_size, layout.head_dim - first) / 2;
  const Pair<T>* pairs = reinterpret_cast<const Pair<T>*>(rows + token * stride + first);
  Pair<T> range = largest<T>();  // {minimum, -maximum}
  for (int i = index; i < num_pairs; i += 8) range = smaller(range, range_of(pairs[i]));
#pragma unroll
  for (int width = 1; width < 8; width *= 2) range = smaller(range, from_lane_xor(range, width));
  const float2 limits = to_floats(range);
  const Candidate<T, BITS> own(limits.x, -limits.y, index);
  const bool search = is_searched<BITS>(layout);
  uint32_t loss = 0;
  if (search) {
    const Quantizer<T, BITS, true> quantizer = quantizer_of<T, BITS>(own.chosen, own.chosen);
#pragma unroll 8
    for (int i = 0; i < num_pairs; ++i) {
      const uint2 losses =
          quantizer.squared_errors(pairs[i], {own.chosen.scale, own.chosen.scale}, {own.units, own.units});
      loss += losses.x + losses.y;
    }
  }
  if (own.is_best(loss, search)) {
    chosen[group * kRotatedTokens + token] = own.chosen;
    const int offset = (first + first_token + token) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.chosen.scale, own.chosen.zero);
    *reinterpret_cast<T*>(tile + layout.v_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.v_zero_offset + offset) = stored.y;
  }
}

// Codes of eight tokens, from 8 * octet on, and 64 channels.
template <class T, int BITS>
__device__ inline void encode_values(const Layout& layout, const T* rows, int stride, int octet, int chunk, int lane,
                                     int first_octet, const Chosen<T>* chosen, char* tile) {
  using Codes = ValueCodes<BITS>;
  const int channel = 64 * chunk + 2 * lane;
  if (channel >= layout.head_dim) return;
  const int group = channel / layout.group_size;
  Halves<BITS> halves;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int token = 8 * octet + i;
    const Chosen<T>& own = chosen[group * kRotatedTokens + token];
    const Pair<T> x = *reinterpret_cast<const Pair<T>*>(rows + token * stride + channel);
    halves.add(i, quantizer_of<T, BITS>(own, own).codes(x));
  }
  *reinterpret_cast<typename Codes::Words*>(tile + Codes::offset(layout, first_octet + octet, channel)) =
      Codes::words(halves);
}

// By a block.
template <class T, int BITS>
__device__ inline void quantize_values(const Layout& layout, const char* const* rows, Chosen<T>* chosen, char* tile) {
  constexpr int kStride = kMaxHeadDim + 16 / int(sizeof(T));  // shifts the banks of tokens
  __shared__ __align__(16) T rotated[kRotatedTokens * kStride];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int first = 0; first < layout.group_size; first += kRotatedTokens) {
    if (first > 0) __syncthreads();
    for (int t = warp; t < kRotatedTokens; t += kTunedWarps) {
      rotate_row<T>(layout, rows[first + t], lane, rotated + t * kStride);
    }
    __syncthreads();
    constexpr int kQuads = kRotatedTokens / 4, kOctets = kRotatedTokens / 8;
    for (int unit = warp; unit < kQuads * layout.num_value_groups; unit += kTunedWarps) {
      choose_values<T, BITS>(layout, rotated, kStride, unit % kQuads, unit / kQuads, lane, first, chosen, tile);
    }
    __syncthreads();
    for (int unit = warp; unit < kOctets * ((layout.head_dim + 63) / 64); unit += kTunedWarps) {
      encode_values<T, BITS>(layout, rotated, kStride, unit % kOctets, unit / kOctets, lane, first / 8, chosen, tile);
    }
  }
}

template <class T, int K_BITS, int V_BITS>
__global__ void __launch_bounds__(kTunedThreads, sizeof(T) == 4 ? 1 : 2)
    tuned_store_kernel(const __grid_constant__ StoreParams params, int num_rows, int rows_per_block, bool aligned) {
  const Layout& layout = params.layout;
  const int head = blockIdx.x % layout.num_kv_heads, first_row = blockIdx.x / layout.num_kv_heads * rows_per_block;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool is_value = blockIdx.y;
  const NewRow token = find_row(params, first_row + lane, lane < rows_per_block && first_row + lane < num_rows);

  for (int i = kTunedWarps - 1 - warp; i < rows_per_block; i += kTunedWarps) {
    const int block = __shfl_sync(~0u, token.full_block, i), position = __shfl_sync(~0u, token.position, i);
    if (block == 0) continue;
    char* to = full_token_of(layout, params.full, block, head, position, sizeof(T));
    if (is_value) to += layout.head_dim * sizeof(T);
    copy_row<T>(to, row_of<T>(is_value ? params.value : params.key, first_row + i, head), layout.head_dim, aligned,
                lane);
  }

  __shared__ const char* keys[kMaxGroup];
  __shared__ const char* values[kMaxGroup];
  __shared__ Chosen<T> chosen[kMaxHeadDim];  // of channels of keys, or of 32 tokens' groups of values
  for (unsigned complete = __ballot_sync(~0u, token.quantized_block != 0); complete != 0; complete &= complete - 1) {
    const int i = __ffs(complete) - 1;
    __syncthreads();  // nobody reads the addresses of the group before
    char* tile = find_group<T>(params, token, i, first_row + i, head, keys, values);
    if (tile == nullptr) continue;
    if (is_value) {
      quantize_values<T, V_BITS>(layout, values, chosen, tile);
    } else {
      quantize_keys<T, K_BITS>(layout, keys, aligned, chosen, tile);
    }
  }
}

}  // namespace kivi::cuda
