// store with scale_search, boosted channels or rotate_values: the same bytes and batches as store.cuh, where what is
// quantized, or for which range, takes some work to find out. docs/FORMAT.md defines all of it to the bit.
//
// Some blocks share a run of 32 rows. What its complete groups take is cut into items, the keys of a head or the values
// of 8 tokens, so that a step of decoding that completes one group has many multiprocessors at work on it.
//
// Values. A warp rotates a token into shared memory. Then eight neighbouring lanes hold the eight ranges of a group and
// read all of its elements: no lane needs another one's until the smallest loss is taken. Losses are integers, so that
// no order matters. Then the words of codes, as in store.cuh.
// Boosted keys. Ranges and errors of all channels; the block ranks them; codes, of which the low bits of boosted
// channels meet in shared memory before they become words.
//
// Bound by instructions: about 100 an element of values with a search.
#pragma once

#include "rotation.h"
#include "store.cuh"

namespace kivi::cuda {

constexpr int kTunedThreads = 256, kTunedWarps = kTunedThreads / 32;
constexpr int kRunRows = 32;
constexpr int kOctet = 8;  // tokens of values that a block quantizes at once

// Of a group: what its Quantizer needs, and what is stored.
template <class T>
struct Chosen {
  Pair<T> factor_and_minus_low;
  float divisor, scale, zero;

  Chosen() = default;
  template <int BITS>
  __device__ explicit Chosen(const Scale<T, BITS>& from)
      : factor_and_minus_low(from.terms()), divisor(from.divisor), scale(from.scale), zero(from.zero) {}

  __device__ Pair<T> terms() const { return factor_and_minus_low; }
};

// 8-bit codes are not searched.
template <int BITS>
__device__ inline bool is_searched(const Layout& layout) {
  return BITS < 8 && layout.scale_search;
}

// Errors are counted in 1 / units of a group whose range has this span.
__device__ inline float units_of(float span) {
  return __uint_as_float(((127u + 127u + 11u) << 23) - (__float_as_uint(span) & 0x7f800000u));
}

// Whether losses mean something.
__device__ inline bool in_bounds(float span) { return span >= 0x1p-14f && span <= 0x1p15f; }

// A group's range and the one of eight candidates that this lane tries, number lane % 8: the range itself, or one of
// seven that are narrower.
template <class T, int BITS>
struct Candidate {
  int index;
  float span, units;  // of the range
  Chosen<T> chosen;

  __device__ Candidate(float low, float high, int index) : index(index) {
    span = __fsub_rn(high + 0.0f, low + 0.0f);
    units = units_of(span);
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
    if (!search || !in_bounds(span)) order = index;
#pragma unroll
    for (int width = 1; width < 8; width *= 2) order = min(order, __shfl_xor_sync(~0u, order, width));
    return order % 8 == index;
  }
};

// The squared error of a channel as a number that can be compared with that of others.
__device__ inline float comparable_error(float span, uint32_t loss) {
  if (!in_bounds(span)) return span < 1.0f ? 0.0f : INFINITY;
  const float unit = __uint_as_float((127u + 127u << 23) - __float_as_uint(units_of(span)));
  return __fmul_rn(__fmul_rn(__uint2float_rn(loss), unit), unit);
}

// What a block shares of boosted keys.
struct BoostedKeys {
  float2 ranges[kMaxHeadDim];
  float errors[kMaxHeadDim];
  int indices[kMaxHeadDim];  // of a channel among the boosted ones, -1: it is none
  unsigned masks[kMaxHeadDim / 32];
  uint8_t low_bits[kMaxHeadDim / 4][kMaxGroup];  // of boosted channels: the code modulo 4
};

// Ranges and errors at 2 bits of channels 16 * unit to 16 * unit + 15.
template <class T>
__device__ inline void measure_keys(const Layout& layout, const char* const* rows, bool aligned, int unit, int lane,
                                    BoostedKeys& shared) {
  const int channel = 16 * unit + lane % 8 * 2, num_runs = layout.group_size / 32;
  Pair<T> x[8], low, high;
  const auto load = [&](int run) { load_tokens<T>(x, rows + 32 * run + lane / 8 * 8, channel, aligned); };
  find_ranges<T>(x, num_runs, load, low, high);
  const float2 lows = to_floats(low), highs = to_floats(high);
  const Scale<T, 2> first(lows.x, highs.x), second(lows.y, highs.y);
  const float first_span = __fsub_rn(highs.x + 0.0f, lows.x + 0.0f);
  const float second_span = __fsub_rn(highs.y + 0.0f, lows.y + 0.0f);
  const Quantizer<T, 2> quantizer(first, second);
  uint32_t first_loss = 0, second_loss = 0;
#pragma unroll 1
  for (int run = num_runs - 1; run >= 0; --run) {
    if (run < num_runs - 1) load(run);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 losses =
          quantizer.squared_errors(x[i], {first.scale, second.scale}, {units_of(first_span), units_of(second_span)});
      first_loss += losses.x;
      second_loss += losses.y;
    }
  }
#pragma unroll
  for (int width = 8; width < 32; width *= 2) {
    first_loss += from_lane_xor(first_loss, width);
    second_loss += from_lane_xor(second_loss, width);
  }
  if (lane < 8) {
    shared.ranges[channel] = {lows.x, highs.x};
    shared.ranges[channel + 1] = {lows.y, highs.y};
    shared.errors[channel] = comparable_error(first_span, first_loss);
    shared.errors[channel + 1] = comparable_error(second_span, second_loss);
  }
}

