// Many rows by many panels on AMX: codes of a block of panels are unpacked into the cache once, as bfloat16 or int8, and used by
// every row. Products of a section are exact or in float32, and scaled in float32 as they leave the tiles.
#pragma once
#include "grids.h"
#include "halves.h"
#include "integer.h"
#include "scratch.h"

namespace qcore {
namespace QCORE_ISA {

constexpr int64_t kPanelsOfABlock = 16;
constexpr int64_t kColumnsOfABlock = 1024;

// Narrow integers have Header::zero subtracted, so that all are signed.
template <Code code>
void unpack_bytes(const Strip& strip, int64_t first, int64_t columns, void* to) {
  constexpr int bits = bits_of(code);
  const Bytes bytes(is_table(code) ? strip.table : nullptr);
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(strip.h->zero));
  const uint8_t* chunk = strip.codes + first / kChunk * 64 * bits;
  uint8_t* out = static_cast<uint8_t*>(to);
  for (int64_t done = 0; done < columns; done += kChunk, chunk += 64 * bits, out += 512) {
    prefetch<bits>(chunk);
    unroll<8>([&](auto t) QCORE_INSIDE {
      I16 codes = quad<bits, t>(chunk);
      if constexpr (is_table(code)) codes = bytes(codes);
      else if constexpr (bits < 8) codes.v = _mm512_sub_epi8(codes.v, zero);
      _mm512_storeu_si512(out + 64 * t, codes.v);
    });
  }
}

// Of rows of B, 64 bytes each: 16 panel rows x 2 bfloat16, or x 4 int8.
inline Unpack unpacker(Code code, bool integers) {
  if (integers) return made_for<Unpack>(WholeCodes{}, code, [](auto c) { return unpack_bytes<c>; });
  return made_for<Unpack>(AllCodes{}, code, [](auto c) { return unpack_halves<c>; });
}

// Tiles 0 to 3 are C, 4 and 5 are A, 6 and 7 are B.
inline void configure_tiles(int64_t tile_bytes) {
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; tile++) {
    config.rows[tile] = 16;
    config.bytes[tile] = 64;
  }
  for (int a : {4, 5}) config.bytes[a] = static_cast<uint16_t>(tile_bytes);
  for (int b : {6, 7}) config.rows[b] = static_cast<uint8_t>(tile_bytes / 4);
  __asm__ volatile("" ::"m"(config) : "memory");  // GCC 12 drops the stores otherwise
  _tile_loadconfig(&config);
}

// One panel of a block: where its unpacked codes are, and its scales.
struct Side {
  const uint8_t* codes;
  Strip strip;
};

// C tiles of two blocks of rows by two panels; either may be one. sums: [2][2][16][16] float32, of blocks of rows, then panels.
template <bool integers>
struct Corner {
  const Batch& batch;
  int64_t steps;         // tiles of a row of the weight
  float zero;            // what is still to be subtracted from integers
  alignas(64) float products[4][256];

