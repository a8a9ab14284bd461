// Opening a panel: its scales become floats, and codes that name tuples of a grid (some of ggml's types) 8-bit codes. Layouts: ggml's src/ggml-common.h; the definition is qcore/blocks/iq.py.
#pragma once
#include "panel.h"

namespace qcore {
namespace QCORE_ISA {

template <class T>
QCORE_INLINE T read(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

QCORE_INLINE float half_at(const uint8_t* p) { return _cvtsh_ss(read<uint16_t>(p)); }

// A block of 256 codes, taken apart: 32 places in the table of tuples, what becomes of the tuples, and the scale of each group.
struct OpenedBlock {
  alignas(32) uint16_t places[32];
  alignas(32) uint8_t changes[32];  // a bit for each minus sign, or what is added to a tuple
  alignas(32) float scales[16];
};

QCORE_INLINE void store_places(OpenedBlock& to, __m256i low, __m256i high) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to.places), low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(to.places + 16), high);
}

// Seven signs in each byte; the eighth makes the number of minus signs even.
QCORE_INLINE void store_signs(OpenedBlock& to, __m256i seven) {
  const __m256i odd = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, -128, -128, 0, -128, 0, 0, -128, -128, 0, 0, -128, 0, -128, -128, 0));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_shuffle_epi8(odd, _mm256_and_si256(seven, nibble));
  const __m256i high = _mm256_shuffle_epi8(odd, _mm256_and_si256(_mm256_srli_epi16(seven, 4), nibble));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to.changes), _mm256_or_si256(seven, _mm256_xor_si256(low, high)));
}

// (2 codes + 1) / 8 * d, from place `at` on.
QCORE_INLINE void store_scales(OpenedBlock& to, int at, __m256i codes, float d) {
  const __m256 odd = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_add_epi32(codes, codes), _mm256_set1_epi32(1)));
  _mm256_store_ps(to.scales + at, _mm256_mul_ps(odd, _mm256_set1_ps(d * 0.125f)));
}

QCORE_INLINE __m256i load_256(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
QCORE_INLINE __m128i load_128(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
QCORE_INLINE __m128i load_64(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// group: codes under one scale. bias: what tuples have become too large by, so that none is negative; 0 where they have signs instead.
// Of the two halves of a table with a bias, the second is the first less 2: only the first is read, which the cache holds.
template <Code code>
struct GridBlock;

template <>
struct GridBlock<Code::kIQ2XXS> {
  static constexpr int64_t group = 32;
  static constexpr int bias = 0;
  QCORE_INLINE static void open(const uint8_t* block, OpenedBlock& to) {  // of 8 bytes, four are places, then come signs and a scale
    const __m256 low = _mm256_castsi256_ps(load_256(block + 2)), high = _mm256_castsi256_ps(load_256(block + 34));
    const __m256i places = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), 0xd8);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0xdd)), 0xd8);
    store_places(to, _mm256_cvtepu8_epi16(_mm256_castsi256_si128(places)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(places, 1)));
    auto byte = [&](int i) { return _mm256_and_si256(_mm256_slli_epi32(words, i), _mm256_set1_epi32(127 << 8 * i)); };
    store_signs(to, _mm256_or_si256(_mm256_or_si256(byte(0), byte(1)), _mm256_or_si256(byte(2), byte(3))));
    store_scales(to, 0, _mm256_srli_epi32(words, 28), half_at(block));
  }
};

