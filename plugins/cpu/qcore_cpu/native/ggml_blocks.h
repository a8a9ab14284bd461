// What ggml's blocks hold: codes, scales and minima, as the packed layout keeps them (ggml-common.h, ggml-quants.c).
#pragma once
#include <cstdint>
#include <cstring>

namespace qcore {

// Eight codes of `bits` bits, the lowest first, into as many bytes: halves move apart, then quarters, then codes.
template <int bits>
inline uint64_t spread(uint64_t word) {
  static_assert(bits < 8);
  constexpr auto low = [](int count) { return (uint64_t{1} << count) - 1; };
  constexpr uint64_t four = low(4 * bits), two = low(2 * bits) * 0x0000000100000001u, one = low(bits) * 0x0001000100010001u;
  word = (word & four) | (word << (32 - 4 * bits) & four << 32);
  word = (word & two) | (word << (16 - 2 * bits) & two << 16);
  return (word & one) | (word << (8 - bits) & one << 8);
}

// Some bits of a block's codes: `run` bytes hold the lowest bits of as many codes, then the next bits of the codes that follow, and so on.
struct Plane {
  int at, bits, run;
};

// How a block's scales are stored.
enum class Stored {
  kHalf,       // a float16
  kHalves,     // the same, and its minimum behind it
  kSign,       // a float16 d for codes of a bit: 2 d and -d
  kByte,       // an exponent
  kNibbles,    // 16 bytes: codes of scales and of minima; two float16 are above them
  kSixBits,    // 12 bytes: 8 codes of scales and 8 of minima; two float16 are above them
  kSixSigned,  // 12 bytes: 16 codes of scales, 32 too high
  kBytes,      // 16 codes of scales
  kTwoAndFour, // 8 codes of scales, 32 too high: their two high bits, then the four low ones
};

struct BlockForm {
  int64_t type;  // ggml's number
  int64_t columns, bytes;
  Plane low, high;  // of codes; `high` goes on top of `low`
  Stored stored;
  int scales;       // where codes of scales begin
  int half;         // where the float16 stands, and that of minima behind it
};

constexpr BlockForm kForms[] = {
    {2, 32, 18, {2, 4, 16}, {}, Stored::kHalf, 0, 0},                        // q4_0
    {3, 32, 20, {4, 4, 16}, {}, Stored::kHalves, 0, 0},                      // q4_1
    {6, 32, 22, {6, 4, 16}, {2, 1, 1}, Stored::kHalf, 0, 0},                 // q5_0
    {7, 32, 24, {8, 4, 16}, {4, 1, 1}, Stored::kHalves, 0, 0},               // q5_1
    {8, 32, 34, {2, 8, 32}, {}, Stored::kHalf, 0, 0},                        // q8_0
    {10, 256, 84, {16, 2, 32}, {}, Stored::kNibbles, 0, 80},                 // q2_k
    {11, 256, 110, {32, 2, 32}, {0, 1, 32}, Stored::kSixSigned, 96, 108},    // q3_k
    {12, 256, 144, {16, 4, 32}, {}, Stored::kSixBits, 4, 0},                 // q4_k
    {13, 256, 176, {48, 4, 32}, {16, 1, 32}, Stored::kSixBits, 4, 0},        // q5_k
    {14, 256, 210, {0, 4, 64}, {128, 2, 32}, Stored::kBytes, 192, 208},      // q6_k
    {20, 32, 18, {2, 4, 16}, {}, Stored::kHalf, 0, 0},                       // iq4_nl
    {23, 256, 136, {8, 4, 16}, {}, Stored::kTwoAndFour, 2, 0},               // iq4_xs
    {35, 256, 66, {0, 2, 32}, {}, Stored::kHalf, 0, 64},                     // tq2_0
    {39, 32, 17, {1, 4, 16}, {}, Stored::kByte, 0, 0},                       // mxfp4
    {41, 128, 18, {2, 1, 1}, {}, Stored::kSign, 0, 0},                       // q1_0
    {42, 64, 18, {2, 2, 1}, {}, Stored::kHalf, 0, 0},                        // q2_0
};
constexpr int kFormCount = sizeof kForms / sizeof kForms[0];

// The place of one of ggml's types among them; -1 where it has none.
inline int form_of(int64_t type) {
  for (int i = 0; i < kFormCount; i++)
    if (kForms[i].type == type) return i;
  return -1;
}

// A plane's bits of a block into codes of a byte each; behind the first plane, above the bits that are there already.
template <int form, bool high>
inline void read_plane(const uint8_t* block, uint8_t* codes) {
  constexpr BlockForm f = kForms[form];
  constexpr Plane plane = high ? f.high : f.low;
  constexpr int above = high ? f.low.bits : 0;
  const uint8_t* from = block + plane.at;
  auto put = [&](uint8_t* to, uint64_t eight) {
    uint64_t held = 0;
    if constexpr (high) std::memcpy(&held, to, 8);
    held |= eight << above;
    std::memcpy(to, &held, 8);
  };
  if constexpr (plane.bits == 8) {
    std::memcpy(codes, from, f.columns);
  } else if constexpr (plane.run == 1) {
    for (int64_t k = 0; k < f.columns; k += 8, from += plane.bits) {
      uint64_t word = 0;
      std::memcpy(&word, from, plane.bits);
      put(codes + k, spread<plane.bits>(word));
    }
  } else {
    constexpr uint64_t mask = 0x0101010101010101u * ((1u << plane.bits) - 1);
    for (uint8_t* const end = codes + f.columns; codes < end; from += plane.run)
      for (int shift = 0; shift < 8; shift += plane.bits, codes += plane.run)
        for (int i = 0; i < plane.run; i += 8) {
          uint64_t word;
          std::memcpy(&word, from + i, 8);
          put(codes + i, word >> shift & mask);
        }
  }
}

// A block's codes, a byte each.
template <int form>
inline void read_codes(const uint8_t* block, uint8_t* codes) {
  read_plane<form, false>(block, codes);
  if constexpr (kForms[form].high.bits > 0) read_plane<form, true>(block, codes);
}

// What stands for a block's groups in Header::scales and Header::offsets, and above them.
struct BlockScales {
  uint16_t half, minimum;            // float16: of the block
  uint8_t codes[16], minima[16];     // of its groups, where it has some of its own
};

// Groups of a block that have codes of their own; 0 where the block is a group.
constexpr int groups_of(Stored stored) {
  return stored == Stored::kNibbles || stored == Stored::kSixSigned || stored == Stored::kBytes ? 16 : stored == Stored::kSixBits || stored == Stored::kTwoAndFour ? 8 : stored == Stored::kByte ? 1 : 0;
}
constexpr bool has_half(Stored stored) { return stored != Stored::kByte; }
constexpr bool has_minimum(Stored stored) {
  return stored == Stored::kHalves || stored == Stored::kSign || stored == Stored::kNibbles || stored == Stored::kSixBits;
}

inline bool is_number(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// False where a scale or a minimum is no finite number to the kernels.
template <int form>
inline bool read_scales(const uint8_t* block, BlockScales& out) {
  constexpr BlockForm f = kForms[form];
  const uint8_t* const from = block + f.scales;
  if constexpr (f.stored == Stored::kByte) {
    out.codes[0] = *from;
    return *from != 255;
  }
  std::memcpy(&out.half, block + f.half, 2);
  bool good = is_number(out.half);
  if constexpr (f.stored == Stored::kSign) {
    out.minimum = out.half ^ 0x8000;
    good = (out.half & 0x7c00) < 0x7800;  // twice of it is finite
    // A subnormal number's bits move up, a normal one's exponent grows.
    out.half = static_cast<uint16_t>((out.half & 0x8000) | (out.half & 0x7c00 ? (out.half & 0x7fff) + 0x400 : (out.half & 0x7fff) << 1));
  } else if constexpr (has_minimum(f.stored)) {
    std::memcpy(&out.minimum, block + f.half + 2, 2);
    good = good && is_number(out.minimum);
  }
  if constexpr (f.stored == Stored::kNibbles || f.stored == Stored::kBytes) std::memcpy(out.codes, from, 16);
  if constexpr (f.stored == Stored::kSixBits)
    for (int i = 0; i < 4; i++) {
      out.codes[i] = from[i] & 63, out.minima[i] = from[4 + i] & 63;
      out.codes[4 + i] = static_cast<uint8_t>((from[8 + i] & 15) | from[i] >> 6 << 4);
      out.minima[4 + i] = static_cast<uint8_t>(from[8 + i] >> 4 | from[4 + i] >> 6 << 4);
    }
  if constexpr (f.stored == Stored::kSixSigned)
    for (int i = 0; i < 16; i++) {
      const int low = from[i % 8] >> (i < 8 ? 0 : 4) & 15, high = from[8 + i % 4] >> 2 * (i / 4) & 3;
      out.codes[i] = static_cast<uint8_t>((low | high << 4) - 32);
    }
  if constexpr (f.stored == Stored::kTwoAndFour) {
    uint16_t high;
    std::memcpy(&high, from, 2);
    for (int i = 0; i < 8; i++) out.codes[i] = static_cast<uint8_t>(((from[2 + i / 2] >> 4 * (i % 2) & 15) | (high >> 2 * i & 3) << 4) - 32);
  }
  return good;
}

}  // namespace qcore
