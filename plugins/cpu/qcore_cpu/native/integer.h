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

// Numbers of a block, 64 bytes for each step.
struct Unpacked {
  static constexpr bool in_place = false, short_sections = true;
  static constexpr int64_t step_bytes = 64;
  struct Reader {
    QCORE_INLINE explicit Reader(const Strip&) {}
    template <int step>
    QCORE_INLINE I16 load(const char* numbers) const { return load_i(numbers + 64 * step); }
  };
};

struct WholeSum : Unpacked {
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
  QCORE_INLINE void add_step(I16 codes, Word given) {
#ifdef __AVX512VNNI__
    // As _mm512_dpbusd_epi32; of that, GCC 12 moves sums from register to register.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(codes.v), "v"(given));
#else
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
  QCORE_INLINE void add_step(I16 codes, Word given) {
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
  QCORE_INLINE void add_step(I16 codes, Word given) {
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

// The same of codes as they are packed.
template <Code code>
struct PackedCodes : DotOf<code> {
  static constexpr bool in_place = true, short_sections = in_short_sections(Numbers::kIntegers, code);
  static constexpr int64_t step_bytes = 8 * bits_of(code);
  struct Reader {
    QCORE_INLINE explicit Reader(const Strip&) {}
    template <int step>
    QCORE_INLINE I16 load(const char* codes) const { return DotOf<code>::ready(quad<bits_of(code), step>(reinterpret_cast<const uint8_t*>(codes))); }
  };
};

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

// As FloatEnd, of products of whole numbers.
struct SectionEnd {
  GroupFloats scales, offsets;
  const float* zeros;
  const float *row_scales, *sums;
  const int32_t *totals, *shifts;
  int64_t sections, run;

  SectionEnd(const Strip& strip, const Batch& batch)
      : scales(strip.scales), offsets(strip.offsets), zeros(strip.zeros), row_scales(batch.scales), sums(batch.sums), totals(batch.totals),
        shifts(batch.shifts), sections(batch.sections), run(batch.run) {}

  QCORE_INLINE Ending ending() const { return zeros ? Ending::kAny : offsets.floats ? Ending::kOffset : Ending::kScaled; }

  struct Row {
    I16 shift;
    F16 scale, whole, sum;
  };
  template <Ending ending>
  QCORE_INLINE Row row(int64_t first, int64_t r, int64_t s) const {
    const int64_t place = first * sections + s * run + r;
    const bool whole = ending == Ending::kAny && zeros;
    return {all_i(shifts[place]), all_f(row_scales[place]), whole ? all_f(static_cast<float>(totals[place])) : zero_f(),
            ending == Ending::kScaled ? zero_f() : all_f(sums[place])};
  }

  // The sum of products is exact until it is scaled.
  template <Ending ending, class Offset>
  QCORE_INLINE F16 add(const Row& row, int64_t g, F16 scale, Offset&& offset, I16 products, F16 total) const {
    F16 sum = to_float(sub(products, row.shift));
    if constexpr (ending == Ending::kAny)
      if (zeros) sum = fma(load_f(zeros + 16 * g), row.whole, sum);
    total = fma(sum, mul(scale, row.scale), total);
    const bool more = ending == Ending::kOffset || (ending == Ending::kAny && offsets.floats);
    return more ? fma(offset(), row.sum, total) : total;
  }
};

// Parts of a sum: one addition need not wait for the one before.
template <class D, int parts, int rows>
struct Dots {
  D part[parts][rows];
  QCORE_INLINE auto take(int r) {
    auto all = part[0][r].take();
    unroll<parts - 1>([&](auto p) QCORE_INSIDE { all = add(all, part[p + 1][r].take()); });
    return all;
  }
};

template <Code code, int rows>
void integer_rows(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  constexpr int bits = bits_of(code), parts = rows_parts(rows);
  using D = DotOf<code>;
  const Bytes bytes(is_table(code) ? strip.table : nullptr);
  const int64_t run = rows == 1 ? 1 : batch.run;
  const char* const x = numbers_of(batch) + row * strip.h->padded * D::width;
  const SectionEnd end(strip, batch);
  F16 total[rows];
  unroll<rows>([&](auto r) QCORE_INSIDE { total[r] = zero_f(); });
  Dots<D, parts, rows> dots;
  walk<bits>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        const char* given = x + D::width * (base + begin) * run;
        unroll<count / 4>([&](auto place) QCORE_INSIDE {
          constexpr int t = begin / 4 + place;
          I16 codes = quad<bits, t>(chunk);
          if constexpr (is_table(code)) codes = bytes(codes);
          D* const dot = dots.part[place % parts];
          auto add = [&](I16 numbers) QCORE_INSIDE {
            unroll<rows>([&](auto r) QCORE_INSIDE { dot[r].add_step(numbers, spread_word(given + 4 * r)); });
            if constexpr (rows == 1) given += 4;
            else advance(given, 4 * run);
          };
          if constexpr (D::width == 2) {
            add(D::even(codes));
            add(D::odd(codes));
          } else {
            add(D::ready(codes));
          }
          if constexpr (place / parts % D::fitting == D::fitting - 1 || place + parts >= count / 4) unroll<rows>([&](auto r) QCORE_INSIDE { dot[r].end_run(); });
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE {
        end_section<1, rows, true>(&end, row, s, g, [&](int, int r) QCORE_INSIDE { return dots.take(r); }, [&](int, int r) QCORE_INSIDE -> F16& { return total[r]; });
      });
  unroll<rows>([&](auto r) QCORE_INSIDE { store_f(out + 16 * r, total[r]); });
}

}  // namespace QCORE_ISA
}  // namespace qcore
