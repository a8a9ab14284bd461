// Few rows by one panel, activations in float32: codes become floats in registers.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

// out[m][16] of the rows first .. first + M - 1. Products of a section are summed before they are scaled.
template <Code code, int M>
void exact_rows(const Strip& strip, const Batch& batch, int64_t first, float* out) {
  const Header& h = strip.h;
  const Floats<code> floats(strip.table);
  const float zero = is_integer(code) ? static_cast<float>(h.zero) : 0;
  const float* x[M];
  for (int m = 0; m < M; m++) x[m] = batch.values + (first + m) * h.padded;
  FloatSums<M> sums(strip, batch, first);
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        each_column<code, begin, count>(chunk, floats, [&](F16 value, auto column) QCORE_INSIDE {
          for (int m = 0; m < M; m++) {
            F16& to = sums.sum[m][column % FloatSums<M>::parts];
            to = fma(value, all_f(x[m][base + column]), to);
          }
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE { sums.end_section(s, g, zero); });
  sums.store(out);
}

}  // namespace QCORE_ISA
}  // namespace qcore
