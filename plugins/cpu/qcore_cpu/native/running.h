// Sums of products of bfloat16 that run through all groups of a panel and stay in registers: each is a multiple of the present group's scale,
// and goes over to the next one's by one multiplication. Needs AVX-512 BF16.
#pragma once
#include "blocks.h"

namespace qcore {
namespace QCORE_ISA {

// Each lane of a sum += the products of two pairs of bfloat16. As _mm512_dpbf16_ps; of that, GCC 12 moves sums from register to register.
QCORE_INLINE void add_pairs(F16& sum, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a), "v"(b)); }

// The same of a factor and of a product.
QCORE_INLINE void multiply_by(F16& sum, F16 factor) { __asm__("vmulps %1, %0, %0" : "+v"(sum.v) : "v"(factor.v)); }
QCORE_INLINE void add_product(F16& sum, F16 a, F16 b) { __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v)); }

constexpr float kLeastScale = 0x1p-30f, kGreatestScale = 0x1p30f;  // between these no sum overflows for being a multiple of another scale

// Calls f(group, its scale, the one before) for a panel's groups. A scale of zero does not matter, and counts as the one before.
template <class F>
inline void each_scale(const Strip& strip, F&& f) {
  F16 before = all_f(1);
  for (int64_t g = 0; g < strip.h->groups; g++) {
    const F16 stored = load_f(strip.scales.floats + 16 * g);
    const F16 scale = where_zero(as_int(abs_f(stored)), before, stored);
    f(g, scale, before);
    before = scale;
  }
}

// Whether no scale of the panel is too great or too small.
inline bool fits_running(const Strip& strip) {
  __mmask16 fit = 0xffff;
  each_scale(strip, [&](int64_t, F16 scale, F16) {
    const __m512 size = abs_f(scale).v;
    fit &= _mm512_cmp_ps_mask(size, _mm512_set1_ps(kLeastScale), _CMP_GE_OQ) & _mm512_cmp_ps_mask(size, _mm512_set1_ps(kGreatestScale), _CMP_LE_OQ);
  });
  return fit == 0xffff;
}

// Makes Strip::ratios: [groups + 1][16], by how much the scale before a group is greater than its own, and at the end the last scale. Offsets become
// multiples of scales, and zero points that are scaled by zero become zeros.
inline void open_running(Strip& strip, float* ratios) {
  float* const offsets = const_cast<float*>(strip.offsets.floats), *const zeros = const_cast<float*>(strip.zeros);  // they are spread: nobody else's
  each_scale(strip, [&](int64_t g, F16 scale, F16 before) {
    store_f(ratios + 16 * g, div(before, scale));
    if (offsets) store_f(offsets + 16 * g, div(load_f(offsets + 16 * g), scale));
    if (zeros) store_f(zeros + 16 * g, where_zero(as_int(abs_f(load_f(strip.scales.floats + 16 * g))), zero_f(), load_f(zeros + 16 * g)));
    store_f(ratios + 16 * (g + 1), scale);  // what comes behind it, if anything does, takes its place
  });
  strip.ratios = ratios;
}

// Zeros among the unpacked columns first .. first + columns - 1 where a scale is zero.
inline void clear_running(const Strip& strip, int64_t first, int64_t columns, void* block) {
  const int64_t group = strip.h->group;
  uint8_t* const numbers = static_cast<uint8_t*>(block);
  for (int64_t column = first; column < first + columns;) {
    const int64_t g = column / group, stop = (g + 1) * group < first + columns ? (g + 1) * group : first + columns;
    const __mmask16 none = _mm512_cmp_ps_mask(load_f(strip.scales.floats + 16 * g).v, _mm512_setzero_ps(), _CMP_EQ_OQ);
    for (; none && column < stop; column += 2) _mm512_mask_storeu_epi32(numbers + 32 * (column - first), none, _mm512_setzero_si512());
    column = stop;
  }
}

// Totals from multiples of the last scale.
inline void close_running(const Strip& strip, int64_t rows, float* totals) {
  const F16 scale = load_f(strip.ratios + 16 * strip.h->groups);
  for (int64_t row = 0; row < rows; row++) store_f(totals + 16 * row, mul(load_f(totals + 16 * row), scale));
}

// As add_codes, the totals being sums that run. more: whether something comes to each section's products.
template <int rows, bool more>
void add_running(const Block& block, const Batch& batch, int64_t row, float* totals, int64_t apart) {
  constexpr int panels = kPanelsAtOnce;
  constexpr int half = kChunk / 2;  // a section may be no longer
  const Header& h = *block.strips->h;
  const int64_t run = batch.run, stop = block.first + block.columns;
  const char *x = numbers_of(batch) + (row * h.padded + block.first * run) * 2, *numbers = block.numbers;
  Section section(h, batch, block.first);
  Ahead ahead(block);
  F16 sum[panels][rows];
  unroll<panels * rows>([&](auto i) QCORE_INSIDE { sum[i / rows][i % rows] = load_f(totals + i / rows * apart + 16 * (i % rows)); });
  for (int64_t column = block.first; column < stop; section.next()) {
    const int64_t g = section.of_group, end = column + section.length < stop ? column + section.length : stop;
    if (section.left == section.group) {
      F16 ratio[panels];
      unroll<panels>([&](auto p) QCORE_INSIDE { ratio[p] = load_f(block.strips[p].ratios + 16 * g); });
      unroll<panels * rows>([&](auto i) QCORE_INSIDE { multiply_by(sum[i / rows][i % rows], ratio[i / rows]); });
    }
    for (; column < end; column += half) {
      ahead.fetch_chunk();
      unroll<half / 2>([&](auto step) QCORE_INSIDE {
        I16 codes[panels];
        unroll<panels>([&](auto p) QCORE_INSIDE { codes[p] = load_i(numbers + p * block.bytes + 64 * step); });
        unroll<rows>([&](auto r) QCORE_INSIDE {
          const Word given = spread_word(x + 4 * r);
          unroll<panels>([&](auto p) QCORE_INSIDE { add_pairs(sum[p][r], codes[p].v, given); });
        });
        advance(x, 4 * run);
      });
      numbers += 32 * half;
    }
    if constexpr (more) {
      const float* const given = batch.sums + row * batch.sections + section.number * run;
      F16 each[panels];
      unroll<panels>([&](auto p) QCORE_INSIDE { each[p] = load_f((block.strips[p].zeros ? block.strips[p].zeros : block.strips[p].offsets.floats) + 16 * g); });
      unroll<rows>([&](auto r) QCORE_INSIDE {
        const F16 total = all_f(given[r]);
        unroll<panels>([&](auto p) QCORE_INSIDE { add_product(sum[p][r], each[p], total); });
      });
    }
  }
  unroll<panels * rows>([&](auto i) QCORE_INSIDE { store_f(totals + i / rows * apart + 16 * (i % rows), sum[i / rows][i % rows]); });
}

template <bool more>
const BlockKernel* running_blocks() {
  return each_of<kHalfRun, BlockKernel>([](auto rows) { return add_running<rows, more>; });
}
inline const BlockKernel* running_kernels(const Strip& strip) {
  return strip.zeros || strip.offsets.floats ? running_blocks<true>() : running_blocks<false>();
}

}  // namespace QCORE_ISA
}  // namespace qcore
