// prefill: attention of a chunk of query rows over sinks, quantized pages, full-precision tokens and the chunk itself.
//
// A task is one KV head of one request and a tile of about 96 rows: consecutive positions times the query heads that
// share the KV head. Context tokens come in tiles of 64, converted to float32 once per task into a buffer that stays in
// the cache: keys transposed, so that both products broadcast a row's element against vectors of tokens (scores) or
// channels (values). The rest is FlashAttention: scores, online softmax, values, for a few rows at a time whose
// accumulators stay in registers. Bound by FMAs; the conversion is a few percent of them, and memory is read once per
// row tile.
//
// Whether a row sees a token is a bit: the scores of others are replaced by -inf. Their weight is then 0, and 0 times a
// value that is inf or NaN would still be NaN, so such a tile takes a slower path that leaves masked values out.
#pragma once

#include "decode.h"
#include "dequantize.h"

namespace kivi::cpu::KIVI_ISA {

constexpr int kTileRows = 96;
constexpr int kTileTokens = 64;
#if defined(__AVX512F__)
constexpr int kGemmRows = 6;  // 24 accumulators of 32 registers
constexpr int kGemmVectors = 4;
#else
constexpr int kGemmRows = 6;  // 12 of 16
constexpr int kGemmVectors = 2;
#endif

// Up to 64 context tokens as floats.
struct TokenTile {
  alignas(64) float keys[kMaxHeadDim][kTileTokens];
  alignas(64) float values[kTileTokens][kMaxHeadDim];
  uint64_t present;  // bit t: token t is there
  bool finite_values;

  // Keys of tokens that are not there may be anything, as their scores are replaced; values meet a weight of 0.
  void clear_absent_values(int head_dim) {
    for (int token = 0; token < kTileTokens; ++token) {
      if ((present >> token & 1) == 0) std::memset(values[token], 0, head_dim * sizeof(float));
    }
  }

  bool has_finite_values(int head_dim) const {
    Words largest{};  // magnitudes; inf and NaN have all exponent bits
    for (int token = 0; token < kTileTokens; ++token) {
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        const Words size = load<Words>(values[token] + channel) & 0x7fffffffu;
        largest = size > largest ? size : largest;
      }
    }
    bool finite = true;
    for (int lane = 0; lane < kLanes; ++lane) finite &= largest[lane] < 0x7f800000u;
    return finite;
  }
};

// --------------------------------------------------------------------------------------------------- filling the tile

// The tokens of quantized pages from `start`, a multiple of 32, to at least `end`.
template <class T>
void fill_quantized(const AttentionParams& params, int request, int head, int start, int end, TokenTile& out) {
  const Layout& layout = params.layout;
  out.present = 0;
  for (int position = start; position < end; position += kChunkTokens) {
    const int token = position % layout.group_size, column = position - start;
    const char* tile = tile_of(layout, params.quantized, request, head, position - token);
    if (tile == nullptr) continue;
    out.present |= uint64_t(0xffffffff) << column;
    dequantize_keys<T>(layout, tile, token, out.keys[0] + column, kTileTokens);
    dequantize_values<T>(layout, tile, token, out.values[column], kMaxHeadDim);
  }
  out.clear_absent_values(layout.head_dim);
  out.finite_values = layout.v_bits < 16 || out.has_finite_values(layout.head_dim);
}

// Tokens [start, end) from rows in full precision; row(position) gives its key and value, null where it is not there.
template <class T, class RowOf>
void fill_full(const Layout& layout, int start, int end, TokenTile& out, const RowOf& row) {
  out.present = 0;
  alignas(64) const T nothing[kMaxHeadDim] = {};
  const T* keys[kTileTokens];
  for (int token = 0; token < round_up(end - start, kLanes); ++token) {
    const T *key = nullptr, *value = nullptr;
    if (start + token < end) row(start + token, key, value);
    keys[token] = key == nullptr ? nothing : key;
    if (key == nullptr) continue;
    out.present |= uint64_t(1) << token;
    for (int channel = 0; channel < layout.head_dim; channel += kLanes) {
      save(out.values[token] + channel, to_floats(value + channel));
    }
  }
  out.clear_absent_values(layout.head_dim);
  out.finite_values = out.has_finite_values(layout.head_dim);
  transpose_rows<T>(keys, round_up(end - start, kLanes), layout.head_dim, out.keys[0], kTileTokens);
}

// -------------------------------------------------------------------------------------------------------- the row tile

