// A row by one panel, activations in float32: codes become floats in registers.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

template <Code code, int rows>
struct FloatProducts {
  std::conditional_t<in_place(code), QuadMasks<bits_of(code)>, Floats<code>> numbers;
  PartSums<rows> sums;
  explicit FloatProducts(const float* table) : numbers(table) {}
  template <int first, int columns>
  QCORE_INLINE void add_chunk(const uint8_t* chunk, const float* x, int64_t run) {
    x += first * run;
    auto add = [&](F16 value, auto column) QCORE_INSIDE {
      unroll<rows>([&](auto r) QCORE_INSIDE {
        F16& to = sums.part[r][column % PartSums<rows>::count];
        to = fma(value, all_f(x[r]), to);
      });
      if constexpr (rows == 1) x++;
      else advance(x, run);
    };
    if constexpr (in_place(code)) each_column_in_place<code, first, columns>(chunk, numbers, add);
    else each_column<code, first, columns>(chunk, numbers, add);
  }
  QCORE_INLINE F16 take(int r) { return sums.take(r); }
};

#ifndef __AVX512F__

// Products where the four columns of a quad lie side by side, because codes of a byte each become floats more quickly so: `Expand` makes
// eight floats four times of 32 codes, and says which rows they are of. Sums are turned into rows at a section's end.
template <Code code, class Expand>
struct SideProducts {
  const Expand expand;
  __m256 sums[8];
  explicit SideProducts(const float* table) : expand(table) {
    for (__m256& sum : sums) sum = _mm256_setzero_ps();
  }
  template <int first, int columns>
  QCORE_INLINE void add_chunk(const uint8_t* chunk, const float* x, int64_t) {
    unroll<columns / 4>([&](auto place) QCORE_INSIDE {
      constexpr int t = first / 4 + place;
      const I16 codes = quad<bits_of(code), t>(chunk);
      const __m256 given = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + 4 * t));
      expand(codes.a, [&](auto i, __m256 values) QCORE_INSIDE { sums[i] = _mm256_fmadd_ps(values, given, sums[i]); });
      expand(codes.b, [&](auto i, __m256 values) QCORE_INSIDE { sums[4 + i] = _mm256_fmadd_ps(values, given, sums[4 + i]); });
    });
  }
  QCORE_INLINE F16 take(int) {
    F16 rows;
    rows.a = Expand::in_order(_mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3])));
    rows.b = Expand::in_order(_mm256_hadd_ps(_mm256_hadd_ps(sums[4], sums[5]), _mm256_hadd_ps(sums[6], sums[7])));
    for (__m256& sum : sums) sum = _mm256_setzero_ps();
    return rows;
  }
};

// AVX2 looks up no 16 floats at once, but 16 bytes: a float's four bytes come one by one and are put together. Rows i and i + 4.
struct ExpandTable {
  __m256i bytes[4];
  explicit ExpandTable(const float* entries) {
    for (int byte = 0; byte < 4; byte++) {
      alignas(16) uint8_t row[16];
      for (int i = 0; i < 16; i++) std::memcpy(row + i, reinterpret_cast<const uint8_t*>(entries + i) + byte, 1);
      bytes[byte] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(row)));
    }
  }
  template <class F>
  QCORE_INLINE void operator()(__m256i codes, F&& f) const {
    using std::integral_constant;
    const __m256i a = _mm256_shuffle_epi8(bytes[0], codes), b = _mm256_shuffle_epi8(bytes[1], codes);
    const __m256i c = _mm256_shuffle_epi8(bytes[2], codes), d = _mm256_shuffle_epi8(bytes[3], codes);
    const __m256i low = _mm256_unpacklo_epi8(a, b), low2 = _mm256_unpacklo_epi8(c, d);
    const __m256i high = _mm256_unpackhi_epi8(a, b), high2 = _mm256_unpackhi_epi8(c, d);
    f(integral_constant<int, 0>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2)));
    f(integral_constant<int, 1>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2)));
    f(integral_constant<int, 2>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2)));
    f(integral_constant<int, 3>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2)));
  }
  QCORE_INLINE static __m256 in_order(__m256 rows) { return rows; }
};

// A float of 8 bits is one of 16 but for a power of two: the exponent of float16 has a bit more, or as many. Rows 2 i and 2 i + 1.
template <Code code>
struct ExpandFloat8 {
  static constexpr FloatShape shape = shape_of(code);
  explicit ExpandFloat8(const float*) {}
  QCORE_INLINE static __m256i halves(__m256i high_bytes) {
    if constexpr (shape.exponent == 5) return high_bytes;
    return _mm256_and_si256(_mm256_srai_epi16(high_bytes, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  }
  template <class F>
  QCORE_INLINE void operator()(__m256i codes, F&& f) const {
    using std::integral_constant;
    const __m256i none = _mm256_setzero_si256();
    const __m256i low = halves(_mm256_unpacklo_epi8(none, codes)), high = halves(_mm256_unpackhi_epi8(none, codes));
    f(integral_constant<int, 0>{}, _mm256_cvtph_ps(_mm256_castsi256_si128(low)));
    f(integral_constant<int, 1>{}, _mm256_cvtph_ps(_mm256_castsi256_si128(high)));
    f(integral_constant<int, 2>{}, _mm256_cvtph_ps(_mm256_extracti128_si256(low, 1)));
    f(integral_constant<int, 3>{}, _mm256_cvtph_ps(_mm256_extracti128_si256(high, 1)));
  }
  QCORE_INLINE static __m256 in_order(__m256 rows) {  // 0 2 4 6 1 3 5 7
    const __m256 ordered = _mm256_permutevar8x32_ps(rows, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return _mm256_mul_ps(ordered, _mm256_set1_ps(static_cast<float>(1 << (15 - shape.bias))));
  }
};

template <Code code, int rows>  // one
using ProductsOf = std::conditional_t<is_table(code), SideProducts<code, ExpandTable>,
                                      std::conditional_t<!is_integer(code) && bits_of(code) == 8, SideProducts<code, ExpandFloat8<code>>, FloatProducts<code, 1>>>;

#else
template <Code code, int rows>
using ProductsOf = FloatProducts<code, rows>;
#endif

// Products of a section are summed before they are scaled.
template <Code code, int rows>
void exact_rows(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  ProductsOf<code, rows> products(strip.table);
  const int64_t run = rows == 1 ? 1 : batch.run;
  const float* const x = batch.values + row * strip.h->padded;
  const FloatEnd end(strip, batch, is_integer(code) ? static_cast<float>(strip.h->zero) : 0);
  F16 total[rows];
  unroll<rows>([&](auto r) QCORE_INSIDE { total[r] = zero_f(); });
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE { products.template add_chunk<begin, count>(chunk, x + base * run, run); },
      [&](int64_t s, int64_t g) QCORE_INSIDE {
        end_section<1, rows, true>(&end, row, s, g, [&](int, int r) QCORE_INSIDE { return products.take(r); }, [&](int, int r) QCORE_INSIDE -> F16& { return total[r]; });
      });
  unroll<rows>([&](auto r) QCORE_INSIDE { store_f(out + 16 * r, total[r]); });
}

}  // namespace QCORE_ISA
}  // namespace qcore
