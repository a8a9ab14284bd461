// Random numbers, and the narrow types in words of their definitions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

inline std::mt19937 generator;

inline int64_t below(int64_t count) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(count)); }
inline float uniform() { return static_cast<float>(generator()) / 4294967296.0f; }

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t bf16(float value) { return static_cast<uint16_t>((to_bits(value) + 0x7fff + (to_bits(value) >> 16 & 1)) >> 16); }

// float16 of a number, cut off; small ones become 0.
inline uint16_t f16(float value) {
  if (std::fabs(value) < 1e-4f) return 0;
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

inline double small_float(int code, int exponent_bits, int mantissa_bits, int bias) {
  const int mantissa = code & ((1 << mantissa_bits) - 1), exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double value = exponent ? std::ldexp(1 + std::ldexp(mantissa, -mantissa_bits), exponent - bias)
                                : std::ldexp(std::ldexp(mantissa, -mantissa_bits), 1 - bias);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -value : value;
}

inline float wide_f16(uint16_t half) {  // infinities become large numbers
  return static_cast<float>(small_float(half, 5, 10, 15));
}

inline float read_float(const void* from, qcore::Float type, int64_t place) {
  float value;
  uint16_t half;
  if (type == qcore::Float::kF32) return std::memcpy(&value, static_cast<const float*>(from) + place, 4), value;
  std::memcpy(&half, static_cast<const uint16_t*>(from) + place, 2);
  return type == qcore::Float::kF16 ? wide_f16(half) : from_bits(static_cast<uint32_t>(half) << 16);
}

// Writes the number that is nearest to `value`, or near it; returns that one.
inline float write_float(void* to, qcore::Float type, int64_t place, float value) {
  const uint16_t half = type == qcore::Float::kF16 ? f16(value) : bf16(value);
  if (type == qcore::Float::kF32) std::memcpy(static_cast<float*>(to) + place, &value, 4);
  else std::memcpy(static_cast<uint16_t*>(to) + place, &half, 2);
  return read_float(to, type, place);
}

// How far kernels may be from sums in double, as a part of the numbers' usual size.
inline double bound_of(qcore::Float type) { return type == qcore::Float::kF32 ? 2e-5 : type == qcore::Float::kF16 ? 1e-3 : 8e-3; }

// What was found against what is right.
class Errors {
 public:
  void add(double found, double right) { add(found, right, std::fabs(right)); }
  // size: of what was summed, where much of it cancels.
  void add(double found, double right, double size) { pairs_.push_back({found, right, size}); }
  // The greatest error, as a part of the number and of what is usual among all of them. NaN where one is.
  double greatest() const {
    double square = 0, most = 0;
    for (const auto& pair : pairs_) square += pair.right * pair.right;
    const double usual = std::sqrt(square / static_cast<double>(pairs_.size()));
    for (const auto& pair : pairs_) {
      const double error = std::fabs(pair.found - pair.right) / (pair.size + usual + 1e-3);
      most = error <= most || most != most ? most : error;  // NaN stays
    }
    return most;
  }

 private:
  struct Pair {
    double found, right, size;
  };
  std::vector<Pair> pairs_;
};
