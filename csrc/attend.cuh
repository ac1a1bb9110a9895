// One warp's attention over tiles and tokens of one item: decode.cuh says how. Lane l has g = l / 4 and t = l % 4, and
// columns 2 t and 2 t + 1 of what is summed.
#pragma once

#include "operands.cuh"
#include "rotation.h"
#include "work.cuh"

namespace kivi::cuda {

// BOOST: one key channel in this many has low bits of its own, 0: none has. ONE_TILE: groups have 64 tokens or more.
template <class T, int D, int K_BITS, int V_BITS, int BOOST, bool ONE_TILE>
struct Decoder {
  static constexpr int kRowBytes = 2 * D;                  // of a key or value in full precision
  static constexpr int kTokenStride = 2 * kRowBytes + 16;  // in a stage: the padding avoids bank conflicts
  static constexpr int kHalves = halves_at_once(D, K_BITS);
  static constexpr int kTiles = ONE_TILE ? 1 : kHalves;  // of which the halves of a step have key scales of their own
  static constexpr int kScaleWords = scale_words(D);
  // In `words`: scales and zeros of a step, then what only a lane itself reads, its part of the query and its State.
  static constexpr int kQueryAt = kHalves * kScaleWords, kStateAt = kQueryAt + kColumns * D / 2;
  using Boost = Boosted<D, BOOST>;
  static constexpr int kBoostQueryAt = kStateAt + 32 * 4, kBoostListAt = kBoostQueryAt + Boost::kQueryWords;
  static constexpr int kKeyWords = D * K_BITS / 128;  // of a lane, per token
  static constexpr int kBlocks = D / 16;              // row blocks of the output

  const DecodeParams& params;
  const Layout& layout;
  const int lane, g, t;
  char* stages;       // this warp's
  uint32_t barriers;  // this warp's, one a stage
  uint32_t phases;    // a bit for each stage
  uint32_t* words;    // this warp's warp_words()
  const Place& place;

  int first_key_scales, first_value_scales, key_zeros_at, key_codes, value_codes;  // of this lane in a tile

  const char* source;  // of the copies of unit sources_from and later ones
  int sources_from;
  // Blocks that are looked up early: of a lane's tile in the next such round, and of the window's page `lane`.
  int next_block, next_from;
  int window_block, window_page;

  uint32_t query_codes[D / 8];  // fp16, for products with codes

  int num_tile_units;  // of the request
  int plain_end;       // units of tiles from params.first_plain on are read whole by all columns

  // Sums. Lanes hold columns 2t and 2t + 1.
  float output[kBlocks][4];  // block 2b + x: rows g and g + 8 are channels 32 b + 4 g + 2 x and + 1
  float zeros[4];            // rows g are value groups; the others are not used
  float maximum[2], sum[2];
  uint32_t key_limit, value_limit, zero_limit;  // largest_of them
  uint32_t key_shift, value_shift[2], zero_shift;
  float factor[2];  // from sums of products of query_codes and codes to scores as exponents of 2

  __device__ Decoder(const DecodeParams& params, const Place& place, char* stages, uint32_t barriers, uint32_t* words)
      : params(params),
        layout(params.attention.layout),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        stages(stages),
        barriers(opaque(barriers)),
        phases(0),
        words(words),
        place(place),
        first_key_scales(opaque(key_scales_at(0))),
        first_value_scales(opaque(value_scales_at(0))),
        key_zeros_at(opaque(layout.k_zero_offset + lane / 16 * 16 + lane / 8 % kHalves * half_bytes())),
        key_codes(opaque(layout.k_codes_offset + 4 * (t * layout.group_size + 4 * g))),
        value_codes(opaque(layout.v_codes_offset + t * (D * V_BITS) + g * (4 * V_BITS))) {}

  // What a lane seldom needs.
  struct State {
    int rows;             // of columns 2t and 2t + 1, 16 bits each
    int query_exponents;  // of the powers of two that query_codes were divided by, of columns 2t and 2t + 1, likewise
    int exponents;        // of key scales, value scales and value zeros: 8 bits each, the same in all lanes
    int value_distance;   // from a key in full precision to its value
  };

  __device__ State& state() const { return reinterpret_cast<State*>(words + kStateAt)[lane]; }

  // Channels 16 i + 2 t ... of column g as pairs 4 j ... 4 j + 3, as given.
  __device__ uint4& query(int j) const { return reinterpret_cast<uint4*>(words + kQueryAt)[32 * j + lane]; }

  // ------------------------------------------------------------------------------------------------------- copies

