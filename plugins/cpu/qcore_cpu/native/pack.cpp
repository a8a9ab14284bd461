// Codes into panels.
#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "packed.h"
#include "threads.h"

namespace qcore {
namespace {

constexpr int64_t kStep = 256;  // columns that are read at once: whole blocks of any of ggml's types

// Some bits of ggml's codes: `run` bytes hold the lowest bits of as many codes, then the next bits of the codes that follow, and so on.
struct Plane {
  int at, bits, run;
};

// Where ggml's blocks keep their codes (ggml-common.h, ggml-quants.c); `high` goes on top of `low`.
struct BlockForm {
  int64_t type;  // ggml's number
  int64_t columns, bytes;
  Plane low, high;
};

constexpr BlockForm kForms[] = {
    {2, 32, 18, {2, 4, 16}, {}},             // q4_0
    {3, 32, 20, {4, 4, 16}, {}},             // q4_1
    {6, 32, 22, {6, 4, 16}, {2, 1, 1}},      // q5_0
    {7, 32, 24, {8, 4, 16}, {4, 1, 1}},      // q5_1
    {8, 32, 34, {2, 8, 32}, {}},             // q8_0
    {10, 256, 84, {16, 2, 32}, {}},          // q2_k
    {11, 256, 110, {32, 2, 32}, {0, 1, 32}},   // q3_k
    {12, 256, 144, {16, 4, 32}, {}},         // q4_k
    {13, 256, 176, {48, 4, 32}, {16, 1, 32}},  // q5_k
    {14, 256, 210, {0, 4, 64}, {128, 2, 32}},  // q6_k
    {20, 32, 18, {2, 4, 16}, {}},            // iq4_nl
    {23, 256, 136, {8, 4, 16}, {}},          // iq4_xs
    {35, 256, 66, {0, 2, 32}, {}},           // tq2_0
    {39, 32, 17, {1, 4, 16}, {}},            // mxfp4
    {41, 128, 18, {2, 1, 1}, {}},            // q1_0
    {42, 64, 18, {2, 2, 1}, {}},             // q2_0
};

const BlockForm* form_of(int64_t type) {
  for (const BlockForm& form : kForms)
    if (form.type == type) return &form;
  return nullptr;
}

// A plane's bits into codes of a byte each; behind the first, above the `low` bits that are there already.
template <bool first>
void read_plane(const uint8_t* block, const Plane& plane, int64_t columns, int low, uint8_t* codes) {
  const uint8_t* from = block + plane.at;
  const int bits = plane.bits, run = plane.run;
  const uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);
  for (uint8_t* const end = codes + columns; codes < end; from += run)
    for (int shift = 0; shift < 8; shift += bits, codes += run)
      if (run == 1) {
        *codes = static_cast<uint8_t>((first ? 0 : *codes) | (*from >> shift & (mask & 0xff)) << low);
      } else {
        for (int i = 0; i < run; i += 8) {
          uint64_t word, held = 0;
          std::memcpy(&word, from + i, 8);
          if constexpr (!first) std::memcpy(&held, codes + i, 8);
          held |= (word >> shift & mask) << low;
          std::memcpy(codes + i, &held, 8);
        }
      }
}

// Code `k` of a row: a little-endian bit stream.
inline uint32_t code_at(const uint8_t* row, int64_t row_bytes, int bits, int64_t k) {
  const int64_t bit = k * bits, byte = bit >> 3;
  uint32_t word = row[byte];
  if (byte + 1 < row_bytes) word |= static_cast<uint32_t>(row[byte + 1]) << 8;
  return word >> (bit & 7) & ((1u << bits) - 1);
}

// Rows of codes, however they are stored. order: int32 [columns] or null, the code of each packed column.
struct Source {
  const uint8_t* codes;
  int64_t row_bytes;
  const BlockForm* form;  // null: a bit stream of `bits` bits
  int bits;
  const int32_t* order;