template <>
struct GridBlock<Code::kIQ2XS> {
  static constexpr int64_t group = 16;
  static constexpr int bias = 0;
  QCORE_INLINE static void open(const uint8_t* block, OpenedBlock& to) {  // words of 9 bits of a place and seven signs
    const __m256i low = load_256(block + 2), high = load_256(block + 34), place = _mm256_set1_epi16(511);
    store_places(to, _mm256_and_si256(low, place), _mm256_and_si256(high, place));
    const __m256i signs = _mm256_packus_epi16(_mm256_srli_epi16(low, 9), _mm256_srli_epi16(high, 9));
    store_signs(to, _mm256_permute4x64_epi64(signs, 0xd8));
    const __m128i bytes = load_64(block + 66), nibble = _mm_set1_epi8(15);
    const __m128i scales = _mm_unpacklo_epi8(_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    store_scales(to, 0, _mm256_cvtepu8_epi32(scales), half_at(block));
    store_scales(to, 8, _mm256_cvtepu8_epi32(_mm_srli_si128(scales, 8)), half_at(block));
  }
};

template <>
struct GridBlock<Code::kIQ1S> {
  static constexpr int64_t group = 32;
  static constexpr int bias = 9;
  QCORE_INLINE static void open(const uint8_t* block, OpenedBlock& to) {
    const __m128i words = load_128(block + 34);  // one for 32 codes: three bits on top of each of four places, a scale, and the half of the table
    auto places = [&](int at, __m128i order) {
      const __m256i each = _mm256_set_m128i(_mm_shuffle_epi8(words, _mm_add_epi8(order, _mm_set1_epi8(4))), _mm_shuffle_epi8(words, order));
      const __m256i top = _mm256_mullo_epi16(each, _mm256_set1_epi64x(1ll << 13 | 1ll << 26 | 1ll << 39 | 1ll << 52));
      return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(top, 5), _mm256_set1_epi16(0x700)), _mm256_cvtepu8_epi16(load_128(block + 2 + at)));
    };
    const __m128i first = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
    store_places(to, places(0, first), places(16, _mm_add_epi8(first, _mm_set1_epi8(8))));
    const __m128i halves = _mm_and_si128(_mm_srai_epi16(words, 15), _mm_set1_epi8(2)), less = _mm_sub_epi8(_mm_set1_epi8(bias), halves);
    _mm_store_si128(reinterpret_cast<__m128i*>(to.changes), _mm_unpacklo_epi16(less, less));
    _mm_store_si128(reinterpret_cast<__m128i*>(to.changes + 16), _mm_unpackhi_epi16(less, less));
    store_scales(to, 0, _mm256_and_si256(_mm256_srli_epi32(_mm256_cvtepu16_epi32(words), 12), _mm256_set1_epi32(7)), half_at(block));
  }
};

template <>
struct GridBlock<Code::kIQ1M> {
  static constexpr int64_t group = 16;
  static constexpr int bias = 9;
  QCORE_INLINE static void open(const uint8_t* block, OpenedBlock& to) {
    const __m128i bytes = load_128(block + 32), nibble = _mm_set1_epi8(15);  // of each place three bits on top, and the half of the table
    const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m128i low = _mm_unpacklo_epi8(even, odd), high = _mm_unpackhi_epi8(even, odd);
    auto places = [&](__m128i top, int at) {
      const __m256i bits = _mm256_cvtepu8_epi16(_mm_and_si128(top, _mm_set1_epi8(7)));
      return _mm256_or_si256(_mm256_slli_epi16(bits, 8), _mm256_cvtepu8_epi16(load_128(block + at)));
    };
    store_places(to, places(low, 0), places(high, 16));
    auto change = [](__m128i top) { return _mm_sub_epi8(_mm_set1_epi8(bias), _mm_and_si128(_mm_srli_epi16(top, 2), _mm_set1_epi8(2))); };
    _mm_store_si128(reinterpret_cast<__m128i*>(to.changes), change(low));
    _mm_store_si128(reinterpret_cast<__m128i*>(to.changes + 16), change(high));
    // Four words of four scales of three bits; on top of them stand the float16's hex digits, which a product brings together.
    const uint64_t digits = read<uint64_t>(block + 48) >> 12 & 0x000f000f000f000f;
    const float d = _cvtsh_ss(static_cast<uint16_t>(digits * (1ull << 48 | 1ull << 36 | 1ull << 24 | 1ull << 12) >> 48));
    auto scales = [&](__m128i order) {
      const __m256i each = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(load_64(block + 48), order));
      return _mm256_and_si256(_mm256_srlv_epi32(each, _mm256_setr_epi32(0, 3, 6, 9, 0, 3, 6, 9)), _mm256_set1_epi32(7));
    };
    const __m128i first = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
    store_scales(to, 0, scales(first), d);
    store_scales(to, 8, scales(_mm_add_epi8(first, _mm_set1_epi8(4))), d);
  }
};

// Four tuples, of 32 codes.
QCORE_INLINE __m256i tuples_at(const uint64_t* tuples, const uint16_t* places) {
  return _mm256_set_epi64x(static_cast<int64_t>(tuples[places[3]]), static_cast<int64_t>(tuples[places[2]]), static_cast<int64_t>(tuples[places[1]]),
                           static_cast<int64_t>(tuples[places[0]]));
}

// Each of four bytes eight times.
QCORE_INLINE __m256i eight_each(const uint8_t* four) {
  const __m256i order = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  return _mm256_shuffle_epi8(_mm256_set1_epi32(read<int32_t>(four)), order);
}

