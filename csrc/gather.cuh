// gather: tokens of paged requests as rows in the model's type, for the attention of prefill, which reads them from a
// bounded workspace.
//
// A block has 32 rows of one head. Each of its warps finds out, a lane a row, which request and position a row is. A
// row that is the first of its request or of a group begins a segment: the rows of its group from there on, which lie
// in one tile. The block in which it begins writes all of it, so a tile's scales are loaded by one block, whatever
// position the first row has.
//
// Of a quantized segment a thread takes eight channels of eight tokens, keys or values: its codes, scales and zeros are
// a few 16-byte loads, and each token one 16-byte store, beside those of its neighbours. Rotated values are turned back
// first: the threads of a token are neighbours in a warp. Other tokens (sinks, from the boundary on, or all with
// full_precision) are copied.
//
// Bound by the memory that is written: at 2 bits and 16-bit elements 5 times what is read, and about 8 instructions an
// element.
#pragma once

#include "page.cuh"
#include "quant_tile.cuh"
#include "rotation.h"
#include "rows.cuh"

namespace kivi::cuda {

constexpr int kGatherRows = 32;
constexpr int kGatherThreads = 128;

// Eight elements; the largest code may lie a rounding beyond the largest number. `aligned`: otherwise rows may begin
// anywhere.
template <class T>
__device__ inline void write_eight(char* to, const float (&x)[8], bool aligned) {
  alignas(16) Pair<T> pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = smaller(larger(Number<T>::pair(x[2 * i], x[2 * i + 1]), lowest<T>()), largest<T>());
  }
  if (aligned) {
#pragma unroll
    for (int i = 0; i < int(sizeof pairs / sizeof(uint4)); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(pairs)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reinterpret_cast<T*>(to)[2 * i] = pairs[i].x;
      reinterpret_cast<T*>(to)[2 * i + 1] = pairs[i].y;
    }
  }
}

template <class T>
__device__ inline void read_eight(float (&x)[8], const char* from) {
  alignas(16) Pair<T> pairs[4];
#pragma unroll
  for (int i = 0; i < int(sizeof pairs / sizeof(uint4)); ++i) {
    reinterpret_cast<uint4*>(pairs)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 floats = to_floats(pairs[i]);
    x[2 * i] = floats.x;
    x[2 * i + 1] = floats.y;
  }
}