  // Finds where units from this one on are copied from, all lanes at once: 32 tiles, or 4 units of tokens.
  __device__ void find_sources(int unit) {
    const AttentionParams& attention = params.attention;
    const Request& request = place.request;
    sources_from = unit;
    if (unit < request.num_tile_units) {
      // What a last unit lacks is the last tile again, which no row sees there.
      const int index = (unit << params.log_unit_tiles) + lane;
      const auto block_of_tile = [&](int page) { return block_of(attention.quantized, place.segment.request, page); };
      const auto tile_at = [&](int i) { return request.first_tile + min(i, request.num_tiles - 1); };
      const int tile = tile_at(index), page = params.page_tiles.divide(tile);
      const int block = unit == next_from ? next_block : block_of_tile(page);
      source =
          page_of(attention.quantized, block, place.head) + (tile - page * params.page_tiles.value) * layout.tile_bytes;
      next_from = unit + (32 >> params.log_unit_tiles);
      next_block = block_of_tile(params.page_tiles.divide(tile_at(index + 32)));
      return;
    }
    const Tokens tokens = tokens_of_unit(request, min(unit + lane / kRunTokens, request.num_units - 1));
    const int token = min(tokens.first + lane % kRunTokens, tokens.end - 1);
    const int page = params.full_page_tokens.divide(token), index = page - window_page;
    int block = __shfl_sync(~0u, window_block, index % 32);
    // With the full_precision bypass, tiles hold tokens as they are.
    if (layout.is_bypass() && token >= request.num_sinks && token < request.shared_boundary) {
      const int tile = token >> params.log_group_size, page = params.page_tiles.divide(tile);
      const int block = block_of(attention.quantized, place.segment.request, page);
      source = page_of(attention.quantized, block, place.head) +
               (tile - page * params.page_tiles.value) * layout.tile_bytes +
               (token & (layout.group_size - 1)) * kRowBytes;
      state().value_distance = layout.v_codes_offset;
    } else {
      if (unsigned(index) >= 32) block = block_of(attention.full, place.segment.request, page);
      source = full_token_at(layout, attention.full, block, place.head, token - page * params.full_page_tokens.value,
                             sizeof(T));
      state().value_distance = kRowBytes;
    }
  }

  __device__ void start_copy(int unit, int stage) {
    const uint32_t to = shared_address(stages) + stage * params.stage_bytes, barrier = barriers + 8 * stage;
    const bool is_tiles = unit < num_tile_units;
    int index = (unit - sources_from) << (is_tiles ? params.log_unit_tiles : kLogRunTokens);  // lane of its first
    if (index == 32 || unit == num_tile_units) {
      find_sources(unit);
      index = 0;
    }
    if (is_tiles) {
      const int copied = lane - index;  // tile of the unit
      if constexpr (kBulkCopies) {
        if (copied == 0) expect_bytes(barrier, params.unit_bytes);
        if (copied == 0 || copied == params.log_unit_tiles) {
          bulk_copy(to + copied * layout.tile_bytes, source, layout.tile_bytes, barrier);
        }
      } else {
        const char *first = shuffle(source, index), *second = shuffle(source, index + params.log_unit_tiles);
        for (int i = 16 * lane; i < layout.tile_bytes; i += 512) {
          copy16(to + i, first + i);
          if (params.log_unit_tiles > 0) copy16(to + layout.tile_bytes + i, second + i);
        }
        end_copies(barrier);
      }
    } else {  // 4 lanes a token: to copy rows in one piece each would take longer
      const int from_lane = index + lane % kRunTokens;
      const char* key = shuffle(source, from_lane) + 16 * (lane / kRunTokens);
      const char* value = key + __shfl_sync(~0u, state().value_distance, from_lane);
      const uint32_t row_to = to + lane % kRunTokens * kTokenStride + 16 * (lane / kRunTokens);
#pragma unroll
      for (int i = 0; i < kRowBytes; i += 64) {
        copy16(row_to + i, key + i);
        copy16(row_to + kRowBytes + i, value + i);
      }
      end_copies(barrier);
    }
  }

  __device__ const char* wait(int stage) {
    mbarrier_wait(barriers + 8 * stage, phases >> stage & 1);
    phases ^= 1u << stage;
    return stages + stage * params.stage_bytes;
  }

  // ------------------------------------------------------------------------------------------------------ segment

