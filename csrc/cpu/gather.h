// gather: tokens of paged requests as rows in the model's type, for attention that reads neither pages nor codes.
//
// A task is what is asked for of one group of one KV head of one request. Of its tile, 32 tokens at a time become
// floats in a buffer that stays in the cache: keys by channel, which are then transposed in registers, and values by
// token, which are turned back where they are rotated. Other tokens and what has 16 bits are copied; tokens without a
// page are 0. Tasks of the same tokens follow each other, as their rows do. Bound by the memory that is written.
#pragma once

#include "dequantize.h"
#include "rotate.h"
#include "threads.h"

namespace kivi::cpu::KIVI_ISA {

// The output for one KV head of one request, from position `first` on.
template <class T>
struct GatheredRows {
  T *keys, *values;
  int64_t key_stride, value_stride;
  int first;

  GatheredRows(const GatherParams& params, int request, int head)
      : key_stride(params.key.token_stride), value_stride(params.value.token_stride), first(params.first[request]) {
    const int64_t row = params.start_loc[request];
    keys = static_cast<T*>(params.key.data) + row * key_stride + head * params.key.head_stride;
    values = static_cast<T*>(params.value.data) + row * value_stride + head * params.value.head_stride;
  }

  T* key(int position) const { return keys + (position - first) * key_stride; }
  T* value(int position) const { return values + (position - first) * value_stride; }
};

// Elements as they are; 0 where there is no page.
template <class T>
void copy_row(T* to, const T* from, int head_dim) {
  if (from == nullptr) {
    std::memset(to, 0, head_dim * sizeof(T));
  } else {
    std::memcpy(to, from, head_dim * sizeof(T));
  }
}

// The largest code may lie a rounding beyond the largest number.
template <class T>
KIVI_INLINE void write_finite(T* out, Floats x) {
  from_floats(out, min_or_nan(max_or_nan(x, splat(-Limits<T>::kMax)), splat(Limits<T>::kMax)));
}

// Positions [first, end), which are in the same chunk of a tile.
template <class T>
void gather_keys(const Layout& layout, const char* tile, int first, int end, const GatheredRows<T>& rows) {
  const int start = first / kChunkTokens * kChunkTokens;
  alignas(64) float keys[kMaxHeadDim][kChunkTokens];
  dequantize_keys<T>(layout, tile, start % layout.group_size, keys[0], kChunkTokens);
  for (int block_start = first / kLanes * kLanes; block_start < end; block_start += kLanes) {
    for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
      Floats block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load<Floats>(keys[channel + i] + block_start - start);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) {
        const int position = block_start + i;
        if (first <= position && position < end) write_finite(rows.key(position) + channel, block[i]);
      }
    }
  }
}

template <class T>
void gather_values(const Layout& layout, const char* tile, int first, int end, const GatheredRows<T>& rows) {
  const int start = first / kChunkTokens * kChunkTokens;
  alignas(64) float values[kChunkTokens][kMaxHeadDim];
  dequantize_values<T>(layout, tile, start % layout.group_size, values[0], kMaxHeadDim);
  for (int position = first; position < end; ++position) {
    float* value = values[position - start];
    if (layout.rotate_values) rotate(value, layout.head_dim);
    for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
      write_finite(rows.value(position) + channel, load<Floats>(value + channel));
    }
  }
}

// Positions [first, end), which are in the same group.
template <class T>
void gather_group(const GatherParams& params, int request, int head, int first, int end) {
  const Layout& layout = params.layout;
  const int head_dim = layout.head_dim, group_start = first / layout.group_size * layout.group_size;
  const GatheredRows<T> rows(params, request, head);
  const int quantized_first = at_least(first, layout.sink_tokens);
  const int quantized_end = at_most(end, params.boundary[request]);
  for (int position = first; position < end; ++position) {
    if (quantized_first <= position && position < quantized_end) continue;
    const T* key = full_token_of<T>(layout, params.full, request, head, position);
    copy_row(rows.key(position), key, head_dim);
    copy_row(rows.value(position), key == nullptr ? nullptr : key + head_dim, head_dim);
  }
  if (quantized_first >= quantized_end) return;
  const char* tile = tile_of(layout, params.quantized, request, head, group_start);
  const auto row_of = [&](int32_t offset, int position) {
    return tile == nullptr ? nullptr : element_row<T>(layout, tile, offset, position - group_start);
  };
  for (int start = quantized_first, next; start < quantized_end; start = next) {
    next = at_most(start / kChunkTokens * kChunkTokens + kChunkTokens, quantized_end);
    if (tile == nullptr || layout.k_bits == 16) {
      for (int i = start; i < next; ++i) copy_row(rows.key(i), row_of(layout.k_codes_offset, i), head_dim);
    } else {
      gather_keys(layout, tile, start, next, rows);
    }
    if (tile == nullptr || layout.v_bits == 16) {
      for (int i = start; i < next; ++i) copy_row(rows.value(i), row_of(layout.v_codes_offset, i), head_dim);
    } else {
      gather_values(layout, tile, start, next, rows);
    }
  }
}

template <class T>
void gather_batch(const GatherParams& params, const Threads& threads) {
  const int group_size = params.layout.group_size, num_heads = params.layout.num_kv_heads;
  const auto num_rows = [&](int request) { return params.start_loc[request + 1] - params.start_loc[request]; };
  const auto num_groups = [&](int request) {
    if (num_rows(request) == 0) return 0;
    return (params.first[request] + num_rows(request) - 1) / group_size - params.first[request] / group_size + 1;
  };
  int64_t count = 0;
  for (int request = 0; request < params.num_reqs; ++request) count += int64_t(num_groups(request)) * num_heads;
  parallel(threads, count, [&](auto next) {
    int request = 0;
    int64_t first_task = 0;  // of the request
    for (int64_t task = next(); task >= 0; task = next()) {
      while (task >= first_task + int64_t(num_groups(request)) * num_heads) {
        first_task += int64_t(num_groups(request++)) * num_heads;
      }
      const int index = int((task - first_task) / num_heads), head = int((task - first_task) % num_heads);
      const int first = params.first[request], start = (first / group_size + index) * group_size;
      gather_group<T>(params, request, head, at_least(first, start),
                      at_most(first + num_rows(request), start + group_size));
    }
  });
}

inline void gather(const GatherParams& params, const Threads& threads) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return gather_batch<float>(params, threads);
    case Dtype::kBFloat16:
      return gather_batch<BFloat16>(params, threads);
    case Dtype::kFloat16:
      return gather_batch<Float16>(params, threads);
  }
}

}  // namespace kivi::cpu::KIVI_ISA