// c [kGemmRows][VECTORS * 16] (+)= a [kGemmRows][depth] . b [depth][VECTORS * 16], in sums of 16 products: long sums in
// one register round more than a BLAS does. depth is a multiple of 16.
template <int VECTORS>
void gemm(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride, int depth,
          bool accumulate) {
  for (int start = 0; start < depth; start += 16) {
    Floats sums[kGemmRows][VECTORS] = {};
    for (int k = start; k < start + 16; ++k) {
      Floats column[VECTORS];
      for (int i = 0; i < VECTORS; ++i) column[i] = load<Floats>(b + k * b_stride + i * kLanes);
      for (int row = 0; row < kGemmRows; ++row) {
        const Floats x = splat(a[row * a_stride + k]);
        for (int i = 0; i < VECTORS; ++i) sums[row][i] += x * column[i];
      }
    }
    for (int row = 0; row < kGemmRows; ++row) {
      for (int i = 0; i < VECTORS; ++i) {
        float* out = c + row * c_stride + i * kLanes;
        save(out, accumulate || start > 0 ? load<Floats>(out) + sums[row][i] : sums[row][i]);
      }
    }
  }
}

// The same for any number of columns that is a multiple of 16.
KIVI_INLINE void gemm(const float* a, int a_stride, const float* b, int b_stride, float* c, int c_stride, int depth,
                      int columns, bool accumulate) {
  int first = 0;
  for (; first + kGemmVectors * kLanes <= columns; first += kGemmVectors * kLanes) {
    gemm<kGemmVectors>(a, a_stride, b + first, b_stride, c + first, c_stride, depth, accumulate);
  }
  for (; first < columns; first += kLanes) {
    gemm<1>(a, a_stride, b + first, b_stride, c + first, c_stride, depth, accumulate);
  }
}

struct RowRange {
  int position;
  int boundary;  // tokens below it are read from quantized pages
};

// The rows of a task; arrays are padded to a multiple of kGemmRows.
struct RowTile {
  int count;
  int head_dim;
  RowRange* range;  // [count]
  float* row_max;   // [count]
  float* row_sum;   // [count]
  float* query;     // [count][head_dim], times softmax scale (and log2 e)
  float* sums;      // [count][head_dim], weighted values, not yet divided by row_sum
};

// Bits [first, end) of a tile that starts at token `start`.
KIVI_INLINE uint64_t bit_range(int first, int end, int start) {
  const int low = at_least(first - start, 0), high = at_most(end - start, kTileTokens);
  if (low >= high) return 0;
  return (~uint64_t(0) >> (kTileTokens - (high - low))) << low;
}

KIVI_INLINE void mask_scores(float* scores, uint64_t visible) {
  for (int token = 0; token < kTileTokens; token += kLanes) {
    const Ints bits = Ints{} + int32_t(visible >> token & ((1u << kLanes) - 1));
    const Ints seen = (bits >> lane_index() & 1) != 0;
    save(scores + token, seen ? load<Floats>(scores + token) : splat(-kInfinity));
  }
}

// Attends one tile of tokens; visible(row range) are the tokens that a row sees.
template <class Visible>
void attend_tile(const TokenTile& tokens, RowTile& rows, float soft_cap, const Visible& visible) {
  const int head_dim = rows.head_dim;
  for (int first = 0; first < rows.count; first += kGemmRows) {
    uint64_t masks[kGemmRows], any = 0, all = ~uint64_t(0);
    for (int i = 0; i < kGemmRows; ++i) {
      masks[i] = visible(rows.range[first + i]) & tokens.present;
      any |= masks[i];
      all &= masks[i];
    }
    if (any == 0) continue;
    alignas(64) float scores[kGemmRows][kTileTokens];
    gemm(rows.query + int64_t(first) * head_dim, head_dim, tokens.keys[0], kTileTokens, scores[0], kTileTokens,
         head_dim, kTileTokens, false);
    float* sums = rows.sums + int64_t(first) * head_dim;
    for (int i = 0; i < kGemmRows; ++i) {
      if (~masks[i] != 0) mask_scores(scores[i], masks[i]);
    }
    float correction[kGemmRows];
    softmax_step<kGemmRows>(scores[0], kTileTokens, kTileTokens, soft_cap, rows.row_max + first, rows.row_sum + first,
                            correction);
    for (int i = 0; i < kGemmRows; ++i) {
      if (correction[i] == 1.0f) continue;
      for (int channel = 0; channel < head_dim; channel += kLanes) {
        save(sums + i * head_dim + channel, load<Floats>(sums + i * head_dim + channel) * correction[i]);
      }
    }
    if (tokens.finite_values || ~all == 0) {
      gemm(scores[0], kTileTokens, tokens.values[0], kMaxHeadDim, sums, head_dim, kTileTokens, head_dim, true);
      continue;
    }
    for (int i = 0; i < kGemmRows; ++i) {
      for (int token = 0; token < kTileTokens; ++token) {
        if ((masks[i] >> token & 1) == 0) continue;
        for (int channel = 0; channel < head_dim; channel += kLanes) {
          float* out = sums + i * head_dim + channel;
          save(out, load<Floats>(out) + load<Floats>(tokens.values[token] + channel) * scores[i][token]);
        }
      }
    }
  }
}

