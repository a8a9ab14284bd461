// Attention of many tokens at once: blocks of queries against spans of keys and values, whose sums are rescaled when a greater score
// comes (FlashAttention's softmax, Dao et al. 2022).
//
// Lanes are queries: scores are [key][query] and what is found [dimension][query], so that nothing is summed across lanes, and keys and
// values are read as they lie. Products are of float32, or, where the model computes in bfloat16 and the processor multiplies it, of that:
// queries and chances are rounded to it then, as torch does, and sums are float32.
#pragma once
#include "attention.h"
#ifdef __AVX512BF16__
#include "halves.h"
#endif
#include "scratch.h"

namespace qcore {
namespace QCORE_ISA {

// Vectors of lanes, and words that are multiplied by them, whose sums are in registers together.
#ifdef __AVX512F__
constexpr int kLanePanels = 2, kWordsAtOnce = 8;
#else
constexpr int kLanePanels = 1, kWordsAtOnce = 4;
#endif
constexpr int64_t kLanes = 16 * kLanePanels;
constexpr float kNever = -1e30f;  // the score of a key that a query does not see

// Numbers in words of 32 bits: one of float32.
struct FloatWords {
  static constexpr int64_t numbers = 1;
  using Lanes = F16;
  QCORE_INLINE static Lanes load(const char* p) { return load_f(reinterpret_cast<const float*>(p)); }
  QCORE_INLINE static Lanes spread(const char* p) {
    float value;
    std::memcpy(&value, p, 4);
    return all_f(value);
  }
  QCORE_INLINE static void add(F16& sum, Lanes a, Lanes b) { sum = fma(a, b, sum); }
  // Numbers i .. i + 15 of a row.
  QCORE_INLINE static void put_row(F16 values, int64_t i, char* row) { store_f(reinterpret_cast<float*>(row) + i, values); }
  // Words of two rows' numbers, lane by lane; the second row is the next word's.
  QCORE_INLINE static void put_words(F16 first, F16 second, int64_t lanes, char* to) {
    store_f(reinterpret_cast<float*>(to), first);
    store_f(reinterpret_cast<float*>(to) + lanes, second);
  }
};

#ifdef __AVX512BF16__
// Two of bfloat16.
struct HalfWords {
  static constexpr int64_t numbers = 2;
  using Lanes = __m512i;
  QCORE_INLINE static Lanes load(const char* p) { return _mm512_loadu_si512(p); }
  QCORE_INLINE static Lanes spread(const char* p) { return spread_word(p); }
  QCORE_INLINE static void add(F16& sum, Lanes a, Lanes b) { add_pairs(sum, a, b); }
  QCORE_INLINE static void put_row(F16 values, int64_t i, char* row) { narrow_bf16(reinterpret_cast<uint16_t*>(row) + i, values); }
  QCORE_INLINE static void put_words(F16 first, F16 second, int64_t, char* to) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};
#endif

// Keys and values of some positions: numbers [keys][head_dim], and words [keys / numbers][head_dim][numbers]; and what each row of them is to be
// multiplied by. Zeros behind the last.
struct Span {
  int64_t begin, end;
  char *keys, *values;
  float *key_scales, *value_scales;
};

constexpr int64_t kSpanRows = kAttentionSpan + kWordsAtOnce;

template <class Words, Kept kept, Float type>
void open_span(const Attention& a, int64_t kv_head, const Span& span) {
  using Rows = KeptRows<kept, type>;
  const Rows keys(a, a.keys, a.key_side, kv_head), values(a, a.values, a.value_side, kv_head);
  const int64_t full = span.end - span.begin, bytes = a.head_dim * 4 / Words::numbers;
  for (int64_t t = 0; t < kSpanRows; t++) span.key_scales[t] = a.scale, span.value_scales[t] = 1;
  keys.scale_all(span.begin, full, span.key_scales);
  values.scale_all(span.begin, full, span.value_scales);
  auto numbers = [&](const Rows& rows, int64_t t, int64_t i) QCORE_INSIDE { return t < full ? rows.codes(span.begin + t, i) : zero_f(); };
  for (int64_t t = 0; t < full + kWordsAtOnce - 1; t++)
    for (int64_t i = 0; i < a.head_dim; i += 16) Words::put_row(numbers(keys, t, i), i, span.keys + t * bytes);
  for (int64_t t = 0; t < full + kWordsAtOnce - 1; t += 2)
    for (int64_t i = 0; i < a.head_dim; i += 16)
      Words::put_words(numbers(values, t, i), numbers(values, t + 1, i), a.head_dim, span.values + 4 * (t / Words::numbers * a.head_dim + i));
}

template <class Words>
void open_span(const Attention& a, int64_t kv_head, const Span& span) {
  switch (a.kept) {
    case Kept::kInt8: return open_span<Words, Kept::kInt8, Float::kF32>(a, kv_head, span);
    case Kept::kE4M3: return open_span<Words, Kept::kE4M3, Float::kF32>(a, kv_head, span);
    case Kept::kE5M2: return open_span<Words, Kept::kE5M2, Float::kF32>(a, kv_head, span);
    default: break;
  }
  if constexpr (Words::numbers == 1) {
    if (a.type == Float::kF32) return open_span<Words, Kept::kPlain, Float::kF32>(a, kv_head, span);
    if (a.type == Float::kF16) return open_span<Words, Kept::kPlain, Float::kF16>(a, kv_head, span);
  }
  open_span<Words, Kept::kPlain, Float::kBF16>(a, kv_head, span);
}

// Queries that are in lanes together, and what they have found so far.
struct QueryTile {
  char* queries;             // words [head_dim / numbers][kLanes]
  float* found;              // [head_dim][kLanes], sums of values by chances
  float *most, *total;       // [kLanes]: the greatest score, the sum of chances
  float *from, *to;          // [kLanes]: the first position and the last one that a query sees
  int64_t first, last;       // positions first .. last - 1 are seen by some query
  int64_t all_from, all_to;  // and these by each
};

// [kWordsAtOnce][kLanes] at `to`: what start(r, p) gives, and words' rows by lanes. A row's word follows the one before by `step` bytes, and
// rows lie `apart`.
template <class Words, class Start>
QCORE_INLINE void multiply_words(const char* words, int64_t apart, int64_t step, const char* lanes, int64_t steps, Start&& start, float* to) {
  F16 sums[kWordsAtOnce][kLanePanels];
  unroll<kWordsAtOnce * kLanePanels>([&](auto i) QCORE_INSIDE { sums[i / kLanePanels][i % kLanePanels] = start(i / kLanePanels, i % kLanePanels); });
  for (int64_t s = 0; s < steps; s++) {
    typename Words::Lanes given[kLanePanels];
    unroll<kLanePanels>([&](auto p) QCORE_INSIDE { given[p] = Words::load(lanes + 64 * p); });
    unroll<kWordsAtOnce>([&](auto r) QCORE_INSIDE {
      const typename Words::Lanes word = Words::spread(words + r * apart);
      unroll<kLanePanels>([&](auto p) QCORE_INSIDE { Words::add(sums[r][p], given[p], word); });
    });
    advance(words, step);
    advance(lanes, 4 * kLanes);
  }
  unroll<kWordsAtOnce * kLanePanels>([&](auto i) QCORE_INSIDE { store_f(to + 16 * i, sums[i / kLanePanels][i % kLanePanels]); });
}

// tanh(x / cap) * cap
inline F16 capped(F16 x, float cap) {
  const F16 twice = exp_f(clamp_f(mul(x, all_f(2 / cap)), -80, 80));
  return mul(sub_f(all_f(1), div(all_f(2), add(twice, all_f(1)))), all_f(cap));
}

// Scores of a span's first `count` keys into what their values are multiplied by, in words at `chances`; what was found before is to be multiplied
// by `factors`.
template <class Words, bool masked>
void find_chances(const Attention& a, const QueryTile& tile, const Span& span, int64_t count, float* scores, char* chances, F16 (&factors)[kLanePanels]) {
  unroll<kLanePanels>([&](auto p) QCORE_INSIDE {
    const F16 from = load_f(tile.from + 16 * p), to = load_f(tile.to + 16 * p), before = load_f(tile.most + 16 * p);
    auto when_seen = [&](int64_t t, F16 value, float otherwise) QCORE_INSIDE {
      return masked ? where_within(all_f(static_cast<float>(span.begin + t)), from, to, value, all_f(otherwise)) : value;
    };
    float* const column = scores + 16 * p;
    F16 most = before;
    for (int64_t t = 0; t < count; t++) {
      F16 score = mul(load_f(column + t * kLanes), all_f(span.key_scales[t]));
      if (a.softcap != 0) score = capped(score, a.softcap);
      score = when_seen(t, score, kNever);
      most = max_f(most, score);
      store_f(column + t * kLanes, score);
    }
    F16 total = zero_f();
    auto chance = [&](int64_t t) QCORE_INSIDE {
      const F16 found = when_seen(t, exp_f(sub_f(load_f(column + t * kLanes), most)), 0);
      total = add(total, found);
      return mul(found, all_f(span.value_scales[t]));
    };
    for (int64_t t = 0; t < count; t += 2) {
      const F16 first = chance(t);
      Words::put_words(first, chance(t + 1), kLanes, chances + 4 * (t / Words::numbers * kLanes + 16 * p));
    }
    factors[p] = exp_f(sub_f(before, most));
    store_f(tile.total + 16 * p, fma(load_f(tile.total + 16 * p), factors[p], total));
    store_f(tile.most + 16 * p, most);
  });
}

template <class Words>
void attend_tile(const Attention& a, const Span& span, const QueryTile& tile) {
  const int64_t last = span.end < tile.last ? span.end : tile.last, words = a.head_dim / Words::numbers;
  if (last <= span.begin || span.end <= tile.first) return;
  const int64_t count = (last - span.begin + kWordsAtOnce - 1) / kWordsAtOnce * kWordsAtOnce;
  alignas(64) float scores[kAttentionSpan * kLanes];
  alignas(64) char chances[kAttentionSpan * kLanes * 4 / Words::numbers];
  for (int64_t t = 0; t < count; t += kWordsAtOnce)
    multiply_words<Words>(span.keys + t * words * 4, words * 4, 4, tile.queries, words, [](int, int) { return zero_f(); }, scores + t * kLanes);
  F16 factors[kLanePanels];
  if (span.begin < tile.all_from || span.begin + count > tile.all_to) find_chances<Words, true>(a, tile, span, count, scores, chances, factors);
  else find_chances<Words, false>(a, tile, span, count, scores, chances, factors);
  for (int64_t i = 0; i < a.head_dim; i += kWordsAtOnce) {
    float* const found = tile.found + i * kLanes;
    multiply_words<Words>(span.values + 4 * i, 4, 4 * a.head_dim, chances, count / Words::numbers,
                          [&](int r, int p) QCORE_INSIDE { return mul(load_f(found + r * kLanes + 16 * p), factors[p]); }, found);
  }
}

// A block of tokens, and the heads that share a kv head.
struct QueryBlock {
  const Attention& a;
  int64_t kv_head, share, first_row, lanes;

