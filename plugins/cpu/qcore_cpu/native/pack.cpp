// Codes and scales into panels.
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "ggml_blocks.h"
#include "packed.h"
#include "threads.h"

namespace qcore {
namespace {

constexpr int64_t kStep = 256;  // columns that are packed at once: whole blocks of any of ggml's types

// `count` codes of a little-endian bit stream that begins at a whole byte, a byte each.
template <int bits>
void read_stream(const uint8_t* from, int64_t count, uint8_t* to) {
  if constexpr (bits == 8) {
    std::memcpy(to, from, count);
  } else {
    for (int64_t k = 0; k < count; k += 8, from += bits) {
      uint64_t word = 0;
      const int64_t left = count - k;
      if (left >= 8) std::memcpy(&word, from, bits);
      else std::memcpy(&word, from, (left * bits + 7) / 8);
      word = spread<bits>(word);
      if (left >= 8) std::memcpy(to + k, &word, 8);
      else std::memcpy(to + k, &word, left);
    }
  }
}

using ReadStream = void (*)(const uint8_t*, int64_t, uint8_t*);
constexpr ReadStream kStreams[] = {nullptr, read_stream<1>, read_stream<2>, read_stream<3>, read_stream<4>, read_stream<5>, read_stream<6>, read_stream<7>, read_stream<8>};

// The quads of a row's chunk, one code in each byte, into the planes of `bits` bits above the lowest `low`: the row's words of `out`.
template <int bits, int low = 0>
inline void pack_chunk(const uint32_t* quads, uint8_t* out) {
  if constexpr (bits > 0) {
    constexpr int plane = bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1, stacked = 8 / plane;
    constexpr uint32_t mask = 0x01010101u * ((1u << plane) - 1);
    for (int vector = 0; vector < plane; vector++) {
      uint32_t word = 0;
      for (int t = 0; t < stacked; t++) word |= (quads[vector * stacked + t] >> low & mask) << plane * t;
      std::memcpy(out + 64 * vector, &word, 4);
    }
    pack_chunk<bits - plane, low + plane>(quads, out + 64 * plane);
  }
}

// Chunks of a row, one after the other; out: the row's first word.
template <int bits>
void pack_chunks(const uint32_t* quads, int64_t chunks, uint8_t* out) {
  for (int64_t i = 0; i < chunks; i++) pack_chunk<bits>(quads + 8 * i, out + 64 * bits * i);
}

using PackChunks = void (*)(const uint32_t*, int64_t, uint8_t*);
constexpr PackChunks kPackers[] = {nullptr, pack_chunks<1>, pack_chunks<2>, pack_chunks<3>, pack_chunks<4>, pack_chunks<5>, pack_chunks<6>, pack_chunks<7>, pack_chunks<8>};

// Packs a panel of `rows` rows. read(row, base, count, to): its codes base .. base + count - 1, a byte each.
template <class Read>
void pack_panel(const Header& h, int64_t rows, uint8_t* out, Read&& read) {
  const int bits = bits_of(h.code);
  if (rows < kPanel) std::memset(out, 0, panel_bytes(h));
  for (int64_t base = 0; base < h.padded; base += kStep) {
    const int64_t count = h.columns - base < kStep ? h.columns - base : kStep, chunks = (count + kChunk - 1) / kChunk;
    for (int64_t row = 0; row < rows; row++) {
      alignas(64) uint32_t quads[kStep / 4];
      if (count < kStep) std::memset(quads, 0, kStep);
      read(row, base, count, reinterpret_cast<uint8_t*>(quads));
      kPackers[bits](quads, chunks, out + base / kChunk * 64 * bits + 4 * row);
    }
  }
}

// Calls f(panel, rows in it) for the panels of rows first .. last - 1.
template <class F>
void each_panel(int64_t first, int64_t last, F&& f) {
  const int64_t begin = first / kPanel, count = (last + kPanel - 1) / kPanel - begin;
  parallel(count, 4, [&](int64_t from, int64_t to) {
    for (int64_t panel = begin + from; panel < begin + to; panel++) f(panel, last - panel * kPanel < kPanel ? last - panel * kPanel : kPanel);
  });
}

uint8_t* panel_codes(Header* h, int64_t panel) { return reinterpret_cast<uint8_t*>(h) + h->codes + panel * panel_bytes(*h); }

// Codes and scales of blocks. Returns false where a scale is no number.
template <int form>
bool pack_blocks(Header* h, const uint8_t* blocks, int64_t row_bytes) {
  constexpr BlockForm f = kForms[form];
  constexpr int groups = groups_of(f.stored);
  std::atomic<bool> good{true};
  each_panel(0, h->rows, [&](int64_t panel, int64_t rows) {
    // A panel's part of a section that the weight has.
    auto part_of = [&](int64_t section, int64_t bytes) {
      uint8_t* const part = reinterpret_cast<uint8_t*>(h) + section + panel * bytes;
      if (section && rows < kPanel) std::memset(part, 0, bytes);
      return part;
    };
    const int64_t cell_bytes = h->groups * kPanel * (groups ? 1 : 2), above_bytes = (h->padded + 255) / 256 * kPanel * 2;
    uint8_t* const cells = part_of(h->scales, cell_bytes), *const minima = part_of(h->offsets, cell_bytes);
    uint8_t* const above = part_of(h->super_scales, above_bytes), *const above_minima = part_of(h->super_offsets, above_bytes);
    bool numbers = true;
    pack_panel(*h, rows, panel_codes(h, panel), [&](int64_t row, int64_t base, int64_t count, uint8_t* to) {
      int64_t place = base / f.columns;
      const uint8_t* block = blocks + (panel * kPanel + row) * row_bytes + place * f.bytes;
      for (int64_t k = 0; k < count; k += f.columns, block += f.bytes, place++) {
        read_codes<form>(block, to + k);
        BlockScales found;
        numbers &= read_scales<form>(block, found);
        for (int g = 0; g < groups; g++) cells[(place * groups + g) * kPanel + row] = found.codes[g];
        if constexpr (f.stored == Stored::kSixBits)
          for (int g = 0; g < groups; g++) minima[(place * groups + g) * kPanel + row] = found.minima[g];
        const int64_t cell = (place * kPanel + row) * 2;
        if constexpr (has_half(f.stored)) std::memcpy((groups ? above : cells) + cell, &found.half, 2);
        if constexpr (has_minimum(f.stored)) std::memcpy((groups ? above_minima : minima) + cell, &found.minimum, 2);
      }
    });
    if (!numbers) good = false;
  });
  return good;
}

template <int... forms>
bool pack_blocks_of(int wanted, Header* h, const uint8_t* blocks, int64_t row_bytes, std::integer_sequence<int, forms...>) {
  bool good = true;
  ((wanted == forms ? void(good = pack_blocks<forms>(h, blocks, row_bytes)) : void()), ...);
  return good;
}

template <class T>
void pack_cells(const T* cells, int64_t rows, int64_t columns, int64_t padded, T* out) {
  each_panel(0, rows, [&](int64_t panel, int64_t full) {
    T* const to = out + panel * padded * kPanel;
    if (full < kPanel || columns < padded) std::memset(to, 0, padded * kPanel * sizeof(T));
    for (int64_t row = 0; row < full; row++)
      for (int64_t k = 0; k < columns; k++) to[k * kPanel + row] = cells[(panel * kPanel + row) * columns + k];
  });
}

}  // namespace
}  // namespace qcore