// By a block: numbers the boosted channels, those with the largest errors, in ascending order.
__device__ inline void rank_channels(const Layout& layout, BoostedKeys& shared) {
  static_assert(kMaxHeadDim <= kTunedThreads);
  const int channel = threadIdx.x, lane = threadIdx.x % 32;
  bool boosted = false;
  if (channel < layout.head_dim) {
    const float error = shared.errors[channel];
    int rank = 0;
#pragma unroll 8
    for (int other = 0; other < layout.head_dim; ++other) {
      rank += shared.errors[other] > error || (shared.errors[other] == error && other < channel);
    }
    boosted = rank < layout.boosted_channels;
  }
  const unsigned mask = __ballot_sync(~0u, boosted);
  if (lane == 0) shared.masks[channel / 32] = mask;
  __syncthreads();
  if (channel < layout.head_dim) {
    int index = __popc(mask & ((1u << lane) - 1));
    for (int i = 0; i < channel / 32; ++i) index += __popc(shared.masks[i]);
    shared.indices[channel] = boosted ? index : -1;
  }
}

// Scales and codes of channels 16 * unit to 16 * unit + 15, low bits of boosted ones into shared memory.
template <class T>
__device__ inline void encode_boosted_keys(const Layout& layout, const char* const* rows, bool aligned, int unit,
                                           int lane, BoostedKeys& shared, char* tile) {
  using Codes = KeyCodes<2>;
  constexpr int kTokens = Halves<2>::kTokens;
  const int channel = 16 * unit + lane % 8 * 2;
  const int first_index = shared.indices[channel], second_index = shared.indices[channel + 1];
  const auto choose = [&](int channel, int index) {
    const float2 range = shared.ranges[channel];
    return index >= 0 ? Chosen<T>(Scale<T, 4>(range.x, range.y)) : Chosen<T>(Scale<T, 2>(range.x, range.y));
  };
  const Chosen<T> first = choose(channel, first_index), second = choose(channel + 1, second_index);
  const Quantizer<T, 4> quantizer(first, second);
  const Pair<T> levels = Number<T>::pair(first_index >= 0 ? 15.0f : 3.0f, second_index >= 0 ? 15.0f : 3.0f);
  const int first_shift = first_index >= 0 ? 2 : 0, second_shift = second_index >= 0 ? 2 : 0;
#pragma unroll 1
  for (int run = 0; run < layout.group_size / 32; ++run) {
    const int first_token = 32 * run + lane / 8 * 8;
    Pair<T> x[8];
    load_tokens<T>(x, rows + first_token, channel, aligned);
    Halves<2> halves;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t codes = quantizer.codes(x[i], levels);
      halves.add(i, (codes & 0xFFFF) >> first_shift | codes >> 16 >> second_shift << 16);
      if (first_index >= 0) shared.low_bits[first_index][first_token + i] = codes & 3;
      if (second_index >= 0) shared.low_bits[second_index][first_token + i] = codes >> 16 & 3;
    }
#pragma unroll
    for (int i = 0; i < 8; i += kTokens) {
      *reinterpret_cast<uint32_t*>(tile + Codes::offset(layout, channel, first_token + i + lane % kTokens)) =
          Codes::word(halves.words[i / kTokens], lane);
    }
  }
  if (lane < 8) {
    const Pair<T> scales = Number<T>::pair(first_index >= 0 ? -first.scale : first.scale,
                                           second_index >= 0 ? -second.scale : second.scale);
    const int offset = channel * int(sizeof(T));
    *reinterpret_cast<Pair<T>*>(tile + layout.k_scale_offset + offset) = scales;
    *reinterpret_cast<Pair<T>*>(tile + layout.k_zero_offset + offset) = Number<T>::pair(first.zero, second.zero);
  }
}