  QueryBlock(const Attention& a, int64_t kv_head, int64_t block)
      : a(a), kv_head(kv_head), share(a.share()), first_row(block * a.rows_of_block()),
        lanes(share * (a.rows - first_row < a.rows_of_block() ? a.rows - first_row : a.rows_of_block())) {}

  int64_t row(int64_t lane) const { return first_row + lane / share; }
  // Where a lane's numbers are, from the row's beginning.
  int64_t place(int64_t lane) const { return (kv_head * share + lane % share) * a.head_dim; }
};

template <class Words>
void open_tile(const QueryBlock& block, int64_t first_lane, QueryTile& tile) {
  const Attention& a = block.a;
  const int64_t lanes = block.lanes - first_lane < kLanes ? block.lanes - first_lane : kLanes;
  for (int64_t lane = 0; lane < kLanes; lane++) {
    const int64_t row = block.row(first_lane + (lane < lanes ? lane : lanes - 1));
    tile.most[lane] = kNever, tile.total[lane] = 0;
    tile.from[lane] = static_cast<float>(a.first(row)), tile.to[lane] = static_cast<float>(a.last(row) - 1);
  }
  const int64_t least = block.row(first_lane), greatest = block.row(first_lane + lanes - 1);
  tile.first = a.first(least), tile.last = a.last(greatest);
  tile.all_from = a.first(greatest), tile.all_to = a.last(least);
  std::memset(tile.found, 0, a.head_dim * kLanes * sizeof(float));
  for (int64_t p = 0; p < kLanePanels; p++)
    for (int64_t i = 0; i < a.head_dim; i += 16 * Words::numbers) {
      F16 rows[16];
      for (int64_t l = 0; l < 16; l++) {
        const int64_t lane = 16 * p + l;
        alignas(64) char words[64] = {};
        if (lane < lanes)
          for (int64_t k = 0; k < 16 * Words::numbers && i + k < a.head_dim; k += 16)
            Words::put_row(load_f(a.queries + block.row(first_lane + lane) * a.stride + block.place(first_lane + lane) + i + k), k, words);
        rows[l] = load_f(reinterpret_cast<const float*>(words));
      }
      transpose(rows);
      for (int64_t k = 0; k < 16; k++) store_f(reinterpret_cast<float*>(tile.queries) + (i / Words::numbers + k) * kLanes + 16 * p, rows[k]);
    }
}

inline void close_tile(const QueryBlock& block, int64_t first_lane, const QueryTile& tile) {
  const Attention& a = block.a;
  for (int64_t p = 0; p < kLanePanels; p++) {
    const F16 factor = div(all_f(1), load_f(tile.total + 16 * p));
    for (int64_t i = 0; i < a.head_dim; i += 16) {
      F16 rows[16];
      for (int64_t k = 0; k < 16; k++) rows[k] = mul(load_f(tile.found + (i + k) * kLanes + 16 * p), factor);
      transpose(rows);
      for (int64_t l = 0; l < 16; l++) {
        const int64_t lane = first_lane + 16 * p + l;
        if (lane < block.lanes) put(rows[l], a.type, a.out, block.row(lane) * a.heads * a.head_dim + block.place(lane) + i);
      }
    }
  }
}

template <class Words>
void attend_block(const QueryBlock& block) {
  static thread_local Scratch scratch;
  static thread_local std::vector<QueryTile> tiles;
  const Attention& a = block.a;
  const int64_t words = (a.head_dim / Words::numbers + 15) / 16 * 16 * kLanes, found = a.head_dim * kLanes;
  tiles.resize((block.lanes + kLanes - 1) / kLanes);
  char* queries;
  float *sums, *lanes;
  Span span;
  const int64_t count = static_cast<int64_t>(tiles.size());
  scratch.begin(count * 4 * (words + found + 4 * kLanes) + 8 * kSpanRows * (a.head_dim + 1), 7);
  scratch.take(queries, count * words * 4);
  scratch.take(sums, count * found);
  scratch.take(lanes, count * 4 * kLanes);
  scratch.take(span.keys, 4 * kSpanRows * a.head_dim);
  scratch.take(span.values, 4 * kSpanRows * a.head_dim);
  scratch.take(span.key_scales, kSpanRows);
  scratch.take(span.value_scales, kSpanRows);
  for (int64_t i = 0; i < count; i++) {
    float* const own = lanes + i * 4 * kLanes;
    tiles[i] = {queries + i * words * 4, sums + i * found, own, own + kLanes, own + 2 * kLanes, own + 3 * kLanes, 0, 0, 0, 0};
    open_tile<Words>(block, i * kLanes, tiles[i]);
  }
  const int64_t last = tiles.back().last;
  for (span.begin = tiles.front().first; span.begin < last; span.begin = span.end) {
    span.end = span.begin + kAttentionSpan < last ? span.begin + kAttentionSpan : last;
    open_span<Words>(a, block.kv_head, span);
    for (const QueryTile& tile : tiles) attend_tile<Words>(a, span, tile);
  }
  for (int64_t i = 0; i < count; i++) close_tile(block, i * kLanes, tiles[i]);
  scratch.end();
}

// Blocks first .. last - 1: of the last tokens first, which look back the farthest. head_dim is a multiple of 16.
inline void attend_rows(const Attention& a, int64_t first, int64_t last) {
  for (int64_t item = first; item < last; item++) {
    const QueryBlock block(a, item % a.kv_heads, a.row_blocks() - 1 - item / a.kv_heads);
#ifdef __AVX512BF16__
    if (a.type == Float::kBF16) {
      attend_block<HalfWords>(block);
      continue;
    }
#endif
    attend_block<FloatWords>(block);
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
