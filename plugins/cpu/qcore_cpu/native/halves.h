// Activations in bfloat16: exact products, summed in float32. Needs AVX-512 BF16.
#pragma once
#include "running.h"
#include "words.h"

namespace qcore {
namespace QCORE_ISA {

// 8-bit integers in two parts, each looked up: what their low five bits stand for, and the others less Header::zero.
struct TwoHalves {
  HalfTable low, high;
  explicit TwoHalves(const Header& h) {
    low.fill(false, [](I16 i) QCORE_INSIDE { return to_float(i); });
    high.fill(false, [&](I16 i) QCORE_INSIDE {
      const I16 top = sra(sll(i, 29), 24);  // three bits, signed, times 32
      return to_float(sub(top, all_i(static_cast<int32_t>(h.zero))));
    });
  }
  // As each_pair, f being called for both parts.
  template <int first, int pairs, class F>
  QCORE_INLINE void each_pair(const uint8_t* chunk, F&& f) const {
    unroll<pairs / 2>([&](auto place) QCORE_INSIDE {
      constexpr int t = first / 2 + place;
      const __m512i bytes = quad<8, t>(chunk).v;
      f(low(bytes), high(_mm512_srli_epi16(bytes, 5)), std::integral_constant<int, 2 * t>{});
      f(low(_mm512_srli_epi16(bytes, 8)), high(_mm512_srli_epi16(bytes, 13)), std::integral_constant<int, 2 * t + 1>{});
    });
  }
};

// As exact_rows, of Batch::halves.
template <Code code, int rows>
void half_rows(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  const Words<code> words(*strip.h, strip.table);  // which subtract Header::zero
  const TwoHalves two(*strip.h);
  const int64_t run = rows == 1 ? 1 : batch.run;
  const char* const x = numbers_of(batch) + 2 * row * strip.h->padded;
  const FloatEnd end(strip, batch);
  F16 total[rows];
  unroll<rows>([&](auto r) QCORE_INSIDE { total[r] = zero_f(); });
  PartSums<rows> products;
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        const char* given = x + 2 * (base + begin) * run;
        auto multiply = [&](__m512i numbers, int pair) QCORE_INSIDE {
          unroll<rows>([&](auto r) QCORE_INSIDE { add_pairs(products.part[r][pair % PartSums<rows>::count], numbers, spread_word(given + 4 * r)); });
        };
        auto next = [&] {
          if constexpr (rows == 1) given += 4;
          else advance(given, 4 * run);
        };
        if constexpr (code == Code::kInt8) {
          two.template each_pair<begin / 2, count / 2>(chunk, [&](__m512i low, __m512i high, auto pair) QCORE_INSIDE {
            multiply(low, pair);
            multiply(high, pair + 1);
            next();
          });
        } else {
          each_pair<code, begin / 2, count / 2>(chunk, [&](__m512i lanes, auto pair) QCORE_INSIDE {
            multiply(words(lanes), pair);
            if constexpr (is_table(code))
              if (words.inexact) multiply(words.left_over(lanes), pair + 1);
            next();
          });
        }
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE {
        end_section<1, rows, true>(&end, row, s, g, [&](int, int r) QCORE_INSIDE { return products.take(r); }, [&](int, int r) QCORE_INSIDE -> F16& { return total[r]; });
      });
  unroll<rows>([&](auto r) QCORE_INSIDE { store_f(out + 16 * r, total[r]); });
}

// Columns first .. first + columns - 1 of a panel, whole chunks: pairs [columns / 2][16][2].
template <Code code>
void unpack_halves(const Strip& strip, int64_t first, int64_t columns, void* out) {
  constexpr int bits = bits_of(code);
  const Words<code> words(*strip.h, strip.table);
  const uint8_t* chunk = strip.codes + first / kChunk * 64 * bits;
  uint8_t* to = static_cast<uint8_t*>(out);
  for (int64_t done = 0; done < columns; done += kChunk, chunk += 64 * bits, to += 1024) {
    prefetch<bits>(chunk);
    each_pair<code, 0, 16>(chunk, [&](__m512i lanes, auto pair) QCORE_INSIDE { _mm512_storeu_si512(to + 64 * pair, words(lanes)); });
  }
}

// As Dot, of pairs of bfloat16.
struct HalfDot : Unpacked {
  using End = FloatEnd;
  static constexpr int width = 2, fitting = 8;
  F16 sum = zero_f();
  QCORE_INLINE void add_step(I16 numbers, Word given) { add_pairs(sum, numbers.v, given); }
  QCORE_INLINE void end_run() {}
  QCORE_INLINE F16 take() {
    const F16 taken = sum;
    sum = zero_f();
    return taken;
  }
};

// The same of codes as they are packed.
template <Code code>
struct PackedHalves : HalfDot {
  static constexpr bool in_place = true, short_sections = in_short_sections(Numbers::kHalves, code);
  static constexpr int64_t step_bytes = 4 * bits_of(code);
  struct Reader {
    Words<code> words;
    explicit Reader(const Strip& strip) : words(*strip.h, strip.table) {}
    template <int step>
    QCORE_INLINE I16 load(const char* codes) const {
      I16 found;
      each_pair<code, step, 1>(reinterpret_cast<const uint8_t*>(codes), [&](__m512i lanes, auto) QCORE_INSIDE { found.v = words(lanes); });
      return found;
    }
  };
};

template <Code code>
CodeKernels half_kernels() {
  static constexpr Running running{fits_running, open_running, clear_running, running_kernels, close_running};
  CodeKernels made{each_rows([](auto rows) { return half_rows<code, rows>; }), unpack_halves<code>, code_blocks<HalfDot, kHalfRun>(), HalfDot::width, &running};
  if constexpr (is_taken_packed(Numbers::kHalves, code)) made.packed = code_blocks<PackedHalves<code>, kPackedRun>();
  return made;
}

}  // namespace QCORE_ISA
}  // namespace qcore
