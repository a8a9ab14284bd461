// A row by one panel, activations in float32: codes become floats in registers.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

// Products of a section are summed before they are scaled.
template <Code code>
void exact_row(const Strip& strip, const Batch& batch, int64_t row, float* out) {
  const Floats<code> floats(strip.table);
  const float zero = is_integer(code) ? static_cast<float>(strip.h->zero) : 0;
  const float* const x = batch.values + row * strip.h->padded;
  FloatSum sum(strip, batch, row);
  walk<bits_of(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        each_column<code, begin, count>(chunk, floats, [&](F16 value, auto column) QCORE_INSIDE {
          F16& to = sum.sum[column % FloatSum::parts];
          to = fma(value, all_f(x[base + column]), to);
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE { sum.end_section(s, g, zero); });
  store_f(out, sum.total);
}

}  // namespace QCORE_ISA
}  // namespace qcore
