// Activations in bfloat16: exact products, summed in float32. Needs AVX-512 BF16.
#pragma once
#include "blocks.h"
#include "words.h"

namespace qcore {
namespace QCORE_ISA {

// As exact_row, of Batch::halves.
template <Code code>
void half_row(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  const Words<code> words(*strip.h, strip.table);  // which subtract Header::zero
  const char* const x = numbers_of(batch) + 2 * row * strip.h->padded;
  const FloatEnd end(strip, batch);
  F16 total = zero_f();
  PartSums products;
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        each_pair<code, begin / 2, count / 2>(chunk, [&](__m512i lanes, auto pair) QCORE_INSIDE {
          F16& to = products.part[pair % PartSums::count];
          const __m512bh given = (__m512bh)_mm512_set1_epi32(word_at(x + 2 * base + 4 * pair));
          to.v = _mm512_dpbf16_ps(to.v, (__m512bh)words(lanes), given);
          if constexpr (is_table(code))
            if (words.inexact) to.v = _mm512_dpbf16_ps(to.v, (__m512bh)words.left_over(lanes), given);
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE { total = end.add(row, s, g, products.take(), total); });
  store_f(out, total);
}

// Columns first .. first + columns - 1 of a panel, whole chunks: pairs [columns / 2][16][2]. rest: what bfloat16 leaves over of a
// table's numbers, or null.
template <Code code>
void unpack_halves(const Strip& strip, int64_t first, int64_t columns, uint8_t* out, uint8_t* rest) {
  constexpr int bits = bits_of(code);
  const Words<code> words(*strip.h, strip.table);
  const uint8_t* chunk = strip.codes + first / kChunk * 64 * bits;
  for (int64_t done = 0; done < columns; done += kChunk, chunk += 64 * bits, out += 1024) {
    prefetch<bits>(chunk);
    each_pair<code, 0, 16>(chunk, [&](__m512i lanes, auto pair) QCORE_INSIDE {
      _mm512_storeu_si512(out + 64 * pair, words(lanes));
      if constexpr (is_table(code))
        if (rest) _mm512_storeu_si512(rest + 64 * pair, words.left_over(lanes));
    });
    if (rest) rest += 1024;
  }
}

// As Dot, of pairs of bfloat16.
struct HalfDot {
  using End = FloatEnd;
  static constexpr int width = 2, fitting = 8;
  F16 sum = zero_f();
  QCORE_INLINE void add_step(I16 numbers, const void* x) {
    sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)numbers.v, (__m512bh)_mm512_set1_epi32(word_at(x)));
  }
  QCORE_INLINE void end_run() {}
  QCORE_INLINE F16 take() {
    const F16 taken = sum;
    sum = zero_f();
    return taken;
  }
};

template <Code code>
CodeKernels half_kernels() {
  const Unpack unpack = [](const Strip& strip, int64_t first, int64_t columns, void* block) {
    unpack_halves<code>(strip, first, columns, static_cast<uint8_t*>(block), nullptr);
  };
  return {half_row<code>, unpack, code_blocks<HalfDot>(std::make_integer_sequence<int, kIntegerRun>{}), HalfDot::width};
}

}  // namespace QCORE_ISA
}  // namespace qcore
