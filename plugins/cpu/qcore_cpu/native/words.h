// From codes to bfloat16: pairs of them, as dot products of bfloat16 and AMX tiles want. Needs AVX-512 BF16.
//
// Of each quad the columns 0 and 2 share a word of 32 bits, and the columns 1 and 3: so that one shift serves both. Activations are
// laid out alike (Batch::halves).
#pragma once
#include "codes.h"

namespace qcore {
namespace QCORE_ISA {

// Whether 64 entries name every value of the code.
constexpr bool is_small(Code code) { return bits_of(code) <= 6; }

QCORE_INLINE I16 iota() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

// 32 or 64 numbers of bfloat16, which the lowest bits of 16-bit lanes name; higher ones may hold anything.
struct HalfTable {
  __m512i low, high;
  // number(lanes): the floats of sixteen indices.
  template <class Number>
  QCORE_INLINE void fill(bool both, Number&& number) {
    alignas(64) uint16_t halves[64];
    for (int i = 0; i < (both ? 64 : 32); i += 16) narrow_bf16(halves + i, number(add(iota(), all_i(i))));
    low = _mm512_load_si512(halves);
    high = both ? _mm512_load_si512(halves + 32) : low;
  }
  QCORE_INLINE __m512i operator()(__m512i lanes) const { return _mm512_permutexvar_epi16(lanes, low); }
  QCORE_INLINE __m512i of_64(__m512i lanes) const { return _mm512_permutex2var_epi16(low, lanes, high); }
};

// 16-bit lanes that hold a code in their low byte -> bfloat16. Header::zero is subtracted from integers. Of a table whose values
// need more than 8 bits, the nearest, and `rest` gives what is left over.
template <Code code>
struct Words {
  HalfTable table, rest;
  __m512i zero;
  bool inexact = false;  // whether there is a rest

  Words(const Header& h, const float* entries) {
    const F16 own = all_f(static_cast<float>(h.zero));
    zero = _mm512_set1_epi32(static_cast<int32_t>(h.zero));
    if constexpr (is_table(code)) {
      const Table16 exact = table16(entries);
      const auto value = [&](I16 i) QCORE_INSIDE { return look_up(exact, code == Code::kTable3 ? i & all_i(7) : i); };
      const auto left = [&](I16 i) QCORE_INSIDE { return sub_f(value(i), nearest(value(i))); };
      table.fill(false, value);
      rest.fill(false, left);
      inexact = _mm512_cmp_ps_mask(left(iota()).v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    } else if constexpr (is_integer(code)) {
      if constexpr (is_small(code))
        table.fill(bits_of(code) > 5, [&](I16 i) QCORE_INSIDE { return sub_f(to_float(i & all_i((1 << bits_of(code)) - 1)), own); });
    } else if constexpr (is_small(code)) {
      table.fill(true, [](I16 i) QCORE_INSIDE { return small_float<code>(i); });
    } else {  // those below the least exponent
      table.fill(false, [](I16 i) QCORE_INSIDE { return mul(to_float(i & all_i(7)), all_f(shape_of(code).smallest())); });
    }
  }

  // Bits above the code's may hold anything where is_small(code); elsewhere the high byte is 0.
  QCORE_INLINE __m512i operator()(__m512i lanes) const {
    if constexpr (is_small(code)) {
      return bits_of(code) > 5 ? table.of_64(lanes) : table(lanes);
    } else if constexpr (is_integer(code)) {  // through float32, 16 lanes at a time
      auto widen = [&](__m512i words) QCORE_INSIDE {
        const __m512i whole = code == Code::kInt8 ? _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24)
                                                  : _mm512_and_si512(words, _mm512_set1_epi32(0xff));
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(whole, zero)));
      };
      const __m512i low = widen(lanes), high = widen(_mm512_srli_epi32(lanes, 16));
      return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);  // the low halves are zeros: 8 bits are exact
    } else {
      constexpr FloatShape shape = shape_of(code);
      const __m512i magnitude = _mm512_and_si512(lanes, _mm512_set1_epi16((1 << (shape.exponent + shape.mantissa)) - 1));
      const __mmask32 subnormal = _mm512_testn_epi16_mask(magnitude, _mm512_set1_epi16(((1 << shape.exponent) - 1) << shape.mantissa));
      __m512i value = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 7 - shape.mantissa), _mm512_set1_epi16((127 - shape.bias) << 7));
      value = _mm512_mask_permutexvar_epi16(value, subnormal, magnitude, table.low);
      const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(lanes, 15 - shape.exponent - shape.mantissa), _mm512_set1_epi16(INT16_MIN));
      return _mm512_or_si512(value, sign);
    }
  }
  QCORE_INLINE __m512i left_over(__m512i lanes) const { return rest(lanes); }

 private:
  static F16 nearest(F16 value) {
    alignas(64) uint16_t halves[16];
    narrow_bf16(halves, value);
    return widen_bf16(halves);
  }
};

// Calls f(lanes, pair) for the pairs first .. first + pairs - 1 of a chunk: pair 2 t is columns 4 t and 4 t + 2, and 2 t + 1 columns
// 4 t + 1 and 4 t + 3. lanes: as Words takes them.
template <Code code, int first, int pairs, class F>
QCORE_INLINE void each_pair(const uint8_t* chunk, F&& f) {
  constexpr int bits = bits_of(code);
  if constexpr (one_plane(bits) && is_small(code)) {
    unroll<pairs>([&](auto place) QCORE_INSIDE {
      constexpr int pair = first + place, t = pair / 2, stacked = 8 / bits, shift = 8 * (pair % 2) + bits * (t % stacked);
      const __m512i word = _mm512_loadu_si512(chunk + 64 * (t / stacked));
      f(shift ? _mm512_srli_epi32(word, shift) : word, std::integral_constant<int, pair>{});
    });
  } else {
    unroll<pairs / 2>([&](auto place) QCORE_INSIDE {
      constexpr int t = first / 2 + place;
      const __m512i bytes = quad<bits, t>(chunk).v;
      f(is_small(code) ? bytes : _mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), std::integral_constant<int, 2 * t>{});
      f(_mm512_srli_epi16(bytes, 8), std::integral_constant<int, 2 * t + 1>{});
    });
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