  // Starts to load this lane's part of column g; codes[i * kPairs + e] are channels e and e + kPairs of word t + 4 i.
  __device__ void load_query(int ratio, uint32_t (&codes)[D / 8]) {
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    const AttentionParams& attention = params.attention;
    const int column = first_column() + g, column_row = params.ratio.divide(column);
    const bool valid = column < place.request.num_rows * ratio;
    const T* from = static_cast<const T*>(attention.query.data) +
                    (place.request.first_row + column_row) * attention.query.token_stride +
                    (place.head * ratio + params.ratio.modulo(column)) * attention.query.head_stride;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      // Both halves of the elements of two pairs; begin_segment puts them together.
      const int pair = i % kPairsOfWord, element = pair / 2 * 2 + pair % 2 * kPairsOfWord;
      const T* word = from + (t + 4 * (i / kPairsOfWord)) * 2 * kPairsOfWord;
      codes[i] = valid ? *reinterpret_cast<const uint32_t*>(word + element) : 0;
    }
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const auto load = [&](int i) {
        return valid ? *reinterpret_cast<const uint32_t*>(from + 32 * j + 8 * i + 2 * t) : 0;
      };
      query(j) = {load(0), load(1), load(2), load(3)};
    }
  }

  // Before anything else of a segment.
  __device__ void begin_request() {
    const Request& request = place.request;
    const int log_unit_tokens = params.log_group_size + params.log_unit_tiles;
    num_tile_units = request.num_tile_units;
    plain_end = (request.shared_boundary - (request.first_tile << params.log_group_size)) >> log_unit_tokens;
    next_from = -1;
    window_page = params.full_page_tokens.divide(request.window);
    const int last_page = params.full_page_tokens.divide(request.num_tokens - 1);
    window_block = block_of(params.attention.full, place.segment.request, min(window_page + lane, last_page));
  }

  __device__ int first_column() const { return place.segment.item / layout.num_kv_heads * kColumns; }

  __device__ void begin_segment(uint32_t (&codes)[D / 8]) {
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    int rows = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows |= min(params.ratio.divide(first_column() + 2 * t + i), place.request.num_rows - 1) << 16 * i;
    }
    float2 pairs[D / 8];
    float largest = 0;
#pragma unroll
    for (int i = 0; i < D / 8; i += 2) {
      interleave(codes[i], codes[i + 1]);
      const float2 a = unpack_pair<T>(codes[i]), b = unpack_pair<T>(codes[i + 1]);
      pairs[i] = a;
      pairs[i + 1] = b;
      largest = fmaxf(fmaxf(largest, fmaxf(fabsf(a.x), fabsf(a.y))), fmaxf(fabsf(b.x), fabsf(b.y)));
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // largest < 2^exponent; what is not finite is left to the products.
    const int exponent = min(max((__float_as_int(largest) >> 23) - 126, -60), 100);
    if constexpr (BOOST > 0) {  // rows are channels, columns those of this kernel
      const float factor = power_of_two(kQueryExponent - exponent);
      __half* rows = reinterpret_cast<__half*>(words + kBoostQueryAt) + g;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const int channel = (t + 4 * (i / kPairsOfWord)) * 2 * kPairsOfWord + i % kPairsOfWord;
        rows[channel * kColumns] = __float2half_rn(pairs[i].x * factor);
        rows[(channel + kPairsOfWord) * kColumns] = __float2half_rn(pairs[i].y * factor);
      }
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float factor = power_of_two(kQueryExponent - exponent - position<K_BITS>(i % kPairsOfWord));
      query_codes[i] = pack<__half>(pairs[i].x * factor, pairs[i].y * factor);
    }
    int exponents = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      exponents |= ((__shfl_sync(~0u, exponent, 4 * (2 * t + i)) - kQueryExponent) & 0xFFFF) << 16 * i;
    }

#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output[block][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) zeros[i] = 0;
    maximum[0] = maximum[1] = -1e30f;
    sum[0] = sum[1] = 0;
    state().rows = rows;
    state().query_exponents = exponents;
    set_scales(Relative<T>::kLowest, Relative<T>::kLowest, Relative<T>::kLowest);
  }

  __device__ void set_scales(int key_exponent, int value_exponent, int zero_exponent) {
    state().exponents = key_exponent | value_exponent << 8 | zero_exponent << 16;
    const int query_exponents = state().query_exponents;
    key_limit = largest_of<T>(key_exponent);
    value_limit = largest_of<T>(value_exponent);
    zero_limit = largest_of<T>(zero_exponent);
    key_shift = Relative<T>::shift(key_exponent, kKeyScaleTop);
    zero_shift = Relative<T>::shift(zero_exponent, kValueZeroTop);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // of tokens 2 (lane % 2) + i of four: the positions of their codes
      const int at = lane % 2 == 0 ? position<V_BITS>(i) : position<V_BITS>(2 + i);
      value_shift[i] = Relative<T>::shift(value_exponent, kValueScaleTop, at);
      factor[i] = power_of_two((query_exponents << (16 - 16 * i) >> 16) + 24 - kKeyScaleTop + key_exponent -
                               Relative<T>::kBias) *
                  (params.scale);
    }
  }

  __device__ void rescale(float even, float odd) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      output[block][0] *= even;
      output[block][1] *= odd;
      output[block][2] *= even;
      output[block][3] *= odd;
    }
  }

  // Of columns 2t and 2t + 1.
  __device__ void rescale_zeros(float even, float odd) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      zeros[i] *= i % 2 == 0 ? even : odd;
    }
  }

  // Turns H x N products of columns 2t and 2t + 1, of tokens of which other lanes hold others, into elements of P.
  // Scores, as exponents of 2, are product * factor + start.
  template <int H, int N>
  __device__ void take_softmax(float (&products)[H][N][2], float (&factor)[2], float (&start)[H][2]) {
    float relative[H][N][2], highest[H][2];
#pragma unroll
    for (int h = 0; h < H; ++h) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float offset = start[h][column] + (kProbabilityExponent - maximum[column]);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float& x = relative[h][i][column];
          x = fmaf(products[h][i][column], factor[column], offset);
          highest[h][column] = i == 0 ? x : fmaxf(highest[h][column], x);
        }
      }
    }
    float above = fmaxf(highest[0][0], highest[0][1]);
    if constexpr (H == 2) above = fmaxf(above, fmaxf(highest[1][0], highest[1][1]));
    if (__any_sync(~0u, above > kProbabilityExponent + kHeadroom)) [[unlikely]] {
      float lowered[2];
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float high = maximum[column];
#pragma unroll
        for (int h = 0; h < H; ++h) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            high = fmaxf(high, fmaf(products[h][i][column], factor[column], start[h][column]));
          }
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
        lowered[column] = exp2_approx(maximum[column] - high);
        maximum[column] = high;
        sum[column] *= lowered[column];
