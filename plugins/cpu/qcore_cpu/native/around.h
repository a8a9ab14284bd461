// What stands around the linear layers of a decoder: norms, activations and attention of one token, in float32.
#pragma once
#include <cmath>

#include "decoder.h"
#include "activations.h"

namespace qcore {
namespace QCORE_ISA {

inline void put(F16 value, Float type, void* out, int64_t place) {
  if (type == Float::kF32) store_f(static_cast<float*>(out) + place, value);
  else if (type == Float::kF16) narrow_f16(static_cast<uint16_t*>(out) + place, value);
  else narrow_bf16(static_cast<uint16_t*>(out) + place, value);
}

// Calls f(place, full) for runs of 16; of the last, `full` is how many count.
template <class F>
QCORE_INLINE void each_run(int64_t count, F&& f) {
  for (int64_t place = 0; place < count; place += 16) f(place, count - place < 16 ? count - place : 16);
}

inline F16 load_some(const float* from, int64_t count) {
  if (count == 16) return load_f(from);
  alignas(64) float values[16] = {};
  std::memcpy(values, from, count * 4);
  return load_f(values);
}

inline void put_some(F16 value, Float type, void* out, int64_t place, int64_t count) {
  if (count == 16) return put(value, type, out, place);
  alignas(64) float values[16];
  put(value, type, values, 0);
  std::memcpy(static_cast<char*>(out) + place * width_of(type), values, count * width_of(type));
}

// out = x / rms(x) * weight, or x itself where there is no weight.
inline void normalize(const float* x, const float* weight, int64_t count, float epsilon, Float type, void* out) {
  F16 factor = all_f(1);
  if (weight) {
    F16 squares = zero_f();
    each_run(count, [&](int64_t place, int64_t full) {
      const F16 value = load_some(x + place, full);
      squares = fma(value, value, squares);
    });
    factor = all_f(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(count) + epsilon));
  }
  each_run(count, [&](int64_t place, int64_t full) {
    F16 value = load_some(x + place, full);
    if (weight) value = mul(mul(value, factor), load_some(weight + place, full));
    put_some(value, type, out, place, full);
  });
}

inline void narrow_values(const float* from, Float type, int64_t count, void* to) {
  each_run(count, [&](int64_t place, int64_t full) { put_some(load_some(from + place, full), type, to, place, full); });
}

// e^x: x = n ln 2 + r, a polynomial of degree 6 in r (Taylor's, |r| <= 0.35: 2e-7 of the value).
inline F16 exp_f(F16 x) {
  const F16 given = clamp_f(x, -87.0f, 88.0f);
  const F16 n = round_f(mul(given, all_f(1.44269504f)));
  F16 r = fma(n, all_f(-0.693145752f), given);
  r = fma(n, all_f(-1.42860677e-6f), r);
  F16 sum = all_f(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, r, all_f(factor));
  return as_float(add(as_int(sum), sll(to_int(n), 23)));
}

// out = activation(gate) * up
inline void activate(const float* gate, const float* up, int64_t count, int64_t kind, Float type, void* out) {
  each_run(count, [&](int64_t place, int64_t full) {
    const F16 x = load_some(gate + place, full);
    F16 inside = x;  // x * sigmoid(inside)
    if (static_cast<Activation>(kind) == Activation::kGeluTanh)  // (1 + tanh(t)) / 2 = sigmoid(2 t)
      inside = mul(mul(x, fma(mul(x, x), all_f(0.044715f), all_f(1))), all_f(2 * 0.7978845608f));
    const F16 sigmoid = div(all_f(1), add(all_f(1), exp_f(mul(inside, all_f(-1)))));
    put_some(mul(mul(x, sigmoid), load_some(up + place, full)), type, out, place, full);
  });
}

// The nearest code of a float of 8 bits, ties to even; values beyond the greatest number become it.
template <Code code>
uint8_t float8_of(float value, float greatest) {
  constexpr FloatShape shape = shape_of(code);
  const float magnitude = std::fmin(std::fabs(value), greatest);
  int32_t found;
  if (magnitude < shape.smallest() * (1 << shape.mantissa)) {
    found = static_cast<int32_t>(std::nearbyint(magnitude / shape.smallest()));
  } else {
    std::memcpy(&found, &magnitude, 4);
    found += (1 << (22 - shape.mantissa)) - 1 + (found >> (23 - shape.mantissa) & 1);
    found = (found >> (23 - shape.mantissa)) - ((127 - shape.bias) << shape.mantissa);
  }
  return static_cast<uint8_t>(found | (std::signbit(value) ? 128 : 0));
}

// A head's key or value as a row of codes, as qcore.kernels.kv_cache has it. count is a multiple of 16.
inline void keep_row(const float* from, const KvSide& side, Kept kept, int64_t head, int64_t count, void* to) {
  uint8_t* const row = static_cast<uint8_t*>(to);
  const float greatest_code = kept == Kept::kInt8 ? 127.0f : kept == Kept::kE4M3 ? 448.0f : 57344.0f;
  float scale;
  if (side.scale) {
    scale = side.scale[head];
  } else {
    scale = std::fmax(greatest(from, 0, count) / greatest_code, 1.17549435e-38f);
    std::memcpy(row + count, &scale, 4);
  }
  const F16 divisor = all_f(scale), factor = all_f(side.inverse ? side.inverse[head] : 0), zero = all_f(side.zero ? side.zero[head] : 0);
  for (int64_t i = 0; i < count; i += 16) {
    const F16 x = load_f(from + i), scaled = side.inverse ? mul(x, factor) : div(x, divisor);
    if (kept == Kept::kInt8) {
      narrow_s8(reinterpret_cast<int8_t*>(row + i), clamp_f(add(round_f(scaled), zero), -128, 127));
      continue;
    }
    alignas(64) float values[16];
    store_f(values, scaled);
    for (int64_t k = 0; k < 16; k++)
      row[i + k] = kept == Kept::kE4M3 ? float8_of<Code::kE4M3>(values[k], greatest_code) : float8_of<Code::kE5M2>(values[k], greatest_code);
  }
}

// Keys or values of a kv head: rows one after the other. What a row holds is its codes, less `zero`, times its scale.
struct KeptRows {
  const uint8_t* rows;
  int64_t row_bytes, count;
  Kept kept;
  Float type;
  const float* scale;  // null: behind each row's codes
  float zero;