// Rows first .. last - 1 (first is a multiple of 16) of codes: [last - first][row_bytes], bit streams of `bits` bits. header: the packed
// weight, whose header is filled in. order: int32 [columns] or null, the code of each packed column. flip: what is added to each code,
// in 8 bits.
QCORE_API void qcore_pack_codes(qcore::Header* header, const uint8_t* codes, int64_t row_bytes, int64_t bits, int64_t first, int64_t last,
                                const int32_t* order, int64_t flip) {
  using namespace qcore;
  const ReadStream read_stream = kStreams[bits];
  each_panel(first, last, [&](int64_t panel, int64_t rows) {
    const uint8_t* const begin = codes + (panel * kPanel - first) * row_bytes;
    std::vector<uint8_t> ordered(order ? rows * header->columns : 0);
    if (order)
      for (int64_t row = 0; row < rows; row++) read_stream(begin + row * row_bytes, header->columns, ordered.data() + row * header->columns);
    pack_panel(*header, rows, panel_codes(header, panel), [&](int64_t row, int64_t base, int64_t count, uint8_t* to) {
      if (order)
        for (int64_t k = 0; k < count; k++) to[k] = ordered[row * header->columns + order[base + k]];
      else
        read_stream(begin + row * row_bytes + base * bits / 8, count, to);
      if (flip)
        for (int64_t k = 0; k < count; k++) to[k] = static_cast<uint8_t>(to[k] + flip);
    });
  });
}

// Whether qcore_pack_blocks reads the blocks of one of ggml's types.
QCORE_API int qcore_reads_blocks(int64_t type) { return qcore::form_of(type) >= 0; }

// Codes, scales and what stands above them, of ggml's blocks: [rows][row_bytes]. Returns 0 where a scale or a minimum is no number.
QCORE_API int qcore_pack_blocks(qcore::Header* header, const uint8_t* blocks, int64_t row_bytes, int64_t type) {
  using namespace qcore;
  return pack_blocks_of(form_of(type), header, blocks, row_bytes, std::make_integer_sequence<int, kFormCount>{});
}

// Scales or offsets of `width` bytes, [rows][columns], into panels: [panels][padded][16].
QCORE_API void qcore_pack_cells(const void* cells, int64_t rows, int64_t columns, int64_t width, int64_t padded, void* out) {
  using namespace qcore;
  if (width == 1) pack_cells(static_cast<const uint8_t*>(cells), rows, columns, padded, static_cast<uint8_t*>(out));
  else if (width == 2) pack_cells(static_cast<const uint16_t*>(cells), rows, columns, padded, static_cast<uint16_t*>(out));
  else pack_cells(static_cast<const uint32_t*>(cells), rows, columns, padded, static_cast<uint32_t*>(out));
}
