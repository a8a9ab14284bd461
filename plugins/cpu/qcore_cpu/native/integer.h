// Activations in int8: products and sums of codes are whole numbers, exactly. A row by one panel, and the parts that blocks of rows share.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

// Sums stay in the order in which they are written: compilers would make all products first, for which there are too few registers.
QCORE_INLINE void keep_order(I16& sum) {
#ifdef __AVX512F__
  __asm__("" : "+v"(sum.v));
#else
  __asm__("" : "+x"(sum.a), "+x"(sum.b));
#endif
}

struct SectionEnd;

struct WholeSum {
  using End = SectionEnd;
  I16 sum = zero_i();
  QCORE_INLINE I16 take() {
    const I16 taken = sum;
    sum = zero_i();
    return taken;
  }
};

// A sum of products. Codes come in steps, four to a row: as quads of bytes, or where their `width` is 2 as two pairs of 16 bits, the
// columns 0 2 and 1 3 of a quad. Behind `fitting` steps end_run is called.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Bytes of the weight are unsigned for the instruction: 8-bit codes are shifted by 128, which the sums of the input undo.
template <int bits>
struct Dot : WholeSum {
  static constexpr int width = 1;
  static constexpr int32_t shift = bits == 8 ? 128 : 0;
  static constexpr int fitting = 8;
  QCORE_INLINE static I16 ready(I16 codes) { return bits == 8 ? codes ^ all_i(static_cast<int32_t>(0x80808080)) : codes; }
  QCORE_INLINE void add_step(I16 codes, const void* x) {
#ifdef __AVX512VNNI__
    sum.v = _mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(word_at(x)));
#else
    const __m256i given = _mm256_set1_epi32(word_at(x));
    sum.a = _mm256_dpbusd_avx_epi32(sum.a, codes.a, given);
    sum.b = _mm256_dpbusd_avx_epi32(sum.b, codes.b, given);
#endif
  }
  QCORE_INLINE void end_run() {}
};
constexpr int dot_bits(int bits) { return bits == 8 ? 8 : 4; }

#else

// Products are summed in 16 bits, as many as fit there whatever the codes.
template <int bits>
struct Dot : WholeSum {
  static constexpr int width = 1;
  static constexpr int32_t shift = 0;
  static constexpr int fitting = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
  I16 narrow = zero_i();
  QCORE_INLINE static I16 ready(I16 codes) { return codes; }
  QCORE_INLINE void add_step(I16 codes, const void* x) {
    const __m256i given = _mm256_set1_epi32(word_at(x));
    narrow.a = _mm256_add_epi16(narrow.a, _mm256_maddubs_epi16(codes.a, given));
    narrow.b = _mm256_add_epi16(narrow.b, _mm256_maddubs_epi16(codes.b, given));
    keep_order(narrow);
  }
  QCORE_INLINE void end_run() {
    const __m256i one = _mm256_set1_epi16(1);
    sum = add(sum, {_mm256_madd_epi16(narrow.a, one), _mm256_madd_epi16(narrow.b, one)});
    narrow = zero_i();
  }
};

// Products of two 8-bit codes do not fit in pairs: both become 16 bits wide.
template <>
struct Dot<8> : WholeSum {
  static constexpr int width = 2;
  static constexpr int32_t shift = 0;
  static constexpr int fitting = 8;
  QCORE_INLINE static I16 ready(I16 codes) { return codes; }
  QCORE_INLINE static I16 even(I16 codes) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(codes.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(codes.b, 8), 8)};
  }
  QCORE_INLINE static I16 odd(I16 codes) { return {_mm256_srai_epi16(codes.a, 8), _mm256_srai_epi16(codes.b, 8)}; }
  QCORE_INLINE void add_step(I16 codes, const void* x) {
    const __m256i given = _mm256_set1_epi32(word_at(x));
    sum = add(sum, {_mm256_madd_epi16(codes.a, given), _mm256_madd_epi16(codes.b, given)});
    keep_order(sum);
  }
  QCORE_INLINE void end_run() {}
};
constexpr int dot_bits(int bits) { return bits < 4 ? 4 : bits; }

