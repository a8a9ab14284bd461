// One panel made ready, and the walk over its columns that the kernels for few rows share.
#pragma once
#include "kernels.h"
#include "scales.h"

namespace qcore {
namespace QCORE_ISA {

QCORE_INLINE int32_t word_at(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// What comes about 1.5 KiB behind a chunk.
template <int bits>
QCORE_INLINE void prefetch(const uint8_t* chunk) {
  for (int line = 0; line < bits; line++) _mm_prefetch(reinterpret_cast<const char*>(chunk) + 1536 + 64 * line, _MM_HINT_T0);
}

// Calls multiply(chunk, column, first, count) for the chunks of a panel in turn, `column` being that of the chunk's beginning; first
// and count are constants: the whole chunk, or one of its halves. Calls end(section, group) behind each section.
template <int bits, class Multiply, class End>
QCORE_INLINE void walk(const Strip& strip, const Batch& batch, Multiply&& multiply, End&& end) {
  using std::integral_constant;
  const Header& h = strip.h;
  const uint8_t* chunk = strip.codes;
  int64_t s = 0, column = 0;
  if (batch.section < kChunk) {
    for (; s < batch.sections; column += kChunk, chunk += 64 * bits) {
      prefetch<bits>(chunk);
      multiply(chunk, column, integral_constant<int, 0>{}, integral_constant<int, 16>{});
      end(s, s * batch.section / h.group);
      if (++s == batch.sections) break;
      multiply(chunk, column, integral_constant<int, 16>{}, integral_constant<int, 16>{});
      end(s, s * batch.section / h.group);
      s++;
    }
    return;
  }
  for (; s < batch.sections; s++) {
    const int64_t stop = column + batch.section < h.padded ? column + batch.section : h.padded;
    for (; column < stop; column += kChunk, chunk += 64 * bits) {
      prefetch<bits>(chunk);
      multiply(chunk, column, integral_constant<int, 0>{}, integral_constant<int, 32>{});
    }
    end(s, s * batch.section / h.group);
  }
}

// Parts that the sum of a row has, so that one addition need not wait for the one before.
#ifdef __AVX512F__
constexpr int parts_of(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }
#else
constexpr int parts_of(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// Sums in float32 of some rows by a panel. Products of a section go to sum[m], and are scaled at its end.
template <int M>
struct FloatSums {
  static constexpr int parts = parts_of(M);
  const Strip& strip;
  const float* inputs[M];  // the rows' sums of each section
  F16 total[M], sum[M][parts];

  QCORE_INLINE FloatSums(const Strip& strip, const Batch& batch, int64_t first) : strip(strip) {
    for (int m = 0; m < M; m++) {
      inputs[m] = batch.sums + (first + m) * batch.sections;
      total[m] = zero_f();
      for (int p = 0; p < parts; p++) sum[m][p] = zero_f();
    }
  }
  // total += (sum + (zero - own) * x) * scale + offset * x, x being the sum of the section's input.
  QCORE_INLINE void end_section(int64_t s, int64_t g, float own) {
    const F16 scale = load_f(strip.scales + 16 * g);
    for (int m = 0; m < M; m++) {
      const F16 x = all_f(inputs[m][s]);
      for (int p = 1; p < parts; p++) sum[m][0] = add(sum[m][0], sum[m][p]);
      if (own != 0) sum[m][0] = fma(all_f(-own), x, sum[m][0]);
      if (strip.zeros) sum[m][0] = fma(load_f(strip.zeros + 16 * g), x, sum[m][0]);
      total[m] = fma(sum[m][0], scale, total[m]);
      if (strip.offsets) total[m] = fma(load_f(strip.offsets + 16 * g), x, total[m]);
      for (int p = 0; p < parts; p++) sum[m][p] = zero_f();
    }
  }
  QCORE_INLINE void store(float* out) const {
    for (int m = 0; m < M; m++) store_f(out + 16 * m, total[m]);
  }
};

}  // namespace QCORE_ISA
}  // namespace qcore
