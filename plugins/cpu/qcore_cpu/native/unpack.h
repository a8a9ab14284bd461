// Columns of a panel as the numbers that a block of rows is multiplied by.
#pragma once
#include "integer.h"

namespace qcore {
namespace QCORE_ISA {

// The weight itself, scaled: float32 [columns][16].
template <Code code>
void unpack_floats(const Strip& strip, int64_t first, int64_t columns, void* out) {
  constexpr int bits = bits_of(code), half = kChunk / 2;  // a group may be no longer
  const Floats<code> floats(strip.table);
  const F16 own = all_f(is_integer(code) ? -static_cast<float>(strip.h->zero) : 0);
  const uint8_t* chunk = strip.codes + first / kChunk * 64 * bits;
  float* to = static_cast<float*>(out);
  for (int64_t k = first; k < first + columns; k += kChunk, chunk += 64 * bits, to += 16 * kChunk) {
    prefetch<bits>(chunk);
    unroll<2>([&](auto part) QCORE_INSIDE {
      const int64_t g = (k + half * part) / strip.h->group;
      const F16 scale = floats_of(strip.scales, g), offset = strip.offsets.floats ? floats_of(strip.offsets, g) : zero_f();
      const F16 zero = strip.zeros ? add(load_f(strip.zeros + 16 * g), own) : own;
      each_column<code, half * part, half>(chunk, floats, [&](F16 value, auto column) QCORE_INSIDE {
        store_f(to + 16 * column, fma(is_integer(code) ? add(value, zero) : value, scale, offset));
      });
    });
  }
}

// Codes as Dot takes them: quads [columns / 4][16][4], or pairs of 16 bits, the columns 0 2 and 1 3 of each quad.
template <Code code>
void unpack_codes(const Strip& strip, int64_t first, int64_t columns, void* out) {
  constexpr int bits = bits_of(code);
  using D = DotOf<code>;
  const Bytes bytes(is_table(code) ? strip.table : nullptr);
  const uint8_t* chunk = strip.codes + first / kChunk * 64 * bits;
  uint8_t* to = static_cast<uint8_t*>(out);
  for (int64_t done = 0; done < columns; done += kChunk, chunk += 64 * bits) {
    prefetch<bits>(chunk);
    unroll<8>([&](auto t) QCORE_INSIDE {
      I16 codes = quad<bits, t>(chunk);
      if constexpr (is_table(code)) codes = bytes(codes);
      if constexpr (D::width == 2) {
        store_i(to, D::even(codes));
        store_i(to + 64, D::odd(codes));
      } else {
        store_i(to, D::ready(codes));
      }
      to += 64 * D::width;
    });
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