// A request's rows in tiles; rows after the prompt have tiles of their own, as they attend differently.
struct Chunk {
  int first_row;   // in the batch
  int num_before;  // tokens before the chunk
  int num_prompt;  // positions of the chunk that belong to the prompt
  int num_new;
  int tile_positions;
  int num_prompt_tiles;
  int num_tiles;

  Chunk(const AttentionParams& params, int request) {
    const int32_t* starts = params.batch.query_start_loc + request;
    first_row = starts[0];
    num_new = starts[1] - starts[0];
    num_before = params.batch.seq_lens[request] - num_new;
    num_prompt = at_most(at_least(params.num_prompt_tokens[request] - num_before, 0), num_new);
    tile_positions = at_least(kTileRows / (params.num_heads / params.layout.num_kv_heads), 1);
    num_prompt_tiles = (num_prompt + tile_positions - 1) / tile_positions;
    num_tiles = num_prompt_tiles + (num_new - num_prompt + tile_positions - 1) / tile_positions;
  }
};

template <class T>
void attend_rows(const AttentionParams& params, int request, const Chunk& chunk, int head, int tile_index,
                 TokenTile& tokens, RowTile& rows) {
  const Layout& layout = params.layout;
  const int head_dim = layout.head_dim, ratio = params.num_heads / layout.num_kv_heads;
  const bool in_prompt = tile_index < chunk.num_prompt_tiles;
  const int first = in_prompt ? tile_index * chunk.tile_positions
                              : chunk.num_prompt + (tile_index - chunk.num_prompt_tiles) * chunk.tile_positions;
  const int end = at_most(first + chunk.tile_positions, in_prompt ? chunk.num_prompt : chunk.num_new);
  const int chunk_boundary = at_most(boundary(layout, chunk.num_before + 1), chunk.num_before);
  const float scale = query_scale(params.scale, params.logits_soft_cap);
  const auto row_of = [&](const Rows& tensor, int row) {
    return static_cast<T*>(tensor.data) + (chunk.first_row + first + row / ratio) * tensor.token_stride +
           (head * ratio + row % ratio) * tensor.head_stride;
  };

  rows.count = round_up((end - first) * ratio, kGemmRows);
  rows.head_dim = head_dim;
  std::memset(rows.sums, 0, int64_t(rows.count) * head_dim * sizeof(float));
  for (int row = 0; row < rows.count; ++row) {
    float* query = rows.query + int64_t(row) * head_dim;
    rows.row_max[row] = -kInfinity;
    rows.row_sum[row] = 0;
    if (row >= (end - first) * ratio) {  // padding sees nothing
      std::memset(query, 0, head_dim * sizeof(float));
      rows.range[row] = {-1, 0};
      continue;
    }
    for (int channel = 0; channel < head_dim; channel += kLanes) {
      save(query + channel, to_floats(row_of(params.query, row) + channel) * scale);
    }
    const int position = chunk.num_before + first + row / ratio;
    rows.range[row] = {position, in_prompt ? chunk_boundary : boundary(layout, position + 1)};
  }
  const int first_boundary = rows.range[0].boundary, last_boundary = rows.range[(end - first) * ratio - 1].boundary;
  const int visible_end = chunk.num_before + end, sinks = layout.sink_tokens;

  const auto full_row = [&](int position, const T*& key, const T*& value) {
    if (position >= chunk.num_before) {
      const int64_t row = chunk.first_row + position - chunk.num_before;
      key = static_cast<const T*>(params.key.data) + row * params.key.token_stride + head * params.key.head_stride;
      value =
          static_cast<const T*>(params.value.data) + row * params.value.token_stride + head * params.value.head_stride;
    } else {
      key = full_token_of<T>(layout, params.full, request, head, position);
      value = key + head_dim;
    }
  };

  for (int start = sinks / kChunkTokens * kChunkTokens; start < last_boundary; start += kTileTokens) {
    const int tile_end = at_most(start + kTileTokens, last_boundary);
    fill_quantized<T>(params, request, head, start, tile_end, tokens);
    attend_tile(tokens, rows, params.logits_soft_cap,
                [&](const RowRange& row) { return bit_range(sinks, row.boundary, start); });
  }
  if (layout.rotate_values && sinks < last_boundary) {
    // So far the sums are over rotated values; what is added from here on is not rotated.
    for (int row = 0; row < rows.count; ++row) rotate(rows.sums + int64_t(row) * head_dim, head_dim);
  }
  for (int start = 0; start < at_most(sinks, visible_end); start += kTileTokens) {
    fill_full<T>(layout, start, at_most(start + kTileTokens, at_most(sinks, visible_end)), tokens, full_row);
    attend_tile(tokens, rows, params.logits_soft_cap,
                [&](const RowRange& row) { return bit_range(0, row.position + 1, start); });
  }
  for (int start = at_least(first_boundary, sinks); start < visible_end; start += kTileTokens) {
    fill_full<T>(layout, start, at_most(start + kTileTokens, visible_end), tokens, full_row);
    attend_tile(tokens, rows, params.logits_soft_cap,
                [&](const RowRange& row) { return bit_range(row.boundary, row.position + 1, start); });
  }
  for (int row = 0; row < (end - first) * ratio; ++row) {
    write_row(row_of(params.output, row), rows.sums + int64_t(row) * head_dim, rows.row_sum[row], head_dim);
  }
}