#endif

// Narrow codes share what is the same for them.
template <Code code>
using DotOf = Dot<dot_bits(is_table(code) ? 8 : bits_of(code))>;

// A table's whole numbers by the codes of a quad: int8 in each byte.
struct Bytes {
  explicit Bytes(const float* entries) {
    alignas(16) int8_t whole[16];
    for (int i = 0; i < 16; i++) whole[i] = entries ? static_cast<int8_t>(entries[i]) : 0;
    const __m128i row = _mm_load_si128(reinterpret_cast<const __m128i*>(whole));
#ifdef __AVX512F__
    table.v = _mm512_broadcast_i32x4(row);
#else
    table.a = table.b = _mm256_broadcastsi128_si256(row);
#endif
  }
  QCORE_INLINE I16 operator()(I16 codes) const {
#ifdef __AVX512F__
    return {_mm512_shuffle_epi8(table.v, codes.v)};
#else
    return {_mm256_shuffle_epi8(table.a, codes.a), _mm256_shuffle_epi8(table.b, codes.b)};
#endif
  }
  I16 table;
};

// What a weight's codes are too great by, as Dot takes them.
inline int32_t zero_of(const Header& h) {
  const bool wide = is_table(h.code) || is_grid(h.code) || h.code == Code::kInt8;
  return static_cast<int32_t>(h.zero) + (wide ? Dot<8>::shift : 0);
}

// How sections end: copied from a panel and a batch, so that it stays in registers.
struct SectionEnd {
  const float *scales, *zeros, *offsets;                        // of the panel
  const float *row_scales, *sums;                               // of the rows
  const int32_t *totals, *shifts;
  int64_t sections;

  SectionEnd(const Strip& strip, const Batch& batch)
      : scales(strip.scales), zeros(strip.zeros), offsets(strip.offsets), row_scales(batch.scales), sums(batch.sums), totals(batch.totals),
        shifts(batch.shifts), sections(batch.sections) {}

  // The total of a row with the sum of products of its section s, which is exact until it is scaled.
  QCORE_INLINE F16 add(int64_t row, int64_t s, int64_t g, I16 products, F16 total) const {
    const int64_t place = row * sections + s;
    F16 sum = to_float(sub(products, all_i(shifts[place])));
    if (zeros) sum = fma(load_f(zeros + 16 * g), all_f(static_cast<float>(totals[place])), sum);
    total = fma(sum, mul(load_f(scales + 16 * g), all_f(row_scales[place])), total);
    return offsets ? fma(load_f(offsets + 16 * g), all_f(sums[place]), total) : total;
  }
};

template <Code code>
void integer_row(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  constexpr int bits = bits_of(code);
  using D = DotOf<code>;
  const Bytes bytes(is_table(code) ? strip.table : nullptr);
  const char* const x = numbers_of(batch) + row * strip.h->padded * D::width;
  const SectionEnd end(strip, batch);
  F16 total = zero_f();
  D dot;
  walk<bits>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        unroll<count / 4>([&](auto place) QCORE_INSIDE {
          constexpr int t = begin / 4 + place;
          I16 codes = quad<bits, t>(chunk);
          if constexpr (is_table(code)) codes = bytes(codes);
          const char* const given = x + D::width * (base + 4 * t);
          if constexpr (D::width == 2) {
            dot.add_step(D::even(codes), given);
            dot.add_step(D::odd(codes), given + 4);
          } else {
            dot.add_step(D::ready(codes), given);
          }
          if constexpr (place % D::fitting == D::fitting - 1 || place == count / 4 - 1) dot.end_run();
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE { total = end.add(row, s, g, dot.take(), total); });
  store_f(out, total);
}

}  // namespace QCORE_ISA
}  // namespace qcore