template <int COUNT>
__device__ inline void read_words(uint32_t* words, const char* from) {
#pragma unroll
  for (int i = 0; i < COUNT / 4; ++i) {
    reinterpret_cast<uint4*>(words)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
}

// The BITS-bit code from `bit` on as a float: the bits of 2^23 + code, less 2^23.
template <int BITS>
__device__ inline float code_at(uint32_t word, int bit) {
  return __uint_as_float((word >> bit & ((1u << BITS) - 1)) | 0x4B000000u) - 8388608.0f;
}

template <class T>
__device__ inline bool is_negative(const char* number) {
  if constexpr (sizeof(T) == 4) {
    return __ldg(reinterpret_cast<const int*>(number)) < 0;
  } else {
    return __ldg(reinterpret_cast<const short*>(number)) < 0;
  }
}

// By a warp: before[i] becomes the number of boosted channels below 8 * i.
template <class T>
__device__ inline void count_boosted(const Layout& layout, const char* tile, int lane, int* before) {
  int count = 0;
  for (int first = 0; first < layout.head_dim; first += 32) {
    const int channel = first + lane;
    const bool is_channel = channel < layout.head_dim;
    const char* scale = tile + layout.k_scale_offset + channel * sizeof(T);
    const unsigned boosted = __ballot_sync(~0u, is_channel && is_negative<T>(scale));
    if (is_channel && lane % 8 == 0) before[channel / 8] = count + __popc(boosted & ((1u << lane) - 1));
    count += __popc(boosted);
  }
}

// Keys of eight channels and of tokens 8 * octet to 8 * octet + 7: calls write(i, x) for each token i. BOOST: some
// channels may be boosted, and `num_before` are below these.
template <class T, int BITS, bool BOOST, class F>
__device__ inline void dequantize_keys(const Layout& layout, const char* tile, int octet, int channel, int num_before,
                                       const F& write) {
  using Codes = KeyCodes<BITS>;
  constexpr int kColumns = (8 + Codes::kChannels - 1) / Codes::kChannels;  // of words
  alignas(16) uint32_t words[kColumns][8];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    read_words<8>(words[i], tile + Codes::offset(layout, channel + i * Codes::kChannels, 8 * octet));
  }
  float scale[8], zero[8];
  read_eight<T>(scale, tile + layout.k_scale_offset + channel * sizeof(T));
  read_eight<T>(zero, tile + layout.k_zero_offset + channel * sizeof(T));
  const int first_bit = Codes::bit_of(channel);
  // Low bits: of the blocks in which the first boosted channel lies and the next one; 32 in the second.
  alignas(16) uint32_t low[2][4];
  int low_bit[8];
  if constexpr (BOOST) {
    const int block = num_before / BoostCodes::kChannels, last = layout.boosted_channels / BoostCodes::kChannels - 1;
    read_words<4>(low[0], tile + BoostCodes::offset(layout, min(block, last), 8 * octet));
    read_words<4>(low[1], tile + BoostCodes::offset(layout, min(block + 1, last), 8 * octet));
    int index = num_before % BoostCodes::kChannels;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const bool boosted = __float_as_uint(scale[c]) >> 31;
      low_bit[c] =
          boosted ? index / BoostCodes::kChannels * 32 + BoostCodes::bit_of(index % BoostCodes::kChannels) : -1;
      scale[c] = fabsf(scale[c]);
      index += boosted;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const uint32_t word = words[c / Codes::kChannels][i] >> first_bit;
      float code = code_at<BITS>(word, Codes::bit_of(c));
      if constexpr (BOOST) {
        const uint32_t low_word = low_bit[c] >= 32 ? low[1][i / 2] : low[0][i / 2];
        const float low_code = code_at<2>(low_word >> (low_bit[c] & 31), i % 2 * BoostCodes::kTokenBits);
        code = low_bit[c] < 0 ? code : __fmaf_rn(4.0f, code, low_code);
      }
      x[c] = __fmaf_rn(code, scale[c], zero[c]);
    }
    write(i, x);
  }
}

// Of eight rotated channels of a token, of which neighbouring lanes have others: those that were rotated.
__device__ inline void turn_back(float (&x)[8], int size, int lane) {
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      if (c & distance) continue;
      const float difference = x[c] - x[c + distance];
      x[c] += x[c + distance];
      x[c + distance] = difference;
    }
  }
  const int num_lanes = size / 8;
  const unsigned lanes = (num_lanes == 32 ? ~0u : (1u << num_lanes) - 1) << (lane & -num_lanes);
  for (int distance = 1; distance < num_lanes; distance *= 2) {
    const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] = __fmaf_rn(x[c], sign, __shfl_xor_sync(lanes, x[c], distance));
  }
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] *= rsqrtf(size);
}

// The same of values; the channels are in one group.
template <class T, int BITS, class F>
__device__ inline void dequantize_values(const Layout& layout, const char* tile, int octet, int channel,
                                         const F& write) {
  using Codes = ValueCodes<BITS>;
  alignas(16) uint32_t words[2 * BITS];
  read_words<2 * BITS>(words, tile + Codes::offset(layout, octet, channel));
  const int group = channel >> (__ffs(layout.group_size) - 1);
  const int offset = (group * layout.group_size + 8 * octet) * int(sizeof(T));
  float scale[8], zero[8];
  read_eight<T>(scale, tile + layout.v_scale_offset + offset);
  read_eight<T>(zero, tile + layout.v_zero_offset + offset);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      x[c] = __fmaf_rn(code_at<BITS>(words[Codes::word_of(i, c)], Codes::bit_of(i, c)), scale[i], zero[i]);
    }
    write(i, x);
  }
}

