// decode: attention of few query rows a request over its quantized pages and its full-precision tokens.
//
// A task is one KV head of one request and one split of its tokens. Its rows (query heads that share the KV head, times
// the rows of a speculative step) go in blocks of up to kMaxRows, so that codes are unpacked once for all of them.
// Tokens go in blocks of 256: scores, softmax, values. Nothing is dequantized: scales are folded into the query and
// into the softmax weights, in float32 (quantized_float.h) or as bytes (quantized_bytes.h). Bound by instructions, not
// by memory.
//
// How a request is split depends on its own length only, and the last task of a KV head combines the splits in order:
// results do not depend on the batch, the number of threads or the blocks. Scratch is bounded by kMaxSplits a request.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "page.h"
#include "quantized_bytes.h"
#include "quantized_float.h"
#include "rotate.h"
#include "row_block.h"
#include "threads.h"

namespace kivi::cpu::KIVI_ISA {

constexpr int kSplitTokens = 1024;
constexpr int kMaxSplits = 64;

// Tokens of a split: 1,024, or more where a request would have too many of them.
KIVI_INLINE int split_tokens(int num_tokens) {
  return kSplitTokens * ((num_tokens - 1) / (kSplitTokens * kMaxSplits) + 1);
}

#if defined(__AVX512VNNI__)
template <class T, int ROWS>
using QuantizedTiles = std::conditional_t<sizeof(T) == 2, ByteTiles<T, ROWS>, FloatTiles<T, ROWS>>;
#else
template <class T, int ROWS>
using QuantizedTiles = FloatTiles<T, ROWS>;
#endif

// Turns the scores of rows [first_row, first_row + ROWS) into weights and scales their older sums.
template <int ROWS>
KIVI_INLINE void softmax_rows(RowBlock& block, int first_row, int count, int head_dim, float soft_cap) {
  float correction[ROWS];
  softmax_step<ROWS>(block.scores[first_row], kBlockTokens, count, soft_cap, block.row_max + first_row,
                     block.row_sum + first_row, correction);
  for (int row = 0; row < ROWS; ++row) {
    float* sums = block.sums[first_row + row];
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      save(sums + channel, load<Floats>(sums + channel) * correction[row]);
    }
  }
}

// The tiles of `count` groups from `start` on; null where one has no page.
KIVI_INLINE void find_tiles(const AttentionParams& params, int request, int head, int start, int count,
                            const char** tiles) {
  for (int i = 0; i < count; ++i) {
    tiles[i] = tile_of(params.layout, params.quantized, request, head, start + i * params.layout.group_size);
  }
}

// For what is needed at once and in full, where Prefetcher comes too late.
KIVI_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// -------------------------------------------------------------------------------------------------- tokens as elements

// scores[first_row + i][first ... first + kLanes - 1] of as many keys.
template <class T, int ROWS>
void key_scores(int head_dim, const T* const* keys, RowBlock& block, int first_row, int first) {
  Floats partial[ROWS][kLanes];
  for (int token = 0; token < kLanes; ++token) {
    Floats sums[ROWS] = {};
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      const Floats key = to_floats(keys[token] + channel);
      for (int row = 0; row < ROWS; ++row) sums[row] += key * load<Floats>(block.query[first_row + row] + channel);
    }
    for (int row = 0; row < ROWS; ++row) partial[row][token] = sums[row];
  }
  for (int row = 0; row < ROWS; ++row) {
    save(block.scores[first_row + row] + first, reduce_each<Add>(partial[row]));
  }
}

