// Codes into panels.
#include <sys/mman.h>

#include <cstring>

#include "packed.h"
#include "threads.h"

namespace {

// Code `k` of a row: a little-endian bit stream.
inline uint32_t code_at(const uint8_t* row, int64_t row_bytes, int bits, int64_t k) {
  const int64_t bit = k * bits, byte = bit >> 3;
  uint32_t word = row[byte];
  if (byte + 1 < row_bytes) word |= static_cast<uint32_t>(row[byte + 1]) << 8;
  return word >> (bit & 7) & ((1u << bits) - 1);
}

// Codes base .. base + count - 1, or those that `order` names.
void read_codes(const uint8_t* row, int64_t row_bytes, int bits, int64_t base, int64_t count, const int32_t* order, uint8_t* out) {
  if (order) {
    for (int64_t k = 0; k < count; k++) out[k] = static_cast<uint8_t>(code_at(row, row_bytes, bits, order[base + k]));
  } else if (bits == 8) {
    std::memcpy(out, row + base, count);
  } else if (bits == 4) {
    for (int64_t k = 0; k + 1 < count; k += 2) {
      const uint8_t pair = row[(base + k) / 2];
      out[k] = pair & 15, out[k + 1] = pair >> 4;
    }
    if (count % 2) out[count - 1] = row[(base + count) / 2] & 15;
  } else {
    for (int64_t k = 0; k < count; k++) out[k] = static_cast<uint8_t>(code_at(row, row_bytes, bits, base + k));
  }
}

int64_t panels_between(int64_t first, int64_t last) { return (last + qcore::kPanel - 1) / qcore::kPanel - first / qcore::kPanel; }

// A chunk of 16 rows by 32 codes, one byte each, into planes: the four codes of a quad go together, as a word. codes: [16][32].
void pack_chunk(const uint8_t* codes, int bits, uint8_t* out) {
  std::memset(out, 0, 64 * bits);
  for (int low = 0; bits;) {
    const int plane = bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1, stacked = 8 / plane;
    const uint32_t mask = 0x01010101u * ((1u << plane) - 1);
    for (int row = 0; row < 16; row++)
      for (int t = 0; t < 8; t++) {
        uint32_t quad, word;
        std::memcpy(&quad, codes + 32 * row + 4 * t, 4);
        uint8_t* const place = out + 64 * (t / stacked) + 4 * row;
        std::memcpy(&word, place, 4);
        word |= (quad >> low & mask) << plane * (t % stacked);
        std::memcpy(place, &word, 4);
      }
    out += 64 * plane;
    low += plane;
    bits -= plane;
  }
}

}  // namespace

// Rows first .. last - 1 (first is a multiple of 16) of codes: [last - first][row_bytes], a bit stream of `source_bits` bits.
// header: the packed weight, whose header is filled in. order: int32 [columns] or null, the code of each packed column.
// map: [256] or null, what each code becomes.
QCORE_API void qcore_pack_codes(qcore::Header* header, const uint8_t* source, int64_t row_bytes, int64_t source_bits, int64_t first,
                                int64_t last, const int32_t* order, const uint8_t* map) {
  using namespace qcore;
  const int bits = bits_of(header->code);
  const int wide = static_cast<int>(source_bits);
  parallel(panels_between(first, last), 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = first / kPanel + begin; panel < first / kPanel + end; panel++) {
      uint8_t* out = reinterpret_cast<uint8_t*>(header) + header->codes + panel * panel_bytes(*header);
      const int64_t rows = last - panel * kPanel < kPanel ? last - panel * kPanel : kPanel;
      const uint8_t* const from = source + (panel * kPanel - first) * row_bytes;
      for (int64_t base = 0; base < header->padded; base += kChunk, out += 64 * bits) {
        uint8_t codes[kPanel * kChunk] = {};
        const int64_t count = header->columns - base < kChunk ? header->columns - base : kChunk;
        for (int64_t row = 0; row < rows; row++) {
          uint8_t* const to = codes + row * kChunk;
          read_codes(from + row * row_bytes, row_bytes, wide, base, count, order, to);
          if (map)
            for (int64_t k = 0; k < count; k++) to[k] = map[to[k]];
        }
        pack_chunk(codes, bits, out);
      }
    }
  });
}

// Asks for huge pages behind a block of memory that is not touched yet; the system may decline.
QCORE_API void qcore_huge_pages(void* memory, int64_t bytes) {
  const uintptr_t page = 2 << 20, begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
