// A row by one panel, activations in bfloat16: exact products, summed in float32. Needs AVX-512 BF16.
#pragma once
#include "panel.h"
#include "words.h"

namespace qcore {
namespace QCORE_ISA {

// As exact_row, of Batch::halves.
template <Code code>
void half_row(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  const Words<code> words(*strip.h, strip.table);
  const char* const x = reinterpret_cast<const char*>(batch.halves + row * strip.h->padded);
  FloatSum sum(strip, batch, row);
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
      [&](int64_t s, int64_t g) QCORE_INSIDE { sum.end_section(products.take(), s, g, 0); });  // Words subtract Header::zero
  store_f(out, sum.total);
}

}  // namespace QCORE_ISA
}  // namespace qcore