  // Codes base .. base + count - 1 of a row, a byte each. base: a multiple of kStep; count: at most kStep, of blocks a whole number.
  void read(int64_t row, int64_t base, int64_t count, uint8_t* to) const {
    const uint8_t* const from = codes + row * row_bytes;
    if (form) {
      const uint8_t* block = from + base / form->columns * form->bytes;
      for (int64_t k = 0; k < count; k += form->columns, block += form->bytes) {
        read_plane<true>(block, form->low, form->columns, 0, to + k);
        if (form->high.bits) read_plane<false>(block, form->high, form->columns, form->low.bits, to + k);
      }
    } else if (order) {
      for (int64_t k = 0; k < count; k++) to[k] = static_cast<uint8_t>(code_at(from, row_bytes, bits, order[base + k]));
    } else if (bits == 8) {
      std::memcpy(to, from + base, count);
    } else if (bits == 4) {
      for (int64_t k = 0; k < count; k++) to[k] = from[(base + k) / 2] >> 4 * (k % 2) & 15;
    } else {
      for (int64_t k = 0; k < count; k++) to[k] = static_cast<uint8_t>(code_at(from, row_bytes, bits, base + k));
    }
  }
};

// The quads of a row's chunk, one code in each byte, into the planes of `bits` bits above the lowest `low`: the row's words of `out`.
template <int bits, int low = 0>
inline void pack_row(const uint32_t* quads, uint8_t* out) {
  if constexpr (bits > 0) {
    constexpr int plane = bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1, stacked = 8 / plane;
    constexpr uint32_t mask = 0x01010101u * ((1u << plane) - 1);
    for (int vector = 0; vector < plane; vector++) {
      uint32_t word = 0;
      for (int t = 0; t < stacked; t++) word |= (quads[vector * stacked + t] >> low & mask) << plane * t;
      std::memcpy(out + 64 * vector, &word, 4);
    }
    pack_row<bits - plane, low + plane>(quads, out + 64 * plane);
  }
}

template <int... bits>
void pack_row_of(int wanted, const uint32_t* quads, uint8_t* out, std::integer_sequence<int, bits...>) {
  ((wanted == bits + 1 ? pack_row<bits + 1>(quads, out) : void()), ...);
}

int64_t panels_between(int64_t first, int64_t last) { return (last + kPanel - 1) / kPanel - first / kPanel; }

// A panel of `rows` rows, the first of which is row `first` of the source.
void pack_panel(const Header& h, const Source& source, int64_t first, int64_t rows, const uint8_t* map, uint8_t* out) {
  const int bits = bits_of(h.code);
  if (rows < kPanel) std::memset(out, 0, panel_bytes(h));
  for (int64_t base = 0; base < h.padded; base += kStep)
    for (int64_t row = 0; row < rows; row++) {
      alignas(64) uint32_t quads[kStep / 4];
      uint8_t* const codes = reinterpret_cast<uint8_t*>(quads);
      const int64_t count = h.columns - base < kStep ? h.columns - base : kStep;
      if (count < kStep) std::memset(codes, 0, kStep);
      source.read(first + row, base, count, codes);
      if (map)
        for (int64_t k = 0; k < count; k++) codes[k] = map[codes[k]];
      for (int64_t k = 0; k < kStep && base + k < h.padded; k += kChunk)
        pack_row_of(bits, quads + k / 4, out + (base + k) / kChunk * 64 * bits + 4 * row, std::make_integer_sequence<int, 8>{});
    }
}

}  // namespace
}  // namespace qcore

// Rows first .. last - 1 (first is a multiple of 16) of codes: [last - first][row_bytes], a bit stream of `source_bits` bits, or ggml's
// blocks of type -source_bits. header: the packed weight, whose header is filled in. order: as of Source. map: [256] or null, what
// each code becomes.
QCORE_API void qcore_pack_codes(qcore::Header* header, const uint8_t* codes, int64_t row_bytes, int64_t source_bits, int64_t first, int64_t last,
                                const int32_t* order, const uint8_t* map) {
  using namespace qcore;
  const Source source{codes, row_bytes, source_bits < 0 ? form_of(-source_bits) : nullptr, static_cast<int>(source_bits), order};
  parallel(panels_between(first, last), 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = first / kPanel + begin; panel < first / kPanel + end; panel++) {
      const int64_t rows = last - panel * kPanel < kPanel ? last - panel * kPanel : kPanel;
      uint8_t* const out = reinterpret_cast<uint8_t*>(header) + header->codes + panel * panel_bytes(*header);
      pack_panel(*header, source, panel * kPanel - first, rows, map, out);
    }
  });
}

// Whether qcore_pack_codes reads the blocks of one of ggml's types.
QCORE_API int qcore_reads_blocks(int64_t type) { return qcore::form_of(type) != nullptr; }

// Asks for huge pages behind a block of memory that is not touched yet; the system may decline.
QCORE_API void qcore_huge_pages(void* memory, int64_t bytes) {
  const uintptr_t page = 2 << 20, begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