#pragma unroll
        for (int h = 0; h < H; ++h) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            // Of huge scores the maximum is rounded, and this is not.
            relative[h][i][column] =
                fminf(fmaf(products[h][i][column], factor[column], start[h][column] + (kProbabilityExponent - high)),
                      kProbabilityExponent + kHeadroom);
          }
        }
      }
      rescale(lowered[0], lowered[1]);
      rescale_zeros(lowered[0], lowered[1]);
    }
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float sums[H];
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float x = exp2_approx(relative[h][i][column]);
          products[h][i][column] = x;
          sums[h] = i == 0 ? x : sums[h] + x;
        }
      }
#pragma unroll
      for (int h = 0; h < H; ++h) sum[column] += sums[h];
    }
  }

  // Caps scores; afterwards they are the products. tanh(x) = 1 - 2 / (exp(2 x) + 1).
  template <int H, int N>
  __device__ void cap(float (&products)[H][N][2], float (&factor)[2], float (&start)[H][2]) const {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float score = fmaf(products[h][i][column], factor[column], start[h][column]);
          const float power = exp2_approx(score * params.cap_inverse);
          products[h][i][column] = score == -INFINITY ? score : params.cap - __fdividef(2 * params.cap, power + 1);
        }
        start[h][column] = 0;
      }
      factor[column] = 1;
    }
  }

  __device__ bool visible(int token, int column, bool from_tile, bool sink) const {
    const int position = place.request.num_tokens - place.request.num_rows + (state().rows >> 16 * column & 0xFFFF);
    if (sink) return token <= position;
    if (layout.is_bypass()) return token <= position;
    const int limit = boundary(layout, position + 1);
    return from_tile ? token >= layout.sink_tokens && token < limit : token >= limit && token <= position;
  }

  // --------------------------------------------------------------------------------------------------------- tile

  // From a half to the next: its tile, or its tokens in the same tile.
  __device__ int half_bytes() const { return !ONE_TILE && layout.group_size == kHalfTokens ? layout.tile_bytes : 0; }
  __device__ int half_tokens() const { return !ONE_TILE && layout.group_size == kHalfTokens ? 0 : kHalfTokens; }

  // Reads pairs of scales or zeros that are `distance` elements apart.
  __device__ static uint2 load_pairs(const char* from, int distance) {
    uint2 pairs = {*reinterpret_cast<const uint32_t*>(from),
                   *reinterpret_cast<const uint32_t*>(from + distance * sizeof(T))};
    interleave(pairs.x, pairs.y);
    return pairs;
  }

  // The larger exponent of all lanes' numbers, if it exceeds this one.
  __device__ static int larger_exponent(uint32_t magnitudes, int exponent) {
    const int high = max(magnitudes >> 16, magnitudes & 0xFFFF) >> Relative<T>::kExponentShift;
    return __reduce_max_sync(~0u, max(high, exponent));
  }

  static constexpr int kRounds = (D / 4 + 31) / 32;

  // Of this lane, from the begin of a tile.
  __device__ int key_scales_at(int round) const {
    constexpr int kHalfWord = kPairs<K_BITS>;                   // channels
    const int channel = 2 * min(lane + 32 * round, D / 4 - 1);  // slots: 2 channels and those half a word later
    return layout.k_scale_offset + sizeof(T) * (channel / kHalfWord * (2 * kHalfWord) + channel % kHalfWord);
  }

  __device__ int value_scales_at(int round) const {
    const int slot = min(lane + 32 * round, 8 * layout.num_value_groups - 1);  // slots: 2 tokens and those 4 later
    return layout.v_scale_offset + sizeof(T) * ((slot / 8 << params.log_group_size) + slot % 8 / 2 * 8 + slot % 2 * 2);
  }

  // Scales and zeros of a half, this lane's part; keys of the first kTiles halves.
  struct Prepared {
    uint2 keys[kRounds], scales[kRounds], zeros[kRounds];
  };

  struct Largest {
    uint32_t key = 0, scale = 0, zero = 0;
  };

  __device__ void load_scales(const char* tile, int first_token, Prepared (&p)[kHalves], Largest& largest) const {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const char* value_scales = tile + (first_token + h * half_tokens()) * sizeof(T);
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const int value_at = i == 0 ? first_value_scales : value_scales_at(i);
        if (h < kTiles) {
          p[h].keys[i] = load_pairs(tile + (i == 0 ? first_key_scales : key_scales_at(i)), kPairs<K_BITS>);
          if constexpr (BOOST > 0) {  // as scales of the high bits
            p[h].keys[i] = {Relative<T>::four_times_negative(p[h].keys[i].x),
                            Relative<T>::four_times_negative(p[h].keys[i].y)};
          }
          largest.key = __vmaxu2(largest.key, __vmaxu2(p[h].keys[i].x, p[h].keys[i].y));
        }
        p[h].scales[i] = load_pairs(value_scales + value_at, 4);
        p[h].zeros[i] = load_pairs(value_scales + value_at + (layout.v_zero_offset - layout.v_scale_offset), 4);
        largest.scale = __vmaxu2(largest.scale, __vmaxu2(p[h].scales[i].x, p[h].scales[i].y));
        largest.zero = __vmaxu2(largest.zero, __vmaxu2(p[h].zeros[i].x & 0x7FFF7FFF, p[h].zeros[i].y & 0x7FFF7FFF));
      }
      tile += half_bytes();
    }
  }

  __device__ void store_scales(const Prepared (&p)[kHalves]) const {
    const auto signed_half = [&](uint32_t pair) {
      return Relative<T>::to_half(pair & 0x7FFF7FFF, zero_shift) | (pair & 0x80008000);
    };
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      uint2* out = reinterpret_cast<uint2*>(words + h * kScaleWords) + lane;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (D % 128 != 0 && lane >= D / 4) break;
        if (h < kTiles) {
          out[32 * i] = {Relative<T>::to_half(p[h].keys[i].x, key_shift),
                         Relative<T>::to_half(p[h].keys[i].y, key_shift)};
        }
        out[32 * i + D / 4] = {Relative<T>::to_half(p[h].scales[i].x, value_shift[0]),
                               Relative<T>::to_half(p[h].scales[i].y, value_shift[1])};
        // Pairs 0, 2, 1, 3: see multiply_values.
        uint32_t* zeros_out = words + h * kScaleWords + D + (lane + 32 * i) / 2 * 4 + lane % 2;
        zeros_out[0] = signed_half(p[h].zeros[i].x);
        zeros_out[2] = signed_half(p[h].zeros[i].y);
      }
    }
  }

  // Writes scales and zeros of a step as half2, in the order in which products read them. Lanes that have nothing to do
  // repeat the last one's work. `meanwhile` is done while the loads are under way.
  template <class Meanwhile>
  __device__ void prepare(const char* tile, int first_token, Meanwhile meanwhile) {
    Prepared p[kHalves];
    Largest largest;
    load_scales(tile, first_token, p, largest);
    OwnScales own[kTiles];
    if constexpr (BOOST > 0) load_own_scales(tile, own);
    meanwhile();
    const bool larger = __vmaxu2(largest.key, key_limit) != key_limit ||
                        __vmaxu2(largest.scale, value_limit) != value_limit ||
                        __vmaxu2(largest.zero, zero_limit) != zero_limit;
    store_scales(p);
    if (__any_sync(~0u, larger)) [[unlikely]] {
      const int before = state().exponents, value_before = before >> 8 & 0xFF, zero_before = before >> 16;
      const int value_exponent = larger_exponent(largest.scale, value_before);
      const int zero_exponent = larger_exponent(largest.zero, zero_before);
      set_scales(larger_exponent(largest.key, before & 0xFF), value_exponent, zero_exponent);
      const float factor = power_of_two(value_before - value_exponent);
      rescale(factor, factor);
      const float zero_factor = power_of_two(zero_before - zero_exponent);
      rescale_zeros(zero_factor, zero_factor);
      load_scales(tile, first_token, p, largest);
      store_scales(p);
    }
    if constexpr (BOOST > 0) list_boosted(own);
    __syncwarp();
  }

  // Key scales of D / 32 channels, one after another from lane * D / 32 on.
  struct alignas(D / 16) OwnScales {
    uint32_t pairs[D / 64];
  };

  __device__ void load_own_scales(const char* tile, OwnScales (&own)[kTiles]) const {
#pragma unroll
    for (int h = 0; h < kTiles; ++h) {
      own[h] = reinterpret_cast<const OwnScales*>(tile + h * half_bytes() + layout.k_scale_offset)[lane];
    }
  }

  // Of each tile of a step: where the query of a boosted channel lies, and the scale of its low bits.
  __device__ void list_boosted(const OwnScales (&own)[kTiles]) const {
    constexpr uint32_t kRow = kColumns * sizeof(__half);
    const unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll
    for (int h = 0; h < kTiles; ++h) {
      uint32_t* list = words + kBoostListAt + h * Boost::kChannels;
      int index = 0;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        index += __popc(__ballot_sync(~0u, own[h].pairs[i / 2] & 0x8000u << 16 * (i % 2)) & lower_lanes);
      }
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const uint32_t pair = own[h].pairs[i / 2], scales = Relative<T>::to_half(pair & 0x7FFF7FFF, key_shift);
        const uint32_t entry = __byte_perm(scales, (lane * (D / 32) + i) * kRow, i % 2 == 0 ? 0x5410 : 0x5432);
        const bool boosted = pair & 0x8000u << 16 * (i % 2);
        if (boosted) list[index & (Boost::kChannels - 1)] = entry;  // whatever a page holds stays within the list
        index += boosted;
      }
    }
  }

  // Adds the products of the low bits of boosted channels.
  __device__ void multiply_boosted(const char* tile, int first_token, float (&scores)[kHalves][2][4]) const {
    constexpr int kPairsOfLane = Boost::kPairs, kLoaded = Boost::kLoaded;
    struct alignas(4 * kLoaded) Entries {
      uint32_t of[kLoaded];
    };
    const uint32_t rows = shared_address(words + kBoostQueryAt);
    const int block = t * kPairsOfLane / 4, first_pair = t * kPairsOfLane % 4;
    const char* codes = tile + layout.k_boost_offset + 2 * (block * layout.group_size + first_token) + 8 * g;
    const int distance = half_bytes() + 2 * half_tokens();
    uint32_t folded[kPairsOfLane];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (h < kTiles) {
        const uint32_t* list = words + kBoostListAt + h * Boost::kChannels;
#pragma unroll
        for (int i = 0; i < kPairsOfLane; i += kLoaded) {
          uint32_t loaded[kLoaded];
          ldmatrix_transposed(loaded, rows + (list[Boost::channel_of_row(i, lane)] >> 16));
          const Entries first = *reinterpret_cast<const Entries*>(list + 8 * (block + i / 4) + first_pair);
          const Entries second = *reinterpret_cast<const Entries*>(list + 8 * (block + i / 4) + first_pair + 4);
#pragma unroll
          for (int e = 0; e < kLoaded; ++e) {
            folded[i + e] = multiply(loaded[e], __byte_perm(first.of[e], second.of[e], 0x5410));
            if (e > 0) folded[i + e] = multiply(folded[i + e], (0x3C00 - (position<2>(e) << 10)) * 0x00010001u);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kPairsOfLane; i += kLoaded) {
        const uint2 words = *reinterpret_cast<const uint2*>(codes + h * distance + i / 4 * (2 * layout.group_size));
        uint32_t first[8], second[8];  // each of two tokens
        unpack<2>(words.x >> 2 * first_pair, first);
        unpack<2>(words.y >> 2 * first_pair, second);
        if constexpr (kLoaded == 1) {
          mma_k8<__half>(scores[h][0], first[0], first[4], folded[0]);
          mma_k8<__half>(scores[h][1], second[0], second[4], folded[0]);
        } else {
#pragma unroll
          for (int e = 0; e < kLoaded; e += 2) {
            mma_k16<__half>(scores[h][0], first[e], first[4 + e], first[e + 1], first[5 + e], folded[i + e],
                            folded[i + e + 1]);
            mma_k16<__half>(scores[h][1], second[e], second[4 + e], second[e + 1], second[5 + e], folded[i + e],
                            folded[i + e + 1]);
          }
        }
      }
    }
  }

  __device__ void attend_tiles(const char* stage, int unit) {
    const bool plain = unit >= params.first_plain && unit < plain_end && params.cap == 0;
    const int unit_tokens = layout.group_size << params.log_unit_tiles;
#pragma unroll 1
    for (int offset = 0; offset < unit_tokens; offset += kHalves * kHalfTokens) {
      const char* tile = stage + (offset >> params.log_group_size) * layout.tile_bytes;
      const int first_token = offset & (layout.group_size - 1);
      // Rows g are of the first half, rows g + 8 of the second.
      float key_zeros[2][4] = {};
      prepare(tile, first_token, [&] {
        const uint32_t zero_row = shared_address(tile) + key_zeros_at;
        uint4 given;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t a[4];
          ldmatrix(a, zero_row + 32 * i);  // all rows of a half are the same
          if (i % 2 == 0) given = query(i / 2);
          mma_k16<T>(key_zeros[i % 2], a[0], a[1], a[2], a[3], i % 2 == 0 ? given.x : given.z,
                     i % 2 == 0 ? given.y : given.w);
        }
      });
      float scores[kHalves][2][4] = {};  // block m: rows g and g + 8 are tokens 4 g + 2 m and + 1 of the half
      multiply_keys(tile, first_token, scores);
      if constexpr (BOOST > 0) multiply_boosted(tile, first_token, scores);

      float probability[kHalves][4][2], start[kHalves][2], factors[2] = {factor[0], factor[1]};
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) probability[h][i / 2][i % 2] = scores[h][i / 4][i % 4];  // of tokens 4 g + ...
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          start[h][i] = (key_zeros[0][2 * h + i] + key_zeros[1][2 * h + i]) * (params.scale);
        }
      }
      if (!plain) [[unlikely]] {
        const int first = (place.request.first_tile << params.log_group_size) + unit * unit_tokens + offset + 4 * g;
#pragma unroll
        for (int i = 0; i < 4 * kHalves; ++i) {
#pragma unroll
          for (int column = 0; column < 2; ++column) {
            if (!visible(first + i / 4 * kHalfTokens + i % 4, column, true, false)) {
              probability[i / 4][i % 4][column] = -INFINITY;
            }
          }
        }
        if (params.cap > 0) cap(probability, factors, start);
      }
      take_softmax(probability, factors, start);
      uint32_t weights[kHalves][4];  // of tokens 8 t + i and 8 t + i + 4, column g
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[h][i] = movmatrix(pack<__half>(probability[h][i][0], probability[h][i][1]));
        }
      }
      multiply_values(tile, first_token, weights);
      __syncwarp();
    }
  }

  __device__ void multiply_keys(const char* tile, int first_token, float (&scores)[kHalves][2][4]) const {
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    const char* codes = tile + key_codes + 4 * first_token;
    const int distance = half_bytes() + 4 * half_tokens();
#pragma unroll
    for (int i = 0; i < kKeyWords; ++i) {
      uint32_t folded[kPairsOfWord];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int word = t + 4 * i;
        const uint32_t* scale = words + h * kScaleWords + word * kPairsOfWord;
        const uint4 words = *reinterpret_cast<const uint4*>(codes + h * distance + i * (16 * layout.group_size));
        if (h < kTiles) {
          if constexpr (kPairsOfWord == 2) {
            reinterpret_cast<uint2&>(folded) = *reinterpret_cast<const uint2*>(scale);
          } else {
#pragma unroll
            for (int e = 0; e < kPairsOfWord; e += 4) {
              reinterpret_cast<uint4&>(folded[e]) = *reinterpret_cast<const uint4*>(scale + e);
            }
          }
#pragma unroll
          for (int e = 0; e < kPairsOfWord; ++e) folded[e] = multiply(folded[e], query_codes[i * kPairsOfWord + e]);
        }
        uint32_t a[4][kPairsOfWord];
        unpack<K_BITS>(words.x, a[0]);
        unpack<K_BITS>(words.y, a[1]);
        unpack<K_BITS>(words.z, a[2]);
        unpack<K_BITS>(words.w, a[3]);
#pragma unroll
        for (int e = 0; e < kPairsOfWord; e += 2) {
          mma_k16<__half>(scores[h][0], a[0][e], a[1][e], a[0][e + 1], a[1][e + 1], folded[e], folded[e + 1]);
          mma_k16<__half>(scores[h][1], a[2][e], a[3][e], a[2][e + 1], a[3][e + 1], folded[e], folded[e + 1]);
        }
      }
    }
  }

  __device__ void multiply_values(const char* tile, int first_token, const uint32_t (&weights)[kHalves][4]) {
    // Of each product only rows g are used, and of those only as many as there are value groups.
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const uint4 zero = reinterpret_cast<const uint4*>(words + h * kScaleWords + D)[lane % (D / 8)];
      mma_k16<__half>(zeros, zero.x, zero.y, zero.z, zero.w, weights[h][0], weights[h][1]);
      mma_k16<__half>(zeros, zero.y, zero.x, zero.w, zero.z, weights[h][2], weights[h][3]);
    }
    // Words of tokens 8 t ... 8 t + 7 and channels 4 g ... 4 g + 3 of each 32.
    const char* codes = tile + value_codes + first_token / 8 * (D * V_BITS);
    const int distance = half_bytes() + half_tokens() / 8 * (D * V_BITS);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const uint4* scales = reinterpret_cast<const uint4*>(words + h * kScaleWords + D / 2) + t;
        const uint4 scale = scales[4 * (32 * b >> params.log_group_size)];
        const uint32_t folded[4] = {multiply(weights[h][0], scale.x), multiply(weights[h][1], scale.y),
                                    multiply(weights[h][2], scale.z), multiply(weights[h][3], scale.w)};
        const char* from = codes + h * distance + b * 32 * V_BITS;
        uint32_t words[V_BITS];
        if constexpr (V_BITS == 2) {
          reinterpret_cast<uint2&>(words) = *reinterpret_cast<const uint2*>(from);
        } else {
#pragma unroll
          for (int i = 0; i < V_BITS; i += 4) {
            reinterpret_cast<uint4&>(words[i]) = *reinterpret_cast<const uint4*>(from + 4 * i);
          }
        }
        uint32_t a[4][4];  // [channel][pair of tokens]