template <class T, int ROWS, int VECTORS>
void add_channels(const T* const* values, int count, int channel, RowBlock& block, int first_row, int first) {
  Floats sums[ROWS][VECTORS] = {};
  for (int token = 0; token < count; ++token) {
    for (int i = 0; i < VECTORS; ++i) {
      const Floats value = to_floats(values[token] + channel + i * kLanes);
      for (int row = 0; row < ROWS; ++row) sums[row][i] += value * block.scores[first_row + row][first + token];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    float* out = block.sums[first_row + row] + channel;
    for (int i = 0; i < VECTORS; ++i) save(out + i * kLanes, load<Floats>(out + i * kLanes) + sums[row][i]);
  }
}

// Adds `count` values times the weights from `first` on.
template <class T, int ROWS>
void add_values(int head_dim, const T* const* values, int count, RowBlock& block, int first_row, int first) {
  int channel = 0;
  for (; channel + 2 * kLanes <= head_dim; channel += 2 * kLanes) {
    add_channels<T, ROWS, 2>(values, count, channel, block, first_row, first);
  }
  if (channel < head_dim) add_channels<T, ROWS, 1>(values, count, channel, block, first_row, first);
}

// Scores of tiles whose keys have 16 bits.
template <class T, int ROWS>
void element_scores(const Layout& layout, const char* const* tiles, int num_tiles, RowBlock& block) {
  const T* keys[kLanes];
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    for (int token = 0; token < layout.group_size; token += kLanes) {
      for (int j = 0; j < kLanes; ++j) keys[j] = element_row<T>(layout, tiles[i], layout.k_codes_offset, token + j);
      key_scores<T, ROWS>(layout.head_dim, keys, block, 0, i * layout.group_size + token);
    }
  }
}

// Adds weighted values of tiles whose values have 16 bits. Tokens below `first` have no weight and may be anything.
template <class T, int ROWS>
void add_element_values(const Layout& layout, const char* const* tiles, int num_tiles, int first, RowBlock& block) {
  const T* values[kMaxGroup];
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[i] == nullptr) continue;
    int count = 0;
    const int first_token = at_least(first - i * layout.group_size, 0);
    for (int token = first_token; token < layout.group_size; ++token) {
      values[count++] = element_row<T>(layout, tiles[i], layout.v_codes_offset, token);
    }
    add_values<T, ROWS>(layout.head_dim, values, count, block, 0, i * layout.group_size + first_token);
  }
}

// ----------------------------------------------------------------------------------------------------- quantized pages

// Tokens [first, end) from quantized pages; `end` is a multiple of the group size.
template <class T, int ROWS>
void attend_quantized(const AttentionParams& params, int request, int head, int first, int end, RowBlock& block) {
  const Layout& layout = params.layout;
  const int group_size = layout.group_size;
  QuantizedTiles<T, ROWS> quantized(layout, block);
  const char* tiles[2][kBlockTiles];  // of this block and of the next one, which is fetched meanwhile
  int start = first / group_size * group_size;
  int num_tiles = at_most(end - start, kBlockTokens) / group_size;
  find_tiles(params, request, head, start, num_tiles, tiles[0]);
  for (int i = 0; i < num_tiles; ++i) {
    if (tiles[0][i] != nullptr) prefetch(tiles[0][i], layout.tile_bytes);
  }
  const int lines_per_step = (layout.tile_bytes / 64 - 1) / Prefetcher::steps_per_tile(layout) + 1;
  for (int parity = 0; num_tiles > 0; parity ^= 1) {
    const int next = start + num_tiles * group_size, num_next = at_most(end - next, kBlockTokens) / group_size;
    find_tiles(params, request, head, next, num_next, tiles[parity ^ 1]);
    for (int i = num_next; i < num_tiles; ++i) tiles[parity ^ 1][i] = nullptr;
    const Prefetcher ahead{tiles[parity ^ 1], lines_per_step};
    if (layout.k_bits == 16) {
      element_scores<T, ROWS>(layout, tiles[parity], num_tiles, block);
    } else {
      quantized.scores(layout, tiles[parity], num_tiles, block, ahead);
    }
    for (int i = 0; i < num_tiles; ++i) {
      // Tokens that are not there, and sinks, which are read in full precision.
      const int num_masked = tiles[parity][i] == nullptr ? group_size : first - start - i * group_size;
      for (int token = i * group_size; token < i * group_size + num_masked; ++token) {
        for (int row = 0; row < ROWS; ++row) block.scores[row][token] = -kInfinity;
      }
    }
    softmax_rows<ROWS>(block, 0, num_tiles * group_size, layout.head_dim, params.logits_soft_cap);
    if (layout.v_bits == 16) {
      add_element_values<T, ROWS>(layout, tiles[parity], num_tiles, first - start, block);
    } else {
      quantized.values(layout, tiles[parity], num_tiles, block, ahead);
    }
    start = next;
    num_tiles = num_next;
  }
}