template <class T, int K_BITS, int V_BITS, bool BOOST>
__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherParams params, int num_rows, bool aligned) {
  constexpr int kWarps = kGatherThreads / 32;
  const Layout& layout = params.layout;
  const int head = blockIdx.x % layout.num_kv_heads, block_row = blockIdx.x / layout.num_kv_heads * kGatherRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_dim = layout.head_dim, group_size = layout.group_size, row_bytes = head_dim * int(sizeof(T));

  __shared__ int boosted_before[kMaxHeadDim / 8];
  int request = -1, position = 0;
  bool begins = false;
  if (block_row + lane < num_rows) request = request_of(params.start_loc, params.num_reqs, block_row + lane);
  if (request >= 0) {
    const int index = block_row + lane - __ldg(params.start_loc + request);
    position = __ldg(params.first + request) + index;
    begins = index == 0 || (position & (group_size - 1)) == 0;
  }

  for (unsigned segments = __ballot_sync(~0u, begins); segments != 0; segments &= segments - 1) {
    const int source = __ffs(segments) - 1;
    const int r = __shfl_sync(~0u, request, source), first = __shfl_sync(~0u, position, source);
    const int first_row = block_row + source, group_start = first & -group_size;
    const int end = min(group_start + group_size, first + __ldg(params.start_loc + r + 1) - first_row);
    // Positions in [low, high) are quantized.
    const int low = max(first, layout.sink_tokens), high = min(end, __ldg(params.boundary + r));
    const char* tile = nullptr;
    if (low < high) {
      const int block = block_of(params.quantized, r, group_start / layout.page_tokens);
      tile = tile_of(layout, params.quantized, block, head, group_start);
    }

    for (int p = first + warp; p < end; p += kWarps) {
      const char *key, *value;
      if (low <= p && p < high) {
        if (!layout.is_bypass()) continue;
        key = tile + layout.k_codes_offset + (p - group_start) * row_bytes;
        value = tile + layout.v_codes_offset + (p - group_start) * row_bytes;
      } else {
        const int block = block_of(params.full, r, p / layout.full_page_tokens);
        key = full_token_of(layout, params.full, block, head, p, sizeof(T));
        value = key + row_bytes;
      }
      const int row = first_row + p - first;
      copy_row<T>(row_of<T>(params.key, row, head), key, head_dim, aligned, lane);
      copy_row<T>(row_of<T>(params.value, row, head), value, head_dim, aligned, lane);
    }
    if (low >= high || layout.is_bypass()) continue;
    if constexpr (BOOST) {
      __syncthreads();  // nobody reads that of the segment before
      if (warp == 0) count_boosted<T>(layout, tile, lane, boosted_before);
      __syncthreads();
    }

    const int parts = head_dim / 8, first_octet = (low - group_start) / 8;
    const int items = parts * ((high - 1 - group_start) / 8 + 1 - first_octet);
    for (int i = threadIdx.x; i < 2 * items; i += kGatherThreads) {
      const bool is_value = i >= items;
      const unsigned item = is_value ? i - items : i;
      const int octet = first_octet + item / unsigned(parts), channel = item % unsigned(parts) * 8;
      const Rows& rows = is_value ? params.value : params.key;
      const int octet_start = group_start + 8 * octet;
      const int64_t stride = rows.token_stride * int64_t(sizeof(T));
      char* out = row_of<T>(rows, first_row + octet_start - first, head) + channel * sizeof(T);
      const auto write = [&](int token, float (&x)[8]) {
        const int p = octet_start + token;
        if (is_value && layout.rotate_values) turn_back(x, rotation_size(head_dim), lane);
        if (low <= p && p < high) write_eight<T>(out + token * stride, x, aligned);
      };
      if (is_value) {
        dequantize_values<T, V_BITS>(layout, tile, octet, channel, write);
      } else {
        const int num_before = BOOST ? boosted_before[channel / 8] : 0;
        dequantize_keys<T, K_BITS, BOOST>(layout, tile, octet, channel, num_before, write);
      }
    }
  }
}

}  // namespace kivi::cuda
