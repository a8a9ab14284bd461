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

// Four bytes in every lane.
#ifdef __AVX512F__
using Word = __m512i;
QCORE_INLINE Word spread_word(const void* p) { return _mm512_set1_epi32(word_at(p)); }
#else
using Word = __m256i;
QCORE_INLINE Word spread_word(const void* p) { return _mm256_set1_epi32(word_at(p)); }
#endif

// Moves a pointer; compilers would keep one for each step instead, for which there are too few registers.
template <class T>
QCORE_INLINE void advance(const T*& pointer, int64_t count) {
  pointer += count;
  __asm__("" : "+r"(pointer));
}

// What comes some KiB behind a chunk: more than what is read while memory answers, and no more than the first cache can spare.
#ifdef __AVX512F__
constexpr int64_t kFetchAhead = 8192;
#else
constexpr int64_t kFetchAhead = 4096;
#endif
template <int bits>
QCORE_INLINE void prefetch(const uint8_t* chunk) {
  for (int line = 0; line < bits; line++) _mm_prefetch(reinterpret_cast<const char*>(chunk) + kFetchAhead + 64 * line, _MM_HINT_T0);
}

// A chunk's bytes of a stream: its first line alone, or one line in `shares` from the line `share` on.
QCORE_INLINE void fetch_line(Stream& stream) {
  _mm_prefetch(reinterpret_cast<const char*>(stream.at), _MM_HINT_T0);
  stream.at += stream.bytes;
}
QCORE_INLINE void fetch(Stream& stream, int64_t share, int64_t shares) {
  for (int64_t at = 64 * share; at < stream.bytes; at += 64 * shares) _mm_prefetch(reinterpret_cast<const char*>(stream.at) + at, _MM_HINT_T0);
  stream.at += stream.bytes;
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
  Stream scales = strip.ahead[0], offsets = strip.ahead[1];
  auto fetch_all = [&] {
    prefetch<bits>(chunk);
    fetch_line(scales);  // more than a line only of float32 in groups of 16
    fetch_line(offsets);
  };
  Section section(*strip.h, batch, 0);
  int64_t column = 0;
  if (length < kChunk) {
    for (; column < padded; column += kChunk, chunk += 64 * bits) {
      fetch_all();
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
      fetch_all();
      multiply(chunk, column, integral_constant<int, 0>{}, integral_constant<int, 32>{});
    }
    end(section.number, section.of_group);
  }
}

// Rows that codes are multiplied by while they are in registers, and how many parts their sums have: one addition need not wait for the
// one before. Of AVX2's registers masks and words take the rest.
#ifdef __AVX512F__
constexpr int kRowsAtOnce = 4;
constexpr int float_parts(int rows) { return rows <= 2 ? 4 : 2; }
constexpr int rows_parts(int) { return 2; }
#else
constexpr int kRowsAtOnce = 1;
constexpr int float_parts(int) { return 3; }
constexpr int rows_parts(int) { return 1; }
#endif

// Products of a section.
template <int rows>
struct PartSums {
  static constexpr int count = float_parts(rows);
  F16 part[rows][count];
  QCORE_INLINE PartSums() {
    unroll<rows * count>([&](auto i) QCORE_INSIDE { part[i / count][i % count] = zero_f(); });
  }
  QCORE_INLINE F16 take(int r) {
    F16 all = part[r][0];
    if constexpr (count == 4) all = add(add(all, part[r][1]), add(part[r][2], part[r][3]));
    else unroll<count - 1>([&](auto i) QCORE_INSIDE { all = add(all, part[r][i + 1]); });
    unroll<count>([&](auto i) QCORE_INSIDE { part[r][i] = zero_f(); });
    return all;
  }
};

// What the end of a section takes: its sum is scaled; the group's offset comes to it; or whatever there is.
enum class Ending { kScaled, kOffset, kAny };

// How sections of a panel end: of products in float32. Copied from a panel and a batch, so that it stays in registers.
struct FloatEnd {
  GroupFloats scales, offsets;  // of the panel
  const float* zeros;           // the same
  const float *sums, *row_scales;  // of the rows' sections; null where they have no scales
  int64_t sections, run;
  float own;  // what codes are too great by still

  FloatEnd(const Strip& strip, const Batch& batch, float own = 0)
      : scales(strip.scales), offsets(strip.offsets), zeros(strip.zeros), sums(batch.sums), row_scales(batch.scales), sections(batch.sections), run(batch.run), own(own) {}

  QCORE_INLINE Ending ending() const { return own != 0 || zeros || row_scales ? Ending::kAny : offsets.floats ? Ending::kOffset : Ending::kScaled; }

  // What there is to know of a section of row first + r, where a run begins with `first`.
  struct Row { F16 sum, scale; };
  template <Ending ending>
  QCORE_INLINE Row row(int64_t first, int64_t r, int64_t s) const {
    const int64_t place = first * sections + s * run + r;
    return {ending == Ending::kScaled ? zero_f() : all_f(sums[place]), ending == Ending::kAny && row_scales ? all_f(row_scales[place]) : all_f(1)};
  }

  // A total with the sum of products of a section: (products + (zero - own) * sum) * scale + offset() * sum.
  template <Ending ending, class Offset>
  QCORE_INLINE F16 add(const Row& row, int64_t g, F16 scale, Offset&& offset, F16 products, F16 total) const {
    if constexpr (ending == Ending::kAny) {
      if (row_scales) products = mul(products, row.scale);
      if (own != 0) products = fma(all_f(-own), row.sum, products);
      if (zeros) products = fma(load_f(zeros + 16 * g), row.sum, products);
    }
    total = fma(products, scale, total);
    const bool more = ending == Ending::kOffset || (ending == Ending::kAny && offsets.floats);
    return more ? fma(offset(), row.sum, total) : total;
  }
};

// Totals of some rows by some panels, each in its place, with what a section's products(p, r) gave. left: as of floats_of.
template <int panels, int rows, bool left, class End, class Products, class Place>
QCORE_INLINE void end_section(const End* ends, int64_t row, int64_t s, int64_t g, Products&& products, Place&& place) {
  F16 scale[panels], offset[panels];
  unroll<panels>([&](auto p) QCORE_INSIDE {
    scale[p] = floats_of<left>(ends[p].scales, g);
    if (left) offset[p] = ends[p].offsets.floats ? floats_of<left>(ends[p].offsets, g) : zero_f();
  });
  auto finish = [&](auto ending) QCORE_INSIDE {
    unroll<rows>([&](auto r) QCORE_INSIDE {
      const typename End::Row given = ends->template row<ending>(row, r, s);
      unroll<panels>([&](auto p) QCORE_INSIDE {
        auto&& total = place(p, r);
        // Where they are spread they are read again for each row, from memory: registers are few.
        auto offset_of = [&]() QCORE_INSIDE { return left ? offset[p] : floats_of<false>(ends[p].offsets, g); };
        total = ends[p].template add<ending>(given, g, scale[p], offset_of, products(p, r), total);
      });
    });
  };
  switch (ends->ending()) {
    case Ending::kScaled: return finish(std::integral_constant<Ending, Ending::kScaled>{});
    case Ending::kOffset: return finish(std::integral_constant<Ending, Ending::kOffset>{});
    default: finish(std::integral_constant<Ending, Ending::kAny>{});
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
