// Few rows by one panel, activations in int8: products and sums of codes are whole numbers, exactly.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

struct WholeSum {
  I16 sum = zero_i();
  QCORE_INLINE I16 take() {
    const I16 taken = sum;
    sum = zero_i();
    return taken;
  }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// Bytes of the weight are unsigned for the instruction: 8-bit codes are shifted by 128, which the sums of the input undo.
template <int bits>
struct Dot : WholeSum {
  static constexpr bool pairs = false;
  static constexpr int32_t shift = bits == 8 ? 128 : 0;
  QCORE_INLINE static I16 ready(I16 codes) { return bits == 8 ? codes ^ all_i(static_cast<int32_t>(0x80808080)) : codes; }
  template <int t>
  QCORE_INLINE void add_quad(I16 codes, const void* x) {
#ifdef __AVX512VNNI__
    sum.v = _mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(word_at(x)));
#else
    const __m256i given = _mm256_set1_epi32(word_at(x));
    sum.a = _mm256_dpbusd_avx_epi32(sum.a, codes.a, given);
    sum.b = _mm256_dpbusd_avx_epi32(sum.b, codes.b, given);
#endif
  }
  QCORE_INLINE void end_chunk() {}
};

#else

// Pairs of products are summed in 16 bits, as many as fit there whatever the codes.
template <int bits>
struct Dot : WholeSum {
  static constexpr bool pairs = false;
  static constexpr int32_t shift = 0;
  static constexpr int fitting = bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
  I16 narrow = zero_i();
  QCORE_INLINE static I16 ready(I16 codes) { return codes; }
  template <int t>
  QCORE_INLINE void add_quad(I16 codes, const void* x) {
    const __m256i given = _mm256_set1_epi32(word_at(x));
    const I16 product{_mm256_maddubs_epi16(codes.a, given), _mm256_maddubs_epi16(codes.b, given)};
    if constexpr (t % fitting == 0) {
      if constexpr (t > 0) widen();
      narrow = product;
    } else {
      narrow = {_mm256_add_epi16(narrow.a, product.a), _mm256_add_epi16(narrow.b, product.b)};
    }
  }
  QCORE_INLINE void end_chunk() { widen(); }
  QCORE_INLINE void widen() {
    const __m256i one = _mm256_set1_epi16(1);
    sum = add(sum, {_mm256_madd_epi16(narrow.a, one), _mm256_madd_epi16(narrow.b, one)});
  }
};

// Products of two 8-bit codes do not fit in pairs: both become 16 bits wide, columns 0 and 2 of a quad, then 1 and 3.
template <>
struct Dot<8> : WholeSum {
  static constexpr bool pairs = true;
  static constexpr int32_t shift = 0;
  QCORE_INLINE static I16 ready(I16 codes) { return codes; }
  template <int t>
  QCORE_INLINE void add_quad(I16 codes, const void* x) {
    const __m256i even = _mm256_set1_epi32(word_at(x)), odd = _mm256_set1_epi32(word_at(static_cast<const char*>(x) + 4));
    const I16 low{_mm256_srai_epi16(_mm256_slli_epi16(codes.a, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(codes.b, 8), 8)};
    const I16 high{_mm256_srai_epi16(codes.a, 8), _mm256_srai_epi16(codes.b, 8)};
    sum = add(sum, {_mm256_madd_epi16(low.a, even), _mm256_madd_epi16(low.b, even)});
    sum = add(sum, {_mm256_madd_epi16(high.a, odd), _mm256_madd_epi16(high.b, odd)});
  }
  QCORE_INLINE void end_chunk() {}
};

#endif

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

// out[m][16] of the rows first .. first + M - 1.
template <Code code, int M>
void integer_rows(const Strip& strip, const Batch& batch, int64_t first, float* out) {
  constexpr int bits = bits_of(code);
  using D = Dot<is_table(code) ? 8 : bits>;
  const Bytes bytes(is_table(code) ? strip.table : nullptr);
  const Header& h = strip.h;
  const int32_t zero = static_cast<int32_t>(h.zero) + D::shift;
  const char* x[M];
  F16 total[M];
  constexpr int width = D::pairs ? 2 : 1;
  for (int m = 0; m < M; m++) {
    const void* row = D::pairs ? static_cast<const void*>(batch.pairs + (first + m) * h.padded)
                               : static_cast<const void*>(batch.codes + (first + m) * h.padded);
    x[m] = static_cast<const char*>(row);
    total[m] = zero_f();
  }
  D dot[M];
  walk<bits>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        unroll<count / 4>([&](auto place) QCORE_INSIDE {
          constexpr int t = begin / 4 + place;
          I16 codes = quad<bits, t>(chunk);
          if constexpr (is_table(code)) codes = bytes(codes);
          codes = D::ready(codes);
          for (int m = 0; m < M; m++) dot[m].template add_quad<place>(codes, x[m] + width * (base + 4 * t));
        });
        for (int m = 0; m < M; m++) dot[m].end_chunk();
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE {
        const F16 scale = load_f(strip.scales + 16 * g);
        for (int m = 0; m < M; m++) {
          const int64_t at = (first + m) * batch.sections + s;
          F16 sum = to_float(sub(dot[m].take(), all_i(zero * batch.totals[at])));
          if (strip.zeros) sum = fma(load_f(strip.zeros + 16 * g), all_f(static_cast<float>(batch.totals[at])), sum);
          total[m] = fma(sum, mul(scale, all_f(batch.scales[at])), total[m]);
          if (strip.offsets) total[m] = fma(load_f(strip.offsets + 16 * g), all_f(batch.sums[at]), total[m]);
        }
      });
  for (int m = 0; m < M; m++) store_f(out + 16 * m, total[m]);
}

}  // namespace QCORE_ISA
}  // namespace qcore