// A word of low bits: of two tokens and a block of eight boosted channels.
__device__ inline void store_low_bits(const Layout& layout, int word, const BoostedKeys& shared, char* tile) {
  const int pairs = layout.group_size / 2, block = word / pairs, token = word % pairs * 2;
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < BoostCodes::kChannels; ++i) {
    const uint8_t* low = &shared.low_bits[BoostCodes::kChannels * block + i][token];
    bits |= (low[0] | low[1] << BoostCodes::kTokenBits) << BoostCodes::bit_of(i);
  }
  *reinterpret_cast<uint32_t*>(tile + BoostCodes::offset(layout, block, token)) = bits;
}

// By a block.
template <class T>
__device__ inline void quantize_boosted_keys(const Layout& layout, const char* const* rows, bool aligned, char* tile) {
  __shared__ BoostedKeys shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, units = layout.head_dim / 16;
  for (int unit = warp; unit < units; unit += kTunedWarps) {
    measure_keys<T>(layout, rows, aligned, unit, lane, shared);
  }
  __syncthreads();
  rank_channels(layout, shared);
  __syncthreads();
  for (int unit = warp; unit < units; unit += kTunedWarps) {
    encode_boosted_keys<T>(layout, rows, aligned, unit, lane, shared, tile);
  }
  __syncthreads();
  const int num_words = layout.boosted_channels / BoostCodes::kChannels * (layout.group_size / 2);
  for (int word = threadIdx.x; word < num_words; word += kTunedThreads) store_low_bits(layout, word, shared, tile);
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

// What a block shares of the values of an octet.
template <class T>
struct Octet {
  static constexpr int kStride = kMaxHeadDim + 16 / int(sizeof(T));  // shifts the banks of tokens
  alignas(16) T rows[kOctet * kStride];
  Chosen<T> chosen[kMaxHeadDim / 32 * kOctet];  // [group][token]
};

// Of tokens 4 * quad to 4 * quad + 3 of an octet, and one group of channels.
template <class T, int BITS>
__device__ inline void choose_values(const Layout& layout, int octet, int quad, int group, int lane, Octet<T>& shared,
                                     char* tile) {
  const int index = lane % 8, token = 4 * quad + lane / 8, first = group * layout.group_size;
  const int num_pairs = min(layout.group_size, layout.head_dim - first) / 2;
  const Pair<T>* pairs = reinterpret_cast<const Pair<T>*>(shared.rows + token * shared.kStride + first);
  Pair<T> range = largest<T>();  // {minimum, -maximum}
  for (int i = index; i < num_pairs; i += 8) range = smaller(range, range_of(pairs[i]));
#pragma unroll
  for (int width = 1; width < 8; width *= 2) range = smaller(range, from_lane_xor(range, width));
  const float2 limits = to_floats(range);
  const Candidate<T, BITS> own(limits.x, -limits.y, index);
  const bool search = is_searched<BITS>(layout);
  uint32_t loss = 0;
  if (search) {
    const Quantizer<T, BITS, true> quantizer(own.chosen, own.chosen);
#pragma unroll 8
    for (int i = 0; i < num_pairs; ++i) {
      const uint2 losses =
          quantizer.squared_errors(pairs[i], {own.chosen.scale, own.chosen.scale}, {own.units, own.units});
      loss += losses.x + losses.y;
    }
  }
  if (own.is_best(loss, search)) {
    shared.chosen[group * kOctet + token] = own.chosen;
    const int offset = (first + kOctet * octet + token) * int(sizeof(T));
    const Pair<T> stored = Number<T>::pair(own.chosen.scale, own.chosen.zero);
    *reinterpret_cast<T*>(tile + layout.v_scale_offset + offset) = stored.x;
    *reinterpret_cast<T*>(tile + layout.v_zero_offset + offset) = stored.y;
  }
}

// Codes of an octet and 64 channels.
template <class T, int BITS>
__device__ inline void encode_values(const Layout& layout, int octet, int chunk, int lane, const Octet<T>& shared,
                                     char* tile) {
  using Codes = ValueCodes<BITS>;
  const int channel = 64 * chunk + 2 * lane;
  if (channel >= layout.head_dim) return;
  const Chosen<T>* chosen = shared.chosen + channel / layout.group_size * kOctet;
  Halves<BITS> halves;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const Pair<T> x = *reinterpret_cast<const Pair<T>*>(shared.rows + i * shared.kStride + channel);
    halves.add(i, Quantizer<T, BITS, true>(chosen[i], chosen[i]).codes(x));
  }
  *reinterpret_cast<typename Codes::Words*>(tile + Codes::offset(layout, octet, channel)) = Codes::words(halves);
}

