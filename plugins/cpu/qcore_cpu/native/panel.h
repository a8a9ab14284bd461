// The walk over a panel's columns that the kernels for one row share.
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

// The sections of a weight in turn, and the group that each belongs to; divisions would take longer than a section.
struct Section {
  int64_t length, group, number, of_group, left;  // left: sections of the group, this one with them
  Section(const Header& h, const Batch& batch, int64_t column)
      : length(batch.section), group((h.group + length - 1) / length), number(column / length), of_group(number / group), left(group - number % group) {}
  QCORE_INLINE void next() {
    number++;
    if (--left == 0) of_group++, left = group;
  }
};

// Calls multiply(chunk, column, first, count) for the chunks of a panel in turn, `column` being that of the chunk's beginning; first
// and count are constants: the whole chunk, or one of its halves. Calls end(section, group) behind each section.
template <int bits, class Multiply, class End>
QCORE_INLINE void walk(const Strip& strip, const Batch& batch, Multiply&& multiply, End&& end) {
  using std::integral_constant;
  const int64_t padded = strip.h->padded, length = batch.section;
  const uint8_t* chunk = strip.codes;
  Section section(*strip.h, batch, 0);
  int64_t column = 0;
  if (length < kChunk) {
    for (; column < padded; column += kChunk, chunk += 64 * bits) {
      prefetch<bits>(chunk);
      unroll<2>([&](auto half) QCORE_INSIDE {
        if (column + 16 * half >= length * batch.sections) return;
        multiply(chunk, column, integral_constant<int, 16 * half>{}, integral_constant<int, 16>{});
        end(section.number, section.of_group);
        section.next();
      });
    }
    return;
  }
  for (; column < padded; section.next()) {
    const int64_t stop = column + length < padded ? column + length : padded;
    for (; column < stop; column += kChunk, chunk += 64 * bits) {
      prefetch<bits>(chunk);
      multiply(chunk, column, integral_constant<int, 0>{}, integral_constant<int, 32>{});
    }
    end(section.number, section.of_group);
  }
}

// Products of a section, in parts: one addition need not wait for the one before. Of AVX2's registers masks and words take the rest.
struct PartSums {
#ifdef __AVX512F__
  static constexpr int count = 4;
  F16 part[count] = {zero_f(), zero_f(), zero_f(), zero_f()};
  QCORE_INLINE F16 all() const { return add(add(part[0], part[1]), add(part[2], part[3])); }
#else
  static constexpr int count = 3;
  F16 part[count] = {zero_f(), zero_f(), zero_f()};
  QCORE_INLINE F16 all() const { return add(add(part[0], part[1]), part[2]); }
#endif
  QCORE_INLINE F16 take() {
    const F16 taken = all();
    for (F16& one : part) one = zero_f();
    return taken;
  }
};

// How sections of products in float32 end: copied from a panel and a batch, so that it stays in registers. own: what codes are too great
// by still.
struct FloatEnd {
  const float *scales, *zeros, *offsets;  // of the panel
  const float* inputs;                    // the rows' sums of each section
  int64_t sections;
  float own;

  FloatEnd(const Strip& strip, const Batch& batch, float own = 0)
      : scales(strip.scales), zeros(strip.zeros), offsets(strip.offsets), inputs(batch.sums), sections(batch.sections), own(own) {}

  // The total of a row with the sum of its section s: (sum + (zero - own) * x) * scale + offset * x, x being the sum of the section's input.
  QCORE_INLINE F16 add(int64_t row, int64_t s, int64_t g, F16 sum, F16 total) const {
    const F16 x = all_f(inputs[row * sections + s]);
    if (own != 0) sum = fma(all_f(-own), x, sum);
    if (zeros) sum = fma(load_f(zeros + 16 * g), x, sum);
    total = fma(sum, load_f(scales + 16 * g), total);
    return offsets ? fma(load_f(offsets + 16 * g), x, total) : total;
  }
};

}  // namespace QCORE_ISA
}  // namespace qcore
