// Few rows by one panel, activations in bfloat16: exact products, summed in float32. Needs AVX-512 BF16.
#pragma once
#include "panel.h"
#include "words.h"

namespace qcore {
namespace QCORE_ISA {

// As exact_rows, of Batch::halves.
template <Code code, int M>
void half_rows(const Strip& strip, const Batch& batch, int64_t first, float* out) {
  const Header& h = strip.h;
  const Words<code> words(h, strip.table);
  const char* x[M];
  for (int m = 0; m < M; m++) x[m] = reinterpret_cast<const char*>(batch.halves + (first + m) * h.padded);
  FloatSums<M> sums(strip, batch, first);
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        each_pair<code, begin / 2, count / 2>(chunk, [&](__m512i lanes, auto pair) QCORE_INSIDE {
          const __m512bh weights = (__m512bh)words(lanes);
          for (int m = 0; m < M; m++) {
            F16& to = sums.sum[m][pair % FloatSums<M>::parts];
            const __m512bh given = (__m512bh)_mm512_set1_epi32(word_at(x[m] + 2 * base + 4 * pair));
            to.v = _mm512_dpbf16_ps(to.v, weights, given);
            if constexpr (is_table(code))
              if (words.inexact) to.v = _mm512_dpbf16_ps(to.v, (__m512bh)words.left_over(lanes), given);
          }
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE { sums.end_section(s, g, 0); });  // Words subtract Header::zero
  sums.store(out);
}

}  // namespace QCORE_ISA
}  // namespace qcore