// ---------------------------------------------------------------------------------------------- full-precision tokens

// Attends `count` tokens; their values lie value_offset elements after their keys.
template <class T>
void attend_tokens(const AttentionParams& params, const T** tokens, int count, int64_t value_offset, RowBlock& block,
                   int first_row, int end_row) {
  if (count == 0) return;
  const int head_dim = params.layout.head_dim, padded = round_up(count, kLanes);
  for (int i = count; i < padded; ++i) tokens[i] = tokens[0];
  with_rows<kMaxRows>(end_row - first_row, [&]<int ROWS>() {
    for (int i = 0; i < padded; i += kLanes) key_scores<T, ROWS>(head_dim, tokens + i, block, first_row, i);
  });
  for (int row = first_row; row < end_row; ++row) {
    for (int i = count; i < padded; ++i) block.scores[row][i] = -kInfinity;
  }
  for (int i = 0; i < count; ++i) tokens[i] += value_offset;
  with_rows<kMaxRows>(end_row - first_row, [&]<int ROWS>() {
    softmax_rows<ROWS>(block, first_row, padded, head_dim, params.logits_soft_cap);
    add_values<T, ROWS>(head_dim, tokens, count, block, first_row, 0);
  });
}

// Tokens [first, end) from full-precision pages.
template <class T>
void attend_full(const AttentionParams& params, int request, int head, int first, int end, RowBlock& block,
                 int first_row, int end_row) {
  for (int start = first; start < end; start += kBlockTokens) {
    const T* tokens[kBlockTokens];
    int count = 0;
    for (int position = start; position < at_most(start + kBlockTokens, end); ++position) {
      const T* token = full_token_of<T>(params.layout, params.full, request, head, position);
      if (token == nullptr) continue;
      prefetch(token, 2 * params.layout.head_dim * sizeof(T));
      tokens[count++] = token;
    }
    attend_tokens<T>(params, tokens, count, params.layout.head_dim, block, first_row, end_row);
  }
}

// -------------------------------------------------------------------------------------------------------------- tasks

// What one request needs; rows are numbered (row of the step) * ratio + (query head of the group).
struct Request {
  int index;
  int first_row;  // in the batch
  int num_rows;   // of one KV head
  int num_tokens;
  int num_before;  // tokens before the step's
  int num_splits;

  Request(const AttentionParams& params, int index) : index(index) {
    const int32_t* starts = params.batch.query_start_loc + index;
    const int num_new = starts[1] - starts[0];
    first_row = starts[0];
    num_rows = num_new * (params.num_heads / params.layout.num_kv_heads);
    num_tokens = params.batch.seq_lens[index];
    num_before = num_tokens - num_new;
    num_splits = num_new == 0 ? 0 : (num_tokens - 1) / split_tokens(num_tokens) + 1;
  }

  int num_tasks(const Layout& layout) const { return num_splits * layout.num_kv_heads; }

  // Floats of the partial results of a row: its weighted values, maximum and sum.
  int64_t partial_floats(const Layout& layout) const {
    return num_splits < 2 ? 0 : int64_t(num_tasks(layout)) * num_rows * (layout.head_dim + 2);
  }
};

