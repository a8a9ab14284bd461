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

// Calls f(value, column) for the columns first .. first + columns - 1 of a chunk, a half (16) or the whole of it. Integers come
// as they are stored, Header::zero not yet subtracted.
template <Code code, int first, int columns, class F>
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

// Masks of the four codes of a quad, in registers: compilers would make them anew each time.
template <int bits>
struct QuadMasks {
  I16 of[4];
  QCORE_INLINE explicit QuadMasks(const float*) {
    unroll<4>([&](auto byte) QCORE_INSIDE {
      I16 mask = all_i(((1 << (one_plane(bits) ? bits : 7)) - 1) << 8 * byte);
#ifdef __AVX512F__
      __asm__("" : "+v"(mask.v));
#else
      __asm__("" : "+x"(mask.a));
      mask.b = mask.a;
#endif
      of[byte] = mask;
    });
  }
};

// The same for in_place codes, below 8 bits, where they stand in their quads: times 2^(8 (column % 4)).
template <Code code, int first, int columns, class F>
QCORE_INLINE void each_column_in_place(const uint8_t* chunk, const QuadMasks<bits_of(code)>& masks, F&& f) {
  constexpr int bits = bits_of(code);
  unroll<columns / 4>([&](auto place) QCORE_INSIDE {
    constexpr int t = first / 4 + place;
    I16 word;
    if constexpr (one_plane(bits)) {
      constexpr int stacked = 8 / bits, shift = bits * (t % stacked);
      word = load_i(chunk + 64 * (t / stacked));
      if constexpr (shift) word = srl(word, shift);
    } else {
      word = quad<bits, t>(chunk);
    }
    unroll<4>([&](auto byte) QCORE_INSIDE { f(to_float(word & masks.of[byte]), std::integral_constant<int, 4 * t + byte>{}); });
  });
}

}  // namespace QCORE_ISA
}  // namespace qcore