  KeptRows(const Attention& a, const void* all, const KvSide& side, int64_t head)
      : rows(static_cast<const uint8_t*>(all) + head * a.capacity * a.row_bytes), row_bytes(a.row_bytes), count(a.head_dim), kept(a.kept), type(a.type),
        scale(side.scale ? side.scale + head : nullptr), zero(side.zero ? side.zero[head] : 0) {}

  QCORE_INLINE F16 codes(int64_t t, int64_t i) const {
    const uint8_t* const row = rows + t * row_bytes;
    switch (kept) {
      case Kept::kInt8: return sub_f(to_float(widen_s8(reinterpret_cast<const int8_t*>(row) + i)), all_f(zero));
      case Kept::kE4M3: return small_float<Code::kE4M3>(widen_u8(row + i));
      case Kept::kE5M2: return small_float<Code::kE5M2>(widen_u8(row + i));
      default: return get(row, type, i);
    }
  }
  QCORE_INLINE float scale_of(int64_t t) const {
    if (kept == Kept::kPlain) return 1;
    float found;
    if (scale) return *scale;
    std::memcpy(&found, rows + t * row_bytes + count, 4);
    return found;
  }
};

// Heads first .. last - 1, all of one token. head_dim is a multiple of 16.
inline void attend(const Attention& a, int64_t first, int64_t last) {
  for (int64_t head = first; head < last; head++) {
    const int64_t kv_head = head / (a.heads / a.kv_heads);
    const KeptRows keys(a, a.keys, a.key_side, kv_head), kept_values(a, a.values, a.value_side, kv_head);
    const float* const query = a.queries + head * a.head_dim;
    float* const scores = a.scores + head * a.capacity;
    float most = -INFINITY;
    for (int64_t t = a.first; t < a.last; t++) {
      F16 sum = zero_f();
      for (int64_t i = 0; i < a.head_dim; i += 16) sum = fma(load_f(query + i), keys.codes(t, i), sum);
      float score = sum_of(sum) * keys.scale_of(t) * a.scale;
      if (a.softcap != 0) score = std::tanh(score / a.softcap) * a.softcap;
      scores[t] = score;
      most = score > most ? score : most;
    }
    F16 totals = zero_f();
    for (int64_t t = a.first; t < a.last; t += 16) {
      const int64_t full = a.last - t < 16 ? a.last - t : 16;
      alignas(64) float values[16];
      for (int64_t i = 0; i < 16; i++) values[i] = i < full ? scores[t + i] - most : -INFINITY;
      F16 chances = exp_f(load_f(values));
      if (full < 16) {
        store_f(values, chances);
        for (int64_t i = full; i < 16; i++) values[i] = 0;
        chances = load_f(values);
      }
      totals = add(totals, chances);
      put_some(chances, Float::kF32, scores, t, full);
    }
    const F16 whole = all_f(1.0f / sum_of(totals));
    if (a.kept != Kept::kPlain)
      for (int64_t t = a.first; t < a.last; t++) scores[t] *= kept_values.scale_of(t);
    for (int64_t i = 0; i < a.head_dim; i += 16) {
      F16 sums[4] = {zero_f(), zero_f(), zero_f(), zero_f()};
      for (int64_t t = a.first; t < a.last; t++)
        sums[t % 4] = fma(all_f(scores[t]), kept_values.codes(t, i), sums[t % 4]);
      put(mul(add(add(sums[0], sums[1]), add(sums[2], sums[3])), whole), a.type, a.out, head * a.head_dim + i);
    }
  }
}

}  // namespace QCORE_ISA
}  // namespace qcore
