// gather: tokens of paged requests as rows in the model's type, for attention that reads neither pages nor codes.
//
// A task is what is asked for of one group of one KV head of one request. Of its tile, 32 tokens at a time become
// floats in a buffer that stays in the cache: keys by channel, which are then transposed in registers, and values by
// token, which are turned back where they are rotated. Other tokens are copied; those without a page are 0. Tasks of
// the same tokens follow each other, as their rows do. Bound by the memory that is written.
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

  // The value lies value_offset elements after the key, which is null where there is no page.
  void copy(int position, const T* from, int64_t value_offset, int head_dim) const {
    if (from == nullptr) {
      std::memset(key(position), 0, head_dim * sizeof(T));
      std::memset(value(position), 0, head_dim * sizeof(T));
    } else {
      std::memcpy(key(position), from, head_dim * sizeof(T));
      std::memcpy(value(position), from + value_offset, head_dim * sizeof(T));
    }
  }
};

// The largest code may lie a rounding beyond the largest number.
template <class T>
KIVI_INLINE void write_finite(T* out, Floats x) {
  from_floats(out, min_or_nan(max_or_nan(x, splat(-Limits<T>::kMax)), splat(Limits<T>::kMax)));
}

// Positions [first, end), which are in the same chunk of a tile.
template <class T>
void gather_chunk(const Layout& layout, const char* tile, int first, int end, const GatheredRows<T>& rows) {
  const int head_dim = layout.head_dim, start = first / kChunkTokens * kChunkTokens, token = start % layout.group_size;
  alignas(64) float buffer[kChunkTokens * kMaxHeadDim];
  dequantize_keys<T>(layout, tile, token, buffer, kChunkTokens);
  for (int block = first / kLanes * kLanes; block < end; block += kLanes) {
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      Floats keys[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        keys[i] = load<Floats>(buffer + (channel + i) * kChunkTokens + block - start);
      }
      transpose(keys);
      for (int i = 0; i < kLanes; ++i) {
        if (first <= block + i && block + i < end) write_finite(rows.key(block + i) + channel, keys[i]);
      }
    }
  }
  dequantize_values<T>(layout, tile, token, buffer, kMaxHeadDim);
  for (int position = first; position < end; ++position) {
    float* value = buffer + (position - start) * kMaxHeadDim;
    if (layout.rotate_values) rotate(value, head_dim);
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      write_finite(rows.value(position) + channel, load<Floats>(value + channel));
    }
  }
}

// Positions [first, end), which are in the same group.
template <class T>
void gather_group(const GatherParams& params, int request, int head, int first, int end) {
  const Layout& layout = params.layout;
  const int head_dim = layout.head_dim;
  const GatheredRows<T> rows(params, request, head);
  const int quantized_first = at_least(first, layout.sink_tokens);
  const int quantized_end = at_most(end, params.boundary[request]);
  for (int position = first; position < end; ++position) {
    if (quantized_first <= position && position < quantized_end) continue;
    rows.copy(position, full_token_of<T>(layout, params.full, request, head, position), head_dim, head_dim);
  }
  if (quantized_first >= quantized_end) return;
  const int token = first % layout.group_size;
  const char* tile = tile_of(layout, params.quantized, request, head, first - token);
  if (tile != nullptr && !layout.full_precision) {
    for (int start = quantized_first, next; start < quantized_end; start = next) {
      next = at_most(start / kChunkTokens * kChunkTokens + kChunkTokens, quantized_end);
      gather_chunk<T>(layout, tile, start, next, rows);
    }
    return;
  }
  for (int position = quantized_first; position < quantized_end; ++position) {
    const T* key = tile == nullptr ? nullptr
                                   : reinterpret_cast<const T*>(tile + layout.k_codes_offset) +
                                         int64_t(position % layout.group_size) * head_dim;
    rows.copy(position, key, layout.v_codes_offset / int64_t(sizeof(T)), head_dim);
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
