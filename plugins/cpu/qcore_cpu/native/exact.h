// Few rows by one panel, activations in float32: codes become floats in registers.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

// out[m][16] of the rows first .. first + M - 1. Products of a section are summed before they are scaled.
template <Code code, int M>
void exact_rows(const Strip& strip, const Batch& batch, int64_t first, float* out) {
  constexpr int parts = parts_of(M);
  const Header& h = strip.h;
  const Floats<code> floats(strip.table);
  const float zero = is_integer(code) ? static_cast<float>(h.zero) : 0;
  const float* x[M];
  const float* sums[M];
  F16 total[M], sum[M][parts];
  for (int m = 0; m < M; m++) {
    x[m] = batch.values + (first + m) * h.padded;
    sums[m] = batch.sums + (first + m) * batch.sections;
    total[m] = zero_f();
    for (int p = 0; p < parts; p++) sum[m][p] = zero_f();
  }
  walk<code_bits(code)>(
      strip, batch,
      [&](const uint8_t* chunk, int64_t base, auto begin, auto count) QCORE_INSIDE {
        each_column<code, begin, count>(chunk, floats, [&](F16 value, auto column) QCORE_INSIDE {
          for (int m = 0; m < M; m++) sum[m][column % parts] = fma(value, all_f(x[m][base + column]), sum[m][column % parts]);
        });
      },
      [&](int64_t s, int64_t g) QCORE_INSIDE {
        float inputs[M];
        for (int m = 0; m < M; m++) {
          inputs[m] = sums[m][s];
          sum[m][0] = fma(all_f(-zero), all_f(inputs[m]), sum[m][0]);
        }
        add_section(strip, g, inputs, sum, total);
      });
  for (int m = 0; m < M; m++) store_f(out + 16 * m, total[m]);
}

}  // namespace QCORE_ISA
}  // namespace qcore
