// One warp's attention over tiles and tokens of one item: decode.cuh says how. Lane l has g = l / 4 and t = l % 4, and
// columns 2 t and 2 t + 1 of what is summed.
#pragma once

#include "operands.cuh"
#include "work.cuh"

namespace kivi::cuda {

template <class T, int D, int K_BITS, int V_BITS>
struct Decoder {
  static constexpr int kRowBytes = 2 * D;                  // of a key or value in full precision
  static constexpr int kTokenStride = 2 * kRowBytes + 16;  // in a stage: the padding avoids bank conflicts
  static constexpr int kHalves = D <= 128 ? 2 : 1;         // of kHalfTokens, attended at once
  static constexpr int kPreparedWords = 3 * D / 2;         // of a half
  static constexpr int kKeyWords = D * K_BITS / 128;       // of a lane, per token
  static constexpr int kBlocks = D / 16;                   // row blocks of the output
  static constexpr float kLog2E = 1.4426950408889634f;

  const DecodeParams& params;
  const Layout& layout;
  const int lane, g, t;
  char* stages;        // this warp's
  uint32_t barriers;   // this warp's, one a stage
  uint32_t phases;     // a bit for each stage
  uint32_t* prepared;  // this warp's scales as half2
  const Place& place;

  int first_key_scales, first_value_scales, key_zeros_at, key_codes, value_codes;  // of this lane in a tile

  // Where lanes find what they copy of unit sources_from and later ones.
  const char *source, *second;  // the second tile of a unit
  int sources_from;
  int value_distance;  // from a key in full precision to its value

  uint32_t query_codes[D / 8];  // fp16, for products with codes
  uint32_t query[D / 8];        // as given, for all else
  int query_exponent[2];        // of the power of two that query_codes were divided by, of columns 2t and 2t + 1
  int rows;                     // of columns 2t and 2t + 1, 16 bits each
  int num_tile_units;           // of the request
  int plain_begin, plain_end;   // units of tiles that all columns read whole

  // Sums. Lanes hold columns 2t and 2t + 1.
  float output[kBlocks][4];  // block 2b + x: rows g and g + 8 are channels 32 b + 4 g + 2 x and + 1
  float zeros[2][4];         // rows are value groups: g of the first, g + 8 of the second
  float maximum[2], sum[2];
  int key_exponent, value_exponent, zero_exponent;
  uint32_t key_limit, value_limit, zero_limit;  // largest_of them
  uint32_t key_shift, value_shift[2], zero_shift;
  float factor[2];  // from sums of products of query_codes and codes to scores as exponents of 2

  __device__ Decoder(const DecodeParams& params, const Place& place, char* stages, uint32_t barriers,
                     uint32_t* prepared)
      : params(params),
        layout(params.attention.layout),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4),
        stages(stages),
        barriers(opaque(barriers)),
        phases(0),
        prepared(prepared),
        place(place),
        first_key_scales(opaque(key_scales_at(0))),
        first_value_scales(opaque(value_scales_at(0))),
        key_zeros_at(opaque(layout.k_zero_offset + lane / 16 * 16 + lane / 8 % kHalves * half_bytes())),
        key_codes(opaque(layout.k_codes_offset + 4 * (t * layout.group_size + 4 * g))),
        value_codes(opaque(layout.v_codes_offset + t * (D * V_BITS) + g * (4 * V_BITS))) {}

  // ------------------------------------------------------------------------------------------------------- copies

  __device__ const char* tile_of_request(int index) const {
    const Request& request = place.request;
    const Pages& pages = params.attention.quantized;
    const int tile = request.first_tile + min(index, request.num_tiles - 1), page = params.page_tiles.divide(tile);
    return page_of(pages, block_of(pages, place.segment.request, page), place.head) +
           (tile - page * params.page_tiles.value) * layout.tile_bytes;
  }

