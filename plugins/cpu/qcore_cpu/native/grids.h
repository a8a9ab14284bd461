// Opening a panel: its scales become floats, and codes that name tuples of a grid (some of ggml's types) 8-bit codes. Layouts: ggml's src/ggml-common.h; the definition is qcore/blocks/iq.py.
#pragma once
#include "kernels.h"
#include "scales.h"

namespace qcore {
namespace QCORE_ISA {

struct Grid {
  const uint8_t* row;       // a row of blocks
  const uint64_t* tuples;
  uint8_t* codes;           // of the panel, at this row: quad q is at 64 q
  float* scales;            // of the panel, at this row: group g is at 16 g

  void put(int64_t place, uint64_t tuple) const {  // eight codes from column 8 * place
    std::memcpy(codes + 128 * place, &tuple, 4);
    const uint32_t high = static_cast<uint32_t>(tuple >> 32);
    std::memcpy(codes + 128 * place + 64, &high, 4);
  }
};

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

// The codes of a tuple, none of them 0, with their signs.
QCORE_INLINE uint64_t with_signs(uint64_t tuple, uint32_t signs) {
  const uint64_t minus = kSigns.minus[signs];
  return (tuple ^ minus) + (minus & 0x0101010101010101ull);
}

inline void spread_iq2_xxs(const Grid& grid, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* block = grid.row + 66 * b;
    const float d = half_at(block) * 0.125f;
    for (int run = 0; run < 8; run++) {
      const uint8_t* indices = block + 2 + 8 * run;
      const uint32_t word = read<uint32_t>(indices + 4);
      for (int i = 0; i < 4; i++)
        grid.put(32 * b + 4 * run + i, with_signs(grid.tuples[indices[i]], word >> 7 * i & 127));
      grid.scales[16 * (8 * b + run)] = d * static_cast<float>(2 * (word >> 28) + 1);
    }
  }
}

inline void spread_iq2_xs(const Grid& grid, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* block = grid.row + 74 * b;
    const float d = half_at(block) * 0.125f;
    for (int i = 0; i < 32; i++) {
      const uint32_t word = read<uint16_t>(block + 2 + 2 * i);
      grid.put(32 * b + i, with_signs(grid.tuples[word & 511], word >> 9));
    }
    for (int run = 0; run < 16; run++)
      grid.scales[16 * (16 * b + run)] = d * static_cast<float>(2 * (block[66 + run / 2] >> 4 * (run % 2) & 15) + 1);
  }
}

inline void spread_iq1_s(const Grid& grid, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* block = grid.row + 50 * b;
    const float d = half_at(block) * 0.125f;
    for (int run = 0; run < 8; run++) {
      const uint32_t word = read<uint16_t>(block + 34 + 2 * run), shift = word >> 15 << 11;
      for (int i = 0; i < 4; i++)
        grid.put(32 * b + 4 * run + i, grid.tuples[shift | (word >> 3 * i & 7) << 8 | block[2 + 4 * run + i]]);
      grid.scales[16 * (8 * b + run)] = d * static_cast<float>(2 * (word >> 12 & 7) + 1);
    }
  }
}

inline void spread_iq1_m(const Grid& grid, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t* block = grid.row + 56 * b;
    uint32_t words[4], bits = 0;
    for (int i = 0; i < 4; i++) words[i] = read<uint16_t>(block + 48 + 2 * i), bits |= words[i] >> 12 << 4 * i;
    const float d = _cvtsh_ss(static_cast<uint16_t>(bits)) * 0.125f;
    for (int i = 0; i < 32; i++) {
      const uint32_t high = block[32 + i / 2] >> 4 * (i % 2) & 15;
      grid.put(32 * b + i, grid.tuples[(high & 8) << 8 | (high & 7) << 8 | block[i]]);
    }
    for (int run = 0; run < 16; run++)
      grid.scales[16 * (16 * b + run)] = d * static_cast<float>(2 * (words[run / 4] >> 3 * (run % 4) & 7) + 1);
  }
}

// codes: padded * 16 bytes, as of Code::kInt8; scales: [groups][16]. Rows beyond the weight's are zeros.
inline void spread_grid(const Header& h, int64_t panel, uint8_t* codes, float* scales) {
  const uint8_t* base = reinterpret_cast<const uint8_t*>(&h);
  const int64_t first = panel * kPanel, rows = h.rows - first < kPanel ? h.rows - first : kPanel;
  const int64_t blocks = h.columns / 256, row_bytes = blocks * grid_block_bytes(h.code);
  if (rows < kPanel) {
    std::memset(codes, 0, h.padded * kPanel);
    std::memset(scales, 0, h.groups * kPanel * sizeof(float));
  }
  for (int64_t row = 0; row < rows; row++) {
    const Grid grid{base + h.codes + (first + row) * row_bytes, reinterpret_cast<const uint64_t*>(base + h.table), codes + 4 * row,
                    scales + row};
    switch (h.code) {
      case Code::kIQ2XXS: spread_iq2_xxs(grid, blocks); break;
      case Code::kIQ2XS: spread_iq2_xs(grid, blocks); break;
      case Code::kIQ1S: spread_iq1_s(grid, blocks); break;
      default: spread_iq1_m(grid, blocks);
    }
  }
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
