// From the codes of a chunk to numbers: as quads of bytes for integer products, or as floats for exact ones.
#pragma once
#include <type_traits>
#include <utility>

#include "packed.h"
#include "simd.h"

namespace qcore {
namespace QCORE_ISA {

template <Code... codes>
struct Codes {};
using WholeCodes = Codes<Code::kInt1, Code::kInt2, Code::kInt3, Code::kInt4, Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8, Code::kTable3,
                         Code::kTable4>;
using AllCodes = Codes<Code::kInt1, Code::kInt2, Code::kInt3, Code::kInt4, Code::kInt5, Code::kInt6, Code::kInt7, Code::kInt8, Code::kTable3,
                       Code::kTable4, Code::kE4M3, Code::kE4M3Fnuz, Code::kE5M2, Code::kE3M2, Code::kE2M3>;

// What `make` gives for a code of a list, which comes as a constant; nothing for any other.
template <class Made, Code... codes, class Make>
Made made_for(Codes<codes...>, Code code, Make&& make) {
  Made found{};
  ((code == codes ? void(found = make(std::integral_constant<Code, codes>{})) : void()), ...);
  return found;
}

#define QCORE_INLINE inline __attribute__((always_inline))
#define QCORE_INSIDE __attribute__((always_inline))  // of lambdas: their captures then stay in registers

template <class F, int... I>
QCORE_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// Calls f with 0 .. N - 1 as constants.
template <int N, class F>
QCORE_INLINE void unroll(F&& f) { unroll(f, std::make_integer_sequence<int, N>{}); }

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

// Exponent bits, mantissa bits and bias of a small float.
struct FloatShape {
  int exponent, mantissa, bias;
  constexpr float smallest() const { return 2.0f / static_cast<float>(1 << (bias + mantissa)); }  // a mantissa of 1, exponent 0
};
constexpr FloatShape shape_of(Code code) {
  return code == Code::kE4M3Fnuz ? FloatShape{4, 3, 8}
         : code == Code::kE5M2   ? FloatShape{5, 2, 15}
         : code == Code::kE3M2   ? FloatShape{3, 2, 3}
         : code == Code::kE2M3   ? FloatShape{2, 3, 1}
                                 : FloatShape{4, 3, 7};
}

// The float that a code stands for; its bits are the lowest of each lane, and higher ones may hold anything.
template <Code code>
QCORE_INLINE F16 small_float(I16 lanes) {
  constexpr FloatShape shape = shape_of(code);
  constexpr int E = shape.exponent, M = shape.mantissa;
  const I16 magnitude = lanes & all_i((1 << (E + M)) - 1);
  const I16 normal = add(sll(magnitude, 23 - M), all_i((127 - shape.bias) << 23));
  const F16 subnormal = mul(to_float(magnitude), all_f(shape.smallest()));
  const F16 value = where_zero(magnitude & all_i(((1 << E) - 1) << M), subnormal, as_float(normal));
  return as_float(as_int(value) | (sll(lanes, 31 - E - M) & all_i(INT32_MIN)));
}

template <Code code>
struct Floats {
  explicit Floats(const float* entries) : table(is_table(code) ? table16(entries) : Table16{}) {}
  QCORE_INLINE F16 operator()(I16 lanes) const {
    if constexpr (is_table(code)) return look_up(table, lanes);
    else return small_float<code>(lanes);
  }
  Table16 table;
};

// The power of two that a column's code stands at in its word, as each_column finds it.
constexpr int place_of(int bits, int column) {
  const int width = one_plane(bits) ? bits : 8, shift = 8 * (column % 4) + (one_plane(bits) ? bits * (column / 4 % (8 / bits)) : 0);
  return shift + width == 32 ? 0 : shift;
}

// Calls f(value, column) for the columns first .. first + columns - 1 of a chunk, a half (16) or the whole of it. Integers come
// as they are stored, Header::zero not yet subtracted; placed: times 2^place_of.
template <Code code, int first, int columns, bool placed, class F>
QCORE_INLINE void each_column(const uint8_t* chunk, const Floats<code>& floats, F&& f) {
  constexpr int bits = bits_of(code);
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
          constexpr bool stays = placed && shift + bits < 32;
          const I16 lanes = shift && !stays ? srl(word, shift) : word;
          if constexpr (stays)
            f(to_float(word & all_i(((1 << bits) - 1) << shift)), std::integral_constant<int, column>{});
          else if constexpr (is_integer(code))
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
        constexpr bool stays = placed && byte < 3;
        const I16 lanes = byte && !stays ? srl(bytes, 8 * byte) : bytes;
        constexpr int column = 4 * t + byte;
        if constexpr (stays)
          f(to_float(bytes & all_i(0xff << 8 * byte)), std::integral_constant<int, column>{});
        else if constexpr (is_integer(code))
          f(to_float(byte < 3 ? lanes & all_i(0xff) : lanes), std::integral_constant<int, column>{});
        else
          f(floats(lanes), std::integral_constant<int, column>{});
      });
    });
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