  // Finds where units from this one on are copied from, all lanes at once: 32 units of tiles, or 4 of tokens.
  __device__ void find_sources(int unit) {
    const AttentionParams& attention = params.attention;
    const Request& request = place.request;
    sources_from = unit;
    if (unit < request.num_tile_units) {
      const int tile = (unit + lane) << params.log_unit_tiles;
      source = tile_of_request(tile);
      // What a last unit lacks is its first tile again, which no row sees there.
      second = params.log_unit_tiles > 0 ? tile_of_request(tile + 1) : source + layout.tile_bytes;
      return;
    }
    const Tokens tokens = tokens_of_unit(request, min(unit + lane / kRunTokens, request.num_units - 1));
    const int token = min(tokens.first + lane % kRunTokens, tokens.end - 1);
    // With the full_precision bypass, tiles hold tokens as they are.
    if (layout.full_precision && token >= request.num_sinks && token < request.shared_boundary) {
      const int tile = token >> params.log_group_size, page = params.page_tiles.divide(tile);
      const int block = block_of(attention.quantized, place.segment.request, page);
      source = page_of(attention.quantized, block, place.head) +
               (tile - page * params.page_tiles.value) * layout.tile_bytes +
               (token & (layout.group_size - 1)) * kRowBytes;
      value_distance = layout.v_codes_offset;
    } else {
      const int page = params.full_page_tokens.divide(token);
      const int block = block_of(attention.full, place.segment.request, page);
      source = full_token_at(layout, attention.full, block, place.head, token - page * params.full_page_tokens.value,
                             sizeof(T));
      value_distance = kRowBytes;
    }
  }

  __device__ void start_copy(int unit, int stage) {
    const uint32_t to = shared_address(stages) + stage * params.stage_bytes, barrier = barriers + 8 * stage;
    int index = unit - sources_from;
    if (unit < num_tile_units) {
      if (index == 32) {
        find_sources(unit);
        index = 0;
      }
      if constexpr (kBulkCopies) {
        if (lane == index) {
          expect_bytes(barrier, params.unit_bytes);
          if (second == source + layout.tile_bytes) {
            bulk_copy(to, source, params.unit_bytes, barrier);
          } else {
            bulk_copy(to, source, layout.tile_bytes, barrier);
            bulk_copy(to + layout.tile_bytes, second, layout.tile_bytes, barrier);
          }
        }
      } else {
        for (int i = 16 * lane, half = 0; i < params.unit_bytes; i += 512) {
          if (i >= layout.tile_bytes) half = layout.tile_bytes;
          const char* tile = shuffle(half == 0 ? source : second, index);
          copy16(to + i, tile + (i - half));
        }
      }
    } else {
      if (index == 32 / kRunTokens || unit == num_tile_units) {
        find_sources(unit);
        index = 0;
      }
      if constexpr (kBulkCopies) {
        if (lane == index * kRunTokens) expect_bytes(barrier, 2 * kRunTokens * kRowBytes);
        __syncwarp();
        if (lane / kRunTokens == index) {
          const uint32_t row_to = to + lane % kRunTokens * kTokenStride;
          if (layout.full_precision) {
            bulk_copy(row_to, source, kRowBytes, barrier);
            bulk_copy(row_to + kRowBytes, source + value_distance, kRowBytes, barrier);
          } else {
            bulk_copy(row_to, source, 2 * kRowBytes, barrier);
          }
        }
      } else {  // 4 lanes a token
        const int from_lane = index * kRunTokens + lane % kRunTokens;
        const char* key = shuffle(source, from_lane);
        const char* value = key + __shfl_sync(~0u, value_distance, from_lane);
        const uint32_t row_to = to + lane % kRunTokens * kTokenStride;
        for (int i = 16 * (lane / kRunTokens); i < kRowBytes; i += 64) {
          copy16(row_to + i, key + i);
          copy16(row_to + kRowBytes + i, value + i);
        }
      }
    }
    end_copies(barrier);
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
      query[i] = valid ? *reinterpret_cast<const uint32_t*>(from + 8 * i + 2 * t) : 0;
    }
  }

  // Before anything else of a segment.
  __device__ void begin_request() {
    const Request& request = place.request;
    const int log_unit_tokens = params.log_group_size + params.log_unit_tiles;
    const int first = request.first_tile << params.log_group_size;
    num_tile_units = request.num_tile_units;
    plain_begin = first < layout.sink_tokens;
    plain_end = (request.shared_boundary - first) >> log_unit_tokens;
  }

  __device__ int first_column() const { return place.segment.item / layout.num_kv_heads * kColumns; }

  __device__ void begin_segment(uint32_t (&codes)[D / 8]) {
    constexpr int kPairsOfWord = kPairs<K_BITS>;
    rows = 0;
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
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float factor = power_of_two(kQueryExponent - exponent - position<K_BITS>(i % kPairsOfWord));
      query_codes[i] = pack<__half>(pairs[i].x * factor, pairs[i].y * factor);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) query_exponent[i] = __shfl_sync(~0u, exponent, 4 * (2 * t + i)) - kQueryExponent;

