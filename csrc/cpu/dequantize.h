// Tokens of a tile as floats, for kernels that work on elements: prefill and gather. It is kChunkTokens of them, from
// `token` on, a multiple of that. Rotated values stay rotated.
#pragma once

#include "page.h"

namespace kivi::cpu::KIVI_ISA {

constexpr int kChunkTokens = 32;  // divides every group size

template <class T, int BITS>
void dequantize_key_codes(const Layout& layout, const char* tile, int token, float* out, int stride) {
  using Codes = KeyCodes<BITS>;
  alignas(64) float scales[kMaxHeadDim], zeros[kMaxHeadDim];
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    save(scales + channel, to_floats(reinterpret_cast<const T*>(tile + layout.k_scale_offset) + channel));
    save(zeros + channel, to_floats(reinterpret_cast<const T*>(tile + layout.k_zero_offset) + channel));
  }
  for (int i = 0; i < kChunkTokens; i += kLanes) {
    for (int channel = 0; channel < layout.head_dim; channel += Codes::kChannels) {
      const Words words = Codes::words(tile, layout, channel, token + i);
      unrolled<Codes::kChannels>([&]<int INDEX>() __attribute__((always_inline)) {
        const Floats key = Codes::template code<INDEX>(words) * scales[channel + INDEX] + zeros[channel + INDEX];
        save(out + (channel + INDEX) * stride + i, key);
      });
    }
  }
}

// Replaces the boosted channels of what dequantize_key_codes made of a tile.
template <class T>
void dequantize_boosted(const Layout& layout, const char* tile, int token, float* out, int stride) {
  int32_t channels[kMaxHeadDim + kLanes];
  alignas(64) float scales[kMaxHeadDim], zeros[kMaxHeadDim];
  find_boosted<T>(layout, tile, channels);
  for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
    save(scales + channel, magnitude(to_floats(reinterpret_cast<const T*>(tile + layout.k_scale_offset) + channel)));
    save(zeros + channel, to_floats(reinterpret_cast<const T*>(tile + layout.k_zero_offset) + channel));
  }
  for (int i = 0; i < kChunkTokens; i += 2 * kLanes) {
    for (int first = 0; first < layout.boosted_channels; first += 8) {
      const Words words = BoostCodes::words(tile, layout, first, token + i);
      unrolled<8>([&]<int INDEX>() __attribute__((always_inline)) {
        const int channel = channels[first + INDEX];
        const Floats even = BoostCodes::code<INDEX, 0>(words), odd = BoostCodes::code<INDEX, 1>(words);
        const Floats low[2] = {interleave_low(even, odd), interleave_high(even, odd)};
        for (int j = 0; j < 2; ++j) {
          const Words high = KeyCodes<2>::words(tile, layout, channel, token + i + j * kLanes);
          const Floats code = low_bits<2>(high >> (2 * (channel % KeyCodes<2>::kChannels))) * 4.0f + low[j];
          save(out + channel * stride + i + j * kLanes, code * scales[channel] + zeros[channel]);
        }
      });
    }
  }
}

template <class T, int BITS>
void dequantize_value_codes(const Layout& layout, const char* tile, int token, float* out, int stride) {
  alignas(64) float scales[kChunkTokens], zeros[kChunkTokens];
  for (int group = 0; group < layout.num_value_groups; ++group) {
    const int64_t first = int64_t(group) * layout.group_size + token;
    for (int i = 0; i < kChunkTokens; i += kLanes) {
      save(scales + i, to_floats(reinterpret_cast<const T*>(tile + layout.v_scale_offset) + first + i));
      save(zeros + i, to_floats(reinterpret_cast<const T*>(tile + layout.v_zero_offset) + first + i));
    }
    const int end_channel = at_most((group + 1) * layout.group_size, layout.head_dim);
    for (int channel = group * layout.group_size; channel < end_channel; channel += kUnitChannels) {
      for (int i = 0; i < kChunkTokens; i += 8) {
        const ValueCodes<BITS> codes(tile, layout, (token + i) / 8, channel);
        unrolled<8>([&]<int TOKEN>() __attribute__((always_inline)) {
          Floats a = codes.template code<TOKEN, 0>() * scales[i + TOKEN] + zeros[i + TOKEN];
          Floats b = codes.template code<TOKEN, 1>() * scales[i + TOKEN] + zeros[i + TOKEN];
          ValueCodes<BITS>::in_channel_order(a, b);
          save(out + (i + TOKEN) * stride + channel, a);
          save(out + (i + TOKEN) * stride + channel + kLanes, b);
        });
      }
    }
  }
}

// out[channel * stride + i] of the rows [count], a multiple of kLanes.
template <class T>
void transpose_rows(const T* const* rows, int count, int head_dim, float* out, int stride) {
  for (int i = 0; i < count; i += kLanes) {
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      Floats block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = to_floats(rows[i + j] + channel);
      transpose(block);
      for (int j = 0; j < kLanes; ++j) save(out + (channel + j) * stride + i, block[j]);
    }
  }
}

// out[channel * stride + i] is that channel of token i.
template <class T>
void dequantize_keys(const Layout& layout, const char* tile, int token, float* out, int stride) {
  if (layout.k_bits == 16) {
    const T* rows[kChunkTokens];
    for (int i = 0; i < kChunkTokens; ++i) rows[i] = element_row<T>(layout, tile, layout.k_codes_offset, token + i);
    return transpose_rows<T>(rows, kChunkTokens, layout.head_dim, out, stride);
  }
  with_bits(layout.k_bits, [&]<int BITS>() { dequantize_key_codes<T, BITS>(layout, tile, token, out, stride); });
  if (layout.boosted_channels > 0) dequantize_boosted<T>(layout, tile, token, out, stride);
}

// out[i * stride + channel]; channels past head_dim, up to a multiple of kUnitChannels, are written too.
template <class T>
void dequantize_values(const Layout& layout, const char* tile, int token, float* out, int stride) {
  if (layout.v_bits == 16) {
    for (int i = 0; i < kChunkTokens; ++i) {
      const T* row = element_row<T>(layout, tile, layout.v_codes_offset, token + i);
      for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
        save(out + i * stride + channel, to_floats(row + channel));
      }
    }
    return;
  }
  with_bits(layout.v_bits, [&]<int BITS>() { dequantize_value_codes<T, BITS>(layout, tile, token, out, stride); });
}

}  // namespace kivi::cpu::KIVI_ISA