#pragma unroll
        for (int i = 0; i < V_BITS; ++i) {
          uint32_t pairs[kPairs<V_BITS>];
          unpack<V_BITS>(words[i], pairs);
#pragma unroll
          for (int e = 0; e < kPairs<V_BITS>; ++e) {
            a[(i * kPairs<V_BITS> + e) / 4][(i * kPairs<V_BITS> + e) % 4] = pairs[e];
          }
        }
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          mma_k16<__half>(output[2 * b + x], a[2 * x][0], a[2 * x + 1][0], a[2 * x][1], a[2 * x + 1][1], folded[0],
                          folded[1]);
          mma_k16<__half>(output[2 * b + x], a[2 * x][2], a[2 * x + 1][2], a[2 * x][3], a[2 * x + 1][3], folded[2],
                          folded[3]);
        }
      }
    }
  }

  // After the last tile: sums in the units of P and values, zeros added.
  __device__ void end_tiles() {
    const int exponents = state().exponents;
    const float norm = layout.rotate_values ? rotation_norm(D) : 1.0f;
    const float unit = power_of_two(24 - kValueScaleTop + (exponents >> 8 & 0xFF) - Relative<T>::kBias) * norm;
    const float zero_unit = power_of_two((exponents >> 16) - Relative<T>::kBias - kValueZeroTop) * norm;
    rescale(unit, unit);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      const int from = (32 * b >> params.log_group_size) * 4 + t;
      const float even = __shfl_sync(~0u, zeros[0], from) * zero_unit;
      const float odd = __shfl_sync(~0u, zeros[1], from) * zero_unit;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        output[2 * b + x][0] += even;
        output[2 * b + x][1] += odd;
        output[2 * b + x][2] += even;
        output[2 * b + x][3] += odd;
      }
    }
    if (layout.rotate_values) rotate();
  }

  // Of sums over rotated values, those over values: a Hadamard matrix over the channels, which is its own inverse.
  __device__ void rotate() {
    const auto butterfly = [](float& a, float& b) {
      const float difference = a - b;
      a += b;
      b = difference;
    };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) butterfly(output[i][c], output[i][2 + c]);
    }