#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) output[block][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) zeros[0][i] = zeros[1][i] = 0;
    maximum[0] = maximum[1] = -1e30f;
    sum[0] = sum[1] = 0;
    key_exponent = value_exponent = zero_exponent = Relative<T>::kLowest;
    set_scales();
  }

  __device__ void set_scales() {
    key_limit = largest_of<T>(key_exponent);
    value_limit = largest_of<T>(value_exponent);
    zero_limit = largest_of<T>(zero_exponent);
    key_shift = Relative<T>::shift(key_exponent, kKeyScaleTop);
    zero_shift = Relative<T>::shift(zero_exponent, kValueZeroTop);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // of tokens 2 (lane % 2) + i of four: the positions of their codes
      const int at = lane % 2 == 0 ? position<V_BITS>(i) : position<V_BITS>(2 + i);
      value_shift[i] = Relative<T>::shift(value_exponent, kValueScaleTop, at);
      factor[i] = power_of_two(query_exponent[i] + 24 - kKeyScaleTop + key_exponent - Relative<T>::kBias) *
                  (params.attention.scale * kLog2E);
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
      zeros[0][i] *= i % 2 == 0 ? even : odd;
      zeros[1][i] *= i % 2 == 0 ? even : odd;
    }
  }

  // Turns H x N products of columns 2t and 2t + 1, of tokens of which other lanes hold others, into elements of P.
  // Scores, as exponents of 2, are product * factor + start.
  template <int H, int N>
  __device__ void take_softmax(float (&products)[H][N][2], float (&factor)[2], float (&start)[H][2]) {
    if (params.attention.logits_soft_cap > 0) cap(products, factor, start);
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
    const float limit = params.attention.logits_soft_cap * kLog2E;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
#pragma unroll
      for (int h = 0; h < H; ++h) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float score = fmaf(products[h][i][column], factor[column], start[h][column]);
          const float power = exp2_approx(score * (2 * kLog2E / limit));
          products[h][i][column] = score == -INFINITY ? score : limit - __fdividef(2 * limit, power + 1);
        }
        start[h][column] = 0;
      }
      factor[column] = 1;
    }
  }

  __device__ bool visible(int token, int column, bool from_tile, bool sink) const {
    const int position = place.request.num_tokens - place.request.num_rows + (rows >> 16 * column & 0xFFFF);
    if (sink) return token <= position;
    if (layout.full_precision) return token <= position;
    const int limit = boundary(layout, position + 1);
    return from_tile ? token >= layout.sink_tokens && token < limit : token >= limit && token <= position;
  }

  // --------------------------------------------------------------------------------------------------------- tile

  // From a half to the next: its tile, or its tokens in the same tile.
  __device__ int half_bytes() const { return layout.group_size == kHalfTokens ? layout.tile_bytes : 0; }
  __device__ int half_tokens() const { return layout.group_size == kHalfTokens ? 0 : kHalfTokens; }

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

  // Scales and zeros of a half, this lane's part.
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
        p[h].keys[i] = load_pairs(tile + (i == 0 ? first_key_scales : key_scales_at(i)), kPairs<K_BITS>);
        p[h].scales[i] = load_pairs(value_scales + value_at, 4);
        p[h].zeros[i] = load_pairs(value_scales + value_at + (layout.v_zero_offset - layout.v_scale_offset), 4);
        largest.key = __vmaxu2(largest.key, __vmaxu2(p[h].keys[i].x, p[h].keys[i].y));
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
      uint2* out = reinterpret_cast<uint2*>(prepared + h * kPreparedWords) + lane;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (D % 128 != 0 && lane >= D / 4) break;
        out[32 * i] = {Relative<T>::to_half(p[h].keys[i].x, key_shift),
                       Relative<T>::to_half(p[h].keys[i].y, key_shift)};
        out[32 * i + D / 4] = {Relative<T>::to_half(p[h].scales[i].x, value_shift[0]),
                               Relative<T>::to_half(p[h].scales[i].y, value_shift[1])};
        // Pairs 0, 2, 1, 3: see multiply_values.
        uint32_t* zeros_out = prepared + h * kPreparedWords + D + (lane + 32 * i) / 2 * 4 + lane % 2;
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
    meanwhile();
    const bool larger = __vmaxu2(largest.key, key_limit) != key_limit ||
                        __vmaxu2(largest.scale, value_limit) != value_limit ||
                        __vmaxu2(largest.zero, zero_limit) != zero_limit;
    store_scales(p);
    if (__any_sync(~0u, larger)) [[unlikely]] {
      const int value_before = value_exponent, zero_before = zero_exponent;
      key_exponent = larger_exponent(largest.key, key_exponent);
      value_exponent = larger_exponent(largest.scale, value_exponent);
      zero_exponent = larger_exponent(largest.zero, zero_exponent);
      set_scales();
      const float factor = power_of_two(value_before - value_exponent);
      rescale(factor, factor);
      const float zero_factor = power_of_two(zero_before - zero_exponent);
      rescale_zeros(zero_factor, zero_factor);
      load_scales(tile, first_token, p, largest);
      store_scales(p);
    }
    __syncwarp();
  }

  __device__ void attend_tiles(const char* stage, int unit) {
    const bool plain = unit >= plain_begin && unit < plain_end;
    const int unit_tokens = layout.group_size << params.log_unit_tiles;
#pragma unroll 1
    for (int offset = 0; offset < unit_tokens; offset += kHalves * kHalfTokens) {
      const char* tile = stage + (offset >> params.log_group_size) * layout.tile_bytes;
      const int first_token = offset & (layout.group_size - 1);
      // Rows g are of the first half, rows g + 8 of the second.
      float key_zeros[2][4] = {};
      prepare(tile, first_token, [&] {
        const uint32_t zero_row = shared_address(tile) + key_zeros_at;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          uint32_t a[4];
          ldmatrix(a, zero_row + 32 * i);  // all rows of a half are the same
          mma_k16<T>(key_zeros[i % 2], a[0], a[1], a[2], a[3], query[2 * i], query[2 * i + 1]);
        }
      });
      float scores[kHalves][2][4] = {};  // block m: rows g and g + 8 are tokens 4 g + 2 m and + 1 of the half
      multiply_keys(tile, first_token, scores);

      float probability[kHalves][4][2], start[kHalves][2], factors[2] = {factor[0], factor[1]};
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) probability[h][i / 2][i % 2] = scores[h][i / 4][i % 4];  // of tokens 4 g + ...
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          start[h][i] = (key_zeros[0][2 * h + i] + key_zeros[1][2 * h + i]) * (params.attention.scale * kLog2E);
        }
      }
      if (!plain) {
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
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int word = t + 4 * i;
        const uint32_t* scale = prepared + h * kPreparedWords + word * kPairsOfWord;
        const uint4 words = *reinterpret_cast<const uint4*>(codes + h * distance + i * (16 * layout.group_size));
        uint32_t folded[kPairsOfWord];
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
    // One A serves both halves of the 32 tokens: the sums of the first in rows g, of the second in rows g + 8. Rows
    // that are no value group are never read.
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const uint4 zero = reinterpret_cast<const uint4*>(prepared + h * kPreparedWords + D)[lane % (D / 8)];
      mma_k16<__half>(zeros[0], zero.x, zero.y, zero.z, zero.w, weights[h][0], weights[h][1]);
      mma_k16<__half>(zeros[1], zero.x, zero.y, zero.z, zero.w, weights[h][2], weights[h][3]);
    }
    // Words of tokens 8 t ... 8 t + 7 and channels 4 g ... 4 g + 3 of each 32.
    const char* codes = tile + value_codes + first_token / 8 * (D * V_BITS);
    const int distance = half_bytes() + half_tokens() / 8 * (D * V_BITS);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const uint4* scales = reinterpret_cast<const uint4*>(prepared + h * kPreparedWords + D / 2) + t;
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
    const float unit = power_of_two(24 - kValueScaleTop + value_exponent - Relative<T>::kBias);
    const float zero_unit = power_of_two(zero_exponent - Relative<T>::kBias - kValueZeroTop);
    rescale(unit, unit);
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      const int from = (32 * b >> params.log_group_size) * 4 + t;
      const float even = __shfl_sync(~0u, zeros[0][0] + zeros[1][2], from) * zero_unit;
      const float odd = __shfl_sync(~0u, zeros[0][1] + zeros[1][3], from) * zero_unit;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        output[2 * b + x][0] += even;
        output[2 * b + x][1] += odd;
        output[2 * b + x][2] += even;
        output[2 * b + x][3] += odd;
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
    float scores[4] = {};  // rows g are tokens; rows g + 8 are not used
    const uint32_t key = shared_address(stage) + lane % 8 * kTokenStride + lane / 8 * 16;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      uint32_t a[4];
      ldmatrix(a, key + 64 * i);
      mma_k16<T>(scores, a[0], 0, a[1], 0, query[4 * i], query[4 * i + 1]);
      mma_k16<T>(scores, a[2], 0, a[3], 0, query[4 * i + 2], query[4 * i + 3]);
    }
    float probability[1][1][2] = {{{scores[0], scores[1]}}};
    const float scale = params.attention.scale * kLog2E;
    float factors[2] = {scale, scale}, start[1][2] = {};
    const int token = tokens.first + g;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if (token >= tokens.end || !visible(token, column, false, tokens.sink)) probability[0][0][column] = -INFINITY;
    }
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
