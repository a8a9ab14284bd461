// Sixteen lanes, one for each row of a panel: two AVX2 registers or one of AVX-512. Compiled once for each instruction set.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qcore {
namespace QCORE_ISA {

#if defined(__AVX512F__)

struct F16 { __m512 v; };
struct I16 { __m512i v; };  // sixteen 32-bit lanes, or 64 bytes

inline F16 zero_f() { return {_mm512_setzero_ps()}; }
inline I16 zero_i() { return {_mm512_setzero_si512()}; }
inline F16 load_f(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store_f(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 all_f(float x) { return {_mm512_set1_ps(x)}; }
inline I16 load_i(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i(void* p, I16 a) { _mm512_storeu_si512(p, a.v); }
inline I16 all_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub_f(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 max_f(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min_f(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 abs_f(F16 a) { return {_mm512_abs_ps(a.v)}; }
inline F16 round_f(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline void narrow_s8(int8_t* p, F16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v))); }
inline I16 add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I16 sub(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I16 mul(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I16 operator&(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I16 operator|(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I16 operator^(I16 a, I16 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I16 srl(I16 a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
inline I16 sll(I16 a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
inline I16 sra(I16 a, int n) { return {_mm512_srai_epi32(a.v, n)}; }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I16 to_int(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F16 as_float(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline I16 as_int(F16 a) { return {_mm512_castps_si512(a.v)}; }
inline F16 where_zero(I16 test, F16 then, F16 otherwise) {
  return {_mm512_mask_blend_ps(_mm512_testn_epi32_mask(test.v, test.v), otherwise.v, then.v)};
}
// Lane by lane: low <= x <= high.
inline F16 where_within(F16 x, F16 low, F16 high, F16 then, F16 otherwise) {
  const __mmask16 within = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(low.v, x.v, _CMP_LE_OQ), x.v, high.v, _CMP_LE_OQ);
  return {_mm512_mask_blend_ps(within, otherwise.v, then.v)};
}
inline bool any_nan(F16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline I16 widen_u8(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I16 widen_s8(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
inline I16 widen_u16(const uint16_t* p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))}; }
inline F16 widen_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void narrow_f16(uint16_t* p, F16 a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void narrow_u16(uint16_t* p, I16 a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
struct Table16 { __m512 v; };
inline Table16 table16(const float* p) { return {_mm512_loadu_ps(p)}; }
// The entry that bits 0..3 of each lane name; higher bits may hold anything.
inline F16 look_up(Table16 t, I16 index) { return {_mm512_permutexvar_ps(index.v, t.v)}; }
inline I16 gather(const float* base, I16 index) { return {_mm512_castps_si512(_mm512_i32gather_ps(index.v, base, 4))}; }
// Rows become columns.
inline void transpose(F16 (&x)[16]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) pairs[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v), pairs[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  for (int i = 0; i < 16; i += 4)  // of rows i .. i + 3: columns j, j + 4, j + 8 and j + 12 in fours[i + j]
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm512_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; j++) {
    const __m512 even_low = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88), odd_low = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88), odd_high = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    x[j].v = _mm512_shuffle_f32x4(even_low, even_high, 0x88), x[8 + j].v = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    x[4 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88), x[12 + j].v = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

#else

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };

inline F16 zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline I16 zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline F16 load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_f(float* p, F16 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F16 all_f(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline I16 load_i(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void store_i(void* p, I16 x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
inline I16 all_i(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
inline F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F16 sub_f(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F16 max_f(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F16 min_f(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F16 abs_f(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F16 round_f(F16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline void narrow_s8(int8_t* p, F16 x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // a0 b0 a1 b1, four each
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline I16 add(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I16 sub(I16 x, I16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I16 mul(I16 x, I16 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I16 operator&(I16 x, I16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I16 operator|(I16 x, I16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I16 operator^(I16 x, I16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline I16 srl(I16 x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline I16 sll(I16 x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline I16 sra(I16 x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I16 to_int(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F16 as_float(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I16 as_int(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F16 where_zero(I16 test, F16 then, F16 otherwise) {
  const __m256i none = _mm256_setzero_si256();
  return {_mm256_blendv_ps(otherwise.a, then.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(test.a, none))),
          _mm256_blendv_ps(otherwise.b, then.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(test.b, none)))};
}
inline __m256 where_within(__m256 x, __m256 low, __m256 high, __m256 then, __m256 otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_and_ps(_mm256_cmp_ps(low, x, _CMP_LE_OQ), _mm256_cmp_ps(x, high, _CMP_LE_OQ)));
}
// Lane by lane: low <= x <= high.
inline F16 where_within(F16 x, F16 low, F16 high, F16 then, F16 otherwise) {
  return {where_within(x.a, low.a, high.a, then.a, otherwise.a), where_within(x.b, low.b, high.b, then.b, otherwise.b)};
}
inline bool any_nan(F16 x) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)));
}
inline I16 widen_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline I16 widen_s8(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
inline I16 widen_u16(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline F16 widen_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline void narrow_f16(uint16_t* p, F16 x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void narrow_u16(uint16_t* p, I16 x) {
  const __m256i both = _mm256_packus_epi32(x.a, x.b);  // within halves: a0 b0 a1 b1
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
struct Table16 { __m256 low, high; };
inline Table16 table16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 look_up(Table16 t, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(t.low, index), high = _mm256_permutevar8x32_ps(t.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F16 look_up(Table16 t, I16 index) { return {look_up(t, index.a), look_up(t, index.b)}; }
inline I16 gather(const float* base, I16 index) {
  return {_mm256_castps_si256(_mm256_i32gather_ps(base, index.a, 4)),
          _mm256_castps_si256(_mm256_i32gather_ps(base, index.b, 4))};
}
inline void transpose(__m256 (&x)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)  // of rows i .. i + 3: columns j and j + 4 in fours[i + j]
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; j++) x[j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20), x[4 + j] = _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
}
// Rows become columns.
inline void transpose(F16 (&x)[16]) {
  __m256 corners[2][2][8];  // of rows, of columns
  for (int i = 0; i < 16; i++) corners[i / 8][0][i % 8] = x[i].a, corners[i / 8][1][i % 8] = x[i].b;
  for (auto& half : corners)
    for (auto& corner : half) transpose(corner);
  for (int i = 0; i < 16; i++) x[i] = {corners[0][i / 8][i % 8], corners[1][i / 8][i % 8]};
}

#endif

inline F16 clamp_f(F16 x, float low, float high) { return min_f(max_f(x, all_f(low)), all_f(high)); }
inline F16 widen_bf16(const uint16_t* p) { return as_float(sll(widen_u16(p), 16)); }

// Rounded to the nearest, halves to even; NaN stays NaN.
inline void narrow_bf16(uint16_t* p, F16 x) {
  const I16 bits = as_int(x);
  const I16 rounded = srl(add(bits, add(all_i(0x7fff), srl(bits, 16) & all_i(1))), 16);
  if (__builtin_expect(!any_nan(x), 1)) return narrow_u16(p, rounded & all_i(0xffff));
  alignas(64) float values[16];
  alignas(64) uint32_t lanes[16];
  store_f(values, x);
  store_i(lanes, rounded);
  for (int lane = 0; lane < 16; lane++) p[lane] = values[lane] == values[lane] ? (uint16_t)lanes[lane] : 0x7fc0;
}

}  // namespace QCORE_ISA
}  // namespace qcore
