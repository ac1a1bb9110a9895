// What the ops hand to the kernels: plain structs, no torch. Strides are bytes for pages and elements for the rest.
#pragma once

#include <cstdint>

// One name per entry of the flat list that Python passes, in the order of LAYOUT_FIELDS in vllm_kivi/format.py, which
// computes every offset and whose docstring is the byte map.
#define KIVI_LAYOUT_FIELDS(FIELD) \
  FIELD(head_dim)                 \
  FIELD(num_kv_heads)             \
  FIELD(k_bits)                   \
  FIELD(v_bits)                   \
  FIELD(group_size)               \
  FIELD(page_tokens)              \
  FIELD(full_page_tokens)         \
  FIELD(residual_length)          \
  FIELD(sink_tokens)              \
  FIELD(scale_search)             \
  FIELD(rotate_values)            \
  FIELD(boosted_channels)         \
  FIELD(num_value_groups)         \
  FIELD(k_codes_offset)           \
  FIELD(k_boost_offset)           \
  FIELD(k_scale_offset)           \
  FIELD(k_zero_offset)            \
  FIELD(v_codes_offset)           \
  FIELD(v_scale_offset)           \
  FIELD(v_zero_offset)            \
  FIELD(tile_bytes)

namespace kivi {

struct Layout {
#define FIELD(name) int32_t name;
  KIVI_LAYOUT_FIELDS(FIELD)
#undef FIELD

  // 16 bits are no codes but the elements. Nothing is quantized:
  constexpr bool full_precision() const { return k_bits == 16 && v_bits == 16; }
  // The same for kernels of CUDA, which serve no mixture with 16 bits, in one comparison.
  constexpr bool is_bypass() const { return k_bits == 16; }
};

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct Pages {
  char* data;            // [num_blocks, num_kv_heads, bytes of a page and head]
  int64_t block_stride;  // the pool's, which may be more than a page
  int64_t head_stride;
  const int32_t* table;  // [num_reqs, max_blocks] block ids; 0 is vLLM's null block
  int64_t table_stride;
};

// Rows [query_start_loc[r], query_start_loc[r + 1]) are the last rows of request r, which then has seq_lens[r] tokens.
struct Batch {
  int32_t num_reqs;
  const int32_t* query_start_loc;  // [num_reqs + 1]
  const int32_t* seq_lens;         // [num_reqs]
};

struct Rows {
  void* data;  // [num_tokens, heads, head_dim], head_dim contiguous
  int64_t token_stride;
  int64_t head_stride;
};

struct StoreParams {
  Layout layout;
  Dtype dtype;
  Rows key;
  Rows value;
  Pages quantized;
  Pages full;
  Batch batch;
};

struct AttentionParams {
  Layout layout;
  Dtype dtype;
  Rows output;
  Rows query;
  Pages quantized;
  Pages full;
  Batch batch;
  int32_t num_heads;
  float scale;
  float logits_soft_cap;             // 0 is off
  Rows key;                          // prefill only: the chunk's own tokens
  Rows value;                        // prefill only
  const int32_t* num_prompt_tokens;  // [num_reqs], prefill only
  void* workspace;                   // CUDA decode only
};

// Row i of request r is its token first[r] + i; tokens below boundary[r], sinks apart, are read quantized.
struct GatherParams {
  Layout layout;
  Dtype dtype;
  Rows key;
  Rows value;
  Pages quantized;
  Pages full;
  int32_t num_reqs;
  const int32_t* start_loc;  // [num_reqs + 1], rows of each request
  const int32_t* first;      // [num_reqs]
  const int32_t* boundary;   // [num_reqs]
};

}  // namespace kivi