// By a block.
template <class T, int BITS>
__device__ inline void quantize_octet(const Layout& layout, const char* const* rows, int octet, char* tile) {
  __shared__ Octet<T> shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kTunedWarps == kOctet);
  rotate_row<T>(layout, rows[kOctet * octet + warp], lane, shared.rows + warp * shared.kStride);
  __syncthreads();
  for (int unit = warp; unit < kOctet / 4 * layout.num_value_groups; unit += kTunedWarps) {
    choose_values<T, BITS>(layout, octet, unit % 2, unit / 2, lane, shared, tile);
  }
  __syncthreads();
  for (int chunk = warp; chunk < (layout.head_dim + 63) / 64; chunk += kTunedWarps) {
    encode_values<T, BITS>(layout, octet, chunk, lane, shared, tile);
  }
}

// The position of the set bit that has n set ones below it.
__device__ inline int nth_set_bit(unsigned bits, int n) {
  for (int i = 0; i < n; ++i) bits &= bits - 1;
  return __ffs(bits) - 1;
}

template <class T, int K_BITS, int V_BITS>
__global__ void __launch_bounds__(kTunedThreads, sizeof(T) == 4 ? 2 : 4)
    tuned_store_kernel(const __grid_constant__ StoreParams params, int num_rows, int blocks_per_run, bool aligned) {
  const Layout& layout = params.layout;
  const int num_heads = layout.num_kv_heads, row_bytes = layout.head_dim * int(sizeof(T));
  const int first_row = blockIdx.x / blocks_per_run * kRunRows, block = blockIdx.x % blocks_per_run;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = min(num_rows - first_row, kRunRows);
  const NewRow token = find_row(params, first_row + lane, lane < rows);

  // Blocks that have no group to quantize come first.
  for (int i = (blocks_per_run - 1 - block) * kTunedWarps + warp; i < rows * num_heads * 2;
       i += blocks_per_run * kTunedWarps) {
    const int row = i / 2 / num_heads, head = i / 2 % num_heads;
    const int block = __shfl_sync(~0u, token.full_block, row), position = __shfl_sync(~0u, token.position, row);
    if (block == 0) continue;
    copy_row<T>(full_token_of(layout, params.full, block, head, position, sizeof(T)) + i % 2 * row_bytes,
                row_of<T>(i % 2 == 0 ? params.key : params.value, first_row + row, head), layout.head_dim, aligned,
                lane);
  }

  __shared__ const char* keys[kMaxGroup];
  __shared__ const char* values[kMaxGroup];
  const unsigned complete = __ballot_sync(~0u, token.quantized_block != 0);
  const int num_groups = __popc(complete) * num_heads, num_items = num_groups * (1 + layout.group_size / kOctet);
  for (int item = block; item < num_items; item += blocks_per_run) {
    const int part = item / num_groups, head = item % num_groups % num_heads;  // the keys, which take longer, first
    const int row = nth_set_bit(complete, item % num_groups / num_heads);
    __syncthreads();  // nobody reads what is shared of the item before
    char* tile = find_group<T>(params, token, row, first_row + row, head, keys, values);
    if (tile == nullptr) continue;
    if (part > 0) {
      quantize_octet<T, V_BITS>(layout, values, part - 1, tile);
    } else if (K_BITS == 2 && layout.boosted_channels > 0) {
      quantize_boosted_keys<T>(layout, keys, aligned, tile);
    } else {
      for (int unit = warp; unit < layout.head_dim / 16; unit += kTunedWarps) {
        quantize_keys<T, K_BITS>(layout, keys, aligned, unit, lane, tile);
      }
    }
  }
}

}  // namespace kivi::cuda
