// From the codes of a chunk to numbers: as quads of bytes for integer products, or as floats for exact ones.
#pragma once
#include <type_traits>
#include <utility>

#include "packed.h"
#include "simd.h"

namespace qcore {
namespace QCORE_ISA {

#define QCORE_INLINE inline __attribute__((always_inline))
#define QCORE_INSIDE __attribute__((always_inline))  // of lambdas: their captures then stay in registers

template <class F, int... I>
QCORE_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// Calls f with 0 .. N - 1 as constants.
template <int N, class F>
QCORE_INLINE void unroll(F&& f) { unroll(f, std::make_integer_sequence<int, N>{}); }

constexpr int code_bits(Code code) {
  const int value = static_cast<int>(code);
  return value <= 8 ? value : value < 32 ? value - 16 : value < 40 ? 8 : 6;
}
constexpr bool is_integer(Code code) { return static_cast<int>(code) <= 8; }
constexpr bool is_table(Code code) { return code == Code::kTable3 || code == Code::kTable4; }
constexpr bool one_plane(int bits) { return bits == 1 || bits == 2 || bits == 4 || bits == 8; }

// Quad t of a plane of `bits` bits that begins at `plane`: one code in each byte.
template <int bits, int t>
QCORE_INLINE I16 plane_quad(const uint8_t* plane) {
  if constexpr (bits == 8) {
    return load_i(plane + 64 * t);
  } else {
    constexpr int stacked = 8 / bits, shift = bits * (t % stacked), mask = (1 << bits) - 1;
    const I16 word = load_i(plane + 64 * (t / stacked));
    return (shift ? srl(word, shift) : word) & all_i(mask * 0x01010101);
  }
}

// Quad t of a chunk, for any number of bits.
template <int bits, int t>
QCORE_INLINE I16 quad(const uint8_t* chunk) {
  if constexpr (one_plane(bits)) {
    return plane_quad<bits, t>(chunk);
  } else {
    constexpr int low = bits > 4 ? 4 : 2, rest = bits - low;
    return plane_quad<low, t>(chunk) | sll(quad<rest, t>(chunk + 64 * low), low);
  }
}

// The float that a code of 1 sign bit, E exponent bits and M mantissa bits stands for; its bits are the lowest of each lane,
// and higher ones may hold anything.
template <int E, int M, int bias>
QCORE_INLINE F16 small_float(I16 code) {
  const I16 magnitude = code & all_i((1 << (E + M)) - 1);
  const I16 normal = add(sll(magnitude, 23 - M), all_i((127 - bias) << 23));
  constexpr float smallest = 2.0f / (1 << (bias + M));
  const F16 subnormal = mul(to_float(magnitude), all_f(smallest));
  const F16 value = where_zero(magnitude & all_i(((1 << E) - 1) << M), subnormal, as_float(normal));
  return as_float(as_int(value) | (sll(code, 31 - E - M) & all_i(INT32_MIN)));
}

template <Code code>
struct Floats {
  explicit Floats(const float* entries) : table(is_table(code) ? table16(entries) : Table16{}) {}
  QCORE_INLINE F16 operator()(I16 lanes) const {
    if constexpr (code == Code::kE4M3) return small_float<4, 3, 7>(lanes);
    if constexpr (code == Code::kE4M3Fnuz) return small_float<4, 3, 8>(lanes);
    if constexpr (code == Code::kE5M2) return small_float<5, 2, 15>(lanes);
    if constexpr (code == Code::kE3M2) return small_float<3, 2, 3>(lanes);
    if constexpr (code == Code::kE2M3) return small_float<2, 3, 1>(lanes);
    if constexpr (is_table(code)) return look_up(table, lanes);
  }
  Table16 table;
};

// Calls f(value, column) for the columns first .. first + columns - 1 of a chunk, a half (16) or the whole of it. Integers come
// as they are stored, Header::zero not yet subtracted.
template <Code code, int first, int columns, class F>
QCORE_INLINE void each_column(const uint8_t* chunk, const Floats<code>& floats, F&& f) {
  constexpr int bits = code_bits(code);
  if constexpr (one_plane(bits)) {
    constexpr int stacked = 8 / bits, quads = columns / 4, vectors = (quads + stacked - 1) / stacked;
    unroll<vectors>([&](auto vector) QCORE_INSIDE {
      constexpr int v = first / 4 / stacked + vector, inside = quads < stacked ? quads : stacked;
      const I16 word = load_i(chunk + 64 * v);
      unroll<4 * inside>([&](auto place) QCORE_INSIDE {
        constexpr int byte = place % 4, t = quads < stacked ? first / 4 % stacked + place / 4 : place / 4;
        constexpr int shift = 8 * byte + bits * t, column = 4 * (v * stacked + t) + byte;
        if constexpr (code == Code::kInt8) {
          f(to_float(sra(shift < 24 ? sll(word, 24 - shift) : word, 24)), std::integral_constant<int, column>{});
        } else {
          const I16 lanes = shift ? srl(word, shift) : word;
          if constexpr (is_integer(code))
            f(to_float(shift + bits < 32 ? lanes & all_i((1 << bits) - 1) : lanes), std::integral_constant<int, column>{});
          else
            f(floats(lanes), std::integral_constant<int, column>{});
        }
      });
    });
  } else {
    unroll<columns / 4>([&](auto place) QCORE_INSIDE {
      constexpr int t = first / 4 + place;
      const I16 bytes = quad<bits, t>(chunk);
      unroll<4>([&](auto byte) QCORE_INSIDE {
        const I16 lanes = byte ? srl(bytes, 8 * byte) : bytes;
        constexpr int column = 4 * t + byte;
        if constexpr (is_integer(code))
          f(to_float(byte < 3 ? lanes & all_i(0xff) : lanes), std::integral_constant<int, column>{});
        else
          f(floats(lanes), std::integral_constant<int, column>{});
      });
    });
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