  template <int rows, int panels>
  QCORE_INLINE void multiply_step(const uint8_t* const (&a)[2], const uint8_t* const (&b)[2]) {
    const int64_t stride = batch.tile_bytes;
    _tile_loadd(4, a[0], stride);
    if constexpr (rows == 2) _tile_loadd(5, a[1], stride);
    _tile_loadd(6, b[0], 64);
    if constexpr (panels == 2) _tile_loadd(7, b[1], 64);
    if constexpr (integers) {
      _tile_dpbssd(0, 4, 6);
      if constexpr (panels == 2) _tile_dpbssd(1, 4, 7);
      if constexpr (rows == 2) _tile_dpbssd(2, 5, 6);
      if constexpr (rows == 2 && panels == 2) _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (panels == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (rows == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (rows == 2 && panels == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }

  // The sections first .. last - 1. `row` is the first of the blocks of 16 rows; codes of `sides` begin at column `base`.
  template <int rows, int panels>
  void multiply(const Header& h, const Side* sides, int64_t row, int64_t base, int64_t first, int64_t last, float* sums) {
    const int64_t width = tile_columns(batch), tile = 16 * batch.tile_bytes, step_bytes = 16 * batch.tile_bytes;
    const uint8_t* const a_rows = batch.tiles + row / 16 * steps * tile;
    Section section(h, batch, first * batch.section);
    auto scale_products = [&](int64_t s, int64_t g) {
      for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++) scale(sides[p].strip, row + 16 * r, s, g, products[2 * r + p], sums + 256 * (2 * r + p));
    };
    // A section's products are scaled while those of the next are made: what comes behind a store waits for it.
    int64_t g = 0;
    for (int64_t s = first; s < last; s++, section.next()) {
      const int64_t begin = s * batch.section, stop = begin + batch.section < h.padded ? begin + batch.section : h.padded;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t column = begin; column < stop; column += width) {
        const uint8_t* const at = a_rows + column / width * tile;
        const uint8_t* const a[2] = {at, at + (rows == 2 ? steps * tile : 0)};
        const int64_t place = (column - base) / width * step_bytes;
        const uint8_t* const b[2] = {sides[0].codes + place, sides[panels - 1].codes + place};
        multiply_step<rows, panels>(a, b);
      }
      if (s > first) scale_products(s - 1, g);
      g = section.of_group;
      _tile_stored(0, products[0], 64);
      if constexpr (panels == 2) _tile_stored(1, products[1], 64);
      if constexpr (rows == 2) _tile_stored(2, products[2], 64);
      if constexpr (rows == 2 && panels == 2) _tile_stored(3, products[3], 64);
    }
    if (last > first) scale_products(last - 1, g);
  }

  // sums += products of a section, scaled.
  QCORE_INLINE void scale(const Strip& strip, int64_t row, int64_t s, int64_t g, const float* from, float* sums) {
    const int64_t count = batch.rows - row < 16 ? batch.rows - row : 16;
    const F16 scale = floats_of(strip.scales, g);
    const int64_t at = row * batch.sections + s;
    const bool plain = !strip.zeros && !strip.offsets.floats && zero == 0;
    for (int64_t m = 0; m < count; m++) {
      const int64_t place = at + m * batch.sections;
      F16 value = load_f(from + 16 * m), own = scale;
      if constexpr (integers) {
        value = to_float(as_int(value));
        own = mul(scale, all_f(batch.scales[place]));
      } else if (batch.scales) {
        value = mul(value, all_f(batch.scales[place]));
      }
      F16 sum = load_f(sums + 16 * m);
      if (plain) {
        sum = fma(value, own, sum);
      } else {
        const float inputs = integers ? static_cast<float>(batch.totals[place]) : batch.sums[place];
        if constexpr (integers) value = fma(all_f(-zero), all_f(inputs), value);
        if (strip.zeros) value = fma(load_f(strip.zeros + 16 * g), all_f(inputs), value);
        sum = fma(value, own, sum);
        if (strip.offsets.floats) sum = fma(floats_of(strip.offsets, g), all_f(batch.sums[place]), sum);
      }
      store_f(sums + 16 * m, sum);
    }
  }
};

// The panels first .. last - 1, at most kPanelsOfABlock of them.
template <bool integers>
void multiply_block(const Job& job, int64_t first, int64_t last, Store store) {
  const Header& h = *job.weight;
  const Batch& batch = job.batch;
  const Code code = opened_code(h.code);
  const Unpack unpack = unpacker(code, integers);
  const int64_t panels = last - first, groups = h.groups * kPanel;
  const int64_t whole = batch.section < kColumnsOfABlock ? kColumnsOfABlock / batch.section * batch.section : batch.section;
  // A tile may reach behind the last column: activations are zeros there, and whatever B holds does not count.
  const int64_t columns = whole < h.padded ? whole : tile_steps(batch, h.padded) * tile_columns(batch);
  const int64_t bytes = columns * (integers ? 16 : 32), blocks = (batch.rows + 15) / 16;
  const int64_t even = (panels + 1) / 2 * 2, cells = (blocks + 1) / 2 * 2 * even * 256;  // corners follow each other
  const int64_t expansion = is_grid(h.code) ? h.padded * kPanel : 0;
  uint8_t *codes, *expanded;
  float *spread, *sums;
  static thread_local Scratch scratch;
  scratch.begin(panels * (bytes + expansion + 8 * groups) + 4 * cells, 4);
  scratch.take(codes, panels * bytes);
  scratch.take(expanded, panels * expansion);
  scratch.take(spread, panels * 2 * groups);
  scratch.take(sums, cells);
  std::memset(sums, 0, cells * sizeof(float));
  const float zero = integers && bits_of(code) == 8 ? static_cast<float>(h.zero) : 0;
  Corner<integers> corner{batch, tile_steps(batch, h.padded), zero, {}};

  Side sides[kPanelsOfABlock];
  for (int64_t p = 0; p < panels; p++)
    sides[p] = {codes + p * bytes, open_panel(h, first + p, spread + 2 * groups * p, expanded + p * expansion)};
  const int64_t sections = whole / batch.section;
  for (int64_t s = 0; s < batch.sections; s += sections) {
    const int64_t end = s + sections < batch.sections ? s + sections : batch.sections;
    const int64_t base = s * batch.section, stop = end * batch.section < h.padded ? end * batch.section : h.padded;
    for (int64_t p = 0; p < panels; p++)
      unpack(sides[p].strip, base, (stop - base + kChunk - 1) / kChunk * kChunk, codes + p * bytes);
    for (int64_t block = 0; block < blocks; block += 2)
      for (int64_t p = 0; p < panels; p += 2) {
        float* const corner_sums = sums + (block * even + 2 * p) * 256;
        const bool tall = block + 1 < blocks, wide = p + 1 < panels;
        if (tall && wide) corner.template multiply<2, 2>(h, &sides[p], 16 * block, base, s, end, corner_sums);
        else if (tall) corner.template multiply<2, 1>(h, &sides[p], 16 * block, base, s, end, corner_sums);
        else if (wide) corner.template multiply<1, 2>(h, &sides[p], 16 * block, base, s, end, corner_sums);
        else corner.template multiply<1, 1>(h, &sides[p], 16 * block, base, s, end, corner_sums);
      }
  }
  for (int64_t row = 0; row < batch.rows; row++)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t block = row / 16;
      const float* const corner_sums = sums + (block / 2 * 2 * even + 2 * (p / 2 * 2)) * 256;
      store(job, row, first + p, corner_sums + 256 * (2 * (block % 2) + p % 2) + 16 * (row % 16));
    }
}

inline void multiply_tiles(const Job& job, int64_t first, int64_t last, Store store) {
  configure_tiles(job.batch.tile_bytes);
  // Few rows use what is unpacked once: no more of it than the first cache holds.
  const int64_t most = job.batch.rows <= 32 ? 2 : kPanelsOfABlock;
  for (int64_t panel = first; panel < last; panel += most) {
    const int64_t end = panel + most < last ? panel + most : last;
    if (job.batch.numbers == Numbers::kIntegers) multiply_block<true>(job, panel, end, store);
    else multiply_block<false>(job, panel, end, store);
  }
  _tile_release();
}

}  // namespace QCORE_ISA
}  // namespace qcore
