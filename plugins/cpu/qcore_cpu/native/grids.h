// Opening a panel: its scales become floats, and codes that name tuples of a grid (some of ggml's types) 8-bit codes. Layouts: ggml's src/ggml-common.h; the definition is qcore/blocks/iq.py.
#pragma once
#include "kernels.h"
#include "scales.h"

namespace qcore {
namespace QCORE_ISA {

template <class T>
QCORE_INLINE T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

QCORE_INLINE float half_at(const uint8_t* p) { return _cvtsh_ss(read<uint16_t>(p)); }

// Of seven signs: a byte of ones where there is a minus. The eighth makes the number of minus signs even.
struct Signs {
  uint64_t minus[128];
  constexpr Signs() : minus() {
    for (uint32_t signs = 0; signs < 128; signs++) {
      const uint32_t all = signs | static_cast<uint32_t>(__builtin_parity(signs)) << 7;
      for (int i = 0; i < 8; i++)
        if (all >> i & 1) minus[signs] |= 0xffull << 8 * i;
    }
  }
};
inline constexpr Signs kSigns;

// Four words from a table of eight codes each, places[i] naming the i-th.
template <class F>
QCORE_INLINE __m256i four_of(const uint64_t* table, F&& place) {
  return _mm256_set_epi64x(static_cast<int64_t>(table[place(3)]), static_cast<int64_t>(table[place(2)]), static_cast<int64_t>(table[place(1)]),
                           static_cast<int64_t>(table[place(0)]));
}

QCORE_INLINE __m256i with_signs(__m256i codes, __m256i minus) { return _mm256_sub_epi8(_mm256_xor_si256(codes, minus), minus); }

// A type's blocks of 256 codes: 32 of them as int8, and the scale of each `group` of these.
template <Code code>
struct GridBlock;

template <>
struct GridBlock<Code::kIQ2XXS> {
  static constexpr int64_t group = 32;
  QCORE_INLINE static __m256i codes(const uint8_t* block, const uint64_t* tuples, int run) {
    const uint8_t* const indices = block + 2 + 8 * run;
    const uint32_t word = read<uint32_t>(indices + 4);
    return with_signs(four_of(tuples, [&](int i) { return indices[i]; }), four_of(kSigns.minus, [&](int i) { return word >> 7 * i & 127; }));
  }
  QCORE_INLINE static float scale(const uint8_t* block, int run, int) {
    return half_at(block) * 0.125f * static_cast<float>(2 * (read<uint32_t>(block + 6 + 8 * run) >> 28) + 1);
  }
};

template <>
struct GridBlock<Code::kIQ2XS> {
  static constexpr int64_t group = 16;
  QCORE_INLINE static __m256i codes(const uint8_t* block, const uint64_t* tuples, int run) {
    auto word = [&](int i) { return read<uint16_t>(block + 2 + 8 * run + 2 * i); };
    return with_signs(four_of(tuples, [&](int i) { return word(i) & 511; }), four_of(kSigns.minus, [&](int i) { return word(i) >> 9; }));
  }
  QCORE_INLINE static float scale(const uint8_t* block, int run, int half) {
    return half_at(block) * 0.125f * static_cast<float>(2 * (block[66 + run] >> 4 * half & 15) + 1);
  }
};

template <>
struct GridBlock<Code::kIQ1S> {
  static constexpr int64_t group = 32;
  QCORE_INLINE static __m256i codes(const uint8_t* block, const uint64_t* tuples, int run) {
    const uint32_t word = read<uint16_t>(block + 34 + 2 * run), shift = word >> 15 << 11;
    return four_of(tuples, [&](int i) { return shift | (word >> 3 * i & 7) << 8 | block[2 + 4 * run + i]; });
  }
  QCORE_INLINE static float scale(const uint8_t* block, int run, int) {
    return half_at(block) * 0.125f * static_cast<float>(2 * (read<uint16_t>(block + 34 + 2 * run) >> 12 & 7) + 1);
  }
};

template <>
struct GridBlock<Code::kIQ1M> {
  static constexpr int64_t group = 16;
  QCORE_INLINE static __m256i codes(const uint8_t* block, const uint64_t* tuples, int run) {
    return four_of(tuples, [&](int i) {
      const uint32_t high = block[32 + 2 * run + i / 2] >> 4 * (i % 2) & 15;
      return (high & 8) << 8 | (high & 7) << 8 | block[4 * run + i];
    });
  }
  QCORE_INLINE static float scale(const uint8_t* block, int run, int half) {
    uint32_t bits = 0;  // of the float16: a hex digit of it on top of each of four words
    for (int i = 0; i < 4; i++) bits |= static_cast<uint32_t>(read<uint16_t>(block + 48 + 2 * i)) >> 12 << 4 * i;
    const uint32_t word = read<uint16_t>(block + 48 + run / 2 * 2);
    return _cvtsh_ss(static_cast<uint16_t>(bits)) * 0.125f * static_cast<float>(2 * (word >> 3 * (2 * run % 4 + half) & 7) + 1);
  }
};

// Calls f with the GridBlock of a code.
template <class F>
QCORE_INLINE void with_grid(Code code, F&& f) {
  switch (code) {
    case Code::kIQ2XXS: return f(GridBlock<Code::kIQ2XXS>{});
    case Code::kIQ2XS: return f(GridBlock<Code::kIQ2XS>{});
    case Code::kIQ1S: return f(GridBlock<Code::kIQ1S>{});
    default: return f(GridBlock<Code::kIQ1M>{});
  }
}

inline const uint64_t* tuples_of(const Header& h) { return reinterpret_cast<const uint64_t*>(section_at(h, h.table)); }
inline const uint8_t* grid_row_at(const Header& h, int64_t row) {
  return section_at(h, h.codes) + row * (h.columns / 256) * grid_block_bytes(h.code);
}

// codes: padded * 16 bytes, as of Code::kInt8; scales: [groups][16]. Rows beyond the weight's are zeros.
inline void spread_grid(const Header& h, int64_t panel, uint8_t* codes, float* scales) {
  const int64_t first = panel * kPanel, rows = h.rows - first < kPanel ? h.rows - first : kPanel, bytes = grid_block_bytes(h.code);
  if (rows < kPanel) {
    std::memset(codes, 0, h.padded * kPanel);
    std::memset(scales, 0, h.groups * kPanel * sizeof(float));
  }
  const uint64_t* const tuples = tuples_of(h);
  with_grid(h.code, [&](auto type) {
    constexpr int groups = 32 / type.group;
    for (int64_t row = 0; row < rows; row++) {
      const uint8_t* block = grid_row_at(h, first + row);
      for (int64_t run = 0; run < h.columns / 32; run++) {
        alignas(32) uint32_t quads[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(quads), type.codes(block, tuples, run % 8));
        for (int t = 0; t < 8; t++) std::memcpy(codes + 64 * (8 * run + t) + 4 * row, quads + t, 4);
        for (int half = 0; half < groups; half++) scales[16 * (groups * run + half) + row] = type.scale(block, run % 8, half);
        if (run % 8 == 7) block += bytes;
      }
    }
  });
}

// The code of a weight's panels once they are opened: grids become 8-bit codes.
constexpr Code opened_code(Code code) { return is_grid(code) ? Code::kInt8 : code; }

// A panel with its scales and offsets spread. floats: 2 * groups * 16 of them. expanded: padded * 16 bytes where the code is a
// grid's, or null.
inline Strip open_panel(const Header& h, int64_t panel, float* floats, uint8_t* expanded) {
  float* const offsets = h.offset == Offset::kNone ? nullptr : floats + h.groups * kPanel;
  const bool before = before_scaling(h.offset);
  const uint8_t* codes = expanded;
  if (is_grid(h.code)) {
    spread_grid(h, panel, expanded, floats);
  } else {
    codes = section_at(h, h.codes) + panel * panel_bytes(h);
    spread_scales(h, panel, floats);
    if (offsets) spread_offsets(h, panel, offsets);
  }
  const float* const table = is_table(h.code) ? reinterpret_cast<const float*>(section_at(h, h.table)) : nullptr;
  return {&h, codes, floats, before ? offsets : nullptr, before ? nullptr : offsets, table};
}

}  // namespace QCORE_ISA
}  // namespace qcore