template <class T>
void prefill_batch(const AttentionParams& params, const Threads& threads) {
  const Layout& layout = params.layout;
  int64_t num_tasks = 0;
  for (int request = 0; request < params.batch.num_reqs; ++request) {
    num_tasks += int64_t(Chunk(params, request).num_tiles) * layout.num_kv_heads;
  }
  const int ratio = params.num_heads / layout.num_kv_heads;
  const int64_t max_rows = round_up(at_least(kTileRows, ratio), kGemmRows);

  parallel(threads, num_tasks, [&](auto next) {
    const int64_t row_bytes = max_rows * layout.head_dim * sizeof(float);
    char* scratch = static_cast<char*>(std::aligned_alloc(
        64, round_up(sizeof(TokenTile) + 2 * row_bytes + max_rows * (sizeof(RowRange) + 2 * sizeof(float)), 64)));
    auto& tokens = *reinterpret_cast<TokenTile*>(scratch);
    RowTile rows;
    rows.query = reinterpret_cast<float*>(scratch + sizeof(TokenTile));
    rows.sums = reinterpret_cast<float*>(scratch + sizeof(TokenTile) + row_bytes);
    rows.row_max = reinterpret_cast<float*>(scratch + sizeof(TokenTile) + 2 * row_bytes);
    rows.row_sum = rows.row_max + max_rows;
    rows.range = reinterpret_cast<RowRange*>(rows.row_sum + max_rows);
    int request = 0;
    int64_t first = 0;  // task of the request
    Chunk chunk(params, 0);
    for (int64_t task = next(); task >= 0; task = next()) {
      while (task >= first + int64_t(chunk.num_tiles) * layout.num_kv_heads) {
        first += int64_t(chunk.num_tiles) * layout.num_kv_heads;
        chunk = Chunk(params, ++request);
      }
      // The last tiles see the most tokens: they go first, so that threads end together.
      const int index = int(task - first);
      attend_rows<T>(params, request, chunk, index % layout.num_kv_heads,
                     chunk.num_tiles - 1 - index / layout.num_kv_heads, tokens, rows);
    }
    std::free(scratch);
  });
}

inline void prefill(const AttentionParams& params, const Threads& threads) {
  switch (params.dtype) {
    case Dtype::kFloat32:
      return prefill_batch<float>(params, threads);
    case Dtype::kBFloat16:
      return prefill_batch<BFloat16>(params, threads);
    case Dtype::kFloat16:
      return prefill_batch<Float16>(params, threads);
  }
}

}  // namespace kivi::cpu::KIVI_ISA