#pragma unroll
    for (int distance = 1; distance < kBlocks; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        if (i & distance) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) butterfly(output[i][c], output[i + distance][c]);
      }
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          output[i][c] = fmaf(output[i][c], sign, __shfl_xor_sync(~0u, output[i][c], distance));
        }
      }
    }
  }

  // The column's sums over all lanes.
  __device__ void finish_sums() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
    }
  }

  // ------------------------------------------------------------------------------------------------ full precision

  __device__ void attend_tokens(const char* stage, int unit) {
    const Tokens tokens = tokens_of_unit(place.request, unit);
    float scores[2][4] = {};  // rows g are tokens; rows g + 8 are not used
    const uint32_t key = shared_address(stage) + lane % 8 * kTokenStride + lane / 8 * 16;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      uint32_t a[4];
      ldmatrix(a, key + 64 * i);
      const uint4 given = query(i);
      mma_k16<T>(scores[0], a[0], 0, a[1], 0, given.x, given.y);
      mma_k16<T>(scores[1], a[2], 0, a[3], 0, given.z, given.w);
    }
    float probability[1][1][2] = {{{scores[0][0] + scores[1][0], scores[0][1] + scores[1][1]}}};
    float factors[2] = {params.scale, params.scale}, start[1][2] = {};
    const int token = tokens.first + g;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if (token >= tokens.end || !visible(token, column, false, tokens.sink)) probability[0][0][column] = -INFINITY;
    }
    if (params.cap > 0) cap(probability, factors, start);
    take_softmax(probability, factors, start);
    const uint32_t weights =
        movmatrix(pack<T>(probability[0][0][0], probability[0][0][1]));  // tokens 2 t, 2 t + 1, column g
    const char* value = stage + kRowBytes + 2 * t * kTokenStride + 8 * g;
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      uint2 even = *reinterpret_cast<const uint2*>(value + 64 * b);
      uint2 odd = *reinterpret_cast<const uint2*>(value + kTokenStride + 64 * b);
      interleave(even.x, odd.x);
      interleave(even.y, odd.y);
      mma_k8<T>(output[2 * b], even.x, odd.x, weights);
      mma_k8<T>(output[2 * b + 1], even.y, odd.y, weights);
    }
  }
};

}  // namespace kivi::cuda