// 32 codes without their signs, or larger than they are by `bias`.
template <class Block>
QCORE_INLINE __m256i magnitudes_of(Block, const OpenedBlock& block, const uint64_t* tuples, int run) {
  const __m256i entries = tuples_at(tuples, block.places + 4 * run);
  if constexpr (Block::bias) return _mm256_add_epi8(entries, eight_each(block.changes + 4 * run));
  else return entries;
}

// 1 or -1 for each of 32 codes.
QCORE_INLINE __m256i signs_of(const OpenedBlock& block, int run) {
  const __m256i bits = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  return _mm256_or_si256(_mm256_cmpeq_epi8(_mm256_and_si256(eight_each(block.changes + 4 * run), bits), bits), _mm256_set1_epi8(1));
}

template <class Block>
QCORE_INLINE __m256i codes_of(Block type, const OpenedBlock& block, const uint64_t* tuples, int run) {
  const __m256i magnitudes = magnitudes_of(type, block, tuples, run);
  if constexpr (Block::bias) return _mm256_sub_epi8(magnitudes, _mm256_set1_epi8(Block::bias));
  else return _mm256_sign_epi8(magnitudes, signs_of(block, run));
}

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

// Word t of row r becomes word r of row t.
QCORE_INLINE void transpose(__m256i (&rows)[8]) {
  __m256i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      fours[i + 2 * k] = _mm256_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
      fours[i + 2 * k + 1] = _mm256_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
    }
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}

// Blocks of up to eight rows, from `row` of the panel on, into the panel: codes of Code::kInt8, scales as floats. block: of the first row.
template <class Block>
QCORE_INLINE void spread_blocks(Block type, const uint8_t* block, int64_t row_bytes, int64_t count, const uint64_t* tuples, uint8_t* codes, float* scales) {
  OpenedBlock opened[8];
  for (int64_t r = 0; r < count; r++) {
    type.open(block + r * row_bytes, opened[r]);
    for (int k = 0; k < 256 / Block::group; k++) scales[16 * k + r] = opened[r].scales[k];
  }
  for (int run = 0; run < 8; run++) {
    __m256i quads[8];
    for (int64_t r = 0; r < 8; r++) quads[r] = r < count ? codes_of(type, opened[r], tuples, run) : _mm256_setzero_si256();
    transpose(quads);
    for (int t = 0; t < 8; t++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 64 * (8 * run + t)), quads[t]);
  }
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
    for (int64_t row = 0; row < rows; row += 8)
      for (int64_t i = 0; i < h.columns / 256; i++)
        spread_blocks(type, grid_row_at(h, first + row) + i * bytes, h.columns / 256 * bytes, rows - row < 8 ? rows - row : 8, tuples,
                      codes + 256 * kPanel * i + 4 * row, scales + 256 / type.group * kPanel * i + row);
  });
}

// The code of a weight's panels once they are opened: grids become 8-bit codes.
constexpr Code opened_code(Code code) { return is_grid(code) ? Code::kInt8 : code; }

// A panel. once: it is multiplied by rows once, so that scales may be left as they are. floats: 2 * groups * 16 of them. expanded: padded * 16
// bytes where the code is a grid's, or null.
inline Strip open_panel(const Header& h, int64_t panel, float* floats, uint8_t* expanded, bool once = false) {
  float* const others = floats + h.groups * kPanel;
  auto ahead = [&](int64_t section, int64_t width) -> Stream {
    const int64_t bytes = h.groups * kPanel * width;
    return {section_at(h, section) + (panel + 1) * bytes, bytes * kChunk / h.padded};
  };
  const auto* const table = reinterpret_cast<const float*>(section_at(h, h.table));
  Strip strip{&h, expanded, {floats, GroupFloats::kSpread, nullptr, 0}, {}, nullptr, is_table(h.code) ? table : nullptr,
              {ahead(h.scales, bytes_of(h.scale)), ahead(h.offsets, bytes_of(h.offset, h.scale))}, nullptr};
  if (is_grid(h.code)) {
    spread_grid(h, panel, expanded, floats);
    return strip;
  }
  strip.codes = section_at(h, h.codes) + panel * panel_bytes(h);
  if (once && can_be_left(h)) {
    strip.scales = left_scales(h, panel, floats);
    if (h.offset != Offset::kNone) strip.offsets = left_offsets(h, panel, others);
    return strip;
  }
  spread_scales(h, panel, floats);
  if (h.offset == Offset::kNone) return strip;
  spread_offsets(h, panel, others);
  if (before_scaling(h.offset)) strip.zeros = others;
  else strip.offsets = {others, GroupFloats::kSpread, nullptr, 0};
  return strip;
}

}  // namespace QCORE_ISA
}  // namespace qcore