template <class T>
T* row_of(const Rows& rows, const AttentionParams& params, const Request& request, int head, int row) {
  const int ratio = params.num_heads / params.layout.num_kv_heads;
  return static_cast<T*>(rows.data) + (request.first_row + row / ratio) * rows.token_stride +
         (head * ratio + row % ratio) * rows.head_stride;
}

template <class T>
void write_row(T* out, const float* sums, float row_sum, int head_dim) {
  const float factor = row_sum == 0 ? 0.0f : 1.0f / row_sum;
  for (int channel = 0; channel < head_dim; channel += kLanes) {
    from_floats(out + channel, load<Floats>(sums + channel) * factor);
  }
}

// One split of one KV head. `partial` [num_rows][head_dim + 2] takes the result, or the output where it is null.
template <class T>
void attend_split(const AttentionParams& params, const Request& request, int head, int split, float* partial) {
  const Layout& layout = params.layout;
  const int head_dim = layout.head_dim, ratio = params.num_heads / layout.num_kv_heads;
  const int length = split_tokens(request.num_tokens);
  const int first = split * length, end = at_most(first + length, request.num_tokens);
  const float scale = query_scale(params.scale, params.logits_soft_cap);
  const auto boundary_of = [&](int row) { return boundary(layout, request.num_before + row / ratio + 1); };
  RowBlock block;
  int end_row;
  for (int first_row = 0; first_row < request.num_rows; first_row = end_row) {
    // Blocks of about the same size; their rows share a boundary, so that they read the same quantized tokens.
    const int num_left = request.num_rows - first_row, num_blocks = (num_left - 1) / kMaxRows + 1;
    const int quantized_end = boundary_of(first_row), limit = first_row + (num_left - 1) / num_blocks + 1;
    end_row = first_row + 1;
    while (end_row < limit && boundary_of(end_row) == quantized_end) ++end_row;
    const int rows = end_row - first_row;
    for (int row = 0; row < rows; ++row) {
      const T* query = row_of<T>(params.query, params, request, head, first_row + row);
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        save(block.query[row] + channel, to_floats(query + channel) * scale);
      }
      for (int channel = 0; channel < kMaxHeadDim; ++channel) block.sums[row][channel] = 0;
      block.row_max[row] = -kInfinity;
      block.row_sum[row] = 0;
    }
    const int sinks = at_least(layout.sink_tokens, 0);
    const int quantized_first = at_least(first, sinks), quantized_last = at_most(end, quantized_end);
    if (quantized_first < quantized_last) {
      with_rows<kMaxRows>(rows, [&]<int ROWS>() {
        attend_quantized<T, ROWS>(params, request.index, head, quantized_first, quantized_last, block);
      });
      // So far the sums are over rotated values; what is added from here on is not rotated.
      for (int row = 0; layout.rotate_values && row < rows; ++row) rotate(block.sums[row], head_dim);
    }
    // Rows of the same position share their full-precision tokens: sinks, then from the boundary on.
    for (int row = 0, next; row < rows; row = next) {
      next = at_most((first_row + row) / ratio * ratio + ratio - first_row, rows);
      const int num_visible = request.num_before + (first_row + row) / ratio + 1;
      const int visible_end = at_most(end, num_visible);
      attend_full<T>(params, request.index, head, first, at_most(sinks, visible_end), block, row, next);
      attend_full<T>(params, request.index, head, at_least(first, at_least(quantized_end, sinks)), visible_end, block,
                     row, next);
    }
    for (int row = 0; row < rows; ++row) {
      if (partial == nullptr) {
        T* out = row_of<T>(params.output, params, request, head, first_row + row);
        write_row(out, block.sums[row], block.row_sum[row], head_dim);
      } else {
        float* out = partial + int64_t(first_row + row) * (head_dim + 2);
        std::memcpy(out, block.sums[row], head_dim * sizeof(float));
        out[head_dim] = block.row_max[row];
        out[head_dim + 1] = block.row_sum[row];
      }
    }
  }
}

// Merges the splits of one KV head: partials [num_splits][num_rows][head_dim + 2].
template <class T>
void combine(const AttentionParams& params, const Request& request, int head, const float* partials) {
  const int head_dim = params.layout.head_dim;
  const int64_t row_floats = head_dim + 2;
  for (int row = 0; row < request.num_rows; ++row) {
    const auto partial = [&](int split) { return partials + (int64_t(split) * request.num_rows + row) * row_floats; };
    float row_max = -kInfinity, row_sum = 0;
    for (int split = 0; split < request.num_splits; ++split) {
      const float split_max = partial(split)[head_dim];
      row_max = split_max > row_max ? split_max : row_max;
    }
    alignas(64) float sums[kMaxHeadDim] = {};
    for (int split = 0; split < request.num_splits; ++split) {
      const float* from = partial(split);
      if (from[head_dim] == -kInfinity && from[head_dim + 1] == 0) continue;  // saw no token of this row
      const float factor = exp2_of(from[head_dim] - row_max);
      row_sum += from[head_dim + 1] * factor;
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        save(sums + channel, load<Floats>(sums + channel) + load<Floats>(from + channel) * factor);
      }
    }
    write_row(row_of<T>(params.output, params, request, head, row), sums, row_sum, head_dim);
  }
}

// Kept by each calling thread from step to step: a fresh block of this size would be mapped and cleared every time.
struct Scratch {
  void* data = nullptr;
  size_t size = 0;

  void* at_least(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = std::malloc(bytes);
      size = data == nullptr ? 0 : bytes;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

template <class T>
void decode_batch(const AttentionParams& params, const Threads& threads) {
  const Layout& layout = params.layout;
  int64_t num_tasks = 0, num_floats = 0;
  for (int index = 0; index < params.batch.num_reqs; ++index) {
    const Request request(params, index);
    num_tasks += request.num_tasks(layout);
    num_floats += request.partial_floats(layout);
  }
  static thread_local Scratch scratch;
  const int64_t num_counters = int64_t(params.batch.num_reqs) * layout.num_kv_heads;
  auto* finished = static_cast<int32_t*>(scratch.at_least(num_counters * sizeof(int32_t) + num_floats * sizeof(float)));
  auto* partials = reinterpret_cast<float*>(finished + num_counters);
  std::memset(finished, 0, num_counters * sizeof(int32_t));

  parallel(threads, num_tasks, [&](auto next) {
    int64_t first_task = 0, first_float = 0;  // of `request`
    Request request(params, 0);
    for (int64_t task = next(); task >= 0; task = next()) {
      while (task >= first_task + request.num_tasks(layout)) {
        first_task += request.num_tasks(layout);
        first_float += request.partial_floats(layout);
        request = Request(params, request.index + 1);
      }
      const int head = int(task - first_task) / request.num_splits, split = int(task - first_task) % request.num_splits;
      if (request.num_splits == 1) {
        attend_split<T>(params, request, head, split, nullptr);
        continue;
      }
      const int64_t split_floats = int64_t(request.num_rows) * (layout.head_dim + 2);
      float* head_partials = partials + first_float + head * request.num_splits * split_floats;
      attend_split<T>(params, request, head, split, head_partials + split * split_floats);
      int32_t* done = finished + int64_t(request.index) * layout.num_kv_heads + head;
      if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) == request.num_splits) {
        combine<T>(params, request, head, head_partials);
      }
    }
  });
}

inline void decode(const AttentionParams& params, const Threads& threads) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return decode_batch<float>(params, threads);
    case Dtype::kBFloat16:
      return decode_batch<BFloat16>(params, threads);
    case Dtype::kFloat16:
      return decode_batch<Float16>(params, threads);
  }
}

}  // namespace kivi::cpu::KIVI_ISA
